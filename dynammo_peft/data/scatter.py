"""Sums of outer products, which covariances are made of: exact, or of few directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drift import AffineMap


@dataclass
class Scatter:
    """The sum over features of the outer products of their deviations from their class means, `(C, C)`."""

    matrix: Tensor

    @classmethod
    def zeros(cls, features: int) -> Scatter:
        """Of no features."""
        return cls(torch.zeros(features, features, dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """Adds deviations, `(N, C)`."""
        # Not in place: a state that was taken before stays what it was.
        self.matrix = self.matrix + rows.T @ rows

    def add_scatter(self, other: Scatter) -> None:
        """Adds another sum of the same kind."""
        self.matrix = self.matrix + other.matrix

    def move(self, affine_map: AffineMap, count: int) -> None:
        """Moves it into another feature space; each of `count` features brings the map's error with it."""
        self.matrix = affine_map.weight.T @ self.matrix @ affine_map.weight + count * affine_map.residual

    def dense(self) -> Tensor:
        """`(C, C)`."""
        return self.matrix


@dataclass
class LowRankScatter:
    """A `Scatter` of `rank` directions, and the exact variance of each feature: `factor.T @ factor + diag(diagonal)`.

    Takes `(rank + 1) * C` numbers instead of `C * C`.
    """

    factor: Tensor
    diagonal: Tensor
    rank: int

    @classmethod
    def zeros(cls, features: int, rank: int) -> LowRankScatter:
        """Of no features."""
        return cls(torch.zeros(0, features, dtype=torch.float64), torch.zeros(features, dtype=torch.float64), rank)

    def add(self, rows: Tensor) -> None:
        """Adds deviations, `(N, C)`; what falls outside the leading directions goes to the diagonal."""
        # Also where all fit: what is kept are directions of all images, and not the features of each.
        _, values, vectors = torch.linalg.svd(torch.cat([self.factor, rows]), full_matrices=False)
        directions = values[:, None] * vectors
        self.diagonal = self.diagonal + directions[self.rank :].square().sum(dim=0)
        self.factor = directions[: self.rank]

    def add_scatter(self, other: LowRankScatter) -> None:
        """Adds another sum of the same kind."""
        self.diagonal = self.diagonal + other.diagonal
        self.add(other.factor)

    def move(self, affine_map: AffineMap, count: int) -> None:
        """Moves it into another feature space; of what is not in the leading directions, the variances only."""
        self.factor = self.factor @ affine_map.weight
        spread = affine_map.weight.square().T @ self.diagonal
        self.diagonal = spread + count * affine_map.residual.diagonal()

    def dense(self) -> Tensor:
        """`(C, C)`."""
        return self.factor.T @ self.factor + torch.diag(self.diagonal)

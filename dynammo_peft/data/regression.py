"""Ridge regression of what features change by on the features, from sums over chunks of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor


# Images whose features are held in `float64` at a time.
CHUNK = 1024


@dataclass
class _Sums:
    """Sums over images, in `float64`: all that their normal equations need.

    Args:
        count (`int`): Number of images.
        features (`Tensor`): Sum of their features, `(C,)`.
        change (`Tensor`): Sum of what these change by, `(C,)`.
        gram (`Tensor`): Products of features with features, `(C, C)`.
        cross (`Tensor`): Products of features with what they change by, `(C, C)`.
    """

    count: int
    features: Tensor
    change: Tensor
    gram: Tensor
    cross: Tensor

    def subtract_from(self, total: _Sums) -> _Sums:
        """Becomes the sums over the other images, given those over all."""
        self.count = total.count - self.count
        for name in ("features", "change", "gram", "cross"):
            # In place: one more matrix may be as large as all features.
            torch.sub(getattr(total, name), getattr(self, name), out=getattr(self, name))
        return self


class Pairs:
    """Features of images and what they change by, of which a chunk is held in `float64` at a time.

    Both are given out less their means over all images: sums are then as large as the spread makes them, and lose
    little where those over some images are those over all less those over others.

    Args:
        features (`Tensor`): `(N, C)`.
        targets (`Tensor`): What they become, `(N, C)`.
        kept (`float`): What the targets hold of the features themselves: 1, or 0 if they are the change alone.

    Attributes:
        mean (`Tensor`): Of each feature, `(C,)`, and `variances` its variance.
        mean_change (`Tensor`): Of what each feature changes by, `(C,)`.
        target_variances (`Tensor`): Of each target, `(C,)`.
    """

    def __init__(self, features: Tensor, targets: Tensor, kept: float = 1) -> None:
        self.features, self.targets, self.kept = features.detach(), targets.detach(), kept
        self.mean, self.variances = _moments(self.features)
        mean_target, self.target_variances = _moments(self.targets)
        self.mean_change = mean_target - kept * self.mean

    def few(self, count: int) -> bool:
        """Whether so many images are fewer than features."""
        return count < self.features.shape[1]

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features and change of some images, `(M, C)` each, less their means over all."""
        features, targets = (part[rows].cpu().double() for part in (self.features, self.targets))
        change = targets.sub_(features, alpha=self.kept).sub_(self.mean_change)
        return features.sub_(self.mean), change

    def chunks(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What `take` gives of some images, chunk by chunk."""
        return map(self.take, rows.split(CHUNK))

    def sums(self, rows: Tensor) -> _Sums:
        """The sums over some images."""
        width = len(self.mean)
        (features, change), (gram, cross) = self.mean.new_zeros(2, width), self.mean.new_zeros(2, width, width)
        for some, changes in self.chunks(rows):
            features += some.sum(dim=0)
            change += changes.sum(dim=0)
            gram.addmm_(some.T, some)
            cross.addmm_(some.T, changes)
        return _Sums(len(rows), features, change, gram, cross)

    def class_means(self, places: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean features and mean change of `M` classes, `(M, C)` each, given each image's place among them."""
        means, changes = self.mean.new_zeros(2, len(counts), len(self.mean))
        for part, (some, change) in zip(places.split(CHUNK), self.chunks(torch.arange(len(places)))):
            means.index_add_(0, part, some)
            changes.index_add_(0, part, change)
        return means / counts[:, None], changes / counts[:, None]

    def residual(self, weight: Tensor) -> Tensor:
        """Covariance of what of the change `weight`, `(C, C)`, does not tell of the features, `(C, C)`."""
        # Not from sums, whose differences would say nothing of errors far smaller than the change.
        residual = torch.zeros_like(weight)
        for some, change in self.chunks(torch.arange(len(self.features))):
            errors = change.addmm_(some, weight, alpha=-1)
            residual.addmm_(errors.T, errors)
        return residual / len(self.features)


class _Regression:
    """The normal equations of the change on the features, from sums, which are used up.

    Args:
        sums (`_Sums`): Over the images.
        variances (`Tensor`): They scale the ridge, `(C,)`.

    Attributes:
        mean (`Tensor`): Of the features, `(C,)`, and `mean_change` of the change.
        gram (`Tensor`): The matrix of the system but for the ridge.
        change (`Tensor`): Its right-hand side.
    """

    def __init__(self, sums: _Sums, variances: Tensor) -> None:
        self.mean, self.mean_change = sums.features / sums.count, sums.change / sums.count
        self.scales = (sums.count * variances).sqrt()
        self.gram = sums.gram.addr_(sums.features, self.mean, alpha=-1).div_(self.scales).div_(self.scales[:, None])
        self.change = sums.cross.addr_(sums.features, self.mean_change, alpha=-1).div_(self.scales[:, None])

    def system(self, ridge: float) -> Tensor:
        """The matrix whose inverse times `change` is the map less the identity but for scales."""
        system = self.gram.clone()
        # Without a pull, features that never vary or depend on others would leave no unique solution.
        system.diagonal().add_(ridge + 1e-12)
        return system

    def from_features(self, features: Tensor) -> Tensor:
        """Features `(M, C)` less their mean in the variables of the system."""
        return features / self.scales

    def to_features(self, solution: Tensor) -> Tensor:
        """What the inverse of the system times `change` says of the features: the map less the identity, `(C, C)`."""
        return solution / self.scales[:, None]

    def predict(self, features: Tensor, ridge: float) -> Tensor:
        """What features `(M, C)` change by, `(M, C)`; both less their means over all images."""
        root = torch.linalg.cholesky(self.system(ridge))
        moved = self.from_features(features - self.mean)
        return torch.cholesky_solve(moved.T, root).T @ self.change + self.mean_change


class _DualRegression(_Regression):
    """The same for fewer images than features, by the images' weights, with a system of `(N, N)`.

    It gives the same map (Saunders et al. 1998, "Ridge Regression Learning Algorithm in Dual Variables").

    Args:
        features (`Tensor`): `(N, C)`.
        change (`Tensor`): `(N, C)`.
        variances (`Tensor`): They scale the ridge, `(C,)`.
    """

    def __init__(self, features: Tensor, change: Tensor, variances: Tensor) -> None:
        self.mean, self.mean_change = features.mean(dim=0), change.mean(dim=0)
        self.scales = (len(features) * variances).sqrt()
        self.scaled = (features - self.mean) / self.scales
        self.gram = self.scaled @ self.scaled.T
        self.change = change - self.mean_change

    def from_features(self, features: Tensor) -> Tensor:
        return super().from_features(features) @ self.scaled.T

    def to_features(self, solution: Tensor) -> Tensor:
        return super().to_features(self.scaled.T @ solution)


def solve(pairs: Pairs, ridge: float, variances: Optional[Tensor]) -> Tensor:
    """What features change by, as a linear map of all of them less their means, `(C, C)`."""
    rows, variances = torch.arange(len(pairs.features)), floored(pairs.variances, variances)
    if pairs.few(len(rows)):
        fit = _DualRegression(*pairs.take(rows), variances)
    else:
        fit = _Regression(pairs.sums(rows), variances)
    return fit.to_features(torch.linalg.solve(fit.system(ridge), fit.change))


def left_out(
    pairs: Pairs, labels: Tensor, folds: int, variances: Tensor
) -> Iterator[tuple[_Regression, Tensor, Tensor]]:
    """Parts of the classes: what the others' images say, and mean features and mean change of each, `(M, C)`.

    Both are less their means over all images.
    """
    classes, places, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
    total = None if pairs.few(len(places)) else pairs.sums(torch.arange(len(places)))
    means, changes = pairs.class_means(places, counts)
    for fold in range(min(folds, len(classes))):
        yield _fit_others(pairs, places % folds == fold, total, variances), means[fold::folds], changes[fold::folds]


def _fit_others(pairs: Pairs, held: Tensor, total: Optional[_Sums], variances: Tensor) -> _Regression:
    """The normal equations of the images that are not held out, `(N,)`, given the sums over all."""
    others = (~held).nonzero().flatten()
    if pairs.few(len(others)):
        return _DualRegression(*pairs.take(others), variances)
    return _Regression(pairs.sums(held.nonzero().flatten()).subtract_from(total), variances)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each feature, `(C,)` each, in `float64` on the CPU."""
    chunks = features.split(CHUNK)
    mean = sum(chunk.cpu().double().sum(dim=0) for chunk in chunks) / len(features)
    squares = sum((chunk.cpu().double() - mean).square().sum(dim=0) for chunk in chunks)
    return mean, squares / len(features)


def floored(variances: Tensor, least: Optional[Tensor] = None) -> Tensor:
    """Variances of features, `(C,)`, never quite zero, and at least what is said."""
    if least is not None:
        variances = torch.maximum(variances, least.to(variances))
    return variances + 1e-12 * variances.sum() + torch.finfo(variances.dtype).tiny

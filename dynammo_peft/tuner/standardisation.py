"""Standardised features, for as long as a head on them is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


# Of the mean square of features, what their variance must be to be more than rounding in single precision.
VARIES = 1e-10


@dataclass(frozen=True)
class Standardisation:
    """
    `(x - mean) / scale`: zero mean, and a variance of one on average over the features.

    How fast a linear head learns depends on the scale of its features, in which backbones differ by a factor of 20.
    The slower the head, the more the adapters in front of it bend the features. So the head is trained on standardised
    features, and takes the change into its weights afterwards.

    Args:
        mean (`Tensor`): `(C,)`.
        scale (`Tensor`): A positive scalar.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standardisation:
        """That of features `(N, C)`; features that do not vary keep their scale."""
        variance = features.var(dim=0, correction=0).mean()
        # Those of one image differ from batch to batch by rounding.
        varies = variance > VARIES * features.square().mean()
        return cls(features.mean(dim=0), torch.where(varies, variance.sqrt(), 1.0))

    def __call__(self, features: Tensor) -> Tensor:
        """Standardises the first columns of features, `(B, C)` or wider; further ones stay as they are."""
        mean, scale, width = self.mean.to(features), self.scale.to(features), len(self.mean)
        return torch.cat([(features[:, :width] - mean) / scale, features[:, width:]], dim=1)

    @torch.no_grad()
    def fold(self, head: nn.Linear) -> None:
        """Makes a head on standardised features one on features as they are, which computes the same."""
        weight = head.weight[:, : len(self.mean)]
        weight /= self.scale.to(weight)
        head.bias -= weight @ self.mean.to(weight)

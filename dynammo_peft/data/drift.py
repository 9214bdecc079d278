"""How features move when the model changes: an affine map between the feature spaces before and after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AffineMap:
    """A map between feature spaces, `x @ weight + bias`, and what it leaves unexplained.

    Args:
        weight (`Tensor`): `(C, C)`, `float64`.
        bias (`Tensor`): `(C,)`, `float64`.
        residual (`Tensor`): Covariance of its errors on the features that it was fitted to, `(C, C)`, `float64`.
    """

    weight: Tensor
    bias: Tensor
    residual: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features of the old space, `(N, C)`, moved to the new one."""
        return (features.double() @ self.weight + self.bias).to(features.dtype)


def fit_affine_map(before: Tensor, after: Tensor, ridge: float = 1.0) -> AffineMap:
    """The affine map that takes the features of images to those of the same images under another model.

    Ridge regression towards the identity: `min |X A - Y|^2 + ridge * v * |A - 1|^2` for centred features, with `v` the
    mean sum of squares of an old feature. A merge moves features by little, and a task's images span only some
    directions of the features of all classes.

    Args:
        before (`Tensor`): Features under the old model, `(N, C)`.
        after (`Tensor`): Features of the same images under the new model, `(N, C)`.
        ridge (`float`): Strength of the pull to the identity.

    Returns:
        `AffineMap`: The map, on the CPU.

    Raises:
        ValueError: If the two are not of the same images, there are none, or `ridge` is negative.
    """
    if before.shape != after.shape or len(before) == 0:
        raise ValueError(
            f"Features before and after must be those of the same images, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}."
        )
    if ridge < 0:
        raise ValueError(f"ridge={ridge} must not be negative.")
    before, after = before.double().cpu(), after.double().cpu()
    mean_before, mean_after = before.mean(dim=0), after.mean(dim=0)
    centred = before - mean_before
    gram = centred.T @ centred
    identity = torch.eye(len(gram), dtype=gram.dtype)
    # Without the last terms, features that never vary would leave the system without a unique solution.
    strength = ridge * gram.trace() / len(gram) + 1e-12 * gram.trace() + torch.finfo(gram.dtype).tiny
    change = after - mean_after - centred
    weight = identity + torch.linalg.solve(gram + strength * identity, centred.T @ change)
    errors = after - mean_after - centred @ weight
    return AffineMap(weight, mean_after - mean_before @ weight, errors.T @ errors / len(errors))

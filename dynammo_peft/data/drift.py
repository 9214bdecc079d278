"""How features move when the model changes: an affine map between the feature spaces before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

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


# Strengths among which `choose_ridge` chooses.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def fit_affine_map(before: Tensor, after: Tensor, ridge: float = 1.0, variances: Optional[Tensor] = None) -> AffineMap:
    """The affine map that takes the features of images to those of the same images under another model.

    Ridge regression towards the identity: `min |X A - Y|^2 + ridge * sum_i v_i |A_i - 1_i|^2` for centred features,
    with `v_i` the sum of squares of feature `i` before and `A_i` a row. A merge moves features by little, a task's
    images span only some directions of the features of all classes, and layers differ in scale. A few images that are
    all alike say little of how far a feature varies; `variances`, if known, say it better.

    Args:
        before (`Tensor`): Features under the old model, `(N, C)`.
        after (`Tensor`): Features of the same images under the new model, `(N, C)`.
        ridge (`float`): Strength of the pull to the identity; see [`choose_ridge`].
        variances (`Optional[Tensor]`): Of each feature before, within classes, `(C,)`: the least of which `v_i` is
            made, where these images vary by less.

    Returns:
        `AffineMap`: The map, on the CPU.

    Raises:
        ValueError: If the two are not of the same images, there are none, `variances` are of other features, or
            `ridge` is negative.
    """
    _check_pairs(before, after, variances)
    if ridge < 0:
        raise ValueError(f"ridge={ridge} must not be negative.")
    before, after = before.double().cpu(), after.double().cpu()
    fit = _Regression(before, after, _variances(before, variances))
    weight = fit.to_features(torch.linalg.solve(fit.system(ridge), fit.change))
    weight.diagonal().add_(1)
    errors = fit.after - fit.mean_after - fit.centred @ weight
    return AffineMap(weight, fit.mean_after - fit.mean_before @ weight, errors.T @ errors / len(errors))


def choose_ridge(
    before: Tensor,
    after: Tensor,
    labels: Tensor,
    candidates: Sequence[float] = RIDGES,
    folds: int = 5,
    variances: Optional[Tensor] = None,
) -> float:
    """The strength with which maps fitted on some classes best predict where the means of the others go.

    That is what a map is for: old classes, of which there are few images or none, have to be moved by what happened to
    the classes at hand.

    Args:
        before (`Tensor`): Features under the old model, `(N, C)`.
        after (`Tensor`): Features of the same images under the new model, `(N, C)`.
        labels (`Tensor`): Class of each image, `(N,)`.
        candidates (`Sequence[float]`): Strengths to choose from.
        folds (`int`): In how many parts the classes are left out, at most.
        variances (`Optional[Tensor]`): As of `fit_affine_map`.

    Returns:
        `float`: The strength; 1 if there is one class only, which cannot tell.

    Raises:
        ValueError: If the features are not of the same images, there are none, or `variances` are of other features.
    """
    _check_pairs(before, after, variances)
    before, after, labels = before.double().cpu(), after.double().cpu(), labels.cpu()
    classes = labels.unique()
    if len(classes) == 1:
        return 1.0
    variances = _variances(before, variances)
    # Each feature's own spread; of one that was silent before, which would be all that counts, a part of that after.
    units = torch.maximum(variances, _variances(after) / 10)
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for fold in range(min(folds, len(classes))):
        held = torch.isin(labels, classes[fold::folds])
        fit = _Regression(before[~held], after[~held], variances)
        means = [(before[labels == label].mean(0), after[labels == label].mean(0)) for label in classes[fold::folds]]
        moved, found = (torch.stack(parts) for parts in zip(*means))
        moved, found = moved - fit.mean_before, found - fit.mean_after
        for index, ridge in enumerate(candidates):
            root = torch.linalg.cholesky(fit.system(ridge))
            predicted = moved + torch.cholesky_solve(fit.from_features(moved).T, root).T @ fit.change
            errors[index] += ((found - predicted).square() / units).sum()
    return candidates[int(errors.argmin())]


def fit_correction(
    features: Tensor, errors: Tensor, labels: Tensor, ridge: float = 10.0, variances: Optional[Tensor] = None
) -> Tensor:
    """The affine map that says of features by how much something else about their images was expected wrongly.

    Ridge regression towards no error. Of the mean error a share of `n / (n + 2)` is taken to be common to all classes,
    and the rest to the `n` classes at hand alone.

    Args:
        features (`Tensor`): `(N, C)`.
        errors (`Tensor`): What was found less what was expected of the same images, `(N, C)`.
        labels (`Tensor`): Class of each image, `(N,)`.
        ridge (`float`): Strength of the pull to no error, in units of each feature's variance.
        variances (`Optional[Tensor]`): As of `fit_affine_map`: the least of these units.

    Returns:
        `Tensor`: `(C + 1, C)`, `float64`, in the last row what is added.

    Raises:
        ValueError: If features and errors are not of the same images, there are none, or `variances` are of other
            features.
    """
    _check_pairs(features, errors, variances)
    features, errors = features.double().cpu(), errors.double().cpu()
    fit = _Regression(features, features + errors, _variances(features, variances))
    weight = fit.to_features(torch.linalg.solve(fit.system(ridge), fit.change))
    classes = len(labels.unique())
    common = classes / (classes + 2) * errors.mean(dim=0)
    return torch.cat([weight, (common - fit.mean_before @ weight)[None]])


class _Regression:
    """The normal equations of the change from `before` to `after`, both `(N, C)`; `variances` scale the ridge.

    With fewer images than features they are those of the images' weights, `(N, N)`, which give the same map
    (Saunders et al. 1998, "Ridge Regression Learning Algorithm in Dual Variables").
    """

    def __init__(self, before: Tensor, after: Tensor, variances: Tensor) -> None:
        self.after, self.mean_before, self.mean_after = after, before.mean(dim=0), after.mean(dim=0)
        self.centred = before - self.mean_before
        self.scales = (len(before) * variances).sqrt()
        self.scaled = self.centred / self.scales
        self.dual = len(before) < before.shape[1]
        self.gram = self.scaled @ self.scaled.T if self.dual else self.scaled.T @ self.scaled
        change = after - self.mean_after - self.centred
        self.change = change if self.dual else self.scaled.T @ change

    def system(self, ridge: float) -> Tensor:
        """The matrix whose inverse times `change` is the map less the identity but for scales."""
        # Without a pull, features that never vary or depend on others would leave no unique solution.
        return self.gram + torch.diag(torch.full_like(self.gram[0], ridge + 1e-12))

    def from_features(self, features: Tensor) -> Tensor:
        """Centred features `(M, C)` in the variables of the system."""
        scaled = features / self.scales
        return scaled @ self.scaled.T if self.dual else scaled

    def to_features(self, solution: Tensor) -> Tensor:
        """What the inverse of the system times `change` says of the features: the map less the identity, `(C, C)`."""
        return (self.scaled.T @ solution if self.dual else solution) / self.scales[:, None]


def _variances(features: Tensor, least: Optional[Tensor] = None) -> Tensor:
    """Variance of each feature, `(C,)`, never quite zero, and at least what is said."""
    variances = features.var(dim=0, correction=0)
    if least is not None:
        variances = torch.maximum(variances, least.to(variances))
    return variances + 1e-12 * variances.sum() + torch.finfo(features.dtype).tiny


def _check_pairs(before: Tensor, after: Tensor, variances: Optional[Tensor] = None) -> None:
    if before.shape != after.shape or len(before) == 0:
        raise ValueError(
            f"Features before and after must be those of the same images, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}."
        )
    if variances is not None and variances.shape != before.shape[1:]:
        raise ValueError(f"There must be {before.shape[1]} variances, one a feature, got {tuple(variances.shape)}.")

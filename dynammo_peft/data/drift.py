"""How features move when the model changes: an affine map between the feature spaces before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

import torch
from torch import Tensor

from .regression import Pairs, floored, left_out, solve


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
# `n` classes show too little of how far others may stray from a map, by a factor of `1 + 4 / n` (docs/merging_log.md).
FEW_CLASSES = 4


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
    pairs = Pairs(before, after)
    weight = solve(pairs, ridge, variances)
    bias, residual = pairs.mean_change - pairs.mean @ weight, pairs.residual(weight)
    weight.diagonal().add_(1)
    return AffineMap(weight, bias, residual)


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
    if len(labels.unique()) == 1:
        return 1.0
    pairs = Pairs(before, after)
    variances = floored(pairs.variances, variances)
    # Each feature's own spread; of one that was silent before, which would be all that counts, a part of that after.
    units = torch.maximum(variances, floored(pairs.target_variances) / 10)
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for fit, means, changes in left_out(pairs, labels, folds, variances):
        for index, ridge in enumerate(candidates):
            errors[index] += ((changes - fit.predict(means, ridge)).square() / units).sum()
    return candidates[int(errors.argmin())]


def left_out_errors(
    before: Tensor,
    after: Tensor,
    labels: Tensor,
    ridge: float = 1.0,
    folds: int = 5,
    variances: Optional[Tensor] = None,
) -> Tensor:
    """By how much maps fitted on some classes miss where the means of the others go.

    What a map leaves unexplained of the images that it was fitted to tells little of classes that it was not fitted
    to, and few classes span few of the directions in which others may go.

    Args:
        before (`Tensor`): Features under the old model, `(N, C)`.
        after (`Tensor`): Features of the same images under the new model, `(N, C)`.
        labels (`Tensor`): Class of each image, `(N,)`.
        ridge (`float`): As of `fit_affine_map`.
        folds (`int`): As of `choose_ridge`.
        variances (`Optional[Tensor]`): As of `fit_affine_map`.

    Returns:
        `Tensor`: The mean over classes of the squared error of each feature's mean, `(C,)`, `float64`; of one class,
        which leaves none to fit on, the square of all that it changes by.

    Raises:
        ValueError: If the features are not of the same images, there are none, or `variances` are of other features.
    """
    _check_pairs(before, after, variances)
    pairs, classes = Pairs(before, after), len(labels.unique())
    if classes == 1:
        return pairs.mean_change.square()
    errors = torch.zeros_like(pairs.mean)
    for fit, means, changes in left_out(pairs, labels, folds, floored(pairs.variances, variances)):
        errors += (changes - fit.predict(means, ridge)).square().sum(dim=0)
    return errors / classes


def fit_map_of_others(
    before: Tensor, after: Tensor, labels: Tensor, ridge: float = 1.0, variances: Optional[Tensor] = None
) -> AffineMap:
    """The map of [`fit_affine_map`] for classes that none of its images is of, and how far these may stray from it.

    Its residual is widened, feature by feature, by `1 + 4 / n` times the [`left_out_errors`] of the `n` classes at
    hand: features that do not tell where others are count for less in what tells classes apart.

    Args:
        before (`Tensor`): Features under the old model, `(N, C)`.
        after (`Tensor`): Features of the same images under the new model, `(N, C)`.
        labels (`Tensor`): Class of each image, `(N,)`.
        ridge (`float`): As of `fit_affine_map`.
        variances (`Optional[Tensor]`): As of `fit_affine_map`.

    Returns:
        `AffineMap`: The map, on the CPU.

    Raises:
        ValueError: As of `fit_affine_map`.
    """
    found = fit_affine_map(before, after, ridge, variances)
    errors = left_out_errors(before, after, labels, ridge, variances=variances)
    factor = 1 + FEW_CLASSES / len(labels.unique())
    return replace(found, residual=found.residual + torch.diag(factor * errors))


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
    pairs = Pairs(features, errors, kept=0)
    weight = solve(pairs, ridge, variances)
    classes = len(labels.unique())
    common = classes / (classes + 2) * pairs.mean_change
    return torch.cat([weight, (common - pairs.mean @ weight)[None]])


def _check_pairs(before: Tensor, after: Tensor, variances: Optional[Tensor] = None) -> None:
    if before.shape != after.shape or len(before) == 0:
        raise ValueError(
            f"Features before and after must be those of the same images, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}."
        )
    if variances is not None and variances.shape != before.shape[1:]:
        raise ValueError(f"There must be {before.shape[1]} variances, one a feature, got {tuple(variances.shape)}.")

"""How features move when the model changes: an affine map between the feature spaces before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
# `n` classes show too little of how far others may stray from a map, by a factor of `1 + 4 / n` (docs/merging_log.md).
FEW_CLASSES = 4
# Images whose features are held in `float64` at a time.
CHUNK = 1024


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
    pairs = _Pairs(before, after)
    weight = _solve(pairs, ridge, variances)
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
    pairs = _Pairs(before, after)
    variances = _floored(pairs.variances, variances)
    # Each feature's own spread; of one that was silent before, which would be all that counts, a part of that after.
    units = torch.maximum(variances, _floored(pairs.target_variances) / 10)
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for fit, means, changes in _left_out(pairs, labels, folds, variances):
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
    pairs, classes = _Pairs(before, after), len(labels.unique())
    if classes == 1:
        return pairs.mean_change.square()
    errors = torch.zeros_like(pairs.mean)
    for fit, means, changes in _left_out(pairs, labels, folds, _floored(pairs.variances, variances)):
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
    pairs = _Pairs(features, errors, kept=0)
    weight = _solve(pairs, ridge, variances)
    classes = len(labels.unique())
    common = classes / (classes + 2) * pairs.mean_change
    return torch.cat([weight, (common - pairs.mean @ weight)[None]])


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


class _Pairs:
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


def _solve(pairs: _Pairs, ridge: float, variances: Optional[Tensor]) -> Tensor:
    """What features change by, as a linear map of all of them less their means, `(C, C)`."""
    rows, variances = torch.arange(len(pairs.features)), _floored(pairs.variances, variances)
    if pairs.few(len(rows)):
        fit = _DualRegression(*pairs.take(rows), variances)
    else:
        fit = _Regression(pairs.sums(rows), variances)
    return fit.to_features(torch.linalg.solve(fit.system(ridge), fit.change))


def _left_out(
    pairs: _Pairs, labels: Tensor, folds: int, variances: Tensor
) -> Iterator[tuple[_Regression, Tensor, Tensor]]:
    """Parts of the classes: what the others' images say, and mean features and mean change of each, `(M, C)`.

    Both are less their means over all images.
    """
    classes, places, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
    total = None if pairs.few(len(places)) else pairs.sums(torch.arange(len(places)))
    means, changes = pairs.class_means(places, counts)
    for fold in range(min(folds, len(classes))):
        yield _fit_others(pairs, places % folds == fold, total, variances), means[fold::folds], changes[fold::folds]


def _fit_others(pairs: _Pairs, held: Tensor, total: Optional[_Sums], variances: Tensor) -> _Regression:
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


def _floored(variances: Tensor, least: Optional[Tensor] = None) -> Tensor:
    """Variances of features, `(C,)`, never quite zero, and at least what is said."""
    if least is not None:
        variances = torch.maximum(variances, least.to(variances))
    return variances + 1e-12 * variances.sum() + torch.finfo(variances.dtype).tiny


def _check_pairs(before: Tensor, after: Tensor, variances: Optional[Tensor] = None) -> None:
    if before.shape != after.shape or len(before) == 0:
        raise ValueError(
            f"Features before and after must be those of the same images, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}."
        )
    if variances is not None and variances.shape != before.shape[1:]:
        raise ValueError(f"There must be {before.shape[1]} variances, one a feature, got {tuple(variances.shape)}.")

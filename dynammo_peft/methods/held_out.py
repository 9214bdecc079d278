"""Accuracy to expect, from class statistics and the images at hand: what heads say of images that were held out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data import AffineMap, ClassStatistics, fit_affine_map


# Weight and bias of heads for all classes, from their statistics.
Solve = Callable[[ClassStatistics], tuple[Tensor, Tensor]]

# In how many parts classes are left out, at most.
FOLDS = 5


def held_out_accuracy(statistics: ClassStatistics, features: Tensor, labels: Tensor, solve: Solve) -> float:
    """How well classes are told from each other when half of their images are taken in, and the others are classified.

    Other classes give no more than their part of the covariance: where their means have moved wrongly, images of these
    classes would seem easy to tell from them.

    Args:
        statistics (`ClassStatistics`): What is known without these images; left as it is.
        features (`Tensor`): Of the images, `(V, N, C)`; the first view is classified.
        labels (`Tensor`): Class of each image, `(N,)`.
        solve (`Callable`): What gives heads.

    Returns:
        `float`: Mean over the images' classes, from 0 to 1.
    """
    right, own = torch.zeros(len(labels), dtype=torch.bool), labels.unique()
    for shown in _halves(labels):
        known = _with(statistics, features, labels, shown)
        right[~shown] = _classified(known, features[0, ~shown], labels[~shown], solve, own)
    return _mean_over_classes(right, labels, own)


def accuracy_lost(
    statistics: ClassStatistics,
    before: Tensor,
    after: Tensor,
    labels: Tensor,
    classes: Tensor,
    ridge: float,
    exemplars: int,
    solve: Solve,
) -> float:
    """What classes lose when their statistics are moved instead of measured again, found by leaving some of them out.

    Args:
        statistics (`ClassStatistics`): Of other classes, before; left as it is.
        before (`Tensor`): Features before, `(V, N, C)`.
        after (`Tensor`): Features of the same images after, `(V, N, C)`; the first view is classified.
        labels (`Tensor`): Class of each image, `(N,)`.
        classes (`Tensor`): Those to be left out.
        ridge (`float`): Of the map.
        exemplars (`int`): How many images of a class that is left out the map is fitted to all the same.
        solve (`Callable`): What gives heads.

    Returns:
        `float`: The difference in accuracy, mean over these classes, from -1 to 1.
    """
    measured, moved = (torch.zeros(len(labels), dtype=torch.bool) for _ in range(2))
    for fold in range(min(FOLDS, len(classes))):
        left_out = torch.isin(labels, classes[fold::FOLDS])
        for shown in _halves(labels):
            fitted = ~left_out | (left_out & shown & (_places(labels, shown) < exemplars))
            affine_map = _map(before[:, fitted], after[:, fitted], ridge)
            known = _with(statistics, before, labels, left_out & shown)
            known.move(affine_map)
            known.update(*_flat(after, labels, ~left_out & shown))
            again = statistics.copy()
            again.move(affine_map)
            again.update(*_flat(after, labels, shown))
            tested = left_out & ~shown
            every = torch.tensor(again.classes)
            moved[tested] = _classified(known, after[0, tested], labels[tested], solve, every)
            measured[tested] = _classified(again, after[0, tested], labels[tested], solve, every)
    return _mean_over_classes(measured, labels, classes) - _mean_over_classes(moved, labels, classes)


def _halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every other image of each class, and the rest."""
    even = _places(labels, torch.ones_like(labels, dtype=torch.bool)) % 2 == 0
    return even, ~even


def _places(labels: Tensor, among: Tensor) -> Tensor:
    """How many earlier images of the same class there are among some, for each image."""
    places = torch.zeros_like(labels)
    for label in labels.unique():
        own = labels == label
        places[own] = among[own].long().cumsum(0) - among[own].long()
    return places


def _map(before: Tensor, after: Tensor, ridge: float) -> AffineMap:
    if not before.shape[1]:  # Nothing is known of where features go: they are taken to stay.
        zeros = torch.zeros(before.shape[2], before.shape[2], dtype=torch.float64)
        return AffineMap(zeros + torch.eye(len(zeros), dtype=torch.float64), zeros[0], zeros)
    return fit_affine_map(before.flatten(0, 1), after.flatten(0, 1), ridge)


def _flat(features: Tensor, labels: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """All views of some images and their labels, as `ClassStatistics.update` takes them."""
    return features[:, chosen].flatten(0, 1), labels[chosen].repeat(len(features))


def _with(statistics: ClassStatistics, features: Tensor, labels: Tensor, chosen: Tensor) -> ClassStatistics:
    """A copy of statistics that has taken in some images, `features` of shape `(V, N, C)`."""
    known = statistics.copy()
    known.update(*_flat(features, labels, chosen))
    return known


def _classified(statistics: ClassStatistics, features: Tensor, labels: Tensor, solve: Solve, among: Tensor) -> Tensor:
    """Which features `(N, C)` the heads put into the right one `among` some classes, `(N,)`."""
    weight, bias = solve(statistics)
    classes = torch.tensor(sorted(statistics.classes))
    logits = (features.double() @ weight.T + bias).masked_fill(~torch.isin(classes, among), -torch.inf)
    return classes[logits.argmax(dim=1)] == labels


def _mean_over_classes(right: Tensor, labels: Tensor, classes: Tensor) -> float:
    return torch.stack([right[labels == label].double().mean() for label in classes]).mean().item()

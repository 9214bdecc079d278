"""What heads in closed form say of images that were held out of the class statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from ..data import ClassStatistics


# Weight and bias of heads for all classes, from their statistics.
Solve = Callable[[ClassStatistics], tuple[Tensor, Tensor]]
# Of half of their images, new classes would be known less well than they are going to be.
FOLDS = 5


def held_out_hits(
    statistics: ClassStatistics, features: Tensor, labels: Tensor, solve: Solve, means: Optional[Tensor] = None
) -> Tensor:
    """How well new classes are told from all others; their images are classified a fifth at a time by all but these.

    Args:
        statistics (`ClassStatistics`): Of other classes; left as it is.
        features (`Tensor`): Of the images, `(V, N, C)`.
        labels (`Tensor`): Class of each image, `(N,)`.
        solve (`Callable`): What gives heads.
        means (`Optional[Tensor]`): Features `(V, N, C)` whose means the classes get, if not those of `features`: where
            it is thought that an image's features are.

    Returns:
        `Tensor`: Share of each image's views that are put into its class, `(N,)`, `float64`.
    """
    right = torch.zeros(features.shape[:2], dtype=torch.bool)
    folds = _folds(labels)
    for fold in folds.unique():
        shown = folds != fold
        known = statistics.copy()
        known.update(features[:, shown], labels[shown])
        if means is not None:
            for label in labels[shown].unique().tolist():
                known.means[label] = means[:, shown & (labels == label)].double().mean(dim=(0, 1))
        weight, bias = solve(known)
        logits = features[:, ~shown].double() @ weight.T + bias
        right[:, ~shown] = torch.tensor(sorted(known.classes))[logits.argmax(dim=2)] == labels[~shown]
    return right.double().mean(dim=0)


def _folds(labels: Tensor) -> Tensor:
    """Number of the part that each image is in, `(N,)`: those of a class go round."""
    folds = torch.zeros_like(labels)
    for label in labels.unique():
        own = labels == label
        folds[own] = torch.arange(int(own.sum()), device=labels.device) % FOLDS
    return folds

"""What heads in closed form say of images that were held out of the class statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from ..data import ClassStatistics


# Weight and bias of heads for all classes, from their statistics.
Solve = Callable[[ClassStatistics], tuple[Tensor, Tensor]]


def held_out_hits(
    statistics: ClassStatistics, features: Tensor, labels: Tensor, solve: Solve, means: Optional[Tensor] = None
) -> Tensor:
    """How well new classes are told from all others when half of their images are taken in, and the rest classified.

    Args:
        statistics (`ClassStatistics`): Of other classes; left as it is.
        features (`Tensor`): Of the images, `(V, N, C)`; the first view is classified.
        labels (`Tensor`): Class of each image, `(N,)`.
        solve (`Callable`): What gives heads.
        means (`Optional[Tensor]`): Features `(V, N, C)` whose means the classes get, if not those of `features`: where
            it is thought that an image's features are.

    Returns:
        `Tensor`: Whether each image is put into its class, `(N,)`, 0 or 1 in `float64`.
    """
    right = torch.zeros(len(labels), dtype=torch.bool)
    for shown in _halves(labels):
        known = statistics.copy()
        known.update(features[:, shown], labels[shown])
        if means is not None:
            for label in labels[shown].unique().tolist():
                known.means[label] = means[:, shown & (labels == label)].double().mean(dim=(0, 1))
        weight, bias = solve(known)
        logits = features[0, ~shown].double() @ weight.T + bias
        right[~shown] = torch.tensor(sorted(known.classes))[logits.argmax(dim=1)] == labels[~shown]
    return right.double()


def _halves(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every other image of each class, and the rest."""
    even = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        even[(labels == label).nonzero()[::2, 0]] = True
    return even, ~even

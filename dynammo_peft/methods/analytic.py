"""Classifiers in closed form, from class statistics alone."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..data import ClassStatistics


# Chosen on held-out images of five data sets (docs/merging_log.md).
LEAST_SHRINKAGE = 0.1
IMAGES_A_FEATURE = 4


def shrinkage_for(statistics: ClassStatistics, shrinkage: Optional[float] = None) -> float:
    """How far to shrink the covariance of `C` features of `N` images: `C / (C + 4 N)`, but at least 0.1.

    The fewer images there are for each feature, the more of what features seem to have in common is chance.

    Args:
        statistics (`ClassStatistics`): Of all classes.
        shrinkage (`Optional[float]`): What to take instead, if anything.
    """
    if shrinkage is not None:
        return shrinkage
    images = sum(statistics.counts.values())
    return max(LEAST_SHRINKAGE, statistics.features / (statistics.features + IMAGES_A_FEATURE * images))


def regularised(covariance: Tensor, shrinkage: float) -> Tensor:
    """A covariance shrunk towards its diagonal: features differ too much in scale for a multiple of the identity.

    Args:
        covariance (`Tensor`): `(C, C)`; that of single images, which is zero, says nothing and becomes the identity.
        shrinkage (`float`): Share of the diagonal, from 0 to 1.

    Raises:
        ValueError: If `shrinkage` is no share.
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage} must be at least 0 and at most 1.")
    diagonal = covariance.diagonal()
    if not diagonal.any():
        return torch.eye(len(covariance), dtype=covariance.dtype)
    # A feature that never varies would make the matrix singular.
    floor = 1e-6 * diagonal.mean() + torch.finfo(covariance.dtype).tiny
    return (1 - shrinkage) * covariance + torch.diag(shrinkage * diagonal + floor)


def linear_discriminant(statistics: ClassStatistics, shrinkage: Optional[float] = None) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis: the logits of Gaussian classes that share a covariance and are equally frequent.

    The mean of `n` images is off by `1 / n` of the covariance, so that the squared distance of any image to it is
    expected to be too long by `trace(inverse @ covariance) / n`. That is taken off: classes of few images would lose
    their images to those of many otherwise (Moran & Murphy 1979, "A Closer Look at Two Alternative Methods of
    Statistical Discrimination"). The expectation is that of the true covariance; one measured on not many more images
    than features, or fewer, shows too little of it, so that rare classes still lose some.

    Args:
        statistics (`ClassStatistics`): Of all classes.
        shrinkage (`Optional[float]`): Of the covariance, towards its diagonal; see [`shrinkage_for`].

    Returns:
        `tuple[Tensor, Tensor]`: Weight `(N, C)` and bias `(N,)`, the classes in the order of their numbers.
    """
    means, covariance = statistics.mean_matrix(), statistics.pooled_covariance()
    shrunk = regularised(covariance, shrinkage_for(statistics, shrinkage))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shrunk))
    # Only differences between classes matter; without their common part the numbers stay small.
    centre = means.mean(dim=0)
    weight = (means - centre) @ inverse
    counts = torch.tensor([statistics.counts[label] for label in sorted(statistics.counts)])
    excess = (inverse * covariance).sum() / counts
    return weight, (excess - (weight * (means + centre)).sum(dim=1)) / 2


def ridge_regression(statistics: ClassStatistics, shrinkage: Optional[float] = None) -> tuple[Tensor, Tensor]:
    """Ridge regression of the classes' indicators on the features.

    All classes count the same in what is between them; within them there is one covariance for all, in which all
    images count the same.

    Args:
        statistics (`ClassStatistics`): Of all classes.
        shrinkage (`Optional[float]`): Of the total covariance, towards its diagonal; see [`shrinkage_for`].

    Returns:
        `tuple[Tensor, Tensor]`: Weight `(N, C)` and bias `(N,)`, the classes in the order of their numbers.
    """
    means = statistics.mean_matrix()
    centre = means.mean(dim=0)
    between = (means - centre).T @ (means - centre) / len(means)
    total = regularised(statistics.pooled_covariance() + between, shrinkage_for(statistics, shrinkage))
    weight = torch.linalg.solve(total, (means - centre).T / len(means)).T
    return weight, 1 / len(means) - weight @ centre


ANALYTIC_HEADS = {"lda": linear_discriminant, "ridge": ridge_regression}

"""What is known of all classes under the first task's adapter, and tells of their place under the merged one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from ..data import AffineMap, ClassStatistics, LabelledImages, fit_correction
from .state import under


if TYPE_CHECKING:
    from .dynammo import Dynammo

# Variances of what is known of a class besides what is common to classes near it, in units of that: next to nothing of
# new classes, whose images are there; of old ones, which were moved by maps, a half (docs/merging_log.md).
NOISE_OF_NEW = 0.01
NOISE_OF_OLD = 0.5


class Anchor:
    """
    Class statistics under the first task's adapter, and the map from its features to those under the merged one.

    The first adapter never changes, so its statistics stay exact, while those of the merged adapter's features are
    moved at each merge by maps that, without exemplars, were fitted to the new classes alone. A new task's images show
    where these maps were wrong, before an adapter is trained on them: the path through all of them says where the
    images' features should be, given those under the first adapter, and the merged adapter says where they are.

    Args:
        method (`Dynammo`): The method, whose first adapter stays in the model.

    Attributes:
        statistics (`ClassStatistics`): Of all classes under the first adapter.
        path (`Optional[Tensor]`): The map from features under the first adapter to those under the merged one, in its
            last row what is added, `(C + 1, C)`; `None` as long as one adapter is merged.
        tasks (`dict[int, float]`): Number of the task, from 1, in which each class came; the geometric mean over its
            images where it came several times.
    """

    def __init__(self, method: Dynammo) -> None:
        self.method = method
        # Of the covariance only the diagonal is asked for, which is exact at any rank.
        self.statistics = ClassStatistics("shared", rank=1)
        self.path: Optional[Tensor] = None
        self.tasks: dict[int, float] = {}

    def state(self) -> dict[str, Tensor]:
        """All there is to know after a task, as tensors: what `restore` takes."""
        tensors = {f"statistics.{name}": tensor for name, tensor in self.statistics.state().items()}
        tensors["tasks"] = torch.tensor([self.tasks[label] for label in self.statistics.classes], dtype=torch.float64)
        if self.path is not None:
            tensors["path"] = self.path
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave.

        Raises:
            ValueError: If there is nothing of it.
        """
        if "tasks" not in tensors:
            raise ValueError(
                "memory_size=0 needs what is known under the first adapter, and this was learned without; set a "
                "memory_size."
            )
        self.statistics.restore(under("statistics.", tensors))
        self.tasks = dict(zip(self.statistics.classes, tensors["tasks"].tolist()))
        self.path = tensors.get("path")

    def features(self, images: LabelledImages) -> Tensor:
        """Features of images under the first adapter, `(V, N, C)`."""
        return self.method.features(images, self.method.adapters[0], self.method.views)

    def take_in(self, features: Tensor, labels: Tensor) -> None:
        """Updates the statistics by features under the first adapter, `(V, N, C)`, of images with labels `(N,)`."""
        before = dict(self.statistics.counts)
        self.statistics.update(features, labels)
        now = len(self.method.adapters)
        for label, count in self.statistics.counts.items():
            old = before.get(label, 0) / count
            # What is wrong for a mean over images of several tasks is the mean of what is wrong for each.
            self.tasks[label] = self.tasks.get(label, now) ** old * now ** (1 - old)

    def follow(self, step: AffineMap) -> None:
        """Goes along with a merge that moved features under the merged adapter by `step`."""
        if self.path is None:
            path = torch.cat([step.weight, step.bias[None]])
        else:
            path = self.path.double() @ step.weight
            path[-1] += step.bias
        self.path = path.float()

    def moved(self, features: Tensor) -> Tensor:
        """Where features under the first adapter, `(..., C)`, are thought to be under the merged one."""
        path = self.path.to(features)
        return features @ path[:-1] + path[-1]

    def shares(self) -> Tensor:
        """How far what the path is wrong by holds for each class known so far, `(N,)` from 0 to 1.

        A class of task `j` was not moved along the whole path but by the merges since. The `k`-th changes a mean of
        adapters by a share of `1 / k`, so that of `n` adapters it is `log(n / j) / log(n)`; of images of several
        tasks the mean of that.
        """
        count = len(self.method.adapters) - 1
        since = [math.log(count / self.tasks[label]) / math.log(count) for label in self.statistics.classes]
        return torch.tensor(since, dtype=torch.float64)

    def correct(self, merged: ClassStatistics, first: Tensor, found: Tensor, labels: Tensor) -> None:
        """Corrects the path, and the means of old classes, by images of new classes that no adapter was trained on.

        What was wrong for these is first taken for an affine map of all features, which holds for old classes as far
        as they are like the new ones ([`likeness`]): cells do not tell where X-rays are. Classes leave the path in
        ways of their own too, but near ones alike: what is left of the error of new classes, less what old ones near
        them told already, is interpolated to old ones ([`interpolate`]). Of both an old class takes its
        [share][Anchor.shares].

        Args:
            merged (`ClassStatistics`): Of old classes under the merged adapter; their means are corrected.
            first (`Tensor`): Features of the images under the first adapter, `(V, N, C)`.
            found (`Tensor`): Their features under the merged adapter, `(V, N, C)`.
            labels (`Tensor`): Class of each image, `(N,)`.
        """
        if self.path is None:
            # The merge of one adapter is that adapter.
            return
        errors = found - self.moved(first)
        variances = self.statistics.pooled_covariance().diagonal()
        correction = fit_correction(
            first.flatten(0, 1), errors.flatten(0, 1), labels.repeat(len(first)), variances=variances
        )
        old, new = self._means(), class_means(first, labels)
        near = nearness(torch.cat([old, new]), variances)
        to_old, to_new = near[:, : len(old)], near[:, len(old) :]
        off_path = torch.stack([merged.means[label] for label in self.statistics.classes]) - self.moved(old)
        told = interpolate(off_path, to_old[: len(old)], to_new[: len(old)], NOISE_OF_OLD)
        left = class_means(errors, labels) - (new @ correction[:-1] + correction[-1]) - told
        common = old @ correction[:-1] + correction[-1]
        wrong = likeness(old, new, variances)[:, None] * common
        wrong = wrong + interpolate(left, to_new[len(old) :], to_old[len(old) :], NOISE_OF_NEW)
        for label, share, error in zip(self.statistics.classes, self.shares(), wrong):
            merged.means[label] = merged.means[label] + share * error
        self.path = (self.path.double() + correction).float()

    def _means(self) -> Tensor:
        """Of each class, `(N, C)`."""
        return torch.stack([self.statistics.means[label] for label in self.statistics.classes])


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """The mean of the features `(V, N, C)` of each class, `(M, C)`, in the order of their numbers."""
    return torch.stack([features[:, labels == label].double().mean(dim=(0, 1)) for label in labels.unique()])


def nearness(means: Tensor, variances: Tensor) -> Tensor:
    """How near classes are to each other: `exp(-d^2)`, with distances in units of their root mean square.

    Args:
        means (`Tensor`): Of the features of each class, `(N, C)`.
        variances (`Tensor`): Of each feature within classes, `(C,)`; features count in units of their deviation.

    Returns:
        `Tensor`: From 0 to 1, `(N, N)`; where all classes are the same, 1.
    """
    means = means / _deviations(variances)
    squared = torch.cdist(means, means).square()
    between = torch.pdist(means).square()
    return torch.exp(-squared / between.mean().clamp(min=torch.finfo(means.dtype).tiny))


def interpolate(values: Tensor, among: Tensor, onto: Tensor, noise: float) -> Tensor:
    """What is known of some classes, interpolated to others that are near (Rasmussen & Williams 2006, "Gaussian
    Processes for Machine Learning", equation 2.25).

    Args:
        values (`Tensor`): Of the classes that are known, `(N, C)`.
        among (`Tensor`): Their nearness to each other, `(N, N)`.
        onto (`Tensor`): Their nearness to the others, `(N, M)`.
        noise (`float`): Variance of what a class has for itself, in units of what near classes have in common.

    Returns:
        `Tensor`: Of the others, `(M, C)`; nothing for one that none is near.
    """
    return torch.linalg.solve(among + noise * torch.eye(len(among), dtype=among.dtype), onto).T @ values


def _deviations(variances: Tensor) -> Tensor:
    """Of each feature, never zero: without a floor a feature that never varies would be all that counts."""
    if not variances.any():
        # That of single images says nothing.
        return torch.ones_like(variances)
    return (variances + 1e-6 * variances.mean()).sqrt()


def likeness(old: Tensor, new: Tensor, variances: Tensor) -> Tensor:
    """How far what is seen of new classes holds for old ones.

    The mean squared distance between new classes by that from them to an old one, at most 1; of a single new class,
    the mean squared distance between old ones. Features count in units of their deviation within classes.

    Args:
        old (`Tensor`): Means of old classes, `(N, C)`.
        new (`Tensor`): Means of new classes, `(M, C)`.
        variances (`Tensor`): Of each feature within classes, `(C,)`.

    Returns:
        `Tensor`: Of each old class, from 0 to 1, `(N,)`.
    """
    scale = _deviations(variances)
    old, new = old / scale, new / scale
    among = torch.pdist(new if len(new) > 1 else old).square()
    if not len(among):
        return torch.ones(len(old), dtype=old.dtype)
    distances = torch.cdist(old, new).square().mean(dim=1)
    return (among.mean() / distances.clamp(min=torch.finfo(old.dtype).tiny)).clamp(max=1)

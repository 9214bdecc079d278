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
        tasks (`dict[int, int]`): Number of the task, from 1, in which each class came.
    """

    def __init__(self, method: Dynammo) -> None:
        self.method = method
        self.statistics = ClassStatistics("shared", method.arguments.covariance_rank)
        self.path: Optional[Tensor] = None
        self.tasks: dict[int, int] = {}

    def state(self) -> dict[str, Tensor]:
        """All there is to know after a task, as tensors: what `restore` takes."""
        tensors = {f"statistics.{name}": tensor for name, tensor in self.statistics.state().items()}
        tensors["tasks"] = torch.tensor([self.tasks[label] for label in self.statistics.classes])
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
        self.statistics.update(features, labels)
        for label in self.statistics.classes:
            self.tasks.setdefault(label, len(self.method.adapters))

    def follow(self, step: AffineMap) -> None:
        """Goes along with a merge that moved features under the merged adapter by `step`."""
        if self.path is None:
            path = torch.cat([step.weight, step.bias[None]])
        else:
            path = self.path.double() @ step.weight
            path[-1] += step.bias
        self.path = path.float()

    def moved(self, features: Tensor) -> Tensor:
        """Where features under the first adapter, `(V, N, C)`, are thought to be under the merged one."""
        return features @ self.path[:-1] + self.path[-1]

    def shares(self, features: Tensor, labels: Tensor) -> Tensor:
        """How far what the path is wrong by for images of new classes holds for each class known so far.

        A class of task `j` was not moved along the whole path but by the merges since. The `k`-th changes a mean of
        adapters by a share of `1 / k`, so that of `n` adapters it is `log(n / j) / log(n)`, and less the less the
        class is like the new ones ([`likeness`]): cells do not tell where X-rays are.

        Args:
            features (`Tensor`): Of the images under the first adapter, `(V, N, C)`.
            labels (`Tensor`): Class of each image, `(N,)`.

        Returns:
            `Tensor`: In the order of `statistics.classes`, from 0 to 1, `(N,)`.
        """
        new = torch.stack([features[:, labels == label].double().mean(dim=(0, 1)) for label in labels.unique()])
        alike = likeness(self._means(), new, self.statistics.pooled_covariance().diagonal())
        count = len(self.method.adapters) - 1
        since = [math.log(count / self.tasks[label]) / math.log(count) for label in self.statistics.classes]
        return alike * torch.tensor(since, dtype=alike.dtype)

    def correct(self, merged: ClassStatistics, first: Tensor, found: Tensor, labels: Tensor) -> None:
        """Corrects the path, and the means of old classes, by images of new classes that no adapter was trained on.

        Of what was wrong for these, an old class takes its [share][Anchor.shares].

        Args:
            merged (`ClassStatistics`): Of old classes under the merged adapter; their means are corrected.
            first (`Tensor`): Features of the images under the first adapter, `(V, N, C)`.
            found (`Tensor`): Their features under the merged adapter, `(V, N, C)`.
            labels (`Tensor`): Class of each image, `(N,)`.
        """
        count = len(self.method.adapters) - 1
        if count < 2:
            # The merge of one adapter is that adapter: there is no path yet.
            return
        errors = found - self.moved(first)
        correction = fit_correction(first.flatten(0, 1), errors.flatten(0, 1), labels.repeat(len(first)))
        wrong = self._means() @ correction[:-1] + correction[-1]
        for label, share, error in zip(self.statistics.classes, self.shares(first, labels), wrong):
            merged.means[label] = merged.means[label] + share * error
        self.path = (self.path.double() + correction).float()

    def _means(self) -> Tensor:
        """Of each class, `(N, C)`."""
        return torch.stack([self.statistics.means[label] for label in self.statistics.classes])


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
    if not variances.any():
        # That of single images says nothing.
        variances = torch.ones_like(variances)
    # Without a floor a feature that never varies would be all that counts.
    scale = (variances + 1e-6 * variances.mean()).sqrt()
    old, new = old / scale, new / scale
    among = torch.pdist(new if len(new) > 1 else old).square()
    if not len(among):
        return torch.ones(len(old), dtype=old.dtype)
    distances = torch.cdist(old, new).square().mean(dim=1)
    return (among.mean() / distances.clamp(min=torch.finfo(old.dtype).tiny)).clamp(max=1)

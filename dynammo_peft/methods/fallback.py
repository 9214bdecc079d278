"""Back to the first task's adapter unless merging is expected to gain: judged after each task, without old images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from ..data import AffineMap, ClassStatistics, LabelledImages, Task
from ..merging import AdapterTensors, adapter_tensors, set_adapter_tensors
from .held_out import held_out_hits


if TYPE_CHECKING:
    from .dynammo import Dynammo


class Fallback:
    """
    What is known of all classes under the first task's adapter, and whether that is better than the merged one.

    The first adapter never changes, so statistics of its features stay exact. Those of the merged adapter's features
    are moved at each merge, and old classes may suffer from that unseen. New classes tell, before an adapter is
    trained on them. They are learned from half of their images, and the others are classified among all classes:

    - under the first adapter,
    - under the merged one, as the newest classes are: their means are measured,
    - under the merged one, as if they were as old as the first: their means are measured under the first adapter, and
      moved through all merges since, by maps that were fitted without them.

    The classes of task `j` were moved by the merges since. The `k`-th changes a mean of adapters by a share of
    `1 / k`, so all of them together move classes by about `log(k / j)`: that far between the second and the third they
    are expected to be. By the same measure the difference between both adapters grows, from none where one adapter is
    merged: the advantage of the merge is on the line through the differences of all tasks.

    The first adapter is chosen unless the merge is better by more than the standard error of that, once there is
    something to judge by. What it is worth is known, since nothing is moved; a merge can lose classes altogether.

    Args:
        method (`Dynammo`): The method.
        merged (`str`): Name of the merged adapter.

    Attributes:
        statistics (`ClassStatistics`): Of all classes under the first adapter.
        path (`Optional[Tensor]`): The map from features under the first adapter to those under the merged one, in its
            last row what is added, `(C + 1, C)`; `None` as long as one adapter is merged.
        evidence (`Tensor`): The line's numerator and denominator, sums over new classes, and the numerator's variance.
        merge (`AdapterTensors`): What was merged, while the first adapter is in its place.
    """

    def __init__(self, method: Dynammo, merged: str) -> None:
        self.method = method
        self.merged = merged
        self.statistics = ClassStatistics("shared", method.arguments.covariance_rank)
        self.path: Optional[Tensor] = None
        self.evidence = torch.zeros(3, dtype=torch.float64)
        self.merge: AdapterTensors = {}

    @property
    def advantage(self) -> tuple[float, float]:
        """Accuracy expected of the merged adapter less the first one's, mean over classes, and its standard error."""
        differences, squares, variance = self.evidence.tolist()
        scale = math.log(len(self.method.adapters)) / squares if squares else 0.0
        return scale * differences, scale * math.sqrt(variance)

    @property
    def chosen(self) -> bool:
        """Whether the first adapter is to be used."""
        advantage, error = self.advantage
        return bool(self.evidence[1] > 0) and advantage <= error

    def state(self) -> dict[str, Tensor]:
        """All there is to know after a task, as tensors: what `restore` takes."""
        parts = {"statistics": self.statistics.state(), "merge": self.merge}
        tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        path = {} if self.path is None else {"path": self.path}
        return {**tensors, **path, "evidence": self.evidence.clone()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave.

        Raises:
            ValueError: If there is nothing of it.
        """
        if "evidence" not in tensors:
            raise ValueError(
                "fall_back needs what is known under the first adapter, and this was learned without; set "
                "fall_back=False."
            )
        parts = {
            part: {name.removeprefix(part): own for name, own in tensors.items() if name.startswith(part)}
            for part in ("statistics.", "merge.")
        }
        self.statistics.restore(parts["statistics."])
        self.merge = parts["merge."]
        self.path, self.evidence = tensors.get("path"), tensors["evidence"].double()

    def weigh(self, task: Task, merged: ClassStatistics, before: Tensor) -> None:
        """Judges by one more task, and takes its classes in.

        Args:
            task (`Task`): The task, not the first.
            merged (`ClassStatistics`): Of all older classes under the adapter merged before this task.
            before (`Tensor`): Features of the task's training images under that adapter, `(V, N, C)`.
        """
        first, labels = self._features(task.train), task.train.labels
        # An adapter was trained on classes that come back.
        new = ~torch.isin(labels, torch.tensor(self.statistics.classes))
        count = len(self.method.adapters) - 1
        if count > 1 and new.any():
            own, solve = labels[new], self.method.analytic_heads
            alone = held_out_hits(self.statistics, first[:, new], own, solve)
            newest = held_out_hits(merged, before[:, new], own, solve)
            oldest = held_out_hits(merged, before[:, new], own, solve, means=self._moved(first[:, new]))
            age, growth = mean_age(count), math.log(count)
            differences = age * oldest + (1 - age) * newest - alone
            for label in own.unique():
                part = differences[own == label]
                self.evidence += growth * torch.tensor(
                    [part.mean(), growth, growth * part.var(correction=0) / len(part)]
                )
        self.take_in(first, labels)

    def follow(self, step: AffineMap) -> None:
        """Goes along with a merge: features under the merged adapter, and the class statistics, moved by `step`."""
        if self.path is None:
            path = torch.cat([step.weight, step.bias[None]])
        else:
            path = self.path.double() @ step.weight
            path[-1] += step.bias
        self.path = path.float()

    def take_in(self, features: Tensor, labels: Tensor) -> None:
        """Updates the statistics by features under the first adapter, `(V, N, C)`, of images with labels `(N,)`."""
        self.statistics.update(features, labels)

    def put_first(self) -> None:
        """Puts the first adapter in the place of the merged one, if it is chosen."""
        if self.chosen:
            self._swap()
            self.method.solve_heads(self.statistics)

    def put_back(self) -> None:
        """Undoes `put_first`: an adapter to come is merged with all before it."""
        if self.merge:
            set_adapter_tensors(self.method.model, self.merged, self.merge)
            self.merge = {}

    def _swap(self) -> None:
        own = adapter_tensors(self.method.model, self.merged)
        self.merge = {key: tensor.detach().cpu().clone() for key, tensor in own.items()}
        self.method.merging.first_alone(self.method.adapters, self.merged)

    def _features(self, images: LabelledImages) -> Tensor:
        """Under the first adapter, `(V, N, C)`."""
        method, name = self.method, self.method.adapters[0]
        if name in method.model.peft_config:
            return method.features(images, name, method.views)
        # It is on the disk: it takes the merged one's place for a while.
        self._swap()
        features = method.features(images, self.merged, method.views)
        self.put_back()
        return features

    def _moved(self, features: Tensor) -> Tensor:
        """Where features under the first adapter, `(V, N, C)`, are thought to be under the merged one."""
        return features @ self.path[:-1] + self.path[-1]


def mean_age(count: int) -> float:
    """How far classes were moved while `count` adapters were merged one by one, mean over their tasks.

    Args:
        count (`int`): At least 2.

    Returns:
        `float`: As a share of how far those of the first task were.
    """
    return sum(math.log(count / task) for task in range(1, count + 1)) / (count * math.log(count))

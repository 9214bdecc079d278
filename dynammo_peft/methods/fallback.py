"""Back to the first task's adapter where merging is expected to lose: judged after each task, without old images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import ClassStatistics, LabelledImages, Task
from ..merging import AdapterTensors, adapter_tensors, set_adapter_tensors
from .held_out import accuracy_lost, held_out_accuracy


if TYPE_CHECKING:
    from .dynammo import Dynammo


# A mean over classes below which a difference in accuracy tells nothing: one image in two hundred.
MARGIN = 0.005


class Fallback:
    """
    What is known of all classes under the first task's adapter, and whether that is better than the merged one.

    The first adapter never changes, so statistics of its features stay exact. Those of the merged adapter's features
    are moved at each merge, and old classes may suffer from that unseen. Two estimates tell which of both to use:

    - How well new classes are told from each other under either adapter, before one is trained on them: what adapters
      of other tasks are worth for classes that they have not seen.
    - How much accuracy the new classes would lose in the merge if they were old, that is, if the map that moves
      statistics were fitted without their images. All classes known by then are taken to lose as much.

    Args:
        method (`Dynammo`): The method.
        merged (`str`): Name of the merged adapter.

    Attributes:
        statistics (`ClassStatistics`): Of all classes under the first adapter.
        advantage (`float`): Expected accuracy of the merged adapter less that of the first, summed over classes.
        merge (`AdapterTensors`): What was merged, while the first adapter is in its place.
    """

    def __init__(self, method: Dynammo, merged: str) -> None:
        self.method = method
        self.merged = merged
        self.statistics = ClassStatistics("shared", method.arguments.covariance_rank)
        self.advantage = 0.0
        self.merge: AdapterTensors = {}

    @property
    def chosen(self) -> bool:
        """Whether the first adapter is expected to classify better, by more than a margin."""
        return self.advantage < -MARGIN * len(self.statistics)

    def state(self) -> dict[str, Tensor]:
        """All there is to know after a task, as tensors: what `restore` takes."""
        parts = {"statistics": self.statistics.state(), "merge": self.merge}
        tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
        return {**tensors, "advantage": torch.tensor(self.advantage, dtype=torch.float64)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave.

        Raises:
            ValueError: If there is nothing of it.
        """
        if "advantage" not in tensors:
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
        self.advantage = tensors["advantage"].item()

    def weigh(
        self, task: Task, merged: ClassStatistics, before: Tensor, after: Tensor, labels: Tensor, ridge: float
    ) -> None:
        """Judges by one more task, whose images are the first of those at hand.

        Args:
            task (`Task`): The task, not the first.
            merged (`ClassStatistics`): Of all older classes under the adapter merged before this task.
            before (`Tensor`): Features under that adapter of the images at hand, `(V, N, C)`.
            after (`Tensor`): Features of the same images under the adapter merged with the task's.
            labels (`Tensor`): Class of each image, `(N,)`; behind those of the task they are of exemplars.
            ridge (`float`): Of the map that moves statistics.
        """
        first, new = self._features(task.train), task.train.labels
        solve = self.method.analytic_heads
        gain = held_out_accuracy(merged, before[:, : len(new)], new, solve)
        gain -= held_out_accuracy(self.statistics, first, new, solve)
        classes = new.unique()
        exemplars = (len(labels) - len(new)) // len(merged)
        lost = accuracy_lost(merged, before, after, labels, classes, ridge, exemplars, solve)
        self.advantage += len(classes) * gain - len(merged) * lost
        self.take_in(first, new)

    def take_in(self, features: Tensor, labels: Tensor) -> None:
        """Updates the statistics by features under the first adapter, `(V, N, C)`, of images with labels `(N,)`."""
        self.statistics.update(features.flatten(0, 1), labels.repeat(len(features)))

    def put_first(self) -> None:
        """Puts the first adapter in the place of the merged one, if it is expected to classify better."""
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

"""Back to the first task's adapter unless merging is expected to gain: judged after each task, without old images."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..data import ClassStatistics
from ..merging import AdapterTensors
from .anchor import Anchor
from .held_out import held_out_hits
from .state import under


class Fallback:
    """
    Whether the first task's adapter is better than the merged one, and its taking that one's place.

    The first adapter never changes, so statistics of its features stay exact. Those of the merged adapter's features
    are moved at each merge, and old classes may suffer from that unseen. New classes tell, before an adapter is
    trained on them. They are learned from most of their images, and the others are classified among all classes:

    - under the first adapter,
    - under the merged one, as the newest classes are: their means are measured,
    - under the merged one, as if they were as old as the first: their means are measured under the first adapter, and
      moved through all merges since, by maps that were fitted, and without exemplars corrected, without them.

    What an old class loses is its [share][Anchor.shares] of what lies between the second and the third. The `k`-th
    merge changes a mean of adapters by `1 / k`, so the difference between both adapters grows about as `log(k)`, from
    none where one adapter is merged: the advantage of the merge is on the line through the differences of all tasks.

    The first adapter is chosen unless the merge is better by more than a standard error of that, once there is
    something to judge by. What it is worth is known, since nothing is moved; a merge can lose classes altogether.

    Args:
        anchor (`Anchor`): What is known under the first adapter.

    Attributes:
        evidence (`Tensor`): Of each class that was new once, `(N, 3)`: `log(k)`, the difference, its variance.
        merge (`AdapterTensors`): What was merged, while the first adapter is in its place.
    """

    def __init__(self, anchor: Anchor) -> None:
        self.anchor = anchor
        self.method = anchor.method
        self.evidence = torch.zeros(0, 3, dtype=torch.float64)
        self.merge: AdapterTensors = {}

    @property
    def advantage(self) -> tuple[float, float]:
        """Accuracy expected of the merged adapter less the first one's, mean over classes, and its standard error."""
        count = len(self.evidence)
        if not count:
            return 0.0, 0.0
        growth, differences, variances = self.evidence.T
        squares = growth.square().sum()
        slope = (growth * differences).sum() / squares
        variance = (growth.square() * variances).sum()
        if count > 1:
            # Classes differ by more than their few images tell (White 1980, with the correction for small samples).
            spread = (growth * (differences - slope * growth)).square().sum() * count / (count - 1)
            variance = torch.maximum(variance, spread)
        scale = math.log(len(self.method.adapters))
        return scale * slope.item(), scale * (variance.sqrt() / squares).item()

    @property
    def chosen(self) -> bool:
        """Whether the first adapter is to be used."""
        advantage, error = self.advantage
        return len(self.evidence) > 0 and advantage <= error

    def state(self) -> dict[str, Tensor]:
        """All there is to know after a task, as tensors: what `restore` takes."""
        return {**{f"merge.{name}": tensor for name, tensor in self.merge.items()}, "evidence": self.evidence.clone()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave.

        Raises:
            ValueError: If there is nothing of it.
        """
        if "evidence" not in tensors:
            raise ValueError("fall_back has nothing to judge by: this was learned without; set fall_back=False.")
        self.merge = under("merge.", tensors)
        self.evidence = tensors["evidence"].double()

    def weigh(self, merged: ClassStatistics, first: Tensor, before: Tensor, labels: Tensor) -> None:
        """Judges by one more task, not the first.

        Args:
            merged (`ClassStatistics`): Of all older classes under the adapter merged before this task.
            first (`Tensor`): Features of the task's training images under the first adapter, `(V, N, C)`.
            before (`Tensor`): Their features under the merged adapter, `(V, N, C)`.
            labels (`Tensor`): Class of each image, `(N,)`.
        """
        alone = self.anchor.statistics
        # An adapter was trained on classes that come back.
        new = ~torch.isin(labels, torch.tensor(alone.classes))
        count = len(self.method.adapters) - 1
        if count < 2 or not new.any():
            return
        own, solve = labels[new], self.method.analytic_heads
        first, before = first[:, new], before[:, new]
        hits = held_out_hits(alone, first, own, solve)
        newest = held_out_hits(merged, before, own, solve)
        oldest = held_out_hits(merged, before, own, solve, means=self.anchor.moved(first))
        age, growth = self.anchor.shares(first, own).mean(), math.log(count)
        differences = age * oldest + (1 - age) * newest - hits
        for label in own.unique():
            part = differences[own == label]
            of_class = torch.tensor([[growth, part.mean(), part.var(correction=0) / len(part)]], dtype=torch.float64)
            self.evidence = torch.cat([self.evidence, of_class])

    def put_first(self) -> None:
        """Puts the first adapter in the place of the merged one, if it is chosen."""
        if self.chosen:
            self.merge = self.anchor.take_place()
            self.method.solve_heads(self.anchor.statistics)

    def put_back(self) -> None:
        """Undoes `put_first`: an adapter to come is merged with all before it."""
        if self.merge:
            self.method.merging.put_back(self.method.adapters, self.anchor.merged, self.merge)
            self.merge = {}

"""Stage 1 and stage 2 of ACL and DynaMMo, and the exemplars that both need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import PreTrainedModel

from ..data import ClassIncrementalScenario, ExemplarMemory, LabelledImages, Task
from ..tuner import HeadConfig
from ..tuner.heads import grouped_logits, head_targets, heads_loss
from .adapters import AdapterMethod, AdapterMethodArguments
from .base import Stage


class TwoStageMethod(AdapterMethod):
    """
    Stage 1 trains a new adapter and head on the task's images, with all exemplars as "others"; stage 2 all heads on
    the exemplars (Zhang et al. 2023; Qazi et al. 2024).

    Args:
        model (`PreTrainedModel`): The pretrained image classifier.
        arguments (`AdapterMethodArguments`): Options of the training.
        config (`Optional[HeadConfig]`): The adapters' configuration; its `classes` are filled in.
    """

    # Whether stage 1 has the exemplars in it.
    exemplars_as_others: bool = True
    # Whether stage 2 needs an exemplar of every class.
    needs_exemplars: bool = True

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: Optional[AdapterMethodArguments] = None,
        config: Optional[HeadConfig] = None,
    ) -> None:
        super().__init__(model, arguments, config)
        self.memory = ExemplarMemory(self.arguments.memory_size, self.arguments.selection, self.arguments.seed)
        self._restored_rows: list[int] = []
        self._restored_labels: list[int] = []

    def begin(self, scenario: ClassIncrementalScenario, accelerator: Accelerator) -> None:
        super().begin(scenario, accelerator)
        self.memory.quota(scenario.num_classes)
        exemplars = scenario.exemplars if scenario.exemplar_rows else self.memory.images()
        if scenario.exemplar_rows:
            self._check_labels(exemplars, scenario.class_names)
        if exemplars is not None:
            self.memory.restore(exemplars)
        missing = self.memory.missing(self.class_names) if self.needs_exemplars else []
        if missing:
            raise ValueError(
                f"Heads are trained on exemplars, and there is none of {', '.join(map(repr, missing))}. Make the "
                "scenario with exemplar_rows=method.exemplar_rows if its data set is the one that was learned from, "
                "or publish with include_exemplars=True."
            )

    def _check_labels(self, exemplars: LabelledImages, names: Sequence[str]) -> None:
        """Raises a `ValueError` if rows that a restored state names are of other classes now."""
        known = dict(zip(self._restored_rows, self._restored_labels))
        for row, label in zip(exemplars.rows.tolist(), exemplars.labels.tolist()):
            if known.get(row, label) != label:
                raise ValueError(
                    f"Row {row} of exemplar_rows is an image of {names[label]!r} and was one of "
                    f"{names[known[row]]!r}; the data set is another one, or has changed since."
                )

    @property
    def exemplar_rows(self) -> list[int]:
        """Which rows of the training data are exemplars, those of a restored state included."""
        return self.memory.rows or self._restored_rows

    @property
    def exemplar_labels(self) -> list[int]:
        """The class of each of `exemplar_rows`, by its number."""
        return self.memory.labels or self._restored_labels

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().state()
        memory = self.memory
        counts = [[label, count] for label, count in memory.counts.items()]
        own = {"exemplar_rows": memory.rows, "exemplar_origins": memory.origins, "exemplar_counts": counts}
        return {**values, **own}, tensors

    def restore(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        scenario: Optional[ClassIncrementalScenario] = None,
    ) -> None:
        super().restore(values, tensors, scenario)
        self._restored_rows = list(values["exemplar_rows"])
        # Older states have neither.
        self._restored_labels = list(values.get("exemplar_labels", ()))
        self.memory.counts = {label: count for label, count in values.get("exemplar_counts", ())}
        if scenario is not None and self._restored_rows:
            origins = torch.tensor(values["exemplar_origins"])
            self.memory.restore(self._recall(scenario, self._restored_rows, origins), origins.tolist())

    def _recall(self, scenario: ClassIncrementalScenario, rows: list[int], origins: Tensor) -> LabelledImages:
        """The exemplars as they were: those from before the scenario are at hand, the others are from it."""
        old = origins >= 0
        parts = [self.memory.images().select(origins[old])] if old.any() else []
        new = scenario.train.of_rows([row for row, origin in zip(rows, origins.tolist()) if origin < 0])
        # Back from old and new to their order.
        order = (~old).long().argsort(stable=True).argsort()
        return LabelledImages.concatenate([*parts, new]).select(order)

    @staticmethod
    def adapter_name(index: int) -> str:
        """Of a task's adapter, by convention `task_000` and so on."""
        return f"task_{index:03d}"

    def train_adapter(self, task: Task) -> Iterator[Stage]:
        """Stage 1: the newest adapter and its head; every exemplar of another class is one of the "others"."""
        self.add_adapter(self.adapter_name(task.index), task.class_names)
        exemplars = self.memory.images() if self.exemplars_as_others else None
        data = task.train if exemplars is None else LabelledImages.concatenate([task.train, exemplars])

        def observe(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            return self.adapter_step(network, images, labels, task)

        with self.standardised_features(data), self.model.head_output("last_layer_logits"):
            self.model.set_backbone_requires_grad(self.arguments.train_backbone and task.index == 0)
            yield Stage("adapter", self.model, data, observe, self.optimization["adapter"])
        self.model.set_backbone_requires_grad(False)

    def adapter_step(self, network: nn.Module, images: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, Tensor]:
        """Loss of stage 1 on a batch, and for which images the head said the right thing, `(B,)`."""
        return heads_step(network(pixel_values=images).logits, task.places(labels), (len(task.classes),))

    def train_heads(self, heads: nn.Module, features: Tensor, labels: Tensor) -> Iterator[Stage]:
        """Stage 2: all heads on the features of a balanced set, which were computed once."""
        sizes = self.head_sizes

        def observe(network: nn.Module, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            return heads_step(network(features), labels, sizes)

        heads.requires_grad_(True)
        yield Stage("heads", heads, TensorDataset(features, labels), observe, self.optimization["head"])
        heads.requires_grad_(False)


def heads_step(logits: Tensor, labels: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Loss of heads on a batch, and for which images every head said the right thing, `(B,)`; -1 is of no head."""
    met = grouped_logits(logits.detach(), sizes).argmax(dim=2) == head_targets(labels, sizes)
    return heads_loss(logits, labels, sizes), met.all(dim=1)

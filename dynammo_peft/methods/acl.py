"""ACL: adapter learning without merging (Zhang et al. 2023, https://arxiv.org/abs/2304.09042)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Optional

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import ClassIncrementalScenario, Task
from ..tuner import HeadConfig
from ..tuner.heads import score_heads
from .adapters import AdapterMethodArguments
from .base import Stage
from .two_stage import TwoStageMethod


class SideBySide(nn.Module):
    """One linear head for each adapter, each on its own features."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, T, C)`, the features under each adapter, to the raw logits of all heads, `(B, sum of n_t + 1)`."""
        return torch.cat([head(part) for head, part in zip(self.heads, features.unbind(1))], dim=1)


class ACL(TwoStageMethod):
    """
    Each head reads the features under its own task's adapter: as many forward passes as tasks.

    The accuracy reference of DynaMMo, which derives from it.

    Args:
        model (`PreTrainedModel`): The pretrained image classifier.
        arguments (`AdapterMethodArguments`): Options of the training.
        config (`Optional[HeadConfig]`): The adapters' configuration; its `classes` are filled in.

    Raises:
        ValueError: If the memory keeps no exemplars; when learning begins, if a class comes in several tasks.
    """

    name = "acl"

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: Optional[AdapterMethodArguments] = None,
        config: Optional[HeadConfig] = None,
    ) -> None:
        super().__init__(model, arguments, config)
        if self.arguments.memory_size == 0:
            raise ValueError(
                "ACL trains its heads on exemplars and cannot do with memory_size=0; set memory_size to at least the "
                "number of classes."
            )

    def begin(self, scenario: ClassIncrementalScenario, accelerator: Accelerator) -> None:
        super().begin(scenario, accelerator)
        for index, group in enumerate(scenario.groups):
            for name in group:
                first = scenario.task_of_class()[scenario.class_names.index(name)]
                if first < index:
                    raise ValueError(
                        f"Class {name!r} of task {index} comes back from task {first}, but ACL has each class's head "
                        "under one adapter; take it out of groups, or choose method='dynammo'."
                    )

    def learn(self, task: Task) -> Iterator[Stage]:
        yield from self.train_adapter(task)
        self.memory.update(task.train, self.features(task.train, self.adapters[-1])[0])
        if task.index > 0:
            balanced = self.memory.images_of(self.class_names)
            features = torch.stack([self.features(balanced, name)[0] for name in self.adapters], dim=1)
            heads = SideBySide([self.model.head.heads[name] for name in self.adapters])
            yield from self.train_heads(heads, features, balanced.labels)

    def logits(self, images: Tensor) -> Tensor:
        parts = []
        with self.model.head_output("logits"):
            for name in self.adapters:
                self.model.set_adapter(name, inference_mode=True)
                parts.append(self.model(pixel_values=images).logits)
        return score_heads(torch.cat(parts, dim=1), self.head_sizes, self.config.scoring)

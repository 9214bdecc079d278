"""DynaMMo: dynamic model merging (Qazi et al. 2024, https://arxiv.org/abs/2404.14099)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..data import Task
from .adapters import TwoStageMethod
from .base import Stage


MERGED = "merged"


class Dynammo(TwoStageMethod):
    """
    After each task all adapters are averaged into one, and all heads are trained on its features of the memory.

    Inference is one forward pass for any number of tasks.

    Args:
        model (`PreTrainedModel`): The pretrained image classifier.
        arguments (`AdapterMethodArguments`): Options of the training.
        config (`Optional[DynammoConfig]`): The adapters' configuration; its `classes` are filled in.
    """

    name = "dynammo"

    def learn(self, task: Task) -> Iterator[Stage]:
        yield from self.train_adapter(task)
        heads = self._merge()
        self.memory.update(task.train, self.features(task.train, MERGED))
        if task.index > 0:
            balanced = self.memory.images()
            yield from self.train_heads(heads, self.features(balanced, MERGED), balanced.labels)
        self.model.set_adapter(MERGED, inference_mode=True)

    @property
    def inference_adapters(self) -> list[str]:
        return [MERGED]

    def logits(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits

    def _merge(self) -> nn.Linear:
        """Averages the adapters; old heads go on from where they fitted the last merge, the new one from its task."""
        before = self.model.head.dynammo_head[MERGED].state_dict() if MERGED in self.model.peft_config else {}
        self.model.add_weighted_adapter(self.adapters, adapter_name=MERGED)
        heads = self.model.head.dynammo_head[MERGED]
        with torch.no_grad():
            for name, value in before.items():
                heads.get_parameter(name)[: len(value)] = value
        return heads

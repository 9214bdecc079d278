"""Joint training: the upper bound, which keeps all images of all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Optional

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import ClassIncrementalScenario, LabelledImages, Task
from .adapters import AdapterMethod
from .base import Stage


class Joint(AdapterMethod):
    """
    Trains one new adapter and one head on the images of all tasks so far, each time anew.

    Not a class-incremental method: it measures what one adapter can do if nothing need be forgotten.

    Args:
        model (`PreTrainedModel`): The pretrained image classifier.
        arguments (`AdapterMethodArguments`): Options of the training; those of the memory and of stage 2 are unused.
        config (`Optional[HeadConfig]`): The adapter's configuration; its `classes` are filled in.
    """

    name = "joint"

    def begin(self, scenario: ClassIncrementalScenario, accelerator: Accelerator) -> None:
        super().begin(scenario, accelerator)
        self._seen: list[Task] = []

    def restore(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        scenario: Optional[ClassIncrementalScenario] = None,
    ) -> None:
        super().restore(values, tensors, scenario)
        self._seen = [scenario[index] for index in range(values["tasks"])]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().state()
        return {**values, "tasks": len(self._seen)}, tensors

    def learn(self, task: Task) -> Iterator[Stage]:
        if task.index < len(self._seen):
            raise ValueError(f"Task {task.index} was learned already; a task is learned once.")
        self._seen.append(task)
        data = LabelledImages.concatenate([seen.train for seen in self._seen])
        if self.adapters:
            self.adapters.clear()
            self.model = self.model.unload()
        class_names = dict.fromkeys(name for seen in self._seen for name in seen.class_names)
        self.add_adapter(f"joint_{task.index:03d}", list(class_names))

        def observe(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = network(pixel_values=images).logits
            return F.cross_entropy(logits.float(), labels), logits.argmax(dim=1) == labels

        with self.standardised_features(data):
            self.model.set_backbone_requires_grad(self.arguments.train_backbone and task.index == 0)
            yield Stage("joint", self.model, data, observe, self.optimization["adapter"])
        self.model.set_backbone_requires_grad(False)
        self.model.set_adapter(self.adapters[-1], inference_mode=True)

    def logits(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits

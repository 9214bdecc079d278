"""What a merge function needs to know of each adapter, measured on its task's images."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Optional

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Task
from ..merging import AdapterTensors, diagonal_fisher, input_grams
from ..tuner.architectures import ARCHITECTURES
from .adapters import AdapterMethod
from .state import under


class Measurements:
    """
    Measurements of each adapter, one after the other.

    Args:
        method (`AdapterMethod`): The method whose adapters are measured.
        options (`Collection[str]`): Options of the merge function that no user gives.
        merge (`str`): Name of the merge function.

    Attributes:
        kind (`Optional[str]`): The option that takes them, `"fisher"` or `"grams"`; `None` if there is none.
        of_adapters (`list[AdapterTensors]`): What was measured of each adapter.

    Raises:
        ValueError: If the adapters have nothing that could be measured.
    """

    def __init__(self, method: AdapterMethod, options: Collection[str], merge: str) -> None:
        self.method = method
        self.kind: Optional[str] = next((name for name in ("fisher", "grams") if name in options), None)
        self.merge = merge
        self.of_adapters: list[AdapterTensors] = []
        if self.kind == "grams" and not _has_linear_adapters(method):
            raise ValueError(
                f"merge={merge!r} is for linear layers, and these adapters are convolutions; choose another merge, or "
                "DynammoLoraConfig on the linear layers of a model."
            )

    def measure(self, task: Task, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measures the newest adapter on normalised images of its task and their labels."""
        model, adapter = self.method.model, self.method.adapters[-1]
        if self.kind == "grams":
            self.of_adapters.append(input_grams(model, adapter, batches))
        elif self.kind == "fisher":

            def loss(logits: Tensor, labels: Tensor) -> Tensor:
                return F.cross_entropy(logits, task.places(labels))

            with model.head_output("scores"):
                self.of_adapters.append(diagonal_fisher(model, adapter, batches, loss))

    def state(self) -> dict[str, Tensor]:
        """All measurements, by name."""
        return {
            f"{self.kind}.{task}.{key}": value
            for task, own in enumerate(self.of_adapters)
            for key, value in own.items()
        }

    def restore(self, adapters: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave, for these adapters.

        Raises:
            ValueError: If the merge function needs what was not measured.
        """
        self.of_adapters = []
        if self.kind is None:
            return
        self.of_adapters = [under(f"{self.kind}.{task}.", tensors) for task in range(len(adapters))]
        if not all(self.of_adapters):
            raise ValueError(f"merge={self.merge!r} needs what was measured of each adapter; it was learned without.")


def _has_linear_adapters(method: AdapterMethod) -> bool:
    """Whether some of the adapters that the method will add are linear layers."""
    config = method.config
    if not isinstance(config, LoraConfig):
        return False
    if config.target_modules is None:
        architecture = ARCHITECTURES.get(method.model.config.model_type)
        config = replace(config, target_modules=None if architecture is None else set(architecture.projections))
    if config.target_modules in (None, "all-linear"):
        # An unknown model type is refused where its adapter is made.
        return True
    return any(
        isinstance(module, nn.Linear) and check_target_module_exists(config, name)
        for name, module in method.model.named_modules()
    )

"""Adapters as named tensors: what the merge functions read and write, for any PEFT method.

Names leave the adapter's own name out, so that the tensors of different adapters have the same names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Union

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


AdaptedModel = Union[PeftModel, BaseTuner]
AdapterTensors = dict[str, Tensor]
Kind = Literal["parameter", "factor_a", "factor_b", "scaled", "statistic", "constant"]

CONTAINERS = (nn.ModuleDict, nn.ParameterDict)

# Of LoRA's two factors the product is the adapter: each takes the root of a merge weight, as PEFT has it.
# Their product then has mixed terms too, of factors of different adapters.
FACTORS: dict[str, Kind] = {
    "lora_A": "factor_a",
    "lora_B": "factor_b",
    "lora_embedding_A": "factor_a",
    "lora_embedding_B": "factor_b",
}


@dataclass(frozen=True)
class Slot:
    """The place of a tensor of which every adapter has one of its own.

    Args:
        layer (`str`): Name of the tuner layer in the base model.
        container (`str`): Which of the layer's containers, as `"lora_A"`.
        tensor (`str`): Name in the adapter's module, as `"weight"`; empty where the adapter's entry is a tensor.
        output_dim (`int`): Dimension of the output channels.
        kind (`Literal["parameter", "factor_a", "factor_b", "scaled", "statistic", "constant"]`):
            How a merge has to treat it. `"scaled"`: its layer multiplies it by the adapter's scaling, and it is no
            factor. `"statistic"`: running statistics. `"constant"`: what is no number to be averaged, as indices.
    """

    layer: str
    container: str
    tensor: str
    output_dim: int
    kind: Kind

    @property
    def key(self) -> str:
        """Its name without the adapter's."""
        return ".".join(part for part in (self.layer, self.container, self.tensor) if part)

    def name(self, adapter: str) -> str:
        """Name of an adapter's own tensor in the base model's state."""
        return ".".join(part for part in (self.layer, self.container, adapter, self.tensor) if part)


def adapted_base(model: AdaptedModel) -> nn.Module:
    """The base model with tuner layers in it: the names of slots are relative to it."""
    check_has_adapters(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model.model


def check_has_adapters(model: nn.Module) -> None:
    """Raises a `ValueError` unless PEFT has put adapters into the model."""
    if not isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        raise ValueError(
            f"A {type(model).__name__} is no model with PEFT's adapters; give what `get_peft_model` or "
            "`PeftModel.from_pretrained` returned."
        )


def adapter_slots(model: AdaptedModel, adapter: str) -> dict[str, Slot]:
    """The places of an adapter's tensors by their `key`.

    Heads of DynaMMo adapters are left out: each has classes of its own, so they are placed side by side, not merged. A
    tensor that several layers share, as of tied embeddings, is there once.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapter (`str`): Name of an adapter.

    Raises:
        ValueError: If the adapter does not exist.
    """
    _check_exists(model, adapter)
    return {slot.key: slot for slot, _ in _entries(adapter_layers(adapted_base(model)), adapter)}


def _check_exists(model: AdaptedModel, adapter: str) -> None:
    check_has_adapters(model)
    if adapter not in model.peft_config:
        raise ValueError(f"Adapter {adapter!r} does not exist; there are {', '.join(model.peft_config)}.")


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that hold adapters, `modules_to_save` among them, by name.

    What is inside the adapters of tuner layers is passed over, so that the search takes no longer for many adapters.

    Args:
        model (`nn.Module`): A model with adapters.
    """
    yield from _adapter_layers(model, "", set())


def _adapter_layers(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    holds = isinstance(module, BaseTunerLayer)
    if holds or isinstance(module, AuxiliaryTrainingWrapper):
        yield name, module
    for child_name, child in module.named_children():
        if not (holds and child_name in module.adapter_layer_names and isinstance(child, CONTAINERS)):
            yield from _adapter_layers(child, f"{name}.{child_name}" if name else child_name, seen)


def _entries(layers: Iterable[tuple[str, nn.Module]], adapter: str) -> Iterator[tuple[Slot, Tensor]]:
    """The places of an adapter's tensors, and the tensors, each once."""
    seen: set[int] = set()
    for slot, tensor in _all_entries(layers, adapter):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield slot, tensor


def _all_entries(layers: Iterable[tuple[str, nn.Module]], adapter: str) -> Iterator[tuple[Slot, Tensor]]:
    for layer_name, layer in layers:
        if getattr(layer, "is_head", False):
            continue
        for container_name in layer.adapter_layer_names:
            container = getattr(layer, container_name, None)
            if not isinstance(container, CONTAINERS) or adapter not in container:
                continue
            kind = FACTORS.get(container_name, "parameter")
            if isinstance(container, nn.ParameterDict):
                yield Slot(layer_name, container_name, "", 0, kind), container[adapter]
                continue
            buffers = dict(container[adapter].named_buffers())
            for tensor_name in container[adapter].state_dict():
                path, _, own_name = tensor_name.rpartition(".")
                owner = container[adapter].get_submodule(path)
                transposed = isinstance(owner, nn.modules.conv._ConvTransposeNd) and tensor_name.endswith("weight")
                own_kind = kind
                if tensor_name in buffers:
                    own_kind = _buffer_kind(owner, buffers[tensor_name])
                elif kind != "parameter" and tensor_name == "bias":
                    own_kind = "scaled"
                slot = Slot(layer_name, container_name, tensor_name, int(transposed), own_kind)
                yield slot, getattr(owner, own_name)


def _buffer_kind(owner: nn.Module, buffer: Tensor) -> Kind:
    # Only BatchNorm counts; other integers are places, as those of attention's relative positions.
    counts = isinstance(owner, nn.modules.batchnorm._NormBase)
    return "statistic" if counts or buffer.is_floating_point() else "constant"


def tensor_places(module: nn.Module) -> dict[int, list[str]]:
    """Where each tensor is held, by its `id`: all names of a shared one, but of a module with several names only one.

    What `functional_call` needs with `tie_weights=False`. By itself it names places inside shared modules twice, and
    leaves its stand-ins there.

    Args:
        module (`nn.Module`): A model.
    """
    places: dict[int, list[str]] = {}
    for path, owner in module.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                places.setdefault(id(tensor), []).append(f"{path}.{name}" if path else name)
    return places


def adapter_tensors(model: AdaptedModel, adapter: str) -> AdapterTensors:
    """The tensors of an adapter, those in the model and not copies, by the keys of their slots.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapter (`str`): Name of an adapter.

    Raises:
        ValueError: If the adapter does not exist.
    """
    return tensors_of_adapters(model, [adapter])[0]


def tensors_of_adapters(model: AdaptedModel, adapters: Sequence[str]) -> list[AdapterTensors]:
    """The tensors of several adapters, found together in one walk through the model; see `adapter_tensors`."""
    for name in adapters:
        _check_exists(model, name)
    layers = list(adapter_layers(adapted_base(model)))
    return [{slot.key: tensor for slot, tensor in _entries(layers, name)} for name in adapters]


@torch.no_grad()
def set_adapter_tensors(model: AdaptedModel, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes values into the tensors of an adapter.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapter (`str`): Name of an adapter.
        tensors (`Mapping[str, Tensor]`): Values by key, of the shapes that the adapter's tensors have.

    Raises:
        ValueError: If the adapter does not exist, or has no tensor of a name and shape; nothing is written then.
    """
    own = adapter_tensors(model, adapter)
    for key, value in tensors.items():
        if key not in own or own[key].shape != value.shape:
            raise ValueError(f"Adapter {adapter!r} has no tensor {key!r} of shape {tuple(value.shape)}.")
    for key, value in tensors.items():
        own[key].copy_(value)

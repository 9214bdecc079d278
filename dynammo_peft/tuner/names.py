"""Names of modules and adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def check_adapter_name(model: nn.Module, name: str) -> None:
    """PEFT finds an adapter's tensors by its name between dots: a name of a part of the model would mix them up."""
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise ValueError(f"Adapter name {name!r} may hold letters, digits, '_' and '-' only, as in 'task_000'.")
    for prefix in ("dynammo_", "lora_"):
        if prefix in name:
            raise ValueError(f"Adapter name {name!r} must not hold {prefix!r}, a prefix of adapters' tensors.")
    layers = [key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    taken = {"base_model", "base_layer", "model", "modules_to_save", "original_module", "weight", "bias"}
    taken.update(nn.BatchNorm2d(1).state_dict())
    for key in model.state_dict():
        owner = next((layer for layer in layers if key.startswith(f"{layer}.")), None)
        path = key.split(".")
        if owner is not None and not key.startswith(f"{owner}.base_layer."):
            # Behind a tuner layer's container the other adapters' names stand, which are no obstacle.
            path = path[: owner.count(".") + 2]
        taken.update(path)
    if name in taken:
        raise ValueError(
            f"Adapter name {name!r} is the name of a part of the model and its tensors would be mixed up when saved; "
            "choose another, as 'task_000'."
        )


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names of the modules of the base model, as if there were no tuner layers."""
    layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in model.named_modules():
        if name and not any(name.startswith(f"{layer}.") for layer in layers):
            yield name, module


def find_base_module(model: nn.Module, name: str) -> str:
    """The path of the base model's module of a name or of a name's end, below tuner layers where it is in one.

    Raises:
        ValueError: If there is none, or more than one.
    """
    paths = {}
    for path, _ in model.named_modules():
        plain = ".".join(part for part in path.split(".") if part != "base_layer")
        if plain == name or plain.endswith(f".{name}"):
            paths[plain] = path
    if len(paths) != 1:
        found = f"several modules {name!r} ({', '.join(paths)})" if paths else f"no module {name!r}"
        raise ValueError(f"The base model has {found}; give feature_modules whole names of its blocks.")
    return next(iter(paths.values()))

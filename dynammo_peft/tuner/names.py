"""Names of modules and adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..merging.checks import check_name_is_free


def check_adapter_name(model: nn.Module, name: str) -> None:
    """Raises a `ValueError` unless an adapter of this name is told apart from all else in the model."""
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise ValueError(f"Adapter name {name!r} may hold letters, digits, '_' and '-' only, as in 'task_000'.")
    for prefix in ("dynammo_", "lora_"):
        if prefix in name:
            raise ValueError(f"Adapter name {name!r} must not hold {prefix!r}, a prefix of adapters' tensors.")
    check_name_is_free(model, name)


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

"""Whether `target_modules` names modules that there are."""

from __future__ import annotations

import copy

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import DUMMY_TARGET_MODULES, INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..merging.checks import BASES
from .head_config import HeadConfig
from .names import base_modules


def check_targets(config: HeadConfig, model: nn.Module) -> None:
    """Raises a `ValueError` if an adapter would be put nowhere, or an entry of a list of targets names no module.

    PEFT is content with one module, and the head is one.

    Args:
        config (`HeadConfig`): The adapter's configuration, with its `target_modules`.
        model (`nn.Module`): The base model, with or without tuner layers in it.
    """
    targets = config.target_modules
    # Parameters are targets too, and PEFT looks for them itself.
    if targets == DUMMY_TARGET_MODULES or getattr(config, "target_parameters", None):
        return
    if not isinstance(targets, str):
        names = [f".{_plain(name)}" for name, _ in model.named_modules()]
        unknown = [entry for entry in sorted(targets) if not any(name.endswith(f".{entry}") for name in names)]
        if unknown:
            raise ValueError(
                f"The base model has no module target_modules={unknown!r}; take that out of the "
                f"{type(config).__name__} or name the module as the base model does."
            )
    if not any(_is_target(config, name, module) for name, module in base_modules(model)):
        shown = targets if isinstance(targets, str) else sorted(targets)
        options = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        further = [f"{name}={value!r}" for name in options if (value := getattr(config, name, None)) is not None]
        narrowed = f" with {' and '.join(further)}" if further else ""
        raise ValueError(
            f"No module of the base model but its head matches target_modules={shown!r}{narrowed}, so that no adapter "
            f"would be trained; set target_modules in the {type(config).__name__} to names of its modules."
        )


def _plain(name: str) -> str:
    """A module's name as if there were no tuner layers around it."""
    return ".".join(part for part in name.split(".") if part not in BASES)


def _is_target(config: HeadConfig, name: str, module: nn.Module) -> bool:
    if config.head_module is not None and f"{name}.".startswith(f"{config.head_module}."):
        return False
    if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        if not isinstance(getattr(module, "base_layer", module), (nn.Linear, Conv1D)):
            return False
        config = copy.copy(config)
        config.target_modules = {name}
    return bool(BaseTuner._check_target_module_exists(config, name))

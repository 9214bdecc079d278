"""Merges of `modules_to_save`, which stand in the place of the base model's modules instead of adding to them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor

from .adapters import AdaptedModel, Slot, adapted_base
from .registry import MergeFunction


def warn_of_replacing_modules(
    model: AdaptedModel,
    slots: Mapping[str, Slot],
    weights: Tensor,
    function: MergeFunction,
    options: Mapping[str, Any],
    stacklevel: int,
) -> None:
    """Warns where a merge prunes or scales whole modules of the adapters.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        slots (`Mapping[str, Slot]`): The tensors that were merged, by key.
        weights (`Tensor`): A weight for each adapter, `(T,)`.
        function (`MergeFunction`): The merge function.
        options (`Mapping[str, Any]`): Its options.
        stacklevel (`int`): Of the warning, as seen from here.
    """
    # From a base on, it is the difference that is pruned and scaled.
    if function.averages or options.get("base") is not None:
        return
    base = adapted_base(model)
    modules = {slot.layer: base.get_submodule(slot.layer) for slot in slots.values() if slot.kind == "parameter"}
    modules = {name: module for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    if not modules:
        return
    prunes = len(weights) > 1 and "base" in inspect.signature(function.function).parameters
    matrices = [name for name, module in modules.items() if any(own.dim() > 1 for own in module.parameters())]
    # A weight of 1 is the mean where the function itself divides by the number of adapters.
    total = weights.sum().item() / (1 if function.default_weight is None else len(weights))
    if prunes and matrices:
        warnings.warn(
            f"combination_type={function.name!r} prunes {', '.join(matrices)} of modules_to_save, which stand in the "
            "place of the base model's; give base=, the adapters' tensors before "
            "their training, or choose 'uniform' or 'linear' with weights that sum to one.",
            stacklevel=stacklevel,
        )
    elif abs(total - 1) > 1e-4:
        warnings.warn(
            f"The merge scales {', '.join(modules)} of modules_to_save by {total:.4g}, the sum of the weights, and "
            "they stand in the place of the base model's; give weights that sum to one.",
            stacklevel=stacklevel,
        )

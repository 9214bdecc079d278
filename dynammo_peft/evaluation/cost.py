"""What a forward pass costs: floating-point operations and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from ..tuner.flops import count_flops


@dataclass(frozen=True)
class Cost:
    """
    Args:
        flops (`int`): Floating-point operations of matrix products, convolutions and attention.
        parameters (`int`): Different parameters of the layers that run; the adapters' scalars (alpha) are not counted.
    """

    flops: int
    parameters: int

    @property
    def multiply_adds(self) -> int:
        """Half the floating-point operations."""
        return self.flops // 2


def forward_cost(model: nn.Module, forward: Callable[[], Any], folded: bool = False) -> Cost:
    """
    Args:
        model (`nn.Module`): Whose parameters are counted: those of the leaf modules that run.
        forward (`Callable`): Runs `model` in any way, once or several times.
        folded (`bool`): Whether LoRA counts as if it were in the backbone's weights (`merge_adapter`), where it costs
            nothing; the model stays as it is.

    Returns:
        `Cost`: What one call of `forward` costs. A parameter that is used again is counted once.
    """
    used: dict[int, int] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        used.update({id(parameter): parameter.numel() for parameter in module.parameters(recurse=False)})

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)] if folded else []
    disabled = [layer.disable_adapters for layer in layers]
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        for layer in layers:
            # Not `enable_adapters`, which changes what is trained.
            layer._disable_adapters = True
        flops = count_flops(forward)
    finally:
        for handle in handles:
            handle.remove()
        for layer, value in zip(layers, disabled):
            layer._disable_adapters = value
    return Cost(flops=flops, parameters=sum(used.values()))

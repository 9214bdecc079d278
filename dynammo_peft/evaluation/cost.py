"""What a forward pass costs: floating-point operations and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def forward_cost(model: nn.Module, forward: Callable[[], Any]) -> Cost:
    """
    Args:
        model (`nn.Module`): Whose parameters are counted: those of the leaf modules that run.
        forward (`Callable`): Runs `model` in any way, once or several times.

    Returns:
        `Cost`: What one call of `forward` costs. A parameter that is used again is counted once.
    """
    used: dict[int, int] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        used.update({id(parameter): parameter.numel() for parameter in module.parameters(recurse=False)})

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        flops = count_flops(forward)
    finally:
        for handle in handles:
            handle.remove()
    return Cost(flops=flops, parameters=sum(used.values()))

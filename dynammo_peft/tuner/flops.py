"""Counting the floating-point operations of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# PyTorch's counter knows the fused attention kernels of GPUs, not the one of CPUs.
_EXTRA_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops}


def count_flops(forward: Callable[[], Any]) -> int:
    """Counts the operations of matrix products, convolutions and attention in one call of `forward`.

    Args:
        forward (`Callable`): Called once, without gradients.

    Returns:
        `int`: Floating-point operations: twice the multiply-adds. Element-wise operations (activations,
        normalisation, additions) are not counted, as is usual.
    """
    with FlopCounterMode(display=False, custom_mapping=_EXTRA_FORMULAS) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()

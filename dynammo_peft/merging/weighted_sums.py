"""The weighted sum of one tensor of several adapters, differentiable in the weights."""

from __future__ import annotations

from typing import Literal, Optional

import torch
from torch import Tensor

from .adapters import Slot
from .groups import channel_dim


# Of LoRA's factors: their sums, or side by side, so that the merged update is the weighted sum of the adapters' own.
WeightedCombination = Literal["linear", "cat"]

# Below this the root of a weight goes on as a straight line: its slope would grow without bound.
ROOT_THRESHOLD = 1e-4


def weighted_sum(
    slot: Slot,
    stacked: Tensor,
    weights: Tensor,
    scalings: Optional[Tensor] = None,
    combination_type: WeightedCombination = "linear",
) -> Tensor:
    """Merges a tensor as its kind wants it; see [`MergeWeights.combine`].

    Args:
        slot (`Slot`): The tensor's place.
        stacked (`Tensor`): The adapters' tensors, `(T, ...)`.
        weights (`Tensor`): One for each adapter, `(T,)`, or also for each output channel, `(T, channels)`.
        scalings (`Optional[Tensor]`): Scaling of each adapter over that of the merged one, `(T,)`; none if `None`.
        combination_type (`Literal["linear", "cat"]`): `"cat"`: LoRA's factors stay apart, `(T r, ...)` and
            `(C_out, T r, ...)`.
    """
    if slot.kind == "constant":
        return stacked[0]
    if stacked.dtype in (torch.float16, torch.bfloat16):
        # Weights would be rounded.
        return weighted_sum(slot, stacked.float(), weights, scalings, combination_type).to(stacked.dtype)
    if not stacked.is_floating_point():
        return stacked.sum(dim=0, dtype=stacked.dtype)
    if slot.kind == "statistic":
        # Batch normalisation has no gradient for its running statistics.
        shares = weights.detach().abs()
        # Where all weights are zero, none is preferred.
        shares = torch.where(shares.sum(dim=0) > 0, shares, torch.ones_like(shares))
        weights = shares / shares.sum(dim=0)
    if scalings is not None:
        weights = weights * scalings.to(weights).reshape(-1, *[1] * (weights.dim() - 1))
    if slot.kind in ("factor_a", "factor_b"):
        weights = weights / weights.abs().clamp(min=ROOT_THRESHOLD).sqrt()
        # The sign must be on one side only.
        weights = weights if slot.kind == "factor_a" else weights.abs()
    # Of a model on several devices each layer has its own.
    weights = weights.to(stacked)
    side_by_side = combination_type == "cat" and slot.kind in ("factor_a", "factor_b")
    if weights.dim() == 1 and not side_by_side:
        return torch.tensordot(weights, stacked, dims=1)
    shape = [1] * stacked.dim()
    shape[0] = len(weights)
    if weights.dim() == 2:
        shape[1 + channel_dim(slot, stacked[0])] = weights.shape[1]
    weighted = weights.reshape(shape) * stacked
    if side_by_side:
        return torch.cat(tuple(weighted), dim=0 if slot.kind == "factor_a" else 1)
    return weighted.sum(dim=0)

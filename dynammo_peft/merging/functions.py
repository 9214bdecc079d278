"""Merge functions: several adapters' tensors of one name and a weight for each, to one tensor.

They know nothing of models or of adapters' layouts, so that they serve any PEFT method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft.utils import merge_utils
from torch import Tensor


def linear(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of parameters: `sum_i w_i * theta_i`, differentiable in `weights`.

    Args:
        tensors (`Sequence[Tensor]`): One tensor for each adapter, of one shape.
        weights (`Tensor`): One weight for each adapter, `(T,)`.

    Returns:
        `Tensor`: The merged tensor.
    """
    return merge_utils.task_arithmetic(list(tensors), weights.to(tensors[0]))


def average_statistics(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted mean of running statistics: `sum_i w_i * s_i / sum_i w_i`.

    Weights that do not sum to one scale parameters, but a mean or a variance of features is no sum of others. Integer
    statistics (the number of batches seen) are added up, whatever the weights.

    Args:
        tensors (`Sequence[Tensor]`): One statistic for each adapter, of one shape.
        weights (`Tensor`): One non-negative weight for each adapter, `(T,)`.

    Returns:
        `Tensor`: The merged statistic.
    """
    if not tensors[0].is_floating_point():
        return torch.stack(list(tensors)).sum(dim=0)
    return linear(tensors, weights / weights.sum())


COMBINATIONS: dict[str, Callable[[Sequence[Tensor], Tensor], Tensor]] = {"linear": linear}


def check_weights(weights: Sequence[float], count: int) -> Tensor:
    """Merge weights as a tensor, `(count,)`.

    Raises:
        ValueError: If there is not one weight for each adapter, one is negative or not finite, or all are zero.
    """
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} adapters; give one weight for each adapter.")
    tensor = torch.as_tensor(weights, dtype=torch.float64)
    if not torch.isfinite(tensor).all() or (tensor < 0).any() or tensor.sum() == 0:
        raise ValueError(f"Merge weights must be finite, not negative and not all zero, got {list(weights)}.")
    return tensor

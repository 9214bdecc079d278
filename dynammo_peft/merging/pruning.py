"""Merge functions that prune what the adapters add before they combine it, over `peft.utils.merge_utils`.

Tensors of fewer than two dimensions (normalisation, biases, scales) are combined whole: pruning would zero them. So is
a single adapter, as in PEFT: there is nobody to make room for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Literal, Optional, get_args

import torch
from peft.utils import merge_utils
from torch import Tensor

from .adapters import AdapterTensors
from .functions import linear_tensor
from .registry import is_between, merge_function


MajoritySignMethod = Literal["total", "frequency"]
# Of the tensor's name, the adapter's place and the tensor.
Prune = Callable[[str, int, Tensor], Tensor]
# Of the tensors and their weights.
Join = Callable[[Sequence[Tensor], Tensor], Tensor]


@merge_function()
def magnitude_prune(
    adapters: Sequence[AdapterTensors],
    weights: Tensor,
    *,
    density: float,
    base: Optional[AdapterTensors] = None,
) -> AdapterTensors:
    """The weighted sum of the largest values of each tensor.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names and shapes.
        weights (`Tensor`): One weight for each adapter, `(T,)`.
        density (`float`): The part of the values to keep, in [0, 1].
        base (`Optional[AdapterTensors]`):
            What the adapters were before their training: differences from it are pruned, and the result is added to
            it. If `None`, zeros.

    Returns:
        `AdapterTensors`: The merged tensors.

    Raises:
        ValueError: If `density` is not in [0, 1], or `base` lacks a tensor.
    """
    return _combine_differences(adapters, weights, base, _largest(density), linear_tensor, linear_tensor)


# The mean over the adapters that agree on a sign is a part of the merge, so by default a weight is 1, as in the paper.
@merge_function(default_weight=1.0)
def ties(
    adapters: Sequence[AdapterTensors],
    weights: Tensor,
    *,
    density: float,
    majority_sign_method: MajoritySignMethod = "total",
    base: Optional[AdapterTensors] = None,
) -> AdapterTensors:
    """The largest values of each tensor, averaged over the adapters that have the sign of the majority.

    Trim, elect sign and merge of Yadav et al. 2023 (https://arxiv.org/abs/2306.01708, section 3). As the mean is taken
    over the number of adapters, weights scale the result: 1 for each is the paper's.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names and shapes.
        weights (`Tensor`): One weight for each adapter, `(T,)`.
        density (`float`): The part of the values to keep, in [0, 1].
        majority_sign_method (`Literal["total", "frequency"]`): Whether values or signs are counted.
        base (`Optional[AdapterTensors]`): As in `magnitude_prune`.

    Returns:
        `AdapterTensors`: The merged tensors.

    Raises:
        ValueError: If `density` is not in [0, 1], `majority_sign_method` does not exist, or `base` lacks a tensor.
    """
    return _combine_differences(
        adapters, weights, base, _largest(density), _elected(majority_sign_method), _mean_of_weighted
    )


@merge_function()
def dare_linear(
    adapters: Sequence[AdapterTensors],
    weights: Tensor,
    *,
    density: float,
    seed: int = 0,
    base: Optional[AdapterTensors] = None,
) -> AdapterTensors:
    """The weighted sum of tensors of which random values are dropped and the rest scaled up.

    Drop and rescale of Yu et al. 2024 (https://arxiv.org/abs/2311.03099, section 3.2).

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names and shapes.
        weights (`Tensor`): One weight for each adapter, `(T,)`.
        density (`float`): The probability that a value is kept, in (0, 1].
        seed (`int`): Seed of what is dropped; other random numbers are not touched.
        base (`Optional[AdapterTensors]`): As in `magnitude_prune`.

    Returns:
        `AdapterTensors`: The merged tensors.

    Raises:
        ValueError: If `density` is not in (0, 1], or `base` lacks a tensor.
    """
    return _combine_differences(adapters, weights, base, _random(density, seed), linear_tensor, linear_tensor)


@merge_function(default_weight=1.0)
def dare_ties(
    adapters: Sequence[AdapterTensors],
    weights: Tensor,
    *,
    density: float,
    majority_sign_method: MajoritySignMethod = "total",
    seed: int = 0,
    base: Optional[AdapterTensors] = None,
) -> AdapterTensors:
    """As `ties`, but random values are dropped and the rest scaled up, as in `dare_linear`.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names and shapes.
        weights (`Tensor`): One weight for each adapter, `(T,)`.
        density (`float`): The probability that a value is kept, in (0, 1].
        majority_sign_method (`Literal["total", "frequency"]`): Whether values or signs are counted.
        seed (`int`): Seed of what is dropped; other random numbers are not touched.
        base (`Optional[AdapterTensors]`): As in `magnitude_prune`.

    Returns:
        `AdapterTensors`: The merged tensors.

    Raises:
        ValueError: If `density` is not in (0, 1], `majority_sign_method` does not exist, or `base` lacks a tensor.
    """
    return _combine_differences(
        adapters, weights, base, _random(density, seed), _elected(majority_sign_method), _mean_of_weighted
    )


def _combine_differences(
    adapters: Sequence[AdapterTensors],
    weights: Tensor,
    base: Optional[AdapterTensors],
    prune: Prune,
    join: Join,
    join_whole: Join,
) -> AdapterTensors:
    """The adapters' differences from `base`, pruned and put together by `join`; small ones whole by `join_whole`."""
    merged = {}
    for key in adapters[0]:
        tensors = [adapter[key] for adapter in adapters]
        origin = None if base is None else _origin(base, key, tensors[0])
        if origin is not None:
            tensors = [tensor - origin for tensor in tensors]
        if len(tensors) > 1 and tensors[0].dim() >= 2:
            total = join([prune(key, place, tensor) for place, tensor in enumerate(tensors)], weights)
        else:
            total = join_whole(tensors, weights)
        merged[key] = (total if origin is None else origin + total).to(adapters[0][key].dtype)
    return merged


def _origin(base: AdapterTensors, key: str, like: Tensor) -> Tensor:
    if key not in base or base[key].shape != like.shape:
        raise ValueError(f"base has no tensor {key!r} of shape {tuple(like.shape)}; give the tensors of an adapter.")
    return base[key].to(like)


def _mean_of_weighted(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """What the elected mean is where all signs agree."""
    return linear_tensor(tensors, weights / len(tensors))


def _elected(method: MajoritySignMethod) -> Join:
    if method not in get_args(MajoritySignMethod):
        raise ValueError(f"majority_sign_method={method!r} does not exist; choose 'total' or 'frequency'.")

    def join(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
        stacked = torch.stack(list(tensors))
        mask = merge_utils.calculate_majority_sign_mask(stacked, method)
        scales = merge_utils.reshape_weight_task_tensors(stacked, weights.to(stacked))
        return merge_utils.disjoint_merge(stacked * scales, mask)

    return join


def _largest(density: float) -> Prune:
    if not is_between(density, 0, 1):
        raise ValueError(f"density={density!r} must be in [0, 1]: the part of the values to keep.")
    # At 1, PEFT's function would warn that nothing is pruned, for every tensor.
    return lambda _, __, tensor: tensor if density == 1 else merge_utils.prune(tensor, density, method="magnitude")


def _random(density: float, seed: int) -> Prune:
    if not is_between(density, 0, 1) or density == 0:
        raise ValueError(f"density={density!r} must be in (0, 1]: the probability that a value is kept.")

    def prune(key: str, place: int, tensor: Tensor) -> Tensor:
        # What is dropped of a tensor does not depend on what else is merged, nor on the device.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {place} {key}".encode()))
        kept = torch.rand(tensor.shape, generator=generator) < density
        return tensor * kept.to(tensor) / density

    return prune

"""Merge functions: several adapters' tensors and a weight for each, to one adapter's tensors.

They know nothing of models or of adapters' layouts, so that they serve any PEFT method. Statistics of BatchNorm are
not for them, but for `average_statistics`. All raise a `ValueError` if there is no adapter or one has other tensors
than the first; those that heed weights, if there is not one for each adapter, one is not finite or all are zero, and
means also if one is negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from peft.utils import merge_utils
from torch import Tensor

from .adapters import AdapterTensors
from .registry import check_weight_tensor, is_between, merge_function


# Half way from the first adapter to the mean: chosen on validation images (docs/merging_log.md).
FIRST_SHARE = 0.5


def linear_tensor(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`sum_i w_i * theta_i` of one tensor of each adapter, differentiable in `weights` `(T,)`.

    Half precision is summed up in single: `1 / T` would be off by up to 0.4% in it.
    """
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    exact = [tensor.to(dtype) for tensor in tensors]
    return merge_utils.task_arithmetic(exact, weights.to(exact[0])).to(tensors[0].dtype)


def average_statistics(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted mean of running statistics: `sum_i |w_i| * s_i / sum_i |w_i|`.

    Weights that do not sum to one scale parameters, but a mean or a variance of features is no sum of others. Integer
    statistics (the number of batches seen) are added up, whatever the weights.

    Args:
        tensors (`Sequence[Tensor]`): One statistic for each adapter, of one shape.
        weights (`Tensor`): One weight for each adapter, not all zero, `(T,)`.

    Returns:
        `Tensor`: The merged statistic.

    Raises:
        ValueError: If there is not one weight for each adapter, one is not finite, or all are zero.
    """
    check_weight_tensor(weights, len(tensors), allow_negative=True)
    if not tensors[0].is_floating_point():
        return torch.stack(list(tensors)).sum(dim=0)
    return linear_tensor(tensors, weights.abs() / weights.abs().sum())


@merge_function(running=lambda count: {"weights": [count / (count + 1), 1 / (count + 1)]})
def linear(adapters: Sequence[AdapterTensors], weights: Tensor) -> AdapterTensors:
    """The weighted sum of parameters: `sum_i w_i * theta_i`, differentiable in `weights`.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names and shapes.
        weights (`Tensor`): One weight for each adapter, `(T,)`.

    Returns:
        `AdapterTensors`: The merged tensors.
    """
    return _by_tensor(adapters, lambda _, tensors: linear_tensor(tensors, weights))


def _equal(weights: Tensor) -> Tensor:
    return torch.full_like(weights, 1 / len(weights))


@merge_function(
    averages=True, proportions=_equal, running=lambda count: {"combination_type": "running_mean", "count": count}
)
def uniform(adapters: Sequence[AdapterTensors], weights: Tensor) -> AdapterTensors:
    """The mean of the adapters' parameters (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482, "uniform soup").

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names and shapes.
        weights (`Tensor`): Ignored.

    Returns:
        `AdapterTensors`: The merged tensors.
    """
    return linear(adapters, _equal(weights))


def _at_least_one(count: int) -> int:
    if not is_between(count, 1, math.inf):
        raise ValueError(f"count={count!r} must be at least 1: the number of adapters that the first stands for.")
    return count


def _running(weights: Tensor, *, count: int) -> Tensor:
    proportions = torch.ones_like(weights)
    proportions[0] = _at_least_one(count)
    return proportions / proportions.sum()


@merge_function(averages=True, proportions=_running)
def running_mean(adapters: Sequence[AdapterTensors], weights: Tensor, *, count: int) -> AdapterTensors:
    """The mean of many adapters of which only the mean so far and the newest are there.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapter merged so far, then the new ones.
        weights (`Tensor`): Ignored.
        count (`int`): Number of adapters that the first one is the mean of.

    Returns:
        `AdapterTensors`: The merged tensors.

    Raises:
        ValueError: If `count` is less than 1.
    """
    return linear(adapters, _running(weights, count=count))


def _anchored(weights: Tensor, *, first_share: float = FIRST_SHARE) -> Tensor:
    _check_first_share(first_share)
    proportions = torch.full_like(weights, (1 - first_share) / len(weights))
    proportions[0] += first_share
    return proportions


@merge_function(
    averages=True,
    proportions=_anchored,
    running=lambda count: {"combination_type": "running_anchored_mean", "count": count},
    running_first=True,
)
def anchored_mean(
    adapters: Sequence[AdapterTensors], weights: Tensor, *, first_share: float = FIRST_SHARE
) -> AdapterTensors:
    """Between the first adapter and the mean of all: `first_share * theta_1 + (1 - first_share) * mean(theta)`.

    Adapters that each start as a copy of the one before walk away from the first, and features of old classes with
    them. On the way back to where one started, models are often better than at both ends (Wortsman et al. 2022,
    https://arxiv.org/abs/2109.01903, whose `1 - alpha` is `first_share`).

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names and shapes, the oldest first.
        weights (`Tensor`): Ignored.
        first_share (`float`): The share of the first adapter beside its part of the mean, which 0 gives.

    Returns:
        `AdapterTensors`: The merged tensors.

    Raises:
        ValueError: If `first_share` is not between 0 and 1.
    """
    return linear(adapters, _anchored(weights, first_share=first_share))


def _running_anchored(weights: Tensor, *, count: int, first_share: float = FIRST_SHARE) -> Tensor:
    _check_first_share(first_share)
    proportions = torch.full_like(weights, 1 - first_share)
    proportions[0], proportions[1] = _at_least_one(count), first_share * (len(weights) - 2)
    return proportions / proportions.sum()


@merge_function(averages=True, proportions=_running_anchored)
def running_anchored_mean(
    adapters: Sequence[AdapterTensors], weights: Tensor, *, count: int, first_share: float = FIRST_SHARE
) -> AdapterTensors:
    """The `anchored_mean` of many adapters of which only that so far, the first and the newest are there.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapter merged so far, the first of all, then the new ones.
        weights (`Tensor`): Ignored.
        count (`int`): Number of adapters that were merged so far.
        first_share (`float`): As of `anchored_mean`.

    Returns:
        `AdapterTensors`: The merged tensors.

    Raises:
        ValueError: If there are fewer than three adapters, `count` is less than 1, or `first_share` is not between 0
            and 1.
    """
    if len(adapters) < 3:
        raise ValueError(
            f"running_anchored_mean takes what was merged so far, the first adapter and new ones, got {len(adapters)}."
        )
    return linear(adapters, _running_anchored(weights, count=count, first_share=first_share))


def _check_first_share(first_share: float) -> None:
    if not is_between(first_share, 0, 1):
        raise ValueError(f"first_share={first_share!r} must be between 0, the mean of all, and 1, the first adapter.")


def _fading(weights: Tensor, *, decay: float) -> Tensor:
    if not is_between(decay, 0, 1):
        raise ValueError(f"decay={decay!r} must be between 0 and 1: the part of what was merged before that is kept.")
    kept = decay ** torch.arange(len(weights) - 1, -1, -1, dtype=weights.dtype, device=weights.device)
    # The first adapter is the start, not blended with anything.
    return torch.cat([kept[:1], (1 - decay) * kept[1:]])


@merge_function(averages=True, proportions=_fading, running=lambda count: {})
def exponential_moving_average(adapters: Sequence[AdapterTensors], weights: Tensor, *, decay: float) -> AdapterTensors:
    """The adapters folded in their order: `merged = decay * merged + (1 - decay) * theta_i`, from the first on.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, the oldest first.
        weights (`Tensor`): Ignored.
        decay (`float`): The part of what was merged before that is kept.

    Returns:
        `AdapterTensors`: The merged tensors.

    Raises:
        ValueError: If `decay` is not between 0 and 1.
    """
    return linear(adapters, _fading(weights, decay=decay))


@merge_function(averages=True, per_adapter="fisher")
def fisher(
    adapters: Sequence[AdapterTensors],
    weights: Tensor,
    *,
    fisher: Sequence[AdapterTensors],
    epsilon: float = 1e-12,
) -> AdapterTensors:
    """The mean in which each parameter counts by its Fisher information: `sum_i w_i F_i theta_i / sum_i w_i F_i`.

    It is the most likely parameter under the adapters' Laplace approximations (Matena & Raffel 2022,
    https://arxiv.org/abs/2111.09832, section 2). A parameter of which no adapter knows anything is their plain mean.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names and shapes.
        weights (`Tensor`): One weight for each adapter, not negative, `(T,)`.
        fisher (`Sequence[AdapterTensors]`): The diagonal Fisher information of each, as of `diagonal_fisher`.
        epsilon (`float`): A weighted sum of Fishers up to this part of its mean over the tensor is taken for zero.

    Returns:
        `AdapterTensors`: The merged tensors.

    Raises:
        ValueError: If there is not one Fisher information for each adapter and tensor, one is negative or not
            finite, or `epsilon` is no share.
    """
    _check_count("fisher", fisher, adapters)
    if not is_between(epsilon, 0, 1):
        raise ValueError(f"epsilon={epsilon!r} must be between 0 and 1: the part of the mean that is taken for zero.")
    shares = weights / weights.sum()

    def merge(key: str, tensors: list[Tensor]) -> Tensor:
        exact = [tensor.double() for tensor in tensors]
        information = [_measured("fisher", fisher, i, key, tensors[0].shape).to(exact[0]) for i in range(len(exact))]
        if not all((values >= 0).all() for values in information):
            raise ValueError(f"fisher of {key!r} must not be negative; it is a mean of squares.")
        total = linear_tensor(information, shares)
        known = total > epsilon * total.mean()
        weighted = linear_tensor([f * theta for f, theta in zip(information, exact)], shares)
        merged = torch.where(known, weighted / torch.where(known, total, 1), linear_tensor(exact, shares))
        return merged.to(tensors[0])

    return _by_tensor(adapters, merge)


@merge_function(averages=True, per_adapter="grams")
def regmean(
    adapters: Sequence[AdapterTensors],
    weights: Tensor,
    *,
    grams: Sequence[AdapterTensors],
    off_diagonal: float = 0.9,
) -> AdapterTensors:
    """Linear layers whose outputs are nearest to those of the adapters' own, on the inputs of each.

    `W = sum_i w_i W_i G_i (sum_i w_i G_i)^-1` minimises `sum_i w_i |x W' - x W_i'|^2` with `G_i` the mean of `x' x`
    (Jin et al. 2023, https://arxiv.org/abs/2212.09849, section 3). Where no inputs were seen it is the mean, as are
    the tensors without Gram matrix.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names and shapes.
        weights (`Tensor`): One weight for each adapter, not negative, `(T,)`.
        grams (`Sequence[AdapterTensors]`):
            Gram matrices `(in, in)` of each adapter by the keys of weights `(out, in)`, as of `input_grams`.
        off_diagonal (`float`):
            Factor of the elements off the diagonals, the paper's alpha: 1 is plain least squares.

    Returns:
        `AdapterTensors`: The merged tensors.

    Raises:
        ValueError: If there are not finite Gram matrices of each adapter for the same tensors, or `off_diagonal` is
            not between 0 and 1.
    """
    _check_count("grams", grams, adapters)
    if not is_between(off_diagonal, 0, 1):
        raise ValueError(f"off_diagonal={off_diagonal!r} must be between 0 and 1.")
    shares = weights / weights.sum()

    def merge(key: str, tensors: list[Tensor]) -> Tensor:
        if not any(key in measured for measured in grams):
            return linear_tensor(tensors, shares)
        exact = [tensor.double() for tensor in tensors]
        shape = (tensors[0].shape[-1],) * 2
        found = [_measured("grams", grams, i, key, shape).to(exact[0]) for i in range(len(exact))]
        found = [off_diagonal * gram + (1 - off_diagonal) * gram.diag().diag() for gram in found]
        total = linear_tensor(found, shares)
        mean = linear_tensor(exact, shares)
        # From the mean on, so that directions without any input stay there.
        residual = linear_tensor([(theta - mean) @ gram for theta, gram in zip(exact, found)], shares)
        # What a LayerNorm puts out has a direction of rounding errors only; those of float32 squared are left out.
        return (mean + residual @ torch.linalg.pinv(total, rtol=1e-10, hermitian=True)).to(tensors[0])

    return _by_tensor(adapters, merge)


def _by_tensor(adapters: Sequence[AdapterTensors], merge: Callable[[str, list[Tensor]], Tensor]) -> AdapterTensors:
    return {key: merge(key, [adapter[key] for adapter in adapters]) for key in adapters[0]}


def _check_count(option: str, measured: Sequence[AdapterTensors], adapters: Sequence[AdapterTensors]) -> None:
    if len(measured) != len(adapters):
        raise ValueError(f"{option} holds {len(measured)} entries for {len(adapters)} adapters; give one for each.")


def _measured(option: str, measured: Sequence[AdapterTensors], index: int, key: str, shape: Sequence[int]) -> Tensor:
    """What was measured of a tensor of one adapter, or a `ValueError`."""
    tensor = measured[index].get(key)
    if tensor is None or tensor.shape != tuple(shape):
        found = "nothing" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
        raise ValueError(f"{option}[{index}] holds {found} for {key!r}; it must have shape {tuple(shape)}.")
    if not tensor.isfinite().all():
        raise ValueError(f"{option}[{index}] holds NaN or infinity for {key!r}; measure it on finite images.")
    return tensor

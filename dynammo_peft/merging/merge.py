"""Merging adapters of a model into a new one, for any PEFT method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .adapters import (
    AdaptedModel,
    AdapterTensors,
    Slot,
    adapter_slots,
    adapter_tensors,
    set_adapter_tensors,
    tensors_of_adapters,
)
from .checks import check_constants, check_mergeable, check_names
from .creation import check_made, create_adapter, create_concatenated
from .functions import average_statistics
from .registry import COMBINATIONS, MergeFunction, check_runs, find_combination
from .replacing import warn_of_replacing_modules
from .scalings import SCALED, scalings_of, scalings_over
from .state import adapter_replaced, tuner_of
from .weights import MergeWeights


def merge_adapters(
    model: AdaptedModel,
    adapters: Sequence[str],
    weights: Optional[Union[Sequence[float], MergeWeights]] = None,
    adapter_name: str = "merged",
    combination_type: str = "linear",
    **options: Any,
) -> None:
    """
    Merges adapters of a model into a new one, for any PEFT method whose adapters are tensors of layers.

    Parameters, those of `modules_to_save` among them, are combined by `combination_type`; statistics of BatchNorm are
    averaged with the weights normalised to one. The factors of LoHa and LoKr are combined each for itself. Heads of
    DynaMMo adapters are placed side by side; a class that several adapters have keeps the head of the first of them.

    LoRA's factors are combined as in `LoraModel.add_weighted_adapter`, each with the roots of weights `w_i` and
    scalings `s_i`. With `"linear"` the merged update is `sum_ij sign(w_i) sqrt(|w_i s_i w_j s_j|) B_j A_i`: of each
    adapter its own update with its weight, `w_i s_i B_i A_i`, and products of one adapter's factor with another's.
    That is no mean: of `T` equal adapters with weights of `1 / T` it is `T` times their update. `"uniform"` takes the
    mean of each factor, of equal adapters their update. The weighted sum of the updates alone is what `"cat"` gives,
    as of `LoraModel`, of any ranks, at the sum of these. Where functions have a `base`, factors are moved from there
    on, each by its weights as they are: of `T` equal adapters, with weights of `1 / T`, to where these are.

    The new adapter has the first one's configuration and is frozen. It replaces an adapter of its name. What is
    active, trained and in training mode stays so. If anything fails, the model is as it was.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapters (`Sequence[str]`): Names of the adapters to merge.
        weights (`Optional[Union[Sequence[float], MergeWeights]]`):
            A weight for each, or learned ones, which give the adapter again that `learn_merge_weights` made. If
            `None`, `1 / len(adapters)`, or 1 where the function averages by itself (`"ties"`).
            What replaces a tensor of the base model instead of being added to it (LN tuning, `modules_to_save`,
            DoRA's magnitudes, IA3's factors) is scaled by weights that do not sum to one, and pruned like all else;
            of `modules_to_save` a warning says so.
        adapter_name (`str`): Name of the new adapter.
        combination_type (`str`): A key of `COMBINATIONS`; or `"cat"`, of LoRA.
        options: Keyword-only arguments of that function, as `density`.

    Raises:
        ValueError: If an adapter does not exist, is built differently from the first or holds NaN or infinity, weights
            are unusable or of other adapters, a function or option does not exist, is missing or unusable, or PEFT
            cannot make an adapter like the first.

    Example:

        ```py
        >>> merge_adapters(model, ["task_000", "task_001"], [1.0, 1.0], combination_type="ties", density=0.5)
        >>> model.set_adapter("merged")
        ```
    """
    # Not at the top: the tuner imports this package.
    from ..tuner.head_config import check_choice

    check_choice("combination_type", combination_type, (*COMBINATIONS, "cat"))
    adapters = check_names(adapters, adapter_name)
    if combination_type == "cat":
        _concatenate(model, adapters, weights, adapter_name, options)
        return
    function = find_combination(combination_type)
    function.check_options(options)
    check_mergeable(model, adapters, adapter_name)
    if isinstance(weights, MergeWeights):
        check_learned(weights, adapters, combination_type)
    slots = adapter_slots(model, adapters[0])
    scalings = scalings_of(model, slots, adapters)
    merged = _merged_tensors(model, slots, scalings, adapters, weights, function, options)
    with adapter_replaced(model, adapter_name, active_instead=adapters[0]):
        create_adapter(model, adapters, adapter_name)
        check_made(model, slots, adapter_name)
        check_constants(model, [adapters[0], adapter_name])
        own = scalings_of(model, slots, [adapter_name])
        for key, (scaling,) in own.items():
            merged[key] = merged[key] * _share(slots[key], torch.tensor(scalings[key][0] / scaling)).item()
        set_adapter_tensors(model, adapter_name, merged)
        if isinstance(weights, MergeWeights):
            keep_weights(model, adapter_name, weights)
    if not isinstance(weights, MergeWeights):
        mixture = function.check_weights(weights, len(adapters))
        warn_of_replacing_modules(model, slots, mixture, function, options, stacklevel=3)


def _concatenate(
    model: AdaptedModel,
    adapters: list[str],
    weights: Optional[Union[Sequence[float], MergeWeights]],
    adapter_name: str,
    options: Mapping[str, Any],
) -> None:
    """Merges LoRA adapters by placing their factors side by side."""
    # It has the weights of a weighted sum, and no options.
    function = COMBINATIONS["linear"]
    for name in options:
        raise ValueError(f"combination_type='cat' has no option {name!r}; it has none.")
    # Learned weights are those of tensors of one shape.
    check_mergeable(model, adapters, adapter_name, side_by_side=not isinstance(weights, MergeWeights))
    parts = adapters
    if isinstance(weights, MergeWeights):
        check_learned(weights, adapters, "cat")
    else:
        mixture = function.check_weights(weights, len(adapters))
        # Those of weight 0 add nothing, and take no rank.
        parts = [name for name, weight in zip(adapters, mixture.tolist()) if weight]
    slots, tensors = adapter_slots(model, adapters[0]), tensors_of_adapters(model, parts)
    with adapter_replaced(model, adapter_name, active_instead=adapters[0]), torch.no_grad():
        create_concatenated(model, adapters, parts, adapter_name)
        check_made(model, slots, adapter_name)
        scalings = scalings_over(model, slots, parts, adapter_name)
        if isinstance(weights, MergeWeights):
            merged = weights.of_tensors(slots, tensors[0], scalings).combine(tensors)
        else:
            merged = _side_by_side(slots, tensors, mixture[mixture != 0], scalings)
        set_adapter_tensors(model, adapter_name, merged)
        if isinstance(weights, MergeWeights):
            keep_weights(model, adapter_name, weights)
    if not isinstance(weights, MergeWeights):
        warn_of_replacing_modules(model, slots, mixture, function, options, stacklevel=4)


def _side_by_side(
    slots: Mapping[str, Slot], adapters: Sequence[AdapterTensors], weights: Tensor, scalings: Mapping[str, Tensor]
) -> AdapterTensors:
    """LoRA's factors one behind the other, and the weighted sum of all else; arguments as of `combine`."""
    rest = {key: slot for key, slot in slots.items() if slot.kind not in ("factor_a", "factor_b")}
    merged = combine(rest, adapters, weights, scalings=scalings)
    for key in slots.keys() - rest.keys():
        own = [tensors[key] for tensors in adapters]
        if slots[key].kind == "factor_a":
            # All of a weight on one side, so that no root is rounded.
            own = [share * tensor for share, tensor in zip(weights * scalings[key].to(weights), own)]
        merged[key] = torch.cat(own, dim=0 if slots[key].kind == "factor_a" else 1)
    return merged


def keep_weights(model: AdaptedModel, adapter_name: str, weights: MergeWeights) -> None:
    """Writes merge weights into the configuration of the adapter that they made, if it has a field for them.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapter_name (`str`): Name of the merged adapter.
        weights (`MergeWeights`): The weights.
    """
    config = model.peft_config[adapter_name]
    if hasattr(config, "merge_weights"):
        config.merge_weights = weights.as_dict()


def check_learned(weights: MergeWeights, adapters: Sequence[str], combination_type: str) -> None:
    """Raises a `ValueError` unless merge weights are of these adapters and the merge is their weighted sum."""
    if combination_type != weights.combination_type:
        raise ValueError(
            f"The merge weights are those of combination_type={weights.combination_type!r}, got "
            f"{combination_type!r}; choose theirs, or give one weight an adapter."
        )
    if list(weights.adapters) != list(adapters):
        raise ValueError(
            f"The merge weights are of the adapters {', '.join(weights.adapters)}, in this order, got "
            f"{', '.join(adapters)}."
        )


def merge_into(
    model: AdaptedModel,
    merged: str,
    adapter: str,
    count: int,
    combination_type: str = "linear",
    first: Optional[str] = None,
    **options: Any,
) -> None:
    """
    Takes one more adapter into a merged one, which becomes what a merge of all adapters at once would be.

    Of the adapters merged before none is needed any more, but for `"anchored_mean"` the first. Time and memory do not
    depend on how many there were. The merged adapter is changed in place: it stays active, if it was, and what is
    trained stays so.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        merged (`str`): Name of the adapter merged so far, by the same function, with equal weights.
        adapter (`str`): Name of the adapter to take in; left as it is.
        count (`int`): How many adapters `merged` was made of.
        combination_type (`str`):
            `"linear"` (their mean), `"uniform"`, `"anchored_mean"` or `"exponential_moving_average"`.
        first (`Optional[str]`): Name of the first adapter that was merged, for `"anchored_mean"`.
        options: Keyword-only arguments of that function, as `decay`.

    Raises:
        ValueError: If the function needs all adapters at once, or the first one and it is not given, or an adapter
            does not exist, is built differently, or holds NaN or infinity.
    """
    function = check_runs(combination_type)
    function.check_options(options)
    if count < 1:
        raise ValueError(f"count={count} must be at least 1: the number of adapters that {merged!r} was made of.")
    if function.running_first and first is None:
        raise ValueError(f"combination_type={combination_type!r} needs the first adapter too; give first=.")
    if adapter == merged:
        raise ValueError(f"Adapter {merged!r} cannot be merged into itself; name the adapter to take in.")
    adapters = [merged, *([first] if function.running_first else []), adapter]
    check_mergeable(model, adapters)
    arguments = function.running(count)
    function = find_combination(arguments.pop("combination_type", combination_type))
    weights = arguments.pop("weights", None)
    slots = adapter_slots(model, merged)
    scalings = scalings_of(model, slots, adapters)
    tensors = _merged_tensors(model, slots, scalings, adapters, weights, function, {**options, **arguments})
    if len(adapters) > 2:
        # What was merged so far has counted the first one's batches already.
        for key, tensor in adapter_tensors(model, first).items():
            if slots[key].kind == "statistic" and not tensor.is_floating_point():
                tensors[key] -= tensor
    tuner = tuner_of(model)
    if hasattr(tuner, "append_heads"):
        tuner.append_heads(merged, adapter)
    set_adapter_tensors(model, merged, tensors)


@torch.no_grad()
def _merged_tensors(
    model: AdaptedModel,
    slots: Mapping[str, Slot],
    scalings: Mapping[str, list[float]],
    adapters: Sequence[str],
    weights: Optional[Union[Sequence[float], MergeWeights]],
    function: MergeFunction,
    options: Mapping[str, Any],
) -> AdapterTensors:
    tensors = tensors_of_adapters(model, adapters)
    if isinstance(weights, MergeWeights):
        return weights.of_tensors(slots, tensors[0], _ratios(scalings)).combine(tensors)
    mixture = function.check_weights(weights, len(adapters))
    return combine(slots, tensors, mixture, function, options, _ratios(scalings))


def combine(
    slots: Mapping[str, Slot],
    adapters: Sequence[AdapterTensors],
    weights: Tensor,
    function: Union[str, MergeFunction] = "linear",
    options: Optional[Mapping[str, Any]] = None,
    scalings: Optional[Mapping[str, Tensor]] = None,
) -> AdapterTensors:
    """
    Merges adapters' tensors, each by its kind; differentiable in `weights` if the function is.

    Args:
        slots (`Mapping[str, Slot]`): The tensors to merge, by key.
        adapters (`Sequence[AdapterTensors]`): The tensors of each adapter.
        weights (`Tensor`): A weight for each adapter, `(T,)`.
        function (`Union[str, MergeFunction]`): A merge function of `COMBINATIONS`, or its name.
        options (`Optional[Mapping[str, Any]]`): Its options.
        scalings (`Optional[Mapping[str, Tensor]]`):
            For tensors that are multiplied by an adapter's scaling (LoRA), by key: each adapter's scaling over that of
            the merged adapter, `(T,)`; 1 if not given.

    Returns:
        `AdapterTensors`: The merged tensors by key.

    Raises:
        ValueError: If the function does not exist, constants differ, or scalings differ for a function of measurements
            that belong to them.
    """
    function = find_combination(function) if isinstance(function, str) else function
    options = dict(options or {})
    merged: AdapterTensors = {}
    for (kind, ratios), keys in _groups(slots, scalings or {}).items():
        group = [{key: tensors[key] for key in keys} for tensors in adapters]
        if kind == "statistic":
            proportions = function.effective_weights(weights, options)
            merged.update({key: average_statistics([own[key] for own in group], proportions) for key in keys})
        elif kind == "constant":
            merged.update({key: _same(key, [own[key] for own in group]) for key in keys})
        else:
            merged.update(_combine_parameters(slots[keys[0]], group, weights, function, options, ratios))
    return {key: merged[key] for key in slots}


def _groups(slots: Mapping[str, Slot], scalings: Mapping[str, Tensor]) -> dict[tuple, list[str]]:
    """Keys of the tensors that are merged with the same weights."""
    groups: dict[tuple, list[str]] = {}
    for key, slot in slots.items():
        ratios = tuple(scalings[key].tolist()) if key in scalings and slot.kind in SCALED else ()
        groups.setdefault((slot.kind, ratios), []).append(key)
    return groups


def _combine_parameters(
    slot: Slot,
    adapters: Sequence[AdapterTensors],
    weights: Tensor,
    function: MergeFunction,
    options: Mapping[str, Any],
    ratios: tuple[float, ...],
) -> AdapterTensors:
    ratio = torch.tensor(ratios or [1.0] * len(adapters), dtype=weights.dtype, device=weights.device)
    starts_at_base = options.get("base") is not None
    of_tensors = "base" if starts_at_base else function.per_adapter
    if of_tensors is not None and (ratio != 1).any():
        raise ValueError(
            f"The adapters have different scalings in {slot.layer!r}; what {of_tensors!r} holds belongs to their "
            "tensors as they are. Give all adapters the same lora_alpha and use_rslora."
        )
    if not function.averages:
        # A factor takes the root where it started at zero; from `base` on it moves as other tensors do.
        return function(adapters, weights if starts_at_base else _share(slot, weights * ratio), **options)
    # Proportions cannot carry a scale: the tensors have to.
    if (ratio != 1).any():
        shares = _share(slot, ratio).tolist()
        adapters = [{key: share * own[key] for key in own} for share, own in zip(shares, adapters)]
    return function(adapters, weights, **options)


def _share(slot: Slot, weights: Tensor) -> Tensor:
    """What a tensor takes of a weight on its layer's output: a factor takes the root, one of them the sign."""
    if slot.kind not in ("factor_a", "factor_b"):
        return weights
    roots = weights.abs().sqrt()
    return roots * torch.where(weights < 0, -1.0, 1.0) if slot.kind == "factor_a" else roots


def _same(key: str, tensors: Sequence[Tensor]) -> Tensor:
    if not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
        raise ValueError(f"The adapters differ in {key!r}, which is a constant and cannot be merged.")
    return tensors[0].clone()


def _ratios(scalings: Mapping[str, list[float]]) -> dict[str, Tensor]:
    """Scalings over those of the first adapter."""
    return {key: torch.tensor(values, dtype=torch.float64) / values[0] for key, values in scalings.items()}

"""Whether adapters of a model can be merged with each other."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import fields
from typing import Any, Optional, Union

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .adapters import (
    AdaptedModel,
    AdapterTensors,
    adapted_base,
    adapter_layers,
    adapter_slots,
    check_has_adapters,
    tensors_of_adapters,
)
from .state import tuner_of


# What may differ between adapters, as it does not change what their tensors mean.
FREE_FIELDS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    # A property of the base layer, which PEFT enters in the configuration of the first adapter only.
    "fan_in_fan_out",
}
# Of LoRA, whose scalings are taken account of.
SCALING_FIELDS = {"lora_alpha", "alpha_pattern", "use_rslora"}
# What matters only if other tensors follow from it.
TARGET_FIELDS = {
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "feedforward_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
}
# These take a part of the base weights into the adapter, so that the adapters of a model depend on one another.
BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What may differ too where LoRA's factors are placed side by side.
SIDE_BY_SIDE_FIELDS = {"r", "rank_pattern", *SCALING_FIELDS}
# Where layers with adapters keep the module that they stand in for.
BASES = ("base_layer", "original_module")


def check_names(adapters: Sequence[str], adapter_name: str) -> list[str]:
    """The adapters' names as a list.

    Args:
        adapters (`Sequence[str]`): What was given for the names of the adapters to merge.
        adapter_name (`str`): What was given for the name of the adapter to be made.

    Raises:
        ValueError: If they are no names.
    """
    names = list(adapters)
    # A string is a sequence too, of names of one letter.
    if isinstance(adapters, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapters={adapters!r} must be a list of names, as ['task_000', 'task_001'].")
    if not isinstance(adapter_name, str):
        raise ValueError(f"adapter_name={adapter_name!r} must be a name, as 'merged'.")
    return names


def check_mergeable(
    model: AdaptedModel, adapters: Sequence[str], adapter_name: Optional[str] = None, side_by_side: bool = False
) -> None:
    """Raises a `ValueError` unless the adapters exist, are built alike and can be merged into `adapter_name`.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapters (`Sequence[str]`): Names of the adapters to merge.
        adapter_name (`Optional[str]`): Name of the adapter to be made; `None` if none is.
        side_by_side (`bool`): Whether LoRA's factors are placed side by side, so that ranks may differ.
    """
    check_has_adapters(model)
    if not adapters:
        raise ValueError("No adapters to merge; name at least one.")
    if adapter_name in adapters:
        raise ValueError(f"Adapter {adapter_name!r} cannot be merged into itself; choose another adapter_name.")
    # PEFT keeps adapters in these modules by their names.
    if adapter_name is not None and (
        not adapter_name or "." in adapter_name or hasattr(nn.ParameterDict(), adapter_name)
    ):
        raise ValueError(
            f"Adapter name {adapter_name!r} must not be empty, hold a dot or be the name of an attribute of "
            "torch.nn.ParameterDict; choose another."
        )
    if adapter_name is not None and adapter_name not in model.peft_config:
        check_name_is_free(adapted_base(model), adapter_name)
    for name in adapters:
        if name not in model.peft_config:
            raise ValueError(f"Adapter {name!r} does not exist; there are {', '.join(model.peft_config)}.")
    folded = {name for _, layer in adapter_layers(model) for name in layer.merged_adapters}
    if folded:
        raise ValueError(
            f"Adapters {', '.join(sorted(folded))} are merged into the base weights; call `unmerge_adapter` first."
        )
    tuner = tuner_of(model)
    ignored = SIDE_BY_SIDE_FIELDS if side_by_side else frozenset()
    if hasattr(tuner, "check_mergeable"):
        tuner.check_mergeable(adapters, adapter_name, ignored)
    else:
        _check_configs(model, adapters, ignored)
    _check_tensors(model, adapters, ignored)
    check_constants(model, adapters)


def check_fillable(model: AdaptedModel, adapters: Sequence[str], adapter_name: str) -> None:
    """Raises a `ValueError` unless an adapter that exists is built as a new one that `merge_adapters` makes of others.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters, of which these can be merged.
        adapters (`Sequence[str]`): Names of the adapters to merge.
        adapter_name (`str`): Name of the adapter to be filled.
    """
    tuner = tuner_of(model)
    if hasattr(tuner, "check_heads"):
        tuner.check_heads(adapters, adapter_name)
    else:
        # Not the rank: side by side it is another one, and shapes are compared anyway.
        _check_configs(model, [adapters[0], adapter_name], ignored={"r"})
    check_constants(model, [adapters[0], adapter_name])


def check_name_is_free(base: nn.Module, name: str) -> None:
    """Raises a `ValueError` if a part of the base model or of its adapters has the name.

    PEFT finds an adapter's tensors by its name between dots, and leaves those of other names out of what it saves.

    Args:
        base (`nn.Module`): A base model, with or without tuner layers in it.
        name (`str`): Name of an adapter to be made.
    """
    taken = {"base_model", "base_layer", "model", "modules_to_save", "original_module", "weight", "bias"}
    taken.update(nn.BatchNorm2d(1).state_dict())
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = {key for key, module in base.named_modules() if isinstance(module, kinds)}
    for key in base.state_dict():
        path = key.split(".")
        for place in range(len(path) - 1):
            inner = ".".join(path[: place + 2])
            if ".".join(path[: place + 1]) in layers and inner not in layers and path[place + 1] not in BASES:
                # Behind a container of a layer with adapters stands an adapter's own name, which is no obstacle.
                path[place + 2 : place + 3] = []
                break
        taken.update(path)
    if name in taken:
        raise ValueError(
            f"Adapter name {name!r} is the name of a part of the model and its tensors would be mixed up when saved; "
            "choose another, as 'task_000'."
        )


def check_constants(model: AdaptedModel, adapters: Sequence[str]) -> None:
    """Raises a `ValueError` if layers keep other constants for the adapters, as the places of sparse weights."""
    for _, layer in adapter_layers(model):
        if not isinstance(layer, BaseTunerLayer):
            continue
        for attribute in layer.other_param_names:
            container = getattr(layer, attribute, None)
            if not hasattr(container, "keys"):
                continue
            values = {name: container[name] for name in adapters if name in container}
            first = next(iter(values.values()), None)
            for name, value in values.items():
                if isinstance(value, Tensor) and not torch.equal(value, first):
                    raise ValueError(
                        f"Adapters {adapters[0]!r} and {name!r} differ in their constants {attribute}, with which "
                        "their tensors cannot be merged; give all the same random seed."
                    )


def changes_base(init_lora_weights: Any) -> bool:
    """Whether LoRA that starts in this way takes a part of the base weights."""
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(BASE_CHANGING_INIT)


def _check_configs(model: AdaptedModel, adapters: Sequence[str], ignored: Set[str] = frozenset()) -> None:
    configs = [model.peft_config[name] for name in adapters]
    for name, config in zip(adapters, configs):
        kind = config.peft_type.value
        if kind == "ADALORA" or config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(f"Adapter {name!r} is of peft_type {kind!r}, which cannot be merged.")
        if config.peft_type is not configs[0].peft_type:
            _raise_differing(adapters[0], name, "peft_type", configs[0].peft_type.value, kind)
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"Adapter {name!r} has bias={config.bias!r}: it trains biases of the base model, of which there is "
                "one only. Train adapters to be merged with bias='none'."
            )
        start = getattr(config, "init_lora_weights", None)
        if changes_base(start):
            raise ValueError(
                f"Adapter {name!r} has init_lora_weights={start!r}, which changes the base weights. Convert it to "
                "LoRA when saving it (`path_initial_model_for_weight_conversion`) and load that."
            )
        if getattr(config, "kasa_config", None) is not None:
            raise ValueError(
                f"Adapter {name!r} has a kasa_config, with which each new adapter changes the base weights under all "
                "others, so that none can be made of them."
            )
        if getattr(config, "layer_replication", None) is not None:
            raise ValueError(
                f"Adapter {name!r} has layer_replication={config.layer_replication!r}: layers are replicated again "
                "with each new adapter, and those of this one would be lost. It cannot be merged."
            )
        for field in _differing_fields(configs[0], config):
            if field not in TARGET_FIELDS | ignored:
                _raise_differing(adapters[0], name, field, getattr(configs[0], field), getattr(config, field))


def _differing_fields(first: PeftConfig, second: PeftConfig) -> list[str]:
    free = FREE_FIELDS | SCALING_FIELDS if isinstance(first, LoraConfig) else FREE_FIELDS
    names = [field.name for field in fields(first) if field.name not in free]
    # What matters in training only.
    names = [name for name in names if "dropout" not in name and not name.startswith("init_")]
    return [name for name in names if _unordered(getattr(first, name)) != _unordered(getattr(second, name))]


def _unordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (list, set, tuple)) else value


def _check_tensors(model: AdaptedModel, adapters: Sequence[str], ignored: Set[str] = frozenset()) -> None:
    tensors = tensors_of_adapters(model, adapters)
    if not tensors[0]:
        raise ValueError(f"Adapter {adapters[0]!r} has no tensors that could be merged.")
    compared = [_of_first_rank(model, name, own) for name, own in zip(adapters, tensors)] if ignored else tensors
    first = model.peft_config[adapters[0]]
    for name, own in zip(adapters[1:], compared[1:]):
        if _shapes(own) == _shapes(compared[0]):
            continue
        config = model.peft_config[name]
        for field in _differing_fields(first, config):
            if field in TARGET_FIELDS - ignored:
                _raise_differing(adapters[0], name, field, getattr(first, field), getattr(config, field))
    check_shapes(compared, adapters)
    check_finite(tensors, adapters)


def _of_first_rank(model: AdaptedModel, adapter: str, tensors: AdapterTensors) -> AdapterTensors:
    """An adapter's tensors, of LoRA's factors a row or column alone, whatever the rank."""
    ranks = {"factor_a": 0, "factor_b": 1}
    kinds = {key: slot.kind for key, slot in adapter_slots(model, adapter).items()}
    return {
        key: tensor.select(ranks[kinds[key]], 0) if kinds[key] in ranks else tensor for key, tensor in tensors.items()
    }


def check_finite(adapters: Sequence[AdapterTensors], names: Sequence[Union[str, int]]) -> None:
    """Raises a `ValueError` if a tensor holds NaN or infinity, which a merge would spread.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors.
        names (`Sequence[Union[str, int]]`): What to call the adapters.
    """
    # All are asked before the first answer is waited for: a GPU goes through them without a pause.
    answers = [
        (name, key, tensor.detach().isfinite().all())
        for name, own in zip(names, adapters)
        for key, tensor in own.items()
        if tensor.is_floating_point() and not tensor.is_meta
    ]
    for name, key, answer in answers:
        if not answer.item():
            raise ValueError(f"Adapter {name!r} has NaN or infinity in {key!r}; leave it out, or train it again.")


def check_shapes(adapters: Sequence[AdapterTensors], names: Sequence[Union[str, int]]) -> None:
    """Raises a `ValueError` unless the tensors of all adapters have the names and shapes of the first one's.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors; at least one adapter.
        names (`Sequence[Union[str, int]]`): What to call the adapters.
    """
    shapes = [_shapes(own) for own in adapters]
    for name, own in zip(names[1:], shapes[1:]):
        for key in {**shapes[0], **own}:
            if shapes[0].get(key) != own.get(key):
                _raise_differing(names[0], name, f"the shape of {key}", shapes[0].get(key), own.get(key))


def _shapes(tensors: AdapterTensors) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _raise_differing(
    first: Union[str, int], second: Union[str, int], field: str, first_value: Any, second_value: Any
) -> None:
    remedy = "give both the same"
    if field in ("r", "rank_pattern"):
        # Adapters that are trained cannot be given another.
        remedy = "train both with the same, or merge LoRA with weights of your own by 'cat', or by PEFT's own 'svd'"
    raise ValueError(
        f"Adapters {first!r} and {second!r} differ in {field} ({first_value!r} and {second_value!r}); {remedy}."
    )

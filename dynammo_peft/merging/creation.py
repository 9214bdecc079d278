"""The adapter that a merge fills."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel

from .adapters import AdaptedModel, Slot, adapted_base, adapter_layers, adapter_slots, adapter_tensors
from .state import random_state_kept, tuner_of


def create_adapter(model: AdaptedModel, adapters: list[str], adapter_name: str, **changes: Any) -> None:
    """Adds an adapter with the first one's configuration, in the mode and precision that its layers have.

    What PEFT draws for it, which a merge writes over, is not missing outside.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapters (`list[str]`): Names of the adapters that are merged; DynaMMo's bring their heads.
        adapter_name (`str`): Name of the new adapter, of which there is none yet.
        changes: Fields in which its configuration differs from the first adapter's.
    """
    with random_state_kept(model):
        _create_adapter(model, adapters, adapter_name, **changes)


def _create_adapter(model: AdaptedModel, adapters: list[str], adapter_name: str, **changes: Any) -> None:
    tuner = tuner_of(model)
    if hasattr(tuner, "create_merged_adapter"):
        tuner.create_merged_adapter(adapters, adapter_name, **changes)
        return
    # Not `PeftModel.add_adapter`, which adds to the configuration's `modules_to_save` for some task types.
    config = copy.deepcopy(tuner.peft_config[adapters[0]])
    for field, value in {**changes, "inference_mode": True}.items():
        setattr(config, field, value)
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    like = adapter_tensors(model, adapters[0])
    for key, tensor in adapter_tensors(model, adapter_name).items():
        if key in like:
            # PEFT makes them in the base model's precision.
            tensor.data = tensor.data.to(like[key].dtype)
    for _, layer in adapter_layers(model):
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            container = getattr(layer, name, None)
            if isinstance(container, torch.nn.ModuleDict) and adapter_name in container:
                # PEFT's new modules are in training mode, also in a model in evaluation mode.
                container[adapter_name].train(layer.training)


def create_concatenated(model: AdaptedModel, adapters: list[str], parts: list[str], adapter_name: str) -> None:
    """Adds an adapter with room for LoRA's factors of several side by side, and a scaling of 1.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapters (`list[str]`): Names of the adapters that are merged.
        parts (`list[str]`): Those of them for whose factors there shall be room.
        adapter_name (`str`): Name of the new adapter, of which there is none yet.

    Raises:
        ValueError: If the adapters are no LoRA, or of a kind whose update is more than the product of two factors.
    """
    tuner = tuner_of(model)
    first = tuner.peft_config[adapters[0]]
    if not isinstance(tuner, LoraModel):
        raise ValueError(
            f"combination_type='cat' places the factors of LoRA side by side, and adapter {adapters[0]!r} is of "
            f"peft_type {first.peft_type.value!r}; choose 'linear'."
        )
    for field in ("use_dora", "use_bdlora", "monteclora_config", "target_parameters"):
        if value := getattr(first, field):
            raise ValueError(
                f"combination_type='cat' sums what two factors of LoRA add, and adapter {adapters[0]!r} has "
                f"{field}={value!r}, with which that is not all; choose 'uniform'."
            )
    for name, layer in adapter_layers(model):
        if adapters[0] in getattr(layer, "lora_A", {}) and getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise ValueError(
                f"combination_type='cat' cannot place the factors of {name!r} side by side, a grouped convolution; "
                "choose 'uniform'."
            )
    rank, ranks = _summed_ranks(model, parts)
    changes = {"r": rank, "rank_pattern": ranks, "lora_alpha": rank, "alpha_pattern": dict(ranks), "use_rslora": False}
    create_adapter(model, adapters, adapter_name, **changes)


def _summed_ranks(model: AdaptedModel, parts: list[str]) -> tuple[int, dict[str, int]]:
    """The ranks of LoRA adapters together, and by name those of layers where patterns make it another."""
    rank = sum(tuner_of(model).peft_config[name].r for name in parts)
    layers = [(name, layer.r) for name, layer in adapter_layers(adapted_base(model)) if isinstance(layer, LoraLayer)]
    sums = {name: sum(ranks[part] for part in parts) for name, ranks in layers if parts[0] in ranks}
    return rank, {name: own for name, own in sums.items() if own != rank}


def check_made(model: AdaptedModel, slots: Mapping[str, Slot], adapter_name: str) -> None:
    """Raises a `ValueError` unless a new adapter has all tensors that the merged ones have."""
    made = adapter_slots(model, adapter_name)
    missing = next((key for key in slots if key not in made), None)
    if missing is not None:
        raise ValueError(
            f"PEFT makes no {missing!r} for a second adapter, as of target_modules that lie inside a module whose "
            "parameters are among target_parameters; such adapters cannot be merged. Train them with either."
        )

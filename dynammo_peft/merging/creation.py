"""The adapter that a merge fills."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from peft.tuners.lora import LoraModel

from .adapters import AdaptedModel, Slot, adapter_layers, adapter_slots, adapter_tensors
from .state import tuner_of


def create_adapter(model: AdaptedModel, adapters: list[str], adapter_name: str) -> None:
    """Adds an adapter with the first one's configuration, in the mode of the layers it is in.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapters (`list[str]`): Names of the adapters that are merged; DynaMMo's bring their heads.
        adapter_name (`str`): Name of the new adapter, of which there is none yet.
    """
    tuner = tuner_of(model)
    if hasattr(tuner, "create_merged_adapter"):
        tuner.create_merged_adapter(adapters, adapter_name)
        return
    # Not `PeftModel.add_adapter`, which adds to the configuration's `modules_to_save` for some task types.
    config = copy.deepcopy(tuner.peft_config[adapters[0]])
    config.inference_mode = True
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    half = any(
        tensor.dtype in (torch.float16, torch.bfloat16) for tensor in adapter_tensors(model, adapters[0]).values()
    )
    tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=not half)
    for _, layer in adapter_layers(model):
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            container = getattr(layer, name, None)
            if isinstance(container, torch.nn.ModuleDict) and adapter_name in container:
                # PEFT's new modules are in training mode, also in a model in evaluation mode.
                container[adapter_name].train(layer.training)


def create_concatenated(
    model: AdaptedModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Adds an adapter with LoRA's factors of others side by side, whose update is the weighted sum of theirs.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapters (`Sequence[str]`): Names of the adapters that are merged.
        weights (`Sequence[float]`): A weight for each.
        adapter_name (`str`): Name of the new adapter, of which there is none yet.

    Raises:
        ValueError: If the adapters are no LoRA.
    """
    tuner = tuner_of(model)
    if hasattr(tuner, "create_concatenated_adapter"):
        tuner.create_concatenated_adapter(adapters, weights, adapter_name)
        return
    if not isinstance(tuner, LoraModel):
        kind = tuner.peft_config[adapters[0]].peft_type.value
        raise ValueError(
            f"combination_type='cat' places the factors of LoRA side by side, and adapter {adapters[0]!r} is of "
            f"peft_type {kind!r}; choose 'linear'."
        )
    tuner.add_weighted_adapter(list(adapters), list(weights), adapter_name, combination_type="cat")


def check_made(model: AdaptedModel, slots: Mapping[str, Slot], adapter_name: str) -> None:
    """Raises a `ValueError` unless a new adapter has all tensors that the merged ones have."""
    made = adapter_slots(model, adapter_name)
    missing = next((key for key in slots if key not in made), None)
    if missing is not None:
        raise ValueError(
            f"PEFT makes no {missing!r} for a second adapter, as of target_modules that lie inside a module whose "
            "parameters are among target_parameters; such adapters cannot be merged. Train them with either."
        )

"""A method between two tasks, as parts of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.config import PeftConfigMixin
from torch import Tensor, nn

from ..data import ClassIncrementalScenario
from ..methods import Method


# What the names of parts with adapters begin with.
ADAPTER = "adapter "


def adapter_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """An adapter's tensors, its heads and BatchNorm statistics among them."""
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def method_parts(method: Method) -> dict[str, Any]:
    """What a method knows, but for adapters."""
    values, tensors = method.state()
    parts: dict[str, Any] = {"method": {"values": values, "tensors": tensors}}
    if getattr(method.arguments, "train_backbone", False):
        parts["backbone"] = _backbone_state(method.model)
    return parts


def adapter_part(model: PeftModel, name: str) -> dict[str, Any]:
    """An adapter and its configuration."""
    return {"config": _plain_config(model.peft_config[name]), "tensors": adapter_state(model, name)}


def changing_adapters(method: Method) -> set[str]:
    """Adapters that learning a task changes: the newest, and those that are merged or whose heads are trained.

    All others stay as they are, so that a checkpoint need not look at them, however many there are.
    """
    if not isinstance(method.model, PeftModel):
        return set()
    return {*method.adapters[-1:], *method.inference_adapters} & set(method.model.peft_config)


def restore_method(method: Method, parts: Mapping[str, Any], scenario: ClassIncrementalScenario) -> None:
    """The way back from `method_parts` and `adapter_part`, for a method that has begun with `scenario`."""
    for key, part in parts.items():
        if key.startswith(ADAPTER):
            _restore_adapter(method, key.removeprefix(ADAPTER), part)
    if "backbone" in parts:
        with torch.no_grad():
            for key, tensor in _backbone_state(method.model).items():
                tensor.copy_(parts["backbone"][key])
    method.restore(**parts["method"], scenario=scenario)
    if isinstance(method.model, PeftModel):
        # The task to come makes its own adapter trainable.
        method.model.set_adapter(method.inference_adapters[-1], inference_mode=True)


def _restore_adapter(method: Method, name: str, part: Mapping[str, Any]) -> None:
    config = PeftConfigMixin.from_peft_type(**json.loads(part["config"]))
    if not isinstance(method.model, PeftModel):
        method.model = get_peft_model(method.model, config, name)
    elif name not in method.model.peft_config:
        method.model.add_adapter(name, config)
    elif _plain_config(method.model.peft_config[name]) != part["config"]:
        # One that learning has begun with: since then it was merged with more.
        method.model.set_adapter(next(other for other in method.model.peft_config if other != name))
        method.model.delete_adapter(name)
        method.model.add_adapter(name, config)
    set_peft_model_state_dict(method.model, part["tensors"], adapter_name=name)


def _plain_config(config: PeftConfig) -> str:
    """As JSON."""
    return json.dumps(
        {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    )


def _backbone_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the base model, without those of adapters and heads."""
    own = model.get_base_model().state_dict() if isinstance(model, PeftModel) else model.state_dict()
    if not isinstance(model, PeftModel):
        return {name: tensor for name, tensor in own.items()}
    prefix = model.base_model.prefix
    return {name.replace("base_layer.", ""): tensor for name, tensor in own.items() if prefix not in name}

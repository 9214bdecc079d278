"""Training and evaluation mode of the parts of a model, and adapters out of the way for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def freeze_mode(module: nn.Module, backbone_trained: bool = False) -> None:
    """Puts every part that trains no parameters into evaluation mode.

    What has none, as dropout and stochastic depth, is a part of the backbone, or of the adapter of its name.

    Args:
        module (`nn.Module`): A model in training mode, or a part of it.
        backbone_trained (`bool`): Whether the backbone is trained, with its dropout.
    """
    flags = [parameter.requires_grad for parameter in module.parameters()]
    if any(flags):
        for name, child in module.named_children():
            if isinstance(module, BaseTunerLayer) and name != "base_layer":
                _freeze_adapters(module, child)
            else:
                freeze_mode(child, backbone_trained)
    elif flags or not backbone_trained:
        module.eval()
        for part in module.modules():
            # transformers checkpoints activations in training mode only; dropout has a mode of its own.
            if getattr(part, "gradient_checkpointing", False):
                part.training = True


def _freeze_adapters(layer: BaseTunerLayer, child: nn.Module) -> None:
    """Puts what a child of a tuner layer holds of adapters that are not trained into evaluation mode."""
    if any(True for _ in child.parameters()) or not isinstance(child, nn.ModuleDict):
        freeze_mode(child, True)
        return
    for name, part in child.items():
        own = (getattr(layer, container) for container in layer.adapter_layer_names)
        own = (container[name] for container in own if name in container)
        tensors = (part.parameters() if isinstance(part, nn.Module) else [part] for part in own)
        if not any(tensor.requires_grad for some in tensors for tensor in some):
            part.eval()


@contextmanager
def adapters_bypassed(model: nn.Module) -> Iterator[None]:
    """Makes all tuner layers pass their input on to what they wrap; gradients and active adapters stay as they are."""
    with _set_on_layers(model, "_disable_adapters", True):
        yield


@contextmanager
def adapter_instead(model: nn.Module, name: str) -> Iterator[None]:
    """Computes with another adapter for a while; what is trained, and in which mode, stays as it is."""
    with _set_on_layers(model, "_active_adapter", [name]):
        yield


@contextmanager
def _set_on_layers(model: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [getattr(layer, attribute) for layer in layers]
    for layer in layers:
        setattr(layer, attribute, value)
    try:
        yield
    finally:
        for layer, old in zip(layers, before):
            setattr(layer, attribute, old)

"""Training and evaluation mode of the parts of a model, and adapters out of the way for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def freeze_mode(module: nn.Module) -> None:
    """Puts every part that has parameters and trains none of them into evaluation mode."""
    flags = [parameter.requires_grad for parameter in module.parameters()]
    if flags and not any(flags):
        module.eval()
        for part in module.modules():
            # transformers checkpoints activations in training mode only; dropout has a mode of its own.
            if getattr(part, "gradient_checkpointing", False):
                part.training = True
        return
    for child in module.children():
        freeze_mode(child)


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

"""A model's adapters for a while in another state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .adapters import AdaptedModel, adapter_layers


def tuner_of(model: AdaptedModel) -> BaseTuner:
    """The tuner inside a model with adapters."""
    return model if isinstance(model, BaseTuner) else model.base_model


@contextmanager
def random_state_kept(module: nn.Module) -> Iterator[list[torch.Generator]]:
    """The random state of the CPU and the module's devices is afterwards what it was; yields their generators."""
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield [torch.default_generator, *(torch.cuda.default_generators[device.index] for device in devices)]


@contextmanager
def state_kept(model: AdaptedModel) -> Iterator[None]:
    """Puts back which adapters are active, what is trained, and what is in training mode; what is new is frozen."""
    tuner = tuner_of(model)
    active = tuner.active_adapter
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        # An adapter that becomes active is put into training mode.
        modes = {**{module: module.training for module in model.modules()}, **modes}
        if tuner.active_adapter != active:
            tuner.set_adapter(active)
        for parameter in model.parameters():
            parameter.requires_grad = trained.get(parameter, False)
        for module, training in modes.items():
            module.training = training


@contextmanager
def adapter_used(model: AdaptedModel, adapter: str) -> Iterator[None]:
    """Makes one adapter active, in evaluation mode.

    Raises:
        ValueError: If adapters are merged into the base weights.
    """
    tuner = tuner_of(model)
    layers = [layer for _, layer in adapter_layers(model) if isinstance(layer, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("Adapters are merged into the base weights; call `unmerge_adapter` first.")
    disabled = any(layer.disable_adapters for layer in layers)
    with state_kept(model):
        if disabled:
            tuner.enable_adapter_layers()
        tuner.set_adapter(adapter, inference_mode=True)
        model.eval()
        try:
            yield
        finally:
            if disabled:
                tuner.disable_adapter_layers()


@contextmanager
def adapter_replaced(model: AdaptedModel, adapter: str, active_instead: str) -> Iterator[None]:
    """Makes room for a new adapter of a name; if it cannot be made, the old one is there again.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapter (`str`): Name of an adapter that may exist.
        active_instead (`str`): Name of an adapter that may be active while there is none of that name.
    """
    tuner = tuner_of(model)
    with state_kept(model):
        entries = _entries(tuner, adapter)
        if adapter in tuner.peft_config:
            _remove(tuner, adapter, active_instead)
        try:
            yield
        except BaseException:
            tuner.peft_config.setdefault(adapter, tuner.peft_config[active_instead])
            _remove(tuner, adapter, active_instead)
            for container, entry in entries:
                _put(container, adapter, entry)
            raise


def _remove(tuner: BaseTuner, adapter: str, active_instead: str) -> None:
    if adapter in tuner.active_adapters:
        # Otherwise PEFT chooses one itself, and warns of that.
        tuner.set_adapter(active_instead, inference_mode=True)
    tuner.delete_adapter(adapter)


def _entries(tuner: BaseTuner, adapter: str) -> list[tuple[Any, Any]]:
    """What tuner and layers hold of an adapter: containers (modules, dictionaries, sets) and the entries in them."""
    entries = []
    for module in (tuner, *(layer for _, layer in adapter_layers(tuner))):
        own = [value for name, value in vars(module).items() if name not in ("_modules", "_parameters", "_buffers")]
        for container in (*own, *module.children()):
            if isinstance(container, set) and adapter in container:
                entries.append((container, adapter))
            elif hasattr(container, "keys") and adapter in container:
                entries.append((container, container[adapter]))
    return entries


def _put(container: Any, adapter: str, entry: Any) -> None:
    if isinstance(container, set):
        container.add(entry)
    else:
        container[adapter] = entry

"""What the layers that stand in for a module of the base model have in common."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


CANNOT_FOLD = (
    "A DynaMMo adapter is not linear and cannot be folded into the base weights. Merge adapters with each other by "
    "`add_weighted_adapter`, and save the result by `save_pretrained`."
)


class WrappingLayer(nn.Module, BaseTunerLayer):
    """What both layers share: they wrap a module that need not have a `weight`, and answer for it."""

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter: Union[str, list[str]] = adapter_name
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            # The base model may look into its blocks: SwinEncoder reads `stage.downsample`.
            return getattr(super().__getattr__("base_layer"), name)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[Optional[torch.device], Optional[torch.dtype]]:
        for tensor in base_layer.parameters():
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
        return None, None

    def _own_adapters(self, containers: nn.ModuleDict) -> list[str]:
        """The active adapters that this layer has."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in containers]

    def containers_of(self, adapter_name: str) -> list[nn.ModuleDict]:
        """The containers that hold modules of an adapter."""
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        return [entries for entries in containers if isinstance(entries, nn.ModuleDict) and adapter_name in entries]

    def _place(self, adapter_name: str, inference_mode: bool) -> None:
        """Moves a new adapter to the wrapped module's device and into its mode; only an active one is trained."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        for container in self.containers_of(adapter_name):
            container[adapter_name].train(self.base_layer.training)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        raise NotImplementedError(CANNOT_FOLD)

    def unmerge(self) -> None:
        raise NotImplementedError("A DynaMMo adapter is never folded into the base weights; there is nothing to undo.")

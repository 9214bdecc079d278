"""Features of several layers: block outputs, averaged over the image, on their way to the heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architectures import Site
from .forward_state import ForwardState


class FeatureTap:
    """Keeps the pooled output of a block until the heads take it.

    A copy of the model copies the tap and the head's reference to it.

    Args:
        name (`str`): The block's name in the base model.
        block (`nn.Module`): Its output is a map `(B, C, H, W)` or tokens `(B, L, C)`, or begins with one.
        site (`Site`): Of which form.
    """

    def __init__(self, name: str, block: nn.Module, site: Site) -> None:
        self.name, self.site = name, site
        self.state = ForwardState()
        block.register_forward_hook(self)

    def __call__(self, block: nn.Module, args: tuple, output: Any) -> None:
        hidden_states = output if isinstance(output, Tensor) else output[0]
        if self.site.layout == "map":
            pooled = hidden_states.mean(dim=(2, 3), dtype=torch.float32)
        else:
            pooled = hidden_states[:, self.site.prefix :].mean(dim=1, dtype=torch.float32)
        # Layers differ in scale by orders of magnitude.
        self.state.pooled = F.layer_norm(pooled, pooled.shape[1:])

    @staticmethod
    def all_of(model: nn.Module) -> Iterator[tuple[dict[int, Any], int, FeatureTap]]:
        """The hooks, key and tap of each place in a model where there is one."""
        for module in model.modules():
            hooks = module._forward_hooks
            for key, hook in list(hooks.items()):
                if isinstance(hook, FeatureTap):
                    yield hooks, key, hook

    def take(self) -> Tensor:
        """The pooled output of the current forward, `(B, C)`; it is kept no longer."""
        pooled, self.state.pooled = self.state.pooled, None
        return pooled

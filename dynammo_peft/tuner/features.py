"""Features of several layers: block outputs, averaged over the image, on their way to the heads."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architectures import Site


class FeatureTap:
    """Keeps the pooled output of a block until the heads take it.

    A copy of the model copies the tap and the head's reference to it.

    Args:
        block (`nn.Module`): Its output is a map `(B, C, H, W)` or tokens `(B, L, C)`, or begins with one.
        site (`Site`): Of which form.
    """

    def __init__(self, block: nn.Module, site: Site) -> None:
        self.site = site
        self.pooled: Optional[Tensor] = None
        self.handle = block.register_forward_hook(self)

    def __call__(self, block: nn.Module, args: tuple, output: Any) -> None:
        hidden_states = output if isinstance(output, Tensor) else output[0]
        if self.site.layout == "map":
            pooled = hidden_states.mean(dim=(2, 3), dtype=torch.float32)
        else:
            pooled = hidden_states[:, self.site.prefix :].mean(dim=1, dtype=torch.float32)
        # Layers differ in scale by orders of magnitude.
        self.pooled = F.layer_norm(pooled, pooled.shape[1:])

    def take(self) -> Tensor:
        """The pooled output of the current forward, `(B, C)`; it is kept no longer."""
        pooled, self.pooled = self.pooled, None
        return pooled

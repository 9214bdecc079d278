"""Mirror images: features averaged over an image and its reflections when it is classified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn


if TYPE_CHECKING:
    from .head_layer import DynammoHead


Flip = Literal["horizontal", "vertical"]

# Which dimension of images `(B, C, H, W)` each turns round.
DIMENSIONS: dict[str, int] = {"horizontal": 3, "vertical": 2}


def with_flips(images: Tensor, flips: Sequence[Flip]) -> Tensor:
    """Images `(B, C, H, W)` and behind them their mirror images, `((1 + F) * B, C, H, W)`."""
    return torch.cat([images, *(images.flip(DIMENSIONS[flip]) for flip in flips)])


def average_copies(features: Tensor, copies: int) -> Tensor:
    """The mean over copies of each image, `(copies * B, C)` to `(B, C)`."""
    return features.unflatten(0, (copies, -1)).mean(dim=0) if copies > 1 else features


class FlipHook:
    """Runs before the base model: lays mirror images behind the images, whose features the heads then average.

    It does so in evaluation mode, where the active adapters' configuration asks for it. A copy of the model copies the
    hook and its reference to the heads with it.
    """

    def __init__(self, model: nn.Module, head: DynammoHead) -> None:
        self.head = head
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        images = args[0] if args else kwargs.get("pixel_values")
        # What are no images is for the model to refuse.
        usable = isinstance(images, Tensor) and images.dim() == 4 and not model.training
        flips = self.head.flips_to_average() if usable else []
        self.head.state.copies = 1 + len(flips)
        if not flips:
            return args, kwargs
        images = with_flips(images, flips)
        return ((images, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": images})

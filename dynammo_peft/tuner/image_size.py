"""Images on their way in: their size noted for the adapters, position embeddings and precision fitted to it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import nn


if TYPE_CHECKING:
    from .layer import DynammoLayer


def as_pair(size: Union[int, Sequence[int]]) -> tuple[int, int]:
    """Height and width from one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


@cache
def accepts_interpolation(model_cls: type) -> bool:
    """Whether a model class can interpolate its position embeddings to another image size."""
    return "interpolate_pos_encoding" in inspect.signature(model_cls.forward).parameters


def needs_interpolation(model: nn.Module, image_size: tuple[int, int]) -> bool:
    """Whether `model` must interpolate its position embeddings for images of `image_size` pixels, and can."""
    trained = getattr(getattr(model, "config", None), "image_size", None)
    return trained is not None and as_pair(trained) != as_pair(image_size) and accepts_interpolation(type(model))


class ImageSizeHook:
    """Runs before the base model: tells the adapters the images' size, which tokens do not carry.

    It also has position embeddings fitted to the size where the model can do that, and gives the images the precision
    of the model's weights. A copy of the model copies the hook
    and its references to the layers with it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[DynammoLayer] = []
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    @staticmethod
    def of(model: nn.Module) -> ImageSizeHook:
        """The hook of `model`, which is made if it has none."""
        hooks = (hook for hook in model._forward_pre_hooks.values() if isinstance(hook, ImageSizeHook))
        return next(hooks, None) or ImageSizeHook(model)

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        images = args[0] if args else kwargs.get("pixel_values")
        if isinstance(images, torch.Tensor) and images.dim() == 4:
            size = (images.shape[2], images.shape[3])
            for layer in self.layers:
                layer.state.image_size = layer.last_image_size = size
            if "interpolate_pos_encoding" not in kwargs and needs_interpolation(model, size):
                kwargs = {**kwargs, "interpolate_pos_encoding": True}
            # ViT does so itself; other models refuse single precision where their weights are half.
            images = images.to(getattr(model, "dtype", images.dtype))
            args, kwargs = ((images, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": images})
        return args, kwargs

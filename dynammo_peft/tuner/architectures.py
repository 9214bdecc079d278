"""Where the adapters go: what is known of a model type, and what one forward pass tells of each block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
from torch import nn

from .config import DynammoConfig
from .flops import count_flops
from .image_size import as_pair, needs_interpolation


MAX_FLOPS_RATIO = 0.05
PLAIN_TRANSFORMER_ADAPTERS = 4
# Heads of a plain transformer read so many blocks, or as many as stay below so many features.
PLAIN_TRANSFORMER_FEATURE_BLOCKS = 6
MAX_FEATURES = 4096


# Convolutions in front of blocks (Qazi et al. 2024), or LoRA inside them.
TaskAdapter = Literal["conv", "lora"]


@dataclass(frozen=True)
class Architecture:
    """How a transformers model type names its parts.

    Args:
        block (`str`): Name of a block with `{}` for its number, without the name of the surrounding model.
        depth (`str`): Attribute of the model's configuration that says how many blocks there are.
        projections (`tuple[str, ...]`): Name endings of the linear layers or convolutions that get LoRA.
        head (`str`): Name of the classifier.
        adapter (`Literal["conv", "lora"]`): The task adapter with which classes are told apart best, where none is
            asked for.
        tokens_read (`int`): How many tokens, or means of them, the classifier of a plain transformer reads.
    """

    block: str
    depth: str
    projections: tuple[str, ...]
    head: str = "classifier"
    adapter: TaskAdapter = "conv"
    tokens_read: int = 1

    def target_modules(self, model_config: dict[str, Any]) -> set[str]:
        """Names of the blocks that get an adapter: every stage, or evenly spaced blocks of a plain transformer."""
        depth = model_config[self.depth]
        if not isinstance(depth, int):
            return {self.block.format(stage) for stage in range(len(depth))}
        places = min(PLAIN_TRANSFORMER_ADAPTERS, depth)
        return {self.block.format(place * depth // places) for place in range(places)}

    def feature_modules(self, model_config: dict[str, Any]) -> list[str]:
        """Names of the blocks whose pooled outputs the heads read beside what enters the classifier.

        All stages but the last, whose output the classifier reads anyway; of a plain transformer, whose classifier may
        read the first token only, evenly spaced blocks up to the last.
        """
        depth = model_config[self.depth]
        if not isinstance(depth, int):
            return [self.block.format(stage) for stage in range(len(depth) - 1)]
        affordable = MAX_FEATURES // model_config["hidden_size"] - self.tokens_read
        places = max(1, min(PLAIN_TRANSFORMER_FEATURE_BLOCKS, depth, affordable))
        return [self.block.format((place + 1) * depth // places - 1) for place in range(places)]


# Queries and values, as PEFT takes them for language models.
ATTENTION = ("q_proj", "v_proj")

PLAIN_TRANSFORMER: dict[str, Any] = {"depth": "num_hidden_layers", "projections": ATTENTION, "adapter": "lora"}

ARCHITECTURES: dict[str, Architecture] = {
    "vit": Architecture(block="layers.{}", **PLAIN_TRANSFORMER),
    "deit": Architecture(block="layers.{}", **PLAIN_TRANSFORMER),
    "dinov2": Architecture(block="encoder.layer.{}", tokens_read=2, **PLAIN_TRANSFORMER),
    "dinov2_with_registers": Architecture(block="encoder.layer.{}", tokens_read=2, **PLAIN_TRANSFORMER),
    "convnext": Architecture(block="encoder.stages.{}", depth="depths", projections=("pwconv1", "pwconv2")),
    "convnextv2": Architecture(block="encoder.stages.{}", depth="depths", projections=("pwconv1", "pwconv2")),
    "resnet": Architecture(block="encoder.stages.{}", depth="depths", projections=("convolution",)),
    "swin": Architecture(block="encoder.layers.{}", depth="depths", projections=ATTENTION),
}


@dataclass(frozen=True)
class Site:
    """What enters a block.

    Args:
        layout (`Literal["map", "tokens"]`): `(B, C, H, W)`, or `(B, L, C)` with the patch tokens last.
        channels (`int`): C.
        prefix (`int`): Tokens in front of the patch tokens (CLS, distillation, registers).
        stride (`tuple[int, int]`): Pixels of the image per pixel of the map, down and across.
        size (`tuple[int, int]`): Height and width of the map for the images that were probed.
    """

    layout: Literal["map", "tokens"]
    channels: int
    prefix: int = 0
    stride: tuple[int, int] = (1, 1)
    size: tuple[int, int] = (1, 1)

    def grid(self, length: int, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the patch grid of `length` tokens, prefix included, for images of `image_size` pixels.

        Raises:
            ValueError: If the tokens do not fill a grid.
        """
        # A backbone either drops the pixels beyond the last whole patch (ViT) or pads them to a patch (Swin).
        for divide in (lambda pixels, stride: pixels // stride, lambda pixels, stride: -(-pixels // stride)):
            height, width = (divide(pixels, stride) for pixels, stride in zip(image_size, self.stride))
            if height * width + self.prefix == length:
                return height, width
        raise ValueError(
            f"{length} tokens ({self.prefix} of them no patches) do not fill the patch grid of an image of "
            f"{image_size[0]}x{image_size[1]} pixels; resize the images to a multiple of {self.stride} pixels."
        )


@dataclass(frozen=True)
class Probe:
    """What one forward pass of the base model showed: its cost, what enters and leaves blocks and the classifier."""

    flops: int
    sites: dict[str, Site]
    outputs: dict[str, Site]
    features: Optional[int]
    image_size: tuple[int, int]


def probe(
    model: nn.Module,
    blocks: Sequence[str],
    head: Optional[str],
    image_size: tuple[int, int],
    feature_modules: Optional[dict[str, str]] = None,
) -> Probe:
    """Runs `model` once on a black image and notes what enters each block and the head.

    Args:
        model (`nn.Module`): The base model, without adapters; left as it was.
        blocks (`Sequence[str]`): Names of the blocks.
        head (`Optional[str]`): Name of the classifier.
        image_size (`tuple[int, int]`): Height and width of the image, in pixels.
        feature_modules (`Optional[dict[str, str]]`): Paths of the modules whose output is of interest, by their names.

    Returns:
        `Probe`

    Raises:
        ValueError: If the model cannot process an image of this size, or a block sees neither a map nor tokens.
    """
    entering: dict[str, torch.Size] = {}
    leaving: dict[str, torch.Size] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = args or tuple(kwargs.values())
            entering.setdefault(name, inputs[0].shape)

        return model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    def note_output(name: str, path: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            leaving[name] = (output if isinstance(output, torch.Tensor) else output[0]).shape

        return model.get_submodule(path).register_forward_hook(hook)

    handles = [note(name) for name in (*blocks, *([head] if head else []))]
    handles += [note_output(name, path) for name, path in (feature_modules or {}).items()]
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    channels = getattr(getattr(model, "config", None), "num_channels", 3)
    image = torch.zeros(1, channels, *image_size, device=weight.device, dtype=weight.dtype)
    kwargs = {"interpolate_pos_encoding": True} if needs_interpolation(model, image_size) else {}
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        flops = count_flops(lambda: model(image, **kwargs))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{type(model).__name__} cannot process an image of {image_size[0]}x{image_size[1]} pixels ({reason}); "
            "set image_size in the DynammoConfig to the size of your images."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    sites = {name: _site(name, entering.get(name), image_size, patch, "target_modules") for name in blocks}
    outputs = {
        name: _site(name, leaving.get(name), image_size, patch, "feature_modules") for name in feature_modules or {}
    }
    return Probe(flops, sites, outputs, math.prod(entering[head][1:]) if head in entering else None, image_size)


def _site(name: str, shape: Optional[torch.Size], image_size: tuple[int, int], patch: Any, option: str) -> Site:
    if shape is None:
        raise ValueError(f"Block {name!r} is not used in a forward pass; take it out of {option}.")
    if len(shape) == 4:
        return Site("map", channels=shape[1], size=(shape[2], shape[3]))
    if len(shape) != 3:
        verb = "receives" if option == "target_modules" else "returns"
        raise ValueError(
            f"Block {name!r} {verb} a tensor of {len(shape)} dimensions; it takes a map (B, C, H, W) or tokens "
            f"(B, L, C). Choose other {option}."
        )
    grid, stride = _grid_and_stride(shape[1], image_size, patch)
    return Site("tokens", channels=shape[2], prefix=shape[1] - math.prod(grid), stride=stride, size=grid)


def _grid_and_stride(length: int, image_size: tuple[int, int], patch: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """The grid that `length` tokens fill, and the pixels of the image per token, down and across."""
    if patch is not None:
        # A hierarchical transformer has no prefix tokens, pads to a whole patch, and halves its grid from stage to
        # stage, rounding up.
        stride = as_pair(patch)
        grid = tuple(-(-pixels // step) for pixels, step in zip(image_size, stride))
        while math.prod(grid) > length:
            stride = (2 * stride[0], 2 * stride[1])
            grid = tuple(-(-pixels // step) for pixels, step in zip(image_size, stride))
        if math.prod(grid) == length:
            return grid, stride
        # A plain one drops the pixels beyond the last whole patch and has a handful of prefix tokens at most.
        stride = as_pair(patch)
        grid = (image_size[0] // stride[0], image_size[1] // stride[1])
        if 0 <= length - math.prod(grid) <= 16:
            return grid, stride
    grid = _square_grid(length, image_size)
    return grid, (-(-image_size[0] // grid[0]), -(-image_size[1] // grid[1]))


def _square_grid(length: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """The largest grid with the image's aspect ratio that `length` tokens can fill."""
    ratio = image_size[1] / image_size[0]
    for height in range(math.isqrt(length) * 4, 0, -1):
        width = round(height * ratio)
        if 0 < height * width <= length:
            return height, width
    return 1, length


def bottleneck_channels(channels: int, reduction_factor: int) -> int:
    """Channels between an adapter's two convolutions.

    From four on they are rounded up to a multiple of eight, for which convolution kernels are several times faster.
    """
    middle = max(1, channels // reduction_factor)
    return middle if middle < 4 else min(channels, -(-middle // 8) * 8)


def adapter_multiply_adds(site: Site, middle: int, kernel_size: int, padding: int) -> int:
    """Multiply-adds of one adapter on one image: two convolutions that meet on the middle map."""
    height, width = (side + 2 * padding - kernel_size + 1 for side in site.size)
    down = height * width * site.channels * middle * kernel_size**2
    # A transposed convolution computes one product per pixel of its input, which is the middle map.
    return 2 * down


def choose_reduction_factor(probe: Probe, config: DynammoConfig) -> int:
    """The smallest power of two with which the adapters cost at most 5% of the backbone's FLOPs.

    Where not even one channel is cheap enough, the largest number of input channels is returned.
    """
    widest = max(site.channels for site in probe.sites.values())
    factor = 1
    while factor < widest:
        cost = sum(
            adapter_multiply_adds(site, bottleneck_channels(site.channels, factor), config.kernel_size, config.padding)
            for site in probe.sites.values()
        )
        if 2 * cost <= MAX_FLOPS_RATIO * probe.flops:
            return factor
        factor *= 2
    return widest


def check_map_sizes(probe: Probe, config: DynammoConfig) -> None:
    """Raises a `ValueError` naming the first block whose map is smaller than the kernel reaches."""
    for name, site in probe.sites.items():
        if min(site.size) + 2 * config.padding < config.kernel_size:
            raise ValueError(
                f"The map entering block {name!r} is {site.size[0]}x{site.size[1]}, too small for a kernel of "
                f"{config.kernel_size}x{config.kernel_size} with padding={config.padding}; use "
                f"padding={config.kernel_size // 2} or images larger than {probe.image_size[0]}x"
                f"{probe.image_size[1]} pixels."
            )

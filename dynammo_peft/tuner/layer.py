"""The layer that stands in for a block of the base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architectures import Site, bottleneck_channels
from .config import DynammoConfig
from .forward_state import ForwardState
from .wrapping import WrappingLayer


def equal_convolution(weight: Tensor) -> Tensor:
    """The kernel of a plain convolution that computes what a transposed one of stride 1 and padding p does.

    The plain convolution's padding is k - 1 - p.

    Args:
        weight (`Tensor`): The transposed convolution's kernel, `(C_in, C_out, k, k)`.

    Returns:
        `Tensor`: `(C_out, C_in, k, k)`.
    """
    return weight.flip(2, 3).transpose(0, 1)


class UpConvolution(nn.ConvTranspose2d):
    """A transposed convolution of stride 1; where it keeps the map's size, computed as the equal convolution.

    The kernels of plain convolutions are faster, most of all for few images.
    """

    def forward(self, grid: Tensor) -> Tensor:
        if 2 * self.padding[0] != self.kernel_size[0] - 1:
            return super().forward(grid)
        return F.conv2d(grid, equal_convolution(self.weight), padding=self.padding)


class DynammoLayer(WrappingLayer):
    """A block with residual convolutional adapters in front of it (Qazi et al. 2024, section 2.2).

    Args:
        base_layer (`nn.Module`): The block; its first argument is a map `(B, C, H, W)` or tokens `(B, L, C)`.
        adapter_name (`str`): Name of the first adapter.
        config (`DynammoConfig`): Its configuration.
        site (`Site`): What enters the block.
    """

    # Flat containers: PEFT finds an adapter's name only as the last but one part of a key.
    adapter_layer_names = (
        "dynammo_down",
        "dynammo_down_norm",
        "dynammo_up",
        "dynammo_up_norm",
        "dynammo_alpha",
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DynammoConfig, site: Site) -> None:
        super().__init__(base_layer, adapter_name)
        self.site = site
        # The size of the images, set by a hook of the base model; and of those of whatever thread came last, for
        # activations that are computed again in a thread of PyTorch's own.
        self.state = ForwardState()
        self.last_image_size: tuple[int, int] = (0, 0)
        self.dynammo_down = nn.ModuleDict()
        self.dynammo_down_norm = nn.ModuleDict()
        self.dynammo_up = nn.ModuleDict()
        self.dynammo_up_norm = nn.ModuleDict()
        self.dynammo_alpha = nn.ParameterDict()
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: DynammoConfig) -> None:
        """Adds an adapter with fresh weights."""
        channels = self.site.channels
        middle = bottleneck_channels(channels, config.reduction_factor)
        # No biases: the normalisation that follows would take them out again.
        shape = {"kernel_size": config.kernel_size, "padding": config.padding, "bias": False}
        self.dynammo_down[adapter_name] = nn.Conv2d(channels, middle, **shape)
        self.dynammo_down_norm[adapter_name] = nn.BatchNorm2d(middle)
        self.dynammo_up[adapter_name] = UpConvolution(middle, channels, **shape)
        self.dynammo_up_norm[adapter_name] = nn.BatchNorm2d(channels)
        self.dynammo_alpha[adapter_name] = nn.Parameter(torch.full((1,), config.init_alpha))
        self._place(adapter_name, config.inference_mode)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = self._own_adapters(self.dynammo_down)
        if names:
            adapt = self._adapt_map if self.site.layout == "map" else self._adapt_tokens
            hidden_states = adapt(hidden_states, names)
        return self.base_layer(hidden_states, *args, **kwargs)

    def _adapt_tokens(self, hidden_states: Tensor, names: list[str]) -> Tensor:
        prefix = self.site.prefix
        height, width = self.site.grid(hidden_states.shape[1], self.state.image_size or self.last_image_size)
        # A view: tokens are a map whose channels come last in memory.
        grid = hidden_states[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
        patches = self._adapt_map(grid, names).flatten(2).transpose(1, 2)
        return torch.cat([hidden_states[:, :prefix], patches], dim=1) if prefix else patches

    def _adapt_map(self, grid: Tensor, names: list[str]) -> Tensor:
        """`grid` plus the residuals of the adapters, all computed from `grid`, `(B, C, H, W)`."""
        adapted = grid
        for name in names:
            adapted = self._add_residual(adapted, grid, name)
        return adapted

    def _add_residual(self, adapted: Tensor, grid: Tensor, name: str) -> Tensor:
        """`adapted + alpha * ReLU(BN(ConvTranspose(ReLU(BN(Conv(grid))))))`, with few passes over memory."""
        down, alpha = self.dynammo_down[name], self.dynammo_alpha[name]
        hidden = self.dynammo_down_norm[name](down(self._cast_input_dtype(grid, down.weight.dtype)))
        hidden = self.dynammo_up_norm[name](self.dynammo_up[name](F.relu(hidden, inplace=True)))
        hidden = F.relu(hidden, inplace=True)
        if adapted.dtype == hidden.dtype == alpha.dtype:
            return torch.addcmul(adapted, alpha, hidden)
        return adapted + (alpha * hidden).to(adapted.dtype)

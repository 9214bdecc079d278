"""What training changes in a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def trained_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters that require gradients, and buffers of modules in training mode, by name."""
    tensors = {name: parameter.detach() for name, parameter in network.named_parameters() if parameter.requires_grad}
    for prefix, module in network.named_modules():
        if module.training:
            own = dict(module.named_buffers(recurse=False))
            tensors |= {f"{prefix}.{name}" if prefix else name: buffer for name, buffer in own.items()}
    return tensors


@torch.no_grad()
def restore_tensors(network: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Gives `network`, in training mode, the values that `trained_tensors` had.

    Raises:
        ValueError: If other tensors are trained now.
    """
    own = trained_tensors(network)
    different = sorted(set(own) ^ set(saved))
    if different:
        raise ValueError(f"The checkpoint does not fit: only one of it and the model trains {different[0]!r}.")
    for name, tensor in own.items():
        tensor.copy_(saved[name])

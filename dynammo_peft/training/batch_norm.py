"""BatchNorm over the batch of all processes, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is the gradient's."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Normalises by the mean and variance of the batch of all processes.

    What `torch.nn.SyncBatchNorm` does, which refuses tensors on the CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        values = input if input.dtype == torch.float64 else input.float()
        # Two sums one after the other: mean squares minus squared means would lose digits.
        count = torch.full((1,), values.numel() / values.shape[1], device=values.device)
        sums = _SumOverProcesses.apply(torch.cat([values.sum(dims), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = values - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims)) / total
        self._track(mean.detach(), variance.detach() * total / (total - 1).clamp(min=1))
        output = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _GlobalBatchNorm1d(_GlobalBatchNorm, nn.BatchNorm1d):
    pass


class _GlobalBatchNorm2d(_GlobalBatchNorm, nn.BatchNorm2d):
    pass


_GLOBAL = {nn.BatchNorm1d: _GlobalBatchNorm1d, nn.BatchNorm2d: _GlobalBatchNorm2d}


@contextmanager
def global_batch_norm(network: nn.Module, num_processes: int) -> Iterator[None]:
    """For a while, BatchNorm layers of `network` in training mode use the batches of all processes.

    Their parameters, buffers and hooks stay; only their class is another, as FSDP2 does it.

    Args:
        network (`nn.Module`): What is trained.
        num_processes (`int`): Nothing is changed if there is one.
    """
    changed = [module for module in network.modules() if num_processes > 1 and type(module) in _GLOBAL]
    own = [type(module) for module in changed]
    for module in changed:
        module.__class__ = _GLOBAL[type(module)]
    try:
        yield
    finally:
        for module, cls in zip(changed, own):
            module.__class__ = cls

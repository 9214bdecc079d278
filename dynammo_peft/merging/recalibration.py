"""BatchNorm statistics of a merged adapter, measured instead of averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from .adapters import AdaptedModel, adapted_base, adapter_slots
from .objectives import classify
from .state import adapter_used


@torch.no_grad()
def recalibrate(
    model: AdaptedModel,
    adapter: str,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = classify,
) -> None:
    """
    Sets the running statistics of an adapter's BatchNorm layers to those of what really reaches them.

    The mean of several adapters' statistics is not the statistics of the mean adapter. As in training, each layer
    normalises by its batch, so batches should be as large as in training; mean and variance are exact over all of them
    ("precise BatchNorm", Wu & Johnson 2021, https://arxiv.org/abs/2105.07576, section 3.2).

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapter (`str`): Name of the adapter; without BatchNorm there is nothing to do.
        batches (`Iterable`): Normalised images `(B, 3, H, W)`, pairs of them and labels, or mappings.
        forward (`Callable`): Of base model and batch, how to run it. A layer that it passes by keeps its statistics.

    Raises:
        ValueError: If the adapter does not exist, there are no batches, or what reaches a layer is not finite. The
            statistics are as before then.
    """
    base = adapted_base(model)
    norms = _norms(base, adapter, adapter_slots(model, adapter).values())
    if not norms:
        return
    sums = {norm: _Sums(norm) for norm in norms}
    handles = [norm.register_forward_pre_hook(sums[norm]) for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    try:
        with adapter_used(model, adapter):
            for norm in norms:
                norm.train()
            device = next(base.parameters()).device
            for batch in batches:
                forward(base, send_to_device(batch, device))
    finally:
        for handle in handles:
            handle.remove()
        for norm, statistics in zip(norms, before):
            for name, buffer in norm.named_buffers():
                buffer.copy_(statistics[name])
    if not any(measured.count for measured in sums.values()):
        raise ValueError("batches holds no images; statistics are a mean over them.")
    if not all(measured.squares.isfinite().all() for measured in sums.values()):
        raise ValueError(
            f"What reaches the BatchNorm layers of adapter {adapter!r} holds NaN or infinity, and so would their "
            "statistics; look for it in the images of batches, then in the adapter's tensors."
        )
    for norm, measured in sums.items():
        if not measured.count:
            # A layer that the forward passes by.
            continue
        mean = measured.total / measured.count
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((measured.squares / measured.count - mean.square()).clamp(min=0))


def _norms(base: nn.Module, adapter: str, slots: Iterable[Any]) -> list[nn.modules.batchnorm._BatchNorm]:
    """The adapter's BatchNorm layers."""
    owners = {slot.name(adapter).rpartition(".")[0] for slot in slots if slot.kind == "statistic"}
    modules = [base.get_submodule(owner) for owner in sorted(owners)]
    return [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]


class _Sums:
    """Count, sum and sum of squares of each channel of what enters a layer."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        self.count = 0
        self.total = torch.zeros(norm.num_features, dtype=torch.float64, device=norm.running_mean.device)
        self.squares = torch.zeros_like(self.total)

    def __call__(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].transpose(0, 1).flatten(1).double()
        self.count += values.shape[1]
        self.total += values.sum(dim=1)
        self.squares += values.square().sum(dim=1)

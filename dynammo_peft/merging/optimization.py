"""The training loop of merge weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Union

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from .adapters import tensor_places
from .objectives import Forward, Objective, as_objective, classify, inputs_and_labels
from .state import random_state_kept


EVALUATION_BATCHES = 8
READ_ONCE = "batches can be read only once; give a list or a DataLoader, which start anew."


class FunctionalLoss(nn.Module):
    """The objective on a batch, as a function of tensors that stand in for those of a model.

    Args:
        base (`nn.Module`): The model; neither its tensors nor its mode are touched.
        objective (`Union[str, Callable]`): A key of `OBJECTIVES`, or a function of the forward's result and labels.
        forward (`Optional[Callable]`): A function of model and batch; the model's logits if `None`.

    Raises:
        ValueError: If the objective does not exist.
    """

    def __init__(self, base: nn.Module, objective: Union[str, Objective], forward: Forward | None = None) -> None:
        super().__init__()
        self.base = base
        self._objective = as_objective(objective)
        self._forward = forward if forward is not None else classify
        self._device = next((tensor.device for tensor in base.parameters()), torch.device("cpu"))

    def forward(self, batch: Any) -> Tensor:
        """The loss with the model's tensors of the moment."""
        return self._objective(self._forward(self.base, batch), inputs_and_labels(batch)[1])

    def of(self, tensors: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The loss with `tensors`, by their names in the base model, instead of the model's own."""
        places = tensor_places(self)
        named = {}
        for name, tensor in tensors.items():
            owner, _, own_name = name.rpartition(".")
            own = getattr(self.base.get_submodule(owner), own_name)
            named |= dict.fromkeys(places[id(own)], tensor)
        loss = functional_call(self, named, (send_to_device(batch, self._device),), tie_weights=False)
        if loss.dim() != 0:
            raise ValueError(f"The objective must return a scalar, got a tensor of shape {tuple(loss.shape)}.")
        return loss


def minimize(
    loss_of: Callable[[Any], Tensor],
    parameters: Sequence[dict[str, Any]],
    batches: Iterable[Any],
    steps: int,
    progress: bool,
) -> tuple[float, float]:
    """
    Adam with a cosine schedule, on parameters that no module holds.

    Args:
        loss_of (`Callable`): The loss of a batch, a scalar.
        parameters (`Sequence[dict]`): Groups of parameters as an optimizer takes them, with their learning rates.
        batches (`Iterable`): Gone through as often as is needed.
        steps (`int`): Updates, one a batch.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `tuple[float, float]`: Mean loss of the first batches (at most `EVALUATION_BATCHES`) before and after.

    Raises:
        ValueError: If there are no batches or they can be read but once, the loss is not finite or does not depend on
            the parameters, or in inference mode.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("Nothing can be learned inside torch.inference_mode(); leave it for this call.")
    if iter(batches) is batches:
        raise ValueError(READ_ONCE)
    probe = list(islice(batches, EVALUATION_BATCHES))
    if not probe:
        raise ValueError("batches holds no batch; give at least one.")
    leaves = [parameter for group in parameters for parameter in group["params"]]
    optimizer = torch.optim.Adam(parameters)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    before = _mean_loss(loss_of, probe)
    if not math.isfinite(before):
        raise ValueError(f"The loss is {before} before the first step; look for NaN in the adapters and the batches.")
    bar = tqdm(total=steps, desc="Merge weights", disable=not progress, leave=False)
    with bar, torch.enable_grad():
        for step, batch in enumerate(islice(_again_and_again(batches), steps)):
            loss = loss_of(batch)
            if not loss.requires_grad:
                raise ValueError("The loss does not depend on the merge weights; let forward use the model given.")
            if not math.isfinite(loss.item()):
                raise ValueError(f"The loss is {loss.item()} at step {step + 1}; lower the learning rate.")
            # Not `backward`: nothing else shall get a gradient.
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves, allow_unused=True)):
                leaf.grad = gradient
            optimizer.step()
            schedule.step()
            bar.update()
    after = _mean_loss(loss_of, probe)
    if not math.isfinite(after):
        raise ValueError(f"The loss is {after} after {steps} steps; lower the learning rate.")
    return before, after


def check_numbers(steps: int, *rates: float) -> None:
    """Raises a `ValueError` unless steps and learning rates are usable."""
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps={steps!r} must be an integer, and not negative.")
    for rate in rates:
        # Adam itself looks at its default only, and not at what a group has.
        if not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate < 0:
            raise ValueError(f"A learning rate of {rate!r} is of no use; it must be a finite number, at least 0.")


def _again_and_again(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        ran_dry = True
        for batch in batches:
            ran_dry = False
            yield batch
        if ran_dry:
            raise ValueError(READ_ONCE)


@torch.no_grad()
def _mean_loss(loss_of: Callable[[Any], Tensor], batches: Sequence[Any]) -> float:
    return torch.stack([loss_of(batch).float() for batch in batches]).mean().item()


@contextmanager
def seeded(module: nn.Module, seed: int) -> Iterator[None]:
    """Draws by `seed` for a while, on the CPU and the module's devices; afterwards the random state is what it was."""
    with random_state_kept(module) as generators:
        # Not `torch.manual_seed`, which seeds other devices too, that are not put back.
        for generator in generators:
            generator.manual_seed(seed)
        yield

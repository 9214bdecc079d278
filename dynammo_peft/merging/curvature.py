"""What `fisher` and `regmean` need to know of each adapter, measured on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Optional, Union

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .adapters import AdaptedModel, AdapterTensors, adapted_base, adapter_slots, adapter_tensors, tensor_places
from .objectives import classify, inputs_and_labels
from .state import adapter_used


Batch = Union[Tensor, tuple[Tensor, Tensor], Mapping[str, Tensor]]
# Images `(B, 3, H, W)`, or what else a model takes by name, as `input_ids` and `attention_mask`, `(B, ...)` each.
Inputs = Union[Tensor, dict[str, Tensor]]
# Of the model and the inputs; gives logits `(B, N)`.
Forward = Callable[[nn.Module, Inputs], Tensor]
# Of logits and labels `(B,)`; gives the mean negative log-likelihood.
Loss = Callable[[Tensor, Tensor], Tensor]


def diagonal_fisher(
    model: AdaptedModel,
    adapter: str,
    batches: Iterable[Batch],
    loss: Optional[Loss] = None,
    *,
    draws: Optional[int] = None,
    seed: int = 0,
    forward: Forward = classify,
    vectorized: bool = True,
) -> AdapterTensors:
    """
    The diagonal of the Fisher information of an adapter's parameters: the mean over images of the squared gradient of
    the log-likelihood (Matena & Raffel 2022, https://arxiv.org/abs/2111.09832, section 2.2), in evaluation mode.

    With labels that is the empirical Fisher information. Without, labels are those that the model expects: each class
    counts by its probability, which takes a backward pass a class; or `draws` labels an image are drawn from it.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapter (`str`): Name of an adapter.
        batches (`Iterable[Union[Tensor, tuple[Tensor, Tensor], Mapping[str, Tensor]]]`):
            Normalised images `(B, 3, H, W)`, pairs of them and labels `(B,)`, or mappings with what the model takes,
            as `pixel_values` or `input_ids`, and, if there are any, `labels`.
        loss (`Optional[Callable]`): Of logits and labels; `None`: cross-entropy.
        draws (`Optional[int]`): Labels to draw for each image without one; `None`: all classes by probability.
        seed (`int`): Seed of the draws; other random numbers are not touched.
        forward (`Callable`): Of model and images (of a mapping: the mapping without labels), gives logits `(B, N)`.
        vectorized (`bool`): Whether the images of a batch are computed together, for which `forward` and `loss` must
            be fit for `torch.func.vmap`, as attention masks of text are not; otherwise one after the other.

    Returns:
        `AdapterTensors`: The Fisher information by key of the parameters, in float64; statistics have none.

    Raises:
        ValueError: If the adapter does not exist, there are no images, there are not as many labels as images, or one
            is no class, `draws` is less than 1, or `vectorized` does not go with the model.
    """
    if draws is not None and draws < 1:
        raise ValueError(f"draws={draws} must be at least 1, or None for all classes by their probability.")
    tensors = {
        key: tensor for key, tensor in adapter_tensors(model, adapter).items() if isinstance(tensor, nn.Parameter)
    }
    runner = _Runner(model, forward)
    places = tensor_places(runner)
    names = {key: places[id(tensor)] for key, tensor in tensors.items()}
    parameters = {key: tensor.detach() for key, tensor in tensors.items()}
    gradients = _gradients(runner, loss or F.cross_entropy, parameters, names, vectorized)
    total = {key: torch.zeros_like(parameter, dtype=torch.float64) for key, parameter in parameters.items()}
    count = 0
    generator = torch.Generator().manual_seed(seed)
    with adapter_used(model, adapter):
        for inputs, labels in _on_device(batches, model):
            size = _size(inputs)
            if labels is not None and len(labels) != size:
                raise ValueError(f"A batch has {size} images and {len(labels)} labels; give a label for each.")
            count += size
            for targets, shares in _targets(runner, inputs, labels, draws, generator):
                try:
                    found = gradients(inputs, targets)
                except (IndexError, RuntimeError) as error:
                    # Nobody can look at them before: inside `vmap` they are no numbers.
                    if labels is None or "out of bounds" not in str(error):
                        raise
                    raise ValueError(
                        f"A batch has labels from {labels.min().item()} to {labels.max().item()}, and not all of them "
                        "are classes of the model; number them in the order of its logits."
                    ) from error
                for key, gradient in found.items():
                    total[key] += torch.tensordot(shares, gradient.double().square(), dims=1)
    if count == 0:
        raise ValueError("batches holds no images; the Fisher information is a mean over them.")
    return {key: information / count for key, information in total.items()}


class _Runner(nn.Module):
    """The forward as a module's, so that it can be called with other parameters."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, inputs: Inputs) -> Tensor:
        return self._forward(self.model, inputs)


def _gradients(
    runner: nn.Module, loss: Loss, parameters: AdapterTensors, names: Mapping[str, list[str]], vectorized: bool
) -> Callable[[Inputs, Tensor], AdapterTensors]:
    """A function of inputs and labels `(B,)` that gives each image's gradients, `(B, ...)`.

    Parameters and gradients are by key, of which the runner has each by one or more names.
    """

    def loss_of_one(values: AdapterTensors, image: Inputs, label: Tensor) -> Tensor:
        batch = {name: value[None] for name, value in image.items()} if isinstance(image, dict) else image[None]
        named = {name: value for key, value in values.items() for name in names[key]}
        return loss(functional_call(runner, named, (batch,), tie_weights=False), label[None])

    of_one = grad(loss_of_one)
    if vectorized:
        of_all = vmap(of_one, in_dims=(None, 0, 0), randomness="different")

        def together(inputs: Inputs, labels: Tensor) -> AdapterTensors:
            # The other kernels of attention know of no further batch dimension.
            with sdpa_kernel(SDPBackend.MATH):
                try:
                    return of_all(parameters, inputs, labels)
                except RuntimeError as error:
                    if not str(error).startswith("vmap:"):
                        raise
                    raise ValueError(
                        "The model looks into its inputs, as some do into attention masks, so that images of a batch "
                        "cannot be computed together; set vectorized=False."
                    ) from error

        return together

    def one_by_one(inputs: Inputs, labels: Tensor) -> AdapterTensors:
        rows = [of_one(parameters, image, label) for image, label in zip(_unbind(inputs), labels)]
        return {key: torch.stack([row[key] for row in rows]) for key in parameters}

    return one_by_one


def _targets(
    runner: nn.Module,
    inputs: Inputs,
    labels: Optional[Tensor],
    draws: Optional[int],
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels `(B,)` and what they count for each image, `(B,)` in float64, one after the other."""
    if labels is not None:
        yield labels, torch.ones(len(labels), dtype=torch.float64, device=labels.device)
        return
    with torch.no_grad():
        probabilities = runner(inputs).double().softmax(dim=1)
    if draws is not None:
        drawn = torch.multinomial(probabilities.cpu(), draws, replacement=True, generator=generator)
        equal = torch.full_like(probabilities[:, 0], 1 / draws)
        yield from ((column, equal) for column in drawn.to(probabilities.device).unbind(dim=1))
        return
    for label, shares in enumerate(probabilities.unbind(dim=1)):
        yield torch.full_like(shares, label, dtype=torch.long), shares


@torch.no_grad()
def input_grams(
    model: AdaptedModel,
    adapter: str,
    batches: Iterable[Batch],
    *,
    forward: Callable[[nn.Module, Inputs], Any] = classify,
) -> AdapterTensors:
    """
    Gram matrices of what enters an adapter's linear layers, `x' x` as a mean over all rows `x` (image or token), in
    evaluation mode (Jin et al. 2023, https://arxiv.org/abs/2212.09849, section 3).

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapter (`str`): Name of an adapter.
        batches (`Iterable[Union[Tensor, tuple[Tensor, Tensor], Mapping[str, Tensor]]]`):
            Normalised images `(B, 3, H, W)`, also with labels, or mappings, as in `diagonal_fisher`; labels are not
            used.
        forward (`Callable`): As in `diagonal_fisher`, runs the model.

    Returns:
        `AdapterTensors`: `(in, in)` in float64 by the key of the layer's weight; layers that were not run have none.

    Raises:
        ValueError: If the adapter does not exist, it has no linear layer, or none was run.
    """
    grams: AdapterTensors = {}
    counts: dict[str, int] = {}

    def hook_of(key: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).double()
            grams[key] = grams.get(key, 0) + rows.T @ rows
            counts[key] = counts.get(key, 0) + len(rows)

        return hook

    linears = dict(_linears(model, adapter))
    if not linears:
        raise ValueError(f"Adapter {adapter!r} has no linear layer, so that there is nothing for RegMean to measure.")
    hooks = [module.register_forward_pre_hook(hook_of(key)) for key, module in linears.items()]
    try:
        with adapter_used(model, adapter):
            for inputs, _ in _on_device(batches, model):
                forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not grams:
        raise ValueError(f"No linear layer of adapter {adapter!r} was run; give batches of images.")
    return {key: gram / counts[key] for key, gram in grams.items()}


def _linears(model: AdaptedModel, adapter: str) -> Iterator[tuple[str, nn.Linear]]:
    """An adapter's linear layers by the keys of their weights."""
    base = adapted_base(model)
    for key, slot in adapter_slots(model, adapter).items():
        owner, _, last = slot.name(adapter).rpartition(".")
        if slot.tensor and last == "weight" and isinstance(base.get_submodule(owner), nn.Linear):
            yield key, base.get_submodule(owner)


def _on_device(batches: Iterable[Batch], model: nn.Module) -> Iterator[tuple[Inputs, Optional[Tensor]]]:
    """Inputs, and labels or `None`, on the model's device."""
    device = next(model.parameters()).device
    for batch in batches:
        yield inputs_and_labels(send_to_device(batch, device))


def _size(inputs: Inputs) -> int:
    """How many images there are."""
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)


def _unbind(inputs: Inputs) -> Iterator[Inputs]:
    """One image after the other."""
    if isinstance(inputs, dict):
        yield from (dict(zip(inputs, row)) for row in zip(*inputs.values()))
    else:
        yield from inputs

"""Merge weights learned by gradient through the merged model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .adapters import (
    AdaptedModel,
    AdapterTensors,
    adapted_base,
    adapter_slots,
    adapter_tensors,
    set_adapter_tensors,
    tensors_of_adapters,
)
from .checks import check_fillable, check_mergeable, check_names
from .groups import Granularity
from .merge import keep_weights, merge_adapters
from .objectives import Forward, Objective
from .optimization import FunctionalLoss, check_numbers, minimize, seeded
from .scalings import scalings_over
from .state import adapter_used, tuner_of
from .weighted_sums import WeightedCombination
from .weights import MergeWeights, check_weighted


def learn_merge_weights(
    model: AdaptedModel,
    adapters: Sequence[str],
    batches: Iterable[Any],
    adapter_name: str = "merged",
    granularity: Granularity = "layer",
    simplex: Optional[bool] = None,
    objective: Union[str, Objective] = "labels",
    forward: Optional[Forward] = None,
    steps: int = 20,
    learning_rate: float = 0.1,
    seed: int = 0,
    combination_type: WeightedCombination = "linear",
    progress: bool = True,
) -> MergeWeights:
    """
    Learns the weights with which adapters are merged, and merges them so.

    Only the weights are trained, by Adam through the forward of the merged adapter in evaluation mode (Yang et al.
    2024, "AdaMerging", https://arxiv.org/abs/2310.02575, for layers; Almakky et al. 2024, "MedMerge",
    https://arxiv.org/abs/2403.11646, for channels). They start at `1 / T`, which is the mean of the adapters; of LoRA
    with `"cat"` only, otherwise it is what `merge_adapters` makes of such weights. The more weights there are, the
    more images they need. Heads of DynaMMo adapters are not merged and stay as they are. What is active, trained and
    in which mode is as before.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters of any PEFT method.
        adapters (`Sequence[str]`): Names of the adapters to merge.
        batches (`Iterable`): Images `(B, 3, H, W)`, pairs of images and labels `(B,)`, or mappings with `labels`; gone
            through as often as `steps` asks for. If there are several processes, all must see the same batches.
        adapter_name (`str`): The adapter to fill. It is made by `merge_adapters` if it does not exist.
        granularity (`Literal["task", "layer", "channel"]`): What has weights of its own.
        simplex (`Optional[bool]`): Whether weights are positive and sum to one over the adapters; otherwise they are
            free. If `None`, for `"entropy"` only: stronger adapters lower it, whatever becomes of the classes.
        objective (`Union[Literal["labels", "entropy"], Callable]`): `"labels"`: cross-entropy of the logits.
            `"entropy"`: entropy of the predictions, for batches without labels. Or a function of what the forward
            returned and the labels, as `gaussian_likelihood`.
        forward (`Optional[Callable]`): A function of base model and batch; the logits of its images if `None`.
        steps (`int`): Updates, one a batch.
        learning_rate (`float`): Of Adam at the start, in units of `1 / T`; falls to zero by a cosine.
        seed (`int`): Of what `batches` draws; the random state outside is left alone.
        combination_type (`Literal["linear", "cat"]`): `"cat"`, of LoRA: its factors are placed side by side, so that
            the update itself is the weighted sum of the adapters' own, at T times the rank.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `MergeWeights`: The weights, with the loss before and after. A `DynammoConfig` also keeps them, in its
        `merge_weights`; for adapters of PEFT's own methods `MergeWeights.save_pretrained` writes them into a file.

    Raises:
        ValueError: If an adapter does not exist or is built differently from the first, the adapter to fill has not
            the classes of their merge, an option does not exist, the batches are of no use, or the loss is not finite.
            The model is as before then.

    Example:

        ```py
        >>> weights = learn_merge_weights(model, ["task_000", "task_001"], DataLoader(exemplars, batch_size=32))
        >>> print(weights)
        ```
    """
    adapters = check_names(adapters, adapter_name)
    check_numbers(steps, learning_rate)
    check_weighted(combination_type)
    base = adapted_base(model)
    loss = FunctionalLoss(base, objective, forward)
    simplex = objective == "entropy" if simplex is None else simplex
    with (
        seeded(base, seed),
        _merged_adapter(model, adapters, adapter_name, combination_type),
        adapter_used(model, adapter_name),
    ):
        # Backward shall pass by all but the merge weights; `adapter_used` puts this back.
        model.requires_grad_(False)
        weights = adapter_merge_weights(model, adapters, adapter_name, granularity, simplex, combination_type)
        stacked = weights.stack(tensors_of_adapters(model, adapters))
        with torch.no_grad():
            _check_fits(weights.combine(stacked), adapter_tensors(model, adapter_name), adapters, adapter_name)
        names = {key: slot.name(adapter_name) for key, slot in weights.slots.items()}

        def loss_of(batch: Any) -> Tensor:
            return loss.of({names[key]: tensor for key, tensor in weights.combine(stacked).items()}, batch)

        groups = [{"params": [weights.values], "lr": weights.step_length(learning_rate)}]
        weights.loss_before, weights.loss_after = minimize(loss_of, groups, batches, steps, progress)
        with torch.no_grad():
            set_adapter_tensors(model, adapter_name, weights.combine(stacked))
    keep_weights(model, adapter_name, weights)
    return weights


def adapter_merge_weights(
    model: AdaptedModel,
    adapters: Sequence[str],
    adapter_name: str = "merged",
    granularity: Granularity = "layer",
    simplex: bool = False,
    combination_type: WeightedCombination = "linear",
) -> MergeWeights:
    """Uniform merge weights for adapters of a model, on its device.

    Args:
        model (`Union[PeftModel, BaseTuner]`): A model with adapters.
        adapters (`Sequence[str]`): Names of the adapters to merge.
        adapter_name (`str`): The adapter that the merge is for.
        granularity (`Literal["task", "layer", "channel"]`): What has weights of its own.
        simplex (`bool`): Whether weights are positive and sum to one over the adapters.
        combination_type (`Literal["linear", "cat"]`): How LoRA's factors are combined.

    Raises:
        ValueError: If an adapter, the granularity or the combination does not exist.
    """
    slots, tensors = adapter_slots(model, adapters[0]), adapter_tensors(model, adapters[0])
    scalings = scalings_over(model, slots, adapters, adapter_name)
    weights = MergeWeights.for_slots(adapters, slots, tensors, granularity, simplex, scalings, combination_type)
    return weights.to(next(iter(tensors.values())).device)


def _check_fits(expected: AdapterTensors, own: AdapterTensors, adapters: Sequence[str], merged: str) -> None:
    """Raises a `ValueError` unless the merge has tensors of the names and shapes that the merged adapter has."""
    shapes = [{key: tuple(tensor.shape) for key, tensor in tensors.items()} for tensors in (expected, own)]
    for key in {**shapes[0], **shapes[1]}:
        if shapes[0].get(key) != shapes[1].get(key):
            raise ValueError(
                f"Adapter {merged!r} cannot be filled from {', '.join(map(repr, adapters))}: {key!r} has shape "
                f"{shapes[1].get(key)}, their merge {shapes[0].get(key)}. Delete it, or choose another adapter_name."
            )


@contextmanager
def _merged_adapter(
    model: AdaptedModel, adapters: Sequence[str], adapter_name: str, combination_type: WeightedCombination
) -> Iterator[None]:
    """Makes the adapter to be filled unless it exists; takes a new one out again if something fails."""
    for name in adapters:
        if getattr(model.peft_config.get(name), "alora_invocation_tokens", None) is not None:
            raise ValueError(
                f"Adapter {name!r} has alora_invocation_tokens, which the base model's forward knows nothing of, so "
                "that no weights can be learned through it; merge with weights of your own."
            )
    # Also of adapters that "cat" takes with any weights: what is learned is of tensors of one shape.
    check_mergeable(model, adapters, adapter_name)
    exists = adapter_name in model.peft_config
    if exists:
        check_fillable(model, adapters, adapter_name)
    else:
        merge_adapters(model, adapters, adapter_name=adapter_name, combination_type=combination_type)
    try:
        yield
    except BaseException:
        if not exists:
            tuner_of(model).delete_adapter(adapter_name)
        raise

"""Merging whole backbones of one architecture that were pretrained on different data."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import AdapterTensors, Slot
from .groups import Granularity
from .objectives import Forward, Objective
from .optimization import FunctionalLoss, check_numbers, minimize, seeded
from .weights import MergeWeights


BACKBONES = ("first", "second")
# What may differ between the models' configurations, as it says nothing of what the backbones' tensors mean.
FREE_FIELDS = {
    "name",
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    # Where it matters, as for position embeddings, shapes differ too.
    "image_size",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
}
# Of names of fields that matter in training, or at its start, only.
TRAINING_FIELDS = ("dropout", "drop_path", "initializer")


def merge_backbones(
    first: PreTrainedModel,
    second: PreTrainedModel,
    batches: Optional[Iterable[Any]] = None,
    granularity: Granularity = "channel",
    weights: Optional[Union[float, MergeWeights]] = None,
    objective: Union[str, Objective] = "labels",
    forward: Optional[Forward] = None,
    num_labels: Optional[int] = None,
    steps: int = 100,
    learning_rate: float = 0.04,
    head_learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> tuple[PreTrainedModel, MergeWeights]:
    """
    Merges two models into one: `w * theta_1 + (1 - w) * theta_2` (Almakky et al. 2024, "MedMerge",
    https://arxiv.org/abs/2403.11646).

    With batches, `w` (from 0.5, always between 0 and 1) and the classifier are trained together, the backbones frozen;
    train the new model on afterwards. BatchNorm statistics are averaged with the same weights. The classifier is not
    merged but the first model's, or a fresh one of `num_labels` classes; only for models of the same labels, and with
    neither batches nor learned weights, it is merged as the rest.

    Args:
        first (`PreTrainedModel`): A model; left as it is.
        second (`PreTrainedModel`): Another one of its class; left as it is.
        batches (`Optional[Iterable]`): To learn the weights on, as `learn_merge_weights` takes them.
        granularity (`Literal["task", "layer", "channel"]`): What has a weight of its own. `"channel"`: each kernel
            (or row of a matrix), as MedMerge has it.
        weights (`Optional[Union[float, MergeWeights]]`): The first model's share, or weights learned earlier. If
            `None`, they are learned on the batches; without batches, 0.5.
        objective (`Union[Literal["labels", "entropy"], Callable]`): As in `learn_merge_weights`.
        forward (`Optional[Callable]`): As in `learn_merge_weights`.
        num_labels (`Optional[int]`): Classes of a fresh classifier; the first model's classifier if `None`.
        steps (`int`): Updates, one a batch.
        learning_rate (`float`): Of the weights: Adam's at the start, in units of 0.5; falls to zero by a cosine.
        head_learning_rate (`float`): Of the classifier, likewise.
        seed (`int`): Of the fresh classifier and of what `batches` draws.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `tuple[PreTrainedModel, MergeWeights]`: A new model on the first one's device, in its mode, and the weights of
        `"first"` and `"second"`.

    Raises:
        ValueError: If the models are not alike, an option does not exist, both weights and batches are given,
            `num_labels` is less than 1 or given for models without a classifier, or the batches are of no use.
    """
    for model in (first, second):
        if not isinstance(model, PreTrainedModel):
            shown = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
            raise ValueError(
                f"merge_backbones takes models of transformers, got {shown}; load it first, as by "
                "AutoModelForImageClassification.from_pretrained."
            )
    if batches is not None and weights is not None:
        raise ValueError("Give merge_backbones either weights or batches to learn them on, not both.")
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"num_labels={num_labels} must be at least 1; None keeps the first model's classifier.")
    check_numbers(steps, learning_rate, head_learning_rate)
    _check_alike(first, second)
    with seeded(first, seed):
        merged = _with_head(first, num_labels)
        given = batches is None and not isinstance(weights, MergeWeights)
        slots = _slots(first, with_head=given and num_labels is None and _same_head(first, second))
        tensors = [_tensors(model, slots, first) for model in (first, second)]
        mixture = _weights(weights, slots, tensors[0], granularity).to(first.device)
        stacked = mixture.stack(tensors)
        head = {}
        if batches is not None:
            loss = FunctionalLoss(merged.eval(), objective, forward)
            head = _trainable_copies(merged, slots)
            precisions = {name: merged.get_parameter(name).dtype for name in head}

            def loss_of(batch: Any) -> Tensor:
                own = {name: parameter.to(precisions[name]) for name, parameter in head.items()}
                return loss.of({**mixture.combine(stacked), **own}, batch)

            groups = [{"params": [mixture.values], "lr": mixture.step_length(learning_rate)}]
            if head:
                groups.append({"params": list(head.values()), "lr": head_learning_rate})
            mixture.loss_before, mixture.loss_after = minimize(loss_of, groups, batches, steps, progress)
    with torch.no_grad():
        state = merged.state_dict()
        for name, value in {**mixture.combine(stacked), **head}.items():
            state[name].copy_(value)
    return merged.train(first.training), mixture


def _weights(
    weights: Optional[Union[float, MergeWeights]],
    slots: Mapping[str, Slot],
    tensors: AdapterTensors,
    granularity: Granularity,
) -> MergeWeights:
    """Those given, for these tensors, or uniform ones."""
    if isinstance(weights, MergeWeights):
        if tuple(weights.adapters) != BACKBONES:
            raise ValueError(
                f"The merge weights are of {', '.join(weights.adapters)}; give those that merge_backbones has "
                f"returned, of {' and '.join(BACKBONES)}, or the first model's share."
            )
        return MergeWeights.from_dict(weights.as_dict(), slots)
    if weights is None:
        return MergeWeights.for_slots(BACKBONES, slots, tensors, granularity, simplex=True)
    if not isinstance(weights, (int, float)) or not 0 <= weights <= 1:
        raise ValueError(f"weights={weights!r} must be a number between 0 and 1: the share of the first model.")
    shares = {"granularity": "task", "simplex": False, "groups": [{"weights": [float(weights), 1 - float(weights)]}]}
    return MergeWeights.from_dict({"adapters": BACKBONES, **shares}, slots)


def _slots(model: PreTrainedModel, with_head: bool) -> dict[str, Slot]:
    """The tensors to merge, by their names in the model."""
    saved = model.state_dict().keys()
    slots = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_buffer = not isinstance(tensor, nn.Parameter)
        # Other integers are indices: they follow from the architecture.
        is_count = name.endswith("num_batches_tracked")
        if name not in saved or not (with_head or _in_backbone(model, name)):
            continue
        if not tensor.is_floating_point() and not is_count:
            continue
        layer, _, own_name = name.rpartition(".")
        module = model.get_submodule(layer)
        output_dim = int(isinstance(module, nn.modules.conv._ConvTransposeNd) and own_name == "weight")
        if tensor.dim() > 1 and (own_name != "weight" or tensor.shape[output_dim] == 1):
            # Tokens, position embeddings and scales end with their channels: (1, L, C).
            output_dim = tensor.dim() - 1
        slots[name] = Slot(layer, "", own_name, output_dim, "statistic" if is_buffer else "parameter")
    return slots


def _trainable_copies(model: PreTrainedModel, slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """Parameters that are not merged, as leaves: the head's, in float32, since Adam needs more than half precision."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name not in slots}
    return {
        name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True).requires_grad_()
        for name, parameter in parameters.items()
    }


def _tensors(model: PreTrainedModel, slots: Mapping[str, Slot], like: PreTrainedModel) -> AdapterTensors:
    """The tensors of a model, on the device and in the type of another's."""
    state, other = model.state_dict(), like.state_dict()
    return {name: state[name].to(other[name]) for name in slots}


def _with_head(model: PreTrainedModel, num_labels: Optional[int]) -> PreTrainedModel:
    """A copy of a model, with a fresh head if a number of labels is given."""
    if num_labels is None:
        return copy.deepcopy(model)
    if not hasattr(model, model.base_model_prefix):
        raise ValueError(
            f"num_labels={num_labels} asks for a fresh classifier, but a {type(model).__name__} has no backbone that "
            "it could be told from; load a model with a classifier, or leave num_labels out."
        )
    copied = copy.deepcopy(model)
    copied.config.num_labels = num_labels
    if hasattr(copied, "num_labels"):
        copied.num_labels = num_labels
    fresh = type(model)(copy.deepcopy(copied.config)).to(device=model.device, dtype=model.dtype)
    for name, module in fresh.named_children():
        if name != model.base_model_prefix:
            setattr(copied, name, module)
    return copied


def _in_backbone(model: PreTrainedModel, name: str) -> bool:
    prefix = model.base_model_prefix
    return not hasattr(model, prefix) or name.startswith(f"{prefix}.")


def _shapes(model: PreTrainedModel, backbone: bool) -> dict[str, tuple[int, ...]]:
    state: Mapping[str, Tensor] = model.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if _in_backbone(model, name) == backbone}


def _same_head(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    same_shapes = _shapes(first, backbone=False) == _shapes(second, backbone=False)
    return same_shapes and first.config.id2label == second.config.id2label


def _check_alike(first: PreTrainedModel, second: PreTrainedModel) -> None:
    """Raises a `ValueError` unless both models have one class and backbones of the same shapes and options."""
    if type(first) is not type(second):
        raise ValueError(
            f"The models are a {type(first).__name__} and a {type(second).__name__}; load both with one class."
        )
    shapes = _shapes(first, backbone=True), _shapes(second, backbone=True)
    differing = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    if differing:
        named = ", ".join(f"{name!r} ({shapes[0].get(name)} and {shapes[1].get(name)})" for name in differing[:3])
        raise ValueError(
            f"The models' backbones differ in {len(differing)} tensors: {named}; both need one architecture and size."
        )
    configs = _options(first), _options(second)
    for field in {**configs[0], **configs[1]}:
        if configs[0].get(field) != configs[1].get(field):
            raise ValueError(
                f"The models differ in {field} ({configs[0].get(field)!r} and {configs[1].get(field)!r}), so that the "
                "same tensors mean something else in each; both need one architecture and size."
            )


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of a model's configuration that say what it computes."""
    return {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in FREE_FIELDS and not any(part in name for part in TRAINING_FIELDS)
    }

"""Model soups: means of adapters that were trained for the same task, and the snapshots to make them of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .adapters import AdapterTensors, Slot, adapter_tensors
from .checks import check_finite, check_shapes
from .merge import combine


# Of an adapter's tensors; the greater, the better, as an accuracy on held-out images.
Score = Callable[[AdapterTensors], float]


@dataclass(frozen=True)
class Soup:
    """A mean of adapters.

    Args:
        tensors (`AdapterTensors`): The mean.
        ingredients (`tuple[int, ...]`): Places of the adapters that went into it, the best one first.
        score (`float`): Its score.
    """

    tensors: AdapterTensors
    ingredients: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class HierarchicalSoup:
    """A mean of soups of groups of adapters.

    Args:
        tensors (`AdapterTensors`): The mean.
        ingredients (`dict[str, tuple[int, ...]]`):
            Places in their group of the adapters that went into it, by group, the best group first.
        score (`float`): Its score.
        groups (`dict[str, Soup]`): The soup of each group, also of those that were not used.
    """

    tensors: AdapterTensors
    ingredients: dict[str, tuple[int, ...]]
    score: float
    groups: dict[str, Soup]


def average_adapters(adapters: Sequence[AdapterTensors], slots: Optional[Mapping[str, Slot]] = None) -> AdapterTensors:
    """The mean of adapters, with statistics as in a merge.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names, shapes and scalings.
        slots (`Optional[Mapping[str, Slot]]`):
            The tensors' kinds, as of `adapter_slots`. If `None`, integers are taken for counts of batches.

    Returns:
        `AdapterTensors`: Their mean; no view of any of them.

    Raises:
        ValueError: If there are no adapters, they differ in the names or shapes of their tensors, or one holds NaN or
            infinity.
    """
    _check_alike(adapters)
    return _average(adapters, slots)


@torch.no_grad()
def _average(adapters: Sequence[AdapterTensors], slots: Optional[Mapping[str, Slot]]) -> AdapterTensors:
    if slots is None:
        slots = {
            key: Slot(key, "", "", 0, "parameter" if tensor.is_floating_point() else "statistic")
            for key, tensor in adapters[0].items()
        }
    return combine(slots, adapters, torch.ones(len(adapters), dtype=torch.float64), "uniform")


def greedy_soup(adapters: Sequence[AdapterTensors], score: Score, slots: Optional[Mapping[str, Slot]] = None) -> Soup:
    """
    The mean of adapters that are taken in, from the best one down, as long as the mean does not get worse.

    Recipe 1 of Wortsman et al. 2022 (https://arxiv.org/abs/2203.05482). The soup is never worse than the best adapter.

    Args:
        adapters (`Sequence[AdapterTensors]`): The adapters' tensors, of the same names, shapes and scalings.
        score (`Callable[[AdapterTensors], float]`):
            Of an adapter's tensors; the greater, the better. Judge by images that were not trained on.
        slots (`Optional[Mapping[str, Slot]]`): The tensors' kinds, as in `average_adapters`.

    Returns:
        [`Soup`]: The mean and what went into it.

    Raises:
        ValueError: If there are no adapters, they differ in the names or shapes of their tensors, one holds NaN or
            infinity, or a score is not a number.
    """
    _check_alike(adapters)
    scores = [_checked(score(_average([adapter], slots)), f"Adapter {i}") for i, adapter in enumerate(adapters)]
    # A stable order: of equals the first given comes first.
    best, *others = sorted(range(len(adapters)), key=lambda place: -scores[place])
    soup = Soup(_average([adapters[best]], slots), (best,), scores[best])
    for place in others:
        ingredients = (*soup.ingredients, place)
        tensors = _average([adapters[i] for i in ingredients], slots)
        found = _checked(score(tensors), f"The mean of adapters {ingredients}")
        if found >= soup.score:
            soup = Soup(tensors, ingredients, found)
    return soup


def hierarchical_soup(
    groups: Mapping[str, Sequence[AdapterTensors]], score: Score, slots: Optional[Mapping[str, Slot]] = None
) -> HierarchicalSoup:
    """
    A greedy soup inside each group of adapters, and one of these soups.

    FissionFusion (Sanjeev et al. 2024, https://arxiv.org/abs/2403.13341), for training whose hyperparameters lead to
    different valleys: adapters are grouped by one hyperparameter, as the learning rate, and each group has one vote.

    Args:
        groups (`Mapping[str, Sequence[AdapterTensors]]`): The adapters' tensors by the name of their group.
        score (`Callable[[AdapterTensors], float]`): As in `greedy_soup`.
        slots (`Optional[Mapping[str, Slot]]`): The tensors' kinds, as in `average_adapters`.

    Returns:
        [`HierarchicalSoup`]: The mean and what went into it.

    Raises:
        ValueError: If there are no groups, one is empty, adapters differ in the names or shapes of their tensors, one
            holds NaN or infinity, or a score is not a number.
    """
    if not isinstance(groups, Mapping):
        raise ValueError(f"groups must be a mapping from names to lists of adapters' tensors, got {_shown(groups)}.")
    for name, adapters in groups.items():
        if not adapters:
            raise ValueError(f"Group {name!r} holds no adapters; give at least one or leave it out.")
    places = {f"{name}[{place}]": own for name, adapters in groups.items() for place, own in enumerate(adapters)}
    _check_alike(list(places.values()), list(places))
    soups = {name: greedy_soup(adapters, score, slots) for name, adapters in groups.items()}
    soup = greedy_soup([soup.tensors for soup in soups.values()], score, slots)
    names = [list(soups)[place] for place in soup.ingredients]
    return HierarchicalSoup(soup.tensors, {name: soups[name].ingredients for name in names}, soup.score, soups)


def _check_alike(adapters: Sequence[AdapterTensors], names: Optional[Sequence[str]] = None) -> None:
    """Raises a `ValueError` unless there are adapters, alike; without names they are called by their places."""
    if not adapters:
        raise ValueError("No adapters for a soup; give at least one.")
    whole = isinstance(adapters, (str, Mapping))
    wrong = [adapters] if whole else [own for own in adapters if not isinstance(own, Mapping)]
    if wrong:
        raise ValueError(
            f"A soup is made of a list of adapters' tensors, got {_shown(wrong[0])}; give such as of "
            "`adapter_tensors(model, name)`."
        )
    names = range(len(adapters)) if names is None else names
    check_shapes(adapters, names)
    check_finite(adapters, names)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def _checked(score: float, what: str) -> float:
    if math.isnan(score):
        raise ValueError(f"{what} has the score nan; a score must be a number that can be compared.")
    return float(score)


def cyclic_schedule(optimizer: Optimizer, steps_per_cycle: int, min_ratio: float = 0.0) -> LambdaLR:
    """
    A learning rate that falls from the optimizer's to a lower one by half a cosine in each cycle, and starts again.

    Huang et al. 2017 (https://arxiv.org/abs/1704.00109, equation 2), used for soups as in FissionFusion.

    Args:
        optimizer (`Optimizer`): The optimizer, with the greatest learning rate.
        steps_per_cycle (`int`): Steps of the optimizer in a cycle.
        min_ratio (`float`): What the rate falls to, as a part of the greatest; it would be reached with the step after
            the cycle's last one.

    Returns:
        `LambdaLR`: The schedule, to be stepped after each step of the optimizer, as `transformers.Trainer` does.

    Raises:
        ValueError: If `steps_per_cycle` is less than 1 or `min_ratio` is not between 0 and 1.
    """
    _check_cycle(steps_per_cycle)
    if not 0 <= min_ratio <= 1:
        raise ValueError(f"min_ratio={min_ratio} must be between 0 and 1.")

    def ratio(step: int) -> float:
        cosine = math.cos(math.pi * (step % steps_per_cycle) / steps_per_cycle)
        return min_ratio + (1 - min_ratio) * (1 + cosine) / 2

    return LambdaLR(optimizer, ratio)


class CyclicSnapshots(TrainerCallback):
    """
    Keeps a copy of the trained adapter at the end of each cycle of the learning rate, for a soup from one training.

    Args:
        steps_per_cycle (`int`): Steps of the optimizer in a cycle, as of [`cyclic_schedule`].
        adapter (`Optional[str]`): Name of the adapter; `None`: the one that is active.

    Attributes:
        snapshots (`list[AdapterTensors]`): The copies, on the CPU, the oldest first; emptied when training starts.
            They are not saved: training that goes on from a checkpoint gives those of the steps behind it.

    Raises:
        ValueError: If `steps_per_cycle` is less than 1; in training, if several adapters are active and none is named.

    Example:

        ```py
        >>> snapshots = CyclicSnapshots(steps_per_cycle=100)
        >>> schedule = cyclic_schedule(optimizer, steps_per_cycle=100)
        >>> Trainer(model, arguments, optimizers=(optimizer, schedule), callbacks=[snapshots], ...).train()
        >>> soup = greedy_soup(snapshots.snapshots, score)
        >>> set_adapter_tensors(model, "default", soup.tensors)
        ```
    """

    def __init__(self, steps_per_cycle: int, adapter: Optional[str] = None) -> None:
        _check_cycle(steps_per_cycle)
        self.steps_per_cycle = steps_per_cycle
        self.adapter = adapter
        self.snapshots: list[AdapterTensors] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.snapshots = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step % self.steps_per_cycle:
            return
        active = model.active_adapters if self.adapter is None else [self.adapter]
        if len(active) != 1:
            raise ValueError(f"Adapters {', '.join(active)} are active; name one by `adapter`.")
        tensors = adapter_tensors(model, active[0])
        self.snapshots.append({key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()})


def _check_cycle(steps_per_cycle: int) -> None:
    if steps_per_cycle < 1:
        raise ValueError(f"steps_per_cycle={steps_per_cycle} must be at least 1.")

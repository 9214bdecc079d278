"""The table of merge functions, and the checks that need no model.

A merge function is `(adapters: Sequence[AdapterTensors], weights: Tensor, **options) -> AdapterTensors`; its
keyword-only arguments are its options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Optional

import torch
from torch import Tensor

from .adapters import AdapterTensors
from .checks import check_shapes


Combine = Callable[..., AdapterTensors]
COMBINATIONS: dict[str, MergeFunction] = {}


@dataclass(frozen=True)
class MergeFunction:
    """A merge function and what a merge has to know about it.

    Args:
        name (`str`): Its name, a value of `combination_type`.
        function (`Callable`): The function itself.
        averages (`bool`):
            Whether the result is a mean, for which only the ratio of the weights counts, and not a weighted sum.
        default_weight (`Optional[float]`): Weight of each adapter if none are given; `None` is one over their number.
        proportions (`Optional[Callable]`):
            `(weights, **options) -> weights`, for a function that has proportions of its own in the place of weights.
        per_adapter (`Optional[str]`): Name of an option that holds tensors measured on each adapter.
        running (`Optional[Callable]`):
            For a function that can take adapters in one by one: of the number of adapters merged so far, the arguments
            of [`merge_adapters`] that merge the result so far and one more adapter into the result of all.
        running_first (`bool`): Whether that takes the first adapter of all too, between these two.
    """

    name: str
    function: Combine
    averages: bool = False
    default_weight: Optional[float] = None
    proportions: Optional[Callable[..., Tensor]] = None
    per_adapter: Optional[str] = None
    running: Optional[Callable[[int], dict[str, Any]]] = None
    running_first: bool = False

    def __call__(self, adapters: Sequence[AdapterTensors], weights: Tensor, **options: Any) -> AdapterTensors:
        return self.function(adapters, weights, **options)

    def effective_weights(self, weights: Tensor, options: Mapping[str, Any]) -> Tensor:
        """What statistics have to be averaged with, `(T,)`."""
        return weights if self.proportions is None else self.proportions(weights, **options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises a `ValueError` if an option does not exist or a required one is missing."""
        known = {
            name: parameter
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        named = f"its options are {', '.join(known)}" if known else "it has no options"
        for name in options:
            if name not in known:
                raise ValueError(f"combination_type={self.name!r} has no option {name!r}; {named}.")
        for name, parameter in known.items():
            if parameter.default is parameter.empty and options.get(name) is None:
                raise ValueError(f"combination_type={self.name!r} needs the option {name!r}; {named}.")

    def check_weights(self, weights: Optional[Sequence[float]], count: int) -> Tensor:
        """Merge weights as a tensor, `(count,)`; those that the function has by default if none are given."""
        if weights is None:
            return torch.full((count,), self.default_weight or 1 / count, dtype=torch.float64)
        if self.proportions is not None:
            able = ", ".join(repr(name) for name, known in COMBINATIONS.items() if known.proportions is None)
            raise ValueError(
                f"combination_type={self.name!r} takes no weights, got weights={weights!r}; leave them out, or choose "
                f"one of {able}."
            )
        return check_weights(weights, count, allow_negative=not self.averages)


def merge_function(**properties: Any) -> Callable[[Combine], Combine]:
    """Decorator that enters a merge function in `COMBINATIONS` under its own name, and has its weights checked.

    Args:
        properties: Fields of [`MergeFunction`].
    """

    def register(function: Combine) -> Combine:
        @wraps(function)
        def checked(adapters: Sequence[AdapterTensors], weights: Tensor, **options: Any) -> AdapterTensors:
            if not adapters:
                raise ValueError("No adapters to merge; give at least one.")
            check_shapes(adapters, range(len(adapters)))
            weights = weights if weights.is_floating_point() else weights.double()
            if entry.proportions is None:
                check_weight_tensor(weights, len(adapters), allow_negative=not entry.averages)
            return function(adapters, weights, **options)

        entry = COMBINATIONS[function.__name__] = MergeFunction(function.__name__, checked, **properties)
        return checked

    return register


def find_combination(combination_type: str) -> MergeFunction:
    """The merge function of a name.

    Raises:
        ValueError: If there is none.
    """
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type={combination_type!r} does not exist; choose one of "
            f"{', '.join(map(repr, COMBINATIONS))}."
        )
    return COMBINATIONS[combination_type]


def check_runs(combination_type: str) -> MergeFunction:
    """The merge function of a name, if it can take adapters in one by one.

    Raises:
        ValueError: If there is none, or it needs all adapters at once.
    """
    function = COMBINATIONS.get(combination_type)
    if function is None or function.running is None:
        able = ", ".join(repr(name) for name, known in COMBINATIONS.items() if known.running is not None)
        raise ValueError(
            f"combination_type={combination_type!r} needs all adapters at once; {able} take them in one by one."
        )
    return function


def check_weights(weights: Sequence[float], count: int, allow_negative: bool = False) -> Tensor:
    """Merge weights as a tensor, `(count,)`.

    Args:
        weights (`Sequence[float]`): The weights.
        count (`int`): Number of adapters.
        allow_negative (`bool`): Whether an adapter may be subtracted.

    Raises:
        ValueError: If there is not one weight for each adapter, one is not finite, all are zero, or one is negative
            where that is not allowed.
    """
    try:
        tensor = torch.as_tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.dim() != 1:
        raise ValueError(f"weights={weights!r} must be a list of numbers; give one weight for each adapter.")
    check_weight_tensor(tensor, count, allow_negative)
    return tensor


def check_weight_tensor(weights: Tensor, count: int, allow_negative: bool = False) -> None:
    """Raises a `ValueError` as `check_weights` does; weights may be what gradients are taken of.

    Args:
        weights (`Tensor`): The weights, `(count,)`.
        count (`int`): Number of adapters.
        allow_negative (`bool`): Whether an adapter may be subtracted.
    """
    if weights.dim() != 1:
        raise ValueError(
            f"weights of shape {tuple(weights.shape)} for {count} adapters; give one weight for each adapter."
        )
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} adapters; give one weight for each adapter.")
    try:
        values = weights.detach().tolist()
    except RuntimeError:
        # Nobody can look at them: inside `torch.func.vmap`, or on the meta device.
        return
    if not all(map(math.isfinite, values)) or not any(values):
        raise ValueError(f"Merge weights must be finite and not all zero, got {values}.")
    if not allow_negative and min(values) < 0:
        raise ValueError(f"Merge weights must not be negative for a mean of the adapters, got {values}.")


def is_between(value: Any, least: float, greatest: float) -> bool:
    """Whether an option is a number between two others or one of them."""
    try:
        return bool(least <= value <= greatest)
    except TypeError:
        return False

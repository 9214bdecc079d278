"""Options of a merge function as the arguments give them: read, and tried out before anything is trained."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any, Union

import torch

from ..merging import MergeFunction


# What is measured of each adapter, or what training started from: filled in at each merge.
FILLED_IN = ("fisher", "grams", "base")


def read_options(given: Union[str, Mapping[str, Any], None]) -> dict[str, Any]:
    """Options of a merge function: as they are from YAML, as JSON from the command line.

    Args:
        given (`Union[str, Mapping[str, Any], None]`): What `merge_options` holds.

    Raises:
        ValueError: If it is no mapping.
    """
    try:
        options = json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"merge_options={given!r} is no JSON ({error}); write it as in '{{\"density\": 0.5}}'."
        ) from error
    if not isinstance(options, Mapping):
        raise ValueError(f"merge_options={given!r} is no mapping; write it as in '{{\"density\": 0.5}}'.")
    return dict(options)


def filled_in(function: MergeFunction) -> list[str]:
    """Which options of a merge function no user gives."""
    known = inspect.signature(function.function).parameters
    return [name for name in FILLED_IN if name in known]


def check_options(name: str, function: MergeFunction, options: Mapping[str, Any]) -> None:
    """Merges two adapters of four numbers, so that a bad option does not show after the first task only.

    Args:
        name (`str`): What `merge` is.
        function (`MergeFunction`): Its merge function.
        options (`Mapping[str, Any]`): The options that the user gave.

    Raises:
        ValueError: If an option does not exist, is missing, is not the user's to give, or has a bad value.
    """
    measured = filled_in(function)
    for option in options:
        if option in measured:
            raise ValueError(f"merge_options must not hold {option!r}, which is measured at each merge; leave it out.")
    tensors = [{"weight": value * torch.eye(2)} for value in (1.0, -2.0)]
    values = {"fisher": [{"weight": torch.ones(2, 2)}] * 2, "grams": [{"weight": torch.eye(2)}] * 2}
    values["base"] = {"weight": torch.zeros(2, 2)}
    everything = {**options, **{option: values[option] for option in measured}}
    function.check_options(everything)
    if not options:
        return
    try:
        function(tensors, function.check_weights(None, len(tensors)), **everything)
    except (TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"merge_options={dict(options)} are of no use for merge={name!r}: {error}.") from error

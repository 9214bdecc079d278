"""Merge weights as plain numbers: read with care, and kept in a file beside the adapter."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from huggingface_hub import hf_hub_download
from peft.utils import CONFIG_NAME
from torch import Tensor

from .groups import WeightGroup, check_granularity


MERGE_WEIGHTS_NAME = "merge_weights.json"


def read_groups(data: Any) -> tuple[list[WeightGroup], Tensor]:
    """The groups and weights of what `MergeWeights.as_dict` gave.

    Args:
        data (`Any`): The description.

    Returns:
        `tuple[list[WeightGroup], Tensor]`: The groups, and their weights side by side, `(T, number a task)`.

    Raises:
        ValueError: If something is missing, or weights are no finite numbers or not as many as the adapters.
    """
    fields = ("adapters", "granularity", "simplex", "groups")
    missing = [name for name in fields if name not in data] if isinstance(data, Mapping) else list(fields)
    if missing:
        raise ValueError(f"Merge weights need {', '.join(map(repr, missing))}, as `as_dict` gives them.")
    check_granularity(data["granularity"])
    if not _is_list(data["adapters"]) or not all(isinstance(name, str) for name in data["adapters"]):
        raise ValueError(f"'adapters' of merge weights must be a list of names, got {data['adapters']!r}.")
    if not _is_list(data["groups"]) or not data["groups"]:
        raise ValueError("'groups' of merge weights must be a list that is not empty, as `as_dict` gives it.")
    groups, columns = [], []
    for entry in data["groups"]:
        if not isinstance(entry, Mapping) or "weights" not in entry:
            raise ValueError(f"A group of merge weights must be a mapping with 'weights', got {entry!r}.")
        places = {name: entry.get(name, "") for name in ("layer", "container", "tensor")}
        name = WeightGroup(**places).name or "all layers"
        weights = _weights(entry["weights"], len(data["adapters"]), name, bool(data["simplex"]))
        groups.append(WeightGroup(**places, channels=weights.shape[1] if weights.dim() == 2 else 0))
        columns.append(weights.reshape(len(data["adapters"]), -1))
    twice = [name for name, count in Counter(group.name for group in groups).items() if count > 1]
    if twice:
        raise ValueError(f"Merge weights of {twice[0] or 'all layers'!r} are given more than once.")
    return groups, torch.cat(columns, dim=1)


def _weights(given: Any, count: int, name: str, simplex: bool) -> Tensor:
    """Weights of one group, `(T,)` or `(T, channels)`."""
    try:
        weights = torch.tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Merge weights of {name!r} are no table of numbers: {error}.") from error
    if weights.dim() not in (1, 2) or len(weights) != count or weights.shape[-1] == 0:
        raise ValueError(
            f"Merge weights of {name!r} have shape {tuple(weights.shape)}; for {count} adapters they need ({count},) "
            f"or ({count}, channels)."
        )
    if not weights.isfinite().all():
        raise ValueError(f"Merge weights of {name!r} must be finite, got {weights.tolist()}.")
    if simplex and ((weights < 0).any() or ((weights.sum(dim=0) - 1).abs() > 1e-3).any()):
        raise ValueError(f"Merge weights of {name!r} are said to be on the simplex: positive, with a sum of one.")
    return weights


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def write_weights(data: Mapping[str, Any], save_directory: Union[str, os.PathLike]) -> None:
    """Writes the description of merge weights into a folder, which is made if need be.

    Raises:
        ValueError: If there is a file in the place of the folder.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"save_directory={str(folder)!r} is a file; give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MERGE_WEIGHTS_NAME).write_text(json.dumps(data, indent=2, sort_keys=True), encoding="utf-8")


def find_weights(source: Union[str, os.PathLike], subfolder: Optional[str] = None, **download: Any) -> dict[str, Any]:
    """The description of merge weights in a folder or a repository of the Hub: of a file of their own, or else what
    the adapter's configuration says.

    Args:
        source (`Union[str, os.PathLike]`): The folder, or the repository's id.
        subfolder (`Optional[str]`): Where in it.
        download: Keyword arguments of `hf_hub_download`.

    Raises:
        ValueError: If there are none.
    """
    folder = Path(source, subfolder or "")
    failure: Optional[Exception] = None
    for name in (MERGE_WEIGHTS_NAME, CONFIG_NAME):
        path = folder / name
        if not folder.is_dir():
            try:
                path = Path(hf_hub_download(str(source), name, subfolder=subfolder, **download))
            except Exception as error:
                # As in PEFT: of what kind it is depends on where the file is not, but one error is the caller's.
                failure = error
                continue
        if path.is_file():
            data = json.loads(path.read_text(encoding="utf-8"))
            data = data if name == MERGE_WEIGHTS_NAME else data.get("merge_weights")
            if data is not None:
                return data
    raise ValueError(
        f"There are no merge weights at {str(folder)!r}: neither a {MERGE_WEIGHTS_NAME}, as "
        f"`MergeWeights.save_pretrained` writes it, nor 'merge_weights' in an {CONFIG_NAME}."
    ) from failure

"""What a run is: all that decides on its outcome, to be compared before it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import accelerate
import peft
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

from ..data import ClassIncrementalScenario, LabelledImages
from ..methods import Method
from ..version import __version__


# So many images of a data set are compared, evenly spread; of all others, labels and rows.
COMPARED_IMAGES = 256


# Options that say where things are; these may have moved.
PLACES = {"offload_adapters"}


def versions() -> dict[str, str]:
    """Of the libraries that compute."""
    modules = (torch, transformers, peft, accelerate)
    return {"dynammo_peft": __version__, **{module.__name__: module.__version__ for module in modules}}


def describe_run(method: Method, scenario: ClassIncrementalScenario, accelerator: Accelerator) -> dict[str, Any]:
    """All that decides on a run's outcome, as JSON has it; batch sizes are those of all processes together.

    Args:
        method (`Method`): As it is before it has learned anything in this run.
        scenario (`ClassIncrementalScenario`): What it will learn.
        accelerator (`Accelerator`): Where and how.
    """
    arguments = {
        name: value * accelerator.num_processes if name.endswith("batch_size") else value
        for name, value in asdict(method.arguments).items()
        if name not in PLACES
    }
    config = getattr(method, "config", None)
    fields = {
        "method": method.name,
        **arguments,
        **{f"adapter: {name}": value for name, value in (config.to_dict() if config is not None else {}).items()},
        "classes": scenario.groups,
        "classes learned before": scenario.learned_classes,
        "augmentation": asdict(scenario.transform),
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        "backbone": digest(method.model.state_dict()),
        "training images": _digest_images(scenario.train),
        "test images": _digest_images(scenario.test),
        "tasks of the images": digest({"train": scenario.tasks_of_train, "test": scenario.tasks_of_test}),
    }
    return json.loads(json.dumps(fields, default=_plain))


def check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any], path: str) -> None:
    """Raises a `ValueError` that names the first field in which a run differs from that of a checkpoint."""
    for name in {**saved, **own}:
        before, now = (fields.get(name, "nothing") for fields in (saved, own))
        if before != now:
            raise ValueError(
                f"{path} is of another run: {name} was {_short(before)} and is {_short(now)} now; give it the old "
                "value, or start anew in another folder."
            )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types and values."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def _digest_images(images: LabelledImages) -> str:
    step = max(1, len(images) // COMPARED_IMAGES)
    some = images.select(torch.arange(0, len(images), step))
    return digest({"images": some.images, "labels": images.labels, "rows": images.rows})


def _plain(value: Any) -> Any:
    """What JSON does not know: sets of names, types and the like."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

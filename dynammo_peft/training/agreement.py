"""Whether all processes hold the same."""

from __future__ import annotations

import json
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data import Task
from ..methods import Method
from .identity import digest
from .method_state import adapter_state, changing_adapters
from .results import Results


def check_agreement(accelerator: Accelerator, method: Method, task: Task, results: Results) -> None:
    """Compares what the processes have learned, by hashes.

    Args:
        accelerator (`Accelerator`): Of the run.
        method (`Method`): Has learned `task`.
        task (`Task`): The task.
        results (`Results`): With those of the task.

    Raises:
        RuntimeError: If processes differ; names in what, and which.
    """
    if accelerator.num_processes == 1:
        return
    every: list[dict[str, str]] = gather_object([_digests(method, results)])
    for part, value in every[0].items():
        others = [str(index) for index, own in enumerate(every) if own.get(part) != value]
        if others:
            raise RuntimeError(
                f"After task {task.index} the processes no longer agree: process {', '.join(others)} differs from "
                f"process 0 in {part}. All processes need the same files, options and versions of libraries."
            )


def _digests(method: Method, results: Results) -> dict[str, str]:
    values, tensors = method.state()
    parts: dict[str, Any] = {}
    for name in sorted(changing_adapters(method)):
        parts[f"adapter {name!r}"] = digest(adapter_state(method.model, name))
    parts |= {key: json.dumps(value) for key, value in values.items()}
    parts |= {key: digest({key: tensor}) for key, tensor in tensors.items()}
    return {**parts, "the measures": json.dumps(results.metrics())}

"""The state of all sources of randomness, of every process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


def random_states(accelerator: Accelerator) -> list[dict[str, Any]]:
    """The state of each process's sources, on all processes; plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if accelerator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return gather_object([state])


def restore_random_states(states: list[dict[str, Any]], accelerator: Accelerator) -> None:
    """Goes on where `random_states` was called, unless there are other processes now.

    Batches and augmentation are drawn from seeds of their own, so that only dropout would draw other numbers.

    Args:
        states (`list[dict[str, Any]]`): From `random_states`.
        accelerator (`Accelerator`): Knows which of them is this process's.
    """
    if len(states) != accelerator.num_processes:
        return
    state = states[accelerator.process_index]
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], accelerator.device)

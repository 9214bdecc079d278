"""Which images are trained on in which step: the same for any number of processes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def derived_seed(*parts: int) -> int:
    """A seed that follows from others, as of the run, the task, the stage and the epoch; none repeats another's."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def number_of_batches(images: int, batch_size: int) -> int:
    """Batches in an epoch."""
    return math.ceil(images / batch_size)


def deal(images: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """An epoch's batches: every image once, in random order, in batches that differ in size by one at most.

    Equal sizes leave no small last batch, whose few images would have more weight than others, and no batch of one
    image, which BatchNorm cannot normalise.

    Args:
        images (`int`): How many there are.
        batch_size (`int`): Most images in a batch, of all processes together.
        generator (`torch.Generator`): The source of randomness, on the CPU.

    Returns:
        `list[Tensor]`: Places of the images of each batch.
    """
    order = torch.randperm(images, generator=generator)
    return list(order.tensor_split(number_of_batches(images, batch_size)))


def share(batch: Tensor, process_index: int, num_processes: int) -> Tensor:
    """One process's part of a batch; the parts differ in size by one at most."""
    return batch.tensor_split(num_processes)[process_index]


def check_shares(images: int, batch_size: int, num_processes: int) -> None:
    """Raises a `ValueError` if a process would have no image in a step.

    Args:
        images (`int`): How many there are.
        batch_size (`int`): Most images in a batch, of all processes together.
        num_processes (`int`): Number of processes.
    """
    if images // number_of_batches(images, batch_size) < num_processes:
        raise ValueError(
            f"{images} images in batches of at most {batch_size} are too few for {num_processes} processes; start "
            "fewer processes, or raise the batch size."
        )

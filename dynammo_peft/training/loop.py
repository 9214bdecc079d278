"""One training loop over Accelerate: the stage of a task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor

from ..data import BatchTransform, data_loader
from ..methods import Stage
from .batch_norm import global_batch_norm
from .batches import check_shares, deal, derived_seed, number_of_batches, share
from .sharded import is_sharded, prepare, take_back, training_copy
from .trained import restore_tensors, trained_tensors


class TrainingLoop:
    """
    Trains a stage, step by step, and can tell after each step what it takes to go on from there.

    Args:
        stage (`Stage`): What to train.
        accelerator (`Accelerator`): Where and how.
        transform (`BatchTransform`): Augments and normalises images.
        seed (`int`): Decides on the batches and the augmentation.
        running (`Optional[Mapping[str, Any]]`): From `state` of a loop of the same stage, to go on from there.
        num_workers (`int`): Processes that read images ahead.

    Attributes:
        epoch (`int`): The epoch that the next step belongs to.
        batch (`int`): The next step's place in it.
        batches (`int`): Steps in an epoch.
        epochs (`int`): Epochs in all.

    Raises:
        ValueError: If there are too few images for the number of processes, or the state is another stage's.
    """

    def __init__(
        self,
        stage: Stage,
        accelerator: Accelerator,
        transform: BatchTransform,
        seed: int,
        running: Optional[Mapping[str, Any]] = None,
        num_workers: int = 0,
    ) -> None:
        if is_sharded(accelerator):
            # Of a stage that was not sharded then; it starts anew.
            running = None
        self.stage, self.accelerator, self.transform, self.seed = stage, accelerator, transform, seed
        self.num_workers = num_workers
        self.batch_size = stage.optimization.batch_size * accelerator.num_processes
        check_shares(len(stage.data), self.batch_size, accelerator.num_processes)
        self.batches = number_of_batches(len(stage.data), self.batch_size)
        updates = math.ceil(self.batches / accelerator.gradient_accumulation_steps)
        self.epochs = stage.optimization.epochs_of(updates)
        self.epoch = self.batch = 0
        stage.network.train()
        if running is not None:
            restore_tensors(stage.network, running["trained"])
        # The stage's own network, unless training shards it.
        self.trained = training_copy(accelerator, stage.network)
        optimizer, self.scheduler = stage.optimization.make(self.trained, self.epochs * updates)
        self.network, self.optimizer = prepare(accelerator, self.trained, optimizer, stage.optimization.batch_size)
        # Loss and hits, summed over this process's images of the epoch, and how many these were.
        self.totals = torch.zeros(2, device=accelerator.device)
        self.images = 0
        if running is not None:
            self._restore(running)

    def __len__(self) -> int:
        """Steps in all."""
        return self.epochs * self.batches

    @property
    def done(self) -> int:
        """Steps so far."""
        return self.epoch * self.batches + self.batch

    def __iter__(self) -> Iterator[Optional[tuple[float, float]]]:
        """Takes all steps that are left; yields after each, at an epoch's end its mean loss and accuracy."""
        with global_batch_norm(self.trained, self.accelerator.num_processes):
            while self.epoch < self.epochs:
                # A stage's code may have asked the model for something since.
                self.network.train()
                for inputs, labels, images in self._epoch():
                    self._step(inputs, labels, images)
                    self.batch += 1
                    yield self._end_epoch() if self.batch == self.batches else None

    @property
    def has_state(self) -> bool:
        """Whether `state` can be taken: gradients not yet used would get lost, and pieces stay where they are."""
        return self.accelerator.sync_gradients and not is_sharded(self.accelerator)

    def state(self) -> dict[str, Any]:
        """What `running` takes; called by all processes."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "totals": self._sum_totals(),
            "trained": trained_tensors(self.stage.network),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
        }

    def end(self) -> dict[str, Tensor]:
        """Takes Accelerate's wrappers off, since the next stage trains other parameters and needs new ones.

        Returns:
            `dict[str, Tensor]`: What was trained.
        """
        network = self.stage.network
        take_back(self.accelerator, network, self.network)
        self.accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
        # Accelerate would take a network with this mark for wrapped, and leave it alone.
        vars(network).pop("_is_accelerate_prepared", None)
        self.accelerator.free_memory()
        trained = trained_tensors(network)
        network.eval()
        return trained

    def mean_loss_and_accuracy(self) -> tuple[float, float]:
        """Of this process's images in the epoch so far."""
        loss, hits = (self.totals / max(self.images, 1)).tolist()
        return loss, hits

    def _restore(self, running: Mapping[str, Any]) -> None:
        self.epoch, self.batch = running["epoch"], running["batch"]
        self.optimizer.load_state_dict(running["optimizer"])
        self.scheduler.load_state_dict(running["scheduler"])
        if self.accelerator.scaler is not None and running["scaler"]:
            self.accelerator.scaler.load_state_dict(running["scaler"])
        if self.accelerator.is_main_process:
            *_, images = running["totals"].tolist()
            self.totals, self.images = running["totals"][:2].to(self.totals), int(images)

    def _epoch(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """The rest of an epoch: this process's inputs and labels, and how many images the whole update has."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        batches = deal(len(self.stage.data), self.batch_size, generator)
        drawn = self.transform.draw(len(self.stage.data), generator)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        rest = batches[self.batch :]
        own = [share(batch, process, processes) for batch in rest]
        # A checkpoint is written behind an update, so that the rest begins with one; an epoch's end makes an update.
        sizes, accumulated = [len(batch) for batch in rest], self.accelerator.gradient_accumulation_steps
        first_of_updates = [index - index % accumulated for index in range(len(rest))]
        images = [sum(sizes[first : first + accumulated]) for first in first_of_updates]
        # Accelerate counts on from where an interrupted run left it.
        self.accelerator.step = 0
        batch_sampler = [batch.tolist() for batch in own]
        # Workers get other seeds in each epoch, which a resumed run draws again.
        loader = data_loader(self.stage.data, 1, self.num_workers, batch_sampler=batch_sampler, generator=generator)
        # Sharded already: Accelerate would fill up or leave out what does not divide.
        loader = prepare_data_loader(
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
        )
        # The loader first: once it is asked for more and has none, Accelerate lets go of it.
        for (inputs, labels), places, of_update in zip(loader, own, images):
            if inputs.dtype == torch.uint8:
                inputs = self.transform(inputs, drawn[places])
            yield inputs, labels, of_update

    def _step(self, inputs: Tensor, labels: Tensor, images: int) -> None:
        accelerator = self.accelerator
        with accelerator.accumulate(self.network):
            loss, met = self.stage.observe(self.network, inputs, labels)
            # Gradients are averaged over processes and as many batches as are accumulated at most, where an epoch's
            # last update may have fewer: every image of the update shall count the same.
            parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
            accelerator.backward(loss * (len(labels) * parts / images))
            self.optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            self.optimizer.zero_grad()
        self.totals += torch.stack([loss.detach() * len(labels), met.sum()])
        self.images += len(labels)

    def _end_epoch(self) -> tuple[float, float]:
        loss, hits, images = self._sum_totals().tolist()
        self.epoch, self.batch = self.epoch + 1, 0
        self.totals, self.images = torch.zeros_like(self.totals), 0
        return loss / images, hits / images

    def _sum_totals(self) -> Tensor:
        """Loss, hits and images of all processes."""
        return self.accelerator.reduce(torch.cat([self.totals, self.totals.new_tensor([self.images])]))

"""The task loop over Accelerate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Optional

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import ClassIncrementalScenario, LabelledImages, Task, data_loader
from ..methods import Method, Stage
from .results import Results


class Learner:
    """
    Runs a method on a sequence of tasks: trains its stages, then scores the test images of all classes seen.

    Device placement, several processes, mixed precision, gradient accumulation and trackers are Accelerate's.

    Args:
        method (`Method`): What to train in each task.
        accelerator (`Optional[Accelerator]`): Where and how; Accelerate's defaults if `None`.
        eval_batch_size (`int`): Test images a process and step.
        progress (`bool`): Whether to show progress bars (only ever on the main process).

    Example:

        ```py
        >>> learner = Learner(Dynammo(model))
        >>> results = learner.fit(scenario)
        >>> results.metrics()["last_accuracy"]
        0.83
        ```
    """

    def __init__(
        self,
        method: Method,
        accelerator: Optional[Accelerator] = None,
        eval_batch_size: int = 64,
        progress: bool = True,
    ) -> None:
        self.method = method
        self.accelerator = accelerator if accelerator is not None else Accelerator()
        self.eval_batch_size = eval_batch_size
        self.progress = progress and self.accelerator.is_main_process
        self._step = 0

    def fit(
        self,
        scenario: ClassIncrementalScenario,
        after_task: Optional[Callable[[Task, Results], None]] = None,
    ) -> Results:
        """
        Learns all tasks.

        Args:
            scenario (`ClassIncrementalScenario`): The tasks.
            after_task (`Optional[Callable]`): Called on every process after each task was learned and scored.

        Returns:
            `Results`: Predictions on the test images of all classes seen, after each task.

        Raises:
            ValueError: If the method cannot learn the scenario; nothing was trained then.
        """
        set_seed(self.method.arguments.seed)
        self.method.begin(scenario, self.accelerator)
        results, seen, offset = self._begin_results(scenario)
        for task in scenario:
            # What a task draws does not depend on what was learned before in this process or in another.
            set_seed(self.method.arguments.seed + task.index)
            start = time.perf_counter()
            for stage in self.method.learn(task):
                self._run(stage, f"Task {task.index + 1}/{len(scenario)}", scenario)
            seconds = time.perf_counter() - start
            seen.append(task.test)
            results.add(task.index - offset, *self._score(seen, scenario), seconds)
            measures = results.metrics()
            self.accelerator.log(
                {name: value for name, value in measures.items() if isinstance(value, float)}
                | {"task": task.index, "task_seconds": seconds},
                step=self._step,
            )
            if after_task is not None:
                after_task(task, results)
        return results

    def _begin_results(self, scenario: ClassIncrementalScenario) -> tuple[Results, list[LabelledImages], int]:
        """Results so far, the test images of the classes learned before, and the index of the first task measured."""
        first, coming = scenario.first_task, scenario.groups[scenario.first_task :]
        learned = scenario.class_names[: scenario.learned_classes]
        if not first or not len(scenario.learned_test):
            return Results(groups=coming, learned=learned), [], first
        results, seen = Results(groups=[learned, *coming], learned=learned), [scenario.learned_test]
        results.add(0, *self._score(seen, scenario), seconds=0.0)
        return results, seen, first - 1

    def _score(self, seen: list[LabelledImages], scenario: ClassIncrementalScenario) -> tuple[list[int], list[int]]:
        """Predicted and true classes, numbered as in the results."""
        predictions, references = self._predict(LabelledImages.concatenate(seen), scenario)
        if len(scenario.learned_test):
            return predictions, references
        # Without test images of them, classes learned before stand behind all others.
        first, count = scenario.learned_classes, scenario.num_classes
        return [(label - first) % count for label in predictions], [(label - first) % count for label in references]

    def _run(self, stage: Stage, title: str, scenario: ClassIncrementalScenario) -> None:
        """One training loop."""
        accelerator = self.accelerator
        epochs, batch_size = stage.optimization.epochs, stage.optimization.batch_size
        # BatchNorm cannot normalise a batch of one.
        drop_last = len(stage.data) > batch_size and len(stage.data) % batch_size == 1
        loader = DataLoader(stage.data, batch_size=batch_size, shuffle=True, drop_last=drop_last)
        updates = epochs * math.ceil(len(loader) / accelerator.gradient_accumulation_steps)
        optimizer, scheduler = stage.optimization.make(stage.network, updates)
        network, optimizer, loader, scheduler = accelerator.prepare(stage.network, optimizer, loader, scheduler)
        bar = tqdm(total=epochs * len(loader), disable=not self.progress, leave=False)
        for epoch in range(epochs):
            network.train()
            epoch_loss, hits = torch.zeros(2, device=accelerator.device)
            count = 0
            for inputs, labels in loader:
                if inputs.dtype == torch.uint8:
                    inputs = scenario.transform(inputs, augment=True)
                with accelerator.accumulate(network):
                    loss, met = stage.observe(network, inputs, labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                epoch_loss += loss.detach() * len(labels)
                hits += met.sum()
                count += len(labels)
                self._step += 1
                bar.update()
                if bar.n % 10 == 0 or bar.n == bar.total:
                    bar.set_description(f"{title}, {stage.name}, epoch {epoch + 1}/{epochs}")
                    bar.set_postfix(loss=f"{float(epoch_loss) / count:.3f}", accuracy=f"{float(hits) / count:.3f}")
            self._log_epoch(stage.name, epoch_loss, hits, count)
        bar.close()
        self._release(stage.network, network)

    def _log_epoch(self, stage: str, loss: Tensor, hits: Tensor, count: int) -> None:
        """Means over all processes, to the trackers."""
        totals = torch.stack([loss.double(), hits.double(), loss.new_tensor(count).double()])
        loss_sum, hits_sum, count_sum = self.accelerator.reduce(totals).tolist()
        self.accelerator.log(
            {f"{stage}/loss": loss_sum / count_sum, f"{stage}/accuracy": hits_sum / count_sum}, step=self._step
        )

    def _release(self, network: nn.Module, prepared: nn.Module) -> None:
        """Takes Accelerate's wrappers off again: the next stage trains other parameters and needs new ones."""
        self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        # Accelerate would take a network with this mark for wrapped, and leave it alone.
        vars(network).pop("_is_accelerate_prepared", None)
        self.accelerator.free_memory()
        with torch.no_grad():
            # Each process has seen other images, so running statistics differ.
            for module in network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                    for statistic in (module.running_mean, module.running_var):
                        statistic.copy_(self.accelerator.reduce(statistic, reduction="mean"))
        network.eval()

    @torch.no_grad()
    def _predict(self, images: LabelledImages, scenario: ClassIncrementalScenario) -> tuple[list[int], list[int]]:
        """Predicted and true classes of images, on every process."""
        loader = self.accelerator.prepare_data_loader(data_loader(images, self.eval_batch_size))
        predictions, references = [], []
        self.method.model.eval()
        for batch, labels in loader:
            with self.accelerator.autocast():
                predicted = self.method.logits(scenario.transform(batch)).argmax(dim=1)
            predicted, labels = self.accelerator.gather_for_metrics((predicted, labels))
            predictions += predicted.tolist()
            references += labels.tolist()
        # Accelerate would hold on to the loader, and so to the images.
        self.accelerator.free_memory()
        return predictions, references

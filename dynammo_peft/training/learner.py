"""The task loop over Accelerate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from ..data import ClassIncrementalScenario, LabelledImages, Task, data_loader
from ..methods import Method, Stage
from .agreement import check_agreement
from .batches import derived_seed
from .checkpoint import Checkpoints, Position
from .loop import TrainingLoop
from .results import Results
from .trained import restore_tensors


class Learner:
    """
    Runs a method on a sequence of tasks: trains its stages, then scores the test images of all classes seen.

    Device placement, several processes, mixed precision, gradient accumulation and trackers are Accelerate's.

    The outcome does not depend on the number of processes, up to rounding: they share each batch, BatchNorm sees all
    of it, and what is drawn for an image is drawn for its place in the epoch. Batch sizes are those of one process.

    Args:
        method (`Method`): What to train in each task.
        accelerator (`Optional[Accelerator]`): Where and how; Accelerate's defaults if `None`.
        eval_batch_size (`int`): Test images a process and step.
        progress (`bool`): Whether to show progress bars (only ever on the main process).
        checkpoints (`Optional[Checkpoints]`): Where to save what it takes to resume; nowhere if `None`.
        dataloader_num_workers (`int`): Processes that read training images ahead; see [`~data.data_loader`].

    Raises:
        ValueError: If a number is too small, or Accelerate would not end an update with an epoch or give processes
            unequal numbers of batches.

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
        checkpoints: Optional[Checkpoints] = None,
        dataloader_num_workers: int = 0,
    ) -> None:
        for name, value, least in (
            ("eval_batch_size", eval_batch_size, 1),
            ("dataloader_num_workers", dataloader_num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        self.method = method
        self.accelerator = accelerator if accelerator is not None else Accelerator()
        if not self.accelerator.gradient_state.sync_with_dataloader:
            raise ValueError(
                "sync_with_dataloader=False is not supported; leave it out of the GradientAccumulationPlugin."
            )
        # Processes would wait for each other's features and predictions: some would have a batch less.
        if not self.accelerator.even_batches:
            raise ValueError("even_batches=False is not supported; leave it out of the DataLoaderConfiguration.")
        self.eval_batch_size = eval_batch_size
        self.progress = progress and self.accelerator.is_main_process
        self.checkpoints = checkpoints
        self.dataloader_num_workers = dataloader_num_workers
        self._position = Position()

    def fit(
        self,
        scenario: ClassIncrementalScenario,
        after_task: Optional[Callable[[Task, Results], None]] = None,
        resume_from_checkpoint: Optional[str] = None,
    ) -> Results:
        """
        Learns all tasks.

        Args:
            scenario (`ClassIncrementalScenario`): The tasks.
            after_task (`Optional[Callable]`): Called on every process after each task was learned and scored.
            resume_from_checkpoint (`Optional[str]`): Path of a checkpoint, or `"latest"`: the newest of `checkpoints`,
                and if there is none yet, learning begins.

        Returns:
            `Results`: Predictions on the test images of all classes seen, after each task.

        Raises:
            ValueError: If the method cannot learn the scenario, or the checkpoint is of another run; nothing was
                trained then.
            CheckpointError: If a checkpoint cannot be written or read.
            RuntimeError: If processes come to different results.
        """
        if resume_from_checkpoint is not None and self.checkpoints is None:
            raise ValueError("resume_from_checkpoint needs the learner's checkpoints; give it Checkpoints(directory).")
        set_seed(self.method.arguments.seed)
        self.method.begin(scenario, self.accelerator)
        results, seen, offset = self._begin_results(scenario)
        self._position = Position(task=scenario.first_task)
        try:
            if self.checkpoints is not None:
                begun = (self.method, scenario, self.accelerator, results, resume_from_checkpoint)
                self._position = self.checkpoints.begin(*begun)
            # Nothing need be trained before it is used.
            self.method.model.to(self.accelerator.device)
            if scenario.first_task == self._position.task:
                self._score_learned(scenario, results, seen)
            self._learn_tasks(scenario, results, seen, offset, after_task)
        finally:
            if self.checkpoints is not None:
                self.checkpoints.end()
        return results

    def _learn_tasks(
        self,
        scenario: ClassIncrementalScenario,
        results: Results,
        seen: list[LabelledImages],
        offset: int,
        after_task: Optional[Callable[[Task, Results], None]],
    ) -> None:
        """Learns and scores the tasks from where it stands; test images of those before are added to `seen`."""
        for task in scenario:
            if task.index < self._position.task:
                seen.append(task.test)
                continue
            seconds = self._learn(task, scenario)
            seen.append(task.test)
            results.add(task.index - offset, *self._score(seen, scenario, results), seconds, _tasks_of(seen))
            check_agreement(self.accelerator, self.method, task, results)
            step = self._position.step
            self._position = Position(task=task.index + 1, step=step)
            if self.checkpoints is not None:
                self.checkpoints.after_task(task.index + 1, step)
            self._log_task(task, results, seconds)
            if after_task is not None:
                after_task(task, results)

    def _log_task(self, task: Task, results: Results, seconds: float) -> None:
        measures = {name: value for name, value in results.metrics().items() if isinstance(value, float)}
        self.accelerator.log({**measures, "task": task.index, "task_seconds": seconds}, step=self._position.step)

    def _begin_results(self, scenario: ClassIncrementalScenario) -> tuple[Results, list[LabelledImages], int]:
        """Empty results, the test images of the classes learned before, and the index of the first task measured."""
        first, coming = scenario.first_task, scenario.groups[scenario.first_task :]
        learned = scenario.class_names[: scenario.learned_classes]
        if not first or not len(scenario.learned_test):
            return Results(groups=coming, learned=learned), [], first
        return Results(groups=[learned, *coming], learned=learned), [scenario.learned_test], first - 1

    def _score_learned(self, scenario: ClassIncrementalScenario, results: Results, seen: list[LabelledImages]) -> None:
        """Measures what was learned before, if there are test images of it, once."""
        if seen and not results.seconds:
            results.add(0, *self._score(seen, scenario, results), seconds=0.0, tasks=_tasks_of(seen))

    def _learn(self, task: Task, scenario: ClassIncrementalScenario) -> float:
        """Learns a task, or the rest of it; returns the seconds that it took in all."""
        # What a task draws does not depend on what was learned before in this process or in another.
        set_seed(self.method.arguments.seed + task.index)
        position = self._position
        self._began = time.perf_counter() - position.seconds
        self.method.unfinished = True
        for index, stage in enumerate(self.method.learn(task)):
            if index < len(position.stages):
                self._redo(stage, position.stages[index])
                continue
            seed = derived_seed(self.method.arguments.seed, task.index, index)
            running = position.running if index == len(position.stages) else None
            trained = self._run(stage, scenario, f"Task {task.index + 1}/{len(scenario)}", seed, running)
            if self.checkpoints is not None:
                self.checkpoints.after_stage(task.index, index, trained, position.step, self._seconds)
        self.method.unfinished = False
        return self._seconds

    @property
    def _seconds(self) -> float:
        """Spent on the task so far, by this process and those it goes on from."""
        return time.perf_counter() - self._began

    def _redo(self, stage: Stage, saved: dict[str, Any]) -> None:
        """Puts what an earlier process has trained in place of training."""
        stage.network.train()
        restore_tensors(stage.network, saved["trained"])
        stage.network.eval()
        self.checkpoints.restore_randomness(saved)

    def _run(
        self,
        stage: Stage,
        scenario: ClassIncrementalScenario,
        title: str = "",
        seed: int = 0,
        running: Optional[dict[str, Any]] = None,
    ) -> dict[str, Tensor]:
        """Trains a stage, or the rest of it; returns what was trained."""
        loop = TrainingLoop(stage, self.accelerator, scenario.transform, seed, running, self.dataloader_num_workers)
        if running is not None:
            self.checkpoints.restore_randomness(running)
        position, last_saved = self._position, self._position.step
        with tqdm(total=len(loop), initial=loop.done, disable=not self.progress, leave=False) as bar:
            for measured in loop:
                position.step += 1
                bar.update()
                if bar.n % 10 == 0 or bar.n == bar.total:
                    epoch = f"epoch {(bar.n - 1) // loop.batches + 1}/{loop.epochs}"
                    loss, accuracy = measured or loop.mean_loss_and_accuracy()
                    bar.set_description(f"{title}, {stage.name}, {epoch}")
                    bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}")
                if measured is not None:
                    loss, accuracy = measured
                    values = {f"{stage.name}/loss": loss, f"{stage.name}/accuracy": accuracy}
                    self.accelerator.log(values, step=position.step)
                due = self.checkpoints is not None and self.checkpoints.is_due(position.step - last_saved)
                if due and loop.has_state:
                    self.checkpoints.during_stage(position.task, loop.state(), position.step, self._seconds)
                    last_saved = position.step
        return loop.end()

    def _score(
        self, seen: list[LabelledImages], scenario: ClassIncrementalScenario, results: Results
    ) -> tuple[list[int], list[int]]:
        """Predicted and true classes, numbered as in the results."""
        predictions, references = self._predict(LabelledImages.concatenate(seen), scenario)
        # Without test images of them, classes learned before stand behind all others, unless they come back.
        places = {name: place for place, name in enumerate(results.class_names)}
        numbers = [places[name] for name in scenario.class_names]
        return [numbers[label] for label in predictions], [numbers[label] for label in references]

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


def _tasks_of(seen: list[LabelledImages]) -> list[int]:
    """The task of each image, of which there is a part for each task."""
    return [task for task, part in enumerate(seen) for _ in range(len(part))]

"""What a sequence of tasks has come to."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from ..evaluation import METRICS
from ..evaluation.metrics import accuracies_by_task


@dataclass
class Results:
    """
    Accuracies on the test images of all classes seen, after each task, and the newest predictions.

    What is kept of older scorings is a row of the accuracy matrix each: adding a task costs the same for any number of
    tasks.

    Args:
        groups (`list[list[str]]`): Class names of each task; a class may come in several.
        predictions (`list[int]`): Predicted classes of all test images seen, after the newest task.
        references (`list[int]`): Their true classes.
        tasks (`list[int]`): The task that each of these images belongs to.
        accuracies (`list[list[float]]`): Rows of the accuracy matrix: row i has the accuracies on tasks 0 to i after
            task i, from 0 to 1.
        seconds (`list[float]`): Training time of each task, in seconds.
        learned (`list[str]`): Classes learned before the first task. If there were test images of them, they stand
            for one task, the first of `groups`, measured before anything else was learned; otherwise all measures are
            those of the new classes' images.
    """

    groups: list[list[str]]
    predictions: list[int] = field(default_factory=list)
    references: list[int] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)
    accuracies: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    learned: list[str] = field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """Names of all classes, in the order of their numbers in predictions: as `groups` name them, then others."""
        return list(dict.fromkeys([*(name for group in self.groups for name in group), *self.learned]))

    def add(
        self,
        task: int,
        predictions: list[int],
        references: list[int],
        seconds: float,
        tasks: Optional[Sequence[int]] = None,
    ) -> None:
        """Takes in the predictions made after a task, in place of those before.

        Args:
            task (`int`): The task, 0 for the first of `groups`; tasks come in their order.
            predictions (`list[int]`): Predicted classes of all test images seen.
            references (`list[int]`): Their true classes.
            seconds (`float`): Training time of the task, in seconds.
            tasks (`Optional[Sequence[int]]`): The task of each image; if `None`, the first with its class.

        Raises:
            ValueError: If it is not the next task's turn.
        """
        if task != len(self.accuracies):
            raise ValueError(f"task={task} cannot be added now; the next one is {len(self.accuracies)}.")
        if tasks is None:
            task_of_class = self._task_of_class()
            tasks = [task_of_class[label] for label in references]
        self.accuracies.append(accuracies_by_task(predictions, references, tasks, task + 1).tolist())
        self.tasks = list(tasks)
        self.predictions, self.references = list(predictions), list(references)
        self.seconds.append(seconds)

    def metrics(self) -> dict[str, Any]:
        """All measures of `dynammo_peft.evaluation.METRICS` after the tasks learned so far.

        Raises:
            ValueError: If there is none yet.
        """
        tasks = len(self.accuracies)
        if not tasks:
            raise ValueError("No task was learned yet; call Learner.fit first.")
        matrix = np.full((tasks, tasks), np.nan)
        for row, accuracies in enumerate(self.accuracies):
            matrix[row, : row + 1] = accuracies
        predictions, references = np.asarray(self.predictions), np.asarray(self.references)
        counts = np.bincount(np.asarray(self.tasks, dtype=int), minlength=tasks)
        measures: dict[str, Any] = {}
        for metric_cls in METRICS:
            measures |= metric_cls.measure(matrix, counts, predictions, references)
        return measures

    def state(self) -> dict[str, Any]:
        """All there is to know, as plain values: what `restore` takes."""
        names = ("groups", "learned", "predictions", "references", "tasks", "accuracies", "seconds")
        return copy.deepcopy({name: getattr(self, name) for name in names})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` of results of the same tasks gave.

        Args:
            state (`Mapping[str, Any]`): The values.

        Raises:
            ValueError: If they are those of other tasks.
        """
        for name in ("groups", "learned"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"The results to go on with have {name}={state[name]}, but these have {getattr(self, name)}; "
                    "go on with the same tasks."
                )
        for name in ("predictions", "references", "tasks", "accuracies", "seconds"):
            setattr(self, name, copy.deepcopy(state[name]))

    def save(self, path: Union[str, Path], **more: Any) -> None:
        """Writes the measures, the tasks and `more` as JSON; the predictions themselves are not written.

        Where a task has no test images, the accuracy matrix has `null`.
        """
        learned = {"learned_before": self.learned} if self.learned else {}
        metrics = self.metrics()
        metrics["accuracy_matrix"] = [
            [None if math.isnan(value) else value for value in row] for row in metrics["accuracy_matrix"]
        ]
        content = {**more, "tasks": self.groups, **learned, "seconds": self.seconds, **metrics}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _task_of_class(self) -> list[int]:
        first: dict[str, int] = {}
        for index, group in enumerate(self.groups):
            for name in group:
                first.setdefault(name, index)
        return list(first.values())

"""What a sequence of tasks has come to."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import numpy as np

from ..evaluation import METRICS
from ..evaluation.metrics import accuracy_matrix


@dataclass
class Results:
    """
    Accuracies on the test images of all classes seen, after each task, and the newest predictions.

    What is kept of older scorings is a row of the accuracy matrix each: adding a task costs the same for any number of
    tasks.

    Args:
        groups (`list[list[str]]`): Class names of each task.
        predictions (`list[int]`): Predicted classes of all test images seen, after the newest task.
        references (`list[int]`): Their true classes.
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
    accuracies: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    learned: list[str] = field(default_factory=list)

    def add(self, task: int, predictions: list[int], references: list[int], seconds: float) -> None:
        """Takes in the predictions made after a task, in place of those before.

        Args:
            task (`int`): The task, 0 for the first of `groups`; tasks come in their order.
            predictions (`list[int]`): Predicted classes of all test images seen.
            references (`list[int]`): Their true classes.
            seconds (`float`): Training time of the task, in seconds.

        Raises:
            ValueError: If it is not the next task's turn.
        """
        if task != len(self.accuracies):
            raise ValueError(f"task={task} cannot be added now; the next one is {len(self.accuracies)}.")
        after_task = np.full(len(references), task)
        matrix = accuracy_matrix(predictions, references, after_task, self._task_of_class(task + 1))
        self.accuracies.append(matrix[task].tolist())
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
        counts = np.bincount(np.asarray(self._task_of_class(tasks))[references], minlength=tasks)
        measures: dict[str, Any] = {}
        for metric_cls in METRICS:
            measures |= metric_cls.measure(matrix, counts, predictions, references)
        return measures

    def state(self) -> dict[str, Any]:
        """All there is to know, as plain values: what `restore` takes."""
        names = ("groups", "learned", "predictions", "references", "accuracies", "seconds")
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
        for name in ("predictions", "references", "accuracies", "seconds"):
            setattr(self, name, copy.deepcopy(state[name]))

    def save(self, path: Union[str, Path], **more: Any) -> None:
        """Writes the measures, the tasks and `more` as JSON; the predictions themselves are not written."""
        learned = {"learned_before": self.learned} if self.learned else {}
        content = {**more, "tasks": self.groups, **learned, "seconds": self.seconds, **self.metrics()}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _task_of_class(self, tasks: int) -> list[int]:
        return [index for index, group in enumerate(self.groups[:tasks]) for _ in group]

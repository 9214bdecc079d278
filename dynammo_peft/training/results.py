"""What a sequence of tasks has come to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from ..evaluation import METRICS


@dataclass
class Results:
    """
    Predictions on the test images of all classes seen, after each task.

    Args:
        groups (`list[list[str]]`): Class names of each task.
        predictions (`list[int]`): Predicted classes.
        references (`list[int]`): True classes.
        after_task (`list[int]`): After which task each prediction was made.
        seconds (`list[float]`): Training time of each task, in seconds.
        learned (`list[str]`): Classes learned before the first task. If there were test images of them, they stand
            for one task, the first of `groups`, measured before anything else was learned; otherwise all measures are
            those of the new classes' images.
    """

    groups: list[list[str]]
    predictions: list[int] = field(default_factory=list)
    references: list[int] = field(default_factory=list)
    after_task: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    learned: list[str] = field(default_factory=list)

    def add(self, task: int, predictions: list[int], references: list[int], seconds: float) -> None:
        """Adds the predictions made after a task, and how long its training took."""
        self.predictions += predictions
        self.references += references
        self.after_task += [task] * len(references)
        self.seconds.append(seconds)

    def state(self) -> dict[str, Any]:
        """What was measured, as plain values."""
        return {name: list(getattr(self, name)) for name in ("predictions", "references", "after_task", "seconds")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` of results of the same tasks gave."""
        for name, values in state.items():
            setattr(self, name, list(values))

    def metrics(self) -> dict[str, Any]:
        """All measures of `dynammo_peft.evaluation.METRICS` after the tasks learned so far."""
        tasks = len(set(self.after_task))
        if not tasks:
            raise ValueError("No task was learned yet; call Learner.fit first.")
        task_of_class = [index for index, group in enumerate(self.groups[:tasks]) for _ in group]
        computed: dict[str, Any] = {}
        for metric_cls in METRICS:
            metric = metric_cls()
            metric.add_batch(predictions=self.predictions, references=self.references, after_task=self.after_task)
            computed |= metric.compute(task_of_class=task_of_class)
        return computed

    def save(self, path: Union[str, Path], **more: Any) -> None:
        """Writes the measures, the tasks and `more` as JSON; the predictions themselves are not written."""
        learned = {"learned_before": self.learned} if self.learned else {}
        content = {**more, "tasks": self.groups, **learned, "seconds": self.seconds, **self.metrics()}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

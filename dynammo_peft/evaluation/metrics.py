"""Measures of class-incremental learning, as functions of an accuracy matrix and as `evaluate` metrics.

Row i of the accuracy matrix is measured after task i, column j on the test images of task j; what lies above the
diagonal, tasks not learned yet, is not a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy_matrix(
    predictions: ArrayLike,
    references: ArrayLike,
    after_task: ArrayLike,
    task_of_class: Sequence[int],
    count: Optional[int] = None,
) -> NDArray[np.float64]:
    """The accuracy matrix where an image's task follows from its class; where classes come back, see [`Results`].

    Args:
        predictions (`ArrayLike`): Predicted classes, `(N,)`.
        references (`ArrayLike`): True classes, `(N,)`.
        after_task (`ArrayLike`): After which task each prediction was made, `(N,)`.
        task_of_class (`Sequence[int]`): The task of each class.
        count (`Optional[int]`): Number of tasks, `T`; if `None`, up to the last that a class first appears in.

    Returns:
        `NDArray`: `(T, T)`, accuracies from 0 to 1.
    """
    predictions, references, after_task = map(np.asarray, (predictions, references, after_task))
    tasks = np.asarray(task_of_class)[references]
    count = int(max(task_of_class)) + 1 if count is None else count
    learned = (tasks <= after_task) & (after_task < count)
    cells = after_task * count + tasks
    images, hits = (
        np.bincount(cells[chosen], minlength=count * count).reshape(count, count)
        for chosen in (learned, learned & (predictions == references))
    )
    return np.divide(hits, images, out=np.full((count, count), np.nan), where=images > 0)


def accuracies_by_task(
    predictions: ArrayLike, references: ArrayLike, tasks: ArrayLike, count: int
) -> NDArray[np.float64]:
    """A row of the accuracy matrix: accuracy on the test images of each task, `(T,)`; NaN where there are none.

    Args:
        predictions (`ArrayLike`): Predicted classes, `(N,)`.
        references (`ArrayLike`): True classes, `(N,)`.
        tasks (`ArrayLike`): The task of each image, `(N,)`.
        count (`int`): Number of tasks, `T`.
    """
    predictions, references, tasks = (np.asarray(given, dtype=int) for given in (predictions, references, tasks))
    images, hits = (np.bincount(chosen, minlength=count) for chosen in (tasks, tasks[predictions == references]))
    return np.divide(hits, images, out=np.full(count, np.nan), where=images > 0)


def incremental_accuracies(matrix: ArrayLike, counts: ArrayLike) -> NDArray[np.float64]:
    """Accuracy on all classes seen, after each task, `(T,)`; `counts` are the test images of each task, `(T,)`."""
    matrix, counts = np.asarray(matrix, dtype=float), np.asarray(counts, dtype=float)
    if len(counts) != len(matrix):
        raise ValueError(f"counts has {len(counts)} entries, but the matrix has {len(matrix)} tasks; give one each.")
    # A task without test images has no accuracy and no weight.
    hits = np.where(counts > 0, np.nan_to_num(matrix) * counts, 0.0)
    return np.array([hits[i, : i + 1].sum() / counts[: i + 1].sum() for i in range(len(matrix))])


def last_accuracy(matrix: ArrayLike, counts: ArrayLike) -> float:
    """Accuracy on all classes after the last task."""
    return float(incremental_accuracies(matrix, counts)[-1])


def average_incremental_accuracy(matrix: ArrayLike, counts: ArrayLike) -> float:
    """Mean over tasks of the accuracy on all classes seen (Rebuffi et al. 2017, section 4)."""
    return float(incremental_accuracies(matrix, counts).mean())


def forgetting(matrix: ArrayLike) -> float:
    """Mean over all tasks but the last of the best accuracy before the last task, minus that after it.

    Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", section 5. 0 for a single task. Tasks without
    test images do not count.
    """
    matrix = np.asarray(matrix, dtype=float)
    earlier = _measured_before_the_last(matrix)
    if not len(earlier):
        return 0.0
    best = np.nanmax(matrix[:-1, earlier], axis=0)
    return float(np.mean(best - matrix[-1, earlier]))


def backward_transfer(matrix: ArrayLike) -> float:
    """Mean over all tasks but the last of the last accuracy minus that right after the task; negative if forgotten.

    Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory", equation 3. 0 for a single task. Tasks without test images
    do not count.
    """
    matrix = np.asarray(matrix, dtype=float)
    earlier = _measured_before_the_last(matrix)
    if not len(earlier):
        return 0.0
    return float(np.mean(matrix[-1, earlier] - matrix[earlier, earlier]))


def _measured_before_the_last(matrix: NDArray[np.float64]) -> NDArray[np.int64]:
    """The tasks before the last that have test images: those measured when they were learned."""
    return np.flatnonzero(~np.isnan(np.diag(matrix)[:-1]))


def mean_class_recall(predictions: ArrayLike, references: ArrayLike) -> float:
    """Mean over the classes in `references` of the share of their images that are recognised."""
    predictions, references = np.asarray(predictions), np.asarray(references)
    images = np.bincount(references)
    hits = np.bincount(references[predictions == references], minlength=len(images))
    return float(np.mean(hits[images > 0] / images[images > 0]))


class ClassIncrementalMetric(evaluate.Metric):
    """
    A metric over the predictions made after every task; needs no download.

    Add predictions on the test images of all classes seen, after each task, then compute:

    ```py
    >>> metric = LastAccuracy()
    >>> metric.add_batch(predictions=[0, 1, 1, 2], references=[0, 1, 1, 1], after_task=[0, 0, 1, 1])
    >>> metric.compute(task_of_class=[0, 0, 1])
    {'last_accuracy': 0.5}
    ```
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        integer = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions, references: classes; after_task: the task after which they were made.",
            features=datasets.Features({"predictions": integer, "references": integer, "after_task": integer}),
        )

    def _compute(
        self,
        predictions: Sequence[int],
        references: Sequence[int],
        after_task: Sequence[int],
        task_of_class: Sequence[int],
    ) -> dict[str, Any]:
        # The last tasks may have no new class.
        learned = int(np.max(after_task)) + 1
        missing = sorted(set(range(learned)) - set(np.asarray(after_task).tolist()))
        if missing:
            raise ValueError(
                f"after_task has {learned - 1} and not {missing[0]}; add the predictions made after every task."
            )
        matrix = accuracy_matrix(predictions, references, after_task, task_of_class, learned)
        last = np.asarray(after_task) == learned - 1
        tasks = np.asarray(task_of_class)[np.asarray(references)[last]]
        return self.measure(
            matrix,
            np.bincount(tasks, minlength=learned)[:learned],
            np.asarray(predictions)[last],
            np.asarray(references)[last],
        )

    @staticmethod
    def measure(matrix: NDArray, counts: NDArray, predictions: NDArray, references: NDArray) -> dict[str, Any]:
        """The measure by its name.

        Args:
            matrix (`NDArray`): The accuracy matrix of the tasks learned so far, `(T, T)`.
            counts (`NDArray`): Test images of each task, `(T,)`.
            predictions (`NDArray`): Predicted classes after the last task, `(N,)`.
            references (`NDArray`): True classes, `(N,)`.
        """
        raise NotImplementedError


class AccuracyMatrix(ClassIncrementalMetric):
    """Accuracy after task i on the test images of task j."""

    @staticmethod
    def measure(matrix: NDArray, counts: NDArray, predictions: NDArray, references: NDArray) -> dict[str, Any]:
        return {"accuracy_matrix": [[float(value) for value in row[: i + 1]] for i, row in enumerate(matrix)]}


class LastAccuracy(ClassIncrementalMetric):
    """Accuracy on all classes after the last task."""

    @staticmethod
    def measure(matrix: NDArray, counts: NDArray, predictions: NDArray, references: NDArray) -> dict[str, Any]:
        return {"last_accuracy": last_accuracy(matrix, counts)}


class AverageIncrementalAccuracy(ClassIncrementalMetric):
    """Mean over tasks of the accuracy on all classes seen."""

    @staticmethod
    def measure(matrix: NDArray, counts: NDArray, predictions: NDArray, references: NDArray) -> dict[str, Any]:
        return {"average_incremental_accuracy": average_incremental_accuracy(matrix, counts)}


class Forgetting(ClassIncrementalMetric):
    """How much accuracy the tasks before the last have lost since their best."""

    @staticmethod
    def measure(matrix: NDArray, counts: NDArray, predictions: NDArray, references: NDArray) -> dict[str, Any]:
        return {"forgetting": forgetting(matrix)}


class BackwardTransfer(ClassIncrementalMetric):
    """How much accuracy the tasks before the last have gained since they were learned."""

    @staticmethod
    def measure(matrix: NDArray, counts: NDArray, predictions: NDArray, references: NDArray) -> dict[str, Any]:
        return {"backward_transfer": backward_transfer(matrix)}


class MeanClassRecall(ClassIncrementalMetric):
    """Mean recall of all classes after the last task."""

    @staticmethod
    def measure(matrix: NDArray, counts: NDArray, predictions: NDArray, references: NDArray) -> dict[str, Any]:
        return {"mean_class_recall": mean_class_recall(predictions, references)}


METRICS: tuple[type[ClassIncrementalMetric], ...] = (
    AccuracyMatrix,
    LastAccuracy,
    AverageIncrementalAccuracy,
    Forgetting,
    BackwardTransfer,
    MeanClassRecall,
)

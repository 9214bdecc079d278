"""The measures of class-incremental learning, against numbers worked out by hand."""

import evaluate
import numpy as np
import pytest

from dynammo_peft.evaluation import (
    METRICS,
    AccuracyMatrix,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    Forgetting,
    LastAccuracy,
    MeanClassRecall,
)
from dynammo_peft.evaluation.metrics import (
    accuracy_matrix,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    incremental_accuracies,
    last_accuracy,
    mean_class_recall,
)


NAN = float("nan")

# Three tasks of different sizes: classes 0 and 1, class 2, classes 3 and 4, with 4, 2 and 4 test images.
TASK_OF_CLASS = [0, 0, 1, 2, 2]
COUNTS = [4, 2, 4]
REFERENCES = [[0, 0, 1, 1], [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3, 3, 4]]
PREDICTIONS = [[0, 0, 1, 0], [0, 0, 1, 1, 2, 1], [0, 3, 1, 1, 2, 2, 3, 3, 4, 4]]
MATRIX = [[3 / 4, NAN, NAN], [4 / 4, 1 / 2, NAN], [3 / 4, 2 / 2, 3 / 4]]

EXPECTED = {
    "accuracy_matrix": [[3 / 4], [4 / 4, 1 / 2], [3 / 4, 2 / 2, 3 / 4]],
    "last_accuracy": (3 + 2 + 3) / 10,
    # Of all images seen, not the mean of the tasks' accuracies.
    "average_incremental_accuracy": (3 / 4 + (4 + 1) / 6 + (3 + 2 + 3) / 10) / 3,
    # The first task was best after the second one, the second has only gained.
    "forgetting": ((4 / 4 - 3 / 4) + (1 / 2 - 2 / 2)) / 2,
    "backward_transfer": ((3 / 4 - 3 / 4) + (2 / 2 - 1 / 2)) / 2,
    "mean_class_recall": (1 / 2 + 2 / 2 + 2 / 2 + 2 / 3 + 1 / 1) / 5,
}


def batches(tasks=3):
    """What is added to a metric after each task."""
    for task in range(tasks):
        count = len(REFERENCES[task])
        yield {"predictions": PREDICTIONS[task], "references": REFERENCES[task], "after_task": [task] * count}


def all_at_once(tasks=3):
    parts = list(batches(tasks))
    return {key: [value for part in parts for value in part[key]] for key in parts[0]}


def check(computed, names=tuple(EXPECTED)):
    assert set(computed) == set(names)
    for name in names:
        if name == "accuracy_matrix":
            assert [pytest.approx(row) for row in computed[name]] == EXPECTED[name]
        else:
            assert computed[name] == pytest.approx(EXPECTED[name])


def test_accuracy_matrix():
    np.testing.assert_allclose(accuracy_matrix(**all_at_once(), task_of_class=TASK_OF_CLASS), MATRIX)


def test_accuracy_matrix_of_many_tasks_against_loops():
    rng = np.random.default_rng(0)
    task_of_class = [0, 0, 1, 2, 2, 2, 4]
    predictions, references = rng.integers(0, 7, (2, 400))
    after_task = rng.integers(0, 6, 400)
    tasks = np.array(task_of_class)[references]
    expected = np.full((5, 5), NAN)
    for i in range(5):
        # Of tasks not learned yet, no image counts; nor does what came after all tasks.
        for j in range(i + 1):
            right = [p == r for p, r, a, t in zip(predictions, references, after_task, tasks) if (a, t) == (i, j)]
            if right:
                expected[i, j] = sum(right) / len(right)
    # Nobody has a class of task 3.
    assert np.isnan(expected[4, 3])
    np.testing.assert_array_equal(accuracy_matrix(predictions, references, after_task, task_of_class), expected)


def test_functions_of_the_matrix():
    np.testing.assert_allclose(incremental_accuracies(MATRIX, COUNTS), [3 / 4, 5 / 6, 8 / 10])
    assert last_accuracy(MATRIX, COUNTS) == pytest.approx(EXPECTED["last_accuracy"])
    assert average_incremental_accuracy(MATRIX, COUNTS) == pytest.approx(EXPECTED["average_incremental_accuracy"])
    assert forgetting(MATRIX) == pytest.approx(EXPECTED["forgetting"])
    assert backward_transfer(MATRIX) == pytest.approx(EXPECTED["backward_transfer"])


def test_forgetting_looks_for_the_best_before_the_last_task():
    # Best of the first task: 0.9 after the second one; the last row is none of "before".
    matrix = [[0.5, NAN, NAN], [0.9, 0.8, NAN], [0.2, 1.0, 0.6]]
    assert forgetting(matrix) == pytest.approx(((0.9 - 0.2) + (0.8 - 1.0)) / 2)
    assert backward_transfer(matrix) == pytest.approx(((0.2 - 0.5) + (1.0 - 0.8)) / 2)


def test_mean_class_recall_weighs_classes_not_images():
    # Class 0: 9 of 9, class 1: 0 of 1; class 5, only ever predicted, does not count.
    assert mean_class_recall([0] * 9 + [5], [0] * 9 + [1]) == pytest.approx((1 + 0) / 2)


def test_a_single_task_forgets_nothing():
    assert forgetting([[0.6]]) == backward_transfer([[0.6]]) == 0
    assert last_accuracy([[0.6]], [5]) == average_incremental_accuracy([[0.6]], [5]) == pytest.approx(0.6)


@pytest.mark.parametrize("metric_cls", METRICS)
def test_metrics_batch_by_batch_and_at_once(metric_cls):
    metric = metric_cls()
    for batch in batches():
        metric.add_batch(**batch)
    computed = metric.compute(task_of_class=TASK_OF_CLASS)
    check(computed, list(computed))
    assert len(computed) == 1
    assert metric_cls().compute(**all_at_once(), task_of_class=TASK_OF_CLASS) == computed


def test_metrics_have_all_the_measures():
    classes = [AccuracyMatrix, LastAccuracy, AverageIncrementalAccuracy, Forgetting, BackwardTransfer, MeanClassRecall]
    assert list(METRICS) == classes
    check({k: v for cls in METRICS for k, v in cls().compute(**all_at_once(), task_of_class=TASK_OF_CLASS).items()})


def test_metrics_do_not_depend_on_the_order_of_images():
    data = all_at_once()
    order = np.random.default_rng(0).permutation(len(data["references"]))
    shuffled = {key: [values[place] for place in order] for key, values in data.items()}
    check({k: v for cls in METRICS for k, v in cls().compute(**shuffled, task_of_class=TASK_OF_CLASS).items()})


def test_metrics_in_evaluate_combine():
    combined = evaluate.combine([metric_cls() for metric_cls in METRICS])
    for batch in batches():
        combined.add_batch(**batch)
    check(combined.compute(task_of_class=TASK_OF_CLASS))


def test_a_metric_starts_anew_after_compute():
    metric = LastAccuracy()
    metric.compute(predictions=[0, 0], references=[1, 1], after_task=[0, 0], task_of_class=[0, 0])
    again = metric.compute(predictions=[0, 0], references=[0, 1], after_task=[0, 0], task_of_class=[0, 0])
    assert again == {"last_accuracy": 1 / 2}


def test_metrics_half_way_through_the_tasks():
    computed = {
        k: v for cls in METRICS for k, v in cls().compute(**all_at_once(2), task_of_class=TASK_OF_CLASS).items()
    }
    assert computed == {
        "accuracy_matrix": [[3 / 4], [4 / 4, 1 / 2]],
        "last_accuracy": pytest.approx(5 / 6),
        "average_incremental_accuracy": pytest.approx((3 / 4 + 5 / 6) / 2),
        "forgetting": 3 / 4 - 4 / 4,
        "backward_transfer": 4 / 4 - 3 / 4,
        "mean_class_recall": pytest.approx((2 / 2 + 2 / 2 + 1 / 2) / 3),
    }


def test_a_task_without_test_images_does_not_count():
    # The example of the class's documentation: after task 1 there are images of task 0 only.
    data = {"predictions": [0, 1, 1, 2], "references": [0, 1, 1, 1], "after_task": [0, 0, 1, 1]}
    assert LastAccuracy().compute(**data, task_of_class=[0, 0, 1]) == {"last_accuracy": 1 / 2}
    average = AverageIncrementalAccuracy().compute(**data, task_of_class=[0, 0, 1])
    assert average == {"average_incremental_accuracy": (2 / 2 + 1 / 2) / 2}


def test_the_last_tasks_may_have_no_new_class():
    # All is right after the first task, nothing after the second, half of it after the third.
    data = {"predictions": [0, 1, 1, 0, 0, 0], "references": [0, 1] * 3, "after_task": [0, 0, 1, 1, 2, 2]}
    first = {name: values[:4] for name, values in data.items()}
    assert LastAccuracy().compute(**first, task_of_class=[0, 0]) == {"last_accuracy": 0.0}
    computed = {k: v for cls in METRICS for k, v in cls().compute(**data, task_of_class=[0, 0]).items()}
    assert [row[0] for row in computed.pop("accuracy_matrix")] == [1.0, 0.0, 0.5]
    assert computed == {
        "last_accuracy": 0.5,
        "average_incremental_accuracy": 0.5,
        "forgetting": 0.5,
        "backward_transfer": -0.5,
        "mean_class_recall": 0.5,
    }


@pytest.mark.parametrize("metric_cls", METRICS)
def test_a_task_that_nobody_scored_is_named(metric_cls):
    data = {"predictions": [0, 1, 2], "references": [0, 1, 2], "after_task": [0, 0, 2]}
    with pytest.raises(ValueError, match="after_task has 2 and not 1; add the predictions made after every task"):
        metric_cls().compute(**data, task_of_class=[0, 1, 2])


def test_each_task_has_one_count():
    for measure in (last_accuracy, average_incremental_accuracy):
        with pytest.raises(ValueError, match="counts has 2 entries, but the matrix has 1 tasks; give one each"):
            measure([[1.0]], [2, 0])

"""The task loop: training steps, mixed precision, progress, predictions and what is written."""

import json
import math
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin
from peft import PeftModel
from tiny import tiny_dataset, tiny_model, tiny_processor
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from dynammo_peft import (
    ClassIncrementalScenario,
    Dynammo,
    DynammoArguments,
    DynammoConfig,
    Learner,
    Method,
    MethodArguments,
    Results,
    Stage,
)
from dynammo_peft.data import BatchTransform
from dynammo_peft.evaluation import METRICS
from dynammo_peft.methods import Optimization
from dynammo_peft.training import loop


def forget_settings():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _no_accelerator_before():
    # The settings of an Accelerator hold for the whole process.
    forget_settings()
    yield
    forget_settings()


def coloured_tasks(classes=6, size=32, per_class=8, classes_per_task=2, **options):
    train, test = tiny_dataset(classes, per_class), tiny_dataset(classes, 4, seed=1)
    processor = tiny_processor(size)
    return ClassIncrementalScenario(
        train, test, processor, classes_per_task=classes_per_task, progress=False, **options
    )


class Observed(Optimization):
    """Remembers the optimizers and schedules it has made."""

    made: ClassVar[list] = []

    def make(self, network, steps):
        self.made.append(super().make(network, steps))
        return self.made[-1]


class Pixels(Method):
    """A method of one's own: a linear layer on the pixels, trained on each task."""

    name = "pixels"

    def __init__(self, classes, width=3 * 8 * 8, **options):
        super().__init__(nn.Linear(width, classes), MethodArguments(seed=4))
        settings = {"optimizer": "sgd", "learning_rate": 0.01, "weight_decay": 0.0, "epochs": 3, "batch_size": 8}
        self.optimization = Observed(**settings | {"schedule": "cosine"} | options)
        self.batches = []

    def learn(self, task):
        def observe(network, pixels, labels):
            self.batches.append(len(labels))
            logits = network(pixels)
            return F.cross_entropy(logits, labels), logits.argmax(dim=1) == labels

        # Not the images themselves, which would be augmented.
        data = TensorDataset(self.transform(task.train.images).flatten(1), task.train.labels)
        yield Stage("pixels", self.model, data, observe, self.optimization)

    @property
    def inference_adapters(self):
        return []

    def logits(self, images):
        return self.model(images.flatten(1))


def short(**changes):
    options = {"memory_size": 12, "adapter_epochs": 1, "adapter_batch_size": 8, "head_epochs": 2, "head_batch_size": 8}
    return DynammoArguments(**options | changes)


def fit(method, scenario, accelerator=None, **options):
    learner = Learner(method, accelerator or Accelerator(cpu=True), progress=False)
    return learner.fit(scenario, **options)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(first, second):
    return set(first) == set(second) and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(16, 1), (8, 2), (4, 4)])
def test_training_is_gradient_descent(batch_size, accumulation):
    # All 16 images make one step, at once or in equal parts, so that their order does not matter.
    scenario = coloured_tasks(classes=2, size=8)
    method = Pixels(2, batch_size=batch_size, epochs=5)
    weight, bias = (parameter.detach().clone() for parameter in method.model.parameters())
    fit(method, scenario, Accelerator(cpu=True, gradient_accumulation_steps=accumulation))

    task = scenario[0]
    pixels = scenario.transform(task.train.images).flatten(1)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(5):
        error = (pixels @ weight.T + bias).softmax(dim=1) - F.one_hot(task.train.labels)
        gradients = [error.T @ pixels / 16, error.mean(dim=0)]
        velocity = [0.9 * before + gradient for before, gradient in zip(velocity, gradients)]
        rate = 0.01 * (1 + math.cos(math.pi * step / 5)) / 2
        weight, bias = weight - rate * velocity[0], bias - rate * velocity[1]
    torch.testing.assert_close(method.model.weight.detach(), weight)
    torch.testing.assert_close(method.model.bias.detach(), bias)


def train_line(numbers, batch_size, accumulation, epochs=2):
    """Trains one weight, from zero, on a loss whose gradient is the mean of a batch's numbers; returns both."""
    batches = []

    def observe(network, inputs, labels):
        batches.append(inputs.flatten().tolist())
        return network(inputs).mean(), labels == 0

    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    data = TensorDataset(torch.tensor(numbers)[:, None], torch.zeros(len(numbers)))
    optimization = Optimization("sgd", 0.5, 0.0, epochs, batch_size, "constant")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    transform = BatchTransform((0.5,) * 3, (0.5,) * 3)
    list(loop.TrainingLoop(Stage("line", network, data, observe, optimization), accelerator, transform, seed=0))
    return network.weight.item(), batches


def descend(gradients):
    """The weight after updates with a momentum of 0.9."""
    weight = velocity = 0.0
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient
        weight -= 0.5 * velocity
    return weight


@pytest.mark.parametrize("images", [16, 24, 40, 33])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(16, 1), (8, 2), (4, 4)])
def test_an_update_does_not_depend_on_how_many_batches_make_it(images, batch_size, accumulation):
    # An epoch's last update has fewer images or batches, if 16 do not divide them.
    weight, _ = train_line([1.0] * images, batch_size, accumulation)
    assert weight == pytest.approx(descend([1.0] * (2 * math.ceil(images / 16))))


@pytest.mark.parametrize(("images", "batch_size", "accumulation"), [(33, 8, 2), (23, 4, 4), (7, 4, 8), (10, 3, 3)])
def test_each_image_of_an_update_counts_the_same(images, batch_size, accumulation):
    weight, batches = train_line([float(number) for number in range(images)], batch_size, accumulation)
    # Batches differ in size, too.
    assert len({len(batch) for batch in batches}) == 2
    half, gradients = len(batches) // 2, []
    for epoch in (batches[:half], batches[half:]):
        for first in range(0, half, accumulation):
            update = [number for batch in epoch[first : first + accumulation] for number in batch]
            gradients.append(sum(update) / len(update))
    assert weight == pytest.approx(descend(gradients))


@pytest.mark.parametrize(
    ("per_class", "batch_size", "accumulation", "updates"),
    [
        (8, 8, 1, 3 * 2),
        (8, 4, 2, 3 * 2),
        # Three batches an epoch: the last is a step of its own.
        (5, 4, 2, 3 * 2),
        (5, 4, 8, 3 * 1),
    ],
)
def test_the_schedule_ends_with_the_last_update(per_class, batch_size, accumulation, updates):
    Observed.made.clear()
    method = Pixels(2, batch_size=batch_size, optimizer="adam")
    scenario = coloured_tasks(classes=2, size=8, per_class=per_class)
    fit(method, scenario, Accelerator(cpu=True, gradient_accumulation_steps=accumulation))
    ((optimizer, scheduler),) = Observed.made
    assert {int(values["step"]) for values in optimizer.state.values()} == {updates}
    assert scheduler.last_epoch == updates
    assert scheduler.get_last_lr() == [pytest.approx(0, abs=1e-12)]


@pytest.mark.parametrize(
    ("images", "batches"),
    [(16, [8, 8]), (15, [8, 7]), (17, [6, 6, 5]), (18, [6, 6, 6]), (8, [8]), (2, [2])],
)
def test_batches_have_equal_sizes_and_no_image_is_left_out(images, batches):
    train = tiny_dataset(2, 9).select([row for row in range(18) if (row % 9) * 2 + row // 9 < images])
    scenario = ClassIncrementalScenario(
        train, tiny_dataset(2, 1), tiny_processor(8), classes_per_task=2, progress=False
    )
    method = Pixels(2, epochs=2)
    fit(method, scenario)
    assert method.batches == batches * 2


def test_batch_norm_meets_no_single_image():
    # 17 images in batches of 8; on 24 pixels the paper's adapter has maps of one pixel between its convolutions.
    train = tiny_dataset(2, 9).select(range(17))
    scenario = ClassIncrementalScenario(
        train, tiny_dataset(2, 4, seed=1), tiny_processor(24), classes_per_task=2, progress=False
    )
    method = Dynammo(tiny_model("vit"), short(), DynammoConfig(preset="paper"))
    assert len(fit(method, scenario).references) == 8
    assert method.model.base_model.peft_config["merged"].padding == 0
    assert method.heads == "exemplars"


def test_predictions_on_all_classes_seen_after_each_task():
    scenario = coloured_tasks(size=8, groups=[["class 3"], ["class 0", "class 5"], ["class 1"]], classes_per_task=None)
    references = [[0] * 4, [0] * 4 + [1] * 4 + [2] * 4, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4]
    right = []
    method = Pixels(4)

    def predict(task, results):
        seen = [scenario[index].test for index in range(task.index + 1)]
        images = scenario.transform(torch.cat([part.images for part in seen])).flatten(1)
        expected = method.model(images).argmax(dim=1).tolist()
        # Those of earlier tasks are not kept.
        assert results.predictions == expected
        assert results.references == references[task.index]
        right.extend(prediction == reference for prediction, reference in zip(expected, references[task.index]))

    results = fit(method, scenario, after_task=predict)
    assert results.groups == scenario.groups
    assert len(results.seconds) == 3
    assert all(second > 0 for second in results.seconds)
    metrics = results.metrics()
    assert metrics["last_accuracy"] == pytest.approx(sum(right[16:]) / 16)
    average = (sum(right[:4]) / 4 + sum(right[4:16]) / 12 + sum(right[16:]) / 16) / 3
    assert metrics["average_incremental_accuracy"] == pytest.approx(average)
    assert [len(row) for row in metrics["accuracy_matrix"]] == [1, 2, 3]


def test_training_images_are_shuffled_and_augmented_and_test_images_are_not():
    trained, tested = [], []

    class Images(Pixels):
        def learn(self, task):
            def observe(network, images, labels):
                trained.extend(zip(images, labels))
                logits = network(images.flatten(1))
                return F.cross_entropy(logits, labels), logits.argmax(dim=1) == labels

            yield Stage("images", self.model, task.train, observe, self.optimization)

        def logits(self, images):
            tested.extend(images)
            return super().logits(images)

    scenario = coloured_tasks(classes=2, size=8, horizontal_flip=True, crop_padding=0.0)
    fit(Images(2), scenario)
    train, test = (scenario.transform(part.images) for part in (scenario[0].train, scenario[0].test))
    assert torch.equal(torch.stack(tested), test)
    places, mirrored = [], 0
    for image, label in trained:
        (place,) = [
            place
            for place in range(16)
            if torch.equal(image, train[place]) or torch.equal(image.flip(2), train[place])
        ]
        assert label == scenario[0].train.labels[place]
        mirrored += not torch.equal(image, train[place])
        places.append(place)
    epochs = [places[:16], places[16:32], places[32:]]
    assert all(sorted(epoch) == list(range(16)) != epoch for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    # Five standard deviations around the half of 48.
    assert 7 < mirrored < 41


@pytest.mark.parametrize("eval_batch_size", [1, 5])
def test_the_evaluation_batch_does_not_matter(eval_batch_size):
    scenario = coloured_tasks(size=8)
    methods = [Pixels(6), Pixels(6)]
    methods[1].model.load_state_dict(methods[0].model.state_dict())
    reference = fit(methods[0], scenario)
    results = Learner(methods[1], Accelerator(cpu=True), eval_batch_size, progress=False).fit(scenario)
    assert results.predictions == reference.predictions
    assert results.references == reference.references


def test_after_task_is_called_after_each_task():
    calls = []

    def note(task, results):
        measures = results.metrics()
        calls.append((task.index, len(results.seconds), len(measures["accuracy_matrix"]), method.model.training))

    method = Dynammo(tiny_model("vit"), short())
    results = fit(method, coloured_tasks(classes=4), after_task=note)
    assert calls == [(0, 1, 1, False), (1, 2, 2, False)]
    assert isinstance(results, Results)


@pytest.mark.parametrize("heads", ["lda", "gaussians", "exemplars"])
def test_the_seed_decides_everything(heads):
    runs = []
    for seed in (0, 0, 1):
        scenario = coloured_tasks(classes=4)
        method = Dynammo(tiny_model("vit"), short(seed=seed, selection="random", heads=heads))
        # What happened before must not matter.
        torch.manual_seed(100 + len(runs))
        results = fit(method, scenario)
        runs.append((state(method.model), results.metrics(), method.memory.images().rows.tolist()))
    assert equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
    assert not equal(runs[0][0], runs[2][0])
    assert runs[0][2] != runs[2][2]


def test_mixed_precision_is_for_training_and_testing_only():
    training, testing = [], []

    class Noting(Dynammo):
        def logits(self, images):
            testing.append(torch.is_autocast_enabled("cpu"))
            return super().logits(images)

    def note(module, inputs):
        if torch.is_grad_enabled():
            training.append(torch.is_autocast_enabled("cpu"))

    scenario = coloured_tasks(classes=4)
    method = Noting(tiny_model("vit"), short(memory_size=16))
    method.model.vit.embeddings.register_forward_pre_hook(note)
    fit(method, scenario, Accelerator(cpu=True, mixed_precision="bf16"))
    # Batches of 8: 16 images in each task.
    assert training == [True] * (2 + 2)
    assert testing == [True] * 2

    model = method.model
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert model.forward.__func__ is PeftModel.forward
    assert model.head.heads["merged"].forward.__func__ is nn.Linear.forward
    assert not any("_original_forward" in vars(module) for module in model.modules())
    images = scenario.transform(scenario[0].test.images)
    training.clear()
    logits = model(images).logits
    assert training == [False]
    assert logits.dtype == torch.float32
    assert torch.equal(logits, method.logits(images))


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar(capsys, progress):
    scenario = coloured_tasks(classes=4)
    capsys.readouterr()
    method = Dynammo(tiny_model("vit"), short(adapter_epochs=2, heads="exemplars", feature_views=1))
    Learner(method, Accelerator(cpu=True), progress=progress).fit(scenario)
    shown = capsys.readouterr()
    assert shown.out == ""
    if progress:
        for words in ("Task 1/2, adapter, epoch 2/2", "Task 2/2, adapter, epoch 2/2", "Task 2/2, heads, epoch 2/2"):
            assert words in shown.err
        assert "loss=" in shown.err
        assert "accuracy=" in shown.err
        # 16 images in batches of 8, twice.
        assert "4/4" in shown.err
        assert "Task 1/2, heads" not in shown.err
    else:
        assert shown.err == ""


class Notebook(GeneralTracker):
    """Keeps what is logged."""

    name = "notebook"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.logged = []

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))


def test_trackers_get_losses_and_measures():
    notebook = Notebook()
    accelerator = Accelerator(cpu=True, log_with=notebook)
    accelerator.init_trackers("test")
    # A rate of zero: nothing changes, so that the numbers can be worked out afterwards.
    method = Pixels(4, learning_rate=0.0, epochs=2)
    scenario = coloured_tasks(classes=4, size=8, per_class=5)
    results = fit(method, scenario, accelerator)
    # 10 images, so 2 batches an epoch; two epochs and the measures, for each task.
    assert [step for step, _ in notebook.logged] == [2, 4, 4, 6, 8, 8]
    for task, (first, second, measures) in zip(scenario, [notebook.logged[:3], notebook.logged[3:]]):
        logits = method.logits(scenario.transform(task.train.images)).detach()
        expected = {
            "pixels/loss": pytest.approx(float(F.cross_entropy(logits, task.train.labels)), rel=1e-4),
            "pixels/accuracy": pytest.approx(float((logits.argmax(dim=1) == task.train.labels).double().mean())),
        }
        for _, measured in (first, second):
            assert measured == expected
        assert measures[1]["task"] == task.index
        assert measures[1]["task_seconds"] == results.seconds[task.index]
    final = {name: value for name, value in results.metrics().items() if name != "accuracy_matrix"}
    assert notebook.logged[-1][1].items() >= final.items()


def test_results_are_written_as_json(tmp_path):
    results = Results([["cat"], ["dog", "cow"], ["owl"]])
    results.add(0, [0, 1], [0, 0], 1.5)
    results.add(1, [0, 1, 1, 2], [0, 0, 1, 2], 2.5)
    path = tmp_path / "results.json"
    results.save(path, method="dynammo", seed=1)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "method": "dynammo",
        "seed": 1,
        "tasks": [["cat"], ["dog", "cow"], ["owl"]],
        "seconds": [1.5, 2.5],
        "accuracy_matrix": [[1 / 2], [1 / 2, 2 / 2]],
        "last_accuracy": pytest.approx(3 / 4),
        "average_incremental_accuracy": pytest.approx((1 / 2 + 3 / 4) / 2),
        "forgetting": 0.0,
        "backward_transfer": 0.0,
        "mean_class_recall": pytest.approx((1 / 2 + 1 / 1 + 1 / 1) / 3),
    }


def test_results_before_the_first_task():
    with pytest.raises(ValueError, match=r"Learner\.fit"):
        Results([["cat"]]).metrics()


def random_results(seed):
    """Groups of tasks, and what is predicted and true after each; a task may have no test images."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, rng.integers(1, 7))
    names = iter(f"class {index}" for index in range(sum(sizes)))
    groups = [[next(names) for _ in range(size)] for size in sizes]
    counts = rng.integers(0 if seed % 2 else 1, 5, sum(sizes))
    counts[0] += 1
    scored = []
    for task in range(len(groups)):
        seen = sum(sizes[: task + 1])
        references = rng.permutation(np.repeat(np.arange(seen), counts[:seen]))
        scored.append((rng.integers(0, seen, len(references)).tolist(), references.tolist()))
    return groups, scored


@pytest.mark.parametrize("seed", range(12))
def test_results_are_those_of_the_metrics_in_evaluate(seed):
    groups, scored = random_results(seed)
    task_of_class = [index for index, group in enumerate(groups) for _ in group]
    results, data = Results(groups), {"predictions": [], "references": [], "after_task": []}
    for task, (predictions, references) in enumerate(scored):
        results.add(task, predictions, references, 1.0)
        for name, values in zip(data, (predictions, references, [task] * len(references))):
            data[name] += values
        with warnings.catch_warnings():
            # Of a task without test images there is no best accuracy.
            warnings.simplefilter("ignore", RuntimeWarning)
            computed = {k: v for cls in METRICS for k, v in cls().compute(**data, task_of_class=task_of_class).items()}
            # To the last digit; numbers that are none are the same too.
            assert json.dumps(results.metrics()) == json.dumps(computed)


def test_results_keep_one_scoring_and_the_matrix():
    results = Results([[f"class {task}"] for task in range(50)])
    for task in range(50):
        results.add(task, [0] * (task + 1), list(range(task + 1)), 1.0)
    assert len(results.predictions) == len(results.references) == 50
    assert [len(row) for row in results.accuracies] == list(range(1, 51))


def test_results_go_on_from_their_state():
    groups, scored = random_results(4)
    assert len(groups) > 2
    whole, first, second = (Results(groups, learned=["old"]) for _ in range(3))
    for task, scoring in enumerate(scored):
        whole.add(task, *scoring, task / 2)
    for task, scoring in enumerate(scored[:2]):
        first.add(task, *scoring, task / 2)
    second.restore(json.loads(json.dumps(first.state())))
    assert second == first
    for task, scoring in list(enumerate(scored))[2:]:
        second.add(task, *scoring, task / 2)
    assert second == whole
    assert second.metrics() == whole.metrics()
    # The state is no part of the results that it was taken from.
    assert len(first.accuracies) == len(first.seconds) == 2
    for other in (Results(groups), Results([*groups, ["more"]], learned=["old"])):
        with pytest.raises(ValueError, match="go on with the same tasks"):
            other.restore(first.state())


def test_results_take_tasks_in_their_order():
    results = Results([["cat"], ["dog"]])
    with pytest.raises(ValueError, match="task=1 cannot be added now; the next one is 0"):
        results.add(1, [0], [0], 1.0)
    results.add(0, [0], [0], 1.0)
    with pytest.raises(ValueError, match="task=0 cannot be added now; the next one is 1"):
        results.add(0, [0], [0], 1.0)


def test_a_method_is_used_once():
    scenario = coloured_tasks(classes=2)
    method = Dynammo(tiny_model("vit"), short())
    fit(method, scenario)
    before = state(method.model)
    with pytest.raises(ValueError, match=r"\[\['class 0', 'class 1'\]\] were learned; make it with learned="):
        fit(method, scenario)
    assert equal(before, state(method.model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_batch_size": 0}, "eval_batch_size=0 must be at least 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1 must be at least 0"),
    ],
)
def test_numbers_are_checked_before_anything_is_trained(options, message):
    with pytest.raises(ValueError, match=message):
        Learner(Pixels(2), Accelerator(cpu=True), **options)


def test_an_update_ends_with_an_epoch():
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    with pytest.raises(ValueError, match="sync_with_dataloader=False is not supported; leave it out"):
        Learner(Pixels(2), accelerator)


def test_processes_have_as_many_batches_each():
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    with pytest.raises(ValueError, match="even_batches=False is not supported; leave it out"):
        Learner(Pixels(2), accelerator)


def test_a_learner_makes_its_own_accelerator():
    method = Pixels(2)
    learner = Learner(method, progress=False)
    assert isinstance(learner.accelerator, Accelerator)
    assert len(learner.fit(coloured_tasks(classes=2, size=8)).references) == 8


def test_no_image_stays_with_accelerate_after_a_run():
    train, test = tiny_dataset(), tiny_dataset(seed=1)
    scenario = ClassIncrementalScenario(train, test, tiny_processor(32), classes_per_task=2, progress=False)
    learner = Learner(
        Dynammo(tiny_model("vit"), DynammoArguments(memory_size=0, adapter_epochs=1)),
        Accelerator(cpu=True),
        progress=False,
    )
    learner.fit(scenario)
    assert learner.accelerator._dataloaders == []


def test_accelerate_lets_go_of_the_loader_of_each_epoch():
    train_line([1.0] * 10, batch_size=4, accumulation=2, epochs=5)
    # As at the start: no loader.
    assert GradientState().dataloader_references == [None]


def test_workers_load_the_same_batches(monkeypatch):
    used, outcomes = [], []
    load = loop.data_loader
    monkeypatch.setattr(
        loop, "data_loader", lambda *given, **options: used.append(given[2]) or load(*given, **options)
    )
    for workers in (0, 1):
        forget_settings()
        torch.manual_seed(0)
        method = Pixels(2)
        Learner(method, Accelerator(cpu=True), progress=False, dataloader_num_workers=workers).fit(
            coloured_tasks(classes=2, size=8)
        )
        outcomes.append(state(method.model))
    assert set(used) == {0, 1}
    assert equal(*outcomes)


class Draws(Dataset):
    """Pairs of a number drawn by whoever reads it, and a label."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(1), torch.tensor(0)


def test_workers_draw_other_numbers_in_each_epoch():
    epochs = []
    for _ in range(2):
        drawn = []

        def observe(network, inputs, labels, drawn=drawn):
            drawn.extend(inputs.flatten().tolist())
            return network(inputs).mean(), labels == 0

        stage = Stage("draws", nn.Linear(1, 1), Draws(), observe, Optimization("sgd", 0.1, 0.0, 2, 4, "constant"))
        transform = BatchTransform((0.5,) * 3, (0.5,) * 3)
        list(loop.TrainingLoop(stage, Accelerator(cpu=True), transform, seed=0, num_workers=1))
        epochs.append(drawn)
    assert len(set(epochs[0])) == 8
    # A run that is resumed draws the same, whatever was drawn before.
    assert epochs[0] == epochs[1]

"""Interrupted runs, resumed, end as if nothing had happened."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock
from test_learner import forget_settings
from tiny import tiny_dataset, tiny_model, tiny_processor

from dynammo_peft import (
    METHODS,
    CheckpointError,
    Checkpoints,
    ClassIncrementalScenario,
    DynammoConfig,
    DynammoLoraConfig,
    Learner,
)
from dynammo_peft.training.loop import TrainingLoop
from dynammo_peft.training.store import CheckpointStore


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def _no_accelerator_before():
    forget_settings()
    yield
    forget_settings()


def tasks(**options):
    settings = {"classes_per_task": 2, "progress": False, **options}
    return ClassIncrementalScenario(tiny_dataset(6, 9), tiny_dataset(6, 3, seed=1), tiny_processor(32), **settings)


def new_method(name="dynammo", model="vit", config=DynammoConfig, **options):
    settings = {
        "memory_size": 12,
        "adapter_epochs": 2,
        "adapter_batch_size": 4,
        "head_epochs": 2,
        "head_batch_size": 4,
    }
    arguments = METHODS[name].arguments_cls(**{**settings, **options})
    return METHODS[name](tiny_model(model), arguments, config())


def learn(method, folder, scenario=None, resume=None, save_steps=3, **options):
    forget_settings()
    learner = Learner(
        method, Accelerator(cpu=True, **options), progress=False, checkpoints=Checkpoints(folder, save_steps)
    )
    return learner.fit(scenario or tasks(), resume_from_checkpoint=resume)


def outcome(method, results):
    """All that a run leaves: weights, statistics, exemplars and measures."""
    values, tensors = method.state()
    state = {f"model.{name}": tensor for name, tensor in method.model.state_dict().items()}
    return {**state, **tensors}, values, results.metrics()


def assert_same(first, second):
    (tensors, *plain), (others, *other_plain) = first, second
    assert list(tensors) == list(others)
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []
    assert plain == other_plain


def interrupt(monkeypatch, after):
    """The training step after so many raises; those of all tasks count."""
    step, taken = TrainingLoop._step, []

    def counted(loop, *arguments):
        if len(taken) == after:
            raise Interrupted
        taken.append(step(loop, *arguments))

    monkeypatch.setattr(TrainingLoop, "_step", counted)


RUNS = {
    "dynammo": {},
    "exemplars": {"heads": "exemplars", "exemplars_as_others": True},
    "gaussians": {"heads": "gaussians", "merge": "fisher", "memory_size": 0},
    "learned weights": {"learned_weights": "layer", "weights_steps": 2, "recalibrate": True},
    "distillation": {"feature_distillation": 1.0},
    "backbone": {"train_backbone": True, "model": "resnet_basic"},
    "first session": {"first_session": True},
    "offloaded": {"offload_adapters": "adapters"},
    "lora": {"config": DynammoLoraConfig},
    "dropout": {"config": lambda: DynammoLoraConfig(lora_dropout=0.3)},
    "acl": {"name": "acl"},
    "joint": {"name": "joint"},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenario = tasks(groups=[["class 0", "class 1"], ["class 3"], ["class 5"]], classes_per_task=None)
    whole = new_method(**options)
    expected = outcome(whole, learn(whole, tmp_path / "whole", scenario))
    # An epoch has five steps, a checkpoint is written every three: in mid-epoch, and once only before the first.
    steps = int(json.loads(Checkpoints(tmp_path / "whole").store.paths()[-1].read_text())["step"])
    for after in sorted({1, steps // 2 + 1, steps - 1}):
        folder = tmp_path / str(after)
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            with pytest.raises(Interrupted):
                learn(new_method(**options), folder, scenario)
        resumed = new_method(**options)
        assert_same(outcome(resumed, learn(resumed, folder, scenario, resume="latest")), expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulated_gradients_are_not_lost(precision, tmp_path, monkeypatch):
    settings = {"gradient_accumulation_steps": 3, "mixed_precision": precision, "save_steps": 1}
    scenario = tasks(groups=[["class 0", "class 1"]], classes_per_task=None)
    whole = new_method()
    expected = outcome(whole, learn(whole, tmp_path / "whole", scenario, **settings))
    # Steps of one and two batches behind an update.
    for after in (4, 7):
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            with pytest.raises(Interrupted):
                learn(new_method(), tmp_path / str(after), scenario, **settings)
        resumed = new_method()
        results = learn(resumed, tmp_path / str(after), scenario, resume="latest", **settings)
        assert_same(outcome(resumed, results), expected)


def test_a_run_may_be_interrupted_again_and_again(tmp_path, monkeypatch):
    whole = new_method(heads="exemplars")
    expected = outcome(whole, learn(whole, tmp_path / "whole"))
    interruptions = 0
    while True:
        method = new_method(heads="exemplars")
        with monkeypatch.context() as patch:
            # Each time a little further than the next checkpoint.
            interrupt(patch, 7)
            try:
                results = learn(method, tmp_path / "run", resume="latest")
                break
            except Interrupted:
                interruptions += 1
    assert interruptions > 5
    assert_same(outcome(method, results), expected)


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    whole = new_method()
    results = learn(whole, tmp_path)
    interrupt(monkeypatch, 0)
    called = []
    again = new_method()
    learner = Learner(again, Accelerator(cpu=True), progress=False, checkpoints=Checkpoints(tmp_path))
    repeated = learner.fit(tasks(), after_task=lambda *_: called.append(1), resume_from_checkpoint="latest")
    assert_same(outcome(again, repeated), outcome(whole, results))
    assert repeated.seconds == results.seconds
    assert called == []
    images = tasks().transform(tasks().test.images)
    assert torch.equal(again.logits(images), whole.logits(images))


def test_going_on_behind_learned_tasks_is_resumed_too(tmp_path, monkeypatch):
    def going_on():
        # A class alone is trained on beside exemplars only.
        method = new_method(exemplars_as_others=True)
        forget_settings()
        Learner(method, Accelerator(cpu=True), progress=False).fit(
            tasks(groups=[["class 0", "class 1"]], classes_per_task=None)
        )
        return method

    def later(method):
        settings = {"groups": [["class 4"], ["class 2"]], "classes_per_task": None}
        return tasks(**settings, learned=method.groups, exemplar_rows=method.exemplar_rows)

    whole = going_on()
    expected = outcome(whole, learn(whole, tmp_path / "whole", later(whole)))
    method = going_on()
    interrupt(monkeypatch, 14)
    with pytest.raises(Interrupted):
        learn(method, tmp_path / "run", later(method))
    monkeypatch.undo()
    method = going_on()
    assert_same(outcome(method, learn(method, tmp_path / "run", later(method), resume="latest")), expected)


def test_learning_begins_if_there_is_no_checkpoint_yet(tmp_path):
    whole, resumed = new_method(), new_method()
    expected = outcome(whole, learn(whole, tmp_path / "whole"))
    assert_same(outcome(resumed, learn(resumed, tmp_path / "none", resume="latest")), expected)


def test_checkpoints_hold_no_image(tmp_path):
    method = new_method(heads="exemplars", exemplars_as_others=True)
    learn(method, tmp_path, save_steps=1)

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for part in value.values():
                yield from tensors(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                yield from tensors(part)

    for path in (tmp_path / "parts").iterdir():
        for tensor in tensors(torch.load(path, weights_only=True)):
            # The state of PyTorch's generator is bytes too.
            assert tensor.dtype != torch.uint8 or tensor.dim() == 1
            assert tensor.shape[-2:] != (32, 32)


def test_old_checkpoints_and_their_parts_are_deleted(tmp_path):
    learn(new_method(), tmp_path, save_steps=1)
    store = CheckpointStore(tmp_path)
    assert len(store.paths()) == 2
    named = {name for path in store.paths() for name in json.loads(path.read_text())["parts"].values()}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == named


def test_adapters_are_written_once(tmp_path):
    # Eight tasks of one class: what a task adds to its checkpoint is its adapter.
    sizes = []
    method = new_method()

    class Weighed(Checkpoints):
        def after_task(self, task, step):
            super().after_task(task, step)
            parts = json.loads(self.store.paths()[-1].read_text())["parts"]
            sizes.append({key: (name, (tmp_path / "parts" / name).stat().st_size) for key, name in parts.items()})

    scenario = tasks(classes_per_task=1)
    Learner(method, Accelerator(cpu=True), progress=False, checkpoints=Weighed(tmp_path)).fit(scenario)
    for before, after in pairwise(sizes):
        (new,) = set(after) - set(before)
        assert new.startswith("adapter task_")
        assert all(after[key] == before[key] for key in before if key.startswith("adapter task_"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter_epochs": 5}, ["adapter_epochs was 2 and is 5 now"]),
        ({"name": "acl"}, ["method was 'dynammo' and is 'acl' now"]),
        ({"model": "deit"}, ["backbone was"]),
        ({"config": lambda: DynammoConfig(reduction_factor=2)}, ["adapter: reduction_factor was None and is 2 now"]),
        ({"adapter_batch_size": 8}, ["adapter_batch_size was 4 and is 8 now"]),
    ],
)
def test_another_method_is_refused(change, words, tmp_path):
    learn(new_method(), tmp_path, tasks(groups=[["class 0"]], classes_per_task=None))
    with pytest.raises(ValueError, match="another run") as error:
        learn(new_method(**change), tmp_path, tasks(groups=[["class 0"]], classes_per_task=None), resume="latest")
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "checkpoint-" in message


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"groups": [["class 1"]]}, "classes was [['class 0']] and is [['class 1']] now"),
        ({"crop_padding": 0.2}, "augmentation was"),
        ({"train": tiny_dataset(6, 9, seed=5)}, "training images was"),
        ({"train": tiny_dataset(6, 8)}, "training images was"),
        ({"test": tiny_dataset(6, 3, seed=5)}, "test images was"),
    ],
)
def test_other_data_are_refused(change, word, tmp_path):
    data = {"train": tiny_dataset(6, 9), "test": tiny_dataset(6, 3, seed=1), "groups": [["class 0"]]}

    def scenario(train, test, **options):
        return ClassIncrementalScenario(train, test, tiny_processor(32), progress=False, **options)

    learn(new_method(), tmp_path, scenario(**data))
    with pytest.raises(ValueError, match="another run") as error:
        learn(new_method(), tmp_path, scenario(**{**data, **change}), resume="latest")
    assert word in str(error.value)


def test_other_precision_is_refused(tmp_path):
    one = {"groups": [["class 0"]], "classes_per_task": None}
    learn(new_method(), tmp_path, tasks(**one))
    with pytest.raises(ValueError, match="mixed_precision was 'no' and is 'bf16' now"):
        learn(new_method(), tmp_path, tasks(**one), resume="latest", mixed_precision="bf16")
    with pytest.raises(ValueError, match="gradient_accumulation_steps was 1 and is 2 now"):
        learn(new_method(), tmp_path, tasks(**one), resume="latest", gradient_accumulation_steps=2)


def test_other_versions_are_mentioned(tmp_path):
    one = {"groups": [["class 0"]], "classes_per_task": None}
    learn(new_method(), tmp_path, tasks(**one))
    path = Checkpoints(tmp_path).store.paths()[-1]
    content = json.loads(path.read_text())
    content["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="was written with torch 1.0"):
        learn(new_method(), tmp_path, tasks(**one), resume="latest")


def test_a_folder_with_checkpoints_is_not_overwritten(tmp_path):
    one = {"groups": [["class 0"]], "classes_per_task": None}
    learn(new_method(), tmp_path, tasks(**one))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="has checkpoints of an earlier run; resume"):
        learn(new_method(), tmp_path, tasks(**one))
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_an_older_checkpoint_by_its_path(tmp_path, monkeypatch):
    whole = new_method()
    expected = outcome(whole, learn(whole, tmp_path / "whole"))
    older, newer = Checkpoints(tmp_path / "whole").store.paths()
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    # A reason to go back.
    (tmp_path / "run" / newer.name).write_text("nothing")
    with pytest.raises(CheckpointError, match=newer.name):
        learn(new_method(), tmp_path / "run", resume="latest")
    interrupt(monkeypatch, 0)
    with pytest.raises(Interrupted):
        learn(new_method(), tmp_path / "run", resume=str(tmp_path / "run" / older.name))
    monkeypatch.undo()
    assert not (tmp_path / "run" / newer.name).exists()
    resumed = new_method()
    results = learn(resumed, tmp_path / "run", resume="latest")
    assert json.loads(older.read_text())["step"] < json.loads(newer.read_text())["step"]
    assert_same(outcome(resumed, results), expected)


def test_a_checkpoint_of_another_folder(tmp_path, monkeypatch):
    whole = new_method()
    expected = outcome(whole, learn(whole, tmp_path / "whole"))
    interrupt(monkeypatch, 13)
    with pytest.raises(Interrupted):
        learn(new_method(), tmp_path / "before")
    monkeypatch.undo()
    path = str(Checkpoints(tmp_path / "before").store.paths()[-1])
    with pytest.raises(ValueError, match="whole has checkpoints of an earlier run"):
        learn(new_method(), tmp_path / "whole", resume=path)
    # Interrupted again, and resumed without the first folder.
    interrupt(monkeypatch, 4)
    with pytest.raises(Interrupted):
        learn(new_method(), tmp_path / "after", resume=path)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "before")
    resumed = new_method()
    assert_same(outcome(resumed, learn(resumed, tmp_path / "after", resume="latest")), expected)


def test_adapters_on_the_disk_may_have_moved(tmp_path, monkeypatch):
    def kept_in(folder):
        return new_method(offload_adapters=str(tmp_path / folder), exemplars_as_others=True)

    whole = kept_in("whole-adapters")
    one = {"classes_per_task": 1}
    expected = outcome(whole, learn(whole, tmp_path / "whole", tasks(**one)))
    interrupt(monkeypatch, 33)
    with pytest.raises(Interrupted):
        learn(kept_in("before"), tmp_path / "run", tasks(**one))
    monkeypatch.undo()
    # Three tasks are behind it; the first adapter and the newest are in the checkpoint too.
    assert sorted(path.name for path in (tmp_path / "before").iterdir()) == ["task_000", "task_001", "task_002"]
    with pytest.raises(ValueError, match="nowhere' has an adapter 'task_001'"):
        learn(kept_in("nowhere"), tmp_path / "run", tasks(**one), resume="latest")
    (tmp_path / "before").rename(tmp_path / "after")
    resumed = kept_in("after")
    assert_same(outcome(resumed, learn(resumed, tmp_path / "run", tasks(**one), resume="latest")), expected)
    assert not (tmp_path / "before").exists()


def test_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("dynammo_peft.training.store.LOCK_SECONDS", 0.1)
    # As in another process: each lock is of its own open file.
    other = CheckpointStore(tmp_path)
    other.hold()
    part = other.put({"not yet named": torch.ones(2)})
    for resume in (None, "latest"):
        with pytest.raises(CheckpointError, match=f"Another run writes .* {tmp_path}; wait for its end"):
            learn(new_method(), tmp_path, resume=resume)
    assert (tmp_path / "parts" / part).exists()
    other.release()
    learn(new_method(), tmp_path)
    # Free again, also behind a run that fails.
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        learn(new_method(), tmp_path)
    other.hold()


def test_a_folder_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(FileLock, "acquire", lambda lock, **_: (_ for _ in ()).throw(NotImplementedError("no locks")))
    learn(new_method(), tmp_path)
    assert CheckpointStore(tmp_path).paths()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text("{"), "is no checkpoint"),
        (lambda path: path.write_text("[]"), "is no checkpoint"),
        (
            lambda path: path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 9')),
            "format_version=9; this version reads 3",
        ),
        (lambda path: part_of(path).write_bytes(b"nothing"), "is damaged; resume from"),
        (lambda path: part_of(path).unlink(), "lacks"),
    ],
)
def test_a_damaged_checkpoint_is_named(damage, words, tmp_path):
    one = {"groups": [["class 0", "class 1"]], "classes_per_task": None}
    learn(new_method(), tmp_path, tasks(**one))
    damage(Checkpoints(tmp_path).store.paths()[-1])
    with pytest.raises(CheckpointError, match=words):
        learn(new_method(), tmp_path, tasks(**one), resume="latest")


def part_of(path):
    return path.parent / "parts" / json.loads(path.read_text())["parts"]["method"]


def test_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint .*checkpoint-7.json"):
        learn(new_method(), tmp_path, resume=str(tmp_path / "checkpoint-7.json"))


def test_resuming_needs_checkpoints():
    with pytest.raises(ValueError, match="needs the learner's checkpoints"):
        Learner(new_method(), Accelerator(cpu=True), progress=False).fit(tasks(), resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("options", "words"), [({"save_steps": 0}, "save_steps=0"), ({"save_total_limit": 0}, "save_total_limit=0")]
)
def test_bad_numbers(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Checkpoints(tmp_path, **options)

"""Many tasks: old adapters on the disk, merges as tasks come, and work that does not grow."""

import json
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from tiny import tiny_dataset, tiny_images, tiny_model, tiny_processor
from transformers import AutoModelForImageClassification

from dynammo_peft import (
    ClassIncrementalScenario,
    Dynammo,
    DynammoArguments,
    DynammoConfig,
    DynammoLoraConfig,
    Learner,
)
from dynammo_peft.data import ClassStatistics, choose_ridge, fit_affine_map
from dynammo_peft.hub import load_adapter, load_method, push_to_hub, save_learning_state, save_model
from dynammo_peft.merging import adapter_tensors, merge_adapters, merge_into


TASKS = 5


def scenario(tasks=TASKS, learned=0, classes_per_task=2, **options):
    """Tasks behind those that are learned already."""
    count = (tasks + learned) * classes_per_task
    train, test = tiny_dataset(count, 6), tiny_dataset(count, 3, seed=1)
    names = [f"class {index}" for index in range(count)]
    groups = [names[start : start + classes_per_task] for start in range(0, count, classes_per_task)]
    return ClassIncrementalScenario(
        train, test, tiny_processor(), groups=groups[learned:], learned=groups[:learned], progress=False, **options
    )


def arguments(**options):
    return DynammoArguments(**{"memory_size": 20, "adapter_epochs": 2, "adapter_batch_size": 8, **options})


def fit(method, tasks, after_task=None):
    return Learner(method, Accelerator(cpu=True), progress=False).fit(tasks, after_task)


def tensors(model, name="merged"):
    """An adapter's tensors and its heads."""
    heads = {f"head.{key}": value for key, value in model.head.heads[name].state_dict().items()}
    return {**adapter_tensors(model, name), **heads}


def assert_close(first, second, tolerance=1e-6):
    assert first.keys() == second.keys()
    for key, value in first.items():
        # Heads in closed form are large, and magnify rounding.
        scale = 100 * value.abs().max() if tolerance and key.startswith("head.") else 1.0
        torch.testing.assert_close(value, second[key], atol=float(tolerance * scale), rtol=tolerance, msg=key)


LORA = {"r": 2, "feature_modules": []}


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({}, False),
        ({"merge": "uniform", "adapter_init": "first"}, False),
        ({"merge": "exponential_moving_average", "merge_options": {"decay": 0.7}, "memory_size": 0}, False),
        ({"adapter_init": "random", "recalibrate": True}, False),
        ({"first_session": True}, False),
        ({"feature_distillation": 1.0, "exemplars_as_others": True}, False),
        ({"merge": "linear"}, False),
        ({"merge_options": {"first_share": 0.2}, "memory_size": 0}, False),
        ({"train_backbone": True}, False),
        ({}, True),
        ({"merge": "uniform"}, True),
    ],
)
def test_adapters_on_the_disk_change_nothing(options, lora, tmp_path):
    config_cls, fields = (DynammoLoraConfig, LORA) if lora else (DynammoConfig, {})
    kept, offloaded = (
        Dynammo(tiny_model("vit"), arguments(**options, **more), config_cls(**fields))
        for more in ({}, {"offload_adapters": str(tmp_path / "adapters")})
    )
    predictions = []
    expected = fit(kept, scenario(), lambda task, results: predictions.append(results.predictions))

    def check(task, results):
        assert results.predictions == predictions[task.index]
        assert list(offloaded.model.peft_config) == list(dict.fromkeys(["task_000", "merged", offloaded.adapters[-1]]))

    with warnings.catch_warnings():
        # Not of a folder that belongs to the model.
        warnings.filterwarnings("error", message="The backbone was trained")
        results = fit(offloaded, scenario(), check)
    assert results.metrics() == expected.metrics()
    assert_close(tensors(offloaded.model), tensors(kept.model), 1e-5 if options.get("feature_distillation") else 1e-6)
    for name in ("adapters", "groups", "class_names", "head_sizes", "inference_adapters", "exemplar_rows"):
        assert getattr(offloaded, name) == getattr(kept, name)
    first, second = (method.model.peft_config["merged"].to_dict() for method in (offloaded, kept))
    assert first == second
    assert offloaded.state()[0] == kept.state()[0]
    # All of them are there, and nothing else.
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == kept.adapters
    # What is on the disk is what was trained.
    plain = get_peft_model(tiny_model("vit"), config_cls(classes=["other"], image_size=32, **fields), "other")
    for name in kept.adapters:
        plain.load_adapter(tmp_path / "adapters" / name, name)
        assert plain.peft_config[name].class_names == kept.config_of(name).class_names
        tolerance = 1e-5 if options.get("feature_distillation") else 0.0
        assert_close(tensors(plain, name), tensors(kept.model, name), tolerance)


def test_the_model_grows_by_the_merged_heads_alone(tmp_path):
    counts = {}
    for folder in (None, str(tmp_path)):
        method = Dynammo(tiny_model("vit"), arguments(memory_size=0, offload_adapters=folder), DynammoConfig())
        counts[folder] = own = []
        fit(
            method,
            scenario(),
            lambda task, results, own=own, method=method: own.append(
                sum(tensor.numel() for tensor in method.model.state_dict().values())
            ),
        )
    # Two classes and "others", each a row of weights and a bias.
    head = method.model.head.heads["merged"]
    heads = 3 * (head.in_features + 1)
    adapter = sum(tensor.numel() for tensor in tensors(method.model, "task_004").values())
    offloaded = counts[str(tmp_path)]
    # The first adapter and the newest stay.
    assert [after - before for before, after in pairwise(offloaded)] == [heads + adapter, *[heads] * (TASKS - 2)]
    assert [after - before for before, after in pairwise(counts[None])] == [heads + adapter] * (TASKS - 1)


class Calls:
    """Counts the functions that are called meanwhile."""

    def __enter__(self):
        self.count = 0
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def _count(self, frame, event, argument):
        self.count += event in ("call", "c_call")


def test_learning_a_task_calls_no_more_functions_than_the_third_did(tmp_path):
    tasks, counts = 12, []  # of two classes: a class alone trains nothing

    class Counting(Dynammo):
        def learn(self, task):
            with Calls() as calls:
                yield from super().learn(task)
            counts.append(calls.count)

    method = Counting(tiny_model("vit"), arguments(memory_size=0, adapter_epochs=1, offload_adapters=str(tmp_path)))
    fit(method, scenario(tasks))
    # In the third, an adapter is taken out of the model for the first time. A few loops over the names of all tasks
    # and classes are left.
    assert counts[2] < counts[-1] < 1.05 * counts[2]


def test_the_calls_of_a_merge_grow_by_as_much_for_each_adapter():
    counts = []
    for count in (4, 12, 20):
        model, names = adapted(count)
        with Calls() as calls:
            model.add_weighted_adapter(names, adapter_name="merged")
        counts.append(calls.count)
    assert counts[2] - counts[1] == pytest.approx(counts[1] - counts[0], rel=0.02)


def test_a_published_model_takes_its_adapters_from_the_disk(hub, waits, tmp_path):
    tiny_model("vit").save_pretrained(tmp_path / "base")
    HfApi().create_repo("tester/base")
    HfApi().upload_folder(repo_id="tester/base", folder_path=tmp_path / "base")
    folder = tmp_path / "adapters"
    uninterrupted, method = (
        Dynammo(AutoModelForImageClassification.from_pretrained("tester/base"), arguments(**more), DynammoConfig())
        for more in ({}, {"offload_adapters": str(folder)})
    )
    fit(uninterrupted, scenario(4))
    fit(method, scenario(3))
    push_to_hub(method.model, "tester/cells", image_processor=tiny_processor(), learning_state_of=method)
    files = hub.files("tester/cells")
    # Only adapters, and no word of where they were.
    assert {name.partition("/")[0] for name in files if "/" in name} == set(method.adapters)
    assert not any(str(folder).encode() in content for content in files.values())
    assert b"offload_adapters" not in b"".join(files.values())
    for elsewhere in (None, str(tmp_path / "elsewhere")):
        again = load_method("tester/cells", offload_adapters=elsewhere)
        assert again.groups == method.groups
        fit(again, scenario(1, learned=3, exemplar_rows=again.exemplar_rows))
        assert_close(tensors(again.model), tensors(uninterrupted.model))
        kept = ["task_001", "task_002"] if elsewhere is None else []
        assert set(again.model.peft_config) == {*kept, "task_000", "merged", "task_003"}
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == uninterrupted.adapters


def test_going_on_from_a_state_and_the_folder(tmp_path):
    folder = tmp_path / "adapters"
    uninterrupted, method = (
        Dynammo(tiny_model("vit"), arguments(offload_adapters=str(tmp_path / name))) for name in ("whole", "adapters")
    )
    fit(uninterrupted, scenario(4))
    fit(method, scenario(3))
    values, state_tensors = method.state()
    for name in ("merged", "task_002"):
        method.model.save_pretrained(tmp_path / "saved", selected_adapters=[name], save_embedding_layers=False)

    def restored():
        model = get_peft_model(tiny_model("vit"), method.model.peft_config["merged"], "merged")
        model.load_adapter(tmp_path / "saved" / "merged", "merged")
        model.load_adapter(tmp_path / "saved" / "task_002", "task_002")
        again = Dynammo(model, arguments(offload_adapters=str(folder)))
        again.restore(values, state_tensors)
        return again

    again = restored()
    assert again.groups == method.groups
    fit(again, scenario(1, learned=3, exemplar_rows=again.exemplar_rows))
    assert_close(tensors(again.model), tensors(uninterrupted.model), 0.0)
    (folder / "task_001" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="Neither the model nor .*adapters' has an adapter 'task_001'"):
        restored()


def test_a_learning_state_says_nothing_of_the_folder(tmp_path):
    method = Dynammo(tiny_model("vit"), arguments(offload_adapters=str(tmp_path / "secret")))
    fit(method, scenario(1))
    save_learning_state(method, tmp_path)
    assert "secret" not in (tmp_path / "learning_state.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "ties", "merge_options": {"density": 0.5}}, "combination_type='ties' needs all adapters at once"),
        ({"merge": "dare_linear", "merge_options": {"density": 0.5}}, "merge='dare_linear'"),
        (
            {"merge": "fisher"},
            "'linear', 'uniform', 'anchored_mean', 'exponential_moving_average' take them in one by one",
        ),
        ({"learned_weights": "task"}, "learned_weights='task' needs all adapters at once"),
    ],
)
def test_merges_that_need_all_adapters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Dynammo(tiny_model("vit"), arguments(offload_adapters="adapters", **options))


def test_concatenated_lora_is_refused():
    message = (
        "offload_adapters does not go with merge='cat': combination_type='cat' needs all adapters at once; 'linear'"
    )
    with pytest.raises(ValueError, match=message):
        Dynammo(tiny_model("vit"), arguments(offload_adapters="adapters", merge="cat"), DynammoLoraConfig(**LORA))


def test_a_folder_with_adapters_of_other_tasks_is_refused(tmp_path):
    options = {"memory_size": 0, "adapter_epochs": 1, "offload_adapters": str(tmp_path)}
    fit(Dynammo(tiny_model("vit"), arguments(**options)), scenario(2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    method = Dynammo(tiny_model("vit"), arguments(**options))
    with pytest.raises(ValueError, match=r"'task_000' of the classes \['class 0', 'class 1'\], not \['class 0'\]"):
        fit(method, scenario(2, classes_per_task=1))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before
    # The same tasks once more, as after a run that was cut off.
    fit(Dynammo(tiny_model("vit"), arguments(**options | {"seed": 1})), scenario(2))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert after.keys() == before.keys()
    assert all(after[path] != before[path] for path in before)


def test_going_on_does_not_take_the_place_of_what_others_have_offloaded(tmp_path):
    options = {"memory_size": 0, "adapter_epochs": 1}
    method = Dynammo(tiny_model("vit"), arguments(**options))
    fit(method, scenario(2, classes_per_task=1))
    save_model(method.model, tmp_path / "cells", ["merged"], learning_state_of=method)
    folder = tmp_path / "adapters"
    fit(Dynammo(tiny_model("vit"), arguments(**options, offload_adapters=str(folder))), scenario(2))
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    method = load_method(tmp_path / "cells", offload_adapters=str(folder))
    with pytest.raises(ValueError, match=r"'task_000' of the classes \['class 0', 'class 1'\], not \['class 0'\]"):
        fit(method, scenario(1, learned=2, classes_per_task=1))
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before


def test_an_offloaded_adapter_is_saved_as_those_in_the_model(tmp_path):
    method = Dynammo(tiny_model("vit"), arguments(offload_adapters=str(tmp_path / "adapters")))
    fit(method, scenario(3))
    save_model(method.model, tmp_path / "cells", ["merged"], learning_state_of=method)
    known = [
        json.loads((tmp_path / "cells" / name / "adapter_config.json").read_text()) for name in ("merged", "task_001")
    ]
    assert "task_001" not in method.model.peft_config and known[0]["auto_mapping"] is not None
    assert known[0]["auto_mapping"] == known[1]["auto_mapping"]


def test_an_adapter_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    method = Dynammo(tiny_model("vit"), arguments(memory_size=0, adapter_epochs=1, offload_adapters=str(tmp_path)))
    fit(method, scenario(1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    method.folder.configs.clear()

    def fail(self, folder, **kwargs):
        (folder / "task_000").mkdir()
        (folder / "task_000" / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(type(method.model), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        method.folder.keep(method.model, "task_000", method.accelerator)
    assert "task_000" not in method.folder.configs
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def adapted(count, config=DynammoConfig, seed=0, **fields):
    """A model with random adapters, each of one class."""
    torch.manual_seed(seed)
    names = [f"task_{index:03d}" for index in range(count)]
    configs = [config(classes=[f"class {index}"], image_size=32, **fields) for index in range(count)]
    model = get_peft_model(tiny_model("vit"), configs[0], names[0])
    for name, own in zip(names[1:], configs[1:]):
        model.add_adapter(name, own)
    with torch.no_grad():
        for name in names:
            for tensor in tensors(model, name).values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model, names


@pytest.mark.parametrize(
    ("combination_type", "options"),
    [
        ("linear", {}),
        ("uniform", {}),
        ("anchored_mean", {}),
        ("anchored_mean", {"first_share": 0.2}),
        ("exponential_moving_average", {"decay": 0.9}),
    ],
)
@pytest.mark.parametrize("config", [DynammoConfig, DynammoLoraConfig])
def test_adapters_merged_one_by_one_are_as_those_merged_at_once(combination_type, options, config):
    model, names = adapted(4, config)
    merge = {"combination_type": combination_type, **options}
    model.add_weighted_adapter(names, adapter_name="at_once", **merge)
    model.add_weighted_adapter(names[:1], adapter_name="merged", **merge)
    for count, name in enumerate(names[1:], start=1):
        merge_into(model, "merged", name, count, first=names[0], **merge)
    assert_close(tensors(model), tensors(model, "at_once"))
    assert model.peft_config["merged"].to_dict() == model.peft_config["at_once"].to_dict()
    images = tiny_images("vit")
    logits = []
    for name in ("merged", "at_once"):
        model.set_adapter(name, inference_mode=True)
        logits.append(model.eval()(pixel_values=images).logits)
    assert logits[0].shape == (2, 4)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_adapters_of_other_peft_methods_are_merged_one_by_one_too():
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("vit"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "a")
    for name in "bc":
        model.add_adapter(name, LoraConfig(target_modules=["q_proj"], lora_alpha=16, init_lora_weights=False))
    merge_adapters(model, ["a", "b", "c"], adapter_name="at_once")
    merge_adapters(model, ["a"], adapter_name="merged")
    merge_into(model, "merged", "b", 1)
    merge_into(model, "merged", "c", 2)
    assert_close(adapter_tensors(model, "merged"), adapter_tensors(model, "at_once"))


@pytest.mark.parametrize("active", ["merged", "task_001"])
def test_merging_into_an_adapter_leaves_the_rest_as_it_was(active):
    model, names = adapted(2)
    model.add_weighted_adapter(names[:1], adapter_name="merged")
    model.set_adapter(active, inference_mode=active == "merged")
    model.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    modes = {name: module.training for name, module in model.named_modules()}
    before = {key: value.clone() for key, value in tensors(model, "task_001").items()}
    random = torch.get_rng_state()
    merge_into(model, "merged", "task_001", 1)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert_close(tensors(model, "task_001"), before, 0.0)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.active_adapters == [active]
    names = ["class 0", "class 1"] if active == "merged" else ["class 1"]
    assert list(model.config.id2label.values()) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("merged", "task_002", 2), "'task_002' does not exist"),
        (("merged", "merged", 1), "'merged' cannot be merged into itself; name the adapter to take in"),
        (("merged", "task_001", 0), "count=0 must be at least 1"),
        (("merged", "task_001", 1, "regmean"), "combination_type='regmean' needs all adapters at once"),
        (("merged", "task_001", 1, "mean"), "combination_type='mean' needs all adapters at once"),
        (("merged", "task_001", 1, "exponential_moving_average"), "needs the option 'decay'"),
        (("merged", "task_001", 1, "anchored_mean"), "'anchored_mean' needs the first adapter too; give first="),
        (("merged", "task_001", 1, "anchored_mean", "task_009"), "'task_009' does not exist"),
    ],
)
def test_merging_into_an_adapter_refuses_bad_input(arguments, message):
    model, names = adapted(2)
    model.add_weighted_adapter(names[:1], adapter_name="merged")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        merge_into(model, *arguments)
    assert_close(model.state_dict(), before, 0.0)
    assert model.peft_config["merged"].class_names == ["class 0"]


@pytest.mark.parametrize("images", [5, 12, 13, 60])
@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_drift_map_is_the_same_over_images_as_over_features(images, ridge):
    # Twelve features: with fewer images, the map is found by weights of images.
    generator = torch.Generator().manual_seed(images)
    before = torch.randn(images, 12, generator=generator).double() * torch.arange(1, 13)
    after = before @ (torch.eye(12) + 0.1 * torch.randn(12, 12, generator=generator)).double() + 1
    found = fit_affine_map(before, after, ridge)
    centred, change = before - before.mean(0), (after - after.mean(0)) - (before - before.mean(0))
    pull = ridge * torch.diag(centred.square().sum(0))
    weight = torch.eye(12).double() + torch.linalg.inv(centred.T @ centred + pull) @ centred.T @ change
    torch.testing.assert_close(found.weight, weight)
    torch.testing.assert_close(found.bias, after.mean(0) - before.mean(0) @ weight)


def test_the_ridge_chosen_over_images_is_that_chosen_over_features():
    chosen = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        before = torch.randn(9, 12, generator=generator) * torch.logspace(-2, 2, 12)
        noise = torch.randn(9, 12, generator=generator) * torch.logspace(-2, 2, 12)
        change = torch.eye(12) + 0.2 * torch.randn(12, 12, generator=generator)
        after = before @ change + 0.02 * seed * noise
        labels = torch.arange(9) % 3
        # With every image several times there are more images than features, but nothing else is known.
        repeated = (before.repeat(4, 1), after.repeat(4, 1), labels.repeat(4))
        chosen.append(choose_ridge(before, after, labels))
        assert chosen[-1] == choose_ridge(*repeated)
    assert len(set(chosen)) > 1


def test_statistics_of_many_classes_move_as_each_of_them():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 8
    moved = features @ torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    affine_map = fit_affine_map(features, moved, 0.1)
    statistics = ClassStatistics()
    statistics.update(features, labels)
    before = dict(statistics.means)
    statistics.move(affine_map)
    assert statistics.classes == list(before)
    for label, mean in before.items():
        torch.testing.assert_close(statistics.means[label], mean @ affine_map.weight + affine_map.bias)
    ClassStatistics().move(affine_map)


def test_the_hub_loads_an_adapter_from_the_folder(tmp_path):
    method = Dynammo(tiny_model("vit"), arguments(memory_size=0, adapter_epochs=1, offload_adapters=str(tmp_path)))
    fit(method, scenario(2))
    newest = tensors(method.model, "task_001")
    load_adapter(method.model, tmp_path / "task_001", "again")
    assert_close(tensors(method.model, "again"), newest, 0.0)
    load_adapter(method.model, tmp_path / "task_000", "first")
    assert method.model.peft_config["first"].class_names == ["class 0", "class 1"]

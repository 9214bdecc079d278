"""Learning goes on: in a scenario that begins behind tasks learned before, with a method's restored state."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi
from peft import get_peft_model
from tiny import tiny_dataset, tiny_images, tiny_model, tiny_processor
from transformers import AutoModelForImageClassification

import dynammo_peft as dp
from dynammo_peft import (
    ACL,
    AdapterMethodArguments,
    ClassIncrementalScenario,
    Dynammo,
    DynammoArguments,
    DynammoConfig,
)
from dynammo_peft.data import ClassStatistics
from dynammo_peft.hub import (
    CardFacts,
    from_pretrained,
    load_method,
    push_to_hub,
    save_learning_state,
    save_model,
    save_pretrained,
)


NAMES = [f"class {index}" for index in range(6)]
GROUPS = [NAMES[:2], NAMES[2:4], NAMES[4:]]


def scenario(tasks, learned=0, names=NAMES, test_names=None, **options):
    """Tasks of `GROUPS`, from a data set of some classes."""
    train, test = (data_of(names, per_class, seed) for per_class, seed in ((6, 0), (4, 1)))
    if test_names is not None:
        kept = [names.index(name) for name in test_names]
        test = test.filter(lambda row: row["label"] in kept)
    groups, before = GROUPS[learned : learned + tasks], GROUPS[:learned]
    return ClassIncrementalScenario(
        train, test, tiny_processor(), groups=groups, learned=before, progress=False, **options
    )


def data_of(names, per_class, seed):
    data = tiny_dataset(classes=6, per_class=per_class, seed=seed, names=NAMES)
    data = data.filter(lambda row: NAMES[row["label"]] in names)
    labels = [names.index(NAMES[label]) for label in data["label"]]
    feature = datasets.ClassLabel(names=list(names))
    return data.remove_columns("label").add_column("label", labels).cast_column("label", feature)


def fit(method, tasks):
    return dp.Learner(method, Accelerator(cpu=True), progress=False).fit(tasks)


def small(**options):
    return DynammoArguments(**{"memory_size": 12, "adapter_epochs": 1, "head_epochs": 1, **options})


def dynammo(**options):
    return Dynammo(tiny_model("vit"), small(**options))


def published(method, folder):
    """As an adapter repository with everything to go on."""
    method.model.get_base_model().name_or_path = str(folder / "base")
    tiny_model("vit").save_pretrained(folder / "base")
    for config in method.model.peft_config.values():
        config.base_model_name_or_path = str(folder / "base")
    adapters = list(method.model.peft_config)
    method.model.save_pretrained(folder / "repo", selected_adapters=adapters, save_embedding_layers=False)
    if "merged" in adapters:
        for file in (folder / "repo" / "merged").iterdir():
            file.rename(folder / "repo" / file.name)
    save_learning_state(method, folder / "repo")
    return folder / "repo"


def assert_equal_models(first, second):
    own, other = first.state_dict(), second.state_dict()
    assert own.keys() == other.keys()
    for key, value in own.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory_size": 0},
        {"heads": "gaussians", "selection": "random"},
        {"covariance_rank": 3},
        {"heads": "exemplars", "exemplars_as_others": True},
        {"merge": "fisher"},
        {"first_session": True},
    ],
)
def test_going_on_elsewhere_is_as_if_nothing_had_happened(options, tmp_path):
    uninterrupted = dynammo(**options)
    results = fit(uninterrupted, scenario(3))
    method = dynammo(**options)
    fit(method, scenario(2))
    method = load_method(published(method, tmp_path))
    assert method.groups == GROUPS[:2]
    again = fit(method, scenario(1, learned=2, exemplar_rows=method.exemplar_rows))
    assert_equal_models(method.model, uninterrupted.model)
    assert again.metrics()["last_accuracy"] == results.metrics()["last_accuracy"]
    assert again.groups == [[*NAMES[:4]], NAMES[4:]]
    assert again.learned == NAMES[:4]
    assert method.exemplar_rows == uninterrupted.exemplar_rows


@pytest.mark.parametrize("base", ["new", "folder", "trained"])
@pytest.mark.parametrize("options", [{}, {"memory_size": 0, "offload_adapters": "adapters"}])
def test_going_on_from_a_folder_needs_no_hub(base, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("vit").save_pretrained("base")
    options = {**options, "train_backbone": base == "trained"}
    uninterrupted, method = (
        Dynammo(
            tiny_model("vit") if base == "new" else AutoModelForImageClassification.from_pretrained("base"),
            small(**{**options, **({"offload_adapters": name} if "offload_adapters" in options else {})}),
        )
        for name in ("whole", "adapters")
    )
    fit(uninterrupted, scenario(3))
    fit(method, scenario(2))
    before = method.model.state_dict()
    save_model(method.model, "cells", method.inference_adapters, tiny_processor(), learning_state_of=method)
    assert (tmp_path / "cells" / "backbone").exists() == (base != "folder")
    # What was saved does not hang on what is left out of it.
    shutil.rmtree("adapters", ignore_errors=True)
    monkeypatch.chdir("cells")
    again = load_method(tmp_path / "cells")
    if "offload_adapters" not in options:
        assert_equal_models(again.model, method.model)
    assert all(torch.equal(value, before[key]) for key, value in method.model.state_dict().items())
    rows = {"exemplar_rows": again.exemplar_rows} if again.exemplar_rows else {}
    fit(again, scenario(1, learned=2, **rows))
    images = tiny_images("vit")
    # Where files are read into memory decides how sums are rounded.
    torch.testing.assert_close(again.logits(images), uninterrupted.logits(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["new", "pickled"])
def test_a_state_saved_in_its_own_place_keeps_its_backbone(base, tmp_path):
    model = tiny_model("vit")
    if base == "pickled":
        model.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    uninterrupted, method = (Dynammo(copy.deepcopy(model), small(memory_size=0)) for _ in range(2))
    fit(uninterrupted, scenario(3))
    fit(method, scenario(2))
    place = tmp_path / "cells"
    save_model(method.model, place, ["merged"], tiny_processor(), learning_state_of=method)
    method = load_method(place)
    fit(method, scenario(1, learned=2))
    save_model(method.model, place, ["merged"], tiny_processor(), learning_state_of=method)
    torch.testing.assert_close(load_method(place).logits(tiny_images("vit")), uninterrupted.logits(tiny_images("vit")))


def test_a_backbone_that_lora_is_merged_into_is_not_saved(tmp_path):
    method = dynammo(memory_size=0)
    fit(method, scenario(1))
    expected = method.logits(tiny_images("vit"))
    method.model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the backbone's weights; call `unmerge_adapter`"):
        save_model(method.model, tmp_path / "cells", ["merged"])
    assert not (tmp_path / "cells").exists()
    method.model.unmerge_adapter()
    save_model(method.model, tmp_path / "cells", ["merged"])
    found = from_pretrained(tmp_path / "cells", "merged")(tiny_images("vit")).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_model_is_on_its_device_before_anything_is_scored(tmp_path, monkeypatch):
    method = dynammo()
    fit(method, scenario(1))
    method = load_method(published(method, tmp_path))
    calls = []
    to, logits = method.model.to, method.logits
    monkeypatch.setattr(method.model, "to", lambda *where: calls.append("to") or to(*where))
    monkeypatch.setattr(method, "logits", lambda images: calls.append("logits") or logits(images))
    fit(method, scenario(1, learned=1, exemplar_rows=method.exemplar_rows))
    assert calls[0] == "to" and "logits" in calls


def test_what_learning_goes_on_with_is_saved_whoever_names_it(tmp_path):
    method = dynammo()
    fit(method, scenario(2))
    save_model(method.model, tmp_path / "cells", method.adapters, learning_state_of=method)
    assert_equal_models(load_method(tmp_path / "cells").model, method.model)
    published(method, tmp_path)
    with pytest.raises(ValueError, match="Learning goes on with adapter 'merged', and adapter_name='task_000' would"):
        save_pretrained(method.model, tmp_path / "more", adapter_name="task_000", learning_state_of=method)


def test_a_state_that_is_saved_again_names_the_same_exemplars(tmp_path):
    method = dynammo()
    fit(method, scenario(2))
    rows, labels = method.exemplar_rows, method.exemplar_labels
    assert len(rows) == 12 and labels == [label for label in range(4) for _ in range(3)]
    for place in ("once", "twice"):
        save_model(method.model, tmp_path / place, ["merged"], learning_state_of=method)
        method = load_method(tmp_path / place)
        assert (method.exemplar_rows, method.exemplar_labels) == (rows, labels)


def test_exemplar_rows_of_a_data_set_that_has_changed_are_refused(tmp_path):
    method = dynammo()
    fit(method, scenario(2))
    save_model(method.model, tmp_path / "cells", ["merged"], learning_state_of=method)
    method = load_method(tmp_path / "cells")
    train, test = (data_of(NAMES, per_class, seed) for per_class, seed in ((6, 0), (4, 1)))
    # Two classes have changed places.
    order = sorted(range(len(train)), key=lambda row: [1, 0, 2, 3, 4, 5][train[row]["label"]])
    options = {"groups": GROUPS[2:], "learned": GROUPS[:2], "exemplar_rows": method.exemplar_rows, "progress": False}
    tasks = ClassIncrementalScenario(train.select(order), test, tiny_processor(), **options)
    with pytest.raises(ValueError, match="is an image of 'class 1' and was one of 'class 0'; the data set is another"):
        fit(method, tasks)


def test_a_task_that_was_not_finished_is_no_state(tmp_path, monkeypatch):
    method = dynammo()
    fit(method, scenario(1))
    save_model(method.model, tmp_path / "cells", ["merged"], learning_state_of=method)
    method = load_method(tmp_path / "cells")

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(method, "adapter_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(method, scenario(1, learned=1))
    with pytest.raises(ValueError, match="Task 1 was begun and is not finished, so there is no state to save"):
        save_model(method.model, tmp_path / "cells", ["merged"], learning_state_of=method)
    with pytest.raises(ValueError, match="Task 1 was begun and is not finished; resume"):
        fit(method, scenario(1, learned=2))
    assert load_method(tmp_path / "cells").groups == GROUPS[:1]


def test_who_saves_a_state_of_another_model_is_told(tmp_path):
    methods = [dynammo(), dynammo()]
    for method in methods:
        fit(method, scenario(1))
    with pytest.raises(ValueError, match="learning_state_of is a method of another model"):
        save_model(methods[0].model, tmp_path / "cells", ["merged"], learning_state_of=methods[1])
    with pytest.raises(ValueError, match="give learning_state_of the method"):
        save_model(methods[0].model, tmp_path / "cells", ["merged"], include_exemplars=True)
    assert not (tmp_path / "cells").exists()


def test_a_model_with_adapters_is_no_base_model(tmp_path):
    method = dynammo()
    fit(method, scenario(1))
    save_model(method.model, tmp_path / "cells", ["merged"])
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "cells" / "merged")
    with pytest.raises(ValueError, match="has adapters already.*load_method"):
        Dynammo(plain, small())
    with pytest.raises(ValueError, match="has adapters already.*load_method"):
        fit(Dynammo(method.model, small()), scenario(1))


ELSEWHERE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from accelerate import Accelerator
from test_going_on import NAMES, fit, scenario
from tiny import tiny_processor
from dynammo_peft.hub import load_method, push_to_hub

method = load_method("tester/cells")
fit(method, scenario(1, learned=2, exemplar_rows=method.exemplar_rows))
push_to_hub(method.model, "tester/cells", image_processor=tiny_processor(), learning_state_of=method)
"""


def test_a_published_model_learns_on_in_another_process_and_is_published_again(hub, waits, tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    HfApi().create_repo("tester/base")
    HfApi().upload_folder(repo_id="tester/base", folder_path=tmp_path)
    uninterrupted, method = (
        Dynammo(AutoModelForImageClassification.from_pretrained("tester/base"), small()) for _ in range(2)
    )
    fit(uninterrupted, scenario(3))
    results = fit(method, scenario(2))
    facts = CardFacts(name="cells", form="adapter", tasks=results.groups, metrics=results.metrics())
    options = {"image_processor": tiny_processor(), "learning_state_of": method}
    push_to_hub(method.model, "tester/cells", facts=facts, **options)
    first = hub.files("tester/cells")
    assert {"task_000/adapter_model.safetensors", "learning_state.json", "learning_state.safetensors"} <= set(first)
    assert b"No training images are included" in first["README.md"]
    assert b"row numbers of 12 training images" in first["README.md"]
    hub.run(ELSEWHERE, str(Path(__file__).parent), home="elsewhere")
    newest, older = hub.history("tester/cells")[:2]
    assert newest.parent == older.oid
    assert newest.files["learning_state.json"] != older.files["learning_state.json"]
    assert "task_002/adapter_model.safetensors" in set(newest.files) - set(older.files)
    images = tiny_images("vit")
    learned = from_pretrained("tester/cells")
    with torch.no_grad():
        assert torch.equal(learned(pixel_values=images).logits, uninterrupted.model(pixel_values=images).logits)
    assert learned.config.id2label == dict(enumerate(NAMES))


def test_exemplars_are_published_by_an_explicit_option_only(hub, waits, tmp_path):
    tiny_model("vit").save_pretrained(tmp_path / "base")
    HfApi().create_repo("tester/base")
    HfApi().upload_folder(repo_id="tester/base", folder_path=tmp_path / "base")
    method = Dynammo(AutoModelForImageClassification.from_pretrained("tester/base"), small())
    fit(method, scenario(2))
    exemplar = method.memory.images().images[0].numpy().tobytes()
    push_to_hub(method.model, "tester/cells", learning_state_of=method)
    assert exemplar not in hub.uploaded_bytes()
    push_to_hub(method.model, "tester/cells", learning_state_of=method, include_exemplars=True)
    assert exemplar in hub.uploaded_bytes()
    assert b"**This repository holds training images" in hub.files("tester/cells")["README.md"]
    push_to_hub(method.model, "tester/cells")
    assert not {"exemplars.safetensors", "learning_state.json", "task_000"} & {
        name.split("/")[0] for name in hub.files("tester/cells")
    }
    for options, message in [
        ({"include_exemplars": True}, "give learning_state_of the method"),
        ({"learning_state_of": method, "form": "standalone"}, "form='standalone' is for use only"),
        ({"learning_state_of": dynammo()}, "a method of another model"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_pretrained(method.model, tmp_path / "out", **options)


def test_acl_goes_on(tmp_path):
    methods = [ACL(tiny_model("vit"), AdapterMethodArguments(memory_size=12, adapter_epochs=1)) for _ in range(2)]
    fit(methods[0], scenario(3))
    fit(methods[1], scenario(2))
    method = load_method(published(methods[1], tmp_path))
    fit(method, scenario(1, learned=2, exemplar_rows=method.exemplar_rows))
    assert_equal_models(method.model, methods[0].model)


def test_acl_classifies_as_a_whole_once_it_is_loaded(tmp_path):
    method = ACL(tiny_model("vit"), AdapterMethodArguments(memory_size=12, adapter_epochs=1))
    fit(method, scenario(2))
    save_model(method.model, tmp_path / "cells", method.inference_adapters, learning_state_of=method)
    images = tiny_images("vit")
    with torch.no_grad():
        logits = load_method(tmp_path / "cells").logits(images)
        torch.testing.assert_close(logits, method.logits(images))
    assert logits.shape[1] == 4


def test_options_can_be_changed(tmp_path):
    method = dynammo()
    fit(method, scenario(1))
    folder = published(method, tmp_path)
    assert load_method(folder, adapter_epochs=3).arguments.adapter_epochs == 3
    with pytest.raises(ValueError, match="option 'epochs' does not exist"):
        load_method(folder, epochs=3)


def test_classes_learned_before_need_not_be_in_the_data_set(tmp_path):
    method = dynammo(memory_size=0)
    fit(method, scenario(2))
    method = load_method(published(method, tmp_path))
    results = fit(method, scenario(1, learned=2, names=NAMES[4:]))
    # What is measured is of the new classes, among all.
    assert results.groups == [NAMES[4:]]
    assert results.learned == NAMES[:4]
    assert set(results.references) == {0, 1}
    assert set(results.predictions) <= set(range(6))
    assert len(results.metrics()["accuracy_matrix"]) == 1
    assert method.model.peft_config["merged"].class_names == NAMES


def test_new_images_alone_are_trained_on():
    later = scenario(1, learned=2, exemplar_rows=[7, 0, 13])
    (task,) = later
    assert (task.index, task.first_class, task.class_names) == (2, 4, NAMES[4:])
    assert set(task.train.labels.tolist()) == {4, 5}
    assert (later.exemplars.rows.tolist(), later.exemplars.labels.tolist()) == ([7, 0, 13], [1, 0, 2])
    assert set(later.learned_test.labels.tolist()) == {0, 1, 2, 3}
    assert (later.learned_classes, len(later), later.num_classes) == (4, 3, 6)
    assert len(scenario(1, learned=2).exemplars) == 0


def test_the_rest_of_the_classes_is_split_into_tasks():
    data = tiny_dataset(classes=6, names=NAMES)
    later = ClassIncrementalScenario(
        data, data, tiny_processor(), classes_per_task=1, learned=[[NAMES[5]], [NAMES[0]]], progress=False
    )
    assert [task.class_names for task in later] == [[name] for name in NAMES[1:5]]
    assert [task.first_class for task in later] == [2, 3, 4, 5]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("covariance", ["shared", "class"])
def test_statistics_are_restored(covariance, rank):
    statistics = ClassStatistics(covariance, rank)
    statistics.update(torch.randn(30, 5), torch.arange(30) % 3)
    again = ClassStatistics(covariance, rank)
    again.restore(statistics.state())
    for each in (statistics, again):
        each.update(torch.ones(4, 5) * torch.arange(4)[:, None], torch.tensor([1, 1, 2, 7]))
    assert again.counts == statistics.counts
    assert torch.equal(again.mean_matrix(), statistics.mean_matrix())
    assert torch.equal(again.pooled_covariance(), statistics.pooled_covariance())


def test_no_image_goes_along_unless_asked_for(tmp_path):
    method = dynammo()
    fit(method, scenario(2))
    exemplars = method.memory.images()
    files = save_learning_state(method, tmp_path)
    written = b"".join((tmp_path / name).read_bytes() for name in files)
    assert all(image.numpy().tobytes() not in written for image in exemplars.images)
    assert all(image[:, 0].numpy().tobytes() not in written for image in exemplars.images)
    state = json.loads((tmp_path / "learning_state.json").read_text())
    assert state["exemplar_rows"] == exemplars.rows.tolist()
    assert save_learning_state(method, tmp_path, include_exemplars=True)[-1] == "exemplars.safetensors"
    assert exemplars.images[0].numpy().tobytes() in (tmp_path / "exemplars.safetensors").read_bytes()


def test_a_warning_names_classes_of_one_image_whose_features_their_mean_is(tmp_path):
    train, test = (data_of(NAMES, per_class, seed) for per_class, seed in ((6, 0), (4, 1)))
    few = train.select(
        [row for row, label in enumerate(train["label"]) if label != 3 or row == train["label"].index(3)]
    )
    tasks = ClassIncrementalScenario(few, test, tiny_processor(), groups=GROUPS[:2], progress=False)
    method = dynammo()
    fit(method, tasks)
    with pytest.warns(UserWarning, match="Classes of one image: 'class 3'. Their means .* are these images' features"):
        save_learning_state(method, tmp_path)
    method = dynammo()
    fit(method, scenario(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_learning_state(method, tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Dynammo(tiny_model("vit"), small(heads="exemplars")),
        lambda: ACL(tiny_model("vit"), AdapterMethodArguments(memory_size=12, adapter_epochs=1, head_epochs=1)),
    ],
)
def test_heads_on_exemplars_that_are_not_there_are_refused_before_an_adapter_is_trained(make, tmp_path, monkeypatch):
    method = make()
    fit(method, scenario(2))
    folder = published(method, tmp_path)
    save_learning_state(method, folder)
    again = load_method(folder)
    rows = again.exemplar_rows
    monkeypatch.setattr(again, "learn", None)
    with pytest.raises(ValueError, match="none of 'class 0', .*'class 3'.*exemplar_rows.*include_exemplars=True"):
        fit(again, scenario(1, learned=2))
    again = load_method(folder)
    fit(again, scenario(1, learned=2, exemplar_rows=rows))
    save_learning_state(method, folder, include_exemplars=True)
    fit(load_method(folder), scenario(1, learned=2))


def test_exemplars_that_went_along_are_used(tmp_path):
    method = dynammo()
    fit(method, scenario(2))
    folder = published(method, tmp_path)
    save_learning_state(method, folder, include_exemplars=True)
    again = load_method(folder)
    assert torch.equal(again.memory.images().images, method.memory.images().images)
    fit(again, scenario(1, learned=2, names=NAMES[4:]))
    assert set(again.memory.images().labels.tolist()) == set(range(6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scenario(1, learned=2, exemplar_rows=[30]), "Row 30 of exemplar_rows.*another data set"),
        (lambda: scenario(1, learned=2, exemplar_rows=[99]), "Row 99 of exemplar_rows"),
        (lambda: scenario(2, exemplar_rows=[0]), "Row 0 of exemplar_rows"),
        (lambda: scenario(1, learned=2, exemplar_rows=[7, 0, 7]), "exemplar_rows names row 7 again; name each row"),
        (
            lambda: ClassIncrementalScenario(
                *[tiny_dataset(names=["a", "b", "c", "d"])] * 2,
                tiny_processor(),
                classes_per_task=1,
                class_order=["a"],
                learned=[["a"]],
            ),
            "Class 'a' was learned already",
        ),
        (
            lambda: ClassIncrementalScenario(
                *[tiny_dataset(classes=2, names=["a", "b"])] * 2,
                tiny_processor(),
                classes_per_task=1,
                learned=[["a"], ["b"]],
            ),
            "All classes of the data set were learned already",
        ),
        (lambda: fit(dynammo(), scenario(1, learned=2)), "were learned; make it with learned=method.groups"),
    ],
)
def test_bad_scenarios(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "learning_state.json has format_version=1; this version reads 3"),
        ({"method": "magic"}, "method='magic'"),
        ({"adapters": []}, "no usable adapters"),
        ({"arguments": {"speed": 3}}, "option 'speed' does not exist"),
        ({"adapters": ["task_000", "task_009"]}, "task_009"),
        (None, "learning_state.json is no learning state"),
    ],
)
def test_bad_states(change, message, tmp_path):
    method = dynammo()
    fit(method, scenario(1))
    folder = published(method, tmp_path)
    path = folder / "learning_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if change else "{")
    with pytest.raises(ValueError, match=message):
        load_method(folder)


def test_a_truncated_or_missing_file_is_named(tmp_path):
    method = dynammo()
    fit(method, scenario(1))
    folder = published(method, tmp_path)
    path = folder / "learning_state.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="learning_state.safetensors is truncated"):
        load_method(folder)
    path.unlink()
    with pytest.raises(ValueError, match="has no learning_state.safetensors"):
        load_method(folder)
    (folder / "learning_state.json").unlink()
    with pytest.raises(ValueError, match="published for use only"):
        load_method(folder)


def test_a_method_that_has_learned_nothing_has_no_state(tmp_path):
    with pytest.raises(ValueError, match="No task was learned yet"):
        save_learning_state(dynammo(), tmp_path)
    model = get_peft_model(tiny_model("vit"), DynammoConfig(classes=["a"]), "task_000")
    method = Dynammo(model, DynammoArguments())
    with pytest.raises(ValueError, match="has no adapter 'task_001'"):
        method.restore({"adapters": ["task_000", "task_001"], "exemplar_rows": []}, {})


def test_what_is_scored_first_is_what_was_published(tmp_path):
    acl = ACL(tiny_model("vit"), AdapterMethodArguments(memory_size=12, adapter_epochs=1))
    for name, method in (("dynammo", dynammo()), ("acl", acl)):
        fit(method, scenario(2))
        images = tiny_images("vit", 6)
        with torch.no_grad():
            expected = method.logits(images)
            published(method, tmp_path / name)
            found = load_method(tmp_path / name / "repo")
            assert found.model.active_adapter == method.inference_adapters[-1]
            assert torch.equal(found.logits(images), expected)

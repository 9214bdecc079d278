"""Classes that come back: new images of known classes, or the same classes from another hospital."""

import json
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import ImageOps
from test_going_on import assert_equal_models, published
from test_resume import Interrupted
from tiny import tiny_dataset, tiny_images, tiny_model, tiny_processor
from torch.nn import functional as F

from dynammo_peft import (
    ACL,
    Checkpoints,
    ClassIncrementalScenario,
    Dynammo,
    DynammoArguments,
    DynammoConfig,
    Joint,
    Learner,
    Results,
)
from dynammo_peft.data import ClassStatistics, ExemplarMemory, LabelledImages
from dynammo_peft.evaluation.metrics import backward_transfer, forgetting
from dynammo_peft.hub import CardFacts, load_method, model_card
from dynammo_peft.hub.card_dataset import dataset_card
from dynammo_peft.merging import adapter_tensors, merge_into
from dynammo_peft.methods import AdapterMethodArguments


NAMES = ["a", "b", "c", "d"]
GROUPS = [["a", "b"], ["c", "d"], ["b", "a"]]
DOMAINS = ["north", "north", "south"]


def hospitals(per_class, seed, names=("north", "south")):
    """Each class in two hospitals; the second one's images are inverted."""
    north = tiny_dataset(classes=4, per_class=per_class, seed=seed, names=NAMES)
    south = {"image": [ImageOps.invert(image) for image in north["image"]], "label": north["label"]}
    both = datasets.concatenate_datasets([north, datasets.Dataset.from_dict(south, features=north.features)])
    return both.add_column("hospital", [name for name in names for _ in range(len(north))])


TRAIN, TEST = hospitals(9, 0), hospitals(4, 1)


def with_unknown_hospital(data):
    """Hospitals as a `ClassLabel`, in which the third image has none."""
    names = ["north", "south"]
    numbers = [-1 if row == 2 else names.index(name) for row, name in enumerate(data["hospital"])]
    data = data.remove_columns("hospital").add_column("hospital", numbers)
    return data.cast_column("hospital", datasets.ClassLabel(names=names))


def scenario(groups=GROUPS, domains=DOMAINS, train=TRAIN, test=TEST, domain_column="hospital", **options):
    options = {"progress": False, "groups": groups, "domains": domains, **options}
    if domains is not None:
        options["domain_column"] = domain_column
    return ClassIncrementalScenario(train, test, tiny_processor(), **options)


def new_method(config=None, **options):
    given = {"memory_size": 12, "adapter_epochs": 2, "adapter_batch_size": 8, "head_epochs": 2, **options}
    return Dynammo(tiny_model("vit"), DynammoArguments(**given), config)


def fit(method, tasks, **options):
    return Learner(method, Accelerator(cpu=True), progress=False, **options).fit(tasks)


def rows_of(data, group, hospital):
    return [
        row
        for row, (label, own) in enumerate(zip(data["label"], data["hospital"]))
        if NAMES[label] in group and own in hospital
    ]


def sizes_of(method, name="merged"):
    return tuple(method.model.head.sizes[name])


# Tasks


@pytest.mark.parametrize("domains", [DOMAINS, ["north", ["north", "south"], ["south"]]])
def test_tasks_have_the_images_of_their_domains(domains):
    tasks = scenario(domains=domains)
    assert tasks.class_names == NAMES
    assert (tasks.num_classes, tasks.task_of_class()) == (4, [0, 0, 1, 1])
    expected = [(0, [0, 1], [0, 1], 2), (2, [2, 3], [2, 3], 4), (4, [1, 0], [], 4)]
    for task, group, domain, numbers in zip(tasks, GROUPS, domains, expected, strict=True):
        assert (task.first_class, task.classes, task.new_classes, task.seen_classes) == numbers
        assert task.class_names == group
        for part, data in ((task.train, TRAIN), (task.test, TEST)):
            assert part.rows.tolist() == rows_of(data, group, domain)
            assert [NAMES[label] for label in part.labels] == [NAMES[data["label"][row]] for row in part.rows.tolist()]


def test_a_task_may_bring_new_and_known_classes():
    tasks = scenario([["a"], ["d", "a", "b"], ["b", "c"]], None)
    assert [task.classes for task in tasks] == [[0], [1, 0, 2], [2, 3]]
    assert [task.new_classes for task in tasks] == [[0], [1, 2], [3]]
    assert tasks.class_names == ["a", "d", "b", "c"]
    labels = torch.tensor([0, 1, 2, 3])
    assert tasks[1].places(labels).tolist() == [1, 0, 2, -1]


@pytest.mark.parametrize(("groups", "parts"), [([["a", "b"], ["a"], ["c", "a"]], 3), ([["b", "a"], ["a"]], 2)])
def test_without_domains_images_are_divided_at_random(groups, parts):
    several = [scenario(groups, None, seed=seed) for seed in (0, 0, 1)]
    rows = [
        [task.train.of_classes([tasks.class_names.index("a")]).rows.tolist() for task in tasks] for tasks in several
    ]
    assert [len(part) for part in rows[0]] == [18 // parts] * parts
    assert sorted(row for part in rows[0] for row in part) == rows_of(TRAIN, ["a"], ["north", "south"])
    assert rows[0] == rows[1] != rows[2]
    # A part at random is of both hospitals, and classes of one task are not divided.
    assert {TRAIN["hospital"][row] for row in rows[0][0]} == {"north", "south"}
    assert len(several[0][0].train.of_classes([several[0].class_names.index("b")])) == 18
    # The first task that has a class has all its test images.
    for index, task in enumerate(several[0]):
        new = [group for group in groups[:index]]
        first = [name for name in groups[index] if not any(name in group for group in new)]
        assert task.test.rows.tolist() == rows_of(TEST, first, ["north", "south"])


def test_tasks_of_one_class_and_domain_share_its_images():
    tasks = scenario([["a"], ["b"], ["a"], ["a"]], ["north", "north", "south", ["north", "south"]])
    rows = [set(task.train.rows.tolist()) for task in tasks]
    north, south = (set(rows_of(TRAIN, ["a"], [name])) for name in ("north", "south"))
    assert rows[0] | rows[2] | rows[3] == north | south
    assert not rows[0] & rows[3] and not rows[2] & rows[3]
    assert [len(part) for part in rows] == [5, 9, 5, 8]
    assert tasks[3].test.rows.tolist() == []


@pytest.mark.parametrize("kind", ["ClassLabel", "int"])
def test_domains_are_names_or_numbers(kind):
    numbers = [int(name == "south") for name in TRAIN["hospital"]]
    train = TRAIN.remove_columns("hospital").add_column("site", numbers)
    domains = [0, 0, 1]
    if kind == "ClassLabel":
        train, domains = train.cast_column("site", datasets.ClassLabel(names=["north", "south"])), DOMAINS
    tasks = scenario(domains=domains, train=train, test=None, validation_fraction=0.34, domain_column="site")
    own = scenario(test=None, validation_fraction=0.34)
    for task, other in zip(tasks, own, strict=True):
        assert torch.equal(task.train.rows, other.train.rows)
        assert torch.equal(task.test.rows, other.test.rows)


def test_domains_may_be_numpys():
    site = [int(name == "south") for name in TRAIN["hospital"]]
    train = TRAIN.remove_columns("hospital").add_column("site", site)
    options = {"train": train, "test": None, "validation_fraction": 0.34, "domain_column": "site"}
    expected = scenario(domains=[0, 0, 1], **options)
    for domains in (np.array([0, 0, 1]), np.array([[0], [0], [1]]), [[np.int64(0)], np.int32(0), (1,)]):
        for task, other in zip(scenario(domains=domains, **options), expected, strict=True):
            assert torch.equal(task.train.rows, other.train.rows)


def test_images_are_held_out_of_each_domain():
    for task, group, hospital in zip(scenario(test=None, validation_fraction=0.34), GROUPS, DOMAINS, strict=True):
        assert torch.bincount(task.test.labels)[task.classes].tolist() == [3, 3]
        assert torch.bincount(task.train.labels)[task.classes].tolist() == [6, 6]
        held = sorted([*task.test.rows.tolist(), *task.train.rows.tolist()])
        assert held == rows_of(TRAIN, group, hospital)


@pytest.mark.parametrize("domains", [["south", "south"], None])
def test_what_was_trained_on_before_is_not_held_out(domains):
    exemplars = rows_of(TRAIN, ["a"], ["south"])[:6] + rows_of(TRAIN, ["b"], ["north"])
    options = {"learned": [["a", "b"]], "exemplar_rows": exemplars, "test": None, "validation_fraction": 0.34}
    later = scenario([["c", "a"], ["d"]], domains, **options)
    assert later.exemplars.rows.tolist() == exemplars
    held = later.test.rows.tolist()
    where = ["north", "south"] if domains is None else ["south"]
    new = [row for row in rows_of(TRAIN, ["a", "c", "d"], where) if row not in exemplars]
    # New images only, one of three; nothing of the class that does not come back.
    assert set(held) <= set(new)
    for name, count in {"a": 4 if domains is None else 1, "c": len(where) * 3, "d": len(where) * 3}.items():
        assert sum(NAMES[TRAIN["label"][row]] == name for row in held) == count
    trained = [row for task in later for row in task.train.rows.tolist()]
    assert sorted(held + trained) == new
    # New classes have the same images held out as without what was learned before.
    whole = scenario([["a"], ["c"], ["d"]], domains and ["south"] * 3, test=None, validation_fraction=0.34)
    assert {*whole[1].test.rows.tolist(), *whole[2].test.rows.tolist()} <= set(held)


def test_new_classes_alone_are_measured_on_held_out_images():
    exemplars = rows_of(TRAIN, ["a"], ["north"])
    options = {"learned": [["a", "b"]], "exemplar_rows": exemplars, "test": None, "validation_fraction": 0.34}
    later = scenario([["c"], ["d"]], None, **options)
    assert len(later.learned_test) == 0
    assert set(later.test.labels.tolist()) == {2, 3}


@pytest.mark.parametrize("kind", ["stream", "cache"])
def test_streams_and_caches_are_divided_alike(kind, tmp_path):
    train, test = (data.to_iterable_dataset() if kind == "stream" else data for data in (TRAIN, TEST))
    for options in ({}, {"domains": None, "seed": 3}):
        for task, other in zip(
            scenario(train=train, test=test, cache_dir=tmp_path, **options), scenario(**options), strict=True
        ):
            for part, own in ((task.train, other.train), (task.test, other.test)):
                assert torch.equal(part.rows, own.rows)
                assert torch.equal(part.labels, own.labels)
                assert torch.equal(part.images, own.images)


def test_a_known_class_comes_back_behind_what_was_learned():
    learned = GROUPS[:2]
    exemplars = rows_of(TRAIN, ["a"], ["north"])[:2] + rows_of(TRAIN, ["c"], ["north"])[:1]
    later = scenario([["a"]], ["south"], learned=learned, exemplar_rows=exemplars)
    (task,) = later
    assert (task.index, task.first_class, task.classes, task.new_classes) == (2, 4, [0], [])
    assert task.train.rows.tolist() == rows_of(TRAIN, ["a"], ["south"])
    assert task.test.rows.tolist() == rows_of(TEST, ["a"], ["south"])
    assert later.exemplars.rows.tolist() == exemplars
    # All other test images of classes learned before, those of the class that comes back among them.
    assert later.learned_test.rows.tolist() == sorted(
        [*rows_of(TEST, ["a"], ["north"]), *rows_of(TEST, ["b", "c", "d"], ["north", "south"])]
    )
    # Without domains exemplars alone are no new images.
    (task,) = later = scenario([["a"]], None, learned=learned, exemplar_rows=exemplars)
    assert task.train.rows.tolist() == [
        row for row in rows_of(TRAIN, ["a"], ["north", "south"]) if row not in exemplars
    ]
    assert len(task.test) == 0
    assert len(later.learned_test) == len(TEST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": [["a"], ["b", "b"]], "domains": None}, "Task 1 of groups names the class 'b' again; name each"),
        ({"groups": [["a"], ["e"]], "domains": None}, "Task 1 of groups names the class 'e'; the data set has 'a'"),
        ({"domains": ["north"]}, "domains has 1 entries, but there are 3 tasks"),
        ({"domains": ["north", "north", None]}, "domains has None; give each task a string or a whole number"),
        ({"domains": ["north", "north", []]}, r"domains has \[\]; give each task"),
        ({"domains": ["north", "north", "west"]}, "domains names 'west'; column 'hospital' of the train set has 'nor"),
        ({"domain_column": "ward"}, "train set has no column 'ward'; set domain_column to one of 'image', 'label'"),
        ({"domain_column": "image"}, "Column 'image' of the train set is Image.*domain_column needs strings"),
        (
            {"train": TRAIN.select(range(36 + 9))},
            "Task 2 has no train images of 'b' whose 'hospital' is 'south'; add images or take",
        ),
        (
            {"test": TEST.select(range(16 + 4))},
            "Task 2 has no test images of 'b' whose 'hospital' is 'south'",
        ),
        ({"groups": [["a"]] * 19, "domains": None}, "Task 18 has no train images of 'a'; add"),
        (
            {"train": TRAIN.select([*range(36), 36, 45, 46, 47]), "validation_fraction": 0.3},
            "validation_fraction=0.3 of the 1 train images of 'a' whose 'hospital' is 'south' leaves none",
        ),
        (
            {"train": hospitals(9, 0, ("north", None))},
            "Row 36 of the train set has no value in column 'hospital'; fill it in",
        ),
        (
            {"train": with_unknown_hospital(TRAIN), "test": with_unknown_hospital(TEST)},
            "Row 2 of the train set has no value in column 'hospital'; fill it in",
        ),
    ],
)
def test_bad_scenarios(options, message):
    with pytest.raises(ValueError, match=message):
        scenario(**options)


def test_a_column_and_its_values_belong_together():
    for options in ({"domains": DOMAINS}, {"domain_column": "hospital"}):
        with pytest.raises(ValueError, match="domain_column and domains belong together; domain"):
            ClassIncrementalScenario(TRAIN, TEST, tiny_processor(), groups=GROUPS, progress=False, **options)


# Heads of merged adapters


def with_heads(*groups):
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_model("vit"), DynammoConfig(classes=groups[0]), "task_000")
    for index, group in enumerate(groups[1:], start=1):
        model.add_adapter(f"task_{index:03d}", DynammoConfig(classes=group))
    names = [f"task_{index:03d}" for index in range(len(groups))]
    for name in names:
        torch.nn.init.normal_(model.head.heads[name].weight)
        torch.nn.init.normal_(model.head.heads[name].bias)
    return model, names


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(
    ("groups", "heads", "taken"),
    [
        ([["a", "b"], ["b", "a"]], [["a", "b"]], [[0, 1, 2], []]),
        ([["a", "b"], ["b", "c"], ["c"]], [["a", "b"], ["c"]], [[0, 1, 2], [1, 2], []]),
        ([["a"], ["b", "a", "c"], ["d", "b"]], [["a"], ["b", "c"], ["d"]], [[0, 1], [0, 2, 3], [0, 2]]),
    ],
)
def test_merged_adapters_know_each_class_once(groups, heads, taken, one_by_one):
    model, names = with_heads(*groups)
    if one_by_one:
        model.add_weighted_adapter(names[:1], adapter_name="merged")
        for count, name in enumerate(names[1:], start=1):
            merge_into(model, "merged", name, count)
    else:
        model.add_weighted_adapter(names, adapter_name="merged")
    assert model.peft_config["merged"].classes == heads
    for key in ("weight", "bias"):
        parts = [getattr(model.head.heads[name], key)[columns] for name, columns in zip(names, taken, strict=True)]
        assert torch.equal(getattr(model.head.heads["merged"], key), torch.cat(parts))
    model.set_adapter("merged")
    count = len({name for group in groups for name in group})
    assert model(pixel_values=tiny_images("vit")).logits.shape == (2, count)
    assert len(model.config.id2label) == count
    # All of them are averaged, whatever their heads are.
    merged, parts = adapter_tensors(model, "merged"), [adapter_tensors(model, name) for name in names]
    for key, tensor in merged.items():
        if tensor.is_floating_point():
            mean = torch.stack([part[key] for part in parts]).mean(dim=0)
            torch.testing.assert_close(tensor, mean, atol=1e-5, rtol=1e-5)


# Memory and statistics


def labelled(labels, first_row=0):
    count = len(labels)
    rows = torch.arange(first_row, first_row + count)
    images = rows.to(torch.uint8)[:, None, None, None].expand(count, 3, 2, 2).contiguous()
    return LabelledImages(images, torch.tensor(labels), rows)


def test_exemplars_of_a_class_that_comes_back_are_chosen_anew():
    generator = torch.Generator().manual_seed(0)
    memory = ExemplarMemory(8)
    memory.update(labelled([0] * 6 + [1] * 6), torch.randn(12, 5, generator=generator))
    own = memory.images()
    new, later = labelled([0] * 7 + [2] * 6, first_row=50), torch.randn(13, 5, generator=generator)
    of_own = torch.randn(len(own), 5, generator=generator)
    memory.update(new, later, of_own)
    assert memory.classes == [0, 1, 2]
    assert [len(memory.images().of_classes([label])) for label in range(3)] == [2, 2, 2]
    # Four exemplars stand for six images: as if old exemplars were there three times, and new images twice.
    pool = torch.cat([own.rows[own.labels == 0], new.rows[new.labels == 0]])
    features = F.normalize(torch.cat([of_own[own.labels == 0], later[new.labels == 0]]).double(), dim=1)
    mean = torch.cat([features[:4].repeat(3, 1), features[4:].repeat(2, 1)]).mean(dim=0)
    first = (features - mean).norm(dim=1).argmin()
    distance = ((features[first] + features) / 2 - mean).norm(dim=1)
    distance[first] = torch.inf
    assert memory.rows[:2] == [int(pool[first]), int(pool[distance.argmin()])]
    assert memory.counts == {0: 13, 1: 6, 2: 6}
    assert memory.rows[2:4] == own.rows[own.labels == 1][:2].tolist()


@pytest.mark.parametrize("selection", ["herding", "random"])
def test_exemplars_stand_for_all_images_and_not_for_the_newest(selection):
    memory = ExemplarMemory(20, selection)
    # Two hospitals, each with images of its own kind: 400 each.
    kinds = torch.eye(2) + 0.01
    memory.update(labelled([0] * 400), kinds[[0] * 400])
    memory.update(labelled([0] * 400, first_row=400), kinds[[1] * 400], kinds[[0] * 20])
    assert 8 <= sum(row < 400 for row in memory.rows) <= 12
    # A third one.
    own = torch.tensor(memory.rows)
    features = torch.eye(3) + 0.01
    memory.update(labelled([0] * 400, first_row=800), features[[2] * 400], features[(own >= 400).long()])
    assert 4 <= sum(row >= 800 for row in memory.rows) <= 9


def test_old_and_new_exemplars_of_one_row_are_told_apart():
    memory = ExemplarMemory(4)
    memory.restore(labelled([0, 0, 1]))
    assert memory.origins == [0, 1, 2]
    # Features of one direction: the pool is taken in order, old ones first.
    memory.update(labelled([0, 0, 0]), torch.ones(3, 2), torch.ones(3, 2))
    assert (memory.rows, memory.origins) == ([0, 1, 2], [0, 1, 2])
    memory = ExemplarMemory(6)
    memory.restore(labelled([0, 1]))
    memory.update(labelled([0, 0]), torch.ones(2, 2), torch.ones(2, 2))
    assert (memory.rows, memory.origins) == ([0, 0, 1, 1], [0, -1, -1, 1])


def test_statistics_of_parts_are_those_of_all():
    method = new_method(first_session=True, feature_views=1, memory_size=0)
    tasks = scenario()
    fit(method, tasks)
    shown = LabelledImages.concatenate([task.train for task in tasks])
    expected = ClassStatistics()
    expected.update(method.features(shown, "merged")[0], shown.labels)
    assert method.statistics.counts == {0: 18, 1: 18, 2: 9, 3: 9} == expected.counts
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(method.statistics.mean_matrix(), expected.mean_matrix(), **close)
    torch.testing.assert_close(method.statistics.pooled_covariance(), expected.pooled_covariance(), **close)


# Methods


@pytest.mark.parametrize(
    "options",
    [
        {"heads": "ridge"},
        {"heads": "gaussians", "selection": "random"},
        {"heads": "exemplars", "exemplars_as_others": True},
        {"learned_weights": "layer", "weights_steps": 2},
        {"merge": "fisher", "memory_size": 0},
        {"feature_distillation": 1.0, "exemplars_as_others": True},
        {"first_session": True},
    ],
)
@pytest.mark.parametrize("groups", [GROUPS, [["a"], ["c", "a"], ["b", "d", "c"], ["a"]]], ids=["known", "mixed"])
def test_every_kind_of_method_learns_classes_that_come_back(groups, options):
    method = new_method(adapter_epochs=1, **options)
    tasks = scenario(groups, None, seed=0)
    results = fit(method, tasks)
    assert method.groups == groups
    assert method.class_names == tasks.class_names == method.model.peft_config["merged"].class_names
    assert method.head_sizes == sizes_of(method) == ((2, 2) if len(groups) == 3 else (1, 1, 2))
    assert method.model(pixel_values=tiny_images("vit")).logits.shape == (2, 4)
    matrix = results.metrics()["accuracy_matrix"]
    assert [math.isnan(value) for value in matrix[-1]] == [not task.new_classes for task in tasks]
    assert all(math.isfinite(value) for name, value in results.metrics().items() if name != "accuracy_matrix")
    if method.arguments.memory_size:
        assert torch.bincount(method.memory.images().labels).tolist() == [3] * 4


def test_the_head_of_a_task_learns_its_known_classes_too():
    task = scenario()[2]
    # Classes 1 and 0 in this order, and "others".
    logits = 10 * F.one_hot(torch.tensor([1, 0, 2, 2])).float()
    loss, met = new_method().adapter_step(
        lambda pixel_values: SimpleNamespace(logits=logits), torch.zeros(4), torch.arange(4), task
    )
    assert met.all()
    assert loss < 1e-3


def test_exemplars_are_judged_by_their_own_features(monkeypatch):
    method, given = new_method(), []
    update = method.memory.update

    def watched(new_images, features, own_features):
        given.append((method.memory.images(), own_features, new_images, features))
        update(new_images, features, own_features)

    monkeypatch.setattr(method.memory, "update", watched)
    fit(method, scenario())
    exemplars, own_features, new_images, features = given[-1]
    assert len(exemplars) == 12
    torch.testing.assert_close(own_features, method.features(exemplars, "merged")[0])
    torch.testing.assert_close(features, method.features(new_images, "merged")[0])


def accuracy(results, row, column):
    return results.metrics()["accuracy_matrix"][row][column]


def test_another_hospital_is_learned():
    results = fit(new_method(adapter_epochs=4), scenario())
    before = new_method(adapter_epochs=4)
    tasks = scenario()
    fit(before, scenario(GROUPS[:2], DOMAINS[:2]))
    with torch.no_grad():
        logits = before.logits(tasks.transform(tasks[2].test.images))
    untaught = (logits.argmax(dim=1) == tasks[2].test.labels).float().mean()
    assert logits.shape == (8, 4)
    assert accuracy(results, 2, 2) > untaught + 0.4
    # Of the first hospital little is lost.
    assert accuracy(results, 2, 0) >= accuracy(results, 1, 0) - 0.25
    assert results.tasks == [0] * 8 + [1] * 8 + [2] * 8


def test_joint_training_sees_all_images_and_each_class_once():
    method = Joint(tiny_model("vit"), AdapterMethodArguments(adapter_epochs=1))
    fit(method, scenario())
    assert method.class_names == NAMES
    assert sum(len(task.train) for task in method._seen) == 54
    assert method.logits(tiny_images("vit")).shape == (2, 4)


def test_acl_refuses_classes_that_come_back():
    method = ACL(tiny_model("vit"), AdapterMethodArguments(memory_size=12))
    with pytest.raises(ValueError, match="Class 'b' of task 2 comes back from task 0, but ACL.*method='dynammo'"):
        fit(method, scenario())
    assert method.adapters == []


@pytest.mark.parametrize("options", [{}, {"offload_adapters": "folder", "adapter_init": "first"}])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(options, tmp_path):
    if options:
        options = {**options, "offload_adapters": str(tmp_path / "adapters")}
    plain = {name: value for name, value in options.items() if name != "offload_adapters"}
    config = DynammoConfig() if options else None
    whole = new_method(config, **plain)
    expected = fit(whole, scenario())
    for index in (1, 2):
        folder = tmp_path / f"checkpoints {index}"

        def stop(task, results, index=index):
            if task.index == index:
                raise Interrupted

        method = new_method(config, **options)
        learner = Learner(method, Accelerator(cpu=True), progress=False, checkpoints=Checkpoints(folder))
        with pytest.raises(Interrupted):
            learner.fit(scenario(), after_task=stop)
        method = new_method(config, **options)
        learner = Learner(method, Accelerator(cpu=True), progress=False, checkpoints=Checkpoints(folder))
        results = learner.fit(scenario(), resume_from_checkpoint="latest")
        assert method.exemplar_rows == whole.exemplar_rows
        assert method.groups == GROUPS
        images = tiny_images("vit")
        # Merged one by one, sums are rounded otherwise.
        torch.testing.assert_close(method.logits(images), whole.logits(images), atol=1e-2, rtol=1e-3)
        if not options:
            assert_equal_models(method.model, whole.model)
            assert {**results.state(), "seconds": 0} == {**expected.state(), "seconds": 0}
    other = [Checkpoints(folder)]
    learner = Learner(new_method(config, **options), Accelerator(cpu=True), progress=False, checkpoints=other[0])
    with pytest.raises(ValueError, match="another run"):
        learner.fit(scenario(domains=["south", "north", "north"]), resume_from_checkpoint="latest")


@pytest.mark.parametrize("same_data", [True, False])
def test_a_published_method_learns_a_class_again(same_data, tmp_path):
    method = new_method()
    fit(method, scenario(GROUPS[:2], DOMAINS[:2]))
    again = load_method(published(method, tmp_path))
    rows = again.exemplar_rows if same_data else []
    options = {"learned": again.groups, "exemplar_rows": rows}
    if not same_data:
        # Another hospital's own data set.
        options |= {"train": TRAIN.select(range(36, 72)), "test": TEST.select(range(16, 32))}
    later = scenario(GROUPS[2:], DOMAINS[2:], **options)
    results = fit(again, later)
    assert again.groups == GROUPS
    assert again.model.peft_config["merged"].classes == GROUPS[:2]
    if same_data:
        whole = new_method()
        expected = fit(whole, scenario())
        assert_equal_models(again.model, whole.model)
        assert again.exemplar_rows == whole.exemplar_rows
        assert accuracy(results, 1, 1) == accuracy(expected, 2, 2)
    (tmp_path / "second").mkdir()
    third = load_method(published(again, tmp_path / "second"))
    assert third.groups == GROUPS
    assert third.class_names == NAMES
    third.model.set_adapter("merged", inference_mode=True)
    images = tiny_images("vit")
    torch.testing.assert_close(third.logits(images), again.logits(images))


def test_exemplars_of_two_data_sets_are_resumed(tmp_path):
    """Old and new exemplars of a class, of which some have the same rows."""

    def second(folder, resume=None, stop=False):
        method = new_method()
        fit(method, scenario(GROUPS[:2], DOMAINS[:2]))
        south = {"train": TRAIN.select(range(36, 72)), "test": TEST.select(range(16, 32))}
        later = scenario([["a", "b"], ["c"]], ["south", "south"], learned=method.groups, **south)
        learner = Learner(method, Accelerator(cpu=True), progress=False, checkpoints=Checkpoints(tmp_path / folder))

        def interrupt(task, results):
            if stop and task.index == 2:
                raise Interrupted

        learner.fit(later, after_task=interrupt, resume_from_checkpoint=resume)
        return method

    whole = second("whole")
    with pytest.raises(Interrupted):
        second("killed", stop=True)
    resumed = second("killed", "latest")
    assert 0 < sum(origin < 0 for origin in whole.memory.origins) < len(whole.memory)
    assert resumed.memory.origins == whole.memory.origins
    assert torch.equal(resumed.memory.images().images, whole.memory.images().images)
    assert_equal_models(resumed.model, whole.model)


# Measures and cards


def test_tasks_without_test_images_have_no_say():
    nan = math.nan
    matrix = [[0.8, nan, nan], [0.6, nan, nan], [0.7, nan, 0.9]]
    assert forgetting(matrix) == pytest.approx(0.1)
    assert backward_transfer(matrix) == pytest.approx(-0.1)
    assert forgetting([[nan, nan], [nan, 0.5]]) == backward_transfer([[nan, nan], [nan, 0.5]]) == 0.0


@pytest.mark.parametrize("known", [False, True])
def test_results_number_classes_in_the_order_of_their_groups(known, monkeypatch):
    # From the south alone, so that nothing is measured of what was learned in the north, or from both.
    test = TEST if known else TEST.select([row for row in range(16, 32) if NAMES[TEST["label"][row]] != "b"])
    later = scenario([["a", "c"], ["d"]], ["south", "south"], test=test, learned=[["a", "b"]])
    learner = Learner(new_method(), Accelerator(cpu=True), progress=False)
    monkeypatch.setattr(learner, "_predict", lambda images, scenario: (images.labels.tolist(),) * 2)
    results, seen, _ = learner._begin_results(later)
    assert len(seen) == known
    seen += [task.test for task in later]
    predictions, references = learner._score(seen, later, results)
    rows = [row for part in seen for row in part.rows.tolist()]
    assert results.class_names == (["a", "b", "c", "d"] if known else ["a", "c", "d", "b"])
    assert [results.class_names[label] for label in references] == [NAMES[test["label"][row]] for row in rows]
    assert predictions == references


def test_results_follow_the_tasks_of_the_images(tmp_path):
    results = Results([["a", "b"], ["a"], ["b"]])
    results.add(0, [0, 1], [0, 1], 1.0)
    results.add(1, [0, 0, 1], [0, 1, 0], 1.0, tasks=[0, 0, 1])
    assert results.accuracies == [[1.0], [0.5, 0.0]]
    assert results.metrics()["last_accuracy"] == pytest.approx(1 / 3)
    # Without tasks those of the classes' first tasks.
    results = Results([["a", "b"], ["a"], ["b", "c"]])
    for task, label in enumerate([0, 0, 2]):
        results.add(task, [0, 1, 1], [0, 1, label], 1.0)
    assert results.accuracies[2] == [1.0, pytest.approx(math.nan, nan_ok=True), 0.0]
    results.save(tmp_path / "results.json")
    saved = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert saved["accuracy_matrix"][1:] == [[pytest.approx(2 / 3), None], [1.0, None, 0.0]]
    again = Results(results.groups)
    again.restore(results.state())
    assert again.tasks == [0, 0, 2]
    assert again.metrics()["last_accuracy"] == results.metrics()["last_accuracy"]


def test_cards_name_each_class_once():
    options = {"domain_column": "hospital", "domains": DOMAINS, "memory_size": 5}
    facts = CardFacts(name="cells", form="adapter", tasks=GROUPS, options=options)
    text = model_card(facts).text
    assert facts.class_names == NAMES
    assert [line.split("|")[1:4] for line in text.splitlines() if line.startswith(("| 0 ", "| 2 "))] == [
        [" 0 ", " 1, 3 ", " a "],
        [" 2 ", " 2 ", " c "],
    ]
    # Hospitals are nobody's business.
    assert "memory" in text and "north" not in text
    card = dataset_card(scenario(), "cells").text
    assert "domain_column='hospital', domains=[['north'], ['north'], ['south']], seed=0)" in card
    assert card.count("| 3 | a | 9 | 4 |") == 1

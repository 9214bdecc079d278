"""DynaMMo beyond the paper: heads from class statistics, options of the merge, and what is refused."""

import copy
import gc
import json
import logging
import types

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tiny import tiny_dataset, tiny_images, tiny_model, tiny_processor

from dynammo_peft import ClassIncrementalScenario, Dynammo, DynammoArguments, DynammoConfig, DynammoLoraConfig, Learner
from dynammo_peft.data import LabelledImages
from dynammo_peft.hub import load_method, save_model
from dynammo_peft.merging import (
    MergeWeights,
    adapter_slots,
    adapter_tensors,
    combine,
    diagonal_fisher,
)
from dynammo_peft.merging.registry import COMBINATIONS, merge_function
from dynammo_peft.methods.two_stage import TwoStageMethod


def arguments(**changes):
    options = {
        "memory_size": 24,
        "adapter_epochs": 3,
        "adapter_batch_size": 8,
        "adapter_learning_rate": 1e-2,
        "head_epochs": 10,
        "head_batch_size": 8,
        "head_learning_rate": 3e-2,
        "samples_per_class": 20,
    }
    return DynammoArguments(**options | changes)


def coloured_tasks(classes=6, per_class=8):
    train, test = tiny_dataset(classes, per_class), tiny_dataset(classes, 4, seed=1)
    return ClassIncrementalScenario(train, test, tiny_processor(32), classes_per_task=2, progress=False)


@pytest.fixture(scope="module")
def scenario():
    return coloured_tasks()


@pytest.fixture(scope="module")
def hard_scenario():
    """Images that tell nothing of their classes: no loss on them vanishes."""
    parts = [tiny_dataset(1, 48, seed=seed).remove_columns("label") for seed in (0, 1)]
    label = datasets.ClassLabel(names=[f"class {label}" for label in range(6)])
    train, test = (
        part.add_column("label", [row % 6 for row in range(48)]).cast_column("label", label) for part in parts
    )
    return ClassIncrementalScenario(train, test, tiny_processor(32), classes_per_task=2, progress=False)


def strong(**options):
    """Adapters that do so much that it matters how they are merged."""
    return DynammoConfig(**{"init_alpha": 1.0, "reduction_factor": 4} | options)


def begun(scenario, config=None, **options):
    """A method that is about to learn its first task, with heads that differ although nothing trains them."""
    method = Dynammo(tiny_model("vit"), arguments(**{"head_init": "random"} | options), config)
    method.begin(scenario, Accelerator(cpu=True))
    return method


def learn_nothing(method, task):
    """Goes through a task without any training; returns the stages."""
    return list(method.learn(task))


def fit(scenario, config=None, **options):
    """A method that has learned all tasks, and its results."""
    method = Dynammo(tiny_model("vit"), arguments(**options), config)
    return method, Learner(method, Accelerator(cpu=True), progress=False).fit(scenario)


def together(*parts):
    return LabelledImages.concatenate([part for part in parts if part is not None])


@torch.no_grad()
def features_under(model, name, images):
    """What the heads read under an adapter, for normalised images."""
    model.set_adapter(name, inference_mode=True)
    model.eval()
    with model.head_output("features"):
        return model(pixel_values=images).logits


def tensors_of(model, name):
    """Copies of an adapter's tensors, heads left out."""
    return {key: tensor.detach().clone() for key, tensor in adapter_tensors(model, name).items()}


def assert_same(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **tolerances)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("heads", "memory_size"), [(None, 24), ("lda", 0), ("ridge", 0), ("gaussians", 0)])
def test_coloured_classes_are_learned(scenario, heads, memory_size):
    method, results = fit(scenario, heads=heads, memory_size=memory_size)
    assert method.heads == ("lda" if heads is None else heads)
    # Chance is 1 of 6 classes.
    assert results.metrics()["last_accuracy"] >= 0.8
    assert len(method.memory) == memory_size
    # Every image, which is seen as it is and augmented, counts once.
    assert method.statistics.counts == dict.fromkeys(range(6), 8)
    assert [method.statistics.names[label] for label in range(6)] == scenario.class_names
    assert method.model.active_adapters == method.inference_adapters == ["merged"]
    assert not any(parameter.requires_grad for parameter in method.model.parameters())


def uint8_images(root):
    """All batches of images that can be reached from an object, but for those that its classes and modules hold."""
    leave = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType)
    seen, stack, found = set(), [root], []
    while stack:
        current = stack.pop()
        if id(current) in seen or isinstance(current, leave):
            continue
        seen.add(id(current))
        if isinstance(current, torch.Tensor) and current.dtype == torch.uint8 and current.dim() >= 3:
            found.append(current)
        stack += gc.get_referents(current)
    return found


@pytest.mark.parametrize("heads", ["lda", "ridge", "gaussians"])
def test_without_memory_no_image_is_kept(scenario, heads):
    # Everything that looks at images of a task is switched on.
    options = {"memory_size": 0, "heads": heads, "learned_weights": "layer", "weights_steps": 1, "recalibrate": True}
    method = begun(scenario, DynammoConfig(), **options, weights_objective="entropy")
    for task in scenario:
        stages = learn_nothing(method, task)
        labels = {label for stage in stages if stage.name == "adapter" for label in stage.data.labels.tolist()}
        assert labels == set(task.classes)
        del stages
        assert uint8_images(method) == []
        assert method.memory.images() is None


def test_with_memory_its_images_are_found(scenario):
    method = begun(scenario, memory_size=6)
    learn_nothing(method, scenario[0])
    # The test above sees what is there: two classes of three images each.
    assert sum(len(images) for images in uint8_images(method)) == 6


class DiagonalShrinkage:
    """A covariance for scikit-learn, shrunk towards its diagonal."""

    def __init__(self, share):
        self.share = share

    def get_params(self, deep=True):
        return {"share": self.share}

    def fit(self, rows):
        covariance = np.cov(rows.T, bias=True)
        variances = np.diag(covariance)
        self.covariance_ = (1 - self.share) * covariance + np.diag(self.share * variances + 1e-6 * variances.mean())
        return self


def test_with_one_adapter_the_heads_are_those_fitted_to_all_images_at_once():
    scenario = coloured_tasks(classes=8)
    options = {"first_session": True, "feature_views": 1, "shrinkage": 0.3, "memory_size": 0}
    method, _ = fit(scenario, strong(), **options)
    train = together(*(task.train for task in scenario))
    test = together(*(task.test for task in scenario))
    known = features_under(method.model, "merged", scenario.transform(train.images)).double().numpy()
    asked = features_under(method.model, "merged", scenario.transform(test.images)).double().numpy()
    reference = LinearDiscriminantAnalysis(
        solver="lsqr", priors=[1 / 8] * 8, covariance_estimator=DiagonalShrinkage(0.3)
    )
    reference.fit(known, train.labels.numpy())
    with torch.no_grad():
        logits = method.logits(scenario.transform(test.images)).double()
    # Log-odds of classes: what all logits have in common does not matter.
    expected = torch.from_numpy(reference.decision_function(asked))
    found, expected = (values - values.mean(dim=1, keepdim=True) for values in (logits, expected))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))
    assert (found.argmax(dim=1) == test.labels).double().mean() >= 0.8


def test_after_the_first_session_only_heads_are_fitted(scenario):
    method = begun(scenario, strong(), first_session=True)
    assert [stage.name for stage in learn_nothing(method, scenario[0])] == ["adapter"]
    first, means = tensors_of(method.model, "merged"), dict(method.statistics.means)
    for number in (1, 2):
        assert learn_nothing(method, scenario[number]) == []
    for name in ("task_001", "task_002", "merged"):
        found = {key: value for key, value in tensors_of(method.model, name).items() if "num_batches" not in key}
        assert_same(found, {key: first[key] for key in found}, rtol=1e-6, atol=1e-7)
    # Nothing reads exemplars.
    assert method.memory.images() is None
    assert method.arguments.memory_size == 0
    # Old statistics are as they were, to the last bit.
    assert all(torch.equal(method.statistics.means[label], mean) for label, mean in means.items())


def one_by_one(first=2):
    """Tasks of one class each, but for the first."""
    names = [f"class {index}" for index in range(6)]
    groups = [names[:first], *([name] for name in names[first:])]
    train, test = (tiny_dataset(6, per_class, seed=seed) for per_class, seed in ((8, 0), (4, 1)))
    return ClassIncrementalScenario(train, test, tiny_processor(32), groups=groups, progress=False)


@pytest.mark.parametrize("adapter_init", ["previous", "first", "random"])
@pytest.mark.parametrize("memory_size", [0, 12])
def test_a_class_with_nothing_to_tell_it_from_trains_no_adapter(adapter_init, memory_size):
    tasks = one_by_one()
    method = begun(tasks, strong(), adapter_init=adapter_init, memory_size=memory_size)
    assert [stage.name for stage in learn_nothing(method, tasks[0])] == ["adapter"]
    for number in (1, 2):
        assert learn_nothing(method, tasks[number]) == []
        assert method.adapters[-1] == f"task_{number:03d}"
        assert_same(tensors_of(method.model, method.adapters[-1]), tensors_of(method.model, "task_000"))
    # The paper's "others" are something to tell it from.
    method = begun(tasks, strong(), memory_size=12, exemplars_as_others=True)
    assert [[stage.name for stage in learn_nothing(method, tasks[number])] for number in (0, 1)] == [["adapter"]] * 2


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("options", [{}, {"memory_size": 0}, {"first_session": True}, {"merge": "fisher"}])
def test_classes_that_come_one_by_one_are_learned(first, options):
    method, results = fit(one_by_one(first), **options)
    assert method.class_names == [f"class {index}" for index in range(6)]
    assert results.metrics()["last_accuracy"] >= 0.8


def test_a_backbone_is_not_trained_on_a_class_alone():
    with pytest.raises(ValueError, match="first task, which has 'class 0' alone and nothing to tell it from"):
        begun(one_by_one(1), train_backbone=True)
    # There are no others yet.
    with pytest.raises(ValueError, match="nothing to tell it from"):
        begun(one_by_one(1), train_backbone=True, memory_size=12, exemplars_as_others=True)
    begun(one_by_one(2), train_backbone=True)


@pytest.mark.parametrize("heads", ["lda", "gaussians"])
@pytest.mark.parametrize("memory_size", [0, 12])
def test_statistics_follow_the_merge_by_the_fitted_map(scenario, heads, memory_size):
    options = {"feature_views": 1, "drift_ridge": 0.5, "samples_per_class": 2, "adapter_init": "random"}
    # Far out: nothing holds a merge back that is asked for.
    options["merge_options"] = {"first_share": 0.5}
    method = begun(scenario, strong(feature_modules=["layers.1"]), heads=heads, memory_size=memory_size, **options)
    learn_nothing(method, scenario[0])
    old_model, old = copy.deepcopy(method.model), copy.deepcopy(method.statistics)
    task = scenario[1]
    shown = together(task.train, method.memory.images())
    learn_nothing(method, task)
    pixels = scenario.transform(shown.images)
    before = features_under(old_model, "merged", pixels).double()
    after = features_under(method.model, "merged", pixels).double()
    assert (before - after).abs().max() > 0.05

    # Ridge regression to the identity, as an ordinary one with rows that ask for the identity.
    centred, target = before - before.mean(dim=0), after - after.mean(dim=0)
    # Each feature counts by what it varies by in these images or, if that is more, within the classes known before.
    variances = torch.maximum(centred.square().mean(dim=0), old.pooled_covariance().diagonal())

    def fitted(centred, target):
        stay = torch.diag((0.5 * len(centred) * variances).sqrt())
        return torch.linalg.lstsq(torch.cat([centred, stay]), torch.cat([target, stay])).solution

    weight = fitted(centred, target)
    errors = target - centred @ weight
    residual = errors.T @ errors / len(errors)
    if not memory_size:
        # Where no image tells of old classes, these may stray as each of two new ones does from the other's map.
        for label in task.classes:
            other = task.train.labels != label
            middle, goal = before[other].mean(dim=0), after[other].mean(dim=0)
            of_other = fitted(before[other] - middle, after[other] - goal)
            missed = after[~other].mean(dim=0) - goal - (before[~other].mean(dim=0) - middle) @ of_other
            residual += torch.diag((1 + 4 / 2) * missed.square() / 2)

    for label in scenario[0].classes:
        mean = (old.means[label] - before.mean(dim=0)) @ weight + after.mean(dim=0)
        torch.testing.assert_close(method.statistics.means[label], mean, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(method.statistics.means[label], old.means[label], atol=1e-2)
    new = {label: after[: len(task.train)][task.train.labels == label] for label in task.classes}
    for label, own in new.items():
        torch.testing.assert_close(method.statistics.means[label], own.mean(dim=0), rtol=1e-5, atol=1e-5)
    spreads = {label: (own - own.mean(dim=0)).T @ (own - own.mean(dim=0)) for label, own in new.items()}
    if heads == "lda":
        # 16 old images and 16 new ones.
        moved = weight.T @ (16 * old.pooled_covariance()) @ weight + 16 * residual
        expected = (moved + sum(spreads.values())) / 32
        torch.testing.assert_close(method.statistics.pooled_covariance(), expected, rtol=1e-4, atol=1e-5)
    else:
        none = torch.zeros_like(weight)
        for label in scenario[0].classes:
            expected = weight.T @ old.class_covariance(label, none, 0.0) @ weight + residual
            found = method.statistics.class_covariance(label, none, 0.0)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for label, spread in spreads.items():
            found = method.statistics.class_covariance(label, none, 0.0)
            torch.testing.assert_close(found, spread / 8, rtol=1e-4, atol=1e-5)


def drifting(scenario, **options):
    """A method whose later adapters, drawn at random, take features far away; it has learned two tasks."""
    config = strong(feature_modules=["layers.1"])
    method = begun(scenario, config, adapter_init="random", merge="anchored_mean", feature_views=1, **options)
    torch.manual_seed(1)
    for task in list(scenario)[:2]:
        learn_nothing(method, task)
    return method


def between(method, share):
    """The merge of two adapters: `(1 + share) / 2` of the first and the rest of the second."""
    first, second = (tensors_of(method.model, name) for name in method.adapters)
    mixed = {key: value.double().lerp(second[key].double(), (1 - share) / 2) for key, value in first.items()}
    return {key: value.to(first[key]) for key, value in mixed.items()}


def test_without_exemplars_a_merge_is_held_back_until_classes_cannot_stray(scenario, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "dynammo_peft"):
        method = drifting(scenario, memory_size=0)
    share = method.merging.first_share
    assert 0.5 < share <= 1 - 0.5**7
    assert f"the first adapter's share of the merge is {share:.4g}" in caplog.messages[-1]
    assert_same(tensors_of(method.model, "merged"), between(method, share))
    # What is known of the new classes is what this merge makes of them.
    found = features_under(method.model, "merged", scenario.transform(scenario[1].train.images)).double()
    for label in scenario[1].classes:
        own = found[scenario[1].train.labels == label].mean(dim=0)
        torch.testing.assert_close(method.statistics.means[label], own, rtol=1e-5, atol=1e-5)
    # Later merges keep the share, and are the same with adapters on the disk.
    offloaded = drifting(scenario, memory_size=0, offload_adapters=str(tmp_path / "adapters"))
    for learner in (method, offloaded):
        torch.manual_seed(2)
        learn_nothing(learner, scenario[2])
        assert learner.merging.first_share == share
    assert_same(tensors_of(offloaded.model, "merged"), tensors_of(method.model, "merged"), rtol=1e-4, atol=1e-6)
    # Nor after a break.
    save_model(method.model, tmp_path / "saved", ["merged"], learning_state_of=method)
    assert load_method(tmp_path / "saved").merging.first_share == method.merging.first_share


@pytest.mark.parametrize(
    "options, share",
    [({"memory_size": 12}, 0.5), ({"memory_size": 0, "merge_options": {"first_share": 0.25}}, 0.25)],
)
def test_a_merge_is_not_held_back_where_exemplars_show_the_way_or_the_way_is_given(scenario, options, share):
    method = drifting(scenario, **options)
    assert_same(tensors_of(method.model, "merged"), between(method, share))


def test_the_first_merge_that_moves_is_held_back_after_copies_too():
    """Tasks of one class have copies of the first adapter, whose merge is that adapter."""
    train, test = (tiny_dataset(6, per_class, seed=seed) for per_class, seed in ((8, 0), (4, 1)))
    groups = [["class 0", "class 1"], ["class 2"], ["class 4", "class 5"]]
    tasks = ClassIncrementalScenario(train, test, tiny_processor(32), groups=groups, progress=False)
    method = drifting(tasks, memory_size=0)
    for norm in norms_of(method.model):
        # A merge adds up what its adapters have counted in training.
        norm.num_batches_tracked += 7
    assert method.merging.is_at(method.adapters[0], "merged") and method.merging.first_share == 0.5
    learn_nothing(method, tasks[2])
    assert method.merging.first_share > 0.5


def test_a_merge_that_moves_little_is_not_held_back(scenario, caplog):
    method = begun(scenario, memory_size=0)
    with caplog.at_level(logging.INFO, "dynammo_peft"):
        for task in list(scenario)[:2]:
            learn_nothing(method, task)
    assert method.merging.first_share == 0.5 and not caplog.messages


def test_gaussians_train_heads_on_equally_many_features_of_each_class(scenario):
    method = begun(scenario, heads="gaussians", samples_per_class=300, feature_views=1, memory_size=0)
    assert [stage.name for stage in learn_nothing(method, scenario[0])] == ["adapter"]
    adapter_stage, stage = learn_nothing(method, scenario[1])
    assert (adapter_stage.name, stage.name) == ("adapter", "heads")
    features, labels = stage.data.tensors
    assert torch.bincount(labels).tolist() == [300] * 4
    # Of new classes they are those of images, of old ones they are drawn around the mean.
    real = features_under(method.model, "merged", scenario.transform(scenario[1].train.images))
    distance = (features[:, None] - real).norm(dim=2).min(dim=1).values
    assert distance[labels >= 2].max() < 1e-3 < distance[labels < 2].min()
    for label in (0, 1):
        spread = method.statistics.class_covariance(label, method.statistics.pooled_covariance()).diagonal().sqrt()
        shift = (features[labels == label].double().mean(dim=0) - method.statistics.means[label]).abs()
        # Five standard errors.
        assert (shift <= 5 * spread / 300**0.5 + 1e-6).all()


def test_low_rank_covariances_take_less_room(scenario):
    method, results = fit(scenario, heads="gaussians", covariance_rank=4, memory_size=0)
    features = method.statistics.features
    kept = {name: tensor for name, tensor in method.statistics.state().items() if name.startswith("scatter")}
    assert sum(tensor.numel() for tensor in kept.values()) == 6 * (4 + 1) * features < 6 * features**2
    assert results.metrics()["last_accuracy"] >= 0.8


MERGES = {
    "linear": {},
    "uniform": {},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5, "seed": 3},
    "magnitude_prune": {"density": 0.5},
    "exponential_moving_average": {"decay": 0.75},
    "anchored_mean": {"first_share": 0.25},
    "fisher": {},
}


def test_all_merge_functions_that_need_nothing_else_are_tried():
    # Running means need a count that changes with each task, `regmean` has linear layers in mind.
    assert set(COMBINATIONS) - set(MERGES) == {"running_mean", "running_anchored_mean", "regmean"}


def own_fisher(method, scenario, number):
    """The Fisher information of a task's adapter by its own head, whose classes start at zero, image by image."""
    task, name = scenario[number], f"task_00{number}"
    batches = [
        (scenario.transform(task.train.images[[row]]), task.train.labels[[row]] - task.first_class)
        for row in range(len(task.train))
    ]
    return diagonal_fisher(method.model, name, batches, vectorized=False)


@pytest.mark.parametrize("merge", MERGES)
def test_the_merge_function_is_the_one_asked_for(scenario, merge):
    options = MERGES[merge]
    text = json.dumps(options) if options else None
    method = begun(scenario, strong(), adapter_init="random", merge=merge, merge_options=text, memory_size=0)
    for task in scenario:
        learn_nothing(method, task)
    names = ["task_000", "task_001", "task_002"]
    tensors = [tensors_of(method.model, name) for name in names]
    merged = tensors_of(method.model, "merged")
    function = COMBINATIONS[merge]
    options = dict(options)
    if merge == "fisher":
        options["fisher"] = [own_fisher(method, scenario, number) for number in range(3)]
    elif "density" in options:
        # Differences from the first adapter, from which the others came.
        options["base"] = tensors[0]
    slots = adapter_slots(method.model, "task_000")
    expected = combine(slots, tensors, function.check_weights(None, 3), function, options)
    assert_same(merged, expected, rtol=1e-4, atol=1e-5)
    shares = {"linear": [1 / 3] * 3, "uniform": [1 / 3] * 3, "exponential_moving_average": [0.5625, 0.1875, 0.25]}
    shares["anchored_mean"] = [0.5, 0.25, 0.25]
    for key, value in merged.items():
        if value.is_floating_point() and merge in shares:
            by_hand = sum(share * own[key] for share, own in zip(shares[merge], tensors))
            torch.testing.assert_close(value, by_hand, rtol=1e-4, atol=1e-5)
    mean = sum(own["vit.layers.0.dynammo_down.weight"] for own in tensors) / 3
    found = merged["vit.layers.0.dynammo_down.weight"]
    assert torch.allclose(found, mean, atol=1e-5) == (merge in ("linear", "uniform"))


def test_the_merge_goes_half_way_from_the_first_adapter(scenario):
    method = begun(scenario, strong(), adapter_init="random")
    for task in scenario:
        learn_nothing(method, task)
    first, second, third = (tensors_of(method.model, name) for name in method.adapters)
    for key, value in tensors_of(method.model, "merged").items():
        if value.is_floating_point():
            expected = first[key] / 2 + (first[key] + second[key] + third[key]) / 6
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first["vit.layers.0.dynammo_down.weight"], second["vit.layers.0.dynammo_down.weight"])


@pytest.mark.parametrize(
    ("options", "config", "merge"),
    [
        ({}, DynammoConfig(), "anchored_mean"),
        ({"merge_options": {"first_share": 0.1}}, DynammoConfig(), "anchored_mean"),
        ({"merge": "linear"}, DynammoConfig(), "linear"),
        ({"learned_weights": "task"}, DynammoConfig(), "linear"),
        ({}, DynammoConfig(preset="paper"), "linear"),
        ({}, DynammoLoraConfig(), "anchored_mean"),
        ({"learned_weights": "task"}, DynammoLoraConfig(), "cat"),
        ({"adapter_init": "first"}, DynammoLoraConfig(), "anchored_mean"),
        ({"adapter_init": "random"}, DynammoLoraConfig(), "cat"),
        ({"adapter_init": "random"}, DynammoConfig(), "anchored_mean"),
    ],
)
def test_which_merge_is_the_default(options, config, merge):
    assert Dynammo(tiny_model("vit"), arguments(**options), config).merging.combination_type == merge


@pytest.mark.parametrize("given", ['{"density": 0.5}', {"density": 0.5}])
def test_options_of_a_merge_are_json_or_a_mapping(given):
    assert Dynammo(tiny_model("vit"), arguments(merge="ties", merge_options=given)).merging.options == {"density": 0.5}


@pytest.mark.parametrize("merge", MERGES)
def test_every_merge_function_learns(merge):
    # Of LoRA's factors a weighted sum is no mean.
    config = DynammoConfig() if merge == "linear" else None
    _, results = fit(coloured_tasks(classes=4), config, merge=merge, merge_options=MERGES[merge], memory_size=8)
    assert results.metrics()["last_accuracy"] >= 0.7


@pytest.mark.parametrize("objective", ["statistics", "labels", "entropy"])
@pytest.mark.parametrize("granularity", ["task", "layer", "channel"])
def test_merge_weights_are_learned(hard_scenario, granularity, objective, tmp_path):
    options = {"learned_weights": granularity, "weights_objective": objective, "weights_steps": 3, "shrinkage": 1.0}
    options |= {"adapter_init": "random", "feature_views": 1, "drift_ridge": 1e-8}
    method = begun(hard_scenario, strong(feature_modules=["layers.1"]), **options)
    for number in (0, 1):
        learn_nothing(method, hard_scenario[number])
    model, names = method.model, ["task_000", "task_001"]
    kept = model.peft_config["merged"].merge_weights
    # Of its own accord on the simplex for entropy only, which stronger adapters lower whatever they do.
    found = (kept["granularity"], kept["simplex"], list(kept["adapters"]))
    assert found == (granularity, objective == "entropy", names)
    assert 0 < kept["loss_before"] != kept["loss_after"] > 0
    assert all(model.peft_config[name].merge_weights is None for name in names)
    # The merged adapter is what the weights say, and not the mean.
    merged = tensors_of(model, "merged")
    tensors = [tensors_of(model, name) for name in names]
    weights = MergeWeights.from_dict(kept, adapter_slots(model, "merged"))
    assert_same(merged, weights.combine(tensors))
    key = "vit.layers.0.dynammo_down.weight"
    assert not torch.allclose(merged[key], (tensors[0][key] + tensors[1][key]) / 2, atol=1e-5)
    # Statistics are those of the features as they are now; old ones are moved exactly, since the memory holds all the
    # old images, and fewer than features.
    train = together(*(hard_scenario[number].train for number in (0, 1)))
    features = features_under(model, "merged", hard_scenario.transform(train.images)).double()
    for label in range(4):
        mean = features[train.labels == label].mean(dim=0)
        torch.testing.assert_close(method.statistics.means[label], mean, rtol=1e-4, atol=1e-4)
    # They are saved with the adapter.
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    loaded = PeftModel.from_pretrained(tiny_model("vit"), tmp_path / "merged", adapter_name="merged")
    assert loaded.peft_config["merged"].merge_weights == {**kept, "adapters": names}
    images = tiny_images("vit")
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, method.logits(images))


def test_objectives_of_merge_weights(hard_scenario):
    losses = {}
    for objective in ("statistics", "labels", "entropy"):
        options = {"learned_weights": "task", "weights_objective": objective, "weights_steps": 0, "feature_views": 1}
        method = begun(hard_scenario, strong(), adapter_init="random", shrinkage=1.0, **options)
        for number in (0, 1):
            learn_nothing(method, hard_scenario[number])
        losses[objective] = method.model.peft_config["merged"].merge_weights["loss_before"]
    # Heads in closed form give the posterior of the classes' Gaussians.
    assert losses["statistics"] == pytest.approx(losses["labels"], rel=1e-3)
    assert 0 < losses["entropy"] != pytest.approx(losses["labels"], rel=0.1)


def test_heads_of_learned_merge_weights_are_fitted_to_what_they_gave(scenario):
    method, results = fit(scenario, learned_weights="layer", weights_steps=5)
    assert results.metrics()["last_accuracy"] >= 0.8
    means = method.statistics.mean_matrix()
    covariance = method.statistics.pooled_covariance()
    shrunk = 0.9 * covariance + torch.diag(0.1 * covariance.diagonal() + 1e-6 * covariance.diagonal().mean())
    images = scenario.transform(torch.cat([task.test.images for task in scenario]))
    features = features_under(method.model, "merged", images).double()
    # Mahalanobis distances to the class means.
    differences = features[:, None] - means
    solved = torch.linalg.solve(shrunk, differences.flatten(0, 1).T).T.view_as(differences)
    nearest = (differences * solved).sum(dim=2).argmin(dim=1)
    with torch.no_grad():
        assert torch.equal(method.logits(images).argmax(dim=1), nearest)


@pytest.mark.parametrize("objective", ["labels", "entropy"])
def test_merge_weights_are_learned_with_heads_of_exemplars(objective):
    options = {"learned_weights": "task", "weights_objective": objective, "weights_steps": 2, "heads": "exemplars"}
    method, _ = fit(coloured_tasks(classes=4), strong(), **options)
    assert method.statistics is None
    assert method.model.peft_config["merged"].merge_weights["granularity"] == "task"


@pytest.mark.parametrize("simplex", [True, False])
def test_weights_of_a_simplex_sum_to_one(hard_scenario, simplex):
    options = {"learned_weights": "layer", "weights_simplex": simplex, "weights_steps": 3, "shrinkage": 1.0}
    method = begun(hard_scenario, strong(), adapter_init="random", **options)
    for task in hard_scenario:
        learn_nothing(method, task)
    groups = method.model.peft_config["merged"].merge_weights["groups"]
    weights = torch.tensor([group["weights"] for group in groups])
    assert not torch.isclose(weights, torch.tensor(1 / 3)).any()
    assert torch.isclose(weights.sum(dim=1), torch.tensor(1.0)).all() == simplex


def test_without_learning_no_weights_are_kept(scenario):
    method = begun(scenario)
    for number in (0, 1):
        learn_nothing(method, scenario[number])
    assert method.model.peft_config["merged"].merge_weights is None


def norms_of(model):
    """BatchNorm layers of the merged adapter, in the order in which they run."""
    layers = [module for module in model.modules() if hasattr(module, "dynammo_down_norm")]
    return [norm for layer in layers for norm in (layer.dynammo_down_norm["merged"], layer.dynammo_up_norm["merged"])]


@pytest.mark.parametrize("balanced", [False, True])
def test_no_batch_that_a_merge_is_measured_on_is_of_one_image(scenario, balanced):
    method = begun(scenario)
    images = together(scenario[0].train, scenario[1].train).select(torch.arange(33) % 24)
    batches = method.merging._batches(images, balanced)
    assert [len(labels) for _, labels in batches] == [17, 16] and len(batches) == 2
    if not balanced:
        pixels, labels = (torch.cat(parts) for parts in zip(*batches))
        assert torch.equal(labels, images.labels) and torch.equal(pixels, scenario.transform(images.images))


@pytest.mark.parametrize("learned", ["none", "layer"])
def test_recalibration_measures_the_statistics(scenario, learned):
    options = {"learned_weights": learned, "weights_steps": 2, "adapter_init": "random", "adapter_batch_size": 64}
    method = begun(scenario, strong(), recalibrate=True, **options)
    learn_nothing(method, scenario[0])
    # A single adapter has its own.
    only, first = tensors_of(method.model, "merged"), tensors_of(method.model, "task_000")
    assert_same(only, {key: first[key] for key in only})
    shown = together(scenario[1].train, method.memory.images())
    learn_nothing(method, scenario[1])
    expected = copy.deepcopy(method.model)
    expected.eval()
    for norm in norms_of(expected):
        # With this momentum a batch replaces what was there.
        norm.train()
        norm.momentum = 1.0
        norm.reset_running_stats()
    with torch.no_grad():
        expected(pixel_values=scenario.transform(shown.images))
    for found, norm in zip(norms_of(method.model), norms_of(expected)):
        torch.testing.assert_close(found.running_mean, norm.running_mean, rtol=1e-3, atol=1e-4)
        # 28 images of 16 patches; PyTorch divides by one less.
        places = len(shown) * 16
        torch.testing.assert_close(found.running_var, norm.running_var * (places - 1) / places, rtol=1e-3, atol=1e-4)
    assert not any(norm.training for norm in norms_of(method.model))


def test_without_recalibration_statistics_are_averaged(scenario):
    method = begun(scenario, strong(), adapter_init="random")
    learn_nothing(method, scenario[0])
    with torch.no_grad():
        method.model.get_base_model().vit.layers[0].dynammo_up_norm["task_000"].running_mean.fill_(4.0)
    learn_nothing(method, scenario[1])
    assert norms_of(method.model)[1].running_mean.eq(3.0).all()


def test_the_papers_preset_is_the_paper(scenario):
    method = begun(scenario, DynammoConfig(preset="paper"))
    assert (method.heads, method.views, method.statistics) == ("exemplars", 1, None)
    assert (method.merging.combination_type, method.arguments.learns, method.arguments.recalibrate) == (
        "linear",
        False,
        False,
    )
    names, heads = [], None
    for task in scenario:
        for stage in method.learn(task):
            names.append((task.index, stage.name))
            heads = stage
    assert names == [(0, "adapter"), (1, "adapter"), (1, "heads"), (2, "adapter"), (2, "heads")]
    model = method.model
    for config in model.peft_config.values():
        assert (config.feature_modules, config.scoring) == ([], "min_others")
        assert (config.reduction_factor, config.padding, config.init_alpha) == (1, 0, 0.02)
    tensors = [tensors_of(model, f"task_00{number}") for number in range(3)]
    for key, value in tensors_of(model, "merged").items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (tensors[0][key] + tensors[1][key] + tensors[2][key]) / 3)
    # Stage 2: all heads, on the features of the balanced memory, each image once and as it is.
    memory = method.memory.images()
    features, labels = heads.data.tensors
    assert torch.equal(labels, memory.labels)
    assert torch.bincount(labels).tolist() == [4] * 6
    base, entered = model.get_base_model(), []
    handle = base.classifier.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        model(pixel_values=scenario.transform(memory.images))
    handle.remove()
    torch.testing.assert_close(features, entered[0])
    assert heads.network is model.head.heads["merged"]
    assert heads.network.weight.shape == (6 + 3, 32)


def test_given_values_win_over_the_papers():
    config = DynammoConfig(preset="paper", scoring="log_odds", feature_modules=["layers.0"], padding=1)
    method = Dynammo(tiny_model("vit"), arguments(heads="ridge", feature_views=3), config)
    assert (method.heads, method.views, method.config.feature_modules) == ("ridge", 3, ["layers.0"])
    method = Dynammo(tiny_model("vit"), arguments(heads="gaussians"), DynammoConfig(preset="paper"))
    assert (method.heads, method.views) == ("gaussians", 1)
    method = Dynammo(tiny_model("vit"))
    assert (method.heads, method.views, method.config.feature_modules) == ("lda", 2, None)
    # The configuration that was given is not changed.
    assert config.classes is None


@pytest.mark.parametrize(
    "options",
    [
        {"heads": "gaussians", "learned_weights": "channel", "weights_steps": 2},
        {"heads": "ridge", "merge": "dare_ties", "merge_options": {"density": 0.5}, "recalibrate": True},
        {"merge": "fisher", "selection": "random", "feature_views": 3},
    ],
)
def test_two_runs_with_one_seed_are_equal(options):
    runs = []
    for attempt in range(2):
        # What happened before must not matter.
        torch.manual_seed(attempt)
        options = {"adapter_epochs": 1, "head_epochs": 2, **options}
        method, results = fit(coloured_tasks(classes=4), DynammoConfig(), **options)
        statistics = [method.statistics.mean_matrix(), method.statistics.pooled_covariance()]
        runs.append((state(method.model), statistics, results.metrics()))
    assert runs[0][0].keys() == runs[1][0].keys()
    assert [key for key, value in runs[0][0].items() if not torch.equal(value, runs[1][0][key])] == []
    assert all(torch.equal(*pair) for pair in zip(runs[0][1], runs[1][1]))
    assert runs[0][2] == runs[1][2]


def test_augmented_views_widen_the_statistics():
    covariances = []
    for views in (1, 3):
        method = begun(coloured_tasks(classes=4), feature_views=views)
        learn_nothing(method, method_task := coloured_tasks(classes=4)[0])
        assert method.statistics.counts == dict.fromkeys(method_task.classes, 8)
        covariances.append(method.statistics.pooled_covariance().trace().item())
    assert covariances[0] < covariances[1]


@pytest.mark.parametrize(
    ("options", "config", "words"),
    [
        ({"memory_size": 0, "heads": "exemplars"}, {}, ["heads='exemplars'", "memory_size=0", "heads='lda'"]),
        (
            {"memory_size": 0},
            {"preset": "paper"},
            ["heads='exemplars' (preset='paper')", "memory_size=0", "heads='lda' and scoring='log_odds' in the Dyn"],
        ),
        ({"memory_size": 0, "heads": "exemplars"}, {"preset": "paper"}, ["heads='exemplars' cannot", "memory_size=0"]),
        (
            {"first_session": True},
            {"preset": "paper"},
            ["(preset='paper')", "heads='lda' and scoring='log_odds' in the DynammoConfig and exemplars_as_others"],
        ),
        (
            {"first_session": True, "heads": "lda"},
            {"preset": "paper", "scoring": "log_odds"},
            ["exemplars_as_others (preset='paper'; set it to False)"],
        ),
        ({"shrinkage": 0.5}, {"preset": "paper"}, ["not for heads='exemplars' (preset='paper')"]),
        ({"drift_ridge": 0.5}, {"preset": "paper"}, ["drift_ridge is", "heads='exemplars' (preset='paper') has not"]),
        ({"first_session": True, "heads": "exemplars"}, {}, ["heads='exemplars'", "first_session"]),
        ({"heads": "lda"}, {"scoring": "min_others"}, ["heads='lda'", "scoring='log_odds'", "'min_others'"]),
        (
            {"heads": "ridge"},
            {"preset": "paper"},
            ["heads='ridge' needs", "got 'min_others' (preset='paper'); set scoring='log_odds' in the DynammoConfig"],
        ),
        (
            {"heads": "exemplars", "learned_weights": "layer"},
            {},
            ["weights_objective='statistics'", "heads='exemplars'"],
        ),
        (
            {"memory_size": 0, "learned_weights": "layer"},
            {},
            ["newest classes alone", "memory_size", "weights_objective='entropy'"],
        ),
        ({"first_session": True, "learned_weights": "layer"}, {}, ["first_session", "would do nothing"]),
        ({"first_session": True, "merge": "uniform"}, {}, ["first_session", "would do nothing"]),
        ({"first_session": True, "merge_options": {"first_share": 0}}, {}, ["first_session", "merge_options"]),
        ({"first_session": True, "feature_distillation": 1.0}, {}, ["first_session", "would do nothing"]),
        ({"first_session": True, "drift_ridge": 0.5}, {}, ["drift_ridge", "would do nothing"]),
        ({"first_session": True, "exemplars_as_others": True}, {}, ["exemplars_as_others", "would do nothing"]),
        ({"first_session": True, "adapter_init": "random"}, {}, ["adapter_init='random'", "would do nothing"]),
        ({"heads": "gaussians", "shrinkage": 0.5}, {}, ["shrinkage", "heads='gaussians'", "closed form"]),
        ({"heads": "exemplars", "shrinkage": 0.0}, {}, ["shrinkage", "heads='exemplars'", "closed form"]),
        ({"heads": "exemplars", "drift_ridge": 0.5}, {}, ["drift_ridge", "heads='exemplars'"]),
        ({"first_session": True, "recalibrate": True}, {}, ["first_session", "recalibrate"]),
        ({"heads": "knn"}, {}, ["heads='knn'", "'lda', 'ridge', 'gaussians', 'exemplars'"]),
        ({"merge": "slerp"}, {}, ["merge='slerp'", *(repr(name) for name in COMBINATIONS if "running" not in name)]),
        ({"exemplars_as_others": True, "memory_size": 0}, {}, ["exemplars_as_others", "memory_size"]),
        ({"heads": "exemplars", "covariance_rank": 3}, {}, ["covariance_rank", "heads='exemplars'"]),
        ({"learned_weights": "row"}, {}, ["learned_weights='row'", "'none', 'task', 'layer', 'channel'"]),
        ({"weights_objective": "loss"}, {}, ["weights_objective='loss'", "'statistics', 'labels', 'entropy'"]),
        (
            {"learned_weights": "layer", "merge": "ties", "merge_options": {"density": 0.5}},
            {},
            ["learned_weights", "merge='linear'", "merge='ties'"],
        ),
        ({"merge": "ties"}, {}, ["'ties'", "needs the option 'density'"]),
        ({"merge_options": {"density": 0.5}}, {}, ["'anchored_mean'", "no option 'density'"]),
        ({"merge": "ties", "merge_options": "{density: 0.5}"}, {}, ["merge_options='{density: 0.5}'", "JSON"]),
        ({"merge": "ties", "merge_options": "[0.5]"}, {}, ["merge_options='[0.5]'", "mapping"]),
        ({"merge": "ties", "merge_options": "0.5"}, {}, ["merge_options='0.5'", "mapping"]),
        ({"feature_views": 0}, {}, ["feature_views=0", "at least 1"]),
        ({"shrinkage": 1.5}, {}, ["shrinkage=1.5", "at most 1"]),
        ({"shrinkage": -0.5}, {}, ["shrinkage=-0.5", "at least 0"]),
        ({"drift_ridge": -1.0}, {}, ["drift_ridge=-1.0", "at least 0"]),
        ({"drift_ridge": float("nan")}, {}, ["drift_ridge=nan", "finite"]),
        ({"feature_distillation": float("inf")}, {}, ["feature_distillation=inf", "finite"]),
        ({"drift_ridge": "strong"}, {}, ["drift_ridge='strong'", "at least 0"]),
        ({"shrinkage": float("nan")}, {}, ["shrinkage=nan", "at most 1"]),
        ({"feature_views": 1.5}, {}, ["feature_views=1.5", "integer"]),
        ({"samples_per_class": 2.5}, {}, ["samples_per_class=2.5", "integer"]),
        ({"covariance_rank": 0}, {}, ["covariance_rank=0", "at least 1"]),
        ({"samples_per_class": 0}, {}, ["samples_per_class=0", "at least 1"]),
        ({"weights_steps": -1}, {}, ["weights_steps=-1", "at least 0"]),
        ({"covariance_rank": 0}, {}, ["rank=0", "at least 1"]),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(options, config, words):
    with pytest.raises(ValueError) as error:
        Dynammo(tiny_model("vit"), arguments(**options), DynammoConfig(**config))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("options", [{"memory_size": 0}, {"first_session": True, "exemplars_as_others": False}])
def test_what_messages_about_the_preset_say_can_be_done(options):
    config = DynammoConfig(preset="paper", scoring="log_odds")
    assert Dynammo(tiny_model("vit"), arguments(heads="lda", **options), config).heads == "lda"


def test_feature_distillation_holds_the_merged_features(scenario):
    moved = {}
    for weight in (0.0, 100.0):
        method = begun(scenario, strong(), memory_size=0, feature_distillation=weight)
        learner = Learner(method, method.accelerator, progress=False)
        for task in (scenario[0], scenario[1]):
            for stage in method.learn(task):
                learner._run(stage, scenario)
            if task.index == 0:
                before = method.features(scenario[0].test, "merged")
        moved[weight] = (method.features(scenario[0].test, "merged") - before).square().mean()
    assert moved[100.0] < 0.7 * moved[0.0]


def test_the_distillation_loss_is_the_change_of_features(scenario):
    method = begun(scenario, strong(), feature_distillation=3.0)
    learn_nothing(method, scenario[0])
    method.add_adapter("task_001", scenario[1].class_names)
    with torch.no_grad():
        for parameter in method.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    images = scenario.transform(scenario[1].train.images)
    labels = scenario[1].train.labels
    method.model.eval()
    with method.model.head_output("last_layer_logits"):
        loss, met = method.adapter_step(method.model, images, labels, scenario[1])
        assert method.model.active_adapter == "task_001"
        plain, plain_met = TwoStageMethod.adapter_step(method, method.model, images, labels, scenario[1])
    assert loss.requires_grad
    new = features_under(method.model, "task_001", images)
    old = features_under(method.model, "merged", images)
    torch.testing.assert_close(loss - plain, 3 * (new - old).square().mean(), rtol=1e-3, atol=1e-5)
    assert loss > plain
    assert torch.equal(met, plain_met)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"merge": "exponential_moving_average", "merge_options": {"decay": 3}}, ["decay=3", "between 0 and 1"]),
        ({"merge": "ties", "merge_options": {"density": -1}}, ["density=-1", "[0, 1]"]),
        ({"merge": "ties", "merge_options": {"density": "half"}}, ["density='half'", "[0, 1]"]),
        (
            {"merge": "ties", "merge_options": {"density": 0.5, "majority_sign_method": "sum"}},
            ["majority_sign_method='sum'", "'total' or 'frequency'"],
        ),
        ({"merge": "ties", "merge_options": {"density": 0.5, "base": []}}, ["'base'", "measured", "leave it out"]),
        ({"merge": "fisher", "merge_options": {"fisher": []}}, ["'fisher'", "measured", "leave it out"]),
        ({"merge": "running_mean"}, ["merge='running_mean'", "merge='uniform'", "offload_adapters"]),
        ({"merge": "running_mean", "merge_options": {"count": 2}}, ["merge='running_mean'", "merge='uniform'"]),
        ({"merge": "running_anchored_mean"}, ["merge='running_anchored_mean'", "merge='anchored_mean'"]),
        ({"merge_options": {"first_share": 1.5}}, ["first_share=1.5", "between 0", "and 1"]),
        ({"merge_options": {"first_share": "half"}}, ["first_share='half'", "between 0", "and 1"]),
        ({"merge_options": {"share": 0.5}}, ["no option 'share'", "first_share"]),
        ({"weights_learning_rate": -1.0}, ["weights_learning_rate=-1.0", "greater than 0"]),
        ({"weights_learning_rate": 0.0}, ["weights_learning_rate=0.0", "greater than 0"]),
        ({"weights_learning_rate": float("nan")}, ["weights_learning_rate=nan", "finite"]),
        ({"weights_steps": 2.5}, ["weights_steps=2.5", "integer"]),
    ],
)
def test_bad_values_of_the_merge_are_refused_at_once(options, words):
    with pytest.raises(ValueError) as error:
        Dynammo(tiny_model("vit"), arguments(**options))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_values_for_a_merge_of_ones_own_are_refused_at_once():
    @merge_function()
    def faded(adapters, weights, *, by):
        return {key: adapters[0][key] / by for key in adapters[0]}

    try:
        with pytest.raises(ValueError, match="merge_options={'by': 'half'} are of no use for merge='faded'"):
            Dynammo(tiny_model("vit"), arguments(merge="faded", merge_options={"by": "half"}))
    finally:
        del COMBINATIONS["faded"]


@pytest.mark.parametrize("objective", ["labels", "statistics", "entropy"])
def test_weights_are_not_learned_without_images_of_a_class(objective):
    tasks = coloured_tasks(classes=4)
    method = begun(tasks, learned_weights="layer", weights_objective=objective, weights_steps=1)
    learn_nothing(method, tasks[0])
    exemplars = method.memory.images()
    method.memory.restore(exemplars.of_classes([1]))
    if objective == "entropy":
        # Needs no labels.
        learn_nothing(method, tasks[1])
        return
    with pytest.raises(ValueError, match="no exemplar of 'class 0', so that learned_weights='layer'.*memory_size"):
        learn_nothing(method, tasks[1])

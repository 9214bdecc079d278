"""DynaMMo, ACL and joint training: what they train, what they merge, and how they name classes."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from tiny import tiny_dataset, tiny_images, tiny_model, tiny_processor
from torch.nn import functional as F

from dynammo_peft import (
    ACL,
    METHODS,
    ClassIncrementalScenario,
    Dynammo,
    DynammoArguments,
    DynammoConfig,
    DynammoLoraConfig,
    Joint,
    Learner,
    forward_cost,
)
from dynammo_peft.data import BatchTransform
from dynammo_peft.methods import Optimization, Stage
from dynammo_peft.training.loop import TrainingLoop


# What is run: methods, and DynaMMo as the paper has it.
RUNS = {"dynammo": Dynammo, "paper": Dynammo, "acl": ACL, "joint": Joint}


def arguments(method_cls=Dynammo, **changes):
    options = {
        "memory_size": 24,
        "adapter_epochs": 3,
        "adapter_batch_size": 8,
        "adapter_learning_rate": 2e-2,
        "head_epochs": 20,
        "head_batch_size": 8,
        "head_learning_rate": 3e-2,
    }
    return method_cls.arguments_cls(**options | changes)


def coloured_tasks(classes=6, size=64, per_class=8):
    """Tasks of two classes each, not in the order of the labels."""
    train, test = tiny_dataset(classes, per_class), tiny_dataset(classes, 4, seed=1)
    return ClassIncrementalScenario(train, test, tiny_processor(size), classes_per_task=2, seed=3, progress=False)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def backbone(model):
    """What the model was made of before adapters came, by the names of that time."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {key.replace("base_layer.", ""): value for key, value in state(base).items() if "dynammo_" not in key}


def adapter(model, name):
    """An adapter's tensors in front of the blocks, heads left out, by name without that of the adapter."""
    parts = {key: value for key, value in state(model).items() if f".{name}" in key and "_head" not in key}
    return {key.replace(f".{name}", ""): value for key, value in parts.items()}


def changed(before, after):
    """Names of the tensors that are not equal bit for bit."""
    assert set(before) == set(after)
    return {key for key in before if not torch.equal(before[key], after[key])}


@torch.no_grad()
def features_under(model, name, images):
    """What enters the head while an adapter is active, and the pooled maps of the layers that it reads too."""
    entered, pooled = [], []
    layers = [model.get_base_model().convnext.get_submodule(key) for key in model.peft_config[name].feature_modules]
    handles = [model.head.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0].flatten(1)))]
    handles += [layer.register_forward_hook(lambda *args: pooled.append(args[2].mean((2, 3)))) for layer in layers]
    model.set_adapter(name)
    model.eval()
    model(pixel_values=images)
    for handle in handles:
        handle.remove()
    return torch.cat([*entered, *(F.layer_norm(means, means.shape[1:]) for means in pooled)], dim=1)


def begun(method_cls, scenario, config=None, **options):
    """A method that is about to learn its first task, with heads that differ although nothing trains them."""
    options = {"head_init": "random"} | options
    method = method_cls(tiny_model("convnext"), arguments(method_cls, **options), config)
    method.begin(scenario, Accelerator(cpu=True))
    return method


def learn_nothing(method, task):
    """Goes through a task without any training."""
    for _ in method.learn(task):
        pass


def fit(method_cls, scenario, model, config=None, **options):
    """Learns all tasks, and notes before and after each stage what the model was made of."""
    stages = []

    class Watched(method_cls):
        def learn(self, task):
            for stage in super().learn(task):
                labels = stage.data.labels if hasattr(stage.data, "labels") else stage.data.tensors[1]
                noted = SimpleNamespace(task=task.index, name=stage.name, labels=labels, before=state(self.model))
                yield stage
                noted.after = state(self.model)
                noted.training = stage.network.training
                stages.append(noted)

    first = backbone(model)
    method = Watched(model, arguments(method_cls, **options), config)
    results = Learner(method, Accelerator(cpu=True), progress=False).fit(scenario)
    return SimpleNamespace(method=method, model=method.model, results=results, stages=stages, first=first)


@pytest.fixture(scope="module")
def scenario():
    return coloured_tasks()


@pytest.fixture(scope="module")
def images():
    return tiny_images("convnext", count=5)


@pytest.fixture(scope="module")
def runs(scenario):
    configs = {"paper": DynammoConfig(preset="paper")}
    return {name: fit(cls, scenario, tiny_model("convnext"), configs.get(name)) for name, cls in RUNS.items()}


def test_methods_are_found_by_name():
    assert {name: METHODS[name] for name in METHODS} == {"dynammo": Dynammo, "acl": ACL, "joint": Joint}


@pytest.mark.parametrize("name", RUNS)
def test_methods_learn_coloured_classes(runs, name):
    metrics = runs[name].results.metrics()
    # Chance is 1 of 6 classes.
    assert metrics["last_accuracy"] >= 0.8
    assert metrics["average_incremental_accuracy"] >= 0.8


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("dynammo", ["merged", "task_000", "task_001", "task_002"]),
        ("paper", ["merged", "task_000", "task_001", "task_002"]),
        ("acl", ["task_000", "task_001", "task_002"]),
        ("joint", ["joint_002"]),
    ],
)
def test_adapters_and_their_classes(runs, scenario, name, adapters):
    config = runs[name].model.peft_config
    assert sorted(config) == adapters
    assert runs[name].method.inference_adapters == (["merged"] if "merged" in adapters else adapters)
    for adapter_name in adapters:
        # Only DynaMMo as it is by default reads further layers.
        assert bool(config[adapter_name].feature_modules) == (name == "dynammo")
        number = adapter_name.partition("task_")[2]
        classes = scenario.groups[int(number)] if number else scenario.class_names
        assert config[adapter_name].class_names == classes


@pytest.mark.parametrize("name", RUNS)
def test_the_backbone_is_left_as_it_was(runs, name):
    assert changed(runs[name].first, backbone(runs[name].model)) == set()


def test_a_backbone_with_batch_norm_is_left_as_it_was():
    run = fit(Dynammo, coloured_tasks(classes=4), tiny_model("resnet_basic"), adapter_epochs=1, head_epochs=1)
    assert any("running_mean" in key for key in run.first)
    assert changed(run.first, backbone(run.model)) == set()


@pytest.mark.parametrize("name", RUNS)
def test_stage_1_trains_the_newest_adapter_only(runs, name):
    stages = [stage for stage in runs[name].stages if stage.name in ("adapter", "joint")]
    assert [stage.task for stage in stages] == [0, 1, 2]
    for stage in stages:
        own = {key for key in stage.before if f"{'joint' if name == 'joint' else 'task'}_{stage.task:03d}" in key}
        assert changed(stage.before, stage.after) == own
        assert not stage.training


def test_stage_1_trains_heads_on_what_enters_the_classifier(runs):
    heads = runs["dynammo"].model.head.heads
    for name in ("task_000", "task_001", "task_002"):
        assert heads[name].weight.shape == (3, 64 + 16 + 32 + 48)
        assert not heads[name].weight[:, 64:].any()
    assert heads["merged"].weight[:, 64:].any()


@pytest.mark.parametrize("name", ["paper", "acl"])
def test_stage_2_trains_all_heads_and_nothing_else(runs, name):
    stages = [stage for stage in runs[name].stages if stage.name == "heads"]
    assert [stage.task for stage in stages] == [1, 2]
    for stage in stages:
        adapters = ["merged"] if name == "paper" else [f"task_{task:03d}" for task in range(stage.task + 1)]
        heads = {f"dynammo_head.{adapter_name}.{part}" for adapter_name in adapters for part in ("weight", "bias")}
        found = changed(stage.before, stage.after)
        assert {".".join(key.split(".")[-3:]) for key in found} == heads
        for key in found:
            # Every row: no head is left out.
            assert (stage.before[key] != stage.after[key]).flatten(1 - stage.before[key].dim()).any(-1).all()


@pytest.mark.parametrize("name", ["dynammo", "paper", "acl"])
def test_training_data_of_the_stages(runs, name):
    seen = [(stage.task, stage.name, torch.bincount(stage.labels).tolist()) for stage in runs[name].stages]
    # 8 images of each new class and the memory's share of old ones; then the memory: 24 images of all classes.
    expected = [
        (0, "adapter", [8, 8]),
        (1, "adapter", [8, 8, 8, 8]),
        (1, "heads", [6, 6, 6, 6]),
        (2, "adapter", [6, 6, 6, 6, 8, 8]),
        (2, "heads", [4, 4, 4, 4, 4, 4]),
    ]
    if name == "dynammo":
        # By default heads are fitted in closed form, and exemplars are not trained on.
        expected = [(0, "adapter", [8, 8]), (1, "adapter", [0, 0, 8, 8]), (2, "adapter", [0, 0, 0, 0, 8, 8])]
    assert seen == expected


def test_joint_training_sees_all_images_and_starts_anew(runs):
    stages = runs["joint"].stages
    assert [torch.bincount(stage.labels).tolist() for stage in stages] == [[8] * 2, [8] * 4, [8] * 6]
    for stage in stages:
        fresh = {key: value for key, value in stage.before.items() if key.endswith("up_norm.joint_002.running_mean")}
        assert not any(value.any() for value in fresh.values())
    assert not any("joint_001" in key for key in stages[2].before)


@pytest.mark.parametrize(("name", "shares"), [("dynammo", (4 / 6, 1 / 6, 1 / 6)), ("paper", (1 / 3, 1 / 3, 1 / 3))])
def test_merging_is_the_mean_of_the_adapters_or_half_way_to_it(runs, name, shares):
    model = runs[name].model
    tasks = [adapter(model, f"task_00{task}") for task in range(3)]
    merged = adapter(model, "merged")
    assert {key.split(".")[-1] for key in merged} >= {"weight", "bias", "running_mean", "running_var", "dynammo_alpha"}
    for key, value in merged.items():
        # They must differ, or the mean would show nothing.
        assert not torch.equal(tasks[0][key], tasks[2][key])
        if key.endswith("num_batches_tracked"):
            assert value == sum(task[key] for task in tasks)
        else:
            torch.testing.assert_close(value, sum(share * task[key] for share, task in zip(shares, tasks)))


def test_dynammo_scores_by_log_odds_in_one_pass(runs, scenario, images):
    method, model = runs["dynammo"].method, runs["dynammo"].model
    head = state(model.head.heads["merged"])
    raw = features_under(model, "merged", images) @ head["weight"].T + head["bias"]
    # Two classes and "others" in each of the three heads, in the order of arrival.
    expected = torch.stack([raw[:, 3 * task + place] - raw[:, 3 * task + 2] for task in range(3) for place in (0, 1)])
    assert not raw[:, 2::3].any()
    with torch.no_grad():
        torch.testing.assert_close(method.logits(images), expected.T, atol=1e-4, rtol=1e-4)
        assert torch.equal(method.logits(images), model(images).logits)
    assert [model.config.id2label[number] for number in range(6)] == scenario.class_names


def test_acl_scores_each_head_under_its_own_adapter(runs, images):
    method, model = runs["acl"].method, runs["acl"].model
    expected = []
    for task in range(3):
        head = state(model.head.heads[f"task_00{task}"])
        raw = features_under(model, f"task_00{task}", images) @ head["weight"].T + head["bias"]
        expected.append(raw[:, :2] - raw[:, 2:])
    with torch.no_grad():
        torch.testing.assert_close(method.logits(images), torch.cat(expected, dim=1))


def test_the_papers_dynammo_asks_the_head_with_the_least_others(runs, images):
    method, model = runs["paper"].method, runs["paper"].model
    head = state(model.head.heads["merged"])
    raw = features_under(model, "merged", images) @ head["weight"].T + head["bias"]
    chosen = torch.stack([logits.softmax(dim=1)[:, 2] for logits in raw.split(3, dim=1)]).argmin(dim=0).tolist()
    expected = [2 * task + int(raw[row, 3 * task : 3 * task + 2].argmax()) for row, task in enumerate(chosen)]
    with torch.no_grad():
        assert method.logits(images).argmax(dim=1).tolist() == expected


def test_min_others_asks_one_head_only(scenario):
    method = begun(ACL, scenario, DynammoConfig(scoring="min_others"))
    for task in list(scenario)[:2]:
        learn_nothing(method, task)
    images = scenario.transform(torch.cat([task.test.images for task in scenario]))
    raw = []
    for name in ("task_000", "task_001"):
        head = method.model.head.heads[name]
        # Centred, or all images would look alike to a random model.
        torch.nn.init.normal_(head.weight)
        features = features_under(method.model, name, images)
        head.bias.data = -(features @ head.weight.T).mean(dim=0).detach()
        raw.append(features @ head.weight.T + head.bias)
    others = torch.stack([logits.softmax(dim=1)[:, 2] for logits in raw])
    chosen = others.argmin(dim=0).tolist()
    assert set(chosen) == {0, 1}
    expected = [2 * head + int(raw[head][row, :2].argmax()) for row, head in enumerate(chosen)]
    with torch.no_grad():
        assert method.logits(images).argmax(dim=1).tolist() == expected


def test_dynammo_costs_one_pass_and_acl_one_a_task(runs, images):
    passes = {}
    for name in ("dynammo", "paper", "acl"):
        method, model = runs[name].method, runs[name].model
        model.set_adapter("task_000")
        single = forward_cost(model, lambda model=model: model(images)).flops
        model.set_adapter("task_000" if name == "acl" else "merged")
        passes[name] = forward_cost(model, lambda method=method: method.logits(images)).flops, single
    # The merged head has six more rows over 64 features, for 5 images; further layers have 16, 32 and 48.
    assert passes["paper"][0] == passes["paper"][1] + 2 * 5 * 64 * 6
    assert passes["dynammo"][0] == passes["dynammo"][1] + 2 * 5 * (64 + 16 + 32 + 48) * 6
    assert passes["acl"][0] == 3 * passes["acl"][1]


@pytest.mark.parametrize(("name", "adapter_name"), [("dynammo", "merged"), ("paper", "merged"), ("acl", "task_002")])
def test_the_memory_is_herded_on_the_features_of_the_heads(runs, scenario, name, adapter_name):
    method, task = runs[name].method, scenario[2]
    features = features_under(method.model, adapter_name, scenario.transform(task.train.images)).double()
    features = features / features.norm(dim=1, keepdim=True)
    memory = method.memory.images()
    for label in task.classes:
        own = torch.nonzero(task.train.labels == label).flatten().tolist()
        mean, chosen = sum(features[place] for place in own) / len(own), []
        while len(chosen) < 4:
            picked = sum((features[place] for place in chosen), torch.zeros(features.shape[1]))
            rest = [place for place in own if place not in chosen]
            distances = [float((mean - (picked + features[place]) / (len(chosen) + 1)).norm()) for place in rest]
            chosen.append(rest[int(np.argmin(distances))])
        assert memory.rows[memory.labels == label].tolist() == task.train.rows[chosen].tolist()


@pytest.mark.parametrize(("method_cls", "options"), [(Dynammo, {"exemplars_as_others": True}), (ACL, {})])
def test_exemplars_are_others_in_stage_1(scenario, method_cls, options):
    method = begun(method_cls, scenario, **options)
    learn_nothing(method, scenario[0])
    stages = method.learn(scenario[1])
    stage = next(stages)
    labels = stage.data.labels
    assert torch.bincount(labels).tolist() == [8, 8, 8, 8]
    inputs = scenario.transform(stage.data.images)
    with torch.no_grad():
        logits = stage.network.eval()(pixel_values=inputs).logits
        loss, met = stage.observe(stage.network, inputs, labels)
    assert logits.shape == (32, 3)
    # Classes 2 and 3 are the task's own; the last logit is for all others.
    targets = torch.tensor([{2: 0, 3: 1}.get(label, 2) for label in labels.tolist()])
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets))
    assert torch.equal(met, logits.argmax(dim=1) == targets)


@pytest.mark.parametrize(
    ("method_cls", "options"),
    [
        (Dynammo, {"heads": "exemplars", "feature_views": 1}),
        (Dynammo, {"heads": "exemplars", "feature_views": 2}),
        (ACL, {}),
    ],
)
def test_every_head_says_others_to_foreign_classes_in_stage_2(scenario, method_cls, options):
    # Adapters that differ, so that it shows whose features a head gets.
    method = begun(method_cls, scenario, adapter_init="random", **options)
    learn_nothing(method, scenario[0])
    _, stage = method.learn(scenario[1])
    features, labels = stage.data.tensors
    balanced = scenario.transform(method.memory.images().images)
    adapters = ["merged"] if method_cls is Dynammo else ["task_000", "task_001"]
    expected = [features_under(method.model, name, balanced) for name in adapters]
    # The images themselves come first, then the same images augmented.
    assert torch.equal(labels, method.memory.images().labels.repeat(options.get("feature_views", 1)))
    own = features[: len(balanced)]
    torch.testing.assert_close(own, expected[0] if method_cls is Dynammo else torch.stack(expected, dim=1))
    with torch.no_grad():
        logits = stage.network(features)
        loss, met = stage.observe(stage.network, features, labels)
    first = torch.tensor([{0: 0, 1: 1}.get(label, 2) for label in labels.tolist()])
    second = torch.tensor([{2: 0, 3: 1}.get(label, 2) for label in labels.tolist()])
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :3], first) + F.cross_entropy(logits[:, 3:], second))
    assert torch.equal(met, (logits[:, :3].argmax(dim=1) == first) & (logits[:, 3:].argmax(dim=1) == second))


@pytest.mark.parametrize("heads", ["exemplars", "gaussians"])
def test_old_heads_of_dynammo_go_on_from_the_last_merge(scenario, heads):
    method = begun(Dynammo, scenario, heads=heads)
    learn_nothing(method, scenario[0])
    *_, stage = method.learn(scenario[1])
    with torch.no_grad():
        for parameter in stage.network.parameters():
            parameter.normal_()
    before = state(stage.network)
    *_, stage = method.learn(scenario[2])
    for name, value in state(stage.network).items():
        newest = state(method.model.head.heads["task_002"])[name]
        assert torch.equal(value, torch.cat([before[name], newest]))


@torch.no_grad()
def scramble(model, name):
    """Gives every tensor of an adapter values that no other has."""
    for key, value in model.state_dict().items():
        if f".{name}" in key:
            value.copy_(torch.randint(0, 1000, value.shape) if value.dtype == torch.long else torch.rand_like(value))


@pytest.mark.parametrize(("init", "source"), [("previous", "task_001"), ("first", "task_000"), ("random", None)])
def test_where_a_new_adapter_starts(scenario, init, source):
    method = begun(Dynammo, scenario, adapter_init=init)
    for index, group in enumerate(scenario.groups[:2]):
        method.add_adapter(f"task_00{index}", group)
        scramble(method.model, f"task_00{index}")
    method.add_adapter("task_002", scenario.groups[2])
    assert method.model.active_adapters == ["task_002"]
    newest = adapter(method.model, "task_002")
    for other in ("task_000", "task_001"):
        differing = changed(newest, adapter(method.model, other))
        assert differing == (set() if other == source else set(newest))
    heads = [state(method.model.head.heads[name])["weight"] for name in ("task_001", "task_002")]
    assert not torch.equal(*heads)


@pytest.mark.parametrize("method_cls", [Dynammo, ACL, Joint])
@pytest.mark.parametrize(
    ("config", "options", "zeros"),
    [
        (None, {}, [True, True]),
        (DynammoLoraConfig(), {}, [True, True]),
        (DynammoConfig(preset="paper"), {}, [False, False]),
        (None, {"train_backbone": True}, [False, True]),
        (None, {"head_init": "random"}, [False, False]),
        (DynammoConfig(preset="paper"), {"head_init": "zeros", "train_backbone": True}, [True, True]),
    ],
)
def test_where_a_head_starts(scenario, method_cls, config, options, zeros):
    method = begun(method_cls, scenario, config, **{"head_init": None} | options)
    for task, expected in zip((scenario[0], scenario[1]), zeros):
        method.add_adapter(f"task_00{task.index}", task.class_names)
        parameters = method.model.head.heads[f"task_00{task.index}"].parameters()
        assert [not parameter.any() for parameter in parameters] == [expected, expected]
    # Adapters start where they would beside any head.
    other = begun(method_cls, scenario, config, head_init="random" if zeros[0] else "zeros")
    other.add_adapter("task_000", scenario[0].class_names)
    assert changed(adapter(method.model, "task_000"), adapter(other.model, "task_000")) == set()


def test_training_the_backbone_in_the_first_task_only(scenario):
    after, trainable = [], []
    method = Dynammo(tiny_model("convnext"), arguments(adapter_epochs=1, head_epochs=1, train_backbone=True))
    before = backbone(method.model)

    def note(task, results):
        after.append(backbone(method.model))
        trainable.extend(name for name, parameter in method.model.named_parameters() if parameter.requires_grad)

    Learner(method, Accelerator(cpu=True), progress=False).fit(scenario, after_task=note)
    # The classifier of the pretrained model has no part in the training.
    assert changed(before, after[0]) == {key for key in before if not key.startswith("classifier.")}
    assert changed(after[0], after[1]) == changed(after[1], after[2]) == set()
    assert trainable == []
    assert all(config.backbone_trained for config in method.model.peft_config.values())


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_features_come_in_the_order_of_the_images(scenario, batch_size):
    method = begun(Dynammo, scenario)
    learn_nothing(method, scenario[0])
    train = scenario[0].train
    features = method.features(train, "merged", views=3, batch_size=batch_size)
    assert features.dtype == torch.float32
    assert features.shape == (3, 16, 64 + 16 + 32 + 48)
    torch.testing.assert_close(features[0], features_under(method.model, "merged", scenario.transform(train.images)))
    # Further views are other ones, and the same whenever they are asked for.
    assert not torch.isclose(features[0], features[1]).all(dim=1).any()
    assert not torch.isclose(features[1], features[2]).all(dim=1).any()
    assert torch.equal(method.features(train, "merged", views=2, batch_size=batch_size), features[:2])
    # The head gives scores again.
    assert method.model(scenario.transform(train.images[:2])).logits.shape == (2, 2)


def test_adapters_are_made_for_the_images_of_the_scenario():
    scenario = coloured_tasks(classes=2, size=48)
    method = begun(Dynammo, scenario)
    learn_nothing(method, scenario[0])
    assert method.model.peft_config["task_000"].image_size == [48, 48]
    assert method.logits(torch.randn(2, 3, 48, 48)).shape == (2, 2)


@pytest.mark.parametrize("method_cls", [Dynammo, ACL])
def test_a_memory_smaller_than_the_classes_is_refused_before_training(scenario, method_cls):
    model = tiny_model("convnext")
    before = state(model)
    method = method_cls(model, arguments(method_cls, memory_size=5))
    with pytest.raises(ValueError, match=r"memory_size=5 .* 6 classes.* at least 6") as error:
        Learner(method, Accelerator(cpu=True), progress=False).fit(scenario)
    assert "\n" not in str(error.value)
    assert method.model is model
    assert method.adapters == []
    assert changed(before, state(model)) == set()


def test_joint_training_needs_no_memory(scenario):
    begun(Joint, scenario, memory_size=1)


def test_acl_needs_a_memory():
    with pytest.raises(ValueError, match="memory_size=0.*number of classes"):
        ACL(tiny_model("convnext"), arguments(ACL, memory_size=0))


def test_arguments_of_another_method_are_refused():
    with pytest.raises(ValueError, match="Dynammo takes DynammoArguments, got AdapterMethodArguments"):
        Dynammo(tiny_model("convnext"), arguments(ACL))


@pytest.mark.parametrize("method_cls", [Dynammo, ACL, Joint])
def test_a_task_is_learned_once(scenario, method_cls):
    method = begun(method_cls, scenario)
    learn_nothing(method, scenario[0])
    with pytest.raises(ValueError, match="ask.0.*a task is learned once"):
        learn_nothing(method, scenario[0])


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("adapter_optimizer", "lion", ["optimizer", "sgd", "adam", "adamw"]),
        ("head_optimizer", "lion", ["optimizer", "sgd", "adam", "adamw"]),
        ("adapter_schedule", "linear", ["schedule", "cosine", "constant", "step"]),
        ("head_schedule", "linear", ["schedule", "cosine", "constant", "step"]),
        ("adapter_init", "last", ["adapter_init", "previous", "first", "random"]),
        ("head_init", "ones", ["head_init", "zeros", "random"]),
        ("selection", "newest", ["selection", "herding", "random", "closest_to_mean"]),
        ("memory_size", -1, ["memory_size=-1", "negative"]),
        ("adapter_epochs", 0, ["epochs=0", "at least 1"]),
        ("head_batch_size", 0, ["batch_size=0", "at least 1"]),
        ("adapter_milestones", [70, 130, 170], ["milestones=[70, 130, 170]", "between 0 and 1"]),
        ("adapter_milestones", [0.5, 1.5], ["milestones=[0.5, 1.5]", "between 0 and 1"]),
        ("head_milestones", [0.0], ["milestones=[0.0]", "between 0 and 1"]),
        ("head_milestones", 0.5, ["milestones=0.5", "a list"]),
        ("adapter_learning_rate", -0.1, ["learning_rate=-0.1", "at least 0"]),
        ("head_learning_rate", math.nan, ["learning_rate=nan", "finite"]),
        ("head_learning_rate", "1e-3", ["learning_rate='1e-3'", "a finite number"]),
        ("adapter_weight_decay", -1, ["weight_decay=-1", "at least 0"]),
    ],
)
def test_unusable_options_are_refused_at_once(option, value, choices):
    with pytest.raises(ValueError) as error:
        Dynammo(tiny_model("convnext"), arguments(**{option: value}))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [str(value), *choices])


def test_each_stage_has_its_own_options():
    options = arguments(adapter_optimizer="sgd", adapter_milestones=[0.2], head_schedule="step", head_weight_decay=0.1)
    assert options.optimization("adapter") == Optimization("sgd", 2e-2, 5e-4, 3, 8, "cosine", [0.2])
    assert options.optimization("head") == Optimization("adam", 3e-2, 0.1, 20, 8, "step", [0.55, 0.8])


def test_tasks_of_few_images_are_passed_over_more_often():
    by_default = Optimization("sgd", 0.5, 0.0, DynammoArguments().adapter_epochs, 32, "cosine")
    assert [by_default.epochs_of(updates) for updates in (1, 7, 29, 30, 500)] == [300, 43, 11, 10, 10]
    assert replace(by_default, epochs=3).epochs_of(1) == 3


@pytest.mark.parametrize(("accumulated", "epochs"), [(1, 75), (2, 150), (3, 150), (4, 300)])
def test_default_epochs_count_updates(accumulated, epochs):
    network = torch.nn.Linear(2, 1)

    def observe(network, inputs, labels):
        return network(inputs).mean(), labels == 0

    data = torch.utils.data.TensorDataset(torch.ones(7, 2), torch.zeros(7))
    stage = Stage("adapter", network, data, observe, Optimization("sgd", 0.5, 0.0, None, 2, "cosine"))
    accelerator = Accelerator(gradient_accumulation_steps=accumulated)
    loop = TrainingLoop(stage, accelerator, BatchTransform((0.5,) * 3, (0.5,) * 3), seed=0)
    assert (loop.batches, loop.epochs, len(loop)) == (4, epochs, 4 * epochs)
    rates = [loop.scheduler.get_last_lr()[0] for _ in loop]
    # The schedule ends with the last update and not before.
    assert rates[-1] == pytest.approx(0, abs=1e-9) and min(rates[:-accumulated]) > 0


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1.0] * 10),
        ("cosine", [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]),
        # After 30% and after 75% of ten steps; the half is rounded to even.
        ("step", [1.0] * 3 + [0.1] * 5 + [0.01] * 2),
    ],
)
def test_schedules(schedule, factors):
    optimization = Optimization("sgd", 0.5, 0.0, 1, 1, schedule, [0.3, 0.75])
    optimizer, scheduler = optimization.make(torch.nn.Linear(2, 2), steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * factor for factor in factors])


@pytest.mark.parametrize(
    ("name", "optimizer_cls"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_optimizers_train_what_requires_gradients(name, optimizer_cls):
    network = torch.nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    optimizer, _ = Optimization(name, 0.1, 0.01, 1, 1, "constant").make(network, steps=4)
    assert type(optimizer) is optimizer_cls
    (group,) = optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(network.weight)]
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.01)
    assert group.get("momentum", 0.9) == 0.9

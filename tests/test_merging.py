"""Merging adapters, against averages worked out in plain torch."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import CONFIGS, tiny_images, tiny_model

from dynammo_peft import DynammoConfig, forward_cost
from dynammo_peft.merging import adapter_slots, adapter_tensors, diagonal_fisher, merge_adapters, ties
from dynammo_peft.merging import merge as merge_module
from dynammo_peft.tuner import DynammoLayer


CLASSES = [["cat", "dog"], ["owl"], ["fox", "elk", "bee"], ["ant"], ["cow"]]


@torch.no_grad()
def with_adapters(name, count=2, classes=CLASSES, **arguments):
    """A model with `count` adapters of random tensors; the first one is active."""
    model = None
    for task in range(count):
        config = DynammoConfig(classes=classes and classes[task], **arguments)
        if model is None:
            model = get_peft_model(tiny_model(name), config, "task_000")
        else:
            model.add_adapter(f"task_{task:03}", config)
    generator = torch.Generator().manual_seed(3)
    for key, tensor in sorted(model.state_dict().items()):
        if "dynammo_" not in key:
            continue
        if "num_batches_tracked" in key:
            tensor.copy_(torch.randint(1, 100, (), generator=generator))
        else:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in key else noise)
    return model


def own_state(model, adapter):
    """Copies of an adapter's tensors, by their name without that of the adapter."""
    state = model.state_dict()
    found = {key: value.clone() for key, value in state.items() if f".{adapter}." in f"{key}."}
    return {f"{key}.".replace(f".{adapter}.", "."): value for key, value in found.items()}


def logits_of(model, images):
    with torch.no_grad():
        return model(images).logits


def merged_by_hand(states, weights):
    """What merging should give: sums of parameters, means of statistics, totals of counts, heads in a row."""
    merged = {}
    for key in states[0]:
        tensors = [state[key] for state in states]
        if "_head" in key:
            merged[key] = torch.cat(tensors)
        elif "num_batches_tracked" in key:
            merged[key] = torch.tensor(sum(tensor.item() for tensor in tensors))
        else:
            own = [abs(weight) / sum(map(abs, weights)) for weight in weights] if "running_" in key else weights
            merged[key] = sum(weight * tensor for weight, tensor in zip(own, tensors))
    return merged


@pytest.mark.parametrize(
    "count, weights",
    [
        (2, None),
        (3, None),
        (2, [0.75, 0.25]),
        (2, [0.0, 1.0]),
        # Parameters are scaled, statistics are not.
        (2, [1.0, 3.0]),
        (2, [1.0, -2.0]),
        (3, [0.1, 0.2, 0.3]),
    ],
)
@pytest.mark.parametrize("name", ["resnet_basic", "vit"])
def test_merged_tensors(name, count, weights):
    model = with_adapters(name, count)
    sources = [f"task_{task:03}" for task in range(count)]
    model.add_weighted_adapter(sources, weights)
    found = own_state(model, "merged")
    expected = merged_by_hand([own_state(model, source) for source in sources], weights or [1 / count] * count)
    assert found.keys() == expected.keys()
    assert sum("alpha" in key for key in found) == len(model.base_model.targeted_module_names) - 1
    assert sum("num_batches_tracked" in key for key in found) > 0
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)


def test_two_adapters_by_hand():
    model = with_adapters("vit")
    layer = next(module for module in model.modules() if isinstance(module, DynammoLayer))
    norms = layer.dynammo_down_norm
    with torch.no_grad():
        for task, value in enumerate([2.0, 6.0]):
            layer.dynammo_alpha[f"task_00{task}"].fill_(value)
            norms[f"task_00{task}"].running_mean.fill_(value)
            norms[f"task_00{task}"].num_batches_tracked.fill_(int(value))
    model.add_weighted_adapter(["task_000", "task_001"], adapter_name="mean")
    model.add_weighted_adapter(["task_000", "task_001"], [0.5, 1.0], adapter_name="sum")
    assert layer.dynammo_alpha["mean"].item() == 4
    assert norms["mean"].running_mean[0].item() == 4
    assert norms["mean"].num_batches_tracked.item() == 8
    assert layer.dynammo_alpha["sum"].item() == 7
    assert norms["sum"].running_mean[0].item() == pytest.approx(7 / 1.5)
    assert norms["sum"].num_batches_tracked.item() == 8


@pytest.mark.parametrize("name", CONFIGS)
def test_merging_one_adapter_changes_nothing(name):
    model, images = with_adapters(name, 1), tiny_images(name)
    expected = logits_of(model, images)
    model.add_weighted_adapter(["task_000"])
    model.set_adapter("merged")
    assert torch.equal(logits_of(model, images), expected)


@pytest.mark.parametrize("scoring", ["log_odds", "min_others"])
def test_heads_stand_in_the_order_of_the_adapters(scoring):
    model, images = with_adapters("vit", 3, scoring=scoring), tiny_images("vit")
    model.add_weighted_adapter(["task_002", "task_000", "task_001"])
    config = model.peft_config["merged"]
    assert config.classes == [["fox", "elk", "bee"], ["cat", "dog"], ["owl"]]
    assert (config.head_sizes, config.scoring) == ((3, 2, 1), scoring)
    model.set_adapter("merged")
    assert model.config.id2label == dict(enumerate(["fox", "elk", "bee", "cat", "dog", "owl"]))
    tuner = model.base_model
    with tuner.head_output("features"):
        features = logits_of(model, images)
    with tuner.head_output("logits"):
        logits = logits_of(model, images)
    heads = [tuner.head.heads[f"task_00{task}"] for task in (2, 0, 1)]
    by_head = [features @ head.weight.T + head.bias for head in heads]
    torch.testing.assert_close(logits, torch.cat(by_head, 1))
    if scoring == "log_odds":
        expected = torch.cat([head[:, :-1] - head[:, -1:] for head in by_head], 1)
        torch.testing.assert_close(logits_of(model, images), expected)


def test_merging_merged_adapters():
    model = with_adapters("vit", 3)
    model.add_weighted_adapter(["task_000", "task_001"], adapter_name="first")
    model.peft_config["first"].merge_weights = {"granularity": "task"}
    model.add_weighted_adapter(["first", "task_002"], [2 / 3, 1 / 3], adapter_name="second")
    # What is known of the making of the first is not true of the second.
    assert model.peft_config["second"].merge_weights is None
    model.add_weighted_adapter(["task_000", "task_001", "task_002"])
    assert model.peft_config["second"].classes == model.peft_config["merged"].classes == CLASSES[:3]
    second = own_state(model, "second")
    for key, value in own_state(model, "merged").items():
        torch.testing.assert_close(second[key], value, msg=key)


@pytest.mark.parametrize("name", ["resnet_basic", "vit"])
def test_merging_leaves_all_else_as_it_was(name):
    model, images = with_adapters(name), tiny_images(name)
    expected = logits_of(model, images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    requires_grad = {key: value.requires_grad for key, value in model.named_parameters()}
    configs = {adapter: config.to_dict() for adapter, config in model.peft_config.items()}
    model.add_weighted_adapter(["task_000", "task_001"])
    assert model.active_adapters == ["task_000"]
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert torch.equal(logits_of(model, images), expected)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    flags = {key: value.requires_grad for key, value in model.named_parameters()}
    assert {key: value for key, value in flags.items() if ".merged" not in key} == requires_grad
    # The merged adapter is frozen.
    assert not any(value for key, value in flags.items() if ".merged" in key)
    assert model.peft_config["merged"].inference_mode
    assert {adapter: model.peft_config[adapter].to_dict() for adapter in configs} == configs
    # It is no view of the others either.
    merged = own_state(model, "merged")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".task_00" in key:
                parameter.add_(1)
    assert all(torch.equal(value, merged[key]) for key, value in own_state(model, "merged").items())


@pytest.mark.parametrize("active", ["task_001", "merged"])
def test_an_adapter_of_the_same_name_is_replaced(active, recwarn):
    model, images = with_adapters("resnet_basic", 3), tiny_images("resnet_basic")
    model.add_weighted_adapter(["task_000", "task_001"])
    model.set_adapter(active, inference_mode=active == "merged")
    model.train()
    model.add_weighted_adapter(["task_001", "task_002", "task_000"], [0.2, 0.2, 0.6])
    assert list(model.peft_config) == ["task_000", "task_001", "task_002", "merged"]
    assert model.peft_config["merged"].classes == [CLASSES[1], CLASSES[2], CLASSES[0]]
    expected = merged_by_hand([own_state(model, f"task_00{task}") for task in (1, 2, 0)], [0.2, 0.2, 0.6])
    for key, value in own_state(model, "merged").items():
        torch.testing.assert_close(value, expected[key], msg=key)
    # What was active is active, what was trained is trained, and the new adapter is frozen.
    assert model.active_adapters == [active]
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [key for key, _ in model.named_parameters() if ".task_001" in key and active == "task_001"]
    # In training mode too, whose statistics do not move.
    logits_of(model, images)
    for key, value in own_state(model, "merged").items():
        torch.testing.assert_close(value, expected[key], msg=key)
    model.set_adapter("merged")
    assert logits_of(model, images).shape == (2, 6)
    assert model.config.id2label == dict(enumerate(["owl", "fox", "elk", "bee", "cat", "dog"]))
    assert not [warning for warning in recwarn if "deleted" in str(warning.message)]


def test_merging_without_heads():
    model, images = with_adapters("resnet_basic", classes=None), tiny_images("resnet_basic")
    model.add_weighted_adapter(["task_000", "task_001"])
    assert model.peft_config["merged"].classes is None
    model.set_adapter("merged")
    assert logits_of(model, images).shape == (2, 3)


def test_merged_adapter_is_saved(tmp_path):
    model, images = with_adapters("swin"), tiny_images("swin")
    model.add_weighted_adapter(["task_000", "task_001"], [0.9, 0.4])
    model.set_adapter("merged")
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    loaded = PeftModel.from_pretrained(tiny_model("swin"), tmp_path / "merged")
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    assert loaded.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


def test_merging_in_half_precision():
    base = tiny_model("vit").to(torch.bfloat16)
    model = get_peft_model(base, DynammoConfig(classes=["cat"]), "task_000")
    model.add_adapter("task_001", DynammoConfig(classes=["dog"]))
    model.add_weighted_adapter(["task_000", "task_001"])
    states = [own_state(model, f"task_00{task}") for task in (0, 1)]
    merged = own_state(model, "merged")
    for key, value in merged_by_hand(states, [0.5, 0.5]).items():
        assert merged[key].dtype is value.dtype
        torch.testing.assert_close(merged[key], value, msg=key)


@pytest.mark.parametrize("name", CONFIGS)
def test_cost_does_not_grow_with_the_number_of_tasks(name):
    model, images = with_adapters(name, 5), tiny_images(name, count=1)
    model.add_weighted_adapter(["task_000"], adapter_name="one")
    model.add_weighted_adapter([f"task_00{task}" for task in range(5)], adapter_name="five")
    costs = {}
    for adapter in ("task_000", "one", "five"):
        model.set_adapter(adapter, inference_mode=True)
        costs[adapter] = forward_cost(model, lambda: model(images))
    assert costs["one"] == costs["task_000"]
    # Four heads more: six classes and an "others" for each.
    features = model.base_model.head.heads["one"].in_features
    assert costs["five"].multiply_adds - costs["one"].multiply_adds == (6 + 4) * features
    assert costs["five"].parameters - costs["one"].parameters == (6 + 4) * (features + 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"adapters": []}, "No adapters to merge"),
        ({"adapters": ["task_000", "nobody"]}, "'nobody' does not exist.*task_000, task_001"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [1.0, 1.0, 1.0]}, "3 weights for 2 adapters"),
        ({"weights": []}, "0 weights for 2 adapters"),
        ({"weights": [1.0, float("nan")]}, "finite.*nan"),
        ({"weights": [1.0, float("inf")]}, "finite.*inf"),
        ({"weights": [0.0, 0.0]}, "not all zero"),
        ({"weights": 0.5}, "weights=0.5 must be a list of numbers"),
        (
            {"weights": [1.5, -0.5], "combination_type": "fisher", "fisher": [{}, {}]},
            "not be negative for a mean.*-0.5",
        ),
        ({"weights": [0.9, 0.1], "combination_type": "uniform"}, "'uniform' takes no weights, got .*0.9, 0.1"),
        ({"combination_type": "tie"}, "combination_type='tie' does not exist.*'linear'.*'ties'"),
        ({"combination_type": "ties"}, "'ties' needs the option 'density'; .*majority_sign_method, base"),
        ({"combination_type": "ties", "density": 2}, "density=2"),
        ({"combination_type": "fisher"}, "'fisher' needs the option 'fisher'"),
        ({"combination_type": "fisher", "fisher": [{}, {}]}, r"fisher\[0\] holds nothing for 'vit"),
        ({"density": 0.5}, "'linear' has no option 'density'; it has no options"),
        ({"combination_type": "running_mean", "decay": 0.5}, "no option 'decay'; its options are count"),
        ({"adapters": ["task_000", "task_009"]}, "'task_009' does not exist; there are task_000"),
        ({"adapter_name": "task_001"}, "'task_001' cannot be merged into itself"),
        ({"adapters": ["task_000", "other_factor"]}, "'task_000' and 'other_factor' differ in reduction_factor.*2.*4"),
        ({"adapters": ["task_000", "other_kernel"]}, "differ in kernel_size"),
        ({"adapters": ["task_000", "other_padding"]}, "differ in padding"),
        ({"adapters": ["task_000", "other_blocks"]}, "differ in target_modules"),
        ({"adapters": ["task_000", "excluded"]}, "differ in exclude_modules"),
        ({"adapters": ["task_000", "other_size"]}, r"differ in image_size \(\[32, 32\] and \[16, 16\]\)"),
        ({"adapters": ["task_000", "other_scoring"]}, r"differ in scoring \('log_odds' and 'min_others'\)"),
        ({"adapters": ["task_000", "no_head"]}, "task_000, no_head only some have a head"),
        ({"adapters": ["task_000", "task_000"]}, "'task_000' is named twice"),
        ({"adapter_name": "layers"}, "'layers'"),
    ],
)
def test_errors(arguments, message):
    model, images = with_adapters("vit", reduction_factor=2), tiny_images("vit")
    others = {
        "other_factor": {"classes": ["x"], "reduction_factor": 4},
        "other_kernel": {"classes": ["x"], "kernel_size": 1, "padding": 0},
        "other_padding": {"classes": ["x"], "padding": 0},
        "other_blocks": {"classes": ["x"], "target_modules": ["layers.0"]},
        "excluded": {"classes": ["x"], "exclude_modules": ["layers.1"]},
        "other_size": {"classes": ["x"], "image_size": 16},
        "other_scoring": {"classes": ["x"], "scoring": "min_others"},
        "no_head": {},
    }
    for name in set(arguments.get("adapters", ())) & set(others):
        model.add_adapter(name, DynammoConfig(**{"reduction_factor": 2, **others[name]}))
    model.add_weighted_adapter(["task_000", "task_001"])
    adapters, merged = list(model.peft_config), own_state(model, "merged")
    expected = logits_of(model, images)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**{"adapters": ["task_000", "task_001"], **arguments})
    # The model is as it was, with its merged adapter.
    assert list(model.peft_config) == adapters
    assert all(torch.equal(value, merged[key]) for key, value in own_state(model, "merged").items())
    assert torch.equal(logits_of(model, images), expected)
    assert model.active_adapters == ["task_000"]


def test_statistics_that_are_not_finite_are_not_merged():
    model = with_adapters("vit")
    key = next(key for key in adapter_tensors(model, "task_001") if key.endswith("running_var"))
    adapter_tensors(model, "task_001")[key][0] = float("inf")
    with pytest.raises(ValueError, match=f"Adapter 'task_001' has NaN or infinity in '{key}'"):
        model.add_weighted_adapter(["task_000", "task_001"])
    assert list(model.peft_config) == ["task_000", "task_001"]


def test_further_trained_modules_are_merged():
    model = with_adapters("vit", modules_to_save=["layernorm"])
    saved = model.base_model.model.vit.layernorm.modules_to_save
    with torch.no_grad():
        saved["task_000"].weight.fill_(3)
        saved["task_001"].weight.fill_(5)
    model.add_weighted_adapter(["task_000", "task_001"], [0.5, 0.25])
    assert (saved["merged"].weight == 2.75).all()
    assert model.peft_config["merged"].modules_to_save == ["layernorm"]


def test_other_functions_merge_blocks_but_not_heads_or_statistics():
    model = with_adapters("vit")
    names = ["task_000", "task_001"]
    model.add_weighted_adapter(names)
    linear = own_state(model, "merged")
    model.add_weighted_adapter(names, combination_type="ties", density=0.5)
    found, parameters = own_state(model, "merged"), {}
    for name in names:
        own = adapter_tensors(model, name)
        parameters[name] = {
            key: own[key] for key, slot in adapter_slots(model, name).items() if slot.kind == "parameter"
        }
    expected = ties(list(parameters.values()), torch.ones(2), density=0.5)
    assert sum("dynammo_up.weight" in key for key in expected) == 4
    for key, value in found.items():
        slot = key.removeprefix("base_model.model.").strip(".")
        torch.testing.assert_close(value, expected.get(slot, linear[key]), msg=key)


def test_merge_by_fisher_information():
    model, images = with_adapters("vit"), tiny_images("vit", 4)
    names = ["task_000", "task_001"]
    measured = [diagonal_fisher(model, name, [images]) for name in names]
    model.add_weighted_adapter(names, combination_type="fisher", fisher=measured)
    merged = adapter_tensors(model, "merged")
    key = next(key for key in measured[0] if "dynammo_up.weight" in key)
    first, second = (adapter_tensors(model, name)[key] for name in names)
    shares = measured[0][key] / (measured[0][key] + measured[1][key])
    known = shares.isfinite()
    assert known.float().mean() > 0.9
    expected = shares * first + (1 - shares) * second
    torch.testing.assert_close(merged[key][known], expected[known].float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("active", ["task_000", "merged"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_no_trace(exists, active, monkeypatch):
    if active == "merged" and not exists:
        return
    model, images = with_adapters("resnet_basic", 3), tiny_images("resnet_basic")
    if exists:
        model.add_weighted_adapter(["task_000", "task_001"])
        model.set_adapter(active)
    model.train()
    before = dict(model.state_dict(keep_vars=True))
    values = {key: value.clone() for key, value in before.items()}
    flags = {key: (value.requires_grad) for key, value in model.named_parameters()}
    modes = {key: module.training for key, module in model.named_modules()}
    configs, labels = dict(model.peft_config), dict(model.config.id2label)

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(merge_module, "set_adapter_tensors", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.add_weighted_adapter(["task_001", "task_002"])
    monkeypatch.undo()
    after = dict(model.state_dict(keep_vars=True))
    assert sorted(after) == sorted(before)
    assert all(after[key] is before[key] and torch.equal(after[key], values[key]) for key in before)
    assert {key: value.requires_grad for key, value in model.named_parameters()} == flags
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert dict(model.peft_config) == configs
    assert (model.active_adapters, model.config.id2label) == ([active], labels)
    assert sorted(model.base_model.head.sizes) == sorted(model.base_model.head.scoring) == sorted(configs)
    model.eval()
    assert logits_of(model, images).shape == (2, len(labels))
    model.add_weighted_adapter(["task_001", "task_002"])
    assert model.peft_config["merged"].classes == CLASSES[1:3]


def test_the_tuner_and_the_function_do_the_same():
    model = with_adapters("vit")
    model.add_weighted_adapter(["task_000", "task_001"], [0.3, 0.4])
    expected = own_state(model, "merged")
    model.base_model.add_weighted_adapter(["task_000", "task_001"], [0.3, 0.4], "second")
    merge_adapters(model, ["task_000", "task_001"], [0.3, 0.4], "third")
    merge_adapters(model.base_model, ["task_000", "task_001"], [0.3, 0.4], "fourth")
    for name in ("second", "third", "fourth"):
        assert all(torch.equal(value, expected[key]) for key, value in own_state(model, name).items())
        assert model.peft_config[name].classes == CLASSES[:2]
    with pytest.raises(ValueError, match="'fourth' exists already"):
        model.base_model.create_merged_adapter(["task_000", "task_001"], "fourth")

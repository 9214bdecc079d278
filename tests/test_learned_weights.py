"""Learned merge weights, against merges worked out in plain torch and weights that were planted."""

import copy
import itertools
import json
import math
import sys

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import tiny_images, tiny_language_model, tiny_model, token_cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dynammo_peft import DynammoConfig
from dynammo_peft.merging import MergeWeights, gaussian_likelihood, learn_merge_weights, merge_adapters
from dynammo_peft.merging.adapters import adapted_base, adapter_slots, adapter_tensors, set_adapter_tensors
from dynammo_peft.merging.learned import adapter_merge_weights
from dynammo_peft.merging.objectives import prediction_entropy
from dynammo_peft.merging.optimization import minimize
from dynammo_peft.merging.weighted_sums import ROOT_THRESHOLD


TASKS = ["task_000", "task_001", "task_002"]
CLASSES = [["cat", "dog"], ["owl"], ["fox", "elk"]]
METHODS = {
    "dynammo": ("resnet_basic", lambda task: DynammoConfig(classes=CLASSES[task], reduction_factor=4)),
    "dynammo_tokens": ("vit", lambda task: DynammoConfig(classes=CLASSES[task], reduction_factor=4)),
    # Scalings of 2, 3 and 4.
    "lora": ("vit", lambda task: LoraConfig(r=2, lora_alpha=4 + 2 * task, target_modules=["q_proj", "v_proj", "fc1"])),
    "ia3": ("vit", lambda task: IA3Config(target_modules=["v_proj", "fc1", "fc2"], feedforward_modules=["fc2"])),
}
GRANULARITIES = ["task", "layer", "channel"]


@torch.no_grad()
def adapted(method, count=3, seed=3):
    """A model with `count` adapters of random tensors; the first one is active and trained."""
    name, config = METHODS[method]
    model = get_peft_model(tiny_model(name), config(0), TASKS[0])
    for task in range(1, count):
        model.add_adapter(TASKS[task], config(task))
    generator = torch.Generator().manual_seed(seed)
    for adapter in TASKS[:count]:
        for key, tensor in adapter_tensors(model, adapter).items():
            if not tensor.is_floating_point():
                tensor.copy_(torch.randint(1, 100, (), generator=generator))
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            centre = 1.0 if method == "ia3" or "running_var" in key or "norm" in key else 0.0
            tensor.copy_(0.3 * noise + centre if "running_var" not in key else noise.abs() + 0.5)
    return model


def images_of(method, count=8, seed=1):
    return tiny_images(METHODS[method][0], count, seed)


def own_tensors(model, adapter):
    return {key: tensor.clone() for key, tensor in adapter_tensors(model, adapter).items()}


def by_hand(model, adapters, weights_of, merged="merged"):
    """What a merge should give, element by element; `weights_of(slot)` is `(T,)` or `(T, channels)`."""
    result = {}
    tensors = [own_tensors(model, adapter) for adapter in adapters]
    for key, slot in adapter_slots(model, adapters[0]).items():
        parts = []
        weights = weights_of(slot)
        if not tensors[0][key].is_floating_point():
            result[key] = sum(own[key] for own in tensors)
            continue
        for index, own in enumerate(tensors):
            weight = weights[index]
            if slot.kind == "statistic":
                weight = weight.abs() / weights.abs().sum(0)
            elif "lora" in slot.container:
                scaling = adapted_base(model).get_submodule(slot.layer).scaling
                weight = weight * scaling[adapters[index]] / scaling[merged]
                root = weight.abs().sqrt()
                weight = root * weight.sign() if slot.container == "lora_A" else root
            if weight.dim() == 1:
                # IA3 scales the inputs of a feedforward layer by a row, and transposed kernels are (in, out, ...).
                dim = 1 if own[key].shape[0] == 1 and own[key].dim() == 2 else slot.output_dim
                weight = weight.reshape([-1 if dim == d else 1 for d in range(own[key].dim())])
            parts.append(weight * own[key])
        result[key] = sum(parts)
    return result


def random_weights(weights, seed=0, signs=True):
    """Draws weights not close to zero."""
    drawn = torch.rand(weights.values.shape, generator=torch.Generator().manual_seed(seed)) + 0.2
    drawn[0] *= -1 if signs else 1
    with torch.no_grad():
        weights.values.copy_(drawn)
    return weights


def logits_of(model, images, adapter=None):
    if adapter is not None:
        model.set_adapter(adapter, inference_mode=True)
    with torch.no_grad():
        return model(images).logits


def squared_error(output, target):
    return (output - target).square().mean()


def assert_tensors_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerance)


@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", ["dynammo", "lora", "ia3"])
def test_starts_at_the_uniform_merge(method, granularity, simplex):
    model = adapted(method)
    merge_adapters(model, TASKS)
    uniform = own_tensors(model, "merged")
    batches = [(images_of(method), torch.tensor([0, 1] * 4))]
    weights = learn_merge_weights(
        model, TASKS, batches, granularity=granularity, simplex=simplex, steps=0, progress=False
    )
    for key in uniform:
        torch.testing.assert_close(weights(key), torch.full_like(weights(key), 1 / 3))
    assert_tensors_close(own_tensors(model, "merged"), uniform)
    expected = torch.nn.functional.cross_entropy(logits_of(model, images_of(method), "merged"), batches[0][1]).item()
    assert weights.loss_before == weights.loss_after == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_groups(method):
    model = adapted(method)
    merge_adapters(model, TASKS)
    tensors, slots = own_tensors(model, "merged"), adapter_slots(model, "merged")
    task, layer, channel = (adapter_merge_weights(model, TASKS, granularity=name) for name in GRANULARITIES)
    assert task.values.shape == (3, 1)
    assert [group.name for group in layer.groups] == list(dict.fromkeys(slot.layer for slot in slots.values()))
    assert layer.values.shape == (3, len(layer.groups))
    for key, slot in slots.items():
        assert task(key).shape == layer(key).shape == (3,)
        if tensors[key].numel() == 1 and tensors[key].is_floating_point():
            assert channel(key).shape == (3,)
        elif tensors[key].is_floating_point():
            # A vector has but one axis; in transposed kernels outputs come second.
            size = tensors[key].numel() if method == "ia3" else tensors[key].shape[slot.output_dim]
            assert channel(key).shape == (3, size)
    containers = {(slot.layer, slot.container) for slot in slots.values()}
    assert {(group.layer, group.container) for group in channel.groups} == containers
    if method.startswith("dynammo"):
        middle, outer = (
            tensors[next(key for key in slots if part in key)].numel() for part in ("down_norm", "up_norm")
        )
        assert [group.channels for group in channel.groups[:5]] == [middle, middle, outer, outer, 0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
def test_combine_by_hand(method, granularity):
    model = adapted(method)
    merge_adapters(model, TASKS)
    weights = random_weights(adapter_merge_weights(model, TASKS, granularity=granularity))
    merged = weights.combine([adapter_tensors(model, task) for task in TASKS])
    expected = by_hand(model, TASKS, lambda slot: weights(slot.key).detach())
    assert_tensors_close(merged, expected)
    assert_tensors_close(weights.combine(weights.stack([adapter_tensors(model, task) for task in TASKS])), expected)
    for key, slot in adapter_slots(model, "merged").items():
        assert merged[key].requires_grad == (slot.kind != "statistic")
        assert merged[key].dtype is expected[key].dtype


def saving(last):
    """A model of two layers with two adapters, which save the last one whole."""
    base = torch.nn.Sequential()
    base.add_module("first", torch.nn.Linear(4, 4))
    base.add_module("last", last)
    config = IA3Config(target_modules=["first"], feedforward_modules=[], modules_to_save=["last"])
    model = get_peft_model(base, config, TASKS[0])
    model.add_adapter(TASKS[1], config)
    return model


def test_channels_of_a_container_with_several_layers():
    last = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.PReLU(), torch.nn.Linear(3, 2))
    model = saving(last)
    merge_adapters(model, TASKS[:2])
    weights = random_weights(adapter_merge_weights(model, TASKS[:2], granularity="channel"))
    saved = [(group.name, group.channels) for group in weights.groups[1:]]
    assert saved == [
        ("last.modules_to_save.0.weight", 3),
        ("last.modules_to_save.0.bias", 3),
        ("last.modules_to_save.1.weight", 0),
        ("last.modules_to_save.2.weight", 2),
        ("last.modules_to_save.2.bias", 2),
    ]
    merged = weights.combine([adapter_tensors(model, task) for task in TASKS[:2]])
    assert_tensors_close(merged, by_hand(model, TASKS[:2], lambda slot: weights(slot.key).detach()))


def test_channels_of_batch_normalisation_beside_other_layers():
    """Its count of batches takes no weight."""
    last = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    model = saving(last)
    for task, count in zip(TASKS, (2, 3)):
        model.base_model.model.last.modules_to_save[task][0].num_batches_tracked.fill_(count)
    weights = random_weights(adapter_merge_weights(model, TASKS[:2], granularity="channel"))
    merged = weights.combine([adapter_tensors(model, task) for task in TASKS[:2]])
    assert merged["last.modules_to_save.0.num_batches_tracked"] == 5
    other = {key: tensor for key, tensor in merged.items() if tensor.is_floating_point()}
    equal = torch.ones(2)
    expected = by_hand(model, TASKS[:2], lambda slot: weights(slot.key).detach() if slot.key in other else equal)
    assert_tensors_close(other, {key: expected[key] for key in other})


def test_combine_agrees_with_peft():
    model = adapted("lora")
    shares = [0.5, -1.25, 0.75]
    model.add_weighted_adapter(TASKS, shares, "merged", combination_type="linear")
    weights = adapter_merge_weights(model, TASKS, granularity="task")
    with torch.no_grad():
        weights.values.copy_(torch.tensor(shares)[:, None])
    merged = weights.combine([adapter_tensors(model, task) for task in TASKS])
    assert_tensors_close(merged, own_tensors(model, "merged"))


def test_roots_have_finite_gradients():
    model = adapted("lora")
    merge_adapters(model, TASKS)
    weights = adapter_merge_weights(model, TASKS)
    with torch.no_grad():
        weights.values.zero_()
        weights.values[0, 0] = ROOT_THRESHOLD / 10
    merged = weights.combine([adapter_tensors(model, task) for task in TASKS])
    assert all(tensor.isfinite().all() for tensor in merged.values())
    sum(tensor.sum() for tensor in merged.values()).backward()
    assert weights.values.grad.isfinite().all()
    # A weight of zero can become any other again.
    assert (weights.values.grad[1:] != 0).all()


def test_statistics_where_all_weights_are_zero():
    model = adapted("dynammo")
    merge_adapters(model, TASKS)
    weights = adapter_merge_weights(model, TASKS, granularity="channel")
    with torch.no_grad():
        weights.values[:, ::2] = 0
    merged = weights.combine([adapter_tensors(model, task) for task in TASKS])
    assert_tensors_close(
        {key: value for key, value in merged.items() if "running" in key},
        {key: value for key, value in own_tensors(model, "merged").items() if "running" in key},
    )


def hidden_states(base, batch):
    """What comes out of every part of the backbone, side by side, `(B, ...)`."""
    return torch.cat([part.flatten(1) for part in base(batch[0], output_hidden_states=True).hidden_states], dim=1)


def relative_error(output, target):
    return (output - target).square().mean() / target.var()


@pytest.mark.parametrize(
    "method, granularity, simplex, steps",
    [
        ("dynammo", "task", False, 130),
        ("dynammo", "task", True, 80),
        ("dynammo_tokens", "layer", False, 150),
        ("dynammo_tokens", "layer", True, 150),
        ("dynammo_tokens", "channel", False, 200),
        ("lora", "task", False, 80),
        ("lora", "layer", False, 120),
        ("ia3", "task", True, 80),
        ("ia3", "layer", False, 150),
    ],
)
def test_planted_weights_are_found(method, granularity, simplex, steps):
    model, images = adapted(method), images_of(method, 8)
    merge_adapters(model, TASKS)
    planted = random_weights(adapter_merge_weights(model, TASKS, granularity=granularity), signs=False)
    with torch.no_grad():
        planted.values /= planted.values.sum(dim=0)
    set_adapter_tensors(model, "merged", by_hand(model, TASKS, lambda slot: planted(slot.key).detach()))
    model.set_adapter("merged", inference_mode=True)
    with torch.no_grad():
        batches = [(images, hidden_states(adapted_base(model), (images,)))]
    weights = learn_merge_weights(
        model,
        TASKS,
        batches,
        granularity=granularity,
        simplex=simplex,
        objective=relative_error,
        forward=hidden_states,
        steps=steps,
        learning_rate=0.15,
        progress=False,
    )
    assert weights.loss_after < 1e-3 * weights.loss_before
    if granularity == "channel":
        # Kernels and the norms behind them can stand in for one another.
        return
    for group in planted.groups:
        torch.testing.assert_close(weights(group.name), planted(group.name), atol=0.03, rtol=0)


def updates(model, adapter):
    """What LoRA adds to each layer's weight."""
    layers = {key: module for key, module in adapted_base(model).named_modules() if isinstance(module, LoraLayer)}
    return {key: module.get_delta_weight(adapter).detach() for key, module in layers.items()}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_side_by_side_weights_start_at_the_mean_of_the_updates(granularity):
    model = adapted("lora")
    options = {"granularity": granularity, "combination_type": "cat", "steps": 0, "progress": False}
    learn_merge_weights(model, TASKS, labelled("lora"), **options)
    own = [updates(model, name) for name in TASKS]
    for key, merged in updates(model, "merged").items():
        torch.testing.assert_close(merged, sum(part[key] for part in own) / 3)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_planted_weights_of_updates_are_found(granularity, tmp_path):
    model, images = adapted("lora"), images_of("lora", 8)
    slots = adapter_slots(model, TASKS[0])
    tensors = adapter_tensors(model, TASKS[0])
    planted = random_weights(MergeWeights.for_slots(TASKS, slots, tensors, granularity), signs=False)
    with torch.no_grad():
        planted.values /= planted.values.sum(dim=0)
    base = copy.deepcopy(adapted_base(model))
    # The target has no adapter: the updates are in its weights.
    for key, module in base.named_modules():
        if isinstance(module, LoraLayer):
            weights = planted(key).detach()
            for weight, name in zip(weights, TASKS):
                module.base_layer.weight.data += weight * module.get_delta_weight(name).detach()
            module.enable_adapters(False)
    with torch.no_grad():
        batches = [(images, hidden_states(base, (images,)))]
    options = {"objective": relative_error, "forward": hidden_states, "steps": 120, "learning_rate": 0.15}
    weights = learn_merge_weights(
        model, TASKS, batches, "merged", granularity, combination_type="cat", progress=False, **options
    )
    assert weights.loss_after < 1e-3 * weights.loss_before
    for group in planted.groups:
        torch.testing.assert_close(weights(group.name), planted(group.name), atol=0.03, rtol=0)
    weights.save_pretrained(tmp_path)
    merge_adapters(model, TASKS, MergeWeights.from_pretrained(tmp_path), "again", combination_type="cat")
    found, expected = own_tensors(model, "again"), own_tensors(model, "merged")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="combination_type='cat', got 'linear'; choose theirs"):
        merge_adapters(model, TASKS, weights, "again")


def test_only_lora_is_placed_side_by_side():
    with pytest.raises(ValueError, match="'task_000' is of peft_type 'IA3'; choose 'linear'"):
        merge_adapters(adapted("ia3"), TASKS, combination_type="cat")


def test_planted_channel_weights_are_found():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    config = IA3Config(target_modules=["0"], feedforward_modules=[], modules_to_save=["2"])
    model = get_peft_model(base, config, TASKS[0])
    for name in TASKS[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for name in TASKS:
            for key, tensor in adapter_tensors(model, name).items():
                tensor.copy_(1 + torch.rand(tensor.shape) if "ia3" in key else torch.randn(tensor.shape))
    merge_adapters(model, TASKS)
    planted = random_weights(adapter_merge_weights(model, TASKS, granularity="channel"), signs=False)
    assert [(group.name, group.channels) for group in planted.groups] == [("0.ia3_l", 32), ("2.modules_to_save", 5)]
    set_adapter_tensors(model, "merged", planted.combine([adapter_tensors(model, name) for name in TASKS]))
    model.set_adapter("merged", inference_mode=True)
    inputs = torch.randn(64, 12)
    with torch.no_grad():
        batches = [(inputs, model(inputs))]
    weights = learn_merge_weights(
        model, TASKS, batches, "merged", "channel", False, squared_error, None, 600, 0.1, progress=False
    )
    assert weights.loss_after < 1e-4 * weights.loss_before
    # The vector in front can take up a common scale.
    found, expected = (one("2.modules_to_save.weight").detach() for one in (weights, planted))
    torch.testing.assert_close(found / found.mean(), expected / expected.mean(), atol=0.02, rtol=0)
    assert (found - 1 / 3).abs().max() > 0.3


def labelled(method, count=24, batch_size=8, classes=2):
    images = images_of(method, count)
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(5))
    return list(zip(images.split(batch_size), labels.split(batch_size)))


@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_learned_model_is_the_merge_with_its_weights(method, simplex):
    model = adapted(method)
    weights = learn_merge_weights(
        model, TASKS, labelled(method), "learned", "channel", simplex, steps=6, learning_rate=0.3, progress=False
    )
    assert weights.loss_after < weights.loss_before
    merge_adapters(model, TASKS, adapter_name="by_hand")
    expected = by_hand(model, TASKS, lambda slot: weights(slot.key).detach(), "by_hand")
    set_adapter_tensors(model, "by_hand", expected)
    images = images_of(method)
    learned, manual = logits_of(model, images, "learned"), logits_of(model, images, "by_hand")
    torch.testing.assert_close(learned, manual)
    merge_adapters(model, TASKS, adapter_name="uniform")
    assert not torch.allclose(learned, logits_of(model, images, "uniform"), atol=1e-5)
    losses = [
        torch.nn.functional.cross_entropy(logits_of(model, batch, "learned"), labels)
        for batch, labels in labelled(method)
    ]
    assert weights.loss_after == pytest.approx(sum(losses).item() / 3, rel=1e-4)
    if simplex:
        assert (weights.values.softmax(0) > 0).all()
        for group in weights.groups:
            torch.testing.assert_close(weights(group.name).sum(0), torch.ones_like(weights(group.name)[0]))


@pytest.mark.parametrize("method", METHODS)
def test_entropy_decreases_without_labels(method):
    model, images = adapted(method), images_of(method, 16)
    weights = learn_merge_weights(
        model, TASKS, images.split(8), objective="entropy", steps=10, learning_rate=0.3, progress=False
    )
    probabilities = logits_of(model, images, "merged").softmax(dim=1)
    entropy = torch.special.entr(probabilities).sum(dim=1).mean().item()
    assert weights.loss_after == pytest.approx(entropy, rel=1e-4)
    assert weights.loss_after < weights.loss_before - 1e-5
    # Not by stronger adapters, unless they are asked for.
    assert weights.simplex
    assert not learn_merge_weights(model, TASKS, images.split(8), "free", "task", False, "entropy", steps=0).simplex


def test_entropy_of_certain_predictions():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0]], requires_grad=True)
    entropy = prediction_entropy(logits)
    assert entropy.item() == pytest.approx(math.log(4) / 2)
    entropy.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda images, labels: [(images, labels)],
        lambda images, labels: [[images, labels]],
        lambda images, labels: [{"pixel_values": images, "labels": labels}],
        lambda images, labels: DataLoader(TensorDataset(images, labels), batch_size=8),
    ],
)
def test_kinds_of_batches(make):
    images, labels = images_of("ia3"), torch.tensor([0, 1] * 4)
    model, passed = adapted("ia3"), []
    model.get_base_model().register_forward_pre_hook(lambda _, args, kwargs: passed.append(kwargs), with_kwargs=True)
    weights = learn_merge_weights(model, TASKS, make(images, labels), steps=2, progress=False)
    # The model would compute a loss of its own.
    assert passed and not any("labels" in kwargs for kwargs in passed)
    expected = learn_merge_weights(adapted("ia3"), TASKS, [(images, labels)], steps=2, progress=False)
    assert torch.equal(weights.values, expected.values)


def test_seed_decides_and_nothing_outside_is_drawn():
    images, labels = images_of("ia3", 16), torch.arange(16) % 2
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        model = adapted("ia3")
        merge_adapters(model, TASKS)
        state = torch.random.get_rng_state()
        loader = DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True)
        found.append(learn_merge_weights(model, TASKS, loader, steps=6, seed=seed, progress=False).values.detach())
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_batches_are_gone_through_again():
    class Counting:
        seen = 0

        def __iter__(self):
            for batch in labelled("ia3"):
                Counting.seen += 1
                yield batch

    learn_merge_weights(adapted("ia3"), TASKS, Counting(), steps=7, progress=False)
    # Three for the loss before and after, then seven.
    assert Counting.seen == 3 + 7


def test_batches_that_run_dry():
    class Once:
        left = labelled("ia3")

        def __iter__(self):
            while self.left:
                yield self.left.pop()

    with pytest.raises(ValueError, match="batches can be read only once"):
        learn_merge_weights(adapted("ia3"), TASKS, Once(), steps=3, progress=False)


def test_inference_mode_is_named():
    model = adapted("ia3")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inside torch\.inference_mode\(\)"):
        learn_merge_weights(model, TASKS, labelled("ia3"), steps=1, progress=False)
    assert "merged" not in model.peft_config
    learn_merge_weights(model, TASKS, labelled("ia3"), steps=1, progress=False)


def test_half_precision():
    model = get_peft_model(
        tiny_model("vit").to(torch.bfloat16), METHODS["lora"][1](0), TASKS[0], autocast_adapter_dtype=False
    )
    model.add_adapter(TASKS[1], METHODS["lora"][1](1), autocast_adapter_dtype=False)
    weights = learn_merge_weights(model, TASKS[:2], labelled("lora"), objective="entropy", steps=2, progress=False)
    assert weights.values.dtype is torch.float32
    assert {tensor.dtype for tensor in own_tensors(model, "merged").values()} == {torch.bfloat16}


def test_a_loss_that_is_lost_on_the_way():
    def objective(logits, labels):
        objective.calls += logits.requires_grad
        return logits.sum() * (math.nan if objective.calls == 2 else 1)

    objective.calls = 0
    with pytest.raises(ValueError, match=r"The loss is nan at step 2; lower the learning rate"):
        learn_merge_weights(
            adapted("ia3"), TASKS, labelled("ia3"), objective=objective, learning_rate=0.5, steps=5, progress=False
        )
    assert objective.calls == 2


@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("tasks", [TASKS[:2], TASKS])
def test_learning_rate_is_a_share_of_equal_weights(tasks, simplex):
    weights = learn_merge_weights(
        adapted("ia3"), tasks, labelled("ia3"), "learned", "task", simplex, steps=1, learning_rate=0.01, progress=False
    )
    shares = len(tasks) * weights("").detach()
    # Adam's first step is as long as the rate, up or down.
    expected = (0.01 * (shares - 1).sign()).exp() if simplex else 1 + 0.01 * (shares - 1).sign()
    expected = expected / expected.mean() if simplex else expected
    torch.testing.assert_close(shares, expected, rtol=1e-4, atol=0)


def test_learning_rate_falls_to_zero():
    value = torch.zeros(1, requires_grad=True)
    seen = []

    def loss_of(batch):
        seen.append(value.item())
        return value.sum()

    assert minimize(loss_of, [{"params": [value], "lr": 0.1}], [None], 4, progress=False)[0] == 0
    # Adam's steps are as long as the learning rate where the gradient never changes.
    rates = [0.05 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    steps = [one - other for one, other in itertools.pairwise(seen[1:])]
    assert steps == pytest.approx(rates, rel=1e-4)


@pytest.mark.parametrize("posterior", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_gaussian_likelihood(shared, posterior):
    generator = torch.Generator().manual_seed(0)
    # Far from zero, where single precision would lose what tells classes apart.
    means = torch.randn(4, 6, generator=generator) + 30_000
    roots = torch.randn(6, 6, generator=generator) if shared else torch.randn(4, 6, 6, generator=generator)
    covariance = roots @ roots.mT + 0.5 * torch.eye(6)
    features = torch.randn(9, 6, generator=generator) + 30_000
    labels = torch.randint(4, (9,), generator=generator)
    densities = torch.stack(
        [
            torch.distributions.MultivariateNormal(
                mean.double(), (covariance if shared else covariance[k]).double()
            ).log_prob(features.double())
            for k, mean in enumerate(means)
        ],
        dim=1,
    )
    loss = gaussian_likelihood(means, covariance, posterior)(features, labels).item()
    if posterior:
        expected = -(densities - densities.logsumexp(dim=1, keepdim=True))[range(9), labels].mean()
    else:
        expected = -(densities + 3 * math.log(2 * math.pi))[range(9), labels].mean() / 6
    assert loss == pytest.approx(expected.item(), rel=1e-3)


def test_learning_on_class_statistics():
    model, batches = adapted("dynammo_tokens"), labelled("dynammo_tokens", classes=5)
    with model.head_output("features"):
        size = logits_of(model, batches[0][0]).shape[1]
        means, covariance = torch.randn(5, size), torch.eye(size)
        weights = learn_merge_weights(
            model, TASKS, batches, objective=gaussian_likelihood(means, covariance), steps=10, progress=False
        )
        features = torch.cat([logits_of(model, images, "merged") for images, _ in batches])
    assert weights.loss_after < weights.loss_before
    scores = features @ means.T - means.square().sum(1) / 2
    expected = torch.nn.functional.cross_entropy(scores, torch.cat([labels for _, labels in batches]))
    assert weights.loss_after == pytest.approx(expected.item(), rel=1e-4)


def state_of(model):
    layers = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    return {
        "active": list(model.active_adapters),
        "trained": {key: parameter.requires_grad for key, parameter in model.named_parameters()},
        "modes": {key: module.training for key, module in model.named_modules()},
        "disabled": [layer._disable_adapters for layer in layers],
        "labels": getattr(model.config, "id2label", None) and dict(model.config.id2label),
        "configs": {name: config.to_dict() for name, config in model.peft_config.items()},
    }


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("method", ["dynammo", "lora", "ia3"])
def test_all_else_is_as_before(method, fails, disabled):
    model = adapted(method)
    merge_adapters(model, TASKS)
    model.set_adapter(TASKS[1])
    model.train()
    # Something that no adapter asks for.
    next(parameter for key, parameter in model.named_parameters() if "base_layer" in key).requires_grad_(True)
    if disabled:
        model.base_model.disable_adapter_layers()
    before, tensors = state_of(model), {key: value.clone() for key, value in model.state_dict().items()}

    def objective(logits, labels):
        assert not model.training and model.active_adapters == ["merged"]
        # Where the merged adapter's are, the merge stands.
        trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        assert all(".merged" in key for key in trained)
        if fails and logits.requires_grad:
            raise RuntimeError("stop")
        return torch.nn.functional.cross_entropy(logits, labels)

    def learn():
        learn_merge_weights(model, TASKS, labelled(method), objective=objective, steps=2, progress=False)

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            learn()
    else:
        with torch.no_grad():
            learn()
    after = state_of(model)
    if not fails and method == "dynammo":
        assert after["configs"]["merged"].pop("merge_weights") is not None
        assert before["configs"]["merged"].pop("merge_weights") is None
    assert after == before
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, tensors[key])}
    if fails:
        assert not changed
    else:
        assert changed and all(".merged" in key and "_head" not in key for key in changed)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_goes_with_a_failure(method):
    model = adapted(method)
    before, tensors = state_of(model), model.state_dict()
    with pytest.raises(ValueError, match="The loss is nan before the first step"):
        learn_merge_weights(
            model,
            TASKS,
            labelled(method),
            "fresh",
            objective=lambda logits, _: logits.sum() * math.nan,
            progress=False,
        )
    assert state_of(model) == before
    assert model.state_dict().keys() == tensors.keys()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("simplex", [False, True])
def test_as_dict_and_back(granularity, simplex):
    model = adapted("dynammo_tokens")
    merge_adapters(model, TASKS)
    weights = random_weights(adapter_merge_weights(model, TASKS, "merged", granularity, simplex))
    weights.loss_before, weights.loss_after = 2.5, 1.25
    # As PEFT writes configurations.
    data = json.loads(json.dumps(weights.as_dict(), sort_keys=True))
    loaded = MergeWeights.from_dict(data, weights.slots, weights.scalings)
    assert (loaded.adapters, loaded.granularity, loaded.simplex) == (tuple(TASKS), granularity, simplex)
    assert loaded.groups == weights.groups
    assert (loaded.loss_before, loaded.loss_after) == (2.5, 1.25)
    tensors = [adapter_tensors(model, task) for task in TASKS]
    merged = weights.combine(tensors)
    for key in merged:
        torch.testing.assert_close(loaded(key), weights(key))
        torch.testing.assert_close(loaded.combine(tensors)[key], merged[key])
    assert str(loaded) == str(weights)
    with pytest.raises(ValueError, match="know of no tensors; pass `slots`"):
        MergeWeights.from_dict(data).combine(tensors)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_are_saved_with_a_dynammo_adapter(granularity, tmp_path):
    model, images = adapted("dynammo"), images_of("dynammo")
    weights = learn_merge_weights(model, TASKS, labelled("dynammo"), granularity=granularity, steps=2, progress=False)
    assert model.peft_config["merged"].merge_weights == weights.as_dict()
    model.set_adapter("merged")
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    loaded = PeftModel.from_pretrained(tiny_model("resnet_basic"), tmp_path / "merged")
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    read = MergeWeights.from_dict(loaded.peft_config["default"].merge_weights)
    assert torch.equal(read.values, weights.values)
    assert str(read) == str(weights)
    # A merge with other weights does not claim these.
    merge_adapters(model, TASKS)
    assert model.peft_config["merged"].merge_weights is None


@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
def test_saved_weights_make_the_adapter_again(method, granularity, simplex, tmp_path):
    model = adapted(method)
    weights = learn_merge_weights(
        model, TASKS, labelled(method), "learned", granularity, simplex, steps=3, learning_rate=0.9, progress=False
    )
    weights.save_pretrained(tmp_path / "learned")
    read = MergeWeights.from_pretrained(tmp_path / "learned")
    assert str(read) == str(weights)
    merge_adapters(model, TASKS, read, "again")
    found, expected = own_tensors(model, "again"), own_tensors(model, "learned")
    if simplex:
        assert_tensors_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    merge_adapters(model, TASKS, adapter_name="uniform")
    uniform = own_tensors(model, "uniform")
    assert not all(torch.allclose(found[key].float(), uniform[key].float(), atol=1e-3) for key in expected)
    if method.startswith("dynammo"):
        assert model.peft_config["again"].merge_weights == read.as_dict()
        assert model.peft_config["uniform"].merge_weights is None


def test_learned_weights_are_read_from_the_configuration_of_a_dynammo_adapter(tmp_path):
    model = adapted("dynammo")
    weights = learn_merge_weights(model, TASKS, labelled("dynammo"), steps=2, progress=False)
    model.save_pretrained(tmp_path, selected_adapters=["merged", TASKS[0]])
    assert torch.equal(MergeWeights.from_pretrained(tmp_path, subfolder="merged").values, weights.values)
    # A file of its own says more of the weights than the configuration.
    other = MergeWeights(TASKS, weights.groups)
    other.save_pretrained(tmp_path / "merged")
    assert torch.equal(MergeWeights.from_pretrained(tmp_path / "merged").values, other.values)
    with pytest.raises(ValueError, match="no merge weights at '.*task_000'.*merge_weights.json.*adapter_config.json"):
        MergeWeights.from_pretrained(tmp_path / TASKS[0])


def test_learned_weights_come_from_the_hub(hub, waits, tmp_path):
    weights = random_weights(adapter_merge_weights(merged_ia3(), TASKS))
    weights.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.json")
    hub.create_repo("tester/merged", files={f"merged/{file.name}": file.read_bytes(), "README.md": b"weights"})
    read = MergeWeights.from_pretrained("tester/merged", subfolder="merged", token=hub.token)
    assert torch.equal(read.values, weights.values)
    with pytest.raises(ValueError, match="no merge weights at 'tester/merged'"):
        MergeWeights.from_pretrained("tester/merged", token=hub.token)


def test_weights_are_not_written_over_a_file(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(ValueError, match="save_directory='.*file' is a file"):
        adapter_merge_weights(merged_ia3(), TASKS).save_pretrained(tmp_path / "file")


def changed(**changes):
    """A description of merge weights, correct but for these changes; a field of `None` is left out."""
    groups = [{"layer": "a", "weights": [0.25, 0.75]}, {"layer": "b", "weights": [[0.5, 1.0], [0.5, 0.0]]}]
    data = {"adapters": ["one", "two"], "granularity": "channel", "simplex": True, "groups": groups, **changes}
    return {name: value for name, value in data.items() if value is not None}


def one_group(weights, **changes):
    return changed(groups=[{"layer": "a", "weights": weights}], **changes)


@pytest.mark.parametrize(
    "data, message",
    [
        (None, "need 'adapters', 'granularity', 'simplex', 'groups', as `as_dict`"),
        (changed(groups=None), "need 'groups', as"),
        (changed(groups=[]), "'groups' of merge weights must be a list that is not empty"),
        (changed(groups=[{"layer": "a"}]), "must be a mapping with 'weights', got {'layer': 'a'}"),
        (changed(adapters="ab"), "'adapters' of merge weights must be a list of names, got 'ab'"),
        (changed(granularity="row"), "granularity='row'"),
        (one_group([math.nan, 1.0]), r"of 'a' must be finite, got \[nan"),
        (one_group([0.5]), r"of 'a' have shape \(1,\); for 2 adapters they need \(2,\) or \(2, channels\)"),
        (one_group([[[0.5]], [[0.5]]]), r"shape \(2, 1, 1\)"),
        (one_group([[], []]), r"shape \(2, 0\)"),
        (one_group([[0.5, 0.5], [0.5]]), "of 'a' are no table of numbers"),
        (one_group(["x", "y"]), "of 'a' are no table of numbers"),
        (one_group([1.5, -0.5]), "of 'a' are said to be on the simplex"),
        (one_group([0.5, 0.6]), "of 'a' are said to be on the simplex"),
        (changed(groups=[{"weights": [0.5, 0.5]}] * 2), "of 'all layers' are given more than once"),
    ],
)
def test_unusable_descriptions(data, message):
    assert MergeWeights.from_dict(changed())("b").tolist() == [[0.5, 1.0], [0.5, pytest.approx(0)]]
    with pytest.raises(ValueError, match=message):
        MergeWeights.from_dict(data)


def test_weights_that_do_not_fit_the_adapters():
    model = adapted("lora")
    merge_adapters(model, TASKS)
    weights = adapter_merge_weights(model, TASKS, granularity="channel")
    before = state_of(model)
    data = weights.as_dict()
    cases = [
        (TASKS[::-1], weights, {}, "of the adapters task_000, task_001, task_002, in this order, got task_002, "),
        (TASKS[:2], weights, {}, "in this order, got task_000, task_001."),
        (TASKS, weights, {"combination_type": "uniform"}, "those of combination_type='linear', got 'uniform'"),
        (TASKS, weights, {"combination_type": "ties", "density": 0.5}, "combination_type='linear', got 'ties'"),
        (
            TASKS,
            MergeWeights.from_dict({**data, "groups": data["groups"][1:]}),
            {},
            "of 'vit.layers.0.attention.q_proj.lora_A' they have none, the adapters need weights of 2 channels",
        ),
        (
            TASKS,
            MergeWeights.from_dict({**data, "groups": [*data["groups"], {"layer": "x", "weights": [0.0, 1.0, 2.0]}]}),
            {},
            "of 'x' they have one weight an adapter, the adapters need none",
        ),
    ]
    for adapters, given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            merge_adapters(model, adapters, given, "other", **options)
    assert state_of(model) == before


def test_other_configurations_are_left_alone(tmp_path, recwarn):
    model = adapted("lora")
    learn_merge_weights(model, TASKS, labelled("lora"), steps=1, progress=False)
    assert not hasattr(model.peft_config["merged"], "merge_weights")
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    PeftModel.from_pretrained(tiny_model("vit"), tmp_path / "merged")
    assert not [warning for warning in recwarn if "Unexpected keyword" in str(warning.message)]


def test_table():
    weights = MergeWeights.from_dict(
        {
            "adapters": ["task_000", "b"],
            "granularity": "channel",
            "simplex": False,
            "groups": [
                {"layer": "stages.0", "container": "down", "weights": [[0.25, 0.5], [1.0, -1.0]]},
                {"layer": "stages.0", "container": "alpha", "weights": [0.75, 3.0]},
                {"layer": "stages.1", "container": "alpha", "weights": [0.125, 10.5]},
            ],
        }
    )
    # Every weight counts the same, whatever its container.
    assert weights.layer_means() == {"stages.0": [0.5, 1.0], "stages.1": [0.125, 10.5]}
    assert weights.table().splitlines() == [
        "layer     task_000        b",
        "stages.0     0.500    1.000",
        "stages.1     0.125   10.500",
    ]
    assert str(weights) == f"Merge weights by channel for 2 adapters\n{weights.table()}"
    weights.loss_before, weights.loss_after = 1.5, 0.75
    assert str(weights).startswith("Merge weights by channel for 2 adapters, loss 1.5 -> 0.75\n")
    uniform = MergeWeights(["a"], adapter_merge_weights(merged_ia3(), TASKS, granularity="task").groups, "task")
    assert uniform.table().splitlines() == ["layer             a", "all layers    1.000"]


def merged_ia3():
    model = adapted("ia3")
    merge_adapters(model, TASKS)
    return model


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    model = merged_ia3()
    for granularity in GRANULARITIES:
        adapter_merge_weights(model, TASKS, granularity=granularity).plot(tmp_path / f"{granularity}.png")
        assert (tmp_path / f"{granularity}.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    weights = adapter_merge_weights(merged_ia3(), TASKS)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install dynammo_peft\[plots\]"):
        weights.plot(tmp_path / "weights.png")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"adapters": []}, "No adapters to merge"),
        ({"adapters": ["task_000", "nobody"]}, "'nobody' does not exist.*task_000, task_001, task_002"),
        ({"adapters": ["task_000", "wide"]}, "'task_000' and 'wide' differ in r .2 and 4"),
        ({"adapter_name": "task_001"}, "'task_001' cannot be merged into itself"),
        (
            {"adapter_name": "wide"},
            "'wide' cannot be filled from 'task_000'.*lora_A.weight.*4, 32.*their merge .2, 32",
        ),
        ({"granularity": "kernel"}, "granularity='kernel'.*'task', 'layer', 'channel'"),
        ({"combination_type": "ties"}, "combination_type='ties'.*'linear', 'cat'"),
        ({"combination_type": "cat", "adapter_name": "wide"}, "'wide' cannot be filled .*4, 32.*their merge .6, 32"),
        ({"objective": "accuracy"}, "objective='accuracy'.*'labels', 'entropy'"),
        ({"batches": []}, "batches holds no batch"),
        ({"batches": iter(labelled("lora"))}, "batches can be read only once"),
        ({"batches": [images_of("lora")]}, "objective='labels' needs labelled batches"),
        (
            {"batches": [(images_of("lora"), torch.zeros(2, 3))]},
            r"needs logits \(B, N\) and labels \(B,\), got \(\d+, 3\) and \(2, 3\)",
        ),
        ({"batches": [(images_of("lora"), torch.full((8,), 3))]}, "has the label 3, but there are 3 classes; number"),
        ({"batches": [(images_of("lora"), torch.full((8,), -1))]}, "has the label -1, but there are 3 classes"),
        ({"adapters": "task_000"}, "adapters='task_000' must be a list of names"),
        ({"adapter_name": None}, "adapter_name=None must be a name"),
        (
            {
                "objective": gaussian_likelihood(torch.zeros(2, 3), torch.eye(3)),
                "batches": [(images_of("lora"), torch.full((8,), 2))],
            },
            "has the label 2, but there are 2 classes",
        ),
        ({"batches": [{"pixel_values": images_of("lora")}]}, "objective='labels' needs labelled batches"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 1.5}, "steps=1.5 must be an integer"),
        ({"learning_rate": -1.0}, "learning rate of -1.0 is of no use; it must be a finite number, at least 0"),
        ({"learning_rate": math.nan}, "learning rate of nan is of no use"),
        ({"learning_rate": math.inf}, "learning rate of inf is of no use"),
        ({"learning_rate": "high"}, "learning rate of 'high' is of no use"),
        ({"batches": [(images_of("lora") * math.nan, torch.zeros(8).long())]}, "The loss is nan before the first"),
        ({"learning_rate": 1e20, "steps": 3}, r"The loss is \w+ (at step \d|after 3 steps); lower the learning rate"),
        ({"objective": lambda logits, labels: logits}, r"must return a scalar, got.*\(8, 3\)"),
        ({"objective": lambda logits, labels: torch.tensor(1.0)}, "does not depend on the merge weights"),
        ({"objective": gaussian_likelihood(torch.zeros(2, 5), torch.eye(5))}, r"\(8, 3\).*5 dimensions.*features"),
        (
            {"objective": gaussian_likelihood(torch.zeros(2, 3), torch.eye(3)), "batches": [images_of("lora")]},
            "gaussian_likelihood needs labelled",
        ),
    ],
)
def test_errors(arguments, message):
    model, images = adapted("lora"), images_of("lora")
    model.add_adapter("wide", LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"]))
    before, expected = state_of(model), logits_of(model, images)
    with pytest.raises(ValueError, match=message):
        learn_merge_weights(
            **{"model": model, "adapters": TASKS, "batches": labelled("lora"), "progress": False, **arguments}
        )
    assert state_of(model) == before
    assert torch.equal(logits_of(model, images), expected)


@pytest.mark.parametrize(
    "means, covariance, message",
    [
        (torch.zeros(3), torch.eye(3), r"means must have shape \(N, C\), got \(3,\)"),
        (torch.zeros(2, 3), torch.eye(2), r"covariance has shape \(2, 2\).*\(3, 3\) or \(2, 3, 3\)"),
        (torch.zeros(2, 3), torch.ones(3, 3), "not positive definite; add"),
        (torch.zeros(2, 3), torch.stack([torch.eye(3), -torch.eye(3)]), "not positive definite; add"),
    ],
)
def test_unusable_gaussians(means, covariance, message):
    with pytest.raises(ValueError, match=message):
        gaussian_likelihood(means, covariance)


def test_unusable_tensors():
    model = merged_ia3()
    weights = adapter_merge_weights(model, TASKS)
    tensors = [adapter_tensors(model, task) for task in TASKS]
    with pytest.raises(ValueError, match="2 adapters for merge weights of 3"):
        weights.combine(tensors[:2])
    key = next(iter(tensors[1]))
    with pytest.raises(ValueError, match=f"'task_001' has no tensor '{key}'"):
        weights.combine([tensors[0], {name: tensors[1][name] for name in tensors[1] if name != key}, tensors[2]])
    with pytest.raises(ValueError, match="no merge weights for 'nowhere.weight'"):
        weights("nowhere.weight")


def test_folded_adapters_are_refused():
    model = adapted("lora")
    merge_adapters(model, TASKS, adapter_name="other")
    model.merge_adapter([TASKS[0]])
    with pytest.raises(ValueError, match="merged into the base weights; call `unmerge_adapter`"):
        learn_merge_weights(model, TASKS, labelled("lora"), "other", progress=False)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_tensor_that_layers_share_has_one_weight(granularity):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], trainable_token_indices=[3, 4], r=2)
    model = get_peft_model(tiny_language_model(), lora, TASKS[0]).eval()
    model.add_adapter(TASKS[1], lora)
    with torch.no_grad():
        for name in TASKS[:2]:
            for tensor in adapter_tensors(model, name).values():
                tensor.normal_()
    assert len([key for key in adapter_slots(model, TASKS[0]) if "trainable_tokens" in key]) == 1
    tokens = torch.tensor([[3, 5, 4, 7], [4, 4, 3, 9]])
    batches = [{"input_ids": tokens, "labels": tokens}]
    options = {"granularity": granularity, "objective": token_cross_entropy, "progress": False}
    weights = learn_merge_weights(model, TASKS[:2], batches, **options)
    assert weights.loss_after < weights.loss_before
    model.set_adapter("merged")
    with torch.no_grad():
        found = token_cross_entropy(model(input_ids=tokens).logits, tokens).item()
    assert found == pytest.approx(weights.loss_after, rel=1e-5)


def test_an_adapter_of_other_classes_is_not_filled():
    model = adapted("dynammo")
    batches = [images_of("dynammo")]
    options = {"objective": "entropy", "steps": 1, "progress": False}
    learn_merge_weights(model, TASKS[:2], batches, **options)
    before = state_of(model)
    with pytest.raises(ValueError, match="'merged' has the classes cat, dog, owl, but .* dog, owl, fox, elk.*anew"):
        learn_merge_weights(model, TASKS, batches, **options)
    assert state_of(model) == before
    merge_adapters(model, TASKS)
    learn_merge_weights(model, TASKS, batches, **options)
    assert model.peft_config["merged"].class_names == ["cat", "dog", "owl", "fox", "elk"]


def test_an_adapter_that_is_built_otherwise_is_not_filled():
    configs = [LoHaConfig(target_modules=["q_proj"], alpha=alpha) for alpha in (4, 4, 64)]
    model = get_peft_model(tiny_model("vit"), configs[0], TASKS[0])
    for name, config in zip((TASKS[1], "merged"), configs[1:]):
        model.add_adapter(name, config)
    with pytest.raises(ValueError, match=r"'task_000' and 'merged' differ in alpha \(4 and 64\)"):
        learn_merge_weights(model, TASKS[:2], labelled("lora"), progress=False)


def test_nothing_is_learned_past_what_the_base_model_does():
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], alora_invocation_tokens=[5])
    model = get_peft_model(tiny_language_model(), config, TASKS[0])
    with pytest.raises(ValueError, match="'task_000' has alora_invocation_tokens, which the base model's"):
        learn_merge_weights(model, TASKS[:1], [torch.zeros(1, 3).long()], progress=False)
    assert list(model.peft_config) == TASKS[:1]


def test_a_seed_is_of_the_devices_that_are_put_back(monkeypatch):
    def reseeded(seed):
        raise AssertionError("The state of all CUDA devices is lost.")

    model, batches = adapted("ia3"), labelled("ia3")
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    learn_merge_weights(model, TASKS, batches, steps=1, progress=False)

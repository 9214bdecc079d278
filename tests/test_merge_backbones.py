"""Merging backbones, against sums worked out in plain torch."""

import copy

import pytest
import torch
from tiny import CONFIGS, tiny_images, tiny_model
from transformers import (
    AutoModelForImageClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    ResNetConfig,
    ResNetModel,
    ViTModel,
)

from dynammo_peft.merging import MergeWeights, merge_backbones


def other_model(name):
    """A second pretrained model: other weights, and statistics of its own."""
    return with_statistics(tiny_model(name, seed=7), seed=8)


@torch.no_grad()
def with_statistics(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.named_buffers():
        if "running_mean" in key:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        elif "running_var" in key:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif "num_batches_tracked" in key:
            tensor.fill_(seed)
    return model


def first_model(name):
    return with_statistics(tiny_model(name, seed=0), seed=3)


def logits_of(model, images):
    with torch.no_grad():
        return model(images).logits


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def labelled(name, count=16, classes=3):
    images = tiny_images(name, count)
    labels = torch.arange(count) % classes
    # A colour a class, so that there is something to learn.
    images[:, 0] += labels[:, None, None].float() - 1
    return list(zip(images.split(8), labels.split(8)))


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_tensors(name, share):
    first, second = first_model(name), other_model(name)
    states = snapshot(first), snapshot(second)
    merged, weights = merge_backbones(first, second, weights=share)
    share = 0.5 if share is None else share
    for key, value in merged.state_dict().items():
        if "num_batches_tracked" in key:
            assert value.item() == 3 + 8
        elif not value.is_floating_point():
            assert torch.equal(value, states[0][key])
        else:
            torch.testing.assert_close(value, share * states[0][key] + (1 - share) * states[1][key], msg=key)
    assert weights.adapters == ("first", "second")
    # They are left alone, and nothing is shared.
    for model, state in zip((first, second), states):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    own = {tensor.data_ptr() for tensor in merged.state_dict().values()}
    assert not own & {tensor.data_ptr() for model in (first, second) for tensor in model.state_dict().values()}
    assert not merged.training
    assert type(merged) is type(first)
    assert logits_of(merged, tiny_images(name)).isfinite().all()


@pytest.mark.parametrize("share", [0, 1])
def test_one_model_alone(share):
    first, second = first_model("resnet_basic"), other_model("resnet_basic")
    merged, _ = merge_backbones(first, second, weights=share)
    images = tiny_images("resnet_basic")
    assert torch.equal(logits_of(merged, images), logits_of(first if share else second, images))


@pytest.mark.parametrize("name", CONFIGS)
def test_channels(name):
    model = tiny_model(name)
    _, weights = merge_backbones(model, other_model(name), labelled(name), steps=0, progress=False)
    parameters = {key: value for key, value in model.named_parameters() if not key.startswith("classifier")}
    for key, parameter in parameters.items():
        channels = parameter.shape[0] if key.endswith("weight") and parameter.shape[0] > 1 else parameter.shape[-1]
        assert weights(key).shape == ((2, channels) if channels > 1 else (2,))
        assert (weights(key) == 0.5).all()
    # A kernel and its bias go together.
    layers = {key.rpartition(".")[0] for key in parameters if key.endswith("weight")}
    assert layers <= {group.name for group in weights.groups if not group.tensor}


@pytest.mark.parametrize("granularity", ["task", "layer", "channel"])
@pytest.mark.parametrize("name", ["resnet_basic", "vit"])
def test_learned_weights_and_head(name, granularity):
    first, second = first_model(name), other_model(name)
    states, batches = (snapshot(first), snapshot(second)), labelled(name)
    merged, weights = merge_backbones(
        first, second, batches, granularity, steps=8, learning_rate=0.2, head_learning_rate=0.01, progress=False
    )
    assert weights.granularity == granularity
    assert weights.loss_after < weights.loss_before
    losses = [torch.nn.functional.cross_entropy(logits_of(merged, images), labels) for images, labels in batches]
    assert weights.loss_after == pytest.approx(sum(losses).item() / 2, rel=1e-4)
    found, moved = snapshot(merged), 0
    for key, value in found.items():
        if key.startswith("classifier"):
            assert not torch.equal(value, states[0][key])
        elif value.is_floating_point():
            share = weights(key).detach()[0]
            assert ((share > 0) & (share < 1)).all()
            moved += (share - 0.5).abs().max().item() > 1e-3
            dim = 0 if key.endswith(("weight", "bias")) or "running" in key else value.dim() - 1
            if share.dim():
                share = share.reshape([-1 if dim == d else 1 for d in range(value.dim())])
            torch.testing.assert_close(value, share * states[0][key] + (1 - share) * states[1][key], msg=key)
    assert moved
    for model, state in zip((first, second), states):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in merged.parameters())
    # The weights serve again, for the backbone.
    again, _ = merge_backbones(first, second, weights=MergeWeights.from_dict(weights.as_dict()))
    for key, value in again.state_dict().items():
        expected = states[0][key] if key.startswith("classifier") else found[key]
        torch.testing.assert_close(value, expected, msg=key)


def test_indices_are_left_alone():
    models = [tiny_model("vit", seed) for seed in (0, 1)]
    for model in models:
        model.vit.register_buffer("index", torch.arange(3))
    merged, _ = merge_backbones(*models, weights=0.5)
    assert merged.vit.index.tolist() == [0, 1, 2]


def test_learned_in_evaluation_mode():
    first, second = first_model("resnet_basic"), other_model("resnet_basic")
    batches, uniform = labelled("resnet_basic"), merge_backbones(first, second)[0]
    uniform.classifier.load_state_dict(first.classifier.state_dict())
    merged, weights = merge_backbones(first.train(), second, batches, steps=2, progress=False)
    losses = [torch.nn.functional.cross_entropy(logits_of(uniform, images), labels) for images, labels in batches]
    assert weights.loss_before == pytest.approx(sum(losses).item() / 2, rel=1e-4)
    assert merged.training and first.training


def test_planted_share_is_found():
    first, second = first_model("vit"), other_model("vit")
    planted, _ = merge_backbones(first, second, weights=0.8)
    images = tiny_images("vit", 8)
    with torch.no_grad():
        batches = [(images, planted.vit(images).last_hidden_state)]
    merged, weights = merge_backbones(
        first,
        second,
        batches,
        "task",
        objective=lambda features, target: (features - target).square().mean(),
        forward=lambda base, batch: base.vit(batch[0]).last_hidden_state,
        steps=120,
        learning_rate=0.1,
        progress=False,
    )
    assert weights("vit").tolist() == pytest.approx([0.8, 0.2], abs=0.01)
    # What the objective does not see stays.
    assert torch.equal(merged.classifier.weight, first.classifier.weight)


def test_deterministic_and_nothing_outside_is_drawn():
    first, second = first_model("vit"), other_model("vit")
    state = torch.random.get_rng_state()

    def learned(seed):
        return merge_backbones(first, second, labelled("vit"), num_labels=4, steps=2, seed=seed, progress=False)[0]

    one, same, other = (logits_of(learned(seed), tiny_images("vit")) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("batches", [None, labelled("vit", classes=5)])
def test_fresh_head(batches):
    first, second = first_model("vit"), other_model("vit")
    merged, weights = merge_backbones(first, second, batches, num_labels=5, steps=3, progress=False)
    assert logits_of(merged, tiny_images("vit")).shape == (2, 5)
    assert (merged.config.num_labels, first.config.num_labels) == (5, 3)
    assert first.classifier.weight.shape[0] == 3
    if batches is None:
        shares = 0.5 * first.vit.layernorm.weight + 0.5 * second.vit.layernorm.weight
        assert torch.equal(merged.vit.layernorm.weight, shares)
        with pytest.raises(ValueError, match="no merge weights for 'classifier.weight'"):
            weights("classifier.weight")


@pytest.mark.parametrize("change", ["shape", "labels"])
def test_heads_that_differ(change):
    first = first_model("vit")
    config = copy.deepcopy(CONFIGS["vit"][0])
    config.id2label = {0: "cat", 1: "dog"} if change == "shape" else {0: "cat", 1: "dog", 2: "owl"}
    second = AutoModelForImageClassification.from_config(config)
    merged, _ = merge_backbones(first, second, weights=0.5)
    assert torch.equal(merged.classifier.weight, first.classifier.weight)
    assert merged.config.id2label == first.config.id2label
    torch.testing.assert_close(
        merged.vit.layernorm.weight, (first.vit.layernorm.weight + second.vit.layernorm.weight) / 2
    )


def test_models_without_head():
    config = CONFIGS["vit"][0]
    first, second = ViTModel(config), ViTModel(config)
    merged, _ = merge_backbones(first, second, weights=0.75)
    expected = 0.75 * first.embeddings.cls_token + 0.25 * second.embeddings.cls_token
    torch.testing.assert_close(merged.embeddings.cls_token, expected)
    merged, weights = merge_backbones(
        first,
        second,
        [tiny_images("vit")],
        "layer",
        objective=lambda features, _: features[..., 0].mean(),
        forward=lambda base, images: base(images).last_hidden_state,
        steps=2,
        progress=False,
    )
    assert weights.loss_after < weights.loss_before
    assert merged.training


def test_saved_and_loaded(tmp_path):
    merged, _ = merge_backbones(first_model("swin"), other_model("swin"), num_labels=5)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    images = tiny_images("swin")
    assert torch.equal(logits_of(loaded, images), logits_of(merged, images))


def vit(**changes):
    config = copy.deepcopy(CONFIGS["vit"][0])
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForImageClassification.from_config(config).eval()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 4}, r"num_attention_heads \(2 and 4\)"),
        ({"hidden_act": "relu"}, r"hidden_act \('gelu' and 'relu'\)"),
        ({"layer_norm_eps": 1e-3}, r"layer_norm_eps \(1e-12 and 0.001\)"),
    ],
)
def test_backbones_of_the_same_shapes_that_compute_something_else(changes, message):
    with pytest.raises(ValueError, match=f"The models differ in {message}.*both need one architecture"):
        merge_backbones(vit(), vit(**changes))


def test_what_backbones_may_differ_in(tmp_path):
    second = vit(hidden_dropout_prob=0.1, initializer_range=0.1, problem_type="regression").bfloat16()
    second.save_pretrained(tmp_path)
    second = AutoModelForImageClassification.from_pretrained(tmp_path, output_hidden_states=True)
    assert (second.dtype, second.config.architectures) == (torch.bfloat16, ["ViTForImageClassification"])
    merged, _ = merge_backbones(vit(), second)
    assert merged.dtype is torch.float32


def test_backbones_of_two_resolutions():
    second = other_model("convnext")
    second.config.image_size = 2 * second.config.image_size
    merged, _ = merge_backbones(first_model("convnext"), second)
    assert merged.config.image_size == first_model("convnext").config.image_size


def resnet(width=64, depth=2):
    config = {"hidden_sizes": [16, 32, 48, width], "depths": [1, 1, depth, 1], "layer_type": "basic"}
    return AutoModelForImageClassification.from_config(ResNetConfig(embedding_size=16, **config))


def of_others():
    groups = [{"weights": [2.0, 5.0]}]
    description = {"adapters": ["cats", "dogs"], "granularity": "task", "simplex": False, "groups": groups}
    return MergeWeights.from_dict(description)


@pytest.mark.parametrize(
    "second, arguments, message",
    [
        (lambda: tiny_model("vit"), {}, "a ResNetForImageClassification and a ViTForImageClassification"),
        (lambda: ResNetModel(CONFIGS["resnet_basic"][0]), {}, "ResNetForImageClassification and a ResNetModel"),
        (
            lambda: resnet(width=80),
            {},
            r"differ in \d+ tensors: '\S+stages.3\S+' .*\(64, 48.*\(80, 48.*one architecture",
        ),
        (lambda: resnet(depth=1), {}, r"differ in \d+ tensors: '\S+stages.2.layers.1\S+' .*\(48, 48, 3, 3\) and None"),
        (None, {"weights": 0.5, "batches": [1]}, "either weights or batches.*not both"),
        (None, {"num_labels": 0}, "num_labels=0 must be at least 1; None keeps the first model's classifier"),
        (None, {"num_labels": -2, "weights": 0.5}, "num_labels=-2 must be at least 1"),
        (None, {"weights": 1.5}, "weights=1.5 must be a number between 0 and 1"),
        (None, {"weights": -0.5}, "weights=-0.5 must be a number between 0 and 1"),
        (None, {"weights": [0.5, 0.5]}, r"weights=\[0.5, 0.5\] must be a number between 0 and 1"),
        (
            None,
            {"weights": of_others()},
            "are of cats, dogs; give those that merge_backbones has returned, of first",
        ),
        (None, {"granularity": "kernel"}, "granularity='kernel'.*'task', 'layer', 'channel'"),
        (None, {"batches": [], "objective": "accuracy"}, "objective='accuracy'.*'labels', 'entropy'"),
        (None, {"batches": []}, "batches holds no batch"),
        (None, {"batches": [tiny_images("resnet_basic")]}, "objective='labels' needs labelled batches"),
    ],
)
def test_errors(second, arguments, message):
    second = second() if second is not None else tiny_model("resnet_basic", seed=1)
    with pytest.raises(ValueError, match=message):
        merge_backbones(tiny_model("resnet_basic"), second, **arguments)


@torch.no_grad()
def test_a_fresh_head_leaves_buffers_of_the_backbone_as_they_are():
    config = Qwen2Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=11,
        num_labels=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(config).to(torch.bfloat16).eval()
    # Frequencies of positions, in single precision as after `from_pretrained`, are saved nowhere.
    rotary = model.model.rotary_emb
    rotary.inv_freq = 10000 ** -(torch.arange(0, 8, 2) / 8)
    merged, _ = merge_backbones(model, copy.deepcopy(model), weights=1.0, num_labels=5)
    assert merged.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(merged.model.rotary_emb.inv_freq, rotary.inv_freq)
    assert merged.score.weight.shape == (5, 16) and merged.score.weight.dtype == torch.bfloat16
    assert merged.config.num_labels == merged.num_labels == 5 and model.config.num_labels == 2
    tokens = torch.tensor([[1, 4, 2, 7]])
    assert torch.equal(merged.model(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    assert merged(tokens).logits.shape == (1, 5)


def test_a_model_without_a_classifier_gets_no_fresh_one():
    model = ViTModel(tiny_model("vit").config)
    with pytest.raises(ValueError, match="num_labels=4 .* ViTModel has no backbone"):
        merge_backbones(model, copy.deepcopy(model), num_labels=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_in_half_precision_is_learned_in_single(dtype):
    first, second = (tiny_model("vit", seed=seed).to(dtype) for seed in (0, 7))
    batches = [(images.to(dtype), labels) for images, labels in labelled("vit")]
    merged, weights = merge_backbones(first, second, batches, steps=10, progress=False)
    assert weights.loss_after < weights.loss_before
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert not torch.equal(merged.classifier.weight, first.classifier.weight)


@pytest.mark.parametrize("name", ["first", "second"])
def test_paths_are_no_models(name):
    models = {"first": first_model("vit"), "second": other_model("vit"), name: "models/vit"}
    with pytest.raises(ValueError, match="takes models of transformers, got 'models/vit'; load it first"):
        merge_backbones(**models)

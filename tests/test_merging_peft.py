"""Merging adapters of PEFT's own methods, against PEFT's merges and sums worked out in plain torch."""

import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from peft.utils import merge_utils
from tiny import tiny_images, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, GPT2Config

from dynammo_peft.merging import (
    MergeWeights,
    adapted_base,
    adapter_slots,
    adapter_tensors,
    learn_merge_weights,
    merge_adapters,
    merge_into,
    set_adapter_tensors,
)
from dynammo_peft.merging import merge as merge_module
from dynammo_peft.merging.checks import check_name_is_free
from dynammo_peft.merging.learned import adapter_merge_weights


ATTENTION = ["q_proj", "v_proj"]


@torch.no_grad()
def with_adapters(*configs, base=None, mixed=False):
    """A model with adapters `a0`, `a1`, ... of random tensors, in evaluation mode; the first one is active."""
    base = tiny_model("vit") if base is None else base
    model = get_peft_model(base, configs[0], "a0", mixed=mixed)
    for index, config in enumerate(configs[1:], start=1):
        model.add_adapter(f"a{index}", config)
    if not mixed:
        for index in range(len(configs)):
            fill(model, f"a{index}")
    return model.eval()


@torch.no_grad()
def fill(model, adapter):
    slots = adapter_slots(model, adapter)
    for seed, (key, tensor) in enumerate(adapter_tensors(model, adapter).items()):
        if slots[key].kind == "constant":
            continue
        generator = torch.Generator().manual_seed(seed + 1000 * int(adapter[1:]))
        noise = torch.randn(tensor.shape, generator=generator)
        if slots[key].kind == "statistic":
            noise = noise.abs() + 0.5
        # Integers are counts.
        tensor.copy_(noise if tensor.is_floating_point() else torch.randint(1, 99, (), generator=generator))


@torch.no_grad()
def logits_of(model, images):
    return model(pixel_values=images).logits


def assert_loads(adapter, model, folder):
    """That an adapter classifies as it does where it was made once it was saved and loaded."""
    model.set_adapter(adapter)
    logits = logits_of(model, tiny_images("vit"))
    model.save_pretrained(folder, selected_adapters=[adapter])
    loaded = PeftModel.from_pretrained(tiny_model("vit"), folder / adapter).eval()
    torch.testing.assert_close(logits_of(loaded, tiny_images("vit")), logits)


def delta_weights(model, adapter):
    layers = {key: module for key, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    return {key: module.get_delta_weight(adapter).detach() for key, module in layers.items()}


def assert_same(found, expected, **tolerances):
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}", **tolerances)


LORA = {"target_modules": [*ATTENTION, "projection"], "r": 4}


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, 1.5], [1.0, -0.8]])
@pytest.mark.parametrize("alphas", [(4, 4), (8, 2)])
@pytest.mark.parametrize(
    "combination_type, options",
    [
        ("linear", {}),
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.3, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.4}),
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.5}),
    ],
)
def test_lora_is_merged_as_by_peft(combination_type, options, alphas, weights, monkeypatch):
    model = with_adapters(*[LoraConfig(**LORA, lora_alpha=alpha) for alpha in alphas])
    if "dare" in combination_type:
        # The same values are dropped by both, every third.
        def prune(tensor, density, rescale=True):
            return tensor * (torch.arange(tensor.numel()).reshape(tensor.shape) % 3 > 0) / density

        monkeypatch.setattr(merge_utils, "random_pruning", prune)
        module = __import__("dynammo_peft.merging.pruning", fromlist=["_random"])
        monkeypatch.setattr(module, "_random", lambda density, _: lambda *args: prune(args[-1], density))
    model.add_weighted_adapter(["a0", "a1"], weights, "theirs", combination_type, **options)
    merge_adapters(model, ["a0", "a1"], weights, "ours", combination_type, **options)
    # PEFT's has the scaling 1, ours that of the first.
    assert model.peft_config["ours"].lora_alpha == alphas[0]
    assert_same(delta_weights(model, "ours"), delta_weights(model, "theirs"), rtol=1e-4, atol=1e-5)
    model.set_adapter("theirs")
    expected = logits_of(model, tiny_images("vit"))
    model.set_adapter("ours")
    torch.testing.assert_close(logits_of(model, tiny_images("vit")), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}, "use_rslora": True},
        {"lora_bias": True},
        {"use_dora": True},
    ],
)
def test_lora_with_scalings_of_layers(arguments):
    configs = [LoraConfig(**{**LORA, **arguments, "lora_alpha": alpha}) for alpha in (4, 6)]
    model = with_adapters(*configs)
    weights = [0.7, -1.5]
    merge_adapters(model, ["a0", "a1"], weights)
    seen = set()
    for layer in model.modules():
        if not hasattr(layer, "lora_A"):
            continue
        shares = [weight * layer.scaling[f"a{index}"] for index, weight in enumerate(weights)]
        seen.add(shares[0])
        # As if the scaling was 1, the roots of what counts, with the sign on one side.
        factors = [
            sum(
                math.copysign(math.sqrt(abs(share)), share if name == "lora_A" else 1)
                * getattr(layer, name)[f"a{i}"].weight
                for i, share in enumerate(shares)
            )
            for name in ("lora_A", "lora_B")
        ]
        own = [layer.lora_A["merged"].weight, layer.lora_B["merged"].weight]
        delta = layer.scaling["merged"] * own[1].flatten(1) @ own[0].flatten(1)
        torch.testing.assert_close(delta, factors[1].flatten(1) @ factors[0].flatten(1), rtol=1e-4, atol=1e-4)
        if "lora_bias" in arguments:
            bias = sum(share * layer.lora_B[f"a{i}"].bias for i, share in enumerate(shares))
            torch.testing.assert_close(layer.scaling["merged"] * layer.lora_B["merged"].bias, bias)
        if "use_dora" in arguments:
            magnitudes = [layer.lora_magnitude_vector[f"a{i}"].weight for i in range(2)]
            expected = 0.7 * magnitudes[0] - 1.5 * magnitudes[1]
            torch.testing.assert_close(layer.lora_magnitude_vector["merged"].weight, expected)
    # One a rank and alpha: of queries, values and patches, or of all layers.
    assert len(seen) == (3 if "rank_pattern" in arguments else 1)


@torch.no_grad()
def test_lora_whose_scaling_was_changed_by_hand():
    model = with_adapters(LoraConfig(**LORA), LoraConfig(**LORA))
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer.set_scale("a0", 3.0)
    merge_adapters(model, ["a0", "a1"], [1.0, 0.0])
    # The new adapter has the scaling of its configuration; the change went into its factors.
    assert all(layer.scaling["merged"] == layer.scaling["a0"] / 3 for layer in layers)
    assert_same(delta_weights(model, "merged"), delta_weights(model, "a0"), rtol=1e-4, atol=1e-5)
    merge_adapters(model, ["a0"], combination_type="uniform")
    assert_same(delta_weights(model, "merged"), delta_weights(model, "a0"), rtol=1e-4, atol=1e-5)


class Words(nn.Module):
    """Any module at all, with an embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, tokens):
        return self.out(self.words(tokens)).mean(dim=1)


def test_embeddings_of_any_module():
    configs = [LoraConfig(target_modules=["words", "out"], r=2, lora_alpha=alpha) for alpha in (2, 6)]
    model = with_adapters(*configs, base=Words())
    model.add_weighted_adapter(["a0", "a1"], [0.5, -2.0], "theirs", "linear")
    merge_adapters(model, ["a0", "a1"], [0.5, -2.0], "ours")
    assert_same(delta_weights(model, "ours"), delta_weights(model, "theirs"), rtol=1e-4, atol=1e-5)


def test_ia3_is_merged_as_by_peft():
    arguments = {"target_modules": [*ATTENTION, "fc2"], "feedforward_modules": ["fc2"]}
    model = with_adapters(IA3Config(**arguments), IA3Config(**arguments))
    model.add_weighted_adapter(["a0", "a1"], [0.6, -0.3], "theirs")
    merge_adapters(model, ["a0", "a1"], [0.6, -0.3], "ours")
    assert_same(adapter_tensors(model, "ours"), adapter_tensors(model, "theirs"))


METHODS = {
    "ia3": IA3Config(target_modules=ATTENTION, feedforward_modules=[]),
    "loha": LoHaConfig(target_modules=[*ATTENTION, "projection"], r=2),
    "lokr": LoKrConfig(target_modules=ATTENTION, r=2),
    "oft": OFTConfig(target_modules=ATTENTION, oft_block_size=4, r=0),
    "ln_tuning": LNTuningConfig(target_modules=["layernorm_before", "layernorm"]),
    "vera": VeraConfig(target_modules=ATTENTION, r=4),
    "shira": ShiraConfig(target_modules=ATTENTION, r=1, random_seed=3),
    "modules_to_save": LoraConfig(target_modules=ATTENTION, modules_to_save=["classifier"]),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("through", ["model", "tuner"])
def test_any_method(name, through):
    config = METHODS[name]
    model = with_adapters(*[type(config)(**config_arguments(config)) for _ in range(2)])
    assert all(tensor.dtype is torch.float32 for tensor in adapter_tensors(model, "a0").values())
    own = [adapter_tensors(model, adapter) for adapter in ("a0", "a1")]
    slots = adapter_slots(model, "a0")
    merge_adapters(model if through == "model" else model.base_model, ["a0", "a1"], [0.25, 0.75])
    merged = adapter_tensors(model, "merged")
    assert list(merged) == list(slots)
    for key, slot in slots.items():
        shares = [0.5, 0.75**0.5] if slot.kind.startswith("factor") else [0.25, 0.75]
        torch.testing.assert_close(merged[key], shares[0] * own[0][key] + shares[1] * own[1][key], msg=key)
    # Factors too are averaged one by one.
    merge_adapters(model, ["a0", "a1"], adapter_name="half_way", combination_type="anchored_mean")
    for key, value in adapter_tensors(model, "half_way").items():
        torch.testing.assert_close(value, 0.75 * own[0][key] + 0.25 * own[1][key], msg=key)
    # Of one adapter a copy: nothing of an adapter stays behind.
    merge_adapters(model, ["a1"], adapter_name="same", combination_type="uniform")
    logits = {}
    for adapter in ("a0", "a1", "same"):
        model.set_adapter(adapter)
        logits[adapter] = logits_of(model, tiny_images("vit"))
    torch.testing.assert_close(logits["same"], logits["a1"])
    assert not torch.allclose(logits["same"], logits["a0"])


def config_arguments(config):
    return {name: value for name, value in config.to_dict().items() if name not in ("peft_type", "peft_version")}


def test_statistics_of_modules_to_save():
    arguments = {"target_modules": ["convolution"], "r": 1, "modules_to_save": ["normalization"]}
    arguments["exclude_modules"] = "resnet.encoder.*"
    model = with_adapters(LoraConfig(**arguments), LoraConfig(**arguments), base=tiny_model("resnet_basic"))
    own = [adapter_tensors(model, adapter) for adapter in ("a0", "a1")]
    for count, tensors in zip((3, 4), own):
        next(tensor for key, tensor in tensors.items() if "num_batches_tracked" in key).fill_(count)
    merge_adapters(model, ["a0", "a1"], [1.0, 3.0])
    merged = adapter_tensors(model, "merged")
    for tensor, shares in {"weight": (1, 3), "running_var": (0.25, 0.75), "num_batches_tracked": (1, 1)}.items():
        key = next(key for key in merged if key.endswith(f"normalization.modules_to_save.{tensor}"))
        torch.testing.assert_close(merged[key], (shares[0] * own[0][key] + shares[1] * own[1][key]).to(merged[key]))


def classifier_and_lora(count=2):
    return with_adapters(*[LoraConfig(**LORA, modules_to_save=["classifier"]) for _ in range(count)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"combination_type": "ties", "density": 0.5}, "'ties' prunes classifier of modules_to_save.*; give base="),
        ({"combination_type": "dare_linear", "density": 0.5}, "'dare_linear' prunes classifier"),
        ({"weights": [1.0, 1.0]}, "scales classifier of modules_to_save by 2, the sum of the weights"),
        ({"weights": [0.5, 0.4], "combination_type": "cat"}, "scales classifier of modules_to_save by 0.9"),
    ],
)
def test_pruned_or_scaled_modules_to_save(arguments, message):
    model = classifier_and_lora()
    with pytest.warns(UserWarning, match=message) as caught:
        merge_adapters(model, ["a0", "a1"], **arguments)
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]


def test_means_of_modules_to_save(recwarn):
    model = classifier_and_lora()
    names, tensors = ["a0", "a1"], [adapter_tensors(model, name) for name in ("a0", "a1")]
    base = {key: tensor.clone() for key, tensor in tensors[0].items()}
    fisher = [{key: tensor.square() for key, tensor in own.items()} for own in tensors]
    for arguments in (
        {},
        {"weights": [0.75, 0.25]},
        {"weights": [0.75, 0.25], "combination_type": "cat"},
        {"combination_type": "uniform"},
        {"weights": [2.0, 1.0], "combination_type": "fisher", "fisher": fisher},
        {"combination_type": "ties", "density": 0.5, "base": base},
    ):
        merge_adapters(model, names, **arguments)
    # From the base on, half of the difference is taken, and nothing of the base is lost.
    key = "classifier.modules_to_save.weight"
    added = adapter_tensors(model, "merged")[key] - base[key]
    assert (added == 0).sum() == added.numel() // 2
    # Nothing of it is there without such modules.
    merge_adapters(with_adapters(LoraConfig(**LORA), LoraConfig(**LORA)), names, [1.0, 1.0])
    assert not [warning for warning in recwarn if "modules_to_save" in str(warning.message)]


class Window(nn.Module):
    """A module with indices among its buffers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("places", torch.tensor([2, 0, 1]))

    def forward(self, x):
        return self.inner(x)[:, self.places]


def test_indices_of_modules_to_save():
    base = nn.Sequential(OrderedDict(first=nn.Linear(3, 3), window=Window()))
    configs = [LoraConfig(target_modules=["first"], r=1, modules_to_save=["window"]) for _ in range(2)]
    model = with_adapters(*configs, base=base)
    merge_adapters(model, ["a0", "a1"])
    saved = model.base_model.model.window.modules_to_save
    assert saved["merged"].places.tolist() == [2, 0, 1]
    saved["a1"].places.copy_(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="differ in 'window.modules_to_save.places'"):
        merge_adapters(model, ["a0", "a1"])


def state_of(model):
    tensors = dict(model.state_dict(keep_vars=True))
    return {
        "tensors": tensors,
        "values": {key: value.detach().clone() for key, value in tensors.items()},
        "flags": {key: parameter.requires_grad for key, parameter in model.named_parameters()},
        "modes": {key: module.training for key, module in model.named_modules()},
        "configs": dict(model.peft_config),
        "active": (model.active_adapter, model.base_model.active_adapter, list(model.active_adapters)),
    }


def assert_state(model, before, without=".merged"):
    after = state_of(model)
    for name in ("tensors", "values", "flags", "modes"):
        kept = {key: value for key, value in after[name].items() if f"{without}." not in f"{key}."}
        wanted = {key: value for key, value in before[name].items() if f"{without}." not in f"{key}."}
        assert kept.keys() == wanted.keys(), name
        for key, value in wanted.items():
            same = torch.equal(kept[key], value) if name == "values" else kept[key] is value
            assert same, (name, key)
    assert after["active"] == before["active"]
    return after


@pytest.mark.parametrize("active", ["a1", "merged"])
@pytest.mark.parametrize("name", ["loha", "modules_to_save"])
def test_merging_leaves_all_else_as_it_was(name, active, recwarn):
    config = METHODS[name]
    model = with_adapters(*[type(config)(**config_arguments(config)) for _ in range(2)])
    merge_adapters(model, ["a0", "a1"])
    # A new adapter is frozen, and in the mode of the model.
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if ".merged" in key)
    assert not any(module.training for module in model.modules())
    model.set_adapter(active)
    model.train()
    model.base_model.model.vit.layernorm.eval()
    before = state_of(model)
    merge_adapters(model, ["a1", "a0"], [0.9, 0.3])
    after = assert_state(model, before)
    assert list(after["configs"]) == ["a0", "a1", "merged"]
    assert all(training for key, training in after["modes"].items() if ".merged" in key)
    assert not any(flag for key, flag in after["flags"].items() if ".merged" in key)
    assert [config.inference_mode for config in model.peft_config.values()] == [False, False, True]
    assert not [warning for warning in recwarn if "deleted" in str(warning.message)]


@pytest.mark.parametrize("active", ["a1", "merged"])
@pytest.mark.parametrize("where", ["set_adapter_tensors", "check_constants"])
def test_a_failure_leaves_no_trace(where, active, monkeypatch):
    model = with_adapters(*[LoraConfig(**LORA, use_dora=True, modules_to_save=["classifier"]) for _ in range(2)])
    before = state_of(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    for name in ("merged", "nothing"):
        if name == "merged":
            merge_adapters(model, ["a0", "a1"])
            model.set_adapter(active)
            before = state_of(model)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
            patch.setattr(merge_module, where, fail)
            merge_adapters(model, ["a1", "a0"], adapter_name=name)
        assert_state(model, before, without=".other")
        assert model.peft_config == before["configs"]
        assert list(model.peft_config) == ["a0", "a1", "merged"]
    images = tiny_images("vit")
    expected = logits_of(model, images)
    merge_adapters(model, ["a0", "a1"])
    if active == "merged":
        torch.testing.assert_close(logits_of(model, images), expected)


def test_what_the_base_has_taken_in_cannot_be_merged():
    model = with_adapters(LoraConfig(**LORA), LoraConfig(**LORA))
    model.merge_adapter(["a1"])
    with pytest.raises(ValueError, match="Adapters a1 are merged into the base weights; call `unmerge_adapter`"):
        merge_adapters(model, ["a0", "a1"])
    assert any("a1" in module.merged_adapters for module in model.modules() if hasattr(module, "lora_A"))


@pytest.mark.parametrize(
    "first, second, message",
    [
        ({}, {"r": 8}, r"'a0' and 'a1' differ in r \(4 and 8\); train both with the same, or merge LoRA with weights"),
        ({}, {"target_modules": ["q_proj"]}, r"differ in target_modules \(\{.*'v_proj'.*\} and \{'q_proj'\}\)"),
        ({}, {"rank_pattern": {"q_proj": 2}}, r"differ in rank_pattern \(\{\} and \{'q_proj': 2\}\); train"),
        ({}, {"modules_to_save": ["classifier"]}, r"differ in modules_to_save \(None and \['classifier'\]\)"),
        ({}, {"use_dora": True}, r"differ in use_dora \(False and True\)"),
        ({}, {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, "differ in layers_to_transform"),
        ({"bias": "all"}, {}, "'a0' has bias='all'.*bias='none'"),
        ({}, {"init_lora_weights": "olora"}, "'a1' has init_lora_weights='olora', which changes the base"),
        ({}, {"lora_alpha": 0}, "'a1' has the scaling 0 in 'vit"),
    ],
)
def test_adapters_that_are_not_alike(first, second, message):
    arguments = {"target_modules": ATTENTION, "r": 4}
    model = with_adapters(LoraConfig(**{**arguments, **first}), LoraConfig(**{**arguments, **second}))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        merge_adapters(model, ["a0", "a1"])
    assert list(model.state_dict()) == keys


def test_what_the_message_about_ranks_says_can_be_done():
    model = with_adapters(LoraConfig(**LORA), LoraConfig(**{**LORA, "r": 8}))
    model.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "by_svd", combination_type="svd")
    merge_adapters(model, ["a0", "a1"], [0.5, 0.5], "merged", combination_type="cat")
    parts, merged = [delta_weights(model, name) for name in ("a0", "a1")], delta_weights(model, "merged")
    assert_same(merged, {key: (parts[0][key] + parts[1][key]) / 2 for key in merged}, rtol=1e-5, atol=1e-5)


RANKS = {
    "of adapters": ({}, {"r": 8}, 12, {}),
    "and scalings": ({"lora_alpha": 4}, {"r": 2, "use_rslora": True}, 6, {}),
    "of the same layers": ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern": {"q_proj": 3}}, 8, {"q_proj": 5}),
    "of one adapter's layers": ({}, {"rank_pattern": {"layers.0.attention.q_proj": 2}}, 8, {"q_proj": 6}),
    "by other patterns": (
        {"rank_pattern": {".*_proj": 1}},
        {"r": 2, "rank_pattern": {"q_proj": 2, ".*v_proj": 3}},
        6,
        None,
    ),
}


@pytest.mark.parametrize("name", RANKS)
def test_side_by_side_adapters_may_have_any_ranks(name, tmp_path):
    first, second, rank, ranks = RANKS[name]
    model = with_adapters(LoraConfig(**{**LORA, **first}), LoraConfig(**{**LORA, **second}))
    adapters, weights = ["a0", "a1"], [0.7, -1.5]
    model.add_weighted_adapter(adapters, weights, "theirs", combination_type="cat")
    merge_adapters(model, adapters, weights, combination_type="cat")
    parts, merged = [delta_weights(model, adapter) for adapter in adapters], delta_weights(model, "merged")
    assert_same(merged, {key: 0.7 * parts[0][key] - 1.5 * parts[1][key] for key in merged}, rtol=1e-5, atol=1e-5)
    assert_same(merged, delta_weights(model, "theirs"), rtol=1e-5, atol=1e-5)
    config = model.peft_config["merged"]
    assert config.r == rank
    if ranks is not None:
        assert {key.rpartition(".")[2]: value for key, value in config.rank_pattern.items()} == ranks
    for layer in (layer for layer in model.modules() if isinstance(layer, LoraLayer)):
        assert layer.r["merged"] == layer.r["a0"] + layer.r["a1"]
        assert layer.scaling["merged"] == 1
    assert_loads("merged", model, tmp_path)


def test_side_by_side_adapters_of_other_targets_are_refused():
    model = with_adapters(LoraConfig(**LORA), LoraConfig(**{**LORA, "r": 8, "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match="differ in target_modules"):
        merge_adapters(model, ["a0", "a1"], combination_type="cat")


def test_learned_weights_are_of_adapters_of_one_rank():
    model = with_adapters(LoraConfig(**LORA), LoraConfig(**{**LORA, "r": 8}), LoraConfig(**LORA))
    weights = adapter_merge_weights(model, ["a0", "a2"], "a0", combination_type="cat")
    weights = MergeWeights.from_dict({**weights.as_dict(), "adapters": ["a0", "a1"]})
    with pytest.raises(ValueError, match=r"differ in r \(4 and 8\)"):
        merge_adapters(model, ["a0", "a1"], weights, combination_type="cat")
    with pytest.raises(ValueError, match=r"differ in r \(4 and 8\)"):
        learn_merge_weights(model, ["a0", "a1"], [], combination_type="cat")


def test_what_may_differ():
    arguments = {"target_modules": ATTENTION, "r": 4}
    other = {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "target_modules": ["attention.q_proj", "v_proj"]}
    model = with_adapters(LoraConfig(**arguments), LoraConfig(**{**arguments, **other}))
    merge_adapters(model, ["a0", "a1"])
    assert "merged" in model.peft_config


def test_other_types_of_adapters():
    mixed = with_adapters(LoraConfig(target_modules=ATTENTION), LoHaConfig(target_modules=ATTENTION), mixed=True)
    with pytest.raises(ValueError, match=r"'a0' and 'a1' differ in peft_type \('LORA' and 'LOHA'\)"):
        merge_adapters(mixed, ["a0", "a1"])
    adalora = get_peft_model(tiny_model("vit"), AdaLoraConfig(target_modules=ATTENTION, total_step=10), "a0")
    with pytest.raises(ValueError, match="'a0' is of peft_type 'ADALORA', which cannot be merged"):
        merge_adapters(adalora, ["a0"])


def test_constants_outside_of_the_tensors():
    shira = with_adapters(*[ShiraConfig(target_modules=ATTENTION, r=1) for _ in range(2)])
    merge_adapters(shira, ["a0", "a1"], adapter_name="fine")
    layer = next(module for module in shira.modules() if hasattr(module, "shira_indices"))
    layer.shira_indices["a0"] = layer.shira_indices["a0"].flip(1)
    with pytest.raises(ValueError, match="'a0' and 'a1' differ in their constants shira_indices.*random seed"):
        merge_adapters(shira, ["a0", "a1"])
    # Nor can an adapter be made whose constants are drawn anew.
    keys = list(shira.state_dict())
    with pytest.raises(ValueError, match="'a0' and 'merged' differ in their constants"):
        merge_adapters(shira, ["a0"])
    assert list(shira.state_dict()) == keys


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"adapters": []}, "name at least one"),
        ({"adapters": "a0"}, "adapters='a0' must be a list of names"),
        ({"adapters": ["a0", 1]}, r"adapters=\['a0', 1\] must be a list of names"),
        ({"adapter_name": None}, "adapter_name=None must be a name"),
        ({"adapters": ["a0", "a9"]}, "'a9' does not exist; there are a0, a1"),
        ({"adapter_name": "a1"}, "'a1' cannot be merged into itself"),
        ({"adapter_name": "a.b"}, "'a.b' must not be empty, hold a dot"),
        ({"adapter_name": "copy"}, "'copy' must not be .* the name of an attribute"),
        ({"weights": [1.0]}, "1 weights for 2 adapters"),
        ({"weights": [0.0, 0.0]}, "not all zero"),
        ({"weights": [-1.0, 1.0], "combination_type": "regmean", "grams": []}, "must not be negative"),
        ({"combination_type": "svd"}, "'svd' does not exist; choose one of 'linear', 'uniform'.*, 'cat'"),
        ({"combination_type": "cat", "density": 0.5}, "'cat' has no option 'density'"),
        ({"combination_type": "ties"}, "needs the option 'density'"),
        ({"combination_type": "regmean"}, "needs the option 'grams'"),
        ({"svd_rank": 3}, "'linear' has no option 'svd_rank'"),
    ],
)
def test_unusable_arguments(arguments, message):
    model = with_adapters(LoraConfig(**LORA), LoraConfig(**LORA))
    with pytest.raises(ValueError, match=message):
        merge_adapters(model, **{"adapters": ["a0", "a1"], **arguments})
    assert list(model.peft_config) == ["a0", "a1"]


def test_a_model_without_adapters():
    model = tiny_model("vit")
    for work in (
        lambda: merge_adapters(model, ["a0", "a1"]),
        lambda: merge_into(model, "merged", "a1", 1),
        lambda: learn_merge_weights(model, ["a0", "a1"], [tiny_images("vit")]),
        lambda: adapter_tensors(model, "a0"),
    ):
        with pytest.raises(ValueError, match="A ViTForImageClassification is no model with PEFT's adapters; give"):
            work()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adapters_that_are_not_finite(value, dtype):
    model = with_adapters(LoraConfig(**LORA), LoraConfig(**LORA), LoraConfig(**LORA)).to(dtype)
    merge_adapters(model, ["a0", "a2"], adapter_name="merged")
    key = list(adapter_tensors(model, "a1"))[-1]
    adapter_tensors(model, "a1")[key].view(-1)[-1] = value
    before = {name: tensor.clone() for name, tensor in adapter_tensors(model, "merged").items()}
    batches = [tiny_images("vit").to(dtype)]
    for merge in (
        lambda: merge_adapters(model, ["a0", "a1"], combination_type="ties", density=0.5),
        lambda: merge_adapters(model, ["a0", "a1"], combination_type="cat"),
        lambda: merge_into(model, "merged", "a1", 2),
        lambda: learn_merge_weights(model, ["a0", "a1"], batches, objective="entropy", progress=False),
    ):
        with pytest.raises(ValueError, match=f"Adapter 'a1' has NaN or infinity in '{key}'; leave it out"):
            merge()
    assert_same(adapter_tensors(model, "merged"), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["weight", "layers", "0", "classifier", "lora_A", "base_layer", "modules_to_save"])
def test_names_that_would_be_mixed_up(name):
    model = with_adapters(*[LoraConfig(**LORA, modules_to_save=["classifier"]) for _ in range(2)])
    with pytest.raises(ValueError, match=f"Adapter name '{name}' is the name of a part of the model"):
        merge_adapters(model, ["a0", "a1"], adapter_name=name)
    assert list(model.peft_config) == ["a0", "a1"]


@pytest.mark.parametrize("method", METHODS)
def test_names_of_adapters_are_no_obstacle(method):
    config = METHODS[method]
    model = with_adapters(*[type(config)(**config_arguments(config)) for _ in range(2)])
    for name in ("merged", "merged"):
        # Those of adapters that are or were there.
        merge_adapters(model, ["a0"], adapter_name=name)
        check_name_is_free(adapted_base(model), "a1")
    merged = get_peft_model_state_dict(model, adapter_name="merged")
    assert get_peft_model_state_dict(model, adapter_name="a0").keys() == merged.keys()


def test_half_precision():
    base = tiny_model("vit").bfloat16()
    model = get_peft_model(base, LoraConfig(**LORA), "a0", autocast_adapter_dtype=False)
    model.add_adapter("a1", LoraConfig(**LORA), autocast_adapter_dtype=False)
    merge_adapters(model, ["a0", "a1"])
    assert {tensor.dtype for tensor in adapter_tensors(model, "merged").values()} == {torch.bfloat16}


class Mixed(nn.Module):
    """A parameter of its own, and a layer inside."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.eye(6))
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        return self.inner(x @ self.kernel)


def mixed_lora(targets, count):
    config = {"target_modules": targets, "target_parameters": ["mixed.kernel"], "r": 2}
    return with_adapters(*[LoraConfig(**config) for _ in range(count)], base=nn.Sequential(OrderedDict(mixed=Mixed())))


@torch.no_grad()
def test_target_parameters_are_merged_where_peft_can_make_them_again():
    model, inputs = mixed_lora([], 2), torch.randn(4, 6)
    before = model(inputs)
    merge_adapters(model, ["a0", "a1"], [1.0, 0.0])
    model.set_adapter("merged")
    torch.testing.assert_close(model(inputs), before)
    model.set_adapter("a1")
    assert not torch.allclose(model(inputs), before)


def test_layers_inside_of_what_target_parameters_wraps_are_refused():
    # PEFT finds them for the first adapter of a model only.
    model = mixed_lora(["inner"], 1)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="no 'mixed.*inner.lora_A.weight' for a second adapter.*target_parameters"):
        merge_adapters(model, ["a0"])
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["a0"]


def lora_of(alphas, alike=False):
    model = with_adapters(*[LoraConfig(target_modules=ATTENTION, r=4, lora_alpha=alpha) for alpha in alphas])
    if alike:
        for index in range(1, len(alphas)):
            set_adapter_tensors(model, f"a{index}", adapter_tensors(model, "a0"))
    return model, [f"a{index}" for index in range(len(alphas))]


@torch.no_grad()
def test_the_update_of_merged_lora_has_mixed_products():
    model, names = lora_of([2, 4, 8])
    weights = [0.5, -1.5, 0.25]
    merge_adapters(model, names, weights)
    layers = {key: layer for key, layer in model.named_modules() if hasattr(layer, "lora_A")}
    found = delta_weights(model, "merged")
    for key, layer in layers.items():
        expected, own = 0, 0
        for i, (first, w_i) in enumerate(zip(names, weights)):
            for j, (second, w_j) in enumerate(zip(names, weights)):
                share = abs(w_i * layer.scaling[first] * w_j * layer.scaling[second]) ** 0.5
                term = math.copysign(share, w_i) * layer.lora_B[second].weight @ layer.lora_A[first].weight
                expected = expected + term
                own = own + (term if i == j else 0)
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-4)
        # Each adapter's own update has its weight.
        parts = [weight * layer.get_delta_weight(name) for name, weight in zip(names, weights)]
        torch.testing.assert_close(own, sum(parts), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found[key], own, atol=1e-2)


@pytest.mark.parametrize("count", [2, 5])
def test_equal_weights_of_lora_are_no_mean(count):
    model, names = lora_of([4] * count, alike=True)
    one = delta_weights(model, "a0")
    for combination_type, factor in (("linear", count), ("uniform", 1)):
        merge_adapters(model, names, combination_type=combination_type)
        expected = {key: factor * value for key, value in one.items()}
        assert_same(delta_weights(model, "merged"), expected, rtol=1e-4, atol=1e-5)
    model.add_weighted_adapter(names, [1 / count] * count, "side_by_side", combination_type="cat")
    assert_same(delta_weights(model, "side_by_side"), one, rtol=1e-4, atol=1e-5)


SIDE_BY_SIDE = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "biases": {"lora_bias": True},
    "ranks of layers": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 6}},
    "classifier": {"modules_to_save": ["classifier"]},
}


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_side_by_side_is_the_weighted_sum_of_all_that_lora_adds(name, tmp_path):
    options = {**LORA, **SIDE_BY_SIDE[name]}
    model = with_adapters(*(LoraConfig(**{**options, "lora_alpha": alpha}) for alpha in (4, 12, 4)))
    adapters, weights = ["a0", "a1", "a2"], [0.7, 1.5, -0.4]
    merge_adapters(model, adapters, weights, combination_type="cat")
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == 11
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        shape = (2, 3, 8, 8) if isinstance(layer.get_base_layer(), nn.Conv2d) else (2, layer.in_features)
        features, added = torch.randn(shape, generator=generator), {}
        for adapter in [*adapters, "merged"]:
            layer.set_adapter(adapter)
            added[adapter] = layer(features) - layer.get_base_layer()(features)
        expected = sum(weight * added[adapter] for weight, adapter in zip(weights, adapters))
        torch.testing.assert_close(added["merged"], expected, rtol=1e-4, atol=1e-4)
    saved = {key: value for key, value in adapter_tensors(model, "merged").items() if "modules_to_save" in key}
    assert len(saved) == (2 if name == "classifier" else 0)
    for key, value in saved.items():
        parts = [adapter_tensors(model, adapter)[key] for adapter in adapters]
        torch.testing.assert_close(value, sum(weight * part for weight, part in zip(weights, parts)))
    assert_loads("merged", model, tmp_path)


def test_side_by_side_is_what_peft_makes_and_takes_no_rank_for_nothing():
    model = with_adapters(LoraConfig(lora_alpha=4, **LORA), LoraConfig(lora_alpha=8, **LORA), LoraConfig(**LORA))
    names = ["a0", "a1", "a2"]
    model.add_weighted_adapter(names, [0.7, -1.5, 0.2], "theirs", combination_type="cat")
    merge_adapters(model, names, [0.7, -1.5, 0.2], "ours", combination_type="cat")
    assert_same(delta_weights(model, "ours"), delta_weights(model, "theirs"), rtol=1e-5, atol=1e-5)
    assert model.peft_config["ours"].r == model.peft_config["theirs"].r == 12
    merge_adapters(model, names, [0.7, 0.0, 1e-12], "ours", combination_type="cat")
    assert model.peft_config["ours"].r == 8
    expected = {key: 0.7 * value for key, value in delta_weights(model, "a0").items()}
    assert_same(delta_weights(model, "ours"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "'a0' has use_dora=True, with which that is not all; choose 'uniform'"),
        ({"target_parameters": ["cls_token"]}, "'a0' has target_parameters"),
        ({"use_bdlora": BdLoraConfig(target_modules_bd_a=ATTENTION, nblocks=2)}, "'a0' has use_bdlora"),
        ({"monteclora_config": MontecloraConfig()}, "'a0' has monteclora_config"),
    ],
)
def test_what_two_factors_do_not_hold_is_not_placed_side_by_side(options, message):
    model = get_peft_model(tiny_model("vit"), LoraConfig(target_modules=ATTENTION, r=4), "a0")
    for field, value in options.items():
        setattr(model.peft_config["a0"], field, value)
    with pytest.raises(ValueError, match=message):
        merge_adapters(model, ["a0"], combination_type="cat")
    assert list(model.peft_config) == ["a0"]


def test_a_grouped_convolution_is_not_placed_side_by_side():
    config = LoraConfig(target_modules=["dwconv"], r=192)
    model = get_peft_model(tiny_model("convnext"), config, "a0")
    with pytest.raises(ValueError, match="'.*dwconv' side by side, a grouped convolution"):
        merge_adapters(model, ["a0"], combination_type="cat")


@torch.no_grad()
@pytest.mark.parametrize("combination_type", ["magnitude_prune", "dare_linear", "ties", "dare_ties"])
def test_equal_adapters_merge_to_themselves_from_a_base_on(combination_type):
    model, _ = lora_of([4] * 3, alike=True)
    generator = torch.Generator().manual_seed(1)
    base = {key: torch.randn(one.shape, generator=generator) for key, one in adapter_tensors(model, "a0").items()}
    merge_adapters(model, ["a0", "a1", "a2"], combination_type=combination_type, density=1.0, base=base)
    assert_same(adapter_tensors(model, "merged"), adapter_tensors(model, "a0"), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_factors_move_from_a_base_on_by_their_weights():
    model, _ = lora_of([4, 4])
    base = {key: torch.ones_like(one) for key, one in adapter_tensors(model, "a0").items()}
    options = {"combination_type": "magnitude_prune", "density": 1.0, "base": base}
    merge_adapters(model, ["a0", "a1"], [0.5, -2.0], **options)
    first, second = adapter_tensors(model, "a0"), adapter_tensors(model, "a1")
    expected = {key: 1 + 0.5 * (first[key] - 1) - 2 * (second[key] - 1) for key in first}
    assert_same(adapter_tensors(model, "merged"), expected, rtol=1e-4, atol=1e-5)


def test_a_base_belongs_to_adapters_of_one_scaling():
    model, _ = lora_of([4, 8])
    options = {"combination_type": "magnitude_prune", "density": 1.0, "base": adapter_tensors(model, "a0")}
    with pytest.raises(ValueError, match="different scalings .* 'base' holds .* same lora_alpha"):
        merge_adapters(model, ["a0", "a1"], **options)


def test_scalings_of_other_methods_are_not_made_up_for():
    configs = [LoHaConfig(target_modules=ATTENTION, alpha_pattern=pattern) for pattern in ({}, {"q_proj": 80})]
    model = with_adapters(*configs)
    with pytest.raises(ValueError, match=r"differ in alpha_pattern \(\{\} and \{'q_proj': 80\}\)"):
        merge_adapters(model, ["a0", "a1"], combination_type="uniform")


@torch.no_grad()
def test_layers_of_gpt2_whose_weights_are_transposed():
    base = AutoModelForSequenceClassification.from_config(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11, num_labels=3, pad_token_id=0)
    )
    model = with_adapters(*[LoraConfig(target_modules=["c_attn"], r=2) for _ in range(2)], base=base)
    # PEFT tells the first configuration only.
    assert [model.peft_config[name].fan_in_fan_out for name in ("a0", "a1")] == [True, False]
    model.add_weighted_adapter(["a0", "a1"], [0.3, 0.6], "theirs", "linear")
    merge_adapters(model, ["a0", "a1"], [0.3, 0.6], "ours")
    assert_same(delta_weights(model, "ours"), delta_weights(model, "theirs"), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, "learned"])
def test_weights_are_not_rounded_in_half_precision(dtype, weights):
    model = get_peft_model(tiny_model("vit").to(dtype), LoraConfig(**LORA), "a0", autocast_adapter_dtype=False)
    for index in range(1, 7):
        model.add_adapter(f"a{index}", LoraConfig(**LORA), autocast_adapter_dtype=False)
    fill(model, "a0")
    names, own = list(model.peft_config), adapter_tensors(model, "a0")
    assert {one.dtype for one in own.values()} == {dtype}
    for name in names[1:]:
        set_adapter_tensors(model, name, own)
    if weights == "learned":
        slots = adapter_slots(model, "a0")
        parts = MergeWeights.for_slots(names, slots, own, "task")
        merged = parts.combine([own] * 7)
        # Roots of 1 / 7, seven times.
        expected = {key: (one.double() * 7**0.5).to(dtype) for key, one in own.items()}
        assert_same({key: merged[key] for key in own}, expected, rtol=2e-3 if dtype is torch.float16 else 1e-2, atol=0)
        ratio = torch.cat([(merged[key].double() / own[key].double()).flatten() for key in own]).mean().item()
        assert ratio == pytest.approx(7**0.5, rel=3e-4)
        return
    merge_adapters(model, names, combination_type="uniform")
    assert_same(adapter_tensors(model, "merged"), own, rtol=0, atol=0)


def test_values_of_another_name_or_shape_are_not_written():
    model, _ = lora_of([4])
    own = adapter_tensors(model, "a0")
    before = {key: one.clone() for key, one in own.items()}
    key = next(iter(own))
    for wrong in ({"nope": torch.zeros(1)}, {key: torch.zeros(1)}):
        with pytest.raises(ValueError, match="Adapter 'a0' has no tensor .* of shape"):
            set_adapter_tensors(model, "a0", {key: torch.zeros_like(own[key]), **wrong})
    assert_same(adapter_tensors(model, "a0"), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_tensor_keeps_its_precision(dtype):
    config = LoraConfig(target_modules=ATTENTION, r=2, modules_to_save=["classifier"])
    # PEFT keeps LoRA in float32, and what it copies of the base model as it is.
    model = with_adapters(config, config, base=tiny_model("vit").to(dtype))
    own = adapter_tensors(model, "a0")
    assert {tensor.dtype for tensor in own.values()} == {torch.float32, dtype}
    merge_adapters(model, ["a0"], [1.0])
    merged = adapter_tensors(model, "merged")
    assert {key: tensor.dtype for key, tensor in merged.items()} == {key: one.dtype for key, one in own.items()}
    assert all(torch.equal(merged[key], one) for key, one in own.items())


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
def test_adapters_that_change_the_base_are_refused_before_they_do(combination_type):
    config = LoraConfig(target_modules=ATTENTION, r=2, kasa_config=KasaConfig())
    model = with_adapters(config, config)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="'a0' has a kasa_config, with which each new adapter changes the base"):
        merge_adapters(model, ["a0", "a1"], combination_type=combination_type)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_replicated_layers_are_refused_before_those_of_an_adapter_are_lost():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 8}
    base = BertModel(BertConfig(vocab_size=11, max_position_embeddings=8, **sizes))
    model = get_peft_model(base, LoraConfig(target_modules=["query"], r=2, layer_replication=[(0, 2), (0, 2)]), "a0")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="'a0' has layer_replication=.*It cannot be merged"):
        merge_adapters(model, ["a0"], combination_type="uniform")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=ATTENTION, r=2), IA3Config(target_modules=["v_proj"], feedforward_modules=[])]
)
def test_a_new_adapter_draws_nothing_outside(config):
    model = with_adapters(config, config)
    state = torch.random.get_rng_state()
    merge_adapters(model, ["a0", "a1"])
    assert torch.equal(torch.random.get_rng_state(), state)

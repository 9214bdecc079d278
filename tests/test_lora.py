import copy

import pytest
import torch
from peft import AutoPeftModel, PeftConfig, PeftModel, PeftType, get_model_status, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import KasaConfig
from tiny import CONFIGS, tiny_dataset, tiny_images, tiny_model, tiny_processor

import dynammo_peft as dp
from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.merging import (
    MergeWeights,
    adapter_tensors,
    input_grams,
    learn_merge_weights,
    merge,
    merge_adapters,
)
from dynammo_peft.merging.groups import WeightGroup
from dynammo_peft.tuner import default_adapter
from dynammo_peft.tuner.heads import class_logits


def config(classes, **options):
    return DynammoLoraConfig(classes=classes, **{"r": 4, "feature_modules": [], **options})


def two_tasks(name="vit", weights=None, combination_type="cat", **options):
    """Two trained-looking adapters and their merge, active and frozen."""
    model = get_peft_model(tiny_model(name), config(["a", "b"], **options), "task_000")
    model.add_adapter("task_001", config(["c", "d", "e"], **options))
    scramble(model)
    model.add_weighted_adapter(["task_000", "task_001"], weights, "merged", combination_type)
    model.set_adapter("merged", inference_mode=True)
    return model.eval()


@torch.no_grad()
def scramble(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)


def lora_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_gets_lora_by_default_and_folds(name):
    model, images = two_tasks(name), tiny_images(name)
    with torch.no_grad():
        logits = model(pixel_values=images).logits
        plain = copy.deepcopy(model).merge_and_unload()
        assert logits.shape == (2, 5)
        assert not any("lora" in key or "dynammo" in key for key in plain.state_dict())
        difference = (plain(pixel_values=images).logits - logits).abs().max()
    assert difference < 1e-5 * logits.abs().max()
    assert plain.config.id2label == dict(enumerate("abcde"))
    assert plain.num_labels == plain.config.num_labels == 5
    assert type(plain) is type(tiny_model(name))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("method", [dp.Dynammo, dp.ACL, dp.Joint])
def test_lora_is_the_default_of_plain_transformers(name, method):
    plain = name in ("vit", "deit", "dinov2", "dinov2_with_registers")
    assert type(method(tiny_model(name)).config) is (DynammoLoraConfig if plain else DynammoConfig)


def test_convolutions_are_the_default_of_other_models():
    assert default_adapter(torch.nn.Linear(2, 2)) == "conv"


def test_only_queries_and_values_of_a_transformer_are_adapted():
    names = {key.rsplit(".", 1)[-1] for key, module in two_tasks().named_modules() if isinstance(module, LoraLayer)}
    assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize("weights", [None, [1.5, -0.25]])
@pytest.mark.parametrize("options", [{}, {"lora_alpha": 16}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
def test_cat_is_the_weighted_sum_of_what_the_adapters_add(weights, options):
    model = two_tasks(weights=weights, **options)
    for layer in lora_layers(model):
        parts = [layer.get_delta_weight(name) for name in ("task_000", "task_001")]
        expected = sum(weight * part for weight, part in zip(weights or [0.5, 0.5], parts))
        torch.testing.assert_close(layer.get_delta_weight("merged"), expected)


def test_cat_merges_adapters_of_other_ranks():
    model = get_peft_model(tiny_model("vit"), config(["a", "b"]), "task_000")
    model.add_adapter("task_001", config(["c"], r=2, lora_alpha=16))
    scramble(model)
    model.add_weighted_adapter(["task_000", "task_001"], adapter_name="merged")
    assert model.peft_config["merged"].class_names == ["a", "b", "c"]
    for layer in lora_layers(model):
        parts = [layer.get_delta_weight(name) for name in ("task_000", "task_001")]
        torch.testing.assert_close(layer.get_delta_weight("merged"), sum(parts) / 2)
    with pytest.raises(ValueError, match="'task_000' and 'task_001' differ in r "):
        model.add_weighted_adapter(["task_000", "task_001"], adapter_name="merged", combination_type="uniform")


def test_cat_merges_convolutions():
    model = two_tasks("resnet_basic", weights=[0.25, 0.5])
    layer = lora_layers(model)[1]
    expected = 0.25 * layer.get_delta_weight("task_000") + 0.5 * layer.get_delta_weight("task_001")
    torch.testing.assert_close(layer.get_delta_weight("merged"), expected)


def test_other_functions_combine_the_factors():
    model = two_tasks(combination_type="uniform")
    for layer in lora_layers(model):
        own = [layer.lora_B[name].weight for name in ("task_000", "task_001")]
        assert layer.lora_B["merged"].weight.shape == own[0].shape


def test_merging_again_replaces_the_merged_adapter():
    model = two_tasks()
    model.add_adapter("task_002", config(["f"]))
    model.add_weighted_adapter(["task_000", "task_001", "task_002"], adapter_name="merged")
    assert model.peft_config["merged"].r == 12
    assert model.peft_config["merged"].class_names == list("abcdef")
    assert model.active_adapter == "merged"


def test_a_failed_merge_leaves_the_old_one(monkeypatch):
    model, images = two_tasks(), tiny_images("vit")
    before = model(pixel_values=images).logits
    monkeypatch.setattr(merge, "set_adapter_tensors", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.add_weighted_adapter(["task_000"], adapter_name="merged")
    torch.testing.assert_close(model(pixel_values=images).logits, before, rtol=0, atol=0)


def test_heads_stand_side_by_side_and_the_base_model_stays():
    model, images = two_tasks(), tiny_images("vit")
    head = model.base_model.head
    joined = torch.cat([head.heads[name].weight for name in ("task_000", "task_001")])
    assert torch.equal(head.heads["merged"].weight, joined)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(pixel_values=images).logits, tiny_model("vit")(pixel_values=images).logits)
        assert model.config.id2label == tiny_model("vit").config.id2label


def test_only_the_active_adapter_and_its_head_are_trained():
    model = two_tasks()
    model.set_adapter("task_001")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".task_001." in name for name in trained)
    assert {"lora_A", "lora_B", "lora_head"} == {name.split(".task_001")[0].split(".")[-1] for name in trained}
    model.train()
    block = model.get_base_model().vit.layers[0]
    assert not block.layernorm_before.training
    assert not block.mlp.training


def test_adapters_that_are_named_fold_into_the_weights_whichever_are_active():
    model, images = two_tasks(), tiny_images("vit")
    expected = model(pixel_values=images).logits
    for active in ("task_000", None):
        copied = copy.deepcopy(model)
        if active is None:
            copied.base_model.disable_adapter_layers()
        else:
            copied.set_adapter(active)
        plain = copied.merge_and_unload(adapter_names=["merged"])
        assert list(plain.config.id2label.values()) == ["a", "b", "c", "d", "e"] and plain.num_labels == 5
        torch.testing.assert_close(plain(pixel_values=images).logits, expected, rtol=1e-4, atol=1e-4)
    reading = get_peft_model(tiny_model("vit"), config(["a"]), "plain")
    reading.add_adapter("reading", config(["b"], feature_modules=["layers.0"]))
    with pytest.raises(ValueError, match="The heads of adapter 'reading' read feature_modules"):
        reading.merge_and_unload(adapter_names=["reading"])


def test_the_adapter_that_is_active_next_is_trained():
    model = get_peft_model(tiny_model("vit"), config(["a"], lora_dropout=0.5), "task_000")
    model.add_adapter("task_001", config(["b"], lora_dropout=0.5))
    model.train()
    model.base_model.delete_adapter("task_000")
    assert model.base_model.active_adapters == ["task_001"]
    assert lora_layers(model)[0].lora_dropout["task_001"].training


def test_only_what_is_trained_drops_out():
    model = get_peft_model(tiny_model("swin"), config(["a"], lora_dropout=0.5), "task_000")
    model.add_adapter("task_001", config(["b"], lora_dropout=0.5))
    paths = [module for module in model.modules() if type(module).__name__ == "SwinDropPath"]
    layer = lora_layers(model)[0]
    for name, other in (("task_000", "task_001"), ("task_001", "task_000")):
        model.set_adapter(name)
        model.train()
        assert paths and not any(path.training for path in paths)
        assert layer.lora_dropout[name].training and not layer.lora_dropout[other].training
    # A backbone that is trained has its own.
    model.set_backbone_requires_grad(True)
    assert all(path.training for path in paths)
    model.set_backbone_requires_grad(False)
    assert not any(path.training for path in paths)


def test_saved_and_loaded(tmp_path):
    model, images = two_tasks("deit"), tiny_images("deit")
    tiny_model("deit").save_pretrained(tmp_path / "base")
    for entry in model.peft_config.values():
        entry.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path, selected_adapters=["merged"], save_embedding_layers=False)
    expected = model(pixel_values=images).logits
    again = PeftModel.from_pretrained(tiny_model("deit"), tmp_path / "merged").eval()
    assert torch.equal(again(pixel_values=images).logits, expected)
    loaded = PeftConfig.from_pretrained(tmp_path / "merged")
    assert isinstance(loaded, DynammoLoraConfig)
    assert loaded.peft_type is PeftType.DYNAMMO_LORA
    assert torch.equal(AutoPeftModel.from_pretrained(tmp_path / "merged")(pixel_values=images).logits, expected)


def test_class_logits_are_the_log_odds():
    head = torch.nn.Linear(6, 7)
    weight, bias = class_logits(head, (2, 3))
    raw = head.weight
    expected = torch.stack([raw[0] - raw[2], raw[1] - raw[2], raw[3] - raw[6], raw[4] - raw[6], raw[5] - raw[6]])
    assert torch.equal(weight, expected)
    assert bias.shape == (5,)


@pytest.fixture(scope="module")
def scenario():
    return dp.ClassIncrementalScenario(
        tiny_dataset(classes=6, per_class=10, size=32),
        tiny_dataset(classes=6, per_class=5, size=32, seed=5),
        tiny_processor(),
        classes_per_task=2,
        progress=False,
    )


@pytest.mark.parametrize(
    "options", [{}, {"memory_size": 0}, {"first_session": True}, {"merge": "cat"}, {"adapter_init": "random"}]
)
def test_learns_with_lora(scenario, options):
    arguments = dp.DynammoArguments(**{"adapter_epochs": 2, "memory_size": 12, **options})
    method = dp.Dynammo(tiny_model("vit"), arguments, DynammoLoraConfig(r=2, feature_modules=[]))
    results = dp.Learner(method, progress=False).fit(scenario)
    assert results.metrics()["last_accuracy"] > 0.9
    # Factors that have nothing in common are placed side by side.
    assert method.model.peft_config["merged"].r == (6 if options.keys() & {"merge", "adapter_init"} else 2)
    images = tiny_images("vit", 4)
    expected = method.model(pixel_values=images).logits
    plain = copy.deepcopy(method.model).merge_and_unload()
    torch.testing.assert_close(plain(pixel_values=images).logits, expected, rtol=1e-4, atol=1e-4)


def test_acl_and_layers_of_features_work_with_lora(scenario):
    acl = dp.ACL(
        tiny_model("vit"), dp.AdapterMethodArguments(adapter_epochs=1, memory_size=12), DynammoLoraConfig(r=2)
    )
    assert len(dp.Learner(acl, progress=False).fit(scenario).seconds) == 3
    arguments = dp.DynammoArguments(adapter_epochs=1, memory_size=12)
    method = dp.Dynammo(tiny_model("vit"), arguments, DynammoLoraConfig(r=2))
    dp.Learner(method, progress=False).fit(scenario)
    assert method.model.base_model.head.heads["merged"].in_features == 32 * 6
    with pytest.raises(ValueError, match="feature_modules=.*plain classifier"):
        method.model.merge_and_unload()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"kasa_config": KasaConfig()}, "kasa_config changes the base weights"),
        ({"scoring": "odds"}, "scoring='odds'"),
        ({"classes": ["a", "a"]}, "Class 'a' stands more than once"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        DynammoLoraConfig(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit", {"target_modules": ["q_porj"]}, r"no module target_modules=\['q_porj'\]"),
        ("vit", {"target_modules": ["v_proj", "q_porj"]}, r"no module target_modules=\['q_porj'\]"),
        ("vit", {"target_modules": []}, r"but its head matches target_modules=\[\], so that no adapter"),
        ("vit", {"target_modules": ["classifier"]}, r"but its head matches target_modules=\['classifier'\]"),
        ("vit", {"target_modules": r".*\.q_porj"}, r"but its head matches target_modules='\.\*"),
        ("vit", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"exclude_modules=\{'q_proj'\}, so"),
        ("vit", {"target_modules": ["q_proj"], "layers_to_transform": [99]}, r" with layers_to_transform=\[99\], so"),
        # Its convolutions are not linear, and its head is.
        ("resnet_basic", {"target_modules": "all-linear"}, "but its head matches target_modules='all-linear'"),
    ],
)
def test_targets_that_the_base_model_does_not_have(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_model(name), config(["a", "b"], **options), "task_000")
    model = get_peft_model(tiny_model(name), config(["a", "b"]), "task_000")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.add_adapter("task_001", config(["c"], **options))
    assert list(model.peft_config) == ["task_000"]
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": ["q_proj", "classifier"]},
        {"target_modules": ["layers.0.attention.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.attention.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
    ],
)
def test_targets_that_the_base_model_has(options, tmp_path):
    model = get_peft_model(tiny_model("vit"), config(["a", "b"], **options), "task_000")
    # Where layers stand in for modules already.
    model.add_adapter("task_001", config(["c"], **options))
    assert all({"task_000", "task_001"} <= set(layer.lora_A) for layer in lora_layers(model))
    assert lora_layers(model)
    model.add_weighted_adapter(["task_000", "task_001"], adapter_name="merged")
    model.delete_adapter("merged")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("vit"), tmp_path / "task_000")
    loaded.load_adapter(tmp_path / "task_001", "again", is_trainable=True)
    assert len(lora_layers(loaded)) == len(lora_layers(model))


def test_an_adapter_of_a_file_is_used_though_a_target_is_missing(tmp_path):
    model = get_peft_model(tiny_model("vit"), config(["a", "b"], target_modules=["q_proj"]), "task_000")
    model.peft_config["task_000"].target_modules = {"q_proj", "q_porj"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("vit"), tmp_path / "task_000")
    assert len(lora_layers(loaded)) == 5
    with pytest.raises(ValueError, match="q_porj"):
        PeftModel.from_pretrained(tiny_model("vit"), tmp_path / "task_000", is_trainable=True)


def test_learned_weights_are_taken_as_they_were_learned():
    model = two_tasks()
    names = ["task_000", "task_001"]
    for combination_type, rank in (("linear", 4), ("cat", 8)):
        options = {"objective": "entropy", "steps": 1, "progress": False, "combination_type": combination_type}
        learned = learn_merge_weights(model, names, [tiny_images("vit")], combination_type, **options)
        model.add_weighted_adapter(names, learned, "again")
        assert model.peft_config["again"].r == rank
        expected = adapter_tensors(model, combination_type)
        assert all(torch.equal(one, expected[key]) for key, one in adapter_tensors(model, "again").items())


def test_bad_merges():
    model = two_tasks()
    model.add_adapter("wide", config(["f"], r=8))
    with pytest.raises(ValueError, match=r"'task_000' and 'wide' differ in r \(4 and 8\)"):
        model.add_weighted_adapter(["task_000", "wide"], adapter_name="both", combination_type="linear")
    with pytest.raises(ValueError, match="combination_type='svd' does not exist; choose one of 'linear', .*, 'cat'"):
        model.add_weighted_adapter(["task_000", "task_001"], adapter_name="both", combination_type="svd")
    with pytest.raises(ValueError, match="1 weights for 2 adapters"):
        model.add_weighted_adapter(["task_000", "task_001"], [1.0], adapter_name="both")
    learned = MergeWeights(["task_000", "task_001"], [WeightGroup()], "task")
    with pytest.raises(ValueError, match="those of combination_type='linear', got 'cat'"):
        model.add_weighted_adapter(["task_000", "task_001"], learned, "both", combination_type="cat")
    with pytest.raises(ValueError, match="no option 'density'"):
        model.add_weighted_adapter(["task_000", "task_001"], adapter_name="both", density=0.5)
    with pytest.raises(ValueError, match="'nobody' does not exist"):
        model.add_weighted_adapter(["task_000", "nobody"], adapter_name="both")


def test_heads_that_are_not_linear_do_not_fold():
    model = two_tasks(scoring="min_others")
    with pytest.raises(ValueError, match="scoring='min_others', which is not linear"):
        model.merge_and_unload()
    assert model(pixel_values=tiny_images("vit")).logits.shape == (2, 5)


@pytest.mark.parametrize("name, feature_modules", [("vit", None), ("resnet_basic", None), ("vit", [])])
def test_lora_is_in_the_weights_for_a_while(name, feature_modules):
    model, images = two_tasks(name, feature_modules=feature_modules), tiny_images(name)
    keys, before = list(model.state_dict()), model(pixel_values=images).logits
    apart = dp.forward_cost(model, lambda: model(pixel_values=images)).flops
    with model.disable_adapter():
        base = dp.forward_cost(model, lambda: model(pixel_values=images)).flops
    expected = dp.forward_cost(model, lambda: model(pixel_values=images), folded=True)
    assert torch.equal(model(pixel_values=images).logits, before)
    model.merge_adapter()
    torch.testing.assert_close(model(pixel_values=images).logits, before, rtol=1e-4, atol=1e-5)
    assert dp.forward_cost(model, lambda: model(pixel_values=images)) == expected
    folded = expected.flops
    # What is left are the heads, which read little.
    assert base <= folded < base + (apart - base) / 2
    model.unmerge_adapter()
    torch.testing.assert_close(model(pixel_values=images).logits, before, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys


def test_peft_tells_what_is_in_the_weights():
    model, images = two_tasks(), tiny_images("vit")
    model.set_adapter("task_000")
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["task_000"]
    model.merge_adapter(["task_001"])
    assert get_model_status(model).merged_adapters == ["task_000", "task_001"]
    model.unmerge_adapter()
    assert get_model_status(model).merged_adapters == []
    # Without adapters, LoRA leaves the weights.
    model.merge_adapter()
    with model.disable_adapter():
        model(pixel_values=images)
    assert get_model_status(model).merged_adapters == []


def test_regmean_measures_what_enters_the_factors(scenario):
    arguments = dp.DynammoArguments(adapter_epochs=1, memory_size=0, merge="regmean", adapter_init="random")
    method = dp.Dynammo(tiny_model("vit"), arguments, DynammoLoraConfig(r=2, feature_modules=[]))
    dp.Learner(method, progress=False).fit(scenario)
    model, names = method.model, ["task_000", "task_001", "task_002"]
    batches = [[scenario.transform(task.train.images)] for task in scenario]
    grams = [input_grams(model, name, own) for name, own in zip(names, batches)]
    merge_adapters(model, names, adapter_name="expected", combination_type="regmean", grams=grams)
    merge_adapters(model, names, adapter_name="mean", combination_type="uniform")
    expected, mean = adapter_tensors(model, "expected"), adapter_tensors(model, "mean")
    for key, value in adapter_tensors(model, "merged").items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)
    assert any(not torch.allclose(expected[key], mean[key], atol=1e-3) for key in expected)
    # Learning goes on with what was measured of each adapter.
    tensors = method.merging.state()
    assert len(tensors) == 3 * len(expected)
    again = dp.Dynammo(tiny_model("vit"), arguments, DynammoLoraConfig(r=2, feature_modules=[]))
    again.merging.restore(names, tensors)
    assert again.merging.measurements.of_adapters[2].keys() == expected.keys()
    with pytest.raises(ValueError, match="merge='regmean' needs what was measured of each adapter"):
        again.merging.restore(names, {key: tensors[key] for key in tensors if not key.startswith("grams.1.")})


@pytest.mark.parametrize(
    ("name", "lora"),
    [("resnet_basic", DynammoLoraConfig()), ("vit", DynammoConfig()), ("vit", DynammoLoraConfig(target_modules="x"))],
)
def test_regmean_is_refused_without_linear_layers(name, lora):
    with pytest.raises(ValueError, match="merge='regmean' is for linear layers.*DynammoLoraConfig"):
        dp.Dynammo(tiny_model(name), dp.DynammoArguments(merge="regmean"), lora)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_regmean_is_for_all_with_linear_layers(name, targets):
    lora = DynammoLoraConfig(target_modules=targets)
    method = dp.Dynammo(tiny_model(name), dp.DynammoArguments(merge="regmean"), lora)
    assert method.merging.measurements.kind == "grams"
    assert method.config.target_modules == targets


def test_learned_weights_are_of_the_updates(scenario):
    options = {"weights_objective": "entropy", "weights_simplex": False, "weights_steps": 3}
    options |= {"heads": "gaussians", "weights_learning_rate": 0.5, "memory_size": 9, "adapter_epochs": 1}
    # Behind a head at zero an adapter's first update, of which there are few here, is none.
    arguments = dp.DynammoArguments(learned_weights="layer", head_init="random", **options)
    method = dp.Dynammo(tiny_model("vit"), arguments, DynammoLoraConfig(r=2))
    dp.Learner(method, progress=False).fit(scenario)
    names = ["task_000", "task_001", "task_002"]
    weights = MergeWeights.from_dict(method.model.peft_config["merged"].merge_weights)
    assert weights.combination_type == "cat"
    for key, module in method.model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            own = [weight * module.get_delta_weight(name) for weight, name in zip(weights(key), names)]
            torch.testing.assert_close(module.get_delta_weight("merged"), sum(own), rtol=1e-4, atol=1e-7)
            assert not torch.allclose(weights(key), torch.full((3,), 1 / 3), atol=1e-3)
    method.model.add_weighted_adapter(names, weights, "again")
    expected, found = adapter_tensors(method.model, "merged"), adapter_tensors(method.model, "again")
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert method.model.peft_config["again"].merge_weights == weights.as_dict()


def test_learned_weights_are_of_a_weighted_sum():
    arguments = dp.DynammoArguments(learned_weights="task", merge="uniform")
    with pytest.raises(ValueError, match="merge='cat', got merge='uniform'"):
        dp.Dynammo(tiny_model("vit"), arguments, DynammoLoraConfig())


def test_there_is_nothing_to_recalibrate():
    with pytest.raises(ValueError, match="recalibrate measures BatchNorm statistics, which LoRA has none of"):
        dp.Dynammo(tiny_model("vit"), dp.DynammoArguments(recalibrate=True))


def test_adapter_names_that_would_be_mixed_up_are_refused():
    with pytest.raises(ValueError, match="'lora_'"):
        get_peft_model(tiny_model("vit"), config(["a"]), "lora_task")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_lora_that_takes_a_part_of_the_base_weights_is_refused(start):
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' changes the base weights"):
        config(["a", "b"], init_lora_weights=start)


def test_the_sum_of_updates_is_no_merge_of_a_method():
    with pytest.raises(ValueError, match="merge='linear' .* 'uniform' .* 'cat'"):
        dp.Dynammo(tiny_model("vit"), dp.DynammoArguments(merge="linear"))
    for name in ("uniform", "cat"):
        assert dp.Dynammo(tiny_model("vit"), dp.DynammoArguments(merge=name)).merging.combination_type == name

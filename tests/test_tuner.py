"""The tuner as a PEFT method: what it computes, what it trains, what it saves, and how it leaves."""

import copy

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_model_status, get_peft_model
from safetensors.torch import load_file
from tiny import CONFIGS, tiny_images, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from dynammo_peft import DynammoConfig
from dynammo_peft.tuner import DynammoHead, DynammoLayer


LABELS = torch.tensor([0, 1])


def adapted(name, *classes, base=None, **arguments):
    """The model with one active adapter `task_000`, of two classes unless said otherwise."""
    config = DynammoConfig(classes=list(classes) or ["cat", "dog"], **arguments)
    return draw(get_peft_model(base or tiny_model(name), config, "task_000"))


def with_two_adapters(name, **arguments):
    """The same with a second adapter, idle, of one class."""
    model = adapted(name, **arguments)
    model.add_adapter("task_001", DynammoConfig(classes=["owl"], **arguments))
    return draw(model)


@torch.no_grad()
def draw(model, seed=2):
    """Draws the adapters' tensors: a fresh adapter does little, and most of its tensors are zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict().items()):
        if "dynammo_" not in name or not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise.abs() + 0.5 if "running_var" in name or "alpha" in name else noise * 0.3)
    return model


def logits_of(model, images):
    with torch.no_grad():
        return model(images).logits


def adapter_layers(model):
    return [module for module in model.modules() if isinstance(module, DynammoLayer)]


def adapter_state(model, name):
    """Copies of the tensors of one adapter, heads included."""
    return {key: value.clone() for key, value in model.state_dict().items() if f".{name}" in key}


def train_a_little(model, images, labels=LABELS):
    """One step of SGD in training mode, which moves BatchNorm statistics too; then back to evaluation mode."""
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model(images, labels=labels).loss.backward()
    optimizer.step()
    model.zero_grad()
    return model.eval()


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def around(model, layer, images):
    """What enters a tuner layer and what it hands to its block."""
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
        for module in (layer, layer.base_layer)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def residual_by_hand(layer, name, grid, padding, training=False):
    """`alpha * ReLU(BN(ConvT(ReLU(BN(Conv(x))))))` from the layer's tensors alone."""
    state = layer.state_dict()

    def normalised(hidden, norm):
        running_mean, running_var, weight, bias = (
            state[f"dynammo_{norm}.{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        if training:
            running_mean = hidden.mean((0, 2, 3))
            running_var = hidden.var((0, 2, 3), correction=0)
        hidden = (hidden - running_mean[:, None, None]) / torch.sqrt(running_var[:, None, None] + 1e-5)
        return F.relu(hidden * weight[:, None, None] + bias[:, None, None])

    hidden = normalised(F.conv2d(grid, state[f"dynammo_down.{name}.weight"], padding=padding), "down_norm")
    hidden = F.conv_transpose2d(hidden, state[f"dynammo_up.{name}.weight"], padding=padding)
    return state[f"dynammo_alpha.{name}"] * normalised(hidden, "up_norm")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernel_size, padding", [(3, 1), (3, 0), (5, 2), (3, 2), (1, 0)])
@pytest.mark.parametrize("name", ["resnet_basic", "convnext"])
def test_adapter_of_a_map(name, kernel_size, padding, training):
    model = adapted(name, kernel_size=kernel_size, padding=padding, reduction_factor=2).train(training)
    layer = adapter_layers(model)[1]
    before, after = around(model, layer, torch.randn(3, 3, 64, 96))
    expected = before + residual_by_hand(layer, "task_000", before, padding, training)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-2)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("name, prefix, size", [("vit", 1, (48, 32)), ("deit", 2, (48, 32)), ("swin", 0, (36, 50))])
def test_adapter_of_tokens(name, prefix, size, padding):
    model = adapted(name, reduction_factor=2, padding=padding)
    images = torch.randn(3, 3, *size)
    for layer, (height, width) in zip(adapter_layers(model), {"swin": [(18, 25), (9, 13)]}.get(name, [(6, 4)])):
        before, after = around(model, layer, images)
        assert before.shape[1] == prefix + height * width
        assert torch.equal(after[:, :prefix], before[:, :prefix])
        # Row by row, as the patches were cut.
        grid = before[:, prefix:].reshape(3, height, width, -1).permute(0, 3, 1, 2)
        expected = grid + residual_by_hand(layer, "task_000", grid, padding)
        found = after[:, prefix:].reshape(3, height, width, -1).permute(0, 3, 1, 2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, grid, atol=1e-2)


@pytest.mark.parametrize("name", ["resnet_basic", "vit"])
def test_two_active_adapters_add_up(name):
    model, images = with_two_adapters(name, reduction_factor=2), tiny_images(name)
    model.base_model.set_adapter(["task_000", "task_001"])
    layer = adapter_layers(model)[0]
    before, after = around(model, layer, images)
    grid = before if name != "vit" else before[:, 1:].reshape(2, 4, 4, -1).permute(0, 3, 1, 2)
    found = after if name != "vit" else after[:, 1:].reshape(2, 4, 4, -1).permute(0, 3, 1, 2)
    expected = grid + sum(residual_by_hand(layer, f"task_00{task}", grid, padding=1) for task in (0, 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert logits_of(model, images).shape == (2, 3)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


def test_a_fresh_adapter_is_nearly_nothing():
    model = get_peft_model(tiny_model("vit"), DynammoConfig(classes=["cat"]), "task_000")
    for layer in adapter_layers(model):
        assert layer.dynammo_alpha["task_000"].item() == pytest.approx(0.02)
    model = get_peft_model(tiny_model("vit"), DynammoConfig(init_alpha=0.0), "task_000")
    assert torch.equal(logits_of(model, tiny_images("vit")), logits_of(tiny_model("vit"), tiny_images("vit")))


@pytest.mark.parametrize("name", CONFIGS)
def test_disabled_and_unloaded_is_the_base_model_bit_for_bit(name):
    base, images = tiny_model(name), tiny_images(name)
    expected = logits_of(base, images)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    labels = dict(base.config.id2label)
    model = adapted(name, base=base)
    assert logits_of(model, images).shape == (2, 2)
    train_a_little(model, images)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, images), expected)
    assert logits_of(model, images).shape == (2, 2)
    unloaded = model.unload()
    assert unloaded is base
    assert torch.equal(logits_of(unloaded, images), expected)
    assert_equal(dict(unloaded.state_dict()), state)
    assert not unloaded._forward_pre_hooks
    assert not unloaded._forward_pre_hooks_with_kwargs
    assert not hasattr(unloaded, "peft_config")
    assert not [module for module in unloaded.modules() if isinstance(module, (DynammoLayer, DynammoHead))]
    assert unloaded.config.id2label == labels


def test_an_unloaded_model_can_be_adapted_again():
    model, images = adapted("vit"), tiny_images("vit")
    expected = logits_of(model, images)
    again = adapted("vit", base=model.unload())
    assert torch.equal(logits_of(again, images), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_trained(name):
    # Channels enough that no ReLU is dead by chance in all of them.
    model = adapted(name, reduction_factor=2)
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [key for key, _ in model.named_parameters() if "dynammo_" in key]
    assert len(trained) == 7 * len(adapter_layers(model)) + 2
    model.train()
    model(tiny_images(name, count=4), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    assert [key for key in trained if not model.get_parameter(key).grad.abs().sum() > 0] == []
    assert [key for key, parameter in model.named_parameters() if parameter.grad is not None] == trained


def test_the_base_models_classifier_stays_without_classes():
    base, images = tiny_model("vit"), tiny_images("vit")
    model = draw(get_peft_model(base, DynammoConfig(), "task_000"))
    assert model.base_model.head is None
    assert base.classifier.weight.requires_grad is False
    assert model.config.id2label == CONFIGS["vit"][0].id2label
    assert logits_of(model, images).shape == (2, 3)


@pytest.mark.parametrize("name", ["resnet_basic", "resnet_bottleneck"])
def test_frozen_batch_norm_does_not_drift(name):
    model, images = adapted(name), tiny_images(name)
    before = {key: value.clone() for key, value in model.state_dict().items() if "running_" in key}
    train_a_little(model, images)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "dynammo_" in key}


def norm_modes(model):
    """Training mode of the BatchNorms: of the backbone's, and of each adapter's."""
    modes = {}
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            owner = key.rsplit(".", 1)[1] if "dynammo_" in key else "backbone"
            modes.setdefault(owner, set()).add(module.training)
    return {owner: mode.pop() for owner, mode in modes.items() if len(mode) == 1}


def test_modes():
    model = with_two_adapters("resnet_basic")
    everything_off = {"backbone": False, "task_000": False, "task_001": False}
    assert norm_modes(model) == everything_off
    model.set_adapter("task_001")
    assert norm_modes(model) == everything_off
    model.train()
    assert norm_modes(model) == {**everything_off, "task_001": True}
    model.set_adapter("task_000")
    assert norm_modes(model) == {**everything_off, "task_000": True}
    model.base_model.set_adapter(["task_000", "task_001"])
    assert norm_modes(model) == {"backbone": False, "task_000": True, "task_001": True}
    model.set_adapter("task_001", inference_mode=True)
    assert norm_modes(model) == everything_off
    # Back to a trained adapter: the model has been in training mode all along.
    model.set_adapter("task_000")
    assert norm_modes(model) == {**everything_off, "task_000": True}
    model.eval()
    assert norm_modes(model) == everything_off


def test_no_dropout_in_a_frozen_backbone():
    base = tiny_model("vit")
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model = adapted("vit", base=base).train()
    assert not [key for key, module in model.named_modules() if isinstance(module, nn.Dropout) and module.training]


def test_modes_of_a_model_that_is_being_trained():
    model = adapted("resnet_basic", base=tiny_model("resnet_basic").train())
    assert norm_modes(model) == {"backbone": False, "task_000": True}


def test_adding_adapters_does_not_change_modes():
    model = adapted("resnet_basic").train()
    model.add_adapter("task_001", DynammoConfig(classes=["owl"]))
    assert norm_modes(model) == {"backbone": False, "task_000": True, "task_001": False}
    # Frozen ones too, as those that are loaded or merged.
    model.add_adapter("task_002", DynammoConfig(classes=["fox"], inference_mode=True))
    model.add_weighted_adapter(["task_000", "task_001"])
    modes = norm_modes(model)
    assert modes == {"backbone": False, "task_000": True, "task_001": False, "task_002": False, "merged": False}
    assert model.training
    assert model.base_model.model.training


def test_a_frozen_adapter_with_a_trained_head_does_not_drift():
    model = with_two_adapters("resnet_basic")
    model.add_weighted_adapter(["task_000", "task_001"])
    model.set_adapter("merged", inference_mode=True)
    model.base_model.head.heads["merged"].requires_grad_(True)
    before = adapter_state(model, "merged")
    train_a_little(model, tiny_images("resnet_basic"))
    after = adapter_state(model, "merged")
    changed = {key.rsplit(".", 3)[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"dynammo_head"}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["vit", "resnet_basic"])
def test_adding_an_adapter_leaves_the_active_one_alone(name, frozen):
    model, images = adapted(name), tiny_images(name)
    expected = logits_of(model, images)
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    model.add_adapter("task_001", DynammoConfig(classes=["owl"], inference_mode=frozen))
    assert torch.equal(logits_of(model, images), expected)
    after = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    assert {key: value for key, value in after.items() if "task_001" not in key} == before
    assert not any(value for key, value in after.items() if "task_001" in key)
    assert model.active_adapters == ["task_000"]
    assert model.config.id2label == {0: "cat", 1: "dog"}


def test_an_adapter_with_other_blocks():
    model, images = adapted("vit", target_modules=["layers.1"]), tiny_images("vit")
    expected = logits_of(model, images)
    model.add_adapter("task_001", DynammoConfig(classes=["owl"], target_modules=["layers.1", "layers.3"]))
    assert torch.equal(logits_of(model, images), expected)
    model.set_adapter("task_001")
    assert logits_of(model, images).shape == (2, 1)
    assert [sorted(layer.dynammo_down) for layer in adapter_layers(model)] == [["task_000", "task_001"], ["task_001"]]


@pytest.mark.parametrize("name", ["swin", "resnet_basic"])
def test_set_adapter(name):
    model, images = with_two_adapters(name), tiny_images(name)
    first = logits_of(model, images)
    model.set_adapter("task_001")
    second = logits_of(model, images)
    assert (first.shape, second.shape) == ((2, 2), (2, 1))
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [key for key, _ in model.named_parameters() if ".task_001" in key]
    model.set_adapter("task_000", inference_mode=True)
    assert torch.equal(logits_of(model, images), first)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="task_002"):
        model.set_adapter("task_002")


def test_delete_an_idle_adapter():
    model, images = with_two_adapters("vit"), tiny_images("vit")
    expected = logits_of(model, images)
    model.delete_adapter("task_001")
    assert torch.equal(logits_of(model, images), expected)
    assert list(model.peft_config) == ["task_000"]
    assert not adapter_state(model, "task_001")
    # Its name is free again.
    model.add_adapter("task_001", DynammoConfig(classes=["owl", "fox"]))
    model.set_adapter("task_001")
    assert logits_of(model, images).shape == (2, 2)


@pytest.mark.filterwarnings("ignore:Adapter task_00")
def test_delete_the_active_adapter():
    model, images = with_two_adapters("vit"), tiny_images("vit")
    base = logits_of(tiny_model("vit"), images)
    model.set_adapter("task_001")
    expected = logits_of(model, images)
    model.set_adapter("task_000")
    model.delete_adapter("task_000")
    assert model.active_adapters == ["task_001"]
    assert torch.equal(logits_of(model, images), expected)
    assert model.config.id2label == {0: "owl"}
    assert not adapter_state(model, "task_000")
    model.delete_adapter("task_001")
    assert model.active_adapters == []
    assert torch.equal(logits_of(model.base_model, images), base)
    assert model.config.id2label == CONFIGS["vit"][0].id2label


@pytest.fixture
def on_disk(tmp_path):
    """Makes a base model on disk and the same model in memory."""

    def build(name):
        tiny_model(name).save_pretrained(tmp_path / "base")
        return AutoModelForImageClassification.from_pretrained(tmp_path / "base")

    return build


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load(name, on_disk, tmp_path):
    images = tiny_images(name)
    model = train_a_little(adapted(name, base=on_disk(name)), images)
    expected = logits_of(model, images)
    model.save_pretrained(tmp_path / "adapter")
    # Saved from one folder, whatever the adapter was called.
    loaded = PeftModel.from_pretrained(on_disk(name), tmp_path / "adapter" / "task_000", adapter_name="other")
    assert torch.equal(logits_of(loaded, images), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config.id2label == {0: "cat", 1: "dog"}
    assert loaded.peft_config["other"].reduction_factor == model.peft_config["task_000"].reduction_factor


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["swin", "resnet_basic"])
def test_load_several_adapters(name, low_cpu_mem_usage, tmp_path):
    images = tiny_images(name)
    model = train_a_little(with_two_adapters(name), images)
    model.add_weighted_adapter(["task_000", "task_001"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model(name), tmp_path / "task_001", adapter_name="task_001", low_cpu_mem_usage=low_cpu_mem_usage
    )
    for adapter in ("task_000", "merged"):
        loaded.load_adapter(tmp_path / adapter, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    for adapter in model.peft_config:
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert torch.equal(logits_of(loaded, images), logits_of(model, images))
        assert loaded.config.id2label == model.config.id2label
        assert_equal(adapter_state(loaded, adapter), adapter_state(model, adapter))


def test_auto_class(on_disk, tmp_path):
    images = tiny_images("vit")
    model = train_a_little(adapted("vit", base=on_disk("vit")), images)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter" / "task_000")
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))


def test_training_goes_on_after_loading(tmp_path):
    images = tiny_images("resnet_basic")
    model = train_a_little(adapted("resnet_basic"), images)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_model("resnet_basic"), tmp_path / "task_000", adapter_name="task_000", is_trainable=True
    )
    train_a_little(loaded, images)
    train_a_little(model, images)
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))


@pytest.mark.parametrize("name", ["vit", "resnet_basic"])
def test_keys_of_the_file(name, tmp_path):
    model = with_two_adapters(name)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "task_000" / "adapter_model.safetensors")
    assert not [key for key in tensors if "task_0" in key or "base_layer" in key]
    for key in tensors:
        assert "dynammo_" in key
    norms = [f"{norm}.{key}" for norm in ("down_norm", "up_norm") for key in nn.BatchNorm2d(1).state_dict()]
    per_layer = ["down.weight", "up.weight", "alpha", *norms]
    expected = {"base_model.model.classifier.dynammo_head.weight", "base_model.model.classifier.dynammo_head.bias"}
    for block in model.base_model.targeted_module_names:
        if block != "classifier":
            expected |= {f"base_model.model.{block}.dynammo_{key}" for key in per_layer}
    assert set(tensors) == expected
    for key, value in tensors.items():
        owner, _, last = key.rpartition(".")
        own = f"{key}.task_000" if key.endswith("alpha") else f"{owner}.task_000.{last}"
        assert torch.equal(value, model.state_dict()[own])


@pytest.mark.parametrize("names", [("task_1", "task_10"), ("first", "second"), ("head", "default")])
def test_names_that_hold_each_other_do_not_mix(names, tmp_path):
    images = tiny_images("vit")
    model = get_peft_model(tiny_model("vit"), DynammoConfig(classes=["cat", "dog"]), names[0])
    model.add_adapter(names[1], DynammoConfig(classes=["owl"]))
    draw(model).save_pretrained(tmp_path)
    files = [tmp_path / name if name != "default" else tmp_path for name in names]
    first, second = (load_file(file / "adapter_model.safetensors") for file in files)
    assert first.keys() == second.keys()
    for name, file in zip(names, files):
        loaded = PeftModel.from_pretrained(tiny_model("vit"), file)
        model.set_adapter(name)
        assert torch.equal(logits_of(loaded, images), logits_of(model, images))


BAD_NAMES = ["0", "layers", "weight", "bias", "running_mean", "num_batches_tracked", "a.b", "a b", "", "dynammo_x"]
BAD_NAMES += ["vit", "base_layer", "base_model", "model", "classifier", "modules_to_save"]


# PEFT warns of the empty one, for another reason.
@pytest.mark.filterwarnings("ignore:Adapter name '' should not")
@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_adapter_names(name):
    with pytest.raises(ValueError, match=f"Adapter name '{name}'"):
        get_peft_model(tiny_model("vit"), DynammoConfig(classes=["cat"]), name)
    model, images = adapted("vit"), tiny_images("vit")
    expected = logits_of(model, images)
    with pytest.raises(ValueError, match=f"Adapter name '{name}'"):
        model.add_adapter(name, DynammoConfig(classes=["cat"]))
    with pytest.raises(ValueError, match=f"Adapter name '{name}'"):
        model.add_weighted_adapter(["task_000"], adapter_name=name)
    assert list(model.peft_config) == ["task_000"]
    assert torch.equal(logits_of(model, images), expected)


def test_a_failed_adapter_leaves_nothing():
    model, images = adapted("vit"), tiny_images("vit")
    expected, keys = logits_of(model, images), list(model.state_dict())
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("task_000", DynammoConfig(classes=["owl"]))
    with pytest.raises(ValueError, match="too small"):
        model.add_adapter("task_001", DynammoConfig(classes=["owl"], kernel_size=5, padding=0))
    assert list(model.peft_config) == ["task_000"]
    assert list(model.state_dict()) == keys
    assert torch.equal(logits_of(model, images), expected)
    model.add_adapter("task_001", DynammoConfig(classes=["owl"]))
    model.set_adapter("task_001")
    assert logits_of(model, images).shape == (2, 1)


def test_status_of_the_model(capsys):
    model = with_two_adapters("vit")
    own = sum(value.numel() for key, value in model.named_parameters() if ".task_000" in key)
    everything = sum(value.numel() for value in model.parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {own:,} || all params: {everything:,} ||")
    status = get_model_status(model)
    assert status.adapter_model_type == "DynammoModel"
    assert status.peft_types == {"task_000": "DYNAMMO", "task_001": "DYNAMMO"}
    assert (status.trainable_params, status.total_params) == (own, everything)
    assert status.num_adapter_layers == 5
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["task_000"], [])
    assert status.available_adapters == ["task_000", "task_001"]
    assert status.requires_grad == {"task_000": True, "task_001": False}
    layers = model.get_layer_status()
    assert [layer.name for layer in layers] == [f"model.{name}" for name in model.base_model.targeted_module_names]
    assert all(layer.available_adapters == ["task_000", "task_001"] for layer in layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "resnet_basic"])
def test_half_precision_backbone(name, dtype):
    images = tiny_images(name).to(dtype)
    model = adapted(name, base=tiny_model(name).to(dtype))
    model.add_adapter("task_001", DynammoConfig(classes=["owl"]))
    own = {key: value for key, value in model.state_dict().items() if "dynammo_" in key and value.is_floating_point()}
    assert {value.dtype for value in own.values()} == {torch.float32}
    assert any("running_var" in key for key in own)
    assert model.base_model.head.base_layer.state_dict().popitem()[1].dtype is dtype
    full = logits_of(adapted(name), images.float())
    found = logits_of(model, images)
    torch.testing.assert_close(found.float(), full, rtol=0.1, atol=0.1 * full.abs().max().item())
    model.train()
    loss = model(images, labels=LABELS).loss
    loss.backward()
    assert torch.isfinite(loss)
    half = get_peft_model(
        tiny_model(name).to(dtype), DynammoConfig(classes=["cat", "dog"]), "task_000", autocast_adapter_dtype=False
    )
    own = [value for key, value in half.state_dict().items() if "dynammo_" in key and value.is_floating_point()]
    assert {value.dtype for value in own} == {dtype}
    # Weights that were rounded once are not rounded again.
    assert logits_of(half, images).dtype is torch.float32


@pytest.mark.parametrize("name", ["vit", "resnet_basic"])
def test_autocast(name):
    model, images = adapted(name), tiny_images(name)
    expected = logits_of(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_of(model, images)
        model.train()(images, labels=LABELS).loss.backward()
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_heads_are_in_single_precision_under_autocast():
    model, images = adapted("vit"), tiny_images("vit")
    tuner = model.base_model
    with torch.autocast("cpu", torch.bfloat16):
        with tuner.head_output("features"):
            features = logits_of(model, images)
        with tuner.head_output("logits"):
            logits = logits_of(model, images)
    head = tuner.head.heads["task_000"]
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, F.linear(features.float(), head.weight, head.bias))
    # Half precision would show.
    half = F.linear(features.bfloat16(), head.weight.bfloat16(), head.bias.bfloat16())
    assert not torch.allclose(logits, half.float(), rtol=1e-4, atol=1e-4)


def test_labels_follow_the_active_adapter():
    base = tiny_model("vit")
    base.config.problem_type = "multi_label_classification"
    labels = dict(base.config.id2label)
    model = adapted("vit", base=base)
    cat_dog = {0: "cat", 1: "dog"}

    def state():
        config = base.config
        assert config.label2id == {label: index for index, label in config.id2label.items()}
        assert config.num_labels == len(config.id2label)
        return config.id2label, config.problem_type

    assert state() == (cat_dog, "single_label_classification")
    model.add_adapter("task_001", DynammoConfig(classes=["owl"]))
    assert state() == (cat_dog, "single_label_classification")
    model.set_adapter("task_001")
    assert state() == ({0: "owl"}, "single_label_classification")
    with model.disable_adapter():
        assert state() == (labels, "multi_label_classification")
    assert state() == ({0: "owl"}, "single_label_classification")
    model.add_weighted_adapter(["task_001", "task_000"])
    model.set_adapter("merged")
    assert state() == ({0: "owl", 1: "cat", 2: "dog"}, "single_label_classification")
    model.add_adapter("no_classes", DynammoConfig())
    model.set_adapter("no_classes")
    assert state() == (labels, "multi_label_classification")
    model.set_adapter("task_000")
    assert state() == (cat_dog, "single_label_classification")
    model.unload()
    assert state() == (labels, "multi_label_classification")


def test_labels_of_a_disabled_adapter():
    model = with_two_adapters("vit")
    with model.disable_adapter():
        model.set_adapter("task_001")
        # The logits are still those of the base model.
        assert model.config.id2label == CONFIGS["vit"][0].id2label
    assert model.config.id2label == {0: "owl"}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss(name):
    model, images = with_two_adapters(name), tiny_images(name)
    output = model(images, labels=LABELS)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, LABELS))
    # A head of one class is no regression.
    model.set_adapter("task_001")
    assert model(images, labels=torch.zeros(2, dtype=torch.long)).loss.item() == 0
    with model.disable_adapter():
        output = model(images, labels=torch.tensor([2, 0]))
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, torch.tensor([2, 0])))


@pytest.mark.parametrize("name", CONFIGS)
def test_head_output(name):
    model, images = adapted(name), tiny_images(name)
    tuner, seen = model.base_model, []
    tuner.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(1)))
    scores = logits_of(model, images)
    with tuner.head_output("features"):
        features = logits_of(model, images)
    with tuner.head_output("logits"):
        logits = logits_of(model, images)
        with tuner.head_output("scores"):
            assert torch.equal(logits_of(model, images), scores)
        assert torch.equal(logits_of(model, images), logits)
    with tuner.head_output("last_layer_logits"):
        last_layer_logits = logits_of(model, images)
    width = seen[0].shape[1]
    linear = tuner.head.heads["task_000"]
    # What enters the classifier comes first, then the further layers.
    assert torch.equal(features[:, :width], seen[0])
    assert features.shape == (2, linear.in_features)
    assert linear.in_features > width
    torch.testing.assert_close(logits, features @ linear.weight.T + linear.bias)
    torch.testing.assert_close(last_layer_logits, seen[0] @ linear.weight[:, :width].T + linear.bias)
    torch.testing.assert_close(scores, logits[:, :2] - logits[:, 2:])
    assert torch.equal(logits_of(model, images), scores)


def test_head_output_ends_with_an_error():
    model = adapted("vit")
    with pytest.raises(KeyError), model.base_model.head_output("features"):
        raise KeyError
    assert model.base_model.head.output == "scores"
    with pytest.raises(ValueError, match=r"output='odds'.*'scores', 'logits', .*'features'"):
        model.base_model.head_output("odds").__enter__()
    without = get_peft_model(tiny_model("vit"), DynammoConfig(), "task_000")
    with pytest.raises(ValueError, match=r"no head.*classes"):
        without.base_model.head_output("logits").__enter__()


def test_active_adapters_must_agree_on_scoring():
    model, images = adapted("vit", ["a", "b"], scoring="log_odds"), tiny_images("vit", count=1)
    model.add_adapter("second", DynammoConfig(classes=["c"], scoring="min_others"))
    model.base_model.set_adapter(["task_000", "second"])
    with pytest.raises(ValueError, match=r"'task_000' and 'second' differ in scoring \('log_odds' and 'min_others'\)"):
        model(pixel_values=images)


@pytest.mark.parametrize("scoring", ["log_odds", "min_others"])
def test_scoring_is_the_configurations(scoring):
    model, images = adapted("vit", scoring=scoring), tiny_images("vit", count=1)
    with model.base_model.head_output("logits"):
        cat, dog, others = logits_of(model, images)[0].tolist()
    scores = logits_of(model, images)[0]
    if scoring == "log_odds":
        assert scores.tolist() == pytest.approx([cat - others, dog - others], abs=1e-5)
    else:
        expected = torch.tensor([cat, dog, others]).log_softmax(0)[:2]
        torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("name, modules_to_save", [("resnet_basic", None), ("vit", ["patch_embeddings"])])
def test_folding_into_the_backbone_is_refused(name, modules_to_save, method):
    # A further trained module comes before the blocks: it must not have been folded in when the error is raised.
    model, images = adapted(name, modules_to_save=modules_to_save), tiny_images(name)
    train_a_little(model, images)
    expected = logits_of(model, images)
    keys = list(model.state_dict())
    with pytest.raises(NotImplementedError, match="add_weighted_adapter"):
        getattr(model, method)()
    assert list(model.state_dict()) == keys
    assert torch.equal(logits_of(model, images), expected)
    assert list(model.peft_config) == ["task_000"]
    train_a_little(model, images)
    model.set_adapter("task_000")


@pytest.mark.parametrize("name", ["swin", "resnet_basic"])
def test_deepcopy(name):
    model, images = with_two_adapters(name), tiny_images(name)
    expected = logits_of(model, images)
    duplicate = copy.deepcopy(model)
    assert torch.equal(logits_of(duplicate, images), expected)
    assert_equal(dict(duplicate.state_dict()), dict(model.state_dict()))
    # They share nothing.
    duplicate.set_adapter("task_001")
    train_a_little(duplicate, images, torch.tensor([0, 0]))
    duplicate.delete_adapter("task_000")
    assert torch.equal(logits_of(model, images), expected)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    # Nor the size of the images of a forward pass.
    assert logits_of(duplicate, torch.randn(1, 3, 64, 96)).shape == (1, 1)
    assert torch.equal(logits_of(model, images), expected)
    assert not duplicate.unload()._forward_pre_hooks
    assert logits_of(model, torch.randn(1, 3, 96, 64)).shape == (1, 2)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_gradient_checkpointing(before, use_reentrant):
    images = tiny_images("vit")
    expected = adapted("vit").train()
    expected(images, labels=LABELS).loss.backward()

    base = tiny_model("vit")
    if before:
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model = adapted("vit", base=base)
    if not before:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    runs = []
    adapter_layers(model)[2].base_layer.attention.register_forward_pre_hook(lambda *_: runs.append(1))
    model(images, labels=LABELS).loss.backward()
    for key, parameter in expected.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(model.get_parameter(key).grad, parameter.grad)
    # Checkpointed is what the backward pass runs again.
    assert len(runs) == 2


def test_modules_to_save(tmp_path):
    model, images = adapted("vit", modules_to_save=["layernorm"]), tiny_images("vit")
    base = logits_of(tiny_model("vit"), images)
    trained = {key.rsplit(".", 2)[0] for key, value in model.named_parameters() if value.requires_grad}
    assert "base_model.model.vit.layernorm.modules_to_save" in trained
    before = model.base_model.model.vit.layernorm.modules_to_save["task_000"].weight.clone()
    train_a_little(model, images)
    assert not torch.equal(model.base_model.model.vit.layernorm.modules_to_save["task_000"].weight, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("vit"), tmp_path / "task_000")
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    with model.disable_adapter():
        assert torch.equal(logits_of(model, images), base)


def trained_parts(model):
    """Which of the model's parts are trained: adapters, heads, the base model's classifier, or its backbone."""
    parts = {}
    for key, parameter in model.named_parameters():
        if "dynammo_" in key:
            part = key.split("dynammo_")[1].split(".")[1]
        elif "modules_to_save" in key:
            part = "modules_to_save"
        else:
            part = "classifier" if ".classifier." in key else "backbone"
        parts.setdefault(part, set()).add(parameter.requires_grad)
    return {part for part, flags in parts.items() if flags == {True}}, {
        part for part, flags in parts.items() if flags == {False}
    }


@pytest.mark.parametrize("name", ["vit", "resnet_basic", "swin"])
def test_set_backbone_requires_grad(name):
    model, images = with_two_adapters(name), tiny_images(name)
    assert trained_parts(model) == ({"task_000"}, {"task_001", "classifier", "backbone"})
    model.base_model.set_backbone_requires_grad(True)
    assert trained_parts(model) == ({"task_000", "backbone"}, {"task_001", "classifier"})
    before = {key: value.clone() for key, value in model.state_dict().items() if "dynammo_" not in key}
    train_a_little(model, images)
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    if name == "resnet_basic":
        assert "base_model.model.resnet.embedder.embedder.normalization.running_mean" in changed
    assert not [key for key in changed if "classifier" in key]
    assert len(changed) > 10
    model.train()
    model.base_model.set_backbone_requires_grad(False)
    assert trained_parts(model) == ({"task_000"}, {"task_001", "classifier", "backbone"})
    # A frozen backbone is in evaluation mode, also if it has just become so.
    before = {key: value.clone() for key, value in model.state_dict().items() if "dynammo_" not in key}
    with torch.no_grad():
        model(images)
    assert_equal({key: value for key, value in model.state_dict().items() if "dynammo_" not in key}, before)


def test_inner_adapters_are_no_backbone():
    model = adapted("swin", target_modules=["encoder.layers.0", "encoder.layers.1.blocks.1"])
    model.base_model.set_backbone_requires_grad(True)
    model.base_model.set_backbone_requires_grad(False)
    assert trained_parts(model) == ({"task_000"}, {"classifier", "backbone"})


def test_set_backbone_requires_grad_spares_further_modules_and_the_classifier():
    model = adapted("vit", modules_to_save=["layernorm"])
    model.base_model.set_backbone_requires_grad(False)
    assert "modules_to_save" in trained_parts(model)[0]
    model = get_peft_model(tiny_model("vit"), DynammoConfig(), "task_000")
    model.base_model.set_backbone_requires_grad(True)
    assert trained_parts(model) == ({"task_000", "backbone"}, {"classifier"})


@pytest.mark.parametrize("name", ["vit", "resnet_basic"])
def test_copy_adapter(name):
    model, images = with_two_adapters(name), tiny_images(name)
    train_a_little(model, images)
    source, before = adapter_state(model, "task_000"), adapter_state(model, "task_001")
    requires_grad = {key: value.requires_grad for key, value in model.named_parameters()}
    model.base_model.copy_adapter("task_000", "task_001")
    target = adapter_state(model, "task_001")
    heads = {key for key in target if "dynammo_head" in key}
    assert len(heads) == 2
    for key, value in target.items():
        assert torch.equal(value, before[key] if key in heads else source[key.replace("task_001", "task_000")])
    # A copy: to train one does not change the other.
    assert {key: value.requires_grad for key, value in model.named_parameters()} == requires_grad
    train_a_little(model, images)
    assert_equal(adapter_state(model, "task_001"), target)


def test_a_copy_names_the_merge_weights_of_what_was_copied():
    model = adapted("vit")
    model.add_adapter("task_001", DynammoConfig(classes=["owl"]))
    first, second = model.peft_config["task_000"], model.peft_config["task_001"]
    second.merge_weights = {"adapters": ["a"]}
    model.base_model.copy_adapter("task_001", "task_000")
    assert first.merge_weights == {"adapters": ["a"]}
    second.merge_weights["adapters"].append("b")
    assert first.merge_weights == {"adapters": ["a"]}
    # Those of a merge that was overwritten are none of it.
    second.merge_weights = None
    model.base_model.copy_adapter("task_001", "task_000")
    assert first.merge_weights is None


@pytest.mark.parametrize(
    "target, arguments, message",
    [
        ("nobody", {}, "'nobody' does not exist.*task_000"),
        ("task_001", {"kernel_size": 1, "padding": 0}, "differ in kernel_size"),
        ("task_001", {"reduction_factor": 1}, "differ in reduction_factor"),
        ("task_001", {"target_modules": ["layers.1"]}, "differ in target_modules"),
        ("task_001", {"exclude_modules": ["layers.1"]}, "differ in"),
    ],
)
def test_copy_adapter_between_different_ones(target, arguments, message):
    model = adapted("vit", reduction_factor=2)
    model.add_adapter("task_001", DynammoConfig(classes=["owl"], **{"reduction_factor": 2, **arguments}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.base_model.copy_adapter("task_000", target)
    assert_equal(dict(model.state_dict()), before)


def test_blocks_that_the_base_model_does_not_have():
    config = DynammoConfig(classes=["cat"], target_modules=["layers.0", "layers.99"])
    with pytest.raises(ValueError, match=r"no module target_modules=\['layers.99'\]; take that out"):
        get_peft_model(tiny_model("vit"), config)
    assert adapted("vit", target_modules=["layers.0"]).peft_config.keys() == {"task_000"}

"""Features of further layers on their way to the heads, against what hooks of one's own see in the base model."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import CONFIGS, tiny_images, tiny_model
from torch import nn
from torch.nn import functional as F

from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.tuner import DynammoLayer


# Tokens in front of the patches: CLS, distillation, registers.
PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 5}
# Widths of what enters the classifier and of the blocks that heads read by default.
WIDTHS = {
    "vit": (32, [32] * 5),
    "deit": (32, [32] * 5),
    "dinov2": (64, [32] * 5),
    "dinov2_with_registers": (64, [32] * 5),
    "swin": (64, [32, 64]),
}
STAGES = (64, [16, 32, 48])
BLOCKS = {
    "vit": "vit.layers.{}",
    "deit": "deit.layers.{}",
    "dinov2": "dinov2.encoder.layer.{}",
    "dinov2_with_registers": "dinov2_with_registers.encoder.layer.{}",
    "convnext": "convnext.encoder.stages.{}",
    "convnextv2": "convnextv2.encoder.stages.{}",
    "resnet_basic": "resnet.encoder.stages.{}",
    "resnet_bottleneck": "resnet.encoder.stages.{}",
    "swin": "swin.encoder.layers.{}",
}


def adapted(name, base=None, **arguments):
    """The model with one active adapter `task_000`, of two classes."""
    config = DynammoConfig(classes=["cat", "dog"], reduction_factor=2, **arguments)
    return draw(get_peft_model(base or tiny_model(name), config, "task_000"))


def add(model, adapter_name, classes, feature_modules):
    """One more adapter."""
    config = DynammoConfig(classes=classes, reduction_factor=2, feature_modules=feature_modules)
    model.add_adapter(adapter_name, config)
    return draw(model)


@torch.no_grad()
def draw(model):
    """Draws the adapters' tensors, so that a fresh adapter does something."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in sorted(model.state_dict().items()):
        if "dynammo_" in name and tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name or "alpha" in name else noise * 0.3)
    return model


def logits_of(model, images, output="scores"):
    """What the head gives; `output` as in `head_output`."""
    with torch.no_grad(), model.base_model.head_output(output):
        return model(images).logits


def listening(base, blocks):
    """What leaves blocks of a base model and what enters its classifier, at each forward pass from now on."""
    seen = {}

    def note(key):
        def hook(module, args, output):
            seen[key] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    for block in blocks:
        base.get_submodule(block).register_forward_hook(note(block))
    base.classifier.register_forward_hook(lambda module, args, output: seen.update(classifier=args[0]))
    return seen


def pooled(name, hidden_states):
    """The mean over the image's own places, at mean zero and variance one over the channels."""
    if hidden_states.dim() == 4:
        means = hidden_states.sum(dim=(2, 3)) / (hidden_states.shape[2] * hidden_states.shape[3])
    else:
        patches = hidden_states[:, PREFIX.get(name, 0) :]
        means = patches.sum(dim=1) / patches.shape[1]
    centred = means - means.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()


def count_hooks(model):
    """Hooks on outputs of modules, apart from those of the test."""
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_the_classifiers_input_and_the_pooled_blocks(name):
    width, widths = WIDTHS.get(name, STAGES)
    base = tiny_model(name)
    blocks = [BLOCKS[name].format(block) for block in range(len(widths))]
    seen = listening(base, blocks)
    # Not square.
    images = torch.cat([tiny_images(name, 3), tiny_images(name, 3, seed=5)], dim=2)
    model = adapted(name, base=base)
    model.base_model.head.register_forward_pre_hook(lambda module, args: seen.update(classifier=args[0]))
    features = logits_of(model, images, "features")
    blocks_then = [pooled(name, seen[block]) for block in blocks]
    expected = torch.cat([seen["classifier"].flatten(1), *blocks_then], dim=1)
    assert [part.shape[1] for part in blocks_then] == widths
    assert features.shape == (3, width + sum(widths))
    assert features.dtype is torch.float32
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    # They are those under the adapter.
    with model.disable_adapter(), torch.no_grad():
        model(images)
    for block, part in zip(blocks, blocks_then):
        assert not torch.allclose(pooled(name, seen[block]), part, atol=1e-3)
    # Nothing of an image is kept.
    assert all(tap.state.pooled is None for tap in model.base_model.head.taps.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_disabled_adapter_gives_the_base_models_logits_and_features(name):
    base, images = tiny_model(name), tiny_images(name)
    seen = listening(base, [])
    with torch.no_grad():
        expected = base(images).logits
    entering = seen["classifier"].flatten(1)
    model = adapted(name, base=base)
    before = logits_of(model, images)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, images), expected)
        assert torch.equal(logits_of(model, images, "features"), entering)
    assert torch.equal(logits_of(model, images), before)


@pytest.mark.parametrize("modules", [["layers.3", "layers.1"], ["vit.layers.1", "vit.layers.3"], ["layers.2.mlp"]])
def test_named_modules_in_their_order(modules):
    base = tiny_model("vit")
    paths = [module if module.startswith("vit.") else f"vit.{module}" for module in modules]
    seen = listening(base, paths)
    model = adapted("vit", base=base, feature_modules=modules)
    features = logits_of(model, tiny_images("vit"), "features")
    assert model.peft_config["task_000"].feature_modules == modules
    expected = torch.cat([pooled("vit", seen[path]) for path in paths], dim=1)
    torch.testing.assert_close(features[:, 32:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["swin", "resnet_basic", "vit"])
def test_a_copy_has_taps_of_its_own(name):
    model, images = adapted(name), tiny_images(name)
    expected = logits_of(model, images)
    hooks = count_hooks(model)
    duplicate = copy.deepcopy(model)
    taps, copied = model.base_model.head.taps, duplicate.base_model.head.taps
    assert list(copied) == list(taps)
    assert not {id(tap) for tap in copied.values()} & {id(tap) for tap in taps.values()}
    assert torch.equal(logits_of(duplicate, images), expected)
    # To change the copy's blocks changes the copy alone.
    with torch.no_grad():
        for layer in duplicate.modules():
            if isinstance(layer, DynammoLayer):
                layer.dynammo_alpha["task_000"].mul_(-1)
    width = model.base_model.head.features
    changed = logits_of(duplicate, images, "features")[:, width:]
    assert not torch.allclose(changed, logits_of(model, images, "features")[:, width:], atol=1e-2)
    assert torch.equal(logits_of(model, images), expected)
    # And so does removing them.
    assert count_hooks(duplicate.unload()) == 0
    assert count_hooks(model) == hooks == len(taps)
    assert torch.equal(logits_of(model, images), expected)


def test_unloading_removes_the_hooks():
    model = adapted("convnext")
    add(model, "task_001", ["owl"], ["encoder.stages.3"])
    assert count_hooks(model) == 4
    base = model.unload()
    assert count_hooks(base) == 0
    images = tiny_images("convnext")
    with torch.no_grad():
        assert torch.equal(base(images).logits, tiny_model("convnext")(images).logits)
    # Adapted again, it is as new.
    assert torch.equal(logits_of(adapted("convnext", base=base), images), logits_of(adapted("convnext"), images))


@pytest.mark.parametrize("modules", [["layers.3", "layers.1"], [], None])
def test_save_and_load(modules, tmp_path):
    model, images = adapted("vit", feature_modules=modules), tiny_images("vit")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("vit"), tmp_path / "task_000", adapter_name="other")
    found = loaded.peft_config["other"].feature_modules
    assert found == (modules if modules is not None else [f"layers.{block}" for block in range(5)])
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    assert torch.equal(logits_of(loaded, images, "features"), logits_of(model, images, "features"))


def test_adapters_with_different_feature_modules(tmp_path):
    images = tiny_images("vit")
    model = adapted("vit", feature_modules=[])
    add(model, "task_001", ["owl"], ["layers.1"])
    add(model, "task_002", ["fox"], ["layers.4", "layers.1"])
    draw(model)
    widths = {"task_000": 32, "task_001": 64, "task_002": 96}
    found = {}
    for name, width in widths.items():
        model.set_adapter(name)
        assert logits_of(model, images, "features").shape == (2, width)
        found[name] = logits_of(model, images)
    # Each is what it would be alone.
    model.save_pretrained(tmp_path)
    for name in widths:
        alone = PeftModel.from_pretrained(tiny_model("vit"), tmp_path / name, adapter_name=name)
        assert list(alone.base_model.head.taps) == model.peft_config[name].feature_modules
        assert torch.equal(logits_of(alone, images), found[name])
    # A module is listened to once.
    assert count_hooks(model) == 2
    with pytest.raises(ValueError, match=r"'task_001' and 'task_002' differ in feature_modules"):
        model.add_weighted_adapter(["task_001", "task_002"])
    model.delete_adapter("task_001")
    model.set_adapter("task_002")
    assert torch.equal(logits_of(model, images), found["task_002"])


def test_two_active_adapters_read_their_own_layers():
    images = tiny_images("vit")
    model = add(adapted("vit", feature_modules=["layers.0"]), "task_001", ["owl"], ["layers.4"])
    seen = listening(model.base_model.model, ["vit.layers.0", "vit.layers.4"])
    model.base_model.set_adapter(["task_000", "task_001"])
    logits = logits_of(model, images, "logits")
    assert logits.shape == (2, 3 + 2)
    entering = logits_of(model, images, "features")[:, :32]
    for name, block, found in (("task_000", 0, logits[:, :3]), ("task_001", 4, logits[:, 3:])):
        head = model.base_model.head.heads[name]
        own = torch.cat([entering, pooled("vit", seen[f"vit.layers.{block}"])], dim=1)
        torch.testing.assert_close(found, F.linear(own, head.weight, head.bias), atol=1e-5, rtol=1e-5)


def test_merged_heads_stand_side_by_side_over_all_features():
    model = add(adapted("vit"), "task_001", ["owl"], None)
    model.add_weighted_adapter(["task_000", "task_001"])
    heads = model.base_model.head.heads
    assert model.peft_config["merged"].feature_modules == model.peft_config["task_000"].feature_modules
    assert torch.equal(heads["merged"].weight, torch.cat([heads["task_000"].weight, heads["task_001"].weight]))
    model.set_adapter("merged")
    assert logits_of(model, tiny_images("vit"), "features").shape == (2, 32 + 5 * 32)


class Net(nn.Module):
    """A model that nobody knows, with a block that never runs and one that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 16, 3)
        self.pair = Pair()
        self.unused = nn.Conv2d(8, 16, 3)
        self.classifier = nn.Linear(16, 5)

    def forward(self, pixel_values):
        return self.classifier(self.pair(self.block(self.stem(pixel_values)))[0].mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x):
        return x.relu(), x


def adapted_net(**arguments):
    config = DynammoConfig(
        classes=["a", "b"], target_modules=["block"], head_module="classifier", image_size=16, **arguments
    )
    return get_peft_model(Net(), config, "task_000")


def test_an_unknown_model_reads_the_layers_that_are_named():
    images = torch.randn(2, 3, 16, 16)
    assert adapted_net().base_model.head.taps == {}
    model = adapted_net(feature_modules=["stem", "pair"])
    seen = listening(model.base_model.model, ["stem", "pair"])
    with torch.no_grad(), model.base_model.head_output("features"):
        features = model(images)
    expected = [pooled("net", seen["stem"]), pooled("net", seen["pair"])]
    assert features.shape == (2, 16 + 8 + 16)
    torch.testing.assert_close(features[:, 16:], torch.cat(expected, dim=1))


@pytest.mark.parametrize(
    ("build", "modules", "words"),
    [
        (adapted, ["layers.9"], ["no module 'layers.9'", "feature_modules"]),
        # Of a name whole parts count: layers.1 ends on 1, but not on ayers.1.
        (adapted, ["ayers.1"], ["no module 'ayers.1'", "feature_modules"]),
        (adapted, ["mlp"], ["several modules 'mlp'", "vit.layers.0.mlp", "vit.layers.4.mlp", "feature_modules"]),
        (adapted, ["layers.0", "classifier"], ["'classifier' returns a tensor of 2 dimensions", "feature_modules"]),
        (adapted_net, ["unused"], ["'unused' is not used", "feature_modules"]),
    ],
)
def test_unusable_modules_are_refused(build, modules, words):
    arguments = {"name": "vit"} if build is adapted else {}
    with pytest.raises(ValueError) as error:
        build(**arguments, feature_modules=modules)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words)


def test_a_refused_adapter_leaves_the_model_as_it_was():
    base = tiny_model("vit")
    with pytest.raises(ValueError, match="no module"):
        adapted("vit", base=base, feature_modules=["layers.1", "layers.9"])
    assert count_hooks(base) == 0
    model, images = adapted("vit", base=base, feature_modules=["layers.1"]), tiny_images("vit")
    expected = logits_of(model, images)
    with pytest.raises(ValueError, match="no module"):
        add(model, "task_001", ["owl"], ["layers.2", "layers.9"])
    assert count_hooks(model) == 1
    assert list(model.peft_config) == ["task_000"]
    assert torch.equal(logits_of(model, images), expected)


@pytest.mark.parametrize("name", ["vit", "resnet_basic"])
def test_gradients_reach_the_adapters_below_a_block(name):
    block = 2
    model = adapted(name, feature_modules=[BLOCKS[name].format(block)])
    width = model.base_model.head.features
    with model.base_model.head_output("features"):
        features = model(tiny_images(name)).logits[:, width:]
    # Their plain sum is always zero.
    (features * torch.randn(features.shape)).sum().backward()
    layers = [module for module in model.modules() if isinstance(module, DynammoLayer)]
    for place, layer in enumerate(layers):
        gradient = layer.dynammo_down["task_000"].weight.grad
        # An adapter stands in front of its block.
        assert (gradient is not None and bool(gradient.any())) == (place <= block)


@pytest.mark.parametrize("name", ["vit", "resnet_basic"])
def test_last_layer_logits_leave_the_other_columns_alone(name):
    model, images = adapted(name), tiny_images(name)
    head, width = model.base_model.head.heads["task_000"], model.base_model.head.features
    with model.base_model.head_output("last_layer_logits"):
        model(images).logits.square().sum().backward()
    # What enters the classifier may be zero for all images, after a ReLU.
    assert (head.weight.grad[:, :width] != 0).double().mean() > 0.7
    assert not head.weight.grad[:, width:].any()
    layers = [module for module in model.modules() if isinstance(module, DynammoLayer)]
    assert all(layer.dynammo_down["task_000"].weight.grad.any() for layer in layers)
    # With all columns, all of them learn.
    head.zero_grad()
    with model.base_model.head_output("logits"):
        model(images).logits.square().sum().backward()
    assert head.weight.grad[:, width:].all()


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW])
def test_other_columns_start_at_zero_and_stay_there(optimizer_cls):
    model = get_peft_model(tiny_model("vit"), DynammoConfig(classes=["cat", "dog"]), "task_000")
    head, images = model.base_model.head.heads["task_000"], tiny_images("vit")
    assert head.weight[:, :32].all()
    assert not head.weight[:, 32:].any()
    # So that both are the same at first.
    torch.testing.assert_close(logits_of(model, images, "logits"), logits_of(model, images, "last_layer_logits"))
    optimizer = optimizer_cls(head.parameters(), lr=0.1, weight_decay=0.1)
    before = head.weight.detach().clone()
    with model.base_model.head_output("last_layer_logits"):
        for _ in range(3):
            optimizer.zero_grad()
            model(images).logits.square().sum().backward()
            optimizer.step()
    assert (head.weight[:, :32] != before[:, :32]).all()
    assert not head.weight[:, 32:].any()


@pytest.mark.parametrize("name", ["vit", "resnet_basic"])
def test_half_precision_is_pooled_in_single(name):
    model = adapted(name, base=tiny_model(name).to(torch.bfloat16))
    features = logits_of(model, tiny_images(name).to(torch.bfloat16), "features")
    full = logits_of(adapted(name), tiny_images(name), "features")
    width = model.base_model.head.features
    assert features.dtype is torch.float32
    torch.testing.assert_close(features[:, width:], full[:, width:], atol=0.2, rtol=0.1)
    # Single precision knows more numbers than half.
    assert not torch.equal(features[:, width:], features[:, width:].bfloat16().float())


@pytest.mark.parametrize("config_cls", [DynammoConfig, DynammoLoraConfig])
def test_features_come_from_a_block_that_is_saved_whole(config_cls, tmp_path):
    """PEFT trains a copy of it."""
    config = config_cls(classes=["cat", "dog"], modules_to_save=["layers.4"])
    model, images = get_peft_model(tiny_model("vit"), config, "task_000"), tiny_images("vit")
    block = model.base_model.model.vit.layers[4].modules_to_save["task_000"]
    last = config.feature_modules[-1]
    assert last.endswith("layers.4")
    seen = {}
    handle = block.register_forward_hook(lambda module, args, output: seen.update(block=output))
    features = logits_of(model, images, "features")
    hidden = seen["block"] if isinstance(seen["block"], torch.Tensor) else seen["block"][0]
    pooled = F.layer_norm(hidden[:, 1:].mean(dim=1), hidden.shape[2:])
    torch.testing.assert_close(features[:, -pooled.shape[1] :], pooled)
    handle.remove()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("vit"), tmp_path / "task_000").eval()
    torch.testing.assert_close(logits_of(again, images), logits_of(model.eval(), images))
    plain = model.base_model.unload()
    assert not [module for module in plain.modules() if module._forward_hooks]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_logits_do_not_overflow_in_half_precision(dtype):
    model, images = adapted("convnext"), tiny_images("convnext")
    with torch.no_grad():
        model.base_model.head.heads["task_000"].bias.copy_(torch.tensor([20000.0, -60000.0, 30000.0]))
    expected = logits_of(model, images)
    found = logits_of(model.to(dtype), images)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit", "convnext", "resnet_basic", "swin"])
def test_images_get_the_precision_of_the_backbone(name, dtype):
    model, images = adapted(name, base=tiny_model(name).to(dtype)), tiny_images(name)
    assert torch.equal(logits_of(model, images), logits_of(model, images.to(dtype)))
    with torch.no_grad():
        # By place as by name.
        assert torch.equal(model(images).logits, model(pixel_values=images).logits)


@pytest.mark.filterwarnings("error:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("name", ["vit", "resnet_basic"])
@pytest.mark.parametrize("output", ["scores", "features"])
def test_compiled_is_what_it_was(name, output):
    model, images = adapted(name), tiny_images(name)
    expected = logits_of(model, images, output)
    torch._dynamo.reset()
    with torch.no_grad(), model.base_model.head_output(output):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(compiled(images).logits, expected)
        # Other images do not give what was kept of the first.
        other = tiny_images(name, seed=7)
        torch.testing.assert_close(compiled(other).logits, model(other).logits)
    torch._dynamo.reset()

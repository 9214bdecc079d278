"""Where adapters go in every supported architecture, and what they cost there."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from tiny import CONFIGS, tiny_images, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ViTConfig,
    ViTForImageClassification,
)

from dynammo_peft import DynammoConfig, forward_cost
from dynammo_peft.tuner import DynammoHead, DynammoLayer
from dynammo_peft.tuner.architectures import ARCHITECTURES, Site, bottleneck_channels, probe
from dynammo_peft.tuner.flops import count_flops


# Name of an architecture -> what its adapters are expected to see: block, layout, channels, prefix tokens, map size.
# ResNet's configuration has no image size, so that it is probed at 224 pixels.
EXPECTED = {
    "vit": [(f"vit.layers.{block}", "tokens", 32, 1, (4, 4)) for block in range(4)],
    "deit": [(f"deit.layers.{block}", "tokens", 32, 2, (4, 4)) for block in range(4)],
    "dinov2": [(f"dinov2.encoder.layer.{block}", "tokens", 32, 1, (4, 4)) for block in range(4)],
    "dinov2_with_registers": [
        (f"dinov2_with_registers.encoder.layer.{block}", "tokens", 32, 5, (4, 4)) for block in range(4)
    ],
    "convnext": [
        ("convnext.encoder.stages.0", "map", 16, 0, (16, 16)),
        ("convnext.encoder.stages.1", "map", 16, 0, (16, 16)),
        ("convnext.encoder.stages.2", "map", 32, 0, (8, 8)),
        ("convnext.encoder.stages.3", "map", 48, 0, (4, 4)),
    ],
    "swin": [
        ("swin.encoder.layers.0", "tokens", 16, 0, (16, 16)),
        ("swin.encoder.layers.1", "tokens", 32, 0, (8, 8)),
        ("swin.encoder.layers.2", "tokens", 64, 0, (4, 4)),
    ],
    "resnet_basic": [
        ("resnet.encoder.stages.0", "map", 16, 0, (56, 56)),
        ("resnet.encoder.stages.1", "map", 16, 0, (56, 56)),
        ("resnet.encoder.stages.2", "map", 32, 0, (28, 28)),
        ("resnet.encoder.stages.3", "map", 48, 0, (14, 14)),
    ],
}
# The blocks that heads read beside what enters the classifier, with their channels.
FEATURES = {
    "vit": [(f"layers.{block}", 32) for block in range(5)],
    "deit": [(f"layers.{block}", 32) for block in range(5)],
    "dinov2": [(f"encoder.layer.{block}", 32) for block in range(5)],
    "dinov2_with_registers": [(f"encoder.layer.{block}", 32) for block in range(5)],
    "convnext": [("encoder.stages.0", 16), ("encoder.stages.1", 32), ("encoder.stages.2", 48)],
    "convnextv2": [("encoder.stages.0", 16), ("encoder.stages.1", 32), ("encoder.stages.2", 48)],
    "resnet_basic": [("encoder.stages.0", 16), ("encoder.stages.1", 32), ("encoder.stages.2", 48)],
    "resnet_bottleneck": [("encoder.stages.0", 16), ("encoder.stages.1", 32), ("encoder.stages.2", 48)],
    # A stage ends with the merger that doubles the channels.
    "swin": [("encoder.layers.0", 32), ("encoder.layers.1", 64)],
}
EXPECTED["resnet_bottleneck"] = EXPECTED["resnet_basic"]
EXPECTED["convnextv2"] = [(site[0].replace("convnext", "convnextv2"), *site[1:]) for site in EXPECTED["convnext"]]


def adapted(name, **arguments):
    arguments.setdefault("classes", ["a", "b"])
    return get_peft_model(tiny_model(name), DynammoConfig(**arguments), "task_000")


def adapter_layers(model):
    """Name in the base model -> tuner layer of a block."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, DynammoLayer)
    }


def maps_seen(model, *args, **kwargs):
    """Size of the map that enters the first convolution of each adapter in one forward pass."""
    sizes = []
    handles = [
        layer.dynammo_down["task_000"].register_forward_pre_hook(
            lambda _, args: sizes.append(tuple(args[0].shape[2:]))
        )
        for layer in adapter_layers(model).values()
    ]
    with torch.no_grad():
        logits = model(*args, **kwargs).logits
    for handle in handles:
        handle.remove()
    assert torch.isfinite(logits).all()
    return sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_default_blocks(name):
    model = adapted(name)
    seen = [
        (block, layer.site.layout, layer.site.channels, layer.site.prefix, layer.site.size)
        for block, layer in adapter_layers(model).items()
    ]
    assert seen == EXPECTED[name]
    assert isinstance(model.base_model.model.classifier, DynammoHead)
    with torch.no_grad():
        assert model(tiny_images(name)).logits.shape == (2, 2)


@pytest.mark.parametrize(
    "depth, blocks", [(1, [0]), (2, [0, 1]), (5, [0, 1, 2, 3]), (8, [0, 2, 4, 6]), (12, [0, 3, 6, 9])]
)
def test_blocks_of_a_plain_transformer_are_evenly_spaced(depth, blocks):
    found = ARCHITECTURES["vit"].target_modules({"num_hidden_layers": depth})
    assert found == {f"layers.{block}" for block in blocks}


@pytest.mark.parametrize("name", CONFIGS)
def test_default_feature_modules(name):
    model = adapted(name)
    head = model.base_model.head
    assert model.peft_config["task_000"].feature_modules == [module for module, _ in FEATURES[name]]
    assert [(module, tap.site.channels) for module, tap in head.taps.items()] == FEATURES[name]
    width = tiny_model(name).get_submodule("classifier" if "resnet" not in name else "classifier.1").in_features
    assert head.features == width
    assert head.heads["task_000"].in_features == width + sum(channels for _, channels in FEATURES[name])


@pytest.mark.parametrize("arguments", [{"classes": None}, {"feature_modules": []}, {"preset": "paper"}])
def test_no_feature_modules(arguments):
    model = adapted("vit", **arguments)
    assert model.peft_config["task_000"].feature_modules == []
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "depth, width, blocks",
    [
        (1, 32, [0]),
        (5, 32, [0, 1, 2, 3, 4]),
        (6, 192, [0, 1, 2, 3, 4, 5]),
        (8, 192, [0, 1, 3, 4, 5, 7]),
        (12, 192, [1, 3, 5, 7, 9, 11]),
        # With what enters the classifier they stay within 4096 features.
        (12, 768, [2, 5, 8, 11]),
        (24, 1024, [7, 15, 23]),
        # One at least, however wide.
        (40, 4096, [39]),
    ],
)
def test_feature_modules_of_a_plain_transformer_are_evenly_spaced_up_to_the_last(depth, width, blocks):
    found = ARCHITECTURES["vit"].feature_modules({"num_hidden_layers": depth, "hidden_size": width})
    assert found == [f"layers.{block}" for block in blocks]


def test_feature_modules_leave_room_for_both_halves_of_what_the_classifier_of_dinov2_reads():
    config = {"num_hidden_layers": 12, "hidden_size": 768}
    blocks = ARCHITECTURES["dinov2"].feature_modules(config)
    assert blocks == ["encoder.layer.3", "encoder.layer.7", "encoder.layer.11"]
    model = tiny_model("dinov2")
    assert model.classifier.in_features == ARCHITECTURES["dinov2"].tokens_read * model.config.hidden_size


@pytest.mark.parametrize("name", CONFIGS)
def test_probing_leaves_the_model_as_it_was(name):
    model, size = tiny_model(name).train(), CONFIGS[name][1]
    model.classifier.eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probe(model, [EXPECTED[name][0][0]], "classifier", (size, size), {"tapped": EXPECTED[name][1][0]})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_probing_for_another_adapter_is_without_those_there():
    # The first one cannot process such small images, and would count towards what the backbone costs.
    model = adapted("resnet_basic", image_size=64, preset="paper")
    model.add_adapter("task_001", DynammoConfig(image_size=32))
    expected = adapted("resnet_basic", image_size=32).peft_config["task_000"]
    assert model.peft_config["task_001"].reduction_factor == expected.reduction_factor


# Height and width are not the same, and no multiple of what the model was trained with.
@pytest.mark.parametrize(
    "name, size, grids",
    [
        ("vit", (48, 32), [(6, 4)] * 4),
        ("vit", (16, 40), [(2, 5)] * 4),
        # A ViT drops the pixels beyond the last whole patch.
        ("vit", (37, 31), [(4, 3)] * 4),
        ("deit", (48, 32), [(6, 4)] * 4),
        ("dinov2", (42, 28), [(6, 4)] * 4),
        ("dinov2_with_registers", (42, 28), [(6, 4)] * 4),
        ("swin", (32, 64), [(16, 32), (8, 16), (4, 8)]),
        # Swin pads to a whole patch, and before each of its mergers.
        ("swin", (36, 50), [(18, 25), (9, 13), (5, 7)]),
        ("swin", (33, 47), [(17, 24), (9, 12), (5, 6)]),
        ("convnext", (96, 64), [(24, 16), (24, 16), (12, 8), (6, 4)]),
        ("convnextv2", (96, 64), [(24, 16), (24, 16), (12, 8), (6, 4)]),
        ("resnet_basic", (64, 96), [(16, 24), (16, 24), (8, 12), (4, 6)]),
        ("resnet_bottleneck", (64, 96), [(16, 24), (16, 24), (8, 12), (4, 6)]),
    ],
)
def test_images_of_another_size(name, size, grids):
    images = torch.randn(2, 3, *size)
    model = adapted(name)
    assert maps_seen(model, images) == grids
    assert maps_seen(model, pixel_values=images) == grids
    # The size is that of each forward pass, and no longer that of the last one.
    assert maps_seen(model, tiny_images(name)) != grids
    # And it can be said beforehand.
    model = adapted(name, image_size=list(size))
    assert [layer.site.size for layer in adapter_layers(model).values()] == grids
    assert maps_seen(model, images) == grids


@pytest.mark.parametrize("size", [(30, 32), (33, 47), (40, 60), (50, 76)])
def test_swin_grids_found_by_probing(size):
    grids = [tuple(math.ceil(side / stride) for side in size) for stride in (2, 4, 8)]
    layers = adapter_layers(adapted("swin", image_size=list(size))).values()
    assert [(layer.site.size, layer.site.prefix) for layer in layers] == [(grid, 0) for grid in grids]


def test_interpolation_is_the_base_models_own():
    images = torch.randn(2, 3, 48, 32)
    base = tiny_model("vit")
    with torch.no_grad():
        expected = base(images, interpolate_pos_encoding=True).logits
    model = get_peft_model(base, DynammoConfig(), "task_000")
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(images).logits, expected)


@pytest.mark.parametrize(
    "image_size, length, prefix, stride, grid",
    [
        ((32, 32), 17, 1, (8, 8), (4, 4)),
        ((48, 32), 26, 2, (8, 8), (6, 4)),
        ((39, 33), 17, 1, (8, 8), (4, 4)),
        ((33, 47), 17 * 24, 0, (2, 2), (17, 24)),
        ((32, 64), 8, 0, (16, 16), (2, 4)),
    ],
)
def test_grid(image_size, length, prefix, stride, grid):
    site = Site("tokens", channels=8, prefix=prefix, stride=stride)
    assert site.grid(length, image_size) == grid


def test_grid_that_cannot_be():
    with pytest.raises(ValueError, match=r"18 tokens.*32x32"):
        Site("tokens", channels=8, prefix=1, stride=(8, 8)).grid(18, (32, 32))


@pytest.mark.parametrize(
    "target_modules, blocks",
    [
        (r".*\.layers\.[04]", [0, 4]),
        (["layers.1"], [1]),
        (["layers.4", "vit.layers.2"], [2, 4]),
    ],
)
def test_target_modules(target_modules, blocks):
    model = adapted("vit", target_modules=target_modules)
    assert list(adapter_layers(model)) == [f"vit.layers.{block}" for block in blocks]
    assert maps_seen(model, tiny_images("vit")) == [(4, 4)] * len(blocks)


def test_exclude_modules():
    model = adapted("vit", exclude_modules=["layers.1"])
    assert list(adapter_layers(model)) == [f"vit.layers.{block}" for block in (0, 2, 3)]


@pytest.mark.parametrize(
    "name, target, block, channels, size",
    [
        ("swin", ["encoder.layers.1.blocks.0"], "swin.encoder.layers.1.blocks.0", 32, (8, 8)),
        ("swin", ["encoder.layers.1.blocks.1"], "swin.encoder.layers.1.blocks.1", 32, (8, 8)),
        ("convnext", ["stages.2.layers.1"], "convnext.encoder.stages.2.layers.1", 48, (4, 4)),
        ("convnextv2", ["stages.0.layers.0"], "convnextv2.encoder.stages.0.layers.0", 16, (16, 16)),
        ("resnet_basic", ["stages.2.layers.1"], "resnet.encoder.stages.2.layers.1", 48, (14, 14)),
        ("resnet_bottleneck", ["stages.2.layers.0"], "resnet.encoder.stages.2.layers.0", 32, (28, 28)),
    ],
)
def test_inner_blocks(name, target, block, channels, size):
    model = adapted(name, target_modules=target)
    assert list(adapter_layers(model)) == [block]
    site = adapter_layers(model)[block].site
    assert (site.channels, site.prefix, site.size) == (channels, 0, size)
    model.train()
    model(tiny_images(name), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "name, target_modules",
    [
        ("convnext", r".*encoder\.stages\.2|.*encoder\.stages\.2\.layers\.1"),
        ("swin", r".*encoder\.layers\.1|.*encoder\.layers\.1\.blocks\.0"),
    ],
)
def test_a_block_inside_another_is_refused(name, target_modules):
    # A second adapter would silently lack the inner block, and `unload` would leave it behind.
    with pytest.raises(ValueError, match=r"layers\.1.*inside"):
        adapted(name, target_modules=target_modules)


def test_a_model_with_a_distilled_classifier_too_is_to_be_loaded_with_one(tmp_path):
    whole = DeiTForImageClassificationWithTeacher(copy.deepcopy(CONFIGS["deit"][0]))
    with pytest.raises(ValueError, match="two classifiers.*; load it with DeiTForImageClassification or"):
        get_peft_model(whole, DynammoConfig(classes=["a", "b"]))
    whole.save_pretrained(tmp_path)
    single = DeiTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(single.deit.embeddings.distillation_token, whole.deit.embeddings.distillation_token)
    model = get_peft_model(single, DynammoConfig(classes=["a", "b"]))
    assert model.eval()(tiny_images("deit")).logits.shape[1] == 2


def test_unknown_target_modules():
    with pytest.raises(ValueError, match="no_such_block"):
        adapted("vit", target_modules=["no_such_block"])


class Net(nn.Module):
    """A model that neither PEFT nor transformers know."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 16, 3)
        self.unused = nn.Conv2d(8, 16, 3)
        self.classifier = nn.Linear(16, 5)

    def forward(self, pixel_values):
        return self.classifier(self.block(self.stem(pixel_values)).mean((2, 3)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"classes": ["a"]}, "'custom'.*`target_modules`.*vit.*swin"),
        ({}, "'custom'.*`target_modules`.*vit.*swin"),
        ({"classes": ["a"], "target_modules": ["block"]}, "'custom'.*`head_module`"),
        ({"classes": ["a"], "target_modules": ["block"], "head_module": "fc"}, "'fc'"),
        ({"target_modules": ["classifier"]}, "'classifier'.*2 dimensions"),
        ({"target_modules": ["block", "unused"]}, "'unused' is not used"),
    ],
)
def test_what_must_be_named_for_an_unknown_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(Net(), DynammoConfig(image_size=16, **arguments))


def test_unknown_model():
    base = Net()
    config = DynammoConfig(classes=["a", "b"], target_modules=["block"], head_module="classifier", image_size=16)
    model = get_peft_model(base, config, "task_000")
    site = base.block.site
    assert (site.layout, site.channels, site.size) == ("map", 8, (16, 16))
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 2)


def test_unknown_model_gets_a_head_later():
    shared = {"target_modules": ["block"], "image_size": 16}
    model = get_peft_model(Net(), DynammoConfig(**shared), "task_000")
    model.add_adapter("task_001", DynammoConfig(classes=["a", "b"], head_module="classifier", **shared))
    model.set_adapter("task_001")
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 2)


class NewConfig(ViTConfig):
    model_type = "never_heard_of"


def test_unknown_model_type_of_transformers():
    config = NewConfig(**{**CONFIGS["vit"][0].to_dict(), "model_type": "never_heard_of"})
    with pytest.raises(ValueError, match=r"'never_heard_of'.*`target_modules`"):
        get_peft_model(ViTForImageClassification(config), DynammoConfig(classes=["a"]))
    named = DynammoConfig(classes=["a", "b"], target_modules=["layers.1"], head_module="classifier")
    model = get_peft_model(ViTForImageClassification(config), named)
    with torch.no_grad():
        assert model(tiny_images("vit")).logits.shape == (2, 2)


def test_model_without_a_classifier():
    base = AutoModel.from_config(CONFIGS["vit"][0])
    with pytest.raises(ValueError, match=r"'classifier'.*AutoModelForImageClassification"):
        get_peft_model(base, DynammoConfig(classes=["a"]))
    model = get_peft_model(AutoModel.from_config(CONFIGS["vit"][0]), DynammoConfig())
    assert len(adapter_layers(model)) == 4
    assert model(tiny_images("vit")).last_hidden_state.shape == (2, 17, 32)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("vit", {"image_size": 16, "preset": "paper"}, r"'vit\.layers\.0' is 2x2.*3x3 with padding=0.*padding=1"),
        ("resnet_basic", {"image_size": 64, "preset": "paper"}, None),
        ("resnet_basic", {"image_size": 32, "preset": "paper"}, r"'resnet\.encoder\.stages\.3' is 2x2.*padding=1"),
        ("resnet_basic", {"image_size": 32}, None),
        # A single pixel before the last stage.
        ("resnet_basic", {"image_size": 16}, None),
        # The padding that is proposed must do.
        ("vit", {"kernel_size": 5, "padding": 0}, r"'vit\.layers\.0' is 4x4.*padding=2"),
    ],
)
def test_maps_smaller_than_the_kernel(name, arguments, message):
    if message is None:
        assert adapted(name, **arguments)
        return
    with pytest.raises(ValueError, match=message):
        adapted(name, **arguments)


@pytest.mark.parametrize(
    "channels, reduction_factor, expected",
    [(64, 1, 64), (192, 8, 24), (192, 16, 16), (64, 16, 8), (64, 32, 2), (64, 128, 1), (6, 1, 6), (12, 3, 8)],
)
def test_bottleneck_channels(channels, reduction_factor, expected):
    assert bottleneck_channels(channels, reduction_factor) == expected
    if channels == 64:
        layer = adapter_layers(adapted("swin", reduction_factor=reduction_factor))["swin.encoder.layers.2"]
        assert layer.dynammo_down["task_000"].weight.shape == (expected, 64, 3, 3)
        assert layer.dynammo_up["task_000"].weight.shape == (expected, 64, 3, 3)


def test_images_the_model_cannot_process():
    with pytest.raises(ValueError, match=r"8x8 pixels.*image_size"):
        adapted("convnext", image_size=8)


@pytest.mark.parametrize(
    "arguments",
    [{"kernel_size": 9, "padding": 0}, {"target_modules": ["no_such_block"]}, {"image_size": 1}],
)
def test_an_error_leaves_the_base_model_as_it_was(arguments):
    base = tiny_model("vit")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError):
        get_peft_model(base, DynammoConfig(classes=["a"], **arguments))
    assert [name for name, _ in base.named_modules()] == names
    assert not base._forward_pre_hooks


def test_flops_of_linear_and_convolution():
    linear = nn.Linear(5, 7)
    assert count_flops(lambda: linear(torch.zeros(3, 5))) == 2 * 3 * 5 * 7
    convolution = nn.Conv2d(4, 6, kernel_size=3, stride=2, padding=1, groups=2)
    # 9x8 pixels become 5x4; each output pixel is a product with 3x3 pixels of 4 / 2 channels.
    assert count_flops(lambda: convolution(torch.zeros(2, 4, 9, 8))) == 2 * 2 * 6 * 5 * 4 * 2 * 9
    transposed = nn.ConvTranspose2d(4, 6, kernel_size=3)
    assert count_flops(lambda: transposed(torch.zeros(2, 4, 9, 8))) == 2 * 2 * 9 * 8 * 4 * 6 * 9


@pytest.mark.parametrize("queries, keys", [(10, 10), (10, 6)])
def test_flops_of_attention(queries, keys):
    query, key = torch.randn(2, 3, queries, 8), torch.randn(2, 3, keys, 8)
    flops = count_flops(lambda: F.scaled_dot_product_attention(query, key, key))
    assert flops == 2 * (2 * 2 * 3 * queries * keys * 8)


def test_forward_cost():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    model.add_module("unused", nn.Linear(4, 100))
    cost = forward_cost(model, lambda: nn.Sequential(*list(model)[:-1]).eval()(torch.zeros(3, 4)))
    assert cost.parameters == (4 * 4 + 4) + (4 + 4) + 4 * 2
    assert cost.flops == 2 * cost.multiply_adds == 2 * 3 * (4 * 4 + 4 * 4 + 4 * 2)


def resnet18():
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=8
    )
    return AutoModelForImageClassification.from_config(config).eval()


def vit_tiny():
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=8
    )
    return AutoModelForImageClassification.from_config(config).eval()


@pytest.mark.parametrize("build", [resnet18, vit_tiny])
def test_default_adapters_cost_at_most_five_percent(build):
    images = torch.zeros(1, 3, 224, 224)
    base = build()
    model = get_peft_model(base, DynammoConfig(), "task_000")
    with model.disable_adapter():
        backbone = forward_cost(model, lambda: model(images)).flops
    assert backbone < forward_cost(model, lambda: model(images)).flops <= 1.05 * backbone
    # Twice the bottleneck would be too much.
    factor = model.peft_config["task_000"].reduction_factor
    assert math.log2(factor) % 1 == 0
    model.add_adapter("wider", DynammoConfig(reduction_factor=factor // 2))
    model.set_adapter("wider")
    assert forward_cost(model, lambda: model(images)).flops > 1.05 * backbone


def test_the_papers_cost():
    images = torch.zeros(1, 3, 224, 224)
    model = get_peft_model(resnet18(), DynammoConfig(preset="paper", classes=["a", "b"]), "task_000")
    one = forward_cost(model, lambda: model(images)).multiply_adds
    assert round(one / 1e9, 2) == 2.61
    for task in (1, 2):
        config = DynammoConfig(preset="paper", classes=[f"{task} a", f"{task} b"])
        model.add_adapter(f"task_{task:03}", config)
    model.add_weighted_adapter(["task_000", "task_001", "task_002"])
    model.set_adapter("merged", inference_mode=True)
    three = forward_cost(model, lambda: model(images)).multiply_adds
    assert round(three / 1e9, 2) == 2.61
    # Only the head has grown, by two heads of two classes and "others".
    assert three - one == 512 * 2 * 3
    with model.disable_adapter():
        base = forward_cost(model, lambda: model(images)).multiply_adds
    # Two convolutions without a bottleneck, unpadded, before each of the stages.
    adapters = sum(
        2 * 9 * channels**2 * (side - 2) ** 2 for channels, side in [(64, 56), (64, 56), (128, 28), (256, 14)]
    )
    assert one - base == adapters + 512 * 3 - 512 * 8

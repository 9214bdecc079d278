"""Merged models without PEFT: they compute the same, and load where the package is not."""

import ast
import copy
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, tiny_dataset, tiny_images, tiny_model, tiny_processor
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, pipeline

from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.hub import DynammoForImageClassification, modeling_dynammo, to_standalone
from dynammo_peft.hub.modeling_dynammo import DynammoImageClassifierConfig
from dynammo_peft.hub.standalone import equal_convolution, fold_batch_norm
from dynammo_peft.tuner.heads import unknown_score


# Heads of different sizes, and names that somebody's file or page could trip over.
CLASSES = [['the "big"', "new\nline"], ["<b>&amp;</b>"], ["d", "e", "naïve 細胞"]]
NAMES = [name for names in CLASSES for name in names]
SIZES = (2, 1, 3)
FILE = "modeling_dynammo.py"


def learned(name="vit", config_cls=DynammoConfig, **options):
    """A model whose one adapter looks as if it had been learned and merged."""
    model = get_peft_model(tiny_model(name), config_cls(**{"classes": CLASSES, **options}), "merged")
    return draw(model).eval()


@torch.no_grad()
def draw(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in sorted(model.state_dict().items()):
        if ("dynammo_" not in key and "lora_" not in key) or not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        scale = 0.1 if "head" in key else 0.3
        tensor.copy_(noise.abs() + 0.5 if "running_var" in key else noise if "alpha" in key else noise * scale)
    return model


def wide_images(name):
    """Images of another size than the model was made for, and no squares."""
    images = tiny_images(name)
    return F.interpolate(images, size=(images.shape[2], images.shape[3] * 3 // 2))


def assert_close(found, expected, tolerance=1e-5):
    """Difference over the largest logit, or over one if all are smaller."""
    difference = (found.float() - expected.float()).abs().max()
    assert difference <= tolerance * expected.abs().max().clamp(min=1), difference


@pytest.mark.parametrize("options", [{}, {"scoring": "min_others", "feature_modules": []}], ids=["default", "paper"])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_the_adapted_model_does(name, options):
    model = learned(name, **options)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    standalone = to_standalone(model)
    assert not standalone.training
    with torch.no_grad():
        for images in (tiny_images(name), wide_images(name)):
            output = standalone(pixel_values=images)
            assert output.logits.shape == (2, 6)
            assert_close(output.logits, model(images).logits)
            with model.base_model.head_output("logits"):
                raw = model(images).logits
            by_hand = torch.stack([head.softmax(1)[:, -1] for head in raw.split([3, 2, 4], dim=1)]).prod(0)
            for score in (output.unknown_score, model.unknown_score(images), unknown_score(raw, SIZES)):
                torch.testing.assert_close(score, by_hand, rtol=1e-4, atol=1e-6)
    assert not any("classifier" in key or "dynammo" in key for key in standalone.state_dict())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name, size", [("vit", (35, 44)), ("swin", (30, 42))])
def test_images_of_no_whole_number_of_patches(name, size):
    model, images = learned(name), F.interpolate(tiny_images(name), size=size)
    with torch.no_grad():
        assert_close(to_standalone(model)(images).logits, model(images).logits)


@pytest.mark.parametrize("name, kernel_size, padding", [("vit", 3, 0), ("convnext", 5, 3), ("resnet_basic", 1, 0)])
def test_every_padding(name, kernel_size, padding):
    model, images = learned(name, kernel_size=kernel_size, padding=padding, reduction_factor=2), tiny_images(name)
    with torch.no_grad():
        assert_close(to_standalone(model)(images).logits, model(images).logits)


@pytest.mark.parametrize("name", ["vit", "resnet_bottleneck"])
@pytest.mark.parametrize("options", [{}, {"scoring": "min_others", "feature_modules": []}], ids=["default", "paper"])
def test_lora_goes_into_the_weights(name, options):
    model, images = learned(name, DynammoLoraConfig, r=4, **options), wide_images(name)
    standalone = to_standalone(model)
    assert len(standalone.adapters) == 0
    with torch.no_grad():
        assert_close(standalone(images).logits, model(images).logits)
        assert not torch.allclose(model(images).logits, to_standalone(draw(model, 3))(images).logits, atol=1e-2)


@torch.no_grad()
def test_biases_of_lora_go_along():
    model, images = learned("vit", DynammoLoraConfig, r=4, lora_bias=True), tiny_images("vit")
    expected = model(images).logits
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_B["merged"].bias.mul_(2)
    assert not torch.allclose(model(images).logits, expected, atol=1e-2)
    assert_close(to_standalone(model)(images).logits, model(images).logits)


def test_lora_that_does_more_than_add_to_weights_is_refused():
    model = learned("vit", DynammoLoraConfig, r=4)
    layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
    layer.lora_variant["merged"] = object()
    with pytest.raises(ValueError, match="'merged' is no plain LoRA"):
        to_standalone(model)


def test_of_several_adapters_the_named_one_is_kept():
    model, images = learned(classes=["x", "y"]), tiny_images("vit")
    model.add_adapter("other", DynammoConfig(classes=["z"], modules_to_save=["layernorm"]))
    draw(model, 5)
    nn.init.normal_(model.base_model.model.vit.layernorm.modules_to_save["other"].weight)
    standalones = {name: to_standalone(model, name) for name in ("merged", "other")}
    with torch.no_grad():
        for name, standalone in standalones.items():
            model.set_adapter(name)
            assert_close(standalone(images).logits, model.eval()(images).logits)
            assert list(standalone.config.id2label.values()) == model.peft_config[name].class_names


@pytest.mark.parametrize("kernel_size, padding", [(3, 0), (3, 1), (3, 2), (5, 3), (1, 0)])
def test_folded_convolutions(kernel_size, padding):
    down, up = (cls(4, 6, kernel_size, padding=padding, bias=False) for cls in (nn.Conv2d, nn.ConvTranspose2d))
    norm, grid = nn.BatchNorm2d(6).eval(), torch.randn(2, 4, 9, 7, dtype=torch.float64)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 2)
    for transposed, layer in ((False, down), (True, up)):
        kernel = equal_convolution(layer.weight) if transposed else layer.weight
        weight, bias = fold_batch_norm(kernel, norm)
        found = F.conv2d(grid, weight, bias, padding=kernel_size - 1 - padding if transposed else padding)
        torch.testing.assert_close(found, norm.double()(layer.double()(grid)))


def test_saved_files(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = draw(get_peft_model(base, DynammoConfig(classes=CLASSES), "merged"))
    to_standalone(model).save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", FILE]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling_dynammo.DynammoImageClassifierConfig",
        "AutoModelForImageClassification": "modeling_dynammo.DynammoForImageClassification",
    }
    assert config["model_type"] == "dynammo" and config["backbone_config"]["model_type"] == "vit"
    assert config["id2label"] == {str(number): name for number, name in enumerate(NAMES)}
    assert config["label2id"] == {name: number for number, name in enumerate(NAMES)}
    assert str(tmp_path) not in json.dumps(config)
    keys = set(load_file(tmp_path / "out" / "model.safetensors"))
    own = {f"adapters.{place}.{part}" for place in range(4) for part in ("alpha", "down.weight", "up.bias")}
    assert own | {"task_heads.weight", "backbone.vit.layernorm.weight"} <= keys
    assert not any("classifier" in key for key in keys)


def test_the_published_file_needs_torch_and_transformers_only():
    with open(modeling_dynammo.__file__, encoding="utf-8") as file:
        imports = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any(getattr(node, "level", 0) for node in imports)
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names}
    assert packages - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_transformers_loads_it_when_the_package_is_imported(tmp_path):
    standalone, images = to_standalone(learned("swin")), tiny_images("swin")
    standalone.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is DynammoForImageClassification
    assert type(AutoConfig.from_pretrained(tmp_path)) is DynammoImageClassifierConfig
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, standalone(images).logits)
    assert loaded.config.id2label == dict(enumerate(NAMES))
    classify = pipeline("image-classification", model=loaded, image_processor=tiny_processor(32), top_k=9)
    answers = classify(tiny_dataset()[0]["image"])
    assert sorted(answer["label"] for answer in answers) == sorted(NAMES)
    assert abs(sum(answer["score"] for answer in answers) - 1) < 1e-5


# Prints what cannot be seen from outside; `expected` was computed by the models that were saved.
WITHOUT_PACKAGE = """
import sys
sys.modules["dynammo_peft"] = sys.modules["peft"] = None
import pathlib, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTImageProcessorPil, pipeline
load = AutoModelForImageClassification.from_pretrained
for name in sys.argv[2:]:
    folder = pathlib.Path(sys.argv[1], name)
    expected = load_file(folder / "expected.safetensors")
    model = load(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        output = model(expected["images"])
    for key in ("logits", "unknown_score"):
        torch.testing.assert_close(output[key], expected[key], rtol=0, atol=0)
try:
    load(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
    print("asked for trust")
processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
# What it has loaded, it can save again.
model.save_pretrained(folder)
classify = pipeline("image-classification", model=str(folder), trust_remote_code=True, image_processor=processor)
answers = classify(Image.new("RGB", (20, 30), "red"), top_k=9)
print(sorted(answer["label"] for answer in answers), round(sum(answer["score"] for answer in answers), 5))
"""


def test_transformers_loads_it_without_the_package(tmp_path):
    # Of Swin, tensors are computed anew at loading that are no parameters.
    names = ["swin", "resnet_basic", "vit"]
    for name in names:
        standalone, images = to_standalone(learned(name, scoring="min_others")), wide_images(name)
        standalone.save_pretrained(tmp_path / name)
        with torch.no_grad():
            output = standalone(images)
        tensors = {"images": images, "logits": output.logits, "unknown_score": output.unknown_score}
        save_file(tensors, tmp_path / name / "expected.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path), *names],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.splitlines() == ["asked for trust", f"{sorted(NAMES)} 1.0"], run.stderr
    (code,) = (tmp_path / "modules").rglob(f"vit/*/{FILE}")
    with open(modeling_dynammo.__file__, encoding="utf-8") as file:
        assert code.read_text() == file.read()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision(tmp_path, dtype, tolerance):
    model, images = learned(), tiny_images("vit")
    to_standalone(model).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    made = to_standalone(learned().to(dtype))
    with torch.no_grad():
        expected = model(images).logits
        for standalone in (loaded, made):
            assert standalone.dtype == standalone.adapters[0].down.weight.dtype == dtype
            assert standalone.task_heads.weight.dtype == torch.float32
            output = standalone(images.to(dtype))
            assert output.logits.dtype == output.unknown_score.dtype == torch.float32
            assert_close(output.logits, expected, tolerance)
        with torch.autocast("cpu", dtype):
            output = to_standalone(model)(images)
        assert output.logits.dtype == torch.float32
        assert_close(output.logits, expected, tolerance)


@pytest.mark.parametrize("name", ["resnet_basic", "convnext", "swin"])
def test_images_in_single_precision_are_for_half_a_backbone_too(name):
    model = draw(get_peft_model(tiny_model(name).bfloat16(), DynammoConfig(classes=CLASSES), "merged")).eval()
    images = tiny_images(name)
    with torch.no_grad():
        assert_close(to_standalone(model)(images).logits, model(images).logits, 0.05)


@pytest.mark.parametrize("classes", [["only"], [["a"], ["b"]]])
def test_loss_and_gradients(classes):
    model, images, labels = learned(classes=classes), tiny_images("vit"), torch.tensor([0, 0])
    standalone = to_standalone(model)
    loss = standalone(images, labels=labels).loss
    torch.testing.assert_close(loss, F.cross_entropy(model(images).logits, labels))
    loss.backward()
    assert all(parameter.grad is not None for parameter in standalone.task_heads.parameters())
    config = DynammoImageClassifierConfig.from_dict(standalone.config.to_dict())
    assert config.id2label == standalone.config.id2label
    assert isinstance(AutoModelForImageClassification.from_config(config), DynammoForImageClassification)


def test_further_outputs():
    standalone, images = to_standalone(learned("resnet_basic")), tiny_images("resnet_basic")
    with torch.no_grad():
        output = standalone(images, output_hidden_states=True)
        logits, unknown = standalone(images, return_dict=False)
    assert len(output.hidden_states) == 5
    assert torch.equal(logits, output.logits) and torch.equal(unknown, output.unknown_score)


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own():
    standalone, images = to_standalone(learned()), tiny_images("vit")
    expected, other = standalone(images).logits, copy.deepcopy(standalone)
    for parameter in standalone.adapters.parameters():
        parameter.zero_()
    assert torch.equal(other(images).logits, expected)
    assert not torch.allclose(standalone(images).logits, expected, atol=1e-3)


@pytest.mark.parametrize("form", ["adapter", "standalone"])
def test_threads_do_not_meet(form):
    model, mixed = learned(flips=["horizontal"]), []
    standalone = to_standalone(model) if form == "standalone" else model
    images = [tiny_images("vit"), wide_images("vit"), tiny_images("vit", 3, seed=4), tiny_images("vit", 1, seed=5)]
    with torch.no_grad():
        expected = [standalone(own).logits for own in images]

    @torch.no_grad()
    def classify(place):
        mixed.extend(not torch.equal(standalone(images[place]).logits, expected[place]) for _ in range(25))

    threads = [threading.Thread(target=classify, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mixed) == 100 and not any(mixed)


def changed(**changes):
    config = to_standalone(learned("resnet_basic")).config
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scoring": "best"}, "scoring='best' does not exist; choose 'log_odds' or 'min_others'"),
        ({"head_sizes": [2, 3]}, r"head_sizes=\[2, 3\] .* add up to 6 labels"),
        ({"head_sizes": [6, 0]}, r"head_sizes=\[6, 0\] must be of one class at least"),
        ({"head_sizes": []}, r"head_sizes=\[\] must be of one class at least"),
        ({"num_features": 0}, "num_features=0 must be at least 1"),
        ({"head_module": "fc"}, "ResNetForImageClassification has no module 'fc', named by head_module; change it"),
        ({"sites": [{"name": "stages.7"}]}, "no module 'stages.7', named by sites"),
        (
            {"feature_modules": [{"name": "x", "layout": "map"}], "transformers_version": "5.23.0"},
            "no module 'x', named by feature_modules; the model was saved with transformers 5.23.0",
        ),
    ],
)
def test_configurations_that_do_not_fit(changes, message):
    config = changed(**changes)
    for site in config.sites:
        site.setdefault("layout", "map")
        for field in ("channels", "bottleneck_channels", "kernel_size"):
            site.setdefault(field, 1)
        site.setdefault("padding", 0)
    with pytest.raises(ValueError, match=message):
        DynammoForImageClassification(config)


def test_what_is_no_batch_of_images_is_refused():
    standalone = to_standalone(learned("resnet_basic"))
    with pytest.raises(ValueError, match=r"pixel_values must be images \(B, C, H, W\), got \(3, 64, 64\)"):
        standalone(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="pixel_values must be images .* got None"):
        standalone(None)
    config = to_standalone(learned()).config
    config.sites[0]["stride"] = [8, 16]
    with pytest.raises(ValueError, match=r"An image of \(32, 32\) pixels is no grid of 16 patches; .* \(8, 16\)"):
        DynammoForImageClassification(config)(tiny_images("vit"))


def test_what_cannot_stand_alone_is_refused():
    with pytest.raises(ValueError, match=r"no adapter 'task_9'; choose an adapter_name of its own \('merged'\)"):
        to_standalone(learned(), "task_9")
    with pytest.raises(ValueError, match="none, as it is no PeftModel"):
        to_standalone(tiny_model("vit"))
    with pytest.raises(ValueError, match="'merged' has no head; give its DynammoConfig `classes`"):
        to_standalone(learned(classes=None))
    lora = get_peft_model(tiny_model("vit"), LoraConfig(target_modules=["q_proj"]), "merged")
    with pytest.raises(ValueError, match="'merged' has a LoraConfig, which knows no classes"):
        to_standalone(lora)
    merged = learned(config_cls=DynammoLoraConfig, r=2, feature_modules=[])
    next(layer for layer in merged.modules() if isinstance(layer, LoraLayer)).merge()
    with pytest.raises(ValueError, match="call `unmerge_adapter` before"):
        to_standalone(merged)
    custom = learned("resnet_basic")
    custom.get_base_model().__class__ = type("MyResNet", (type(tiny_model("resnet_basic")),), {})
    with pytest.raises(ValueError, match="no image classifier MyResNet of its own"):
        to_standalone(custom)
    disabled = learned()
    with disabled.disable_adapter(), pytest.raises(ValueError, match="No head is active"):
        disabled.unknown_score(tiny_images("vit"))

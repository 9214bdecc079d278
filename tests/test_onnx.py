"""ONNX files: onnxruntime computes what the model does, for any number of images."""

import copy
import json
import sys

import onnxruntime
import pytest
import torch
from peft import get_peft_model
from test_standalone import CLASSES, NAMES, draw, learned
from tiny import tiny_model
from transformers import AutoModelForImageClassification, ResNetConfig, SwinConfig, ViTConfig

from dynammo_peft import DynammoConfig
from dynammo_peft.hub import export_onnx, to_standalone


# Of few layers, since the exporter takes its time for each.
_TRANSFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "vit": ViTConfig(image_size=32, patch_size=8, **_TRANSFORMER),
    "swin": SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4),
    "resnet": ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
}


def small(name, **options):
    torch.manual_seed(0)
    base = AutoModelForImageClassification.from_config(copy.deepcopy(CONFIGS[name]))
    return draw(get_peft_model(base, DynammoConfig(classes=CLASSES, **options), "merged")).eval()


@torch.no_grad()
def assert_same(path, logits_of, unknown_score_of, size):
    """onnxruntime gives the same for one image and for three."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(entry.name, entry.shape[1:]) for entry in session.get_inputs()] == [("pixel_values", [3, *size])]
    assert [entry.name for entry in session.get_outputs()] == ["logits", "unknown_score"]
    for count in (1, 3):
        images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))
        logits, unknown_score = map(torch.from_numpy, session.run(None, {"pixel_values": images.numpy()}))
        torch.testing.assert_close(logits, logits_of(images), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(unknown_score, unknown_score_of(images), rtol=1e-4, atol=1e-4)
    return session.get_modelmeta().custom_metadata_map


def test_of_an_adapted_model(tmp_path):
    # Position embeddings are for another size.
    model = small("vit", scoring="min_others", image_size=[48, 32])
    path = export_onnx(model, tmp_path / "folder" / "model.onnx")
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]
    metadata = assert_same(path, lambda images: model(images).logits, model.unknown_score, (48, 32))
    assert json.loads(metadata["id2label"]) == {str(number): name for number, name in enumerate(NAMES)}
    assert json.loads(metadata["image_size"]) == [48, 32]


def test_of_a_model_that_averages_over_mirror_images(tmp_path):
    model = small("resnet", flips=["horizontal", "vertical"])
    path = export_onnx(model, tmp_path / "model.onnx", image_size=32)
    assert_same(path, lambda images: model(images).logits, model.unknown_score, (32, 32))


def test_of_a_standalone_model_in_half_precision(tmp_path):
    standalone = to_standalone(small("swin", feature_modules=[]).bfloat16())
    export_onnx(standalone, tmp_path / "model.onnx", image_size=48)
    assert standalone.dtype == torch.bfloat16
    single = copy.deepcopy(standalone).float()
    assert_same(
        tmp_path / "model.onnx",
        lambda images: single(images).logits,
        lambda images: single(images).unknown_score,
        (48, 48),
    )


def test_of_maps(tmp_path):
    model = small("resnet", image_size=64)
    path = export_onnx(model, str(tmp_path / "model.onnx"), opset_version=18)
    assert_same(path, lambda images: model(images).logits, model.unknown_score, (64, 64))


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_extra(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ImportError, match=rf"needs onnx and onnxscript .*{missing}.*pip install 'dynammo_peft\[onnx\]'"
    ):
        export_onnx(learned(), tmp_path / "model.onnx")


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(ValueError, match="A ViTForImageClassification is neither a PeftModel nor made by"):
        export_onnx(tiny_model("vit"), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="no adapter 'task_9'"):
        export_onnx(learned(), tmp_path / "model.onnx", "task_9")
    with pytest.raises(ValueError, match="opset_version=11 is too old .* use 18 or later"):
        export_onnx(learned(), tmp_path / "model.onnx", opset_version=11)
    assert not list(tmp_path.iterdir())

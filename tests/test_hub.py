"""Saving: the base model as it is now, adapters by name, all or nothing."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import tiny_dataset, tiny_images, tiny_model, tiny_processor
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.hub import base_model, save_model


def two_tasks(name="resnet_basic", config=DynammoConfig):
    model = get_peft_model(tiny_model(name), config(classes=["a", "b"]), "task_000")
    model.add_adapter("task_001", config(classes=["c"]))
    model.add_weighted_adapter(["task_000", "task_001"])
    model.set_adapter("merged", inference_mode=True)
    return model.eval()


@pytest.mark.parametrize("name", ["vit", "convnext", "resnet_basic", "swin"])
def test_base_model_is_a_copy_with_its_own_classifier_and_labels(name):
    model, images = two_tasks(name), tiny_images(name)
    with torch.no_grad():
        before = model(images).logits
        plain = base_model(model)
        assert torch.equal(plain(images).logits, tiny_model(name)(images).logits)
        assert torch.equal(model(images).logits, before)
    assert plain.config.id2label == tiny_model(name).config.id2label
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert not any("dynammo" in key for key in plain.state_dict())


def test_only_the_named_adapters_are_saved_and_load_again(tmp_path):
    model, images = two_tasks(), tiny_images("resnet_basic")
    save_model(model, tmp_path / "out", ["merged"], tiny_processor(64), save_backbone=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["backbone", "merged"]
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "backbone")
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "merged").eval()
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out" / "merged").size["height"] == 64
    config = json.loads((tmp_path / "out" / "merged" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "backbone")
    assert config["classes"] == [["a", "b"], ["c"]]
    assert config["feature_modules"] == [f"encoder.stages.{stage}" for stage in range(3)]


@pytest.mark.parametrize("config_cls", [DynammoConfig, DynammoLoraConfig])
def test_who_saves_an_adapter_without_the_backbone_that_was_trained_is_told(config_cls, tmp_path):
    model = get_peft_model(tiny_model("vit"), config_cls(classes=["a", "b"]), "task_000")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    model.set_backbone_requires_grad(True)
    model.set_backbone_requires_grad(False)
    # Those that come later are of the same backbone.
    model.add_adapter("task_001", config_cls(classes=["c"]))
    model.add_weighted_adapter(["task_000", "task_001"])
    for name in ("task_000", "task_001", "merged"):
        with pytest.warns(UserWarning, match="The backbone was trained, and the adapter .*form='standalone'"):
            model.save_pretrained(tmp_path, selected_adapters=[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(model, tmp_path / "whole", ["merged"])
    assert (tmp_path / "whole" / "backbone" / "model.safetensors").is_file()
    saved = json.loads((tmp_path / "whole" / "merged" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["backbone_trained"]) == (
        str(tmp_path / "whole" / "backbone"),
        False,
    )
    # The model itself is as it was, so that the next one who saves an adapter alone is told too.
    with pytest.warns(UserWarning, match="The backbone was trained"):
        model.save_pretrained(tmp_path, selected_adapters=["merged"])


def test_a_relative_path_of_the_base_model_is_made_absolute(tmp_path, monkeypatch):
    tiny_model("vit").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(
        AutoModelForImageClassification.from_pretrained("base"), DynammoConfig(classes=["a"]), "task_000"
    )
    save_model(model, "out", ["task_000"])
    config = json.loads((tmp_path / "out" / "task_000" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_failed_save_leaves_the_old_folder_as_it_was(tmp_path):
    model = two_tasks()
    save_model(model, tmp_path / "out", ["merged"])
    before = (tmp_path / "out" / "merged" / "adapter_model.safetensors").read_bytes()
    with pytest.raises((ValueError, KeyError)):
        save_model(model, tmp_path / "out", ["merged", "nobody"])
    assert (tmp_path / "out" / "merged" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("config", [DynammoConfig, DynammoLoraConfig])
def test_transformers_loads_a_saved_model_itself(tmp_path, config):
    model, images = two_tasks("vit", config), tiny_images("vit")
    save_model(model, tmp_path / "out", ["merged"], tiny_processor(32), save_backbone=True)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "merged").eval()
    beside = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "backbone").eval()
    beside.load_adapter(tmp_path / "out" / "merged", adapter_name="cells")
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
        assert torch.equal(beside(images).logits, model(images).logits)
    classify = pipeline("image-classification", model=loaded, image_processor=tiny_processor(32))
    found = classify(tiny_dataset()[0]["image"])
    assert sorted(entry["label"] for entry in found) == ["a", "b", "c"]
    assert abs(sum(entry["score"] for entry in found) - 1) < 1e-5

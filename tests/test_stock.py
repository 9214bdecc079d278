import copy
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_images, tiny_model, tiny_processor

from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.hub import to_stock


def learned(name="vit", **options):
    """A model that looks as if it had learned three classes."""
    settings = {"classes": [["a"], ["b", "c"]], "r": 2, "feature_modules": [], **options}
    model = get_peft_model(tiny_model(name), DynammoLoraConfig(**settings), "merged")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return model.eval()


# Position embeddings of the first four are for another size.
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit", [48, 48]),
        ("vit", [32, 48]),
        ("deit", [48, 48]),
        ("dinov2", [42, 42]),
        ("vit", [32, 32]),
        ("swin", [64, 64]),
        ("convnext", [96, 96]),
        ("resnet_bottleneck", [96, 96]),
    ],
)
def test_logits_are_those_of_the_adapted_model(name, size, tmp_path):
    model = learned(name, image_size=size)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(pixel_values=images).logits
        plain = to_stock(model)
        plain.save_pretrained(tmp_path)
        again = type(tiny_model(name)).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(pixel_values=images).logits, expected, rtol=1e-5, atol=1e-5)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert again.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert type(plain).__module__.startswith("transformers.")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert model.active_adapter == "merged"


WITHOUT_PACKAGE = """
import sys
sys.modules["dynammo_peft"] = sys.modules["peft"] = None
from PIL import Image
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], top_k=None)
answers = classify(Image.new("RGB", (20, 30), "red"))
print(sorted(answer["label"] for answer in answers), round(sum(answer["score"] for answer in answers), 5))
"""


def test_a_pipeline_uses_it_without_the_package(tmp_path):
    to_stock(learned(image_size=48)).save_pretrained(tmp_path)
    tiny_processor(48).save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "['a', 'b', 'c'] 1.0", run.stderr


def test_half_precision_and_double_precision_models_keep_their_type():
    assert to_stock(learned().to(torch.bfloat16)).dtype == torch.bfloat16
    assert to_stock(learned().double()).dtype == torch.float64


def test_it_can_be_trained_on(tmp_path):
    plain = to_stock(learned())
    loss = plain(pixel_values=tiny_images("vit"), labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in plain.classifier.parameters())


def test_what_cannot_be_folded_is_refused():
    convolutional = get_peft_model(tiny_model("vit"), DynammoConfig(classes=["a"]), "merged")
    with pytest.raises(ValueError, match="'merged' is convolutional.*to_standalone"):
        to_stock(convolutional)
    with pytest.raises(ValueError, match="feature_modules=.*feature_modules=\\[\\]"):
        to_stock(learned(feature_modules=None))
    with pytest.raises(ValueError, match="'other' does not exist; there are merged"):
        to_stock(learned(), "other")
    with pytest.raises(ValueError, match="'merged' has no classes"):
        to_stock(learned(classes=None))
    with pytest.raises(ValueError, match="'merged' has no classes"):
        to_stock(get_peft_model(tiny_model("vit"), LoraConfig(target_modules=["q_proj"]), "merged"))


def test_a_model_whose_export_differs_is_not_passed_on(monkeypatch):
    model = learned()
    broken = copy.deepcopy(tiny_model("vit"))
    monkeypatch.setattr(type(model), "merge_and_unload", lambda self, **options: broken.double(), raising=False)
    with pytest.raises(RuntimeError, match="gives other logits"):
        to_stock(model)

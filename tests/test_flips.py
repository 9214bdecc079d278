"""Features averaged over an image and its mirror images."""

import copy

import pytest
import torch
from peft import AutoPeftModel, get_peft_model
from tiny import tiny_images, tiny_model
from transformers import AutoModelForImageClassification

from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.evaluation.cost import forward_cost
from dynammo_peft.hub.standalone import to_standalone


BOTH = ["horizontal", "vertical"]


def mirrored(images, flip):
    """By hand, pixel by pixel."""
    result = torch.empty_like(images)
    size = images.shape[-1] if flip == "horizontal" else images.shape[-2]
    for place in range(size):
        if flip == "horizontal":
            result[..., place] = images[..., size - 1 - place]
        else:
            result[..., place, :] = images[..., size - 1 - place, :]
    return result


def flipping_model(name="vit", flips=BOTH, config=DynammoConfig, **options):
    """A model whose adapter and heads do something, and whether it averages."""
    torch.manual_seed(0)
    options = {"classes": [["a", "b"], ["c"]], "flips": flips, **options}
    model = get_peft_model(tiny_model(name), config(**options), "merged").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "alpha" in key or "lora_B" in key or "_head" in key:
                parameter.normal_(std=0.5)
    return model


def logits_of(model, images):
    with torch.no_grad():
        return model(pixel_values=images).logits


def expected(name, images, flips, **options):
    """Heads are linear: the mean over features gives the mean of the raw logits."""
    plain = flipping_model(name, None, **options)
    return sum(logits_of(plain, image) for image in [images, *(mirrored(images, flip) for flip in flips)]) / (
        1 + len(flips)
    )


@pytest.mark.parametrize("name", ["vit", "dinov2", "resnet_basic", "swin", "convnext"])
@pytest.mark.parametrize("flips", [["horizontal"], ["vertical"], BOTH])
def test_logits_are_the_mean_over_mirror_images(name, flips):
    images = tiny_images(name, 3)
    logits = logits_of(flipping_model(name, flips), images)
    assert logits.shape == (3, 3)
    torch.testing.assert_close(logits, expected(name, images, flips), atol=1e-5, rtol=1e-5)
    assert (logits - logits_of(flipping_model(name, None), images)).abs().max() > 1e-3


def test_other_scoring_reads_the_mean_of_the_features():
    images = tiny_images("vit", 3)
    model, plain = (flipping_model("vit", flips, scoring="min_others") for flips in (BOTH, None))
    with torch.no_grad(), plain.base_model.head_output("features"):
        copies = [images, *(mirrored(images, flip) for flip in BOTH)]
        features = sum(plain(pixel_values=copy).logits for copy in copies) / 3
    head = model.base_model.head
    with torch.no_grad(), model.base_model.head_output("logits"):
        torch.testing.assert_close(model(pixel_values=images).logits, head.heads["merged"](features))
    assert logits_of(model, images).shape == (3, 3)


def test_neither_training_nor_features_know_of_it():
    images = tiny_images("vit", 3)
    model, plain = flipping_model(), flipping_model(flips=None)
    for output in ("features", "last_layer_logits"):
        with torch.no_grad(), model.base_model.head_output(output), plain.base_model.head_output(output):
            assert torch.equal(model(pixel_values=images).logits, plain(pixel_values=images).logits)
    model.train(), plain.train()
    torch.manual_seed(0)
    trained = logits_of(model, images)
    torch.manual_seed(0)
    assert torch.equal(trained, logits_of(plain, images))
    with model.disable_adapter():
        assert model(pixel_values=images).logits.shape[0] == 3


def test_the_loss_is_that_of_the_images():
    images, labels = tiny_images("vit", 3), torch.tensor([0, 1, 2])
    model = flipping_model()
    output = model(pixel_values=images, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    # Positional images too.
    assert torch.equal(model(images).logits, output.logits)


def test_what_are_no_images_is_refused_by_the_model_itself():
    model, plain = flipping_model(), flipping_model(flips=None)
    for wrong in ({}, {"pixel_values": None}):
        with pytest.raises(Exception) as expected:
            plain(**wrong)
        with pytest.raises(type(expected.value)) as error:
            model(**wrong)
        assert str(error.value) == str(expected.value)


def test_it_is_saved_copied_and_taken_off_with_the_adapter(tmp_path):
    images, model = tiny_images("vit", 2), flipping_model()
    logits = logits_of(model, images)
    assert torch.equal(logits_of(copy.deepcopy(model), images), logits)
    base = copy.deepcopy(model).unload()
    assert logits_of(base, images).shape[0] == 2
    assert not base._forward_pre_hooks
    tiny_model("vit").save_pretrained(tmp_path / "base")
    model.peft_config["merged"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "saved" / "merged").eval()
    assert loaded.peft_config["default"].flips == BOTH
    torch.testing.assert_close(logits_of(loaded, images), logits)
    # Without PEFT's wrapper, as pipelines load it.
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved" / "merged").eval()
    torch.testing.assert_close(logits_of(loaded, images), logits)


def test_a_merge_inherits_it_and_adapters_must_agree():
    model = flipping_model(flips=["horizontal"], classes=["a"])
    model.add_adapter("second", DynammoConfig(classes=["b"], flips=["horizontal"]))
    model.add_adapter("third", DynammoConfig(classes=["c"]))
    model.add_weighted_adapter(["merged", "second"], adapter_name="both")
    assert model.peft_config["both"].flips == ["horizontal"]
    with pytest.raises(ValueError, match=r"differ in flips \(\['horizontal'\] and \[\]\)"):
        model.add_weighted_adapter(["merged", "third"], adapter_name="all")
    model.base_model.set_adapter(["merged", "third"])
    with pytest.raises(ValueError, match=r"active adapters 'merged' and 'third' differ in flips"):
        logits_of(model, tiny_images("vit", 2))


@pytest.mark.parametrize("flips", [["horizontal"], BOTH])
def test_the_standalone_model_does_the_same(tmp_path, flips):
    images, model = tiny_images("vit", 2), flipping_model(flips=flips)
    to_standalone(model).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.flips == flips
    output = loaded(images)
    torch.testing.assert_close(output.logits, logits_of(model, images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.unknown_score, model.base_model.unknown_score(images), atol=1e-5, rtol=1e-5)
    assert loaded.train()(images).logits.shape == (2, 3)


def test_each_mirror_image_costs_a_forward_pass():
    images = tiny_images("vit", 1)
    models = [flipping_model(flips=flips) for flips in (None, ["horizontal"], BOTH)]
    costs = [forward_cost(model, lambda model=model: model(pixel_values=images)).multiply_adds for model in models]
    assert [cost / costs[0] for cost in costs] == pytest.approx([1, 2, 3], rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: DynammoConfig(flips=["diagonal"]), "flips='diagonal' does not exist; .* 'horizontal', 'vertical'"),
        (lambda: DynammoConfig(flips=["vertical", "vertical"]), "names 'vertical' twice"),
        (
            lambda: flipping_model(config=DynammoLoraConfig, feature_modules=[]).merge_and_unload(),
            r"average over flips=\['horizontal', 'vertical'\].*flips=\[\]",
        ),
    ],
)
def test_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()

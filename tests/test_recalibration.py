"""Measured BatchNorm statistics against those that training mode sees."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_images, tiny_model

from dynammo_peft import DynammoConfig
from dynammo_peft.merging import recalibrate


@pytest.fixture
def model():
    model = get_peft_model(tiny_model("resnet_basic"), DynammoConfig(classes=["a"]), "task_000")
    for layer in model.modules():
        if hasattr(layer, "dynammo_alpha"):
            layer.dynammo_alpha["task_000"].data.fill_(1.0)
    return model.eval()


def norms(model, adapter="task_000"):
    layers = [layer for layer in model.modules() if hasattr(layer, "dynammo_down_norm")]
    return [norm for layer in layers for norm in (layer.dynammo_down_norm[adapter], layer.dynammo_up_norm[adapter])]


def test_statistics_are_those_of_what_reaches_each_layer(model):
    images = tiny_images("resnet_basic", 12)
    seen = {}

    def note(norm, args):
        seen.setdefault(norm, []).append(args[0].detach())

    handles = [norm.register_forward_pre_hook(note) for norm in norms(model)]
    # Batches of different size count by their images.
    recalibrate(model, "task_000", [images[:8], images[8:]])
    for handle in handles:
        handle.remove()
    for norm in norms(model):
        values = torch.cat(seen[norm]).transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(norm.running_mean.double(), values.mean(dim=1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norm.running_var.double(), values.var(dim=1, correction=0), atol=1e-5, rtol=1e-4)
        assert norm.num_batches_tracked == 0
    assert not any(module.training for module in model.modules())


def test_one_batch_gives_the_outputs_of_training_mode(model):
    images = tiny_images("resnet_basic", 8)
    recalibrate(model, "task_000", [(images, torch.zeros(8))])
    after = model(pixel_values=images).logits
    for norm in norms(model):
        norm.train()
    torch.testing.assert_close(after, model(pixel_values=images).logits, atol=1e-4, rtol=1e-3)


def test_other_adapters_and_the_active_one_stay(model):
    model.add_adapter("task_001", DynammoConfig(classes=["b"]))
    before = [norm.running_mean.clone() for norm in norms(model, "task_000")]
    recalibrate(model, "task_001", [tiny_images("resnet_basic", 4)])
    assert model.active_adapter == "task_000"
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms(model, "task_000"), before))
    assert any(norm.running_mean.any() for norm in norms(model, "task_001"))


def test_without_batches_nothing_changes(model):
    before = [norm.running_mean.clone() for norm in norms(model)]
    with pytest.raises(ValueError, match="batches holds no images"):
        recalibrate(model, "task_000", [])
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms(model), before))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_change_nothing(model, value):
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms(model)]
    images = tiny_images("resnet_basic", 4)
    images[3, 0, 5, 5] = value
    with pytest.raises(ValueError, match="BatchNorm layers of adapter 'task_000' holds NaN or infinity.* the images"):
        recalibrate(model, "task_000", [tiny_images("resnet_basic", 4), images])
    for norm, own in zip(norms(model), before):
        assert all(torch.equal(buffer, own[name]) for name, buffer in norm.named_buffers())


def test_adapters_without_batch_norm_need_nothing():
    model = get_peft_model(tiny_model("vit"), LoraConfig(target_modules=["q_proj"]))
    recalibrate(model, "default", [])
    with pytest.raises(ValueError, match="'other' does not exist"):
        recalibrate(model, "other", [])


def test_mappings_do_as_well(model):
    images = tiny_images("resnet_basic", 8)
    recalibrate(model, "task_000", [images])
    expected = [norm.running_mean.clone() for norm in norms(model)]
    recalibrate(model, "task_000", [{"pixel_values": images, "labels": torch.zeros(8)}])
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms(model), expected))


def test_a_layer_that_the_forward_passes_by_keeps_its_statistics(model):
    before = [norm.running_mean.clone() for norm in norms(model)]

    def first_stage(base, images):
        base.resnet.encoder.stages[0](base.resnet.embedder(images))

    recalibrate(model, "task_000", [tiny_images("resnet_basic", 8)], forward=first_stage)
    changed = [not torch.equal(norm.running_mean, mean) for norm, mean in zip(norms(model), before)]
    assert any(changed) and not all(changed)
    assert all(buffer.isfinite().all() for norm in norms(model) for buffer in norm.buffers())

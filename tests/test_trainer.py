"""A single task trained by `transformers.Trainer`: the loss, the best model, going on after a stop, and the merge."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_recipe import image_folder
from tiny import CONFIGS, tiny_dataset, tiny_images, tiny_model, tiny_processor
from transformers import Trainer, TrainerCallback, TrainingArguments

from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.merging import adapter_tensors


ROOT = Path(__file__).parent.parent
NAMES = ["cat", "dog", "owl", "fox"]
STEPS_AN_EPOCH = 4


def pixels_and_labels(name, task=0, per_class=8, seed=0):
    """Images of two of the four classes as the Trainer takes them, labels from 0 in each task."""
    processor = tiny_processor(CONFIGS[name][1])
    data = tiny_dataset(4, per_class, seed=seed, names=NAMES)
    data = data.filter(lambda label: label // 2 == task, input_columns="label")

    def transform(batch):
        pixels = processor(batch["image"], return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": [label - 2 * task for label in batch["label"]]}

    return data.with_transform(transform)


def accuracy(predictions):
    return {"accuracy": float(np.mean(predictions.predictions.argmax(axis=1) == predictions.label_ids))}


def adapted(name="vit", task=0, config_cls=DynammoConfig):
    """A fresh model with one adapter, the same each time."""
    base = tiny_model(name)
    return get_peft_model(base, config_cls(classes=NAMES[2 * task : 2 * task + 2]))


def trainer_of(model, output_dir, name="vit", task=0, callbacks=None, **arguments):
    settings = {"num_train_epochs": 3, "learning_rate": 5e-3, "eval_strategy": "epoch", "save_strategy": "epoch"}
    arguments = TrainingArguments(
        output_dir,
        **{**settings, **arguments},
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        # The transform reads the images' column, which the model's forward does not name.
        remove_unused_columns=False,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    train, test = pixels_and_labels(name, task), pixels_and_labels(name, task, per_class=4, seed=1)
    data = {"train_dataset": train, "eval_dataset": test}
    return Trainer(model, arguments, **data, compute_metrics=accuracy, callbacks=callbacks)


def state_of(model):
    """Copies of all tensors of the adapter, statistics and heads included."""
    return {key: value.clone() for key, value in model.state_dict().items() if "dynammo_" in key or "lora_" in key}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize(
    ("name", "config_cls"), [("vit", DynammoConfig), ("resnet_basic", DynammoConfig), ("vit", DynammoLoraConfig)]
)
def test_a_task_is_learned_and_saved(tmp_path, name, config_cls):
    model = adapted(name, config_cls=config_cls)
    base = {key: value.clone() for key, value in model.state_dict().items() if "default" not in key}
    trainer = trainer_of(model, tmp_path / "run", name)
    # The Trainer's defaults find the labels: without them there is neither a loss nor an accuracy in evaluation.
    assert trainer.label_names == ["labels"]
    before = trainer.evaluate()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-STEPS_AN_EPOCH:]) < 0.75 * np.mean(losses[:STEPS_AN_EPOCH])
    after = trainer.evaluate()
    assert after["eval_accuracy"] == 1 > before["eval_accuracy"]
    assert after["eval_loss"] < 0.75 * before["eval_loss"]
    # The backbone is as it was, statistics of its BatchNorm layers included.
    assert_equal(base, {key: value for key, value in model.state_dict().items() if "default" not in key})
    trainer.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_model(name), tmp_path / "saved").eval()
    assert_equal(state_of(loaded), state_of(model))
    images = tiny_images(name)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model.eval()(images).logits)
    assert loaded.config.id2label == {0: "cat", 1: "dog"}


class Scripted:
    """An accuracy for each evaluation, so that the best checkpoint is known beforehand."""

    def __init__(self, *values):
        self.values = itertools.chain(values, itertools.repeat(0.0))

    def __call__(self, predictions):
        return {"accuracy": next(self.values)}


def test_the_best_adapter_is_loaded_not_the_last(tmp_path):
    model = adapted("resnet_basic")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    trainer = trainer_of(model, tmp_path, "resnet_basic", **best)
    trainer.compute_metrics = Scripted(0.2, 0.9, 0.1)
    kept = Keep()
    trainer.add_callback(kept)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * STEPS_AN_EPOCH}")
    found = state_of(model)
    assert_equal(found, kept.states[2])
    # Everything differs from the last: convolutions, alpha, BatchNorm's weights and statistics, heads.
    assert len(found) == 13 * 4 + 2
    dead = [key for key in found if torch.equal(found[key], kept.states[3][key])]
    assert dead == []
    checkpoint = load_file(tmp_path / f"checkpoint-{2 * STEPS_AN_EPOCH}" / "adapter_model.safetensors")
    assert len(checkpoint) == len(found)


class Keep(TrainerCallback):
    """Copies the adapter at the end of each epoch."""

    def __init__(self):
        self.states = {}

    def on_epoch_end(self, args, state, control, model, **kwargs):
        self.states[round(state.epoch)] = state_of(model)


class Stop(TrainerCallback):
    """Stops the training after a step, as an interruption would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


# In the middle of an epoch too.
@pytest.mark.parametrize("save_steps", [STEPS_AN_EPOCH, STEPS_AN_EPOCH + 2])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, save_steps):
    saving = {"save_strategy": "steps", "save_steps": save_steps}
    whole = adapted("resnet_basic")
    trainer_of(whole, tmp_path / "whole", "resnet_basic", **saving).train()
    trainer_of(
        adapted("resnet_basic"), tmp_path / "run", "resnet_basic", callbacks=[Stop(save_steps)], **saving
    ).train()
    torch.manual_seed(99)
    again = adapted("resnet_basic")
    trainer_of(again, tmp_path / "run", "resnet_basic", **saving).train(resume_from_checkpoint=True)
    assert_equal(state_of(again), state_of(whole))


def test_two_tasks_trained_so_are_merged(tmp_path):
    for task in (0, 1):
        model = adapted(task=task)
        trainer = trainer_of(model, tmp_path / f"run-{task}", task=task, save_strategy="no")
        trainer.train()
        trainer.save_model(tmp_path / f"task_{task:03d}")
    model = PeftModel.from_pretrained(tiny_model("vit"), tmp_path / "task_000", adapter_name="task_000")
    model.load_adapter(tmp_path / "task_001", "task_001")
    parts = [adapter_tensors(model, f"task_00{task}") for task in (0, 1)]
    model.add_weighted_adapter(["task_000", "task_001"], [0.5, 0.5], "merged")
    model.set_adapter("merged")
    merged = adapter_tensors(model, "merged")
    for key in (key for key in merged if merged[key].is_floating_point()):
        torch.testing.assert_close(merged[key], (parts[0][key] + parts[1][key]) / 2)
    assert model.config.id2label == dict(enumerate(NAMES))
    # The merged model takes the labels of all four classes, and the Trainer scores it.
    trainer = trainer_of(model, tmp_path / "merged")
    data = tiny_dataset(4, 4, seed=1, names=NAMES)
    processor = tiny_processor(32)
    data.set_transform(
        lambda batch: {
            "pixel_values": list(processor(batch["image"], return_tensors="pt")["pixel_values"]),
            "labels": batch["label"],
        }
    )
    assert trainer.evaluate(data)["eval_accuracy"] > 0.5


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What a user has is left out of the example: here, a CPU and no trackers.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tiny_model("deit").save_pretrained("facebook/deit-tiny-patch16-224")
    tiny_processor(32).save_pretrained("facebook/deit-tiny-patch16-224")
    image_folder(tmp_path / "cells", classes=4, per_class=8)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    section = page.split("## A single task with transformers.Trainer")[1].split("\n## ")[0]
    (block,) = re.findall(r"```py\n(.*?)```", section, flags=re.DOTALL)
    names = {}
    exec(block, names)
    assert names["trainer"].evaluate()["eval_accuracy"] == 1
    loaded = PeftModel.from_pretrained(tiny_model("deit"), tmp_path / "cells-model" / "merged")
    assert loaded.config.id2label == {index: f"class {index}" for index in range(4)}

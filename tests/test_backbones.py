"""Ranking backbones by what their features tell of the classes."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_dataset, tiny_model, tiny_processor
from transformers import DeiTConfig, MobileNetV1Config

from dynammo_peft.evaluation import recommend_backbone


@pytest.fixture
def candidates(tmp_path):
    """A backbone that sees colours, and one whose weights were all set to zero."""
    names = []
    for name in ("seeing", "blind"):
        model = tiny_model("vit")
        if name == "blind":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        names.append(str(tmp_path / name))
        model.save_pretrained(names[-1])
        tiny_processor(32).save_pretrained(names[-1])
    return names


def test_the_backbone_that_sees_the_classes_comes_first(candidates):
    data = tiny_dataset(classes=4, per_class=12)
    seeing, blind = recommend_backbone(data, candidates[::-1], shots=5, splits=3, progress=False)
    assert (seeing.checkpoint, blind.checkpoint) == tuple(candidates)
    assert seeing.accuracy > 0.8
    assert blind.accuracy == 0.25
    assert blind.deviation == 0
    assert seeing.multiply_adds == blind.multiply_adds > 0


def test_the_result_depends_on_the_seed_and_the_images_alone(candidates):
    data = tiny_dataset(classes=3, per_class=12)
    options = {"shots": 2, "splits": 4, "progress": False}
    first = recommend_backbone(data, candidates[:1], **options)
    torch.manual_seed(1)
    assert recommend_backbone(data, candidates[:1], **options) == first


def test_another_image_size_costs_another_forward_pass(candidates):
    data = tiny_dataset(classes=2, per_class=4)
    small, large = (
        recommend_backbone(data, candidates[:1], shots=2, splits=1, image_size=size, progress=False)[0]
        for size in (32, 64)
    )
    assert large.multiply_adds > 3 * small.multiply_adds


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"candidates": []}, ["candidates is empty"]),
        ({"candidates": "nowhere"}, ["candidates='nowhere' is a string", "a list"]),
        ({"shots": 0}, ["shots=0", "at least 1"]),
        ({"splits": 0}, ["splits=0", "at least 1"]),
        ({"shots": 4}, ["'class 0' has 6 images", "shots=4 needs 8"]),
        ({"dataset": tiny_dataset().to_iterable_dataset()}, ["dataset is a IterableDataset", "datasets.Dataset"]),
        (
            {"dataset": tiny_dataset().filter(lambda row: row["label"] != 1), "shots": 1},
            ["'class 1' has no images", "names of column 'label'"],
        ),
        ({"label_column": "image"}, ["'image' is no ClassLabel"]),
    ],
)
def test_unusable_input_is_refused(changes, words):
    with pytest.raises(ValueError) as error:
        recommend_backbone(**{"dataset": tiny_dataset(), "candidates": ["nowhere"], "progress": False} | changes)
    assert all(word in str(error.value) for word in words)


def test_an_unsupported_candidate_is_named_before_anything_is_computed(candidates, tmp_path, monkeypatch):
    MobileNetV1Config().save_pretrained(tmp_path / "mobile")
    monkeypatch.setattr("dynammo_peft.evaluation.backbones._features", None)
    with pytest.raises(ValueError, match="mobile' is of model type 'mobilenet_v1'.*leave it out. Supported: vit, "):
        recommend_backbone(tiny_dataset(), [*candidates, str(tmp_path / "mobile")], shots=2, progress=False)
    DeiTConfig(architectures=["DeiTForImageClassificationWithTeacher"]).save_pretrained(tmp_path / "distilled")
    with pytest.raises(ValueError, match="distilled' has two classifiers.*leave it out"):
        recommend_backbone(tiny_dataset(), [*candidates, str(tmp_path / "distilled")], shots=2, progress=False)


def test_a_candidate_without_an_image_processor_is_named_before_anything_is_computed(candidates, monkeypatch):
    (Path(candidates[1]) / "preprocessor_config.json").unlink()
    monkeypatch.setattr("dynammo_peft.evaluation.backbones._features", None)
    with pytest.raises(OSError, match="blind"):
        recommend_backbone(tiny_dataset(), candidates, shots=2, progress=False)

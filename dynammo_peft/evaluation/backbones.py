"""Which pretrained backbone suits a data set, asked cheaply: a linear classifier on the features of a few images."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import datasets
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from ..data import ClassIncrementalScenario, ClassStatistics, data_loader, resized_image_processor
from ..methods.analytic import ridge_regression
from ..tuner import DynammoConfig
from ..tuner.architectures import ARCHITECTURES
from .cost import forward_cost


@dataclass(frozen=True)
class BackboneScore:
    """How well the classes are told apart on a backbone's features.

    Args:
        checkpoint (`str`): Name on the Hub, or folder.
        accuracy (`float`): Mean over splits, each class counting the same, in 0..1.
        deviation (`float`): Standard deviation over splits.
        multiply_adds (`int`): Of one image through the backbone.
    """

    checkpoint: str
    accuracy: float
    deviation: float
    multiply_adds: int


def recommend_backbone(
    dataset: datasets.Dataset,
    candidates: Sequence[str],
    shots: int = 10,
    splits: int = 5,
    image_size: Optional[int] = None,
    image_column: str = "image",
    label_column: str = "label",
    device: Optional[str] = None,
    seed: int = 0,
    progress: bool = True,
) -> list[BackboneScore]:
    """
    Ranks pretrained image models for a data set, the best first; nothing is trained.

    Of each class `2 * shots` images are drawn. In each split one half fits a ridge regression on the features that
    DynaMMo's heads read, and the other is classified: how separable the classes are before any adapter is trained.

    Args:
        dataset (`datasets.Dataset`): Training images with class labels; test images are not for choosing.
        candidates (`Sequence[str]`): Image models on the Hub or in folders, with their image processors.
        shots (`int`): Images of each class to fit on, and as many to score.
        splits (`int`): How often the images are cut in halves.
        image_size (`Optional[int]`): Height and width to resize to, in pixels; each processor's own if `None`.
        image_column (`str`): Column of the images.
        label_column (`str`): Column of the labels, a `ClassLabel`.
        device (`Optional[str]`): Where to compute; the CPU if `None`.
        seed (`int`): Of the images drawn and of the splits.
        progress (`bool`): Whether to show progress bars.

    Returns:
        `list[BackboneScore]`: One for each candidate.

    Raises:
        ValueError: If there are no candidates, one is of no supported type, or a class has fewer than `2 * shots`
            images.
        OSError: If a candidate, or its image processor, cannot be found.

    Example:

        ```py
        >>> recommend_backbone(train, ["facebook/deit-tiny-patch16-224", "microsoft/resnet-18"])[0].checkpoint
        'facebook/deit-tiny-patch16-224'
        ```
    """
    if isinstance(candidates, str):
        raise ValueError(f"candidates={candidates!r} is a string; give a list of checkpoints.")
    if not candidates:
        raise ValueError("candidates is empty; name at least one checkpoint.")
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"dataset is a {type(dataset).__name__}; give a datasets.Dataset, to draw rows from.")
    for name, value in (("shots", shots), ("splits", splits)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    rows = _draw(dataset, label_column, 2 * shots, seed)
    processors = _checked_processors(candidates)
    few = dataset.select(rows)
    scores = []
    for checkpoint, processor in processors.items():
        model = AutoModelForImageClassification.from_pretrained(checkpoint)
        if image_size is not None:
            processor = resized_image_processor(processor, image_size)
        names = few.features[label_column].names
        # The same images stand for training and test: splits are drawn below.
        scenario = ClassIncrementalScenario(
            few,
            few,
            processor,
            classes_per_task=len(names),
            image_column=image_column,
            label_column=label_column,
            progress=progress,
        )
        features, labels, cost = _features(model, scenario, device or "cpu")
        accuracies = _accuracies(features, labels, shots, splits, seed)
        deviation = statistics.stdev(accuracies) if splits > 1 else 0.0
        scores.append(BackboneScore(checkpoint, statistics.mean(accuracies), deviation, cost))
    return sorted(scores, key=lambda score: -score.accuracy)


def _checked_processors(candidates: Sequence[str]) -> dict[str, Any]:
    """Image processors of candidates, which are refused here before anything is computed with the others."""
    processors = {}
    for checkpoint in candidates:
        config = AutoConfig.from_pretrained(checkpoint)
        model_type = config.model_type
        if any(name.endswith("WithTeacher") for name in config.architectures or ()):
            raise ValueError(
                f"Candidate {checkpoint!r} has two classifiers, one of them distilled, and heads stand in for one; "
                "leave it out, or name the checkpoint that was not distilled."
            )
        if model_type not in ARCHITECTURES:
            raise ValueError(
                f"Candidate {checkpoint!r} is of model type {model_type!r}, whose features heads cannot read without "
                f"more being said; leave it out. Supported: {', '.join(ARCHITECTURES)}."
            )
        processors[checkpoint] = AutoImageProcessor.from_pretrained(checkpoint)
    return processors


def _draw(dataset: datasets.Dataset, label_column: str, count: int, seed: int) -> list[int]:
    """Rows of `count` random images of each class."""
    feature = dataset.features.get(label_column)
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(f"Column {label_column!r} is no ClassLabel; set label_column.")
    labels = torch.tensor(dataset.with_format(None)[label_column][:])
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, name in enumerate(feature.names):
        rows = torch.nonzero(labels == label).flatten()
        if not len(rows):
            raise ValueError(f"Class {name!r} has no images; take it out of the names of column {label_column!r}.")
        if len(rows) < count:
            raise ValueError(f"Class {name!r} has {len(rows)} images; shots={count // 2} needs {count}. Lower shots.")
        chosen += rows[torch.randperm(len(rows), generator=generator)[:count]].tolist()
    return chosen


@torch.no_grad()
def _features(model: Any, scenario: ClassIncrementalScenario, device: str) -> tuple[Tensor, Tensor, int]:
    """Features `(N, C)` and labels `(N,)` of all images, and the multiply-adds of one."""
    # With alpha = 0 the adapters pass their input on.
    config = DynammoConfig(classes=scenario.class_names, init_alpha=0.0, image_size=list(scenario.image_size))
    adapted = get_peft_model(model, config).to(device).eval()
    images = scenario[0].train
    with adapted.head_output("features"):
        batches = (scenario.transform(batch.to(device)) for batch, _ in data_loader(images, 64))
        parts = [adapted(pixel_values=batch).logits.cpu() for batch in batches]
    with adapted.disable_adapter():
        image = torch.zeros(1, 3, *scenario.image_size, device=device)
        cost = forward_cost(adapted, lambda: adapted(pixel_values=image)).multiply_adds
    return torch.cat(parts), images.labels, cost


def _accuracies(features: Tensor, labels: Tensor, shots: int, splits: int, seed: int) -> list[float]:
    """Mean class recall of each split."""
    generator = torch.Generator().manual_seed(seed)
    # Class by class, `(N, 2 * shots)`.
    places = labels.argsort(stable=True).view(-1, 2 * shots)
    accuracies = []
    for _ in range(splits):
        order = torch.stack([row[torch.randperm(2 * shots, generator=generator)] for row in places])
        fitted, scored = order[:, :shots].flatten(), order[:, shots:].flatten()
        known = ClassStatistics()
        known.update(features[fitted], labels[fitted])
        weight, bias = ridge_regression(known)
        predicted = (features[scored].double() @ weight.T + bias).argmax(dim=1)
        accuracies.append((predicted == labels[scored]).double().mean().item())
    return accuracies

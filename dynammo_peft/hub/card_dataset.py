"""Dataset cards: the tasks that a data set is cut into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from huggingface_hub import DatasetCard, DatasetCardData

from ..data import ClassIncrementalScenario
from .card_facts import check_no_path, check_repository, license_metadata
from .card_markdown import escape, table, template_path


# What the Hub calls sizes: less than so many images.
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def dataset_card(
    scenario: ClassIncrementalScenario,
    name: str,
    *,
    dataset_id: Optional[str] = None,
    license: Optional[str] = None,
    license_link: Optional[str] = None,
    base_model: Optional[str] = None,
    train_split: str = "train",
    test_split: Optional[str] = "test",
    image_column: str = "image",
    label_column: str = "label",
    validation_fraction: float = 0.0,
    seed: Optional[int] = None,
    tags: Sequence[str] = (),
) -> DatasetCard:
    """
    Args:
        scenario (`ClassIncrementalScenario`): The tasks. Its images are counted, and not shown.
        name (`str`): What the data set is called.
        dataset_id (`Optional[str]`): Its repository on the Hub, or `"digits"`; `None` if it has none.
        license (`Optional[str]`): Its licence: one of the Hub's identifiers, or a name of your own.
        license_link (`Optional[str]`): For a licence of your own: its address, or `"LICENSE"`.
        base_model (`Optional[str]`): The repository on the Hub whose image processor the scenario has.
        train_split (`str`): Name of the split with training images.
        test_split (`Optional[str]`): Name of the split with test images; `None` if they were held out.
        image_column (`str`): Column of the images.
        label_column (`str`): Column of the labels.
        validation_fraction (`float`): The scenario's: share of the training images that were held out as test images.
        seed (`Optional[int]`): The scenario's.
        tags (`Sequence[str]`): Further tags on the Hub.

    Returns:
        `DatasetCard`: The card. It names no files.

    Raises:
        ValueError: If `dataset_id` or `base_model` cannot be a repository on the Hub, or a text holds a path.
    """
    for field, value in (("dataset_id", dataset_id), ("base_model", base_model)):
        check_repository(field, value)
    for field, value in (("name", name), ("license", license), ("license_link", license_link)):
        check_no_path(field, value or "")
    rows, train_images, test_images = [], 0, 0
    for task in scenario:
        train, test = (torch.bincount(part.labels, minlength=task.seen_classes) for part in (task.train, task.test))
        for label, class_name in zip(task.classes, task.class_names):
            rows.append([str(task.index + 1), escape(class_name), str(int(train[label])), str(int(test[label]))])
        train_images, test_images = train_images + int(train.sum()), test_images + int(test.sum())
    columns = {"image_column": (image_column, "image"), "label_column": (label_column, "label")}
    arguments = {option: given for option, (given, usual) in columns.items() if given != usual}
    if scenario.domains.of_task is not None:
        arguments |= {"domain_column": scenario.domains.column, "domains": scenario.domains.of_task}
    if validation_fraction:
        arguments["validation_fraction"] = validation_fraction
    if validation_fraction or sum(map(len, scenario.groups)) > scenario.num_classes:
        arguments["seed"] = seed or 0
    on_hub = dataset_id if dataset_id != "digits" else None
    card = DatasetCard.from_template(
        DatasetCardData(
            **license_metadata(license, license_link),
            pretty_name=name,
            task_categories=["image-classification"],
            size_categories=[_size(train_images + test_images)],
            tags=["class-incremental-learning", "continual-learning", *tags],
        ),
        template_path=str(template_path("dataset_card.md")),
        title=escape(name),
        class_count=scenario.num_classes,
        task_count=len(scenario),
        train_images=train_images,
        test_images=test_images,
        size=f"{scenario.image_size[0]} x {scenario.image_size[1]}",
        dataset_license=escape(license) if license else "unknown",
        dataset_id=on_hub,
        classes=table(["task", "class", "training images", "test images"], rows),
        held_out=f"{100 * validation_fraction:g}" if validation_fraction else "",
        seed=seed or 0,
        code=_code(scenario, dataset_id, base_model, (train_split, test_split), arguments),
    )
    card.text = card.text.rstrip() + "\n"
    return card


def _size(images: int) -> str:
    return next((name for limit, name in _SIZES if images < limit), "n>10M")


def _code(
    scenario: ClassIncrementalScenario,
    dataset_id: Optional[str],
    base_model: Optional[str],
    splits: tuple[str, Optional[str]],
    arguments: dict[str, object],
) -> str:
    """Python that makes the tasks; names stand in it as string literals of one line."""
    height, width = scenario.image_size
    lines = ["import dynammo_peft as dp", "from transformers import AutoImageProcessor", ""]
    if dataset_id is None:
        lines.append("# train, test: the training and the test images, each a datasets.Dataset")
    else:
        given = "".join(f", {option}={name!r}" for option, name in zip(("train_split", "test_split"), splits))
        lines.append(f"train, test = dp.load_image_dataset({dataset_id!r}{given})")
    if base_model is None:
        lines.append(f"# image_processor: one that gives images of {height} x {width} pixels")
    else:
        lines.append(f"image_processor = AutoImageProcessor.from_pretrained({base_model!r})")
        if height == width:
            lines.append(f"image_processor = dp.resized_image_processor(image_processor, {height})")
    lines += ["groups = [", *(f"    {list(group)!r}," for group in scenario.groups), "]"]
    given = "".join(f", {option}={value!r}" for option, value in arguments.items())
    lines.append(f"scenario = dp.ClassIncrementalScenario(train, test, image_processor, groups=groups{given})")
    return "\n".join(lines)

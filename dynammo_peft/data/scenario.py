"""Tasks from a data set: which classes come when, and their images as tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .images import LabelledImages
from .sources import ImageData, ImageSource
from .transforms import BatchTransform


@dataclass(frozen=True)
class Task:
    """A group of classes that arrives together.

    Args:
        index (`int`): 0 for the first task.
        class_names (`list[str]`): Its classes.
        first_class (`int`): Number of the first of them; they are numbered on from it.
        train (`LabelledImages`): Training images.
        test (`LabelledImages`): Test images.
    """

    index: int
    class_names: list[str]
    first_class: int
    train: LabelledImages
    test: LabelledImages

    @property
    def classes(self) -> range:
        """Numbers of its classes."""
        return range(self.first_class, self.first_class + len(self.class_names))

    @property
    def seen_classes(self) -> int:
        """Number of classes learned once this task is learned."""
        return self.first_class + len(self.class_names)


class ClassIncrementalScenario:
    """
    A sequence of tasks with new classes each, over any image data set with class labels.

    Every image is decoded and resized once, when the scenario is made, so that a broken file is found before training.

    Args:
        train (`Union[datasets.Dataset, datasets.IterableDataset]`): Training images.
        test (`Optional[ImageData]`): Test images with the same label names; may be `None` if `validation_fraction` is
            set.
        image_processor (`BaseImageProcessor`): The backbone's image processor.
        classes_per_task (`Optional[int]`): Classes in each task; the last may have fewer.
        groups (`Optional[Sequence[Sequence[str]]]`): The class names of each task, instead of `classes_per_task`.
        class_order (`Optional[Sequence[str]]`): Class names in the order of their arrival. If `None`, the order of the
            labels, or a random one by `seed`.
        seed (`Optional[int]`): Shuffles the class order (and draws the held-out images).
        validation_fraction (`float`): If positive, this share of each class's training images is held out and takes
            the place of `test`, which is then not read at all. For choosing settings.
        image_column (`str`): Column of the images.
        label_column (`str`): Column of the labels, a `ClassLabel`.
        horizontal_flip (`bool`): Whether training images are mirrored left to right at random.
        vertical_flip (`bool`): Whether training images are mirrored top to bottom at random.
        crop_padding (`float`): Share of height and width by which training images are shifted at most.
        learned (`Sequence[Sequence[str]]`): Class names of tasks that were learned before; the tasks of this scenario
            go on behind them. The data set need not have images of theirs; test images that it has are scored too.
        exemplar_rows (`Sequence[int]`): Rows of `train` with exemplars of the classes learned before.
        cache_dir (`Optional[Union[str, os.PathLike]]`): Folder for the decoded images, read from there batch by batch
            and found again by other class orders, seeds and processes; see [`ImageSource`]. Streams need one. Images
            lie there as they are: guard and delete it like the data set itself. If `None`, they are kept in memory.
        progress (`bool`): Whether to show a progress bar while images are decoded.

    Attributes:
        train (`LabelledImages`): Training images of all tasks.
        test (`LabelledImages`): Test images of all tasks.

    Raises:
        ValueError: If a column is missing or no class label, the tasks do not partition the classes, a task has no
            images, an image cannot be read, or `cache_dir` cannot be written.

    Example:

        ```py
        >>> scenario = ClassIncrementalScenario(data["train"], data["test"], processor, classes_per_task=2, seed=0)
        >>> [task.class_names for task in scenario]
        [['monocyte', 'platelet'], ['basophil', 'erythroblast']]
        ```
    """

    def __init__(
        self,
        train: ImageData,
        test: Optional[ImageData],
        image_processor: Any,
        *,
        classes_per_task: Optional[int] = None,
        groups: Optional[Sequence[Sequence[str]]] = None,
        class_order: Optional[Sequence[str]] = None,
        seed: Optional[int] = None,
        validation_fraction: float = 0.0,
        image_column: str = "image",
        label_column: str = "label",
        horizontal_flip: bool = True,
        vertical_flip: bool = False,
        crop_padding: float = 0.125,
        learned: Sequence[Sequence[str]] = (),
        exemplar_rows: Sequence[int] = (),
        cache_dir: Optional[Union[str, os.PathLike]] = None,
        progress: bool = True,
    ) -> None:
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction={validation_fraction} must be at least 0 and less than 1.")
        reading = (image_processor, image_column, label_column, cache_dir, progress)
        source = ImageSource(train, "train", *reading)
        names = source.class_names
        before = [name for group in learned for name in group]
        coming = _make_groups(names, classes_per_task, groups, class_order, seed, before)
        self.first_task = len(learned)
        self.groups = [list(group) for group in learned] + coming
        self.class_names = [name for group in self.groups for name in group]
        if validation_fraction > 0:
            train_labels, test_source = source.labels, source
            _check_can_be_split(train_labels, names, self.class_names, validation_fraction)
            train_labels, test_labels = _hold_out(train_labels, validation_fraction, seed or 0)
        elif test is None:
            raise ValueError("There are no test images; give a test set, or hold some out by validation_fraction=0.2.")
        else:
            test_source = ImageSource(test, "test", *reading)
            if test_source.class_names != names:
                raise ValueError(
                    f"The classes of column {label_column!r} differ between train and test; make them equal."
                )
            train_labels, test_labels = source.labels, test_source.labels
        # A class's number is its place in the order of arrival; rows of classes that no task has get -1, as do rows
        # that belong to the other part of a split.
        order = torch.tensor(
            [self.class_names.index(name) if name in self.class_names else -1 for name in names] + [-1]
        )
        train_labels, test_labels = order[train_labels], order[test_labels]
        self.exemplar_rows = list(exemplar_rows)
        train_labels = _only_exemplars(train_labels, len(before), self.exemplar_rows)
        self._check_all_tasks_have_images(train_labels, "train")
        self._check_all_tasks_have_images(test_labels, "test")
        self.train = source.images(train_labels, "training images")
        self.test = test_source.images(test_labels, "test images")
        for height, width in {self.test.image_size} - {self.image_size}:
            raise ValueError(
                f"Training images come out as {self.image_size[0]}x{self.image_size[1]} pixels, test images as "
                f"{height}x{width}; use an image processor that resizes to one height and width."
            )
        self.transform = BatchTransform.from_image_processor(
            image_processor, horizontal_flip=horizontal_flip, vertical_flip=vertical_flip, crop_padding=crop_padding
        )

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"Task {index} does not exist; there are {len(self)}.")
        first = sum(len(group) for group in self.groups[:index])
        classes = range(first, first + len(self.groups[index]))
        return Task(
            index=index,
            class_names=list(self.groups[index]),
            first_class=first,
            train=self.train.of_classes(classes),
            test=self.test.of_classes(classes),
        )

    def __iter__(self) -> Iterator[Task]:
        return (self[index] for index in range(self.first_task, len(self)))

    @property
    def learned_classes(self) -> int:
        """Number of classes that were learned before the first task to come."""
        return sum(len(group) for group in self.groups[: self.first_task])

    @property
    def exemplars(self) -> LabelledImages:
        """The images in `exemplar_rows`, in their order."""
        return self.train.of_rows(self.exemplar_rows)

    @property
    def learned_test(self) -> LabelledImages:
        """Test images of the classes that were learned before; there may be none."""
        return self.test.of_classes(range(self.learned_classes))

    @property
    def num_classes(self) -> int:
        """Number of classes of all tasks."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.train.image_size

    def task_of_class(self) -> list[int]:
        """The task of each class, in the order of the classes' numbers."""
        return [index for index, group in enumerate(self.groups) for _ in group]

    def _check_all_tasks_have_images(self, labels: Tensor, split: str) -> None:
        present = set(labels.tolist())
        for index, group in list(enumerate(self.groups))[self.first_task :]:
            missing = [name for name in group if self.class_names.index(name) not in present]
            if missing:
                raise ValueError(
                    f"Task {index} has no {split} images of {', '.join(map(repr, missing))}; add images or take the "
                    "class out of groups."
                )


def _only_exemplars(labels: Tensor, learned: int, rows: Sequence[int]) -> Tensor:
    """Labels of the rows to learn from: of the classes learned before, the exemplars only; -1 for the other rows."""
    for row in rows:
        if not 0 <= row < len(labels) or not 0 <= labels[row] < learned:
            raise ValueError(
                f"Row {row} of exemplar_rows is no training image of a class that was learned before; the rows are "
                "those of another data set."
            )
    kept = torch.zeros_like(labels, dtype=torch.bool)
    kept[list(rows)] = True
    return labels.where((labels >= learned) | kept, -1)


def _make_groups(
    names: list[str],
    classes_per_task: Optional[int],
    groups: Optional[Sequence[Sequence[str]]],
    class_order: Optional[Sequence[str]],
    seed: Optional[int],
    learned: Sequence[str],
) -> list[list[str]]:
    """The class names of each task to come."""
    for name in [name for group in groups or () for name in group] + list(class_order or ()):
        if name in learned:
            raise ValueError(f"Class {name!r} was learned already; a task brings new classes.")
    names = [name for name in names if name not in learned]
    if not names:
        raise ValueError("All classes of the data set were learned already; a task brings new classes.")
    if (classes_per_task is None) == (groups is None):
        raise ValueError("Set either classes_per_task (a number) or groups (the class names of each task).")
    if groups is not None:
        if class_order is not None:
            raise ValueError("groups gives the order of the classes already; leave class_order out.")
        if not groups:
            raise ValueError("groups=[] has no task; name the classes of each task.")
        _check_names([name for group in groups for name in group], names, "groups")
        for index, group in enumerate(groups):
            if not group:
                raise ValueError(f"Task {index} of groups has no classes, and so no images; take it out.")
        return [list(group) for group in groups]
    if classes_per_task < 1:
        raise ValueError(f"classes_per_task={classes_per_task} must be at least 1.")
    if class_order is not None:
        _check_names(class_order, names, "class_order")
        order = list(class_order)
    elif seed is not None:
        shuffled = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        order = [names[index] for index in shuffled.tolist()]
    else:
        order = names
    return [order[start : start + classes_per_task] for start in range(0, len(order), classes_per_task)]


def _check_names(given: Sequence[str], names: list[str], option: str) -> None:
    for position, name in enumerate(given):
        if name not in names:
            raise ValueError(f"{option} names the class {name!r}; the data set has {', '.join(map(repr, names))}.")
        if name in given[:position]:
            raise ValueError(f"{option} names the class {name!r} again, already learned before; name each class once.")


def _check_can_be_split(labels: Tensor, names: list[str], used: list[str], fraction: float) -> None:
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    for name, count in zip(names, counts):
        if name in used and not 0 < round(fraction * count) < count:
            raise ValueError(
                f"validation_fraction={fraction} of the {count} train images of {name!r} leaves none on one side; "
                "change it or add images."
            )


def _hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels of the rows that stay and of those held out, class by class; -1 for the other rows.

    Which images are held out depends on the data set and the seed, not on the order of the classes.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        rows = torch.nonzero(labels == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held[rows[: round(fraction * len(rows))]] = True
    return labels.where(~held, -1), labels.where(held, -1)

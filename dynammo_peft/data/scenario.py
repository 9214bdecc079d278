"""Tasks from a data set: which classes come when, and their images as tensors."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .division import Domains, DomainValue, check_can_be_split, divide, hold_out, make_groups
from .images import LabelledImages
from .sources import ImageData, ImageSource
from .transforms import BatchTransform


# Instead of a task: images of classes learned before the first task to come, and images that nobody needs.
BEFORE, DROPPED = -1, -2


@dataclass(frozen=True)
class Task:
    """Images of some classes that arrive together: of new classes, of known ones, or of both.

    Args:
        index (`int`): 0 for the first task.
        class_names (`list[str]`): Its classes.
        classes (`list[int]`): Their numbers, in the same order. Classes are numbered as they first appear.
        first_class (`int`): Number of classes known before it; its new classes are numbered on from it.
        train (`LabelledImages`): Training images.
        test (`LabelledImages`): Test images; there may be none if all its classes were known before.
    """

    index: int
    class_names: list[str]
    classes: list[int]
    first_class: int
    train: LabelledImages
    test: LabelledImages

    @property
    def new_classes(self) -> list[int]:
        """Numbers of the classes that no earlier task has."""
        return [label for label in self.classes if label >= self.first_class]

    @property
    def seen_classes(self) -> int:
        """Number of classes learned once this task is learned."""
        return self.first_class + len(self.new_classes)

    def places(self, labels: Tensor) -> Tensor:
        """The place of each label among `classes`, `(B,)`; -1 for classes of other tasks only."""
        same = labels[:, None] == torch.tensor(self.classes, device=labels.device)
        return torch.where(same.any(dim=1), same.long().argmax(dim=1), -1)


class ClassIncrementalScenario:
    """
    A sequence of tasks over any image data set with class labels: new classes, or new images of known ones.

    Where several tasks name a class, its images are divided among them, by `domains` or else at random into equal
    parts. Of its test images each task has those of its domains; without domains the first task has all of them.

    Every image is decoded and resized once, when the scenario is made, so that a broken file is found before training.

    Args:
        train (`Union[datasets.Dataset, datasets.IterableDataset]`): Training images.
        test (`Optional[ImageData]`): Test images with the same label names; may be `None` if `validation_fraction` is
            set.
        image_processor (`BaseImageProcessor`): The backbone's image processor.
        classes_per_task (`Optional[int]`): Classes in each task; the last may have fewer.
        groups (`Optional[Sequence[Sequence[str]]]`): The class names of each task, instead of `classes_per_task`. A
            class may come in several tasks.
        class_order (`Optional[Sequence[str]]`): Class names in the order of their arrival. If `None`, the order of the
            labels, or a random one by `seed`.
        seed (`Optional[int]`): Shuffles the class order (and draws the held-out images, and the parts of classes that
            come back).
        validation_fraction (`float`): If positive, this share of each class's training images is held out and takes
            the place of `test`, which is then not read at all. For choosing settings. No image that was trained on
            before is held out: of classes learned before only new images of a task to come, and no exemplars.
        image_column (`str`): Column of the images.
        label_column (`str`): Column of the labels, a `ClassLabel`.
        domain_column (`Optional[str]`): Column that says of which domain an image is (a hospital, a camera): strings,
            whole numbers or a `ClassLabel`. A stream is gone through once more for it.
        domains (`Optional[Sequence[Union[str, int, Sequence[Union[str, int]]]]]`): For each task to come the value of
            that column, or several; the task has images of these only.
        horizontal_flip (`bool`): Whether training images are mirrored left to right at random.
        vertical_flip (`bool`): Whether training images are mirrored top to bottom at random.
        crop_padding (`float`): Share of height and width by which training images are shifted at most.
        learned (`Sequence[Sequence[str]]`): Class names of tasks that were learned before; the tasks of this scenario
            go on behind them. The data set need not have images of theirs; test images that it has are scored too.
            Where a task to come names such a class, its training images are new ones, but for exemplars.
        exemplar_rows (`Sequence[int]`): Rows of `train` with exemplars of the classes learned before.
        cache_dir (`Optional[Union[str, os.PathLike]]`): Folder for the decoded images, read from there batch by batch
            and found again by other class orders, seeds and processes; see [`ImageSource`]. Streams need one. Images
            lie there as they are: guard and delete it like the data set itself. If `None`, they are kept in memory.
        progress (`bool`): Whether to show a progress bar while images are decoded.

    Attributes:
        train (`LabelledImages`): Training images of all tasks.
        test (`LabelledImages`): Test images of all tasks.
        tasks_of_train (`Tensor`): The task of each training image, `(N,)`; -1 for exemplars of earlier ones.
        tasks_of_test (`Tensor`): The task of each test image, `(N,)`; -1 for those of classes learned before.

    Raises:
        ValueError: If a column is missing or no class label, a task names a class that does not exist, has no images
            of one, or has no `domains`, an image cannot be read, or `cache_dir` cannot be written.

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
        domain_column: Optional[str] = None,
        domains: Optional[Sequence[Union[DomainValue, Sequence[DomainValue]]]] = None,
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
        self.transform = BatchTransform.from_image_processor(
            image_processor, horizontal_flip=horizontal_flip, vertical_flip=vertical_flip, crop_padding=crop_padding
        )
        reading = (image_processor, image_column, label_column, cache_dir, progress)
        source = ImageSource(train, "train", *reading)
        names = source.class_names
        before = list(dict.fromkeys(name for group in learned for name in group))
        coming = make_groups(names, classes_per_task, groups, class_order, seed, before)
        self.first_task = len(learned)
        self.groups = [list(group) for group in learned] + coming
        self.class_names = list(dict.fromkeys(name for group in self.groups for name in group))
        self._numbers = {name: number for number, name in enumerate(self.class_names)}
        self.domains = Domains(domain_column, domains, len(coming))
        if validation_fraction > 0:
            test_source = source
        elif test is None:
            raise ValueError("There are no test images; give a test set, or hold some out by validation_fraction=0.2.")
        else:
            test_source = ImageSource(test, "test", *reading)
            if test_source.class_names != names:
                raise ValueError(
                    f"The classes of column {label_column!r} differ between train and test; make them equal."
                )
        labels, codes = self._labels(source)
        self.exemplar_rows = list(exemplar_rows)
        self._check_exemplars(labels)
        if validation_fraction > 0:
            possible = self._divide(labels, codes)
            possible[self.exemplar_rows] = DROPPED
            check_can_be_split(labels, codes, possible, validation_fraction, self.class_names, self.domains)
            held = hold_out(source.labels, codes, possible > DROPPED, validation_fraction, seed or 0)
            test_labels, test_codes = labels.where(held, -1), codes
            labels = labels.where(~held, -1)
        else:
            test_labels, test_codes = self._labels(test_source)
        tasks = self._train_tasks(labels, codes, seed or 0)
        self.train = source.images(labels.where(tasks > DROPPED, -1), "training images")
        self.tasks_of_train = tasks[self.train.rows]
        tasks = self._test_tasks(test_labels, test_codes)
        self.test = test_source.images(test_labels.where(tasks > DROPPED, -1), "test images")
        self.tasks_of_test = tasks[self.test.rows]
        for height, width in {self.test.image_size} - {self.image_size}:
            raise ValueError(
                f"Training images come out as {self.image_size[0]}x{self.image_size[1]} pixels, test images as "
                f"{height}x{width}; use an image processor that resizes to one height and width."
            )

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"Task {index} does not exist; there are {len(self)}.")
        return Task(
            index=index,
            class_names=list(self.groups[index]),
            classes=self._classes(index),
            first_class=self._known_before(index),
            train=self.train.select(self.tasks_of_train == index),
            test=self.test.select(self.tasks_of_test == index),
        )

    def __iter__(self) -> Iterator[Task]:
        return (self[index] for index in range(self.first_task, len(self)))

    @property
    def learned_classes(self) -> int:
        """Number of classes that were learned before the first task to come."""
        return self._known_before(self.first_task)

    @property
    def exemplars(self) -> LabelledImages:
        """The images in `exemplar_rows`, in their order."""
        return self.train.of_rows(self.exemplar_rows)

    @property
    def learned_test(self) -> LabelledImages:
        """Test images of the classes that were learned before, but for those of a task to come; there may be none."""
        return self.test.select(self.tasks_of_test == BEFORE)

    @property
    def num_classes(self) -> int:
        """Number of classes of all tasks."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.train.image_size

    def task_of_class(self) -> list[int]:
        """The task in which each class first appears, in the order of the classes' numbers."""
        return [next(task for task, group in enumerate(self.groups) if name in group) for name in self.class_names]

    def _classes(self, index: int) -> list[int]:
        return [self._numbers[name] for name in self.groups[index]]

    def _known_before(self, index: int) -> int:
        return len({name for group in self.groups[:index] for name in group})

    def _labels(self, source: ImageSource) -> tuple[Tensor, Tensor]:
        """The number of each row's class, -1 if no task has it, and the number of its domain, `(N,)` each."""
        order = torch.tensor([self._numbers.get(name, -1) for name in source.class_names])
        column, labels = self.domains.column, source.labels
        values = source.values(column, "domain_column") if column is not None else None
        return order[labels], self.domains.codes(values, len(labels), source.split)

    def _divide(self, labels: Tensor, codes: Tensor, generator: Optional[torch.Generator] = None) -> Tensor:
        """The task of each row, `(N,)`, `DROPPED` for those that no task to come has."""
        coming = [self._classes(index) for index in range(self.first_task, len(self))]
        tasks = divide(labels, codes, coming, self.domains, generator)
        return torch.where(tasks >= 0, tasks + self.first_task, DROPPED)

    def _check_exemplars(self, labels: Tensor) -> None:
        for row, times in Counter(self.exemplar_rows).items():
            if times > 1:
                raise ValueError(f"exemplar_rows names row {row} again; name each row once.")
            if not 0 <= row < len(labels) or not 0 <= labels[row] < self.learned_classes:
                raise ValueError(
                    f"Row {row} of exemplar_rows is no training image of a class that was learned before; the rows "
                    "are those of another data set."
                )

    def _train_tasks(self, labels: Tensor, codes: Tensor, seed: int) -> Tensor:
        exemplars = torch.zeros_like(labels, dtype=torch.bool)
        exemplars[self.exemplar_rows] = True
        tasks = self._divide(labels.where(~exemplars, -1), codes, torch.Generator().manual_seed(seed))
        coming = range(self.first_task, len(self))
        self._check_all_tasks_have_images([labels[tasks == index] for index in coming], "train")
        return tasks.where(~exemplars, BEFORE)

    def _test_tasks(self, labels: Tensor, codes: Tensor) -> Tensor:
        # Tasks may share test images, of which the first has all: each task needs some, wherever they are.
        self._check_all_tasks_have_images([labels[part] for part in self.domains.masks(codes)], "test")
        tasks = self._divide(labels, codes)
        known = (labels >= 0) & (labels < self.learned_classes)
        # Without domains a class that was learned before has its test images there.
        free = tasks == DROPPED if self.domains.column is not None else known
        return tasks.where(~(known & free), BEFORE)

    def _check_all_tasks_have_images(self, parts: Sequence[Tensor], split: str) -> None:
        """Raises a `ValueError` unless there are images of all classes of each task to come among its labels."""
        for part, labels in enumerate(parts):
            index, present = self.first_task + part, set(labels.tolist())
            missing = [name for name in self.groups[index] if self._numbers[name] not in present]
            if missing:
                raise ValueError(
                    f"Task {index} has no {split} images of {', '.join(map(repr, missing))}"
                    f"{self.domains.describe(part)}; add images or take the class out of groups."
                )

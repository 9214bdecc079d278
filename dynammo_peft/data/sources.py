"""A data set or a stream as decoded images: its columns, its labels, and where its images are kept."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Optional, Union

import datasets
import torch
from datasets.fingerprint import Hasher
from torch import Tensor
from tqdm.auto import tqdm

from .cache import MappedImages, open_cache
from .images import LabelledImages
from .transforms import decode_images, iterate_decoded, raw_examples


ImageData = Union[datasets.Dataset, datasets.IterableDataset]


class ImageSource:
    """
    One split of a data set.

    With `cache_dir` all rows are decoded into a file, once, also those of classes that no task has; without it those
    that are asked for, into memory. A stream is gone through once, when its labels are asked for.

    The file is found again for the same data set, columns and image processor. A data set is known by the fingerprint
    that `datasets` gives it. A stream has none: it is known by where its files are and what is done to them (shards,
    filters, shuffling), not by what is in them. If files change under the same names, delete the folder.

    The file holds the images as they are, and only the user can read it. Where they are of patients, the folder is to
    be guarded like the data set itself, and deleted with it.

    Args:
        dataset (`Union[datasets.Dataset, datasets.IterableDataset]`): Images with class labels.
        split (`str`): What error messages call it.
        image_processor (`BaseImageProcessor`): Resizes and crops.
        image_column (`str`): Column of the images.
        label_column (`str`): Column of the labels, a `ClassLabel`.
        cache_dir (`Optional[Union[str, os.PathLike]]`): Folder for the decoded images; in memory if `None`.
        progress (`bool`): Whether to show a progress bar while images are decoded.

    Raises:
        ValueError: If a column is missing, no image or no class label, or a stream has no `cache_dir`.

    Attributes:
        class_names (`list[str]`): In the order of the data set's labels.
    """

    def __init__(
        self,
        dataset: ImageData,
        split: str,
        image_processor: Any,
        image_column: str,
        label_column: str,
        cache_dir: Optional[Union[str, os.PathLike]],
        progress: bool,
    ) -> None:
        if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            raise ValueError(
                f"The {split} set is a {type(dataset).__name__}; give a datasets.Dataset or IterableDataset, as one "
                "split of a DatasetDict."
            )
        self.dataset = dataset
        self.split = split
        self.image_processor = image_processor
        self.image_column = image_column
        self.label_column = label_column
        self.cache_dir = cache_dir
        self.progress = progress
        self.is_stream = isinstance(dataset, datasets.IterableDataset)
        # Not to a temporary folder: images of patients are written where they are meant to be, or not at all.
        if self.is_stream and cache_dir is None:
            raise ValueError(
                f"The {split} set is a stream, whose images pass once; set cache_dir to a folder for the decoded ones."
            )
        self.class_names = self._class_names()

    @cached_property
    def labels(self) -> Tensor:
        """The data set's own label of each row, `(N,)`."""
        if self.is_stream:
            return self._cache.labels
        # Whatever format or transform others read it in.
        labels = self.dataset.with_format(None)[self.label_column][:]
        for row, label in enumerate(labels):
            self._check_label(row, label)
        return torch.tensor(labels, dtype=torch.long)

    def values(self, column: str, option: str) -> list[Union[str, int]]:
        """What a column says of each row; a stream is gone through once more, for this column alone.

        Args:
            column (`str`): Its name: strings, whole numbers, or a `ClassLabel`, whose names are taken.
            option (`str`): The option that names it, for messages.

        Raises:
            ValueError: If the column is missing or of another type, or a row has no value.
        """
        self._check_column(column, option)
        feature = self.dataset.features[column]
        dtype = getattr(feature, "dtype", "")
        if not isinstance(dtype, str) or not dtype.startswith(("string", "large_string", "int", "uint")):
            raise ValueError(
                f"Column {column!r} of the {self.split} set is {feature}; {option} needs strings or whole numbers."
            )
        plain = self.dataset.with_format(None).select_columns([column])
        values = [example[column] for example in plain] if self.is_stream else plain[column][:]
        named = isinstance(feature, datasets.ClassLabel)
        for row, value in enumerate(values):
            # A number below zero stands for no name, and would be taken for one of the last.
            if value is None or (named and value < 0):
                raise ValueError(
                    f"Row {row} of the {self.split} set has no value in column {column!r}; fill it in, or remove it."
                )
        if len(values) != len(self.labels):
            raise ValueError(
                f"The {self.split} stream has {len(values)} rows now and had {len(self.labels)} when its images were "
                "decoded; delete cache_dir, or give it the same rows each time."
            )
        return [feature.names[value] for value in values] if named else list(values)

    def images(self, labels: Tensor, name: str) -> LabelledImages:
        """The images of some rows.

        Args:
            labels (`Tensor`): A label for each row, `(N,)`; rows with -1 are left out.
            name (`str`): What the progress bar calls them.
        """
        rows = torch.nonzero(labels >= 0).flatten()
        if self.cache_dir is not None:
            return LabelledImages(self._cache, labels[rows], rows, places=rows)
        chosen, dataset = rows.tolist(), self.dataset
        images = decode_images(
            dataset.select(chosen), self.image_column, self.image_processor, self.progress, name, chosen
        )
        return LabelledImages(images, labels[rows], rows)

    @cached_property
    def _cache(self) -> MappedImages:
        facts = {
            "data": self._fingerprint(),
            "columns": [self.image_column, self.label_column],
            # The type too: those of one name that resize by other libraries give other pixels.
            "image_processor": [type(self.image_processor).__name__, self.image_processor.to_dict()],
        }
        count, newest = (None, 0.0) if self.is_stream else (len(self.dataset), self._newest())
        return open_cache(self.cache_dir, facts, self._decoded, count, newest)

    def _fingerprint(self) -> str:
        """Tells the data set from all others: for a stream where its files are and what is done to them."""
        if not self.is_stream:
            return self.dataset._fingerprint
        # How far it was read by others does not matter.
        steps = copy.deepcopy(self.dataset._ex_iterable)
        steps._init_state_dict()
        try:
            return Hasher.hash([steps, self.dataset.features, self.dataset.epoch, self.dataset._distributed])
        except Exception as error:  # Whatever pickling its functions raises.
            raise ValueError(
                f"The {self.split} stream cannot be told from other ones, since its functions cannot be pickled "
                f"({type(error).__name__}: {error}); use functions of a module, without open files or locks."
            ) from error

    def _newest(self) -> float:
        """When one of the files that rows name was last changed, in seconds; those that are gone do not count."""
        newest = 0.0
        for batch in self.dataset.with_format("arrow").select_columns([self.image_column]).iter(1024):
            content, path = batch[self.image_column].combine_chunks().flatten()
            for name, held in zip(path.to_pylist(), content.is_valid().to_pylist()):
                if name is not None and not held and os.path.isfile(name):
                    newest = max(newest, os.stat(name).st_mtime)
        return newest

    def _decoded(self) -> Iterator[tuple[Tensor, int]]:
        """Images and labels of all rows."""
        examples = raw_examples(self.dataset, [self.image_column, self.label_column], self.image_column)
        decoded = iterate_decoded(examples, self.image_column, self.image_processor)
        total = None if self.is_stream else len(self.dataset)
        bar = tqdm(decoded, total=total, desc=f"Decoding {self.split} images", disable=not self.progress)
        row = -1
        for row, (pixels, example) in enumerate(bar):
            self._check_label(row, example[self.label_column])
            yield pixels, example[self.label_column]
        if row < 0:
            raise ValueError(f"The {self.split} set has no images.")

    def _check_label(self, row: int, label: Optional[int]) -> None:
        if label is None or label < 0:
            raise ValueError(
                f"Row {row} of the {self.split} set has no label in column {self.label_column!r}; remove it."
            )

    def _check_column(self, column: str, option: str) -> None:
        if column not in self.dataset.features:
            raise ValueError(
                f"The {self.split} set has no column {column!r}; set {option} to one of "
                f"{', '.join(map(repr, self.dataset.features))}."
            )

    def _class_names(self) -> list[str]:
        """Names of the classes, after both columns were checked."""
        features, split = self.dataset.features, self.split
        if features is None:
            raise ValueError(
                f"The {split} stream does not say which columns it has; tell it by `dataset.cast(datasets.Features("
                f"{{{self.image_column!r}: datasets.Image(), {self.label_column!r}: "
                "datasets.ClassLabel(names=[...])}))`."
            )
        for column, option in ((self.image_column, "image_column"), (self.label_column, "label_column")):
            self._check_column(column, option)
        image, label = features[self.image_column], features[self.label_column]
        if not isinstance(image, datasets.Image):
            raise ValueError(
                f"Column {self.image_column!r} of the {split} set is no Image but {type(image).__name__}; "
                "convert it by `dataset.cast_column(column, datasets.Image())`."
            )
        if image.mode not in (None, "RGB"):
            raise ValueError(
                f"Column {self.image_column!r} of the {split} set has images in mode={image.mode!r}, and all are read "
                "in colour; convert the images themselves, or `dataset.cast_column(column, datasets.Image())`."
            )
        if not self.is_stream and self.dataset.format["type"] == "custom":
            warnings.warn(
                f"The {split} set has a transform (`with_transform`), which is not applied to the images that are "
                "learned from; use `map` for what is to be done to them.",
                stacklevel=4,
            )
        if not isinstance(label, datasets.ClassLabel):
            how = f"class_encode_column({self.label_column!r})"
            if self.is_stream:
                how = f"cast_column({self.label_column!r}, datasets.ClassLabel(names=[...]))"
            raise ValueError(
                f"Column {self.label_column!r} of the {split} set is no ClassLabel but {type(label).__name__}; "
                f"convert it by `dataset.{how}`."
            )
        return list(label.names)

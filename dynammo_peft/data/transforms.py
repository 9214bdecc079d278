"""Images to tensors: decoded and resized once, augmented and normalised a batch at a time."""

from __future__ import annotations

import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Optional, TypeVar, Union

import datasets
import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm


_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def decode_images(
    dataset: datasets.Dataset,
    column: str,
    image_processor: Any,
    progress: bool = True,
    name: str = "images",
    rows: Optional[Sequence[int]] = None,
) -> Tensor:
    """Decodes, converts to RGB, and resizes all images of a data set, in parallel.

    Args:
        dataset (`datasets.Dataset`): Has an image column.
        column (`str`): Its name.
        image_processor (`BaseImageProcessor`): A transformers image processor; resizes and crops.
        progress (`bool`): Whether to show a progress bar.
        name (`str`): What the progress bar calls the images.
        rows (`Optional[Sequence[int]]`): What error messages call the rows; their own numbers if `None`.

    Returns:
        `Tensor`: `(N, 3, H, W)`, `uint8`.

    Raises:
        ValueError: If a file is missing or no image (with its path), or images come out in different sizes.
    """
    images = None
    decoded = iterate_decoded(raw_examples(dataset, [column], column), column, image_processor, rows)
    for place, (pixels, _) in enumerate(
        tqdm(decoded, total=len(dataset), desc=f"Decoding {name}", disable=not progress)
    ):
        if images is None:
            images = torch.empty(len(dataset), *pixels.shape, dtype=torch.uint8)
        images[place] = pixels
    if images is None:
        raise ValueError(f"There are no {name} to decode; the data set has no rows.")
    return images


def raw_examples(
    dataset: Union[datasets.Dataset, datasets.IterableDataset], columns: Sequence[str], image_column: str
) -> Iterable[dict[str, Any]]:
    """The rows of a data set as plain values, its images as the bytes or the path of a file."""
    plain = dataset.select_columns(list(columns)).with_format(None)
    return plain.cast_column(image_column, datasets.Image(decode=False))


def iterate_decoded(
    examples: Iterable[dict[str, Any]], column: str, image_processor: Any, rows: Optional[Iterable[int]] = None
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Decodes, converts to RGB, and resizes images in parallel; few at a time are in memory.

    Args:
        examples (`Iterable[dict[str, Any]]`): From [`raw_examples`]; gone through once.
        column (`str`): Column of the images.
        image_processor (`BaseImageProcessor`): A transformers image processor; resizes and crops.
        rows (`Optional[Iterable[int]]`): What error messages call the rows; counted if `None`.

    Yields:
        `tuple[Tensor, dict[str, Any]]`: `(3, H, W)`, `uint8`, and the example; in order.

    Raises:
        ValueError: If a file is missing or no image (with its path), or images come out in different sizes.
    """

    def load(numbered: tuple[int, dict[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
        row, example = numbered
        return _decode(example[column], row, image_processor), example

    first = None
    for pixels, example in _in_order(load, zip(itertools.count() if rows is None else rows, examples)):
        first = pixels.shape if first is None else first
        if pixels.shape != first:
            sizes = sorted([tuple(first[1:]), tuple(pixels.shape[1:])])
            raise ValueError(
                f"Images come out in different sizes ({' and '.join(f'{h}x{w}' for h, w in sizes)}); use an image "
                "processor that resizes to one height and width."
            )
        yield pixels, example


def _in_order(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Results of a function in the order of the items, by several threads; the items are not read far ahead."""
    workers = os.cpu_count() or 1
    pool, pending = ThreadPoolExecutor(max_workers=workers), deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(source: Any, row: int, image_processor: Any) -> Tensor:
    """What a row has: a file's bytes or path, or an image that a stream's filter or map has decoded."""
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _pixels(_to_rgb(ImageOps.exif_transpose(source)), image_processor)
    if source is None or (source["bytes"] is None and source["path"] is None):
        raise ValueError(f"Row {row} has no image; remove it.")
    where = source["path"] or f"of row {row}"
    try:
        with Image.open(_file(source)) as file:
            image = _to_rgb(ImageOps.exif_transpose(file))
    # Decoders of some formats raise a RuntimeError.
    except (Image.DecompressionBombError, OSError, RuntimeError, SyntaxError, ValueError) as error:
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"Image {where} cannot be read ({reason}); repair or remove it.") from error
    return _pixels(image, image_processor)


def _pixels(image: Image.Image, image_processor: Any) -> Tensor:
    """An image as the processor resizes and crops it, `(3, H, W)`, `uint8`."""
    processed = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    pixels = processed["pixel_values"][0]
    return pixels if pixels.dtype == torch.uint8 else pixels.round().clamp(0, 255).to(torch.uint8)


def _file(source: dict[str, Any]) -> Union[str, BytesIO]:
    """What Pillow can open: a path, or the bytes of a file that is elsewhere or within an archive (streams)."""
    content, path = source["bytes"], source["path"]
    if content is None and "://" in path:
        with fsspec.open(path, "rb") as remote:
            content = remote.read()
    return path if content is None else BytesIO(content)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits and three channels; of 16-bit grey values (X-rays) the upper eight, where PIL would clip at 255."""
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image))
    scale, most = (256, 65535) if image.mode.startswith("I") else (1, 255)
    grey = (values // scale).clip(0, 255).astype(np.uint8)
    if ((values < 0) | (values > most)).mean() > 0.01:
        warnings.warn(
            f"Images of PIL's mode {image.mode!r} are taken to have grey values from 0 to {most}, and some have "
            "others, which become black or white. Save them with 8 bits.",
            stacklevel=2,
        )
    if values.max() > values.min() and grey.max() < 16:
        # Without a path, so that it is said once.
        warnings.warn(
            f"Images of PIL's mode {image.mode!r} are taken to have grey values from 0 to {most}, and some have none "
            f"above {16 * scale - 1}: they become all but black. If theirs are of another range, as 12 bits or 0 to "
            "1, save them with 8 bits.",
            stacklevel=2,
        )
    return Image.fromarray(grey).convert("RGB")


def resized_image_processor(image_processor: Any, image_size: int) -> Any:
    """A copy of a transformers image processor that gives square images of `image_size` pixels.

    A processor that resizes the shorter edge and crops the centre goes on doing so; others stretch.
    """
    settings = image_processor.to_dict()
    square = {"height": image_size, "width": image_size}
    crops_to_size = bool(settings.get("crop_size")) and bool(settings.get("do_center_crop"))
    keeps_aspect = image_processor.size.shortest_edge and (crops_to_size or "crop_pct" in settings)
    settings["size"] = {"shortest_edge": image_size} if keeps_aspect else square
    if settings.get("crop_size"):
        settings["crop_size"] = square
    return type(image_processor).from_dict(settings)


@dataclass(frozen=True)
class BatchTransform:
    """Flips, crops and normalises a batch of `uint8` images on the device it is on.

    Args:
        mean (`Sequence[float]`): Mean of each channel after scaling to 0..1.
        std (`Sequence[float]`): Standard deviation of each channel.
        horizontal_flip (`bool`): Whether to mirror half of the images left to right.
        vertical_flip (`bool`): Whether to mirror half of the images top to bottom (cells and tissue have no top).
        crop_padding (`float`): Images are padded by reflection by this share of their height and width and cropped
            back at a random place.

    Raises:
        ValueError: If there is nothing left to reflect.
    """

    mean: Sequence[float]
    std: Sequence[float]
    horizontal_flip: bool = True
    vertical_flip: bool = False
    crop_padding: float = 0.125

    def __post_init__(self) -> None:
        if not 0 <= self.crop_padding < 1:
            raise ValueError(f"crop_padding={self.crop_padding} must be at least 0 and less than 1.")

    @classmethod
    def from_image_processor(cls, image_processor: Any, **augmentation: Any) -> BatchTransform:
        """Normalises as `image_processor` would.

        Raises:
            ValueError: If the processor does more than to scale and to normalise once.
        """
        mean, std = [0.0] * 3, [1.0] * 3
        if getattr(image_processor, "do_normalize", True):
            mean, std = image_processor.image_mean, image_processor.image_std
        factor = image_processor.rescale_factor if getattr(image_processor, "do_rescale", True) else 1.0
        # Our mean and deviation are those of pixels from 0 to 1, whatever scale the processor has.
        mean, std = ((np.atleast_1d(values) / (255 * factor)).tolist() for values in (mean, std))
        transform = cls(mean=mean, std=std, **augmentation)
        _check_same(transform, image_processor)
        return transform

    @staticmethod
    def draw(count: int, generator: Optional[torch.Generator] = None) -> Tensor:
        """What decides on the augmentation of images, each on its own, whatever batch or process it comes to.

        Args:
            count (`int`): Number of images.
            generator (`Optional[torch.Generator]`): Source of randomness on the CPU; PyTorch's own if `None`.

        Returns:
            `Tensor`: Numbers from 0 to 1, `(count, 4)`: for the shift down and right, and for both flips.
        """
        return torch.rand(count, 4, generator=generator)

    def __call__(self, images: Tensor, drawn: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            images (`Tensor`): `(B, 3, H, W)`, `uint8`.
            drawn (`Optional[Tensor]`): From `draw`, of these images, `(B, 4)`: flips and crops them; without, images
                are normalised only.

        Returns:
            `Tensor`: `(B, 3, H, W)`, `float32`.
        """
        if drawn is not None:
            images = self._augment(images, drawn)
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1) * 255
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1) * 255
        return (images.float() - mean) / std

    def _augment(self, images: Tensor, drawn: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        down, right, vertical, horizontal = drawn.unbind(1)
        rows = _offsets(down, height, self.crop_padding)
        columns = _offsets(right, width, self.crop_padding)
        if self.vertical_flip:
            rows = _flip_some(rows, vertical)
        if self.horizontal_flip:
            columns = _flip_some(columns, horizontal)
        rows, columns = _reflect(rows, height).to(images.device), _reflect(columns, width).to(images.device)
        index = torch.arange(batch, device=images.device)[:, None, None, None]
        planes = torch.arange(channels, device=images.device)[None, :, None, None]
        return images[index, planes, rows[:, None, :, None], columns[:, None, None, :]]


def _check_same(transform: BatchTransform, image_processor: Any) -> None:
    """Raises a `ValueError` if the processor gives other values: inference would see other images than training."""
    # Smooth, so that rounding is all that can differ by where it resizes.
    down, right = np.mgrid[0:48, 0:48] / 47
    colours = np.stack([40 + 170 * down, 200 - 150 * right, np.full_like(down, 90)], axis=-1)
    image = Image.fromarray(colours.round().astype(np.uint8))
    settings: dict[str, Any] = {}
    if getattr(image_processor, "do_normalize", True):
        # Processors for grey images name one channel, and refuse three.
        mean, std = (np.broadcast_to(value, 3) for value in (image_processor.image_mean, image_processor.image_std))
        settings = {"image_mean": mean.tolist(), "image_std": std.tolist()}
    expected = image_processor(image, return_tensors="pt", **settings)["pixel_values"].float()
    own = transform(_pixels(image, image_processor)[None])
    levels = torch.tensor(transform.std).view(1, -1, 1, 1) * 255
    if own.shape != expected.shape or ((own - expected) * levels).abs().max() > 2:
        further = [name for name in ("include_top", "rescale_offset") if getattr(image_processor, name, False)]
        what = f"set {' and '.join(f'{name}=False' for name in further)}" if further else "take another processor"
        raise ValueError(
            f"{type(image_processor).__name__} does more to pixels than rescale_factor, image_mean and image_std say, "
            f"which training would leave out; {what}."
        )


def _offsets(drawn: Tensor, length: int, padding: float) -> Tensor:
    """Which pixel stands where after a random shift, `(B, length)`; may lie outside the image."""
    reach = round(length * padding)
    # Rounding may take a number close to 1 to 1.
    shift = (drawn * (2 * reach + 1)).long().clamp(max=2 * reach) - reach
    return torch.arange(length)[None, :] + shift[:, None]


def _flip_some(index: Tensor, drawn: Tensor) -> Tensor:
    return torch.where(drawn[:, None] < 0.5, index.flip(1), index)


def _reflect(index: Tensor, length: int) -> Tensor:
    """Indices beyond an edge, mirrored at it."""
    index = index.abs()
    return torch.where(index >= length, 2 * (length - 1) - index, index).clamp(0, length - 1)

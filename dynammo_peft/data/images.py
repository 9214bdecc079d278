"""Decoded images with labels, read a batch at a time from wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Optional, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate


class ImageStore(Protocol):
    """Decoded images: a tensor, or what reads like one.

    Args:
        shape (`Sequence[int]`): `(M, 3, H, W)`.
    """

    @property
    def shape(self) -> Sequence[int]: ...

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Copies of the images at some places, `(B, 3, H, W)`, `uint8`; `dim` is 0."""
        ...


class LabelledImages(Dataset):
    """Images and labels. Which images these are is kept as places in a store, so that a selection copies none.

    Args:
        images (`ImageStore`): A tensor `(M, 3, H, W)`, `uint8`, or another store.
        labels (`Tensor`): `(N,)`; a class's number is its place in the order in which classes are learned.
        rows (`Tensor`): `(N,)`; which row of the original data set each image is.
        places (`Optional[Tensor]`): `(N,)`; which image of the store each is. If `None`, all of them, in order.

    Raises:
        ValueError: If there are not as many images as labels and rows.
    """

    def __init__(self, images: ImageStore, labels: Tensor, rows: Tensor, places: Optional[Tensor] = None) -> None:
        self.store = images
        self.labels = labels
        self.rows = rows
        self.places = torch.arange(images.shape[0]) if places is None else places
        if not len(self.places) == len(labels) == len(rows):
            raise ValueError(
                f"There are {len(self.places)} images, {len(labels)} labels and {len(rows)} rows; give one of each "
                "for every image."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.store.index_select(0, self.places[index].view(1))[0], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> ImageBatch:
        index = torch.as_tensor(indices, dtype=torch.long)
        return ImageBatch(self.store.index_select(0, self.places[index]), self.labels[index])

    @property
    def images(self) -> Tensor:
        """All images at once, `(N, 3, H, W)`, `uint8`; for few, as they are copied into memory."""
        return self.store.index_select(0, self.places)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.store.shape[2], self.store.shape[3]

    def select(self, index: Tensor) -> LabelledImages:
        """The images at some places, or those for which a mask holds; copies no image."""
        return LabelledImages(self.store, self.labels[index], self.rows[index], self.places[index])

    def of_classes(self, classes: Sequence[int]) -> LabelledImages:
        """The images of some classes; copies no image."""
        return self.select(torch.isin(self.labels, torch.tensor(list(classes), dtype=self.labels.dtype)))

    def of_rows(self, rows: Sequence[int]) -> LabelledImages:
        """The images in some rows of the original data set, in the order of `rows`; copies no image."""
        places = {row: place for place, row in enumerate(self.rows.tolist())}
        return self.select(torch.tensor([places[row] for row in rows], dtype=torch.long))

    def copied(self) -> LabelledImages:
        """The same images in a tensor of their own, which keeps no other ones alive."""
        return LabelledImages(self.images, self.labels, self.rows)

    @staticmethod
    def concatenate(parts: Sequence[LabelledImages]) -> LabelledImages:
        """All images of several sets, in order; copies no image.

        Raises:
            ValueError: If images differ in size.
        """
        stores: list[ImageStore] = []
        for part in parts:
            for store in part.store.stores if isinstance(part.store, JoinedStores) else [part.store]:
                if not any(store is known for known in stores):
                    stores.append(store)
        joined = JoinedStores(stores) if len(stores) > 1 else stores[0]
        places = [joined.places_of(part) if len(stores) > 1 else part.places for part in parts]
        labels, rows = torch.cat([part.labels for part in parts]), torch.cat([part.rows for part in parts])
        return LabelledImages(joined, labels, rows, torch.cat(places))


class ImageBatch(Sequence):
    """Images of a batch and their labels: a sequence of pairs, which `collate_batch` need not put together.

    Args:
        images (`Tensor`): `(B, 3, H, W)`, `uint8`.
        labels (`Tensor`): `(B,)`.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images, self.labels)


class JoinedStores:
    """Several stores read as one, the first one's images first.

    Args:
        stores (`Sequence[ImageStore]`): Their images have one size.

    Raises:
        ValueError: If images differ in size.
    """

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        self.stores = list(stores)
        sizes = sorted({tuple(store.shape[2:]) for store in stores})
        if len(sizes) > 1:
            raise ValueError(
                f"Images of {' and '.join(f'{height}x{width}' for height, width in sizes)} pixels cannot be put "
                "together; use an image processor that resizes to one height and width."
            )
        counts = torch.tensor([0, *(store.shape[0] for store in stores)])
        self.starts = counts.cumsum(0)
        self.shape = (int(self.starts[-1]), *stores[0].shape[1:])

    def places_of(self, part: LabelledImages) -> Tensor:
        """Where the images of a part, whose store is among these or joins some of these, are in this one."""
        if not isinstance(part.store, JoinedStores):
            return part.places + self._start(part.store)
        starts = torch.tensor([self._start(store) for store in part.store.stores])
        which = part.store.which(part.places)
        return part.places - part.store.starts[which] + starts[which]

    def which(self, places: Tensor) -> Tensor:
        """Index of the store that each place is in, `(N,)`."""
        return torch.searchsorted(self.starts, places, right=True) - 1

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Copies of the images at some places, `(B, 3, H, W)`, `uint8`."""
        which = self.which(index)
        images = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8)
        for number in which.unique().tolist():
            own = torch.nonzero(which == number).flatten()
            images.index_copy_(0, own, self.stores[number].index_select(0, index[own] - self.starts[number]))
        return images

    def _start(self, store: ImageStore) -> int:
        return next(int(start) for known, start in zip(self.stores, self.starts) if known is store)


def collate_batch(batch: Any) -> Any:
    """What a `DataLoader` makes of a batch: images that come as one tensor stay so, anything else is put together."""
    if isinstance(batch, ImageBatch):
        return batch.images, batch.labels
    return default_collate(batch)


def data_loader(dataset: Dataset, batch_size: int, num_workers: int = 0, **options: Any) -> DataLoader:
    """A loader that reads a batch of [`LabelledImages`] in one go; other data sets as ever.

    Args:
        dataset (`Dataset`): Images or features, with labels.
        batch_size (`int`): Of them a batch.
        num_workers (`int`): Processes that read ahead. Reading a batch from memory, or from a file that memory holds,
            takes less than handing it over; they pay where the file is larger than memory and the disk is slow.
        options: Further options of `DataLoader`. Unless images are shuffled, or there is a `generator`, nothing is
            drawn from PyTorch's own source of randomness.
    """
    if not options.get("shuffle"):
        # Each pass draws a seed for workers, even if there are none, and would shift what dropout draws behind it.
        options.setdefault("generator", torch.Generator().manual_seed(0))
    # Workers end with each pass: those that stay would change what is drawn, and so the order of the second pass.
    return DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_batch, **options)

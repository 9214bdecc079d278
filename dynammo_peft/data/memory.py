"""The exemplar memory: a few images of each class learned so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from .images import LabelledImages


Selection = Literal["herding", "random", "closest_to_mean"]


def herding(features: Tensor, count: int, generator: Optional[torch.Generator] = None) -> Tensor:
    """Picks images one by one so that the mean of the picked stays closest to the mean of all.

    Rebuffi et al. 2017, "iCaRL", algorithm 4, on features of unit length. Any first few of the picked are the best
    few of their number, so that a memory can be shortened.

    Args:
        features (`Tensor`): Features of a class's images, `(N, C)`.
        count (`int`): How many to pick; all if there are fewer.
        generator (`Optional[torch.Generator]`): Not needed; herding has nothing random.

    Returns:
        `Tensor`: Places of the picked, in the order of picking, `(min(count, N),)`.
    """
    features = F.normalize(features.double(), dim=1)
    mean = features.mean(dim=0)
    chosen: list[int] = []
    total = torch.zeros_like(mean)
    for position in range(1, min(count, len(features)) + 1):
        distance = (mean - (total + features) / position).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen, dtype=torch.long)


def closest_to_mean(features: Tensor, count: int, generator: Optional[torch.Generator] = None) -> Tensor:
    """The images whose features, at unit length, are closest to the class mean; arguments as in `herding`."""
    features = F.normalize(features.double(), dim=1)
    return (features - features.mean(dim=0)).norm(dim=1).argsort(stable=True)[:count].cpu()


def random_choice(features: Tensor, count: int, generator: Optional[torch.Generator] = None) -> Tensor:
    """Images drawn without replacement; arguments as in `herding`."""
    return torch.randperm(len(features), generator=generator)[:count]


SELECTIONS: dict[str, Callable[[Tensor, int, Optional[torch.Generator]], Tensor]] = {
    "herding": herding,
    "random": random_choice,
    "closest_to_mean": closest_to_mean,
}


class ExemplarMemory:
    """
    At most `size` images in all, equally many of each class.

    Args:
        size (`int`): Images in all; 0 keeps none.
        selection (`Literal["herding", "random", "closest_to_mean"]`): How the images of a class are chosen.
        seed (`int`): For `selection="random"`.
    """

    def __init__(self, size: int, selection: Selection = "herding", seed: int = 0) -> None:
        if size < 0:
            raise ValueError(f"memory_size={size} must not be negative.")
        if selection not in SELECTIONS:
            raise ValueError(f"selection={selection!r} does not exist; choose one of {', '.join(SELECTIONS)}.")
        self.size = size
        self.selection = selection
        self.seed = seed
        self._classes: dict[int, LabelledImages] = {}

    def __len__(self) -> int:
        return sum(len(images) for images in self._classes.values())

    @property
    def classes(self) -> list[int]:
        """The classes remembered, in the order in which they came."""
        return list(self._classes)

    def quota(self, seen_classes: int) -> int:
        """Images a class once `seen_classes` classes are known.

        Raises:
            ValueError: If the memory is smaller than the number of classes, unless it keeps none at all.
        """
        if seen_classes > self.size > 0:
            raise ValueError(
                f"memory_size={self.size} is smaller than the {seen_classes} classes, so some would have no exemplar; "
                f"set memory_size to at least {seen_classes}, or to 0."
            )
        return self.size // seen_classes

    @property
    def rows(self) -> list[int]:
        """Which rows of the training data are remembered, class by class, in the order of their worth."""
        return [row for images in self._classes.values() for row in images.rows.tolist()]

    def restore(self, images: LabelledImages) -> None:
        """Remembers images that were chosen before, as `rows` names them, and forgets all others."""
        self._classes = {label: images.of_classes([label]).copied() for label in dict.fromkeys(images.labels.tolist())}

    def images(self) -> Optional[LabelledImages]:
        """All images remembered, class by class, or `None` if there are none yet."""
        return LabelledImages.concatenate(list(self._classes.values())).copied() if self._classes else None

    def images_of(self, class_names: Sequence[str]) -> LabelledImages:
        """All images remembered, if there are some of every class.

        Args:
            class_names (`Sequence[str]`): The classes seen, in the order of their numbers.

        Raises:
            ValueError: If the memory has none of a class.
        """
        missing = [name for label, name in enumerate(class_names) if not len(self._classes.get(label, ()))]
        if missing:
            raise ValueError(
                f"The memory has no exemplar of {', '.join(map(repr, missing))}; set memory_size to at least the "
                "number of classes, or use class statistics (heads='lda')."
            )
        return self.images()

    def update(self, new_images: LabelledImages, features: Tensor) -> None:
        """Takes in new classes and shortens the old ones, so that all have equally many images.

        Args:
            new_images (`LabelledImages`): All images of the new classes.
            features (`Tensor`): Their features, `(N, C)`.
        """
        new_classes = new_images.labels.unique().tolist()
        for label in new_classes:
            if label in self._classes:
                raise ValueError(f"Class {label} is in the memory already; a class is learned once.")
        quota = self.quota(len(self._classes) + len(new_classes))
        if quota == 0:
            return
        first = torch.arange(quota)
        # What is not remembered must not be kept: a selection alone would still have all images behind it.
        self._classes = {
            label: images.select(first[: len(images)]).copied() for label, images in self._classes.items()
        }
        generator = torch.Generator().manual_seed(self.seed + new_classes[0])
        for label in new_classes:
            places = torch.nonzero(new_images.labels == label).flatten()
            chosen = SELECTIONS[self.selection](features[places].cpu(), quota, generator)
            self._classes[label] = new_images.select(places[chosen]).copied()

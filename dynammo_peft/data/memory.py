"""The exemplar memory: a few images of each class learned so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from .images import LabelledImages


Selection = Literal["herding", "random", "closest_to_mean"]


def herding(
    features: Tensor, count: int, generator: Optional[torch.Generator] = None, weights: Optional[Tensor] = None
) -> Tensor:
    """Picks images one by one so that the mean of the picked stays closest to the mean of all.

    Rebuffi et al. 2017, "iCaRL", algorithm 4, on features of unit length. Any first few of the picked are the best
    few of their number, so that a memory can be shortened.

    Args:
        features (`Tensor`): Features of a class's images, `(N, C)`.
        count (`int`): How many to pick; all if there are fewer.
        generator (`Optional[torch.Generator]`): Not needed; herding has nothing random.
        weights (`Optional[Tensor]`): How many images each stands for, `(N,)`; all for one if `None`.

    Returns:
        `Tensor`: Places of the picked, in the order of picking, `(min(count, N),)`.
    """
    features = F.normalize(features.double(), dim=1)
    mean = _mean(features, weights)
    chosen: list[int] = []
    total = torch.zeros_like(mean)
    for position in range(1, min(count, len(features)) + 1):
        distance = (mean - (total + features) / position).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen, dtype=torch.long)


def closest_to_mean(
    features: Tensor, count: int, generator: Optional[torch.Generator] = None, weights: Optional[Tensor] = None
) -> Tensor:
    """The images whose features, at unit length, are closest to the class mean; arguments as in `herding`."""
    features = F.normalize(features.double(), dim=1)
    return (features - _mean(features, weights)).norm(dim=1).argsort(stable=True)[:count].cpu()


def random_choice(
    features: Tensor, count: int, generator: Optional[torch.Generator] = None, weights: Optional[Tensor] = None
) -> Tensor:
    """Images drawn without replacement; arguments as in `herding`."""
    if weights is None:
        return torch.randperm(len(features), generator=generator)[:count]
    return torch.multinomial(weights, min(count, len(weights)), generator=generator)


def _mean(features: Tensor, weights: Optional[Tensor]) -> Tensor:
    return features.mean(dim=0) if weights is None else weights.to(features) @ features / weights.sum()


SELECTIONS: dict[str, Callable[[Tensor, int, Optional[torch.Generator], Optional[Tensor]], Tensor]] = {
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

    Attributes:
        counts (`dict[int, int]`): Of how many images of each class the exemplars were chosen.
    """

    def __init__(self, size: int, selection: Selection = "herding", seed: int = 0) -> None:
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"memory_size={size!r} must be a whole number, and not negative.")
        if selection not in SELECTIONS:
            raise ValueError(f"selection={selection!r} does not exist; choose one of {', '.join(SELECTIONS)}.")
        self.size = size
        self.selection = selection
        self.seed = seed
        self._classes: dict[int, LabelledImages] = {}
        self.counts: dict[int, int] = {}
        # Rows alone do not tell an image: those of a class that came back may be of two data sets.
        self._origins: dict[int, list[int]] = {}

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

    @property
    def labels(self) -> list[int]:
        """The class of each image, in the order of `rows`."""
        return [label for label, images in self._classes.items() for _ in range(len(images))]

    @property
    def origins(self) -> list[int]:
        """Of each image, in the order of `rows`, its place among those that `restore` brought; -1 for newer ones."""
        return [place for places in self._origins.values() for place in places]

    def restore(self, images: LabelledImages, origins: Optional[Sequence[int]] = None) -> None:
        """Remembers images that were chosen before, as `rows` names them, and forgets all others.

        Args:
            images (`LabelledImages`): The images, class by class.
            origins (`Optional[Sequence[int]]`): What `origins` is to say of them; their own places if `None`.
        """
        places = torch.arange(len(images)) if origins is None else torch.tensor(origins)
        labels = list(dict.fromkeys(images.labels.tolist()))
        self._classes = {label: images.of_classes([label]).copied() for label in labels}
        self._origins = {label: places[images.labels == label].tolist() for label in labels}

    def images(self) -> Optional[LabelledImages]:
        """All images remembered, class by class, or `None` if there are none yet."""
        return LabelledImages.concatenate(list(self._classes.values())).copied() if self._classes else None

    def missing(self, class_names: Sequence[str]) -> list[str]:
        """Those of the classes seen, in the order of their numbers, that there is no image of."""
        return [name for label, name in enumerate(class_names) if not len(self._classes.get(label, ()))]

    def images_of(self, class_names: Sequence[str]) -> LabelledImages:
        """All images remembered, if there are some of every class.

        Args:
            class_names (`Sequence[str]`): The classes seen, in the order of their numbers.

        Raises:
            ValueError: If the memory has none of a class.
        """
        if missing := self.missing(class_names):
            raise ValueError(
                f"The memory has no exemplar of {', '.join(map(repr, missing))}; set memory_size to at least the "
                "number of classes, or use class statistics (heads='lda')."
            )
        return self.images()

    def update(self, new_images: LabelledImages, features: Tensor, own_features: Optional[Tensor] = None) -> None:
        """Takes in images of new classes, or new images of known ones; afterwards all classes have equally many.

        Of a class that comes back, exemplars are chosen anew from its old ones and its new images; an old one stands
        for as many images as it was chosen from.

        Args:
            new_images (`LabelledImages`): All images of the new classes, and the new ones of known classes.
            features (`Tensor`): Their features, `(N, C)`.
            own_features (`Optional[Tensor]`): Features of `images()` under the same model, `(M, C)`; needed if a class
                comes back.

        Raises:
            ValueError: If a class comes back without `own_features`, or the memory is smaller than the number of
                classes.
        """
        labels = new_images.labels.unique().tolist()
        back = [label for label in labels if label in self._classes]
        if back and own_features is None:
            raise ValueError(f"Class {back[0]} is in the memory already; give own_features, those of images().")
        quota = self.quota(len(self._classes) + len(labels) - len(back))
        if quota == 0:
            return
        counts = torch.bincount(new_images.labels).tolist()
        pool, features, origins, weights = self._pool(new_images, features, own_features, back)
        first = torch.arange(quota)
        # What is not remembered must not be kept: a selection alone would still have all images behind it.
        self._classes = {
            label: images.select(first[: len(images)]).copied() for label, images in self._classes.items()
        }
        self._origins = {label: places[:quota] for label, places in self._origins.items()}
        generator = torch.Generator().manual_seed(self.seed + labels[0])
        for label in labels:
            places = torch.nonzero(pool.labels == label).flatten()
            own_weights = weights[places] if label in back else None
            chosen = places[SELECTIONS[self.selection](features[places].cpu(), quota, generator, own_weights)]
            self._classes[label] = pool.select(chosen).copied()
            self._origins[label] = origins[chosen].tolist()
            self.counts[label] = self.counts.get(label, 0) + counts[label]

    def _pool(
        self, new_images: LabelledImages, features: Tensor, own_features: Optional[Tensor], back: list[int]
    ) -> tuple[LabelledImages, Tensor, Tensor, Tensor]:
        """What to choose from: exemplars of the classes that come back, then new images, `(N,)` in all.

        Returns:
            `tuple`: Images, features `(N, C)`, origins `(N,)`, and how many images each stands for `(N,)`.
        """
        origins, weights = torch.full((len(new_images),), -1), torch.ones(len(new_images))
        if not back:
            return new_images, features, origins, weights
        own = self.images()
        kept = torch.isin(own.labels, torch.tensor(back))
        shares = {label: max(1.0, self.counts.get(label, 0) / len(own)) for label, own in self._classes.items()}
        return (
            LabelledImages.concatenate([own.select(kept), new_images]),
            torch.cat([own_features[kept], features]),
            torch.cat([torch.tensor(self.origins)[kept], origins]),
            torch.cat([torch.tensor([shares[label] for label in own.labels[kept].tolist()]), weights]),
        )

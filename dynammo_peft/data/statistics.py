"""Class statistics: what is known of the classes' features without any of their images.

Mean and covariance, computed in one pass, moved along when the model changes, and sampled from.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Literal, Optional, Union

import torch
from torch import Tensor

from .drift import AffineMap
from .scatter import LowRankScatter, Scatter


Covariance = Literal["shared", "class"]

# A class with fewer images takes the covariance of all classes.
FEWEST_IMAGES = 4
SHARED = -1


class ClassStatistics:
    """
    Number, mean and covariance of the features of each class; nothing of a single image is kept.

    But the mean of a class of one image is that image's features.

    Updates are exact in any number of parts and in any order (Chan, Golub & LeVeque 1979), in `float64` on the CPU.

    Args:
        covariance (`Literal["shared", "class"]`): One covariance within classes for all of them, all images counting
            the same, or one for each class.
        rank (`Optional[int]`): Directions kept of each covariance, for wide features; exact if `None`.

    Attributes:
        counts (`dict[int, int]`): Images of each class.
        means (`dict[int, Tensor]`): Mean of each class, `(C,)`.
        names (`dict[int, str]`): What messages call the classes; their numbers where they have no name.

    Raises:
        ValueError: If an option does not exist.
    """

    def __init__(self, covariance: Covariance = "shared", rank: Optional[int] = None) -> None:
        if covariance not in ("shared", "class"):
            raise ValueError(f"covariance={covariance!r} does not exist; choose one of 'shared', 'class'.")
        if rank is not None and rank < 1:
            raise ValueError(f"rank={rank} must be at least 1, or None for exact covariances.")
        self.covariance = covariance
        self.rank = rank
        self.counts: dict[int, int] = {}
        self.means: dict[int, Tensor] = {}
        self.names: dict[int, str] = {}
        self._scatters: dict[int, Union[Scatter, LowRankScatter]] = {}

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def classes(self) -> list[int]:
        """The classes known, in the order in which they came."""
        return list(self.counts)

    @property
    def features(self) -> int:
        """Number of features `C`. Raises a `ValueError` if no class is known."""
        self._check_known()
        return len(next(iter(self.means.values())))

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Takes in features.

        Args:
            features (`Tensor`): `(N, C)`, or `(V, N, C)` of `V` views of each image, which counts as one all the same.
            labels (`Tensor`): Class of each image, `(N,)`.

        Raises:
            ValueError: If a feature is not finite, or they do not fit the labels or those known.
        """
        self._check(features, labels)
        views = len(features) if features.dim() == 3 else 1
        features, labels = features.detach().cpu(), labels.cpu()
        for label in labels.unique().tolist():
            own = features[..., labels == label, :].flatten(0, -2).double()
            mean = own.mean(dim=0)
            self._scatter(label, len(mean)).add((own - mean) / views**0.5)
            self._add_mean(label, len(own) // views, mean)

    def copy(self) -> ClassStatistics:
        """The same statistics, to be changed without these."""
        copied = ClassStatistics(self.covariance, self.rank)
        # Counts and means are replaced when they change, scatters are not.
        copied.counts, copied.means, copied.names = dict(self.counts), dict(self.means), dict(self.names)
        copied._scatters = {key: deepcopy(scatter) for key, scatter in self._scatters.items()}
        return copied

    def combine(self, others: Iterable[ClassStatistics]) -> ClassStatistics:
        """These statistics and those of other parts of the data as one, as if one had seen all.

        Args:
            others (`Iterable[ClassStatistics]`): As of other processes, in the same order on all of them.

        Raises:
            ValueError: If they have other options or features of another size.
        """
        combined = ClassStatistics(self.covariance, self.rank)
        for part in (self, *others):
            if (part.covariance, part.rank) != (self.covariance, self.rank):
                raise ValueError(
                    f"Class statistics with covariance={part.covariance!r}, rank={part.rank} cannot be combined with "
                    f"those with covariance={self.covariance!r}, rank={self.rank}."
                )
            if part.means and combined.means and part.features != combined.features:
                raise ValueError(f"Class statistics of {part.features} and of {combined.features} features differ.")
            combined.names |= part.names
            for key, scatter in part._scatters.items():
                combined._scatter(key, part.features).add_scatter(scatter)
            for label in part.classes:
                combined._add_mean(label, part.counts[label], part.means[label])
        return combined

    def move(self, affine_map: AffineMap) -> None:
        """Moves all classes into another feature space; what the map leaves unexplained widens the covariances."""
        if self.means:
            self.means = dict(zip(self.means, affine_map(torch.stack(list(self.means.values()))).unbind()))
        for key, scatter in self._scatters.items():
            scatter.move(affine_map, sum(self.counts.values()) if key == SHARED else self.counts[key])

    def state(self) -> dict[str, Tensor]:
        """All there is to know, as tensors: what `restore` takes. Raises a `ValueError` if no class is known."""
        self._check_known()
        labels = self.classes
        tensors = {
            "classes": torch.tensor(labels),
            "counts": torch.tensor([self.counts[label] for label in labels]),
            "means": torch.stack([self.means[label] for label in labels]),
        }
        for key, scatter in self._scatters.items():
            for name, value in vars(scatter).items():
                if isinstance(value, Tensor):
                    tensors[f"scatter.{key}.{name}"] = value
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state` of statistics with the same options gave.

        Args:
            tensors (`Mapping[str, Tensor]`): The tensors by name.

        Raises:
            ValueError: If a tensor is missing or of another shape than the others ask for.
        """
        try:
            labels, counts, means = (tensors[name] for name in ("classes", "counts", "means"))
            features = means.shape[1]
            scatters = {}
            for key in [SHARED] if self.covariance == "shared" else labels.tolist():
                scatters[key] = self._empty_scatter(features)
                for name, value in vars(scatters[key]).items():
                    if isinstance(value, Tensor):
                        setattr(scatters[key], name, _of_width(tensors, f"scatter.{key}.{name}", features))
        except KeyError as error:
            raise ValueError(
                f"Class statistics have no tensor {error}; they were saved with other options."
            ) from error
        self.counts = dict(zip(labels.tolist(), counts.tolist()))
        self.means = dict(zip(labels.tolist(), means.double().unbind()))
        self._scatters = scatters

    def mean_matrix(self) -> Tensor:
        """Means of all classes in the order of their numbers, `(N, C)`. Raises a `ValueError` if no class is known."""
        self._check_known()
        return torch.stack([self.means[label] for label in sorted(self.means)])

    def pooled_covariance(self) -> Tensor:
        """Covariance within classes, `(C, C)`: the shared one, or the mean over classes that have enough images.

        If none has, that of all their images; the identity where there is a single one of each.

        Raises:
            ValueError: If no class is known.
        """
        self._check_known()
        if self.covariance == "shared":
            return self._scatters[SHARED].dense() / sum(self.counts.values())
        parts = [self._scatters[label].dense() / n for label, n in self.counts.items() if n >= FEWEST_IMAGES]
        if parts:
            return sum(parts) / len(parts)
        # All together: around its own mean a class of n images shows n - 1 deviations.
        deviations = sum(self.counts.values()) - len(self.counts)
        if not deviations:
            return torch.eye(self.features, dtype=torch.float64)
        return sum(self._scatters[label].dense() for label in self.counts) / deviations

    def class_covariance(self, label: int, pooled: Tensor, shrinkage: Optional[float] = None) -> Tensor:
        """A class's covariance, shrunk towards the pooled one.

        Args:
            label (`int`): The class.
            pooled (`Tensor`): From `pooled_covariance`, `(C, C)`.
            shrinkage (`Optional[float]`): Share of the pooled covariance, from 0 to 1. If `None`, it follows from the
                class's number of images `n` and of features `C`: `C / (C + n)`.

        Returns:
            `Tensor`: `(C, C)`; the pooled one if that is shared.

        Raises:
            ValueError: If `shrinkage` is no share, or the class is not known.
        """
        self._check_known([label])
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage={shrinkage} must be at least 0 and at most 1.")
        if self.covariance == "shared":
            return pooled
        count = self.counts[label]
        if count < FEWEST_IMAGES:
            warnings.warn(
                f"Class {self.names.get(label, label)!r} has {count} images, too few for a covariance of its own; "
                "that of all classes is taken.",
                stacklevel=2,
            )
            return pooled
        share = len(pooled) / (len(pooled) + count) if shrinkage is None else shrinkage
        return (1 - share) * self._scatters[label].dense() / count + share * pooled

    def sample(
        self,
        labels: Sequence[int],
        count: int,
        shrinkage: Optional[float] = None,
        generator: Optional[torch.Generator] = None,
    ) -> Tensor:
        """Draws features from the Gaussians of classes.

        Args:
            labels (`Sequence[int]`): The classes.
            count (`int`): Features of each.
            shrinkage (`Optional[float]`): As in `class_covariance`.
            generator (`Optional[torch.Generator]`): Source of randomness on the CPU; PyTorch's own if `None`.

        Returns:
            `Tensor`: `(len(labels), count, C)`, `float32`.

        Raises:
            ValueError: If a class is not known.
        """
        self._check_known(labels)
        pooled = self.pooled_covariance()
        drawn, of_pooled = [], None
        for label in labels:
            covariance = self.class_covariance(label, pooled, shrinkage)
            if covariance is not pooled:
                root = _square_root(covariance)
            else:
                root = of_pooled = _square_root(pooled) if of_pooled is None else of_pooled
            noise = torch.randn(count, len(root), dtype=torch.float64, generator=generator)
            drawn.append((self.means[label] + noise @ root.T).float())
        return torch.stack(drawn) if drawn else torch.empty(0, count, self.features)

    def _check_known(self, labels: Sequence[int] = ()) -> None:
        if not self.means:
            raise ValueError("No class is known yet; `update` the class statistics with features first.")
        for label in labels:
            if label not in self.means:
                raise ValueError(f"Nothing is known of class {label}; known are {sorted(self.means)}.")

    def _check(self, features: Tensor, labels: Tensor) -> None:
        if features.dim() not in (2, 3) or labels.shape != features.shape[-2:-1]:
            raise ValueError(
                f"Features must be (N, C) or (V, N, C) and labels (N,), got {tuple(features.shape)} and "
                f"{tuple(labels.shape)}."
            )
        if self.means and features.shape[-1] != self.features:
            raise ValueError(f"Features have {features.shape[-1]} columns, those known {self.features}.")
        if not torch.isfinite(features).all():
            raise ValueError("Features hold NaN or infinity; class statistics cannot be computed from them.")

    def _scatter(self, label: int, features: int) -> Union[Scatter, LowRankScatter]:
        key = SHARED if self.covariance == "shared" else label
        if key not in self._scatters:
            self._scatters[key] = self._empty_scatter(features)
        return self._scatters[key]

    def _empty_scatter(self, features: int) -> Union[Scatter, LowRankScatter]:
        return Scatter.zeros(features) if self.rank is None else LowRankScatter.zeros(features, self.rank)

    def _add_mean(self, label: int, count: int, mean: Tensor) -> None:
        """Counts a part of a class whose own scatter was added; the distance of the parts' means adds to it."""
        old = self.counts.get(label, 0)
        if not old:
            self.counts[label], self.means[label] = count, mean
            return
        total, shift = old + count, mean - self.means[label]
        self._scatter(label, len(mean)).add((old * count / total) ** 0.5 * shift[None])
        self.counts[label], self.means[label] = total, self.means[label] + count / total * shift


def _square_root(covariance: Tensor) -> Tensor:
    """A matrix that makes white noise have this covariance, `(C, C)`."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _of_width(tensors: Mapping[str, Tensor], name: str, features: int) -> Tensor:
    if tensors[name].shape[-1] != features:
        raise ValueError(f"{name} is of shape {tuple(tensors[name].shape)}, but the means have {features} features.")
    return tensors[name].double()

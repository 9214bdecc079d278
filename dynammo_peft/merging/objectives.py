"""What merge weights are learned for: a loss of a merged model on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# Takes what the forward returned and the labels, if there are any; returns a scalar.
Objective = Callable[[Any, Optional[Tensor]], Tensor]
# `(base, batch)`, with the base model under the merge weights of the moment.
Forward = Callable[[nn.Module, Any], Any]


def label_cross_entropy(logits: Tensor, labels: Optional[Tensor]) -> Tensor:
    """Mean cross-entropy of logits `(B, N)` with labels `(B,)`.

    Raises:
        ValueError: If there are no labels, or they are not one for each row of logits.
    """
    if labels is None:
        raise ValueError(
            "objective='labels' needs labelled batches, (images, labels); choose 'entropy' for images alone."
        )
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"objective='labels' needs logits (B, N) and labels (B,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}; give a forward that returns such, or an objective of your own."
        )
    check_labels(labels, logits.shape[1])
    return F.cross_entropy(logits.float(), labels)


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises a `ValueError` unless labels are numbers of classes, or -100, which PyTorch leaves out."""
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != -100)]
    if len(wrong):
        raise ValueError(
            f"A batch has the label {wrong[0].item()}, but there are {classes} classes; number them from 0 to "
            f"{classes - 1} in the order of the logits."
        )


def prediction_entropy(logits: Tensor, labels: Optional[Tensor] = None) -> Tensor:
    """Mean entropy of the predicted distributions of logits `(B, N)`, in nats (AdaMerging, Yang et al. 2024)."""
    log_probabilities = logits.float().log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()


OBJECTIVES: dict[str, Objective] = {"labels": label_cross_entropy, "entropy": prediction_entropy}


def as_objective(objective: Union[str, Objective]) -> Objective:
    """The loss of that name, or the given one.

    Raises:
        ValueError: If there is none of the name.
    """
    if callable(objective):
        return objective
    # Not at the top: the tuner imports this package.
    from ..tuner.head_config import check_choice

    check_choice("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective]


class GaussianLikelihood(nn.Module):
    """The loss that `gaussian_likelihood` returns; a function of features `(B, C)` and labels `(B,)`."""

    def __init__(self, means: Tensor, covariance: Tensor, posterior: bool) -> None:
        super().__init__()
        self.posterior = posterior
        # In double precision: covariances of features are often close to singular.
        factor, failed = torch.linalg.cholesky_ex(covariance.double())
        if failed.any():
            raise ValueError("covariance is not positive definite; add a small multiple of the identity to it.")
        identity = torch.eye(means.shape[1], dtype=torch.float64, device=covariance.device)
        whitening = torch.linalg.solve_triangular(factor, identity, upper=False)
        # Features may lie far from zero, and single precision has to see their differences.
        offset = means.float().mean(dim=0).double()
        centres = torch.einsum("...cd,...d->...c", whitening, means.double() - offset)
        log_determinants = -whitening.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        self.register_buffer("offset", offset.float())
        self.register_buffer("whitening", whitening.float())
        self.register_buffer("centres", centres.float())
        self.register_buffer("log_determinants", log_determinants.float())

    def log_densities(self, features: Tensor) -> Tensor:
        """Log-density of each feature vector under each class's Gaussian, but for the constant of 2 pi, `(B, N)`."""
        self.to(features.device)
        # (B, C) under one covariance or (B, N, C) under one a class, in coordinates where it is the identity.
        white = torch.einsum("...cd,bd->b...c", self.whitening, features.float() - self.offset)
        white = white[:, None] if white.dim() == 2 else white
        return -0.5 * (white - self.centres).square().sum(dim=-1) - self.log_determinants

    def forward(self, features: Tensor, labels: Optional[Tensor]) -> Tensor:
        """The loss of features `(B, C)` with labels `(B,)`."""
        if labels is None:
            raise ValueError("gaussian_likelihood needs labelled batches, (images, labels).")
        if features.dim() != 2 or features.shape[1] != self.centres.shape[1]:
            raise ValueError(
                f"Features have shape {tuple(features.shape)}, the Gaussians {self.centres.shape[1]} dimensions; let "
                "the forward return features, (B, C): of a DynammoModel inside `head_output('features')`."
            )
        log_densities = self.log_densities(features)
        check_labels(labels, log_densities.shape[1])
        if self.posterior:
            return F.cross_entropy(log_densities, labels)
        return F.nll_loss(log_densities, labels) / features.shape[1]


def gaussian_likelihood(means: Tensor, covariance: Tensor, posterior: bool = True) -> GaussianLikelihood:
    """
    An objective on class statistics: features shall be where the Gaussians of their classes are.

    With one covariance its predictions are those of linear discriminant analysis, with one a class of quadratic.
    Use it with a forward that returns features:

    ```py
    >>> with model.head_output("features"):
    ...     learn_merge_weights(model, adapters, batches, objective=gaussian_likelihood(means, covariance))
    ```

    Args:
        means (`Tensor`): Mean of each class's features, `(N, C)`.
        covariance (`Tensor`): Covariance of the features inside a class, `(C, C)`, or of each class, `(N, C, C)`.
        posterior (`bool`): Whether the loss is the cross-entropy of the classes' posterior (equal priors), which keeps
            classes apart; otherwise the negative log-density under the own class, for each dimension.

    Returns:
        `GaussianLikelihood`: A function of features `(B, C)` and labels `(B,)`.

    Raises:
        ValueError: If the shapes do not fit, or a covariance is not positive definite.
    """
    if means.dim() != 2:
        raise ValueError(f"means must have shape (N, C), got {tuple(means.shape)}.")
    count, size = means.shape
    if tuple(covariance.shape) not in {(size, size), (count, size, size)}:
        raise ValueError(
            f"covariance has shape {tuple(covariance.shape)}; for means of shape {(count, size)} it must be "
            f"{(size, size)} or {(count, size, size)}."
        )
    return GaussianLikelihood(means, covariance, posterior)


def inputs_and_labels(batch: Any) -> tuple[Any, Optional[Tensor]]:
    """The images of a batch and their labels, if it has any.

    Args:
        batch (`Any`): A tensor of images, a pair of images and labels, or a mapping as transformers' collators make
            it, with the labels as `"labels"`.

    Returns:
        `tuple[Any, Optional[Tensor]]`: The images, or the mapping without labels, and the labels.
    """
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return inputs, batch.get("labels")
    if isinstance(batch, (tuple, list)):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def classify(base: nn.Module, batch: Any) -> Tensor:
    """The logits of a batch, or of what is in it but labels: the forward if none is given."""
    inputs, _ = inputs_and_labels(batch)
    output = base(**inputs) if isinstance(inputs, Mapping) else base(inputs)
    return getattr(output, "logits", output)

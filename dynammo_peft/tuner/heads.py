"""Arithmetic of task heads: one block of `n + 1` logits a head, `n` classes and then "others".

All functions take the raw logits of one or more heads side by side, `(B, sum of n_t + 1)`, and the heads' sizes `n_t`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .head_config import Scoring


def _make_columns(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of the classes `(N,)`, of each class's "others" `(N,)`, and of each head `(T, 1 + max n)`.

    A head's row starts with its "others" column; short rows are filled with the number of columns, one past the end.
    """
    classes, others, heads = [], [], []
    start, width = 0, sum(sizes) + len(sizes)
    for size in sizes:
        columns = list(range(start, start + size))
        classes += columns
        others += [start + size] * size
        heads.append([start + size, *columns, *[width] * (max(sizes) - size)])
        start += size + 1
    return tuple(torch.tensor(index, device=device) for index in (classes, others, heads))


@lru_cache(maxsize=256)
def _cached_columns(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # Nothing could be trained with tensors that were made in inference mode.
    with torch.inference_mode(False):
        return _make_columns(sizes, device)


def _columns(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # A compiled graph keeps the tensors itself, and the compiler warns of caches.
    return (_make_columns if torch.compiler.is_compiling() else _cached_columns)(sizes, device)


def heads_of_new_classes(heads: Sequence[Sequence[str]], known: Iterable[str]) -> tuple[list[list[str]], list[int]]:
    """What is left of heads without the classes that others have already.

    Args:
        heads (`Sequence[Sequence[str]]`): Class names of each head.
        known (`Iterable[str]`): Class names of other heads.

    Returns:
        `tuple[list[list[str]], list[int]]`: The class names of each head that has any left, and the columns of these
        classes and of their heads' "others" among all raw logits.
    """
    known, left, columns, start = set(known), [], [], 0
    for head in heads:
        places = [place for place, name in enumerate(head) if name not in known]
        if places:
            left.append([head[place] for place in places])
            columns += [start + place for place in [*places, len(head)]]
        start += len(head) + 1
    return left, columns


def grouped_logits(logits: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Raw logits by head.

    Args:
        logits (`Tensor`): Raw logits, `(B, sum of n_t + 1)`.
        sizes (`tuple[int, ...]`): Number of classes of each head.

    Returns:
        `Tensor`: `(B, T, 1 + max n)`: "others" first, then the head's classes, then minus infinity.
    """
    _, _, heads = _columns(sizes, logits.device)
    return F.pad(logits, (0, 1), value=float("-inf"))[:, heads]


def score_heads(logits: Tensor, sizes: tuple[int, ...], scoring: Scoring) -> Tensor:
    """Turns the raw logits of all heads into one tensor of logits over the classes.

    `"log_odds"` subtracts from each class's logit its head's "others" logit: the log of the odds that the head gives
    the class against "none of mine", comparable between heads and linear in the features. `"min_others"` (Qazi et al.
    2024, section 2.4) takes the head with the least "others" probability, and in it the largest logit; the classes of
    all other heads follow behind.

    Args:
        logits (`Tensor`): Raw logits, `(B, sum of n_t + 1)`.
        sizes (`tuple[int, ...]`): Number of classes of each head.
        scoring (`Literal["log_odds", "min_others"]`): How heads are compared.

    Returns:
        `Tensor`: `(B, N)`, one logit for each class of all heads.
    """
    classes, others, heads = _columns(sizes, logits.device)
    if scoring == "log_odds":
        return logits[:, classes] - logits[:, others]
    # Half precision would round different classes to one probability.
    grouped = grouped_logits(logits.float(), sizes)
    # The log-odds of "others" grow with its probability, and can still be told apart where that rounds to one.
    chosen = (grouped[..., 0] - grouped[..., 1:].logsumexp(dim=-1)).argmin(dim=1)
    present = heads[:, 1:] < logits.shape[1]
    scores = grouped.log_softmax(dim=-1)[..., 1:][:, present]
    outside = present.nonzero()[:, 0] != chosen[:, None]
    # Every class of the chosen head stays above every class outside it.
    return scores - outside * (scores.amax(dim=1, keepdim=True) - scores.amin(dim=1, keepdim=True) + 1)


def unknown_score(logits: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """
    The probability that every head says "others", as if heads were independent: high for an image of no known class.

    It is a probability only where heads learned "others" (heads trained on exemplars). Heads in closed form have a
    constant "others" logit; then the score ranks images, as does the log-sum-exp of one classifier's logits (Liu et
    al. 2020, https://arxiv.org/abs/2010.03759), but its value means nothing. A threshold has to be found on images.

    Args:
        logits (`Tensor`): Raw logits, `(B, sum of n_t + 1)`.
        sizes (`tuple[int, ...]`): Number of classes of each head.

    Returns:
        `Tensor`: `(B,)` in float32, between 0 and 1.
    """
    # A product of many small probabilities would be zero long before its logarithm is.
    return grouped_logits(logits.float(), sizes).log_softmax(dim=-1)[..., 0].sum(dim=1).exp()


def head_targets(labels: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Target of each head: 0 ("others") for a foreign class, 1 + its place in the head for one of its own.

    Args:
        labels (`Tensor`): Place of each image's class among those of all heads, `(B,)`; -1 if no head has it.
        sizes (`tuple[int, ...]`): Number of classes of each head.

    Returns:
        `Tensor`: `(B, T)`, to be compared with `grouped_logits`.
    """
    sizes_tensor = torch.tensor(sizes, device=labels.device)
    starts = sizes_tensor.cumsum(0) - sizes_tensor
    place = labels[:, None] - starts[None, :]
    return torch.where((place >= 0) & (place < sizes_tensor), place + 1, 0)


def heads_loss(logits: Tensor, labels: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Sum over heads of the mean cross-entropy, foreign classes as "others" (Qazi et al. 2024, section 2.3).

    Args:
        logits (`Tensor`): Raw logits, `(B, sum of n_t + 1)`.
        labels (`Tensor`): Place of each image's class among those of all heads, `(B,)`; -1 if no head has it.
        sizes (`tuple[int, ...]`): Number of classes of each head.

    Returns:
        `Tensor`: The loss, a scalar.
    """
    grouped = grouped_logits(logits.float(), sizes)
    targets = head_targets(labels, sizes)
    return F.cross_entropy(grouped.flatten(0, 1), targets.flatten()) * len(sizes)


@torch.no_grad()
def set_class_logits(head: nn.Linear, sizes: tuple[int, ...], weight: Tensor, bias: Tensor) -> None:
    """Makes all heads together one linear classifier: "others" is always 0, so that log-odds are its logits.

    Args:
        head (`nn.Linear`): All heads, `sum of n_t + 1` outputs.
        sizes (`tuple[int, ...]`): Number of classes of each head.
        weight (`Tensor`): `(N, C)`, in the order of the classes.
        bias (`Tensor`): `(N,)`.
    """
    classes, _, _ = _columns(sizes, head.weight.device)
    for parameter, value in ((head.weight, weight), (head.bias, bias)):
        parameter.zero_()
        parameter[classes] = value.to(parameter)


@torch.no_grad()
def class_logits(head: nn.Linear, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The one linear classifier that all heads are together under `"log_odds"`.

    Args:
        head (`nn.Linear`): All heads, `sum of n_t + 1` outputs.
        sizes (`tuple[int, ...]`): Number of classes of each head.

    Returns:
        `tuple[Tensor, Tensor]`: Weight `(N, C)` and bias `(N,)`, in the order of the classes.
    """
    classes, others, _ = _columns(sizes, head.weight.device)
    return head.weight[classes] - head.weight[others], head.bias[classes] - head.bias[others]

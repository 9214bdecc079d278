"""Arithmetic of task heads, against the rules spelled out one image and one head at a time."""

import pytest
import torch
from torch.nn import functional as F

from dynammo_peft.tuner.heads import grouped_logits, head_targets, heads_loss, score_heads, set_class_logits


SIZES = [(3,), (1,), (2, 2), (3, 1, 5, 2), (1, 1, 1)]


def split(logits, sizes):
    """Raw logits of each head, `n_t` classes and then "others"."""
    return logits.split([size + 1 for size in sizes], dim=-1)


def paper_rule(row, sizes):
    """The head with the least probability of "others", and in it the class with the most; all of them if tied."""
    # In double precision, and by the log of its odds: a probability next to one cannot be told from another.
    heads = split(row.double(), sizes)
    odds = [(head[-1] - head[:-1].logsumexp(0)).item() for head in heads]
    # What single precision rounds to the same is a tie.
    least = min(odds) + 1e-6 * max(1.0, row.abs().max().item())
    best = set()
    for task, head in enumerate(heads):
        if odds[task] <= least:
            places = (head[:-1] == head[:-1].max()).nonzero().flatten().tolist()
            best |= {sum(sizes[:task]) + place for place in places}
    return best


def draw(sizes, count=100, scale=1.0, dtype=torch.float32):
    return (torch.randn(count, sum(sizes) + len(sizes)) * scale).clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("sizes", SIZES)
def test_log_odds(sizes):
    logits = draw(sizes)
    expected = torch.cat([head[:, :-1] - head[:, -1:] for head in split(logits, sizes)], dim=1)
    assert torch.equal(score_heads(logits, sizes, "log_odds"), expected)


def test_log_odds_by_hand():
    logits = torch.tensor([[1.0, 5.0, 2.0, -3.0, 4.0]])
    assert score_heads(logits, (2, 1), "log_odds").tolist() == [[-1.0, 3.0, -7.0]]


def test_log_odds_is_the_log_of_the_odds():
    logits = draw((3,), dtype=torch.float64)
    probabilities = logits.softmax(1)
    expected = (probabilities[:, :-1] / probabilities[:, -1:]).log()
    torch.testing.assert_close(score_heads(logits, (3,), "log_odds"), expected)


def test_min_others_by_hand():
    # The second head has the least "others", though the first one's best class has the largest logit of all.
    logits = torch.tensor([[9.0, 0.0, 8.0, 1.0, 2.0, 0.0]])
    scores = score_heads(logits, (2, 2), "min_others")
    assert scores.shape == (1, 4)
    assert scores.argsort(dim=1, descending=True).tolist() == [[3, 2, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0, 1e4])
@pytest.mark.parametrize("sizes", SIZES)
def test_min_others(sizes, scale, dtype):
    logits = draw(sizes, scale=scale, dtype=dtype)
    scores = score_heads(logits, sizes, "min_others")
    assert scores.shape == (100, sum(sizes))
    assert torch.isfinite(scores).all()
    wrong = [row for row, best in zip(logits, scores.argmax(1).tolist()) if best not in paper_rule(row, sizes)]
    assert wrong == []


@pytest.mark.parametrize(
    "logits, best",
    [
        # All heads are as good as certain of "others", by margins that a probability cannot tell apart.
        ([0.0, 60.0, 0.0, 40.0, 0.0, 50.0], 1),
        ([0.0, 12.0, 0.0, 9.0, 0.0, 11.0], 1),
        # Two classes that are both as good as impossible.
        ([-9e3, -8e3, 0.0], 1),
        # Two classes that differ by less than a rounded log-probability does.
        ([1.0, 1.0009765625, 30.0], 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_min_others_tells_small_differences(logits, best, dtype):
    sizes = (1, 1, 1) if len(logits) == 6 else (2,)
    assert score_heads(torch.tensor([logits], dtype=dtype), sizes, "min_others").argmax(1).tolist() == [best]


@pytest.mark.parametrize("scoring", ["log_odds", "min_others"])
def test_one_head_keeps_its_order(scoring):
    logits = draw((4,))
    scores = score_heads(logits, (4,), scoring)
    assert torch.equal(scores.argsort(1), logits[:, :4].argsort(1))


@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_logits(sizes):
    logits = draw(sizes, count=5)
    grouped = grouped_logits(logits, sizes)
    assert grouped.shape == (5, len(sizes), 1 + max(sizes))
    for place, head in enumerate(split(logits, sizes)):
        assert torch.equal(grouped[:, place, 0], head[:, -1])
        assert torch.equal(grouped[:, place, 1 : head.shape[1]], head[:, :-1])
        assert (grouped[:, place, head.shape[1] :] == float("-inf")).all()


def loop_targets(labels, sizes):
    """One list a label: for each head 0 for a foreign class, else 1 + the place in the head."""
    starts = [sum(sizes[:head]) for head in range(len(sizes))]
    return [
        [label - start + 1 if start <= label < start + size else 0 for start, size in zip(starts, sizes)]
        for label in labels.tolist()
    ]


@pytest.mark.parametrize("sizes", SIZES)
def test_head_targets(sizes):
    # Classes before the first head and beyond the last one are foreign to all.
    labels = torch.arange(-2, sum(sizes) + 2)
    assert head_targets(labels, sizes).tolist() == loop_targets(labels, sizes)


def test_head_targets_by_hand():
    targets = head_targets(torch.tensor([-1, 0, 1, 2, 3]), (2, 1))
    assert targets.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("first", [-1, 0])
@pytest.mark.parametrize("sizes", SIZES)
def test_heads_loss(sizes, first):
    logits = draw(sizes, count=50, scale=3).requires_grad_()
    labels = torch.randint(first, sum(sizes), (50,))
    expected = 0.0
    for place, head in enumerate(split(logits, sizes)):
        # In a head "others" is its last logit.
        start, size = sum(sizes[:place]), sizes[place]
        own = (labels >= start) & (labels < start + size)
        expected = expected + F.cross_entropy(head, torch.where(own, labels - start, size))
    loss = heads_loss(logits, labels, sizes)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_loss_in_half_precision(dtype):
    logits, labels = draw((3, 1), scale=3, dtype=dtype), torch.randint(0, 4, (100,))
    loss = heads_loss(logits, labels, (3, 1))
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, heads_loss(logits.float(), labels, (3, 1)))


@pytest.mark.parametrize("sizes", SIZES)
def test_one_classifier_in_the_place_of_all_heads(sizes):
    head = torch.nn.Linear(5, sum(sizes) + len(sizes))
    weight, bias = torch.randn(sum(sizes), 5, dtype=torch.float64), torch.randn(sum(sizes), dtype=torch.float64)
    set_class_logits(head, sizes, weight, bias)
    features = torch.randn(7, 5)
    logits = head(features)
    expected = features @ weight.float().T + bias.float()
    torch.testing.assert_close(torch.cat([part[:, :-1] for part in split(logits, sizes)], dim=1), expected)
    assert not any(part[:, -1].any() for part in split(logits, sizes))
    torch.testing.assert_close(score_heads(logits, sizes, "log_odds"), expected)


def test_heads_that_were_used_in_inference_mode_are_trained():
    sizes = (11, 7)
    with torch.inference_mode():
        score_heads(torch.randn(2, 20), sizes, "log_odds")
    logits = torch.randn(2, 20, requires_grad=True)
    score_heads(logits, sizes, "log_odds").sum().backward()
    assert logits.grad.isfinite().all()

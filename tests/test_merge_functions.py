"""Merge functions on plain tensors, against closed forms and PEFT's own arithmetic."""

import math
import re

import pytest
import torch
from peft.utils import merge_utils

from dynammo_peft.merging import (
    COMBINATIONS,
    Slot,
    anchored_mean,
    average_statistics,
    check_weights,
    combine,
    dare_linear,
    dare_ties,
    exponential_moving_average,
    fisher,
    linear,
    magnitude_prune,
    merge_function,
    regmean,
    running_anchored_mean,
    running_mean,
    ties,
    uniform,
)


SHAPES = {"conv": (4, 3, 2, 2), "weight": (6, 5), "scale": (6,), "alpha": ()}
WEIGHTS = torch.tensor([0.5, 2.0, -1.0])


def random_adapters(count=3, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [{key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} for _ in range(count)]


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_linear():
    adapters = [{"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3.0)}, {"a": torch.tensor([[10.0, -4.0]])}]
    adapters[1]["b"] = torch.tensor(1.0)
    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    merged = linear(adapters, weights)
    assert (merged["a"].tolist(), merged["b"].item()) == ([[20.5, -7.0]], 3.5)
    merged["a"].sum().backward()
    assert weights.grad.tolist() == [3.0, 6.0]
    assert linear(adapters, weights.double())["a"].dtype is torch.float32


def test_means_that_take_no_weights():
    adapters = random_adapters(4)
    mean = {key: sum(own[key] for own in adapters) / 4 for key in SHAPES}
    assert_same(uniform(adapters, torch.tensor([5.0, 0.0, 1.0, 1.0])), mean)
    # One after the other, as the tasks come.
    merged = adapters[0]
    for count, newest in enumerate(adapters[1:], start=1):
        merged = running_mean([merged, newest], torch.ones(2), count=count)
    assert_same(merged, mean)
    assert_same(running_mean([uniform(adapters[:2], torch.ones(2)), *adapters[2:]], torch.ones(3), count=2), mean)


@pytest.mark.parametrize("first_share", [0.0, 0.3, 1.0])
def test_anchored_mean_is_between_the_first_and_the_mean_of_all(first_share):
    adapters = random_adapters(4)
    expected = {
        key: first_share * adapters[0][key] + (1 - first_share) * sum(own[key] for own in adapters) / 4
        for key in SHAPES
    }
    assert_same(anchored_mean(adapters, torch.ones(4), first_share=first_share), expected)
    # One after the other, as the tasks come; or several at once.
    merged = adapters[0]
    for count, newest in enumerate(adapters[1:], start=1):
        steps = [merged, adapters[0], newest]
        merged = running_anchored_mean(steps, torch.ones(3), count=count, first_share=first_share)
    assert_same(merged, expected)
    merged = running_anchored_mean([adapters[0], *adapters], torch.ones(5), count=1, first_share=first_share)
    assert_same(merged, expected)


def test_anchored_mean_goes_half_way():
    adapters = random_adapters(2)
    expected = {key: 0.75 * adapters[0][key] + 0.25 * adapters[1][key] for key in SHAPES}
    assert_same(anchored_mean(adapters, torch.ones(2)), expected)
    with pytest.raises(ValueError, match="takes what was merged so far, the first adapter and new ones, got 2"):
        running_anchored_mean(adapters, torch.ones(2), count=1)


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_exponential_moving_average_is_folded(decay):
    adapters = random_adapters(4)
    expected = adapters[0]
    for own in adapters[1:]:
        expected = {key: decay * expected[key] + (1 - decay) * own[key] for key in SHAPES}
    assert_same(exponential_moving_average(adapters, torch.ones(4), decay=decay), expected)


def test_average_statistics():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, -1.0])]
    weights = torch.tensor([1.0, 3.0], requires_grad=True)
    average = average_statistics(tensors, weights)
    assert average.tolist() == [3.25, -0.25]
    # The mean does not depend on the scale of the weights, nor on their signs.
    torch.testing.assert_close(average_statistics(tensors, 7 * weights), average)
    torch.testing.assert_close(average_statistics(tensors, weights * torch.tensor([1.0, -1.0])), average)
    average[0].backward()
    assert weights.grad.tolist() == pytest.approx([(1 - 3.25) / 4, (4 - 3.25) / 4])
    counts = average_statistics([torch.tensor(3), torch.tensor(4)], weights)
    assert (counts.item(), counts.dtype) == (7, torch.int64)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["magnitude_prune", "ties"])
def test_pruning_by_magnitude_is_that_of_peft(name, density):
    adapters = random_adapters()
    merged = COMBINATIONS[name](adapters, WEIGHTS.double(), density=density)
    for key in ("conv", "weight"):
        expected = getattr(merge_utils, name)([own[key] for own in adapters], WEIGHTS, density)
        torch.testing.assert_close(merged[key], expected)
    # Small tensors are not pruned; the mean of TIES is one over the number of adapters where all agree.
    share = 1 / 3 if name == "ties" else 1
    for key in ("scale", "alpha"):
        expected = sum(share * weight * own[key] for weight, own in zip(WEIGHTS, adapters))
        torch.testing.assert_close(merged[key], expected)


def test_nothing_is_warned_of_at_full_density(recwarn):
    ties(random_adapters(), WEIGHTS, density=1.0)
    assert not recwarn.list


def test_ties_by_hand():
    adapters = [{"a": torch.tensor([[3.0, 1.0, -2.0, 0.1]])}, {"a": torch.tensor([[1.0, -5.0, -4.0, 0.2]])}]
    # Three of four values are kept: signs +, -, -; the last value is nobody's.
    merged = ties(adapters, torch.ones(2), density=0.75)
    assert merged["a"].tolist() == [[2.0, -5.0, -3.0, 0.0]]
    adapters.append({"a": torch.tensor([[0.5, 2.0, 9.0, 0.0]])})
    total = ties(adapters, torch.ones(3), density=1.0, majority_sign_method="total")
    frequency = ties(adapters, torch.ones(3), density=1.0, majority_sign_method="frequency")
    assert total["a"].tolist()[0][1:3] == [-5.0, 9.0]
    assert frequency["a"].tolist()[0][1:3] == [1.5, -3.0]


@pytest.mark.parametrize("name, options", [("dare_linear", {}), ("dare_ties", {"majority_sign_method": "frequency"})])
def test_dare_is_that_of_peft_but_for_what_is_dropped(name, options, monkeypatch):
    adapters = random_adapters()
    merged = COMBINATIONS[name](adapters, WEIGHTS, density=0.6, seed=3, **options)
    for key in ("conv", "weight"):
        # What is dropped does not depend on the values: ones show it.
        masks = []
        for place in range(3):
            ones = [{key: torch.full(SHAPES[key], float(place == i))} for i in range(3)]
            masks.append(dare_linear(ones, torch.ones(3), density=0.6, seed=3)[key] * 0.6)
        assert all(((mask == 0) | (mask - 1).abs().lt(1e-6)).all() for mask in masks)
        assert not torch.equal(masks[0], masks[1])
        queue = iter(masks)
        pruned = lambda tensor, density, rescale, queue=queue: tensor * next(queue) / density  # noqa: E731
        monkeypatch.setattr(merge_utils, "random_pruning", pruned)
        expected = getattr(merge_utils, name)([own[key] for own in adapters], WEIGHTS, 0.6, **options)
        torch.testing.assert_close(merged[key], expected)


def test_dare_is_random_by_its_seed_alone():
    adapters = random_adapters()
    state = torch.random.get_rng_state()
    first = dare_linear(adapters, WEIGHTS, density=0.5, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert_same(dare_linear(adapters, WEIGHTS, density=0.5, seed=1), first)
    assert not torch.equal(dare_linear(adapters, WEIGHTS, density=0.5, seed=2)["conv"], first["conv"])
    # Nor do other tensors play a part.
    alone = [{"weight": own["weight"]} for own in adapters]
    assert torch.equal(dare_linear(alone, WEIGHTS, density=0.5, seed=1)["weight"], first["weight"])
    # The expectation is the weighted sum.
    ones = [{"a": torch.ones(100, 100)}, {"a": torch.ones(100, 100)}]
    assert dare_linear(ones, torch.ones(2), density=0.3)["a"].mean().item() == pytest.approx(2, abs=0.06)
    full = dare_ties(adapters, WEIGHTS, density=1.0)
    assert_same(full, ties(adapters, WEIGHTS, density=1.0))


@pytest.mark.parametrize("function", [magnitude_prune, ties, dare_linear, dare_ties])
def test_differences_from_a_base(function):
    base, *adapters = random_adapters(4)
    merged = function(adapters, WEIGHTS, density=0.4, base=base)
    differences = [{key: own[key] - base[key] for key in SHAPES} for own in adapters]
    expected = function(differences, WEIGHTS, density=0.4)
    assert_same(merged, {key: base[key] + expected[key] for key in SHAPES})
    # One adapter is nobody's rival: it stays whole.
    assert_same(function(adapters[:1], torch.ones(1), density=0.4, base=base), adapters[0])
    assert_same(function(adapters[:1], torch.ones(1), density=0.4), adapters[0])


def test_fisher_of_quadratics_is_their_minimiser():
    shapes = {"weight": (6, 5), "scale": (6,)}
    adapters = random_adapters(3, shapes=shapes)
    curvatures = [{key: value.abs() + 0.01 for key, value in own.items()} for own in random_adapters(3, 1, shapes)]
    weights = torch.tensor([0.5, 2.0, 1.0])
    merged = fisher(adapters, weights, fisher=curvatures)
    leaves = {key: value.clone().requires_grad_() for key, value in merged.items()}
    loss = sum(
        weight * (curvature[key] * (leaves[key] - own[key]) ** 2).sum()
        for weight, curvature, own in zip(weights, curvatures, adapters)
        for key in shapes
    )
    loss.backward()
    for key, leaf in leaves.items():
        assert leaf.grad.abs().max() < 1e-5, key
        assert leaf.dtype is torch.float32
    # Only ratios count, of weights and of Fishers, however small.
    tiny = [{key: 1e-20 * value for key, value in own.items()} for own in curvatures]
    assert_same(fisher(adapters, 7 * weights, fisher=tiny), merged)


def test_fisher_of_what_nobody_knows_is_the_mean():
    adapters = [{"a": torch.tensor([1.0, 1.0, 1.0])}, {"a": torch.tensor([3.0, 3.0, 3.0])}]
    measured = [{"a": torch.tensor([0.0, 0.0, 1.0])}, {"a": torch.tensor([0.0, 2.0, 1e-12])}]
    merged = fisher(adapters, torch.tensor([3.0, 1.0]), fisher=measured)
    assert merged["a"].tolist() == pytest.approx([1.5, 3.0, 1.0])
    nothing = [{"a": torch.zeros(3)}] * 2
    assert fisher(adapters, torch.tensor([3.0, 1.0]), fisher=nothing)["a"].tolist() == [1.5, 1.5, 1.5]
    measured[0]["a"][0] = 1e-3
    assert fisher(adapters, torch.ones(2), fisher=measured)["a"][0].item() == 1.0
    assert fisher(adapters, torch.ones(2), fisher=measured, epsilon=1e-2)["a"][0].item() == 2.0


def test_regmean_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    adapters = random_adapters(3, shapes={"weight": (4, 5), "other": (2, 3)})
    inputs = [torch.randn(40, 5, generator=generator, dtype=torch.float64) * torch.arange(1, 6) for _ in range(3)]
    weights = torch.tensor([0.5, 2.0, 1.0])
    grams = [{"weight": x.T @ x / len(x)} for x in inputs]
    merged = regmean(adapters, weights, grams=grams, off_diagonal=1.0)
    rows = torch.cat([weight.sqrt() * x for weight, x in zip(weights, inputs)])
    outputs = torch.cat([w.sqrt() * x @ own["weight"].double().T for w, x, own in zip(weights, inputs, adapters)])
    expected = torch.linalg.lstsq(rows, outputs).solution.T.float()
    torch.testing.assert_close(merged["weight"], expected)
    # What has no Gram matrix is averaged.
    expected = sum(weight * own["other"] for weight, own in zip(weights / 3.5, adapters))
    torch.testing.assert_close(merged["other"], expected)
    # Without what is off the diagonals, each input counts by its own size.
    merged = regmean(adapters, weights, grams=grams, off_diagonal=0.0)["weight"]
    sizes = [weight * gram["weight"].diag().float() for weight, gram in zip(weights, grams)]
    expected = sum(size * own["weight"] for size, own in zip(sizes, adapters)) / sum(sizes)
    torch.testing.assert_close(merged, expected)
    assert not torch.allclose(regmean(adapters, weights, grams=grams)["weight"], expected)


def test_regmean_where_nothing_was_seen_is_the_mean():
    adapters = random_adapters(2, shapes={"weight": (4, 3)})
    seen = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    grams = [{"weight": seen.T @ seen}, {"weight": 4 * seen.T @ seen}]
    merged = regmean(adapters, torch.tensor([1.0, 1.0]), grams=grams, off_diagonal=1.0)["weight"]
    first, second = (own["weight"] for own in adapters)
    torch.testing.assert_close(merged[:, :2], (0.2 * first + 0.8 * second)[:, :2])
    torch.testing.assert_close(merged[:, 2], (0.5 * first + 0.5 * second)[:, 2])


def as_slots(**kinds):
    return {key: Slot("layer", key, "", 0, kind) for key, kind in kinds.items()}


def test_combine_treats_tensors_by_their_kind():
    slots = as_slots(a="parameter", mean="statistic", count="statistic", places="constant")
    adapters = [
        {"a": torch.tensor([1.0]), "mean": torch.tensor([1.0]), "count": torch.tensor(3), "places": torch.arange(2)},
        {"a": torch.tensor([5.0]), "mean": torch.tensor([5.0]), "count": torch.tensor(4), "places": torch.arange(2)},
    ]
    weights = torch.tensor([1.0, -3.0], requires_grad=True)
    merged = combine(slots, adapters, weights)
    assert list(merged) == list(slots)
    assert [value.tolist() for value in merged.values()] == [[-14.0], [4.0], 7, [0, 1]]
    merged["a"].backward()
    assert weights.grad.tolist() == [1.0, 5.0]
    # Statistics go by the proportions of the function.
    merged = combine(slots, adapters, torch.ones(2), "running_mean", {"count": 3})
    assert (merged["a"].item(), merged["mean"].item(), merged["count"].item()) == (2.0, 2.0, 7)
    merged = combine(slots, adapters, torch.tensor([1.0, 9.0]), "uniform")
    assert (merged["a"].item(), merged["mean"].item()) == (3.0, 3.0)
    adapters[1]["places"] = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="differ in 'places', which is a constant"):
        combine(slots, adapters, torch.ones(2))


def test_combine_gives_factors_the_root_of_a_weight():
    slots = as_slots(a="factor_a", b="factor_b", bias="scaled")
    adapters = [{"a": torch.ones(1), "b": torch.ones(1), "bias": torch.ones(1)}] * 2
    scalings = {key: torch.tensor([1.0, 2.0]) for key in slots}
    merged = combine(slots, adapters, torch.tensor([9.0, -2.0]), "linear", scalings=scalings)
    assert [value.item() for value in merged.values()] == [3.0 - 2.0, 3.0 + 2.0, 9.0 - 4.0]
    # A mean's proportions are what they are; the tensors carry the scalings.
    merged = combine(slots, adapters, torch.tensor([1.0, 3.0]), "uniform", scalings=scalings)
    root = 2**0.5
    assert [value.item() for value in merged.values()] == pytest.approx([(1 + root) / 2, (1 + root) / 2, 1.5])
    with pytest.raises(ValueError, match="different scalings in 'layer'.*'fisher'.*lora_alpha"):
        combine(slots, adapters, torch.ones(2), "fisher", {"fisher": adapters}, scalings)


def test_functions_of_ones_own():
    @merge_function(averages=True)
    def largest(adapters, weights, *, factor=1.0):
        return {key: factor * torch.stack([own[key] for own in adapters]).amax(dim=0) for key in adapters[0]}

    try:
        adapters = [{"a": torch.tensor([1.0, 5.0])}, {"a": torch.tensor([2.0, 3.0])}]
        merged = combine(as_slots(a="parameter"), adapters, torch.ones(2), "largest", {"factor": 2.0})
        assert merged["a"].tolist() == [4.0, 10.0]
        assert largest.__name__ == "largest"
    finally:
        del COMBINATIONS["largest"]


def test_check_weights():
    assert check_weights([1, 0.5], 2).tolist() == [1.0, 0.5]
    assert check_weights(torch.tensor([0.25, 0.0]), 2).tolist() == [0.25, 0.0]
    assert check_weights([1, -1], 2, allow_negative=True).tolist() == [1.0, -1.0]
    with pytest.raises(ValueError, match="must not be negative.*-1.0"):
        check_weights([2, -1], 2)
    assert COMBINATIONS["linear"].check_weights(None, 4).tolist() == [0.25] * 4
    assert COMBINATIONS["ties"].check_weights(None, 2).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("weights", [0.5, "ab", ["a", "b"], {"a": 1.0, "b": 2.0}, [[1.0], [2.0]]])
def test_weights_that_are_no_numbers(weights):
    with pytest.raises(ValueError, match=rf"weights={re.escape(repr(weights))} must be a list of numbers; give one"):
        check_weights(weights, 2)


# What each of them cannot do without; the values matter to none of the tests that use it.
OPTIONS = {
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "magnitude_prune": {"density": 0.5},
    "fisher": {"fisher": [{key: torch.ones(shape) for key, shape in SHAPES.items()}] * 2},
    "regmean": {"grams": [{}] * 2},
    "running_mean": {"count": 1},
    "running_anchored_mean": {"count": 1},
    "exponential_moving_average": {"decay": 0.5},
}
WEIGHTED = [name for name in COMBINATIONS if COMBINATIONS[name].proportions is None]


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1.0], "1 weights for 2 adapters; give one weight for each adapter"),
        ([[1.0, 2.0], [1.0, 2.0]], r"weights of shape \(2, 2\) for 2 adapters; give one weight for each adapter"),
        ([1.0, math.nan], r"finite and not all zero, got \[1.0, nan\]"),
        ([math.inf, 1.0], "finite and not all zero"),
        ([0.0, 0.0], "finite and not all zero"),
    ],
)
@pytest.mark.parametrize("name", [*WEIGHTED, "average_statistics"])
def test_functions_check_their_weights(name, weights, message):
    adapters = random_adapters(2)
    with pytest.raises(ValueError, match=message):
        if name == "average_statistics":
            average_statistics([own["scale"] for own in adapters], torch.tensor(weights))
        else:
            COMBINATIONS[name].function(adapters, torch.tensor(weights), **OPTIONS.get(name, {}))


def test_which_weights_may_be_negative():
    adapters, weights = random_adapters(2), torch.tensor([1.0, -3.0])
    for name in WEIGHTED:
        if COMBINATIONS[name].averages:
            with pytest.raises(
                ValueError, match=r"must not be negative for a mean of the adapters, got \[1.0, -3.0\]"
            ):
                COMBINATIONS[name].function(adapters, weights, **OPTIONS[name])
        else:
            COMBINATIONS[name].function(adapters, weights, **OPTIONS.get(name, {}))
    assert len(WEIGHTED) == 7


@pytest.mark.parametrize("name", ["uniform", "running_mean", "anchored_mean", "exponential_moving_average"])
def test_means_that_take_no_weights_are_given_none(name):
    function = COMBINATIONS[name]
    message = (
        f"combination_type='{name}' takes no weights, got weights=.0.9, 0.1.; leave them out.* 'linear', 'fisher'"
    )
    with pytest.raises(ValueError, match=message):
        function.check_weights([0.9, 0.1], 2)
    merged = function(random_adapters(2), function.check_weights(None, 2), **OPTIONS.get(name, {}))
    assert merged.keys() == SHAPES.keys()
    # A count is checked all the same.
    merged = function(random_adapters(2), torch.zeros(2), **OPTIONS.get(name, {}))
    assert merged["conv"].isfinite().all()
    with pytest.raises(ValueError, match="3 weights for 2 adapters"):
        function(random_adapters(2), torch.ones(3), **OPTIONS.get(name, {}))


def test_the_check_leaves_derivatives_alone():
    adapters, weights = random_adapters(2), torch.tensor([0.3, 0.7])
    expected = torch.stack([own["weight"] for own in adapters], dim=-1)

    def merged(values):
        return linear(adapters, values)["weight"]

    torch.testing.assert_close(torch.func.jacrev(merged)(weights), expected)
    torch.testing.assert_close(torch.func.jacfwd(merged)(weights), expected)
    several = torch.stack([weights, 2 * weights])
    torch.testing.assert_close(torch.func.vmap(merged)(several)[1], merged(2 * weights))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ties", {"density": None}, "density=None must be in"),
        ("ties", {"density": -0.1}, r"density=-0.1 must be in \[0, 1\]"),
        ("magnitude_prune", {"density": 1.1}, r"density=1.1 must be in \[0, 1\]"),
        ("dare_linear", {"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ("dare_ties", {"density": float("nan")}, "density=nan"),
        ("ties", {"density": "0.5"}, r"density='0.5' must be in \[0, 1\]"),
        ("dare_linear", {"density": "0.5"}, r"density='0.5' must be in \(0, 1\]"),
        ("dare_ties", {"density": 0.5, "majority_sign_method": "x"}, "majority_sign_method='x'.*'frequency'"),
        (
            "ties",
            {"density": 0.5, "base": {"conv": torch.ones(4, 3, 2, 2)}},
            r"base has no tensor 'weight' .*\(6, 5\)",
        ),
        ("ties", {"density": 0.5, "base": {"conv": torch.ones(1)}}, r"base has no tensor 'conv' of shape \(4, 3, 2"),
        ("running_mean", {"count": 0}, "count=0 must be at least 1"),
        ("running_mean", {"count": "2"}, "count='2' must be at least 1"),
        ("running_anchored_mean", {"count": 0}, "count=0 must be at least 1"),
        (
            "running_anchored_mean",
            {"count": 2, "first_share": 2},
            "first_share=2 must be between 0, the mean of all, an",
        ),
        ("anchored_mean", {"first_share": -0.1}, "first_share=-0.1 must be between 0, the mean of all, and 1"),
        ("anchored_mean", {"first_share": None}, "first_share=None must be between"),
        ("exponential_moving_average", {"decay": "0.5"}, "decay='0.5' must be between 0 and 1"),
        ("exponential_moving_average", {"decay": 1.5}, "decay=1.5 must be between 0 and 1"),
        ("fisher", {"fisher": []}, "fisher holds 0 entries for 3 adapters"),
        ("fisher", {"fisher": random_adapters(), "epsilon": -1}, "epsilon=-1 must be between 0 and 1"),
        ("fisher", {"fisher": [{}] * 3}, r"fisher\[0\] holds nothing for 'conv'"),
        ("fisher", {"fisher": random_adapters()}, "fisher of 'conv' must not be negative"),
        ("regmean", {"grams": [{}]}, "grams holds 1 entries for 3 adapters"),
        ("regmean", {"grams": [{"weight": torch.eye(5)}, {}, {}]}, r"grams\[1\] holds nothing for 'weight'"),
        ("regmean", {"grams": [{"weight": torch.eye(6)}] * 3}, r"shape \(6, 6\) for 'weight'; .* \(5, 5\)"),
        (
            "regmean",
            {"grams": [{"weight": torch.eye(5)}, {"weight": torch.full((5, 5), math.nan)}, {"weight": torch.eye(5)}]},
            r"grams\[1\] holds NaN or infinity for 'weight'; measure it on finite images",
        ),
        (
            "fisher",
            {"fisher": [{key: torch.full(shape, math.inf) for key, shape in SHAPES.items()}] * 3},
            r"fisher\[0\] holds NaN or infinity for 'conv'",
        ),
        ("regmean", {"grams": [{}] * 3, "off_diagonal": 2}, "off_diagonal=2 must be between 0 and 1"),
        ("regmean", {"grams": [{}] * 3, "off_diagonal": "1"}, "off_diagonal='1' must be between 0 and 1"),
    ],
)
def test_unusable_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        COMBINATIONS[name](random_adapters(), torch.ones(3), **options)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([], "No adapters to merge"),
        (
            [{"a": torch.ones(2)}, {"a": torch.ones(3)}],
            r"Adapters 0 and 1 differ in the shape of a \(\(2,\) and \(3,\)\)",
        ),
        ([{"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}], "differ in the shape of b"),
        ([{"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)}], "differ in the shape of b"),
    ],
)
@pytest.mark.parametrize("name", ["linear", "uniform", "anchored_mean", "exponential_moving_average"])
def test_adapters_with_other_tensors_are_refused(name, adapters, message):
    options = {"decay": 0.5} if name == "exponential_moving_average" else {}
    with pytest.raises(ValueError, match=message):
        COMBINATIONS[name](adapters, torch.ones(len(adapters)), **options)


def test_whole_numbers_are_weights_too():
    adapters = random_adapters(2)
    assert_same(linear(adapters, torch.tensor([1, -1])), linear(adapters, torch.tensor([1.0, -1.0])))
    assert_same(uniform(adapters, torch.tensor([1, 1])), uniform(adapters, torch.ones(2)))


@pytest.mark.parametrize("name", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "uniform"])
def test_merged_tensors_have_the_precision_of_the_adapters(name):
    adapters = [{"w": torch.randn(4, 4, dtype=torch.float16)} for _ in range(2)]
    options = {} if name in ("linear", "uniform") else {"density": 0.5}
    assert COMBINATIONS[name](adapters, torch.full((2,), 0.5), **options)["w"].dtype is torch.float16

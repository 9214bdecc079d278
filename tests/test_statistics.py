"""Class statistics against direct computation, planted drift, and moments of samples."""

import warnings

import pytest
import torch

from dynammo_peft.data import (
    AffineMap,
    ClassStatistics,
    choose_ridge,
    fit_affine_map,
    fit_map_of_others,
    left_out_errors,
)
from dynammo_peft.data.drift import RIDGES


def drawn(count=90, features=5, classes=3, seed=0):
    """Features with a mean and a covariance of their own for each class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    spread = torch.randn(classes, features, features, generator=generator)
    means = 3 * torch.randn(classes, features, generator=generator)
    noise = torch.randn(count, features, generator=generator)
    return means[labels] + torch.einsum("nc,ncd->nd", noise, spread[labels]), labels


def known(features=5, **options):
    statistics = ClassStatistics(**options)
    statistics.update(*drawn(features=features))
    return statistics


def direct(features, labels, label):
    """Mean and covariance by PyTorch."""
    own = features[labels == label].double()
    return own.mean(dim=0), torch.cov(own.T, correction=0)


@pytest.mark.parametrize("parts", [1, 2, 90])
@pytest.mark.parametrize("covariance", ["shared", "class"])
def test_updates_are_exact_in_any_number_of_parts(covariance, parts):
    features, labels = drawn()
    statistics = ClassStatistics(covariance)
    for part in torch.arange(90).chunk(parts):
        statistics.update(features[part], labels[part])
    assert statistics.classes == [0, 1, 2]
    assert statistics.counts == {0: 30, 1: 30, 2: 30}
    means, covariances = zip(*(direct(features, labels, label) for label in range(3)))
    torch.testing.assert_close(statistics.mean_matrix(), torch.stack(means))
    torch.testing.assert_close(statistics.pooled_covariance(), sum(covariances) / 3)
    if covariance == "class":
        pooled = statistics.pooled_covariance()
        for label in range(3):
            torch.testing.assert_close(statistics.class_covariance(label, pooled, 0.0), covariances[label])


@pytest.mark.parametrize("options", [{}, {"covariance": "class"}, {"covariance": "class", "rank": 5}])
def test_parts_of_the_data_combine_to_the_whole(options):
    features, labels = drawn()
    whole = ClassStatistics(**options)
    whole.update(features, labels)
    parts = [ClassStatistics(**options) for _ in range(3)]
    # The last part has not seen every class.
    for part, chosen in zip(parts, (labels < 2, (labels == 2) & (torch.arange(90) < 40), torch.arange(90) >= 40)):
        chosen = chosen & (torch.arange(90) < 40) if part is not parts[2] else chosen
        part.update(features[chosen], labels[chosen])
    combined = parts[0].combine(parts[1:])
    assert combined.counts == whole.counts
    torch.testing.assert_close(combined.mean_matrix(), whole.mean_matrix())
    torch.testing.assert_close(combined.pooled_covariance(), whole.pooled_covariance())


def test_shared_covariance_counts_images_and_class_covariances_count_classes():
    features, labels = drawn()
    chosen = (labels == 0) | (torch.arange(90) < 15)
    features, labels = features[chosen], labels[chosen]
    shared, own = ClassStatistics("shared"), ClassStatistics("class")
    for statistics in (shared, own):
        statistics.update(features, labels)
    parts = [(int((labels == label).sum()), direct(features, labels, label)[1]) for label in range(3)]
    torch.testing.assert_close(
        shared.pooled_covariance(), sum(count * part for count, part in parts) / sum(count for count, _ in parts)
    )
    torch.testing.assert_close(own.pooled_covariance(), sum(part for _, part in parts) / 3)


def test_single_precision_far_from_zero_loses_nothing():
    features, labels = drawn()
    statistics = ClassStatistics()
    statistics.update(features + 1000, labels)
    expected = sum(direct((features + 1000), labels, label)[1] for label in range(3)) / 3
    torch.testing.assert_close(statistics.pooled_covariance(), expected, rtol=1e-9, atol=1e-9)


def test_low_rank_keeps_leading_directions_and_every_variance():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([10.0, 5.0, 0.1, 0.1, 0.1, 0.1])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    features = torch.randn(200, 6, generator=generator) * scale @ turn
    statistics = ClassStatistics("class", rank=2)
    for part in features.split(37):
        statistics.update(part, torch.zeros(len(part), dtype=torch.long))
    exact = torch.cov(features.double().T, correction=0)
    kept = statistics.pooled_covariance()
    torch.testing.assert_close(kept.diagonal(), exact.diagonal())
    assert (kept - exact).norm() < 0.01 * exact.norm()
    scatter = statistics._scatters[0]
    assert scatter.factor.shape == (2, 6)


def test_low_rank_with_all_directions_is_exact():
    features, labels = drawn()
    exact, full = ClassStatistics("class"), ClassStatistics("class", rank=5)
    weight = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    affine_map = AffineMap(weight, torch.ones(5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64))
    for statistics in (exact, full):
        for part in range(0, 90, 30):
            statistics.update(features[part : part + 30], labels[part : part + 30])
        statistics.move(affine_map)
    torch.testing.assert_close(full.pooled_covariance(), exact.pooled_covariance())


@pytest.mark.parametrize("covariance", ["shared", "class"])
def test_moved_statistics_are_those_of_moved_features(covariance):
    features, labels = drawn()
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    bias = torch.randn(5, dtype=torch.float64, generator=generator)
    residual = torch.diag(torch.arange(5.0, dtype=torch.float64))
    moved, expected = ClassStatistics(covariance), ClassStatistics(covariance)
    moved.update(features, labels)
    moved.move(AffineMap(weight, bias, residual))
    expected.update(features.double() @ weight + bias, labels)
    torch.testing.assert_close(moved.mean_matrix(), expected.mean_matrix())
    # Where the map does not tell where a feature goes, the class is that much wider.
    torch.testing.assert_close(moved.pooled_covariance(), expected.pooled_covariance() + residual)


def test_a_planted_drift_is_recovered():
    generator = torch.Generator().manual_seed(4)
    before = torch.randn(300, 6, generator=generator).double() + 5
    weight = torch.eye(6).double() + 0.3 * torch.randn(6, 6, generator=generator).double()
    bias = torch.randn(6, generator=generator).double()
    found = fit_affine_map(before, before @ weight + bias, ridge=0.0)
    torch.testing.assert_close(found.weight, weight)
    torch.testing.assert_close(found.bias, bias)
    assert found.residual.abs().max() < 1e-12
    torch.testing.assert_close(found(before), before @ weight + bias)
    noise = 0.5 * torch.randn(300, 6, generator=generator).double()
    found = fit_affine_map(before, before @ weight + bias + noise, ridge=0.0)
    torch.testing.assert_close(found.residual.diagonal(), torch.full((6,), 0.25).double(), rtol=0.2, atol=0)


def test_the_ridge_is_a_pull_to_the_identity():
    generator = torch.Generator().manual_seed(5)
    before = torch.randn(40, 4, generator=generator).double() * torch.tensor([0.1, 1.0, 3.0, 30.0])
    after = before @ torch.randn(4, 4, generator=generator).double() + 1
    strength = 0.7
    centred, target = before - before.mean(dim=0), after - after.mean(dim=0)
    # Least squares with four more observations, which say that each feature stays what it is, each on its own scale.
    stay = torch.diag((strength * centred.square().sum(dim=0)).sqrt())
    rows, values = torch.cat([centred, stay]), torch.cat([target, stay])
    expected = torch.linalg.lstsq(rows, values).solution
    torch.testing.assert_close(fit_affine_map(before, after, strength).weight, expected)
    torch.testing.assert_close(fit_affine_map(before, after, 1e9).weight, torch.eye(4).double(), atol=1e-6, rtol=0)


def test_images_that_vary_by_less_than_others_do_pull_no_less():
    generator = torch.Generator().manual_seed(16)
    before = torch.randn(8, 4, generator=generator).double() * torch.tensor([0.1, 1.0, 3.0, 30.0])
    after = before @ torch.randn(4, 4, generator=generator).double() + 1
    of_others = torch.tensor([9.0, 0.01, 100.0, 1.0]).double()
    centred, target = before - before.mean(dim=0), after - after.mean(dim=0)
    stay = torch.diag((0.7 * 8 * torch.maximum(centred.square().mean(dim=0), of_others)).sqrt())
    expected = torch.linalg.lstsq(torch.cat([centred, stay]), torch.cat([target, stay])).solution
    torch.testing.assert_close(fit_affine_map(before, after, 0.7, of_others).weight, expected)
    # Two views of one image, which change by next to nothing, do not say that all moves by a hundred times that.
    before = torch.ones(2, 4).double() + 0.001 * torch.randn(2, 4, generator=generator).double()
    after = before + 0.1 * torch.randn(2, 4, generator=generator).double()
    away = torch.full((1, 4), 5.0).double()
    assert (fit_affine_map(before, after)(away) - away).norm() > 10
    assert (fit_affine_map(before, after, variances=torch.ones(4))(away) - away).norm() < 0.5


def test_a_ridge_is_chosen_in_the_units_it_is_used_in():
    before, after, labels = drifting_classes(2, 8, change=0.1, noise=1.0)
    own = choose_ridge(before, after, labels)
    assert min(RIDGES) < own < max(RIDGES)
    # In units ten times as large, a tenth of it is as much.
    wide = 10 * before.var(dim=0, correction=0)
    finer = [ridge / 10 for ridge in RIDGES]
    assert choose_ridge(before, after, labels, (*finer, *RIDGES), variances=wide) == pytest.approx(own / 10)


def test_the_scale_of_a_feature_does_not_matter():
    generator = torch.Generator().manual_seed(6)
    before, after = torch.randn(2, 40, 3, generator=generator).double()
    labels = torch.arange(40) % 4
    scale = torch.tensor([0.1, 1.0, 10.0]).double()
    found, scaled = fit_affine_map(before, after, 0.3), fit_affine_map(before * scale, after * scale, 0.3)
    torch.testing.assert_close(scaled(before * scale), found(before) * scale)
    assert choose_ridge(before * scale, after * scale, labels) == choose_ridge(before, after, labels)


def drifting_classes(seed, classes, change, noise):
    """Features of classes in few dimensions before and after a change."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40 * classes) % classes
    before = (
        torch.randn(len(labels), 12, generator=generator) + 2 * torch.randn(classes, 12, generator=generator)[labels]
    )
    weight = torch.eye(12) + change * torch.randn(12, 12, generator=generator)
    shift = noise * torch.randn(classes, 12, generator=generator)[labels]
    return before, before @ weight + shift, labels


def test_the_ridge_is_weak_for_classes_that_move_together_and_strong_for_those_that_do_not():
    assert choose_ridge(*drifting_classes(0, 6, change=0.3, noise=0.0)) == min(RIDGES)
    assert choose_ridge(*drifting_classes(0, 6, change=0.0, noise=1.0)) == max(RIDGES)
    # One class cannot tell.
    assert choose_ridge(*drifting_classes(0, 1, change=0.3, noise=0.0)) == 1.0


def left_out(before, after, labels, ridge, folds):
    """Errors of the mean of each class, `(M, C)`, of maps fitted on the others by least squares."""
    before, after, errors = before.double(), after.double(), {}
    for fold in range(min(folds, len(labels.unique()))):
        held = torch.isin(labels, labels.unique()[fold::folds])
        # With the variances of all classes, whose scale a fold does not change.
        scale = before.std(dim=0, correction=0) / before[~held].std(dim=0, correction=0)
        own = before[~held] - before[~held].mean(dim=0)
        stay = torch.diag((ridge * own.square().sum(dim=0)).sqrt() * scale)
        rows, targets = torch.cat([own, stay]), torch.cat([after[~held] - after[~held].mean(dim=0), stay])
        weight = torch.linalg.lstsq(rows, targets).solution
        for label in labels[held].unique():
            moved = (before[labels == label].mean(dim=0) - before[~held].mean(dim=0)) @ weight
            errors[int(label)] = after[labels == label].mean(dim=0) - after[~held].mean(dim=0) - moved
    return torch.stack([errors[label] for label in sorted(errors)])


@pytest.mark.parametrize("folds", [3, 5])
def test_the_chosen_ridge_predicts_left_out_classes_best(folds):
    before, after, labels = drifting_classes(1, 4, change=0.1, noise=0.3)
    found = {ridge: left_out(before, after, labels, ridge, folds) for ridge in RIDGES}
    errors = {ridge: (missed / before.double().std(dim=0)).square().sum() for ridge, missed in found.items()}
    assert choose_ridge(before, after, labels, folds=folds) == min(errors, key=errors.get)
    assert choose_ridge(before, after, labels, candidates=(0.5,)) == 0.5
    for ridge in (0.1, 3.0):
        expected = found[ridge].square().mean(dim=0)
        torch.testing.assert_close(left_out_errors(before, after, labels, ridge, folds), expected)


def test_classes_that_none_of_the_images_is_of_may_stray_from_a_map():
    # Fewer images than features, and more.
    for classes, factor in ((2, 3.0), (4, 2.0)):
        before, after, labels = drifting_classes(3, classes, change=0.1, noise=0.3)
        for rows in (slice(None), slice(2 * classes)):
            images = before[rows], after[rows]
            of_own, of_others = fit_affine_map(*images, 0.3), fit_map_of_others(*images, labels[rows], 0.3)
            assert torch.equal(of_others.weight, of_own.weight) and torch.equal(of_others.bias, of_own.bias)
            missed = left_out(*images, labels[rows], 0.3, classes).square().mean(dim=0)
            torch.testing.assert_close(of_others.residual, of_own.residual + factor * torch.diag(missed))
    # A single class tells of others no more than that all it changes by may be its own.
    before, after, labels = drifting_classes(3, 1, change=0.1, noise=0.3)
    change = (after.double() - before.double()).mean(dim=0)
    torch.testing.assert_close(left_out_errors(before, after, labels), change.square())


def test_directions_never_seen_stay_as_they_are():
    before = torch.zeros(20, 3)
    before[:, 0] = torch.arange(20.0)
    after = before.clone()
    after[:, 0] *= 2
    found = fit_affine_map(before, after, ridge=0.0)
    torch.testing.assert_close(found.weight, torch.diag(torch.tensor([2.0, 1.0, 1.0])).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("covariance", ["shared", "class"])
def test_samples_have_the_moments_they_are_drawn_from(covariance):
    features, labels = drawn()
    statistics = ClassStatistics(covariance)
    statistics.update(features, labels)
    samples = statistics.sample([2, 0], 20000, 0.25, torch.Generator().manual_seed(0))
    assert samples.shape == (2, 20000, 5)
    assert samples.dtype == torch.float32
    pooled = statistics.pooled_covariance()
    for label, own in zip((2, 0), samples.double()):
        covariance = statistics.class_covariance(label, pooled, 0.25)
        scale = covariance.diagonal().sqrt()
        torch.testing.assert_close(own.mean(dim=0) / scale, statistics.means[label] / scale, atol=0.03, rtol=0)
        difference = (torch.cov(own.T) - covariance) / scale[:, None] / scale[None]
        assert difference.abs().max() < 0.05
    again = statistics.sample([2, 0], 20000, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(samples, again)


def test_shrinkage_follows_the_number_of_images():
    features, labels = drawn()
    statistics = ClassStatistics("class")
    statistics.update(features, labels)
    pooled, own = statistics.pooled_covariance(), direct(features, labels, 1)[1]
    torch.testing.assert_close(statistics.class_covariance(1, pooled), (30 * own + 5 * pooled) / 35)
    torch.testing.assert_close(statistics.class_covariance(1, pooled, 1.0), pooled)


def test_a_class_with_too_few_images_takes_the_pooled_covariance_and_is_named():
    features, labels = drawn()
    labels[labels == 1] = 0
    labels[1] = 1
    statistics = ClassStatistics("class")
    statistics.names = {1: "mast cell"}
    statistics.update(features, labels)
    pooled = statistics.pooled_covariance()
    torch.testing.assert_close(pooled, sum(direct(features, labels, label)[1] for label in (0, 2)) / 2)
    with pytest.warns(UserWarning, match="'mast cell' has 1 images, too few for a covariance"):
        assert torch.equal(statistics.class_covariance(1, pooled), pooled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics.class_covariance(0, pooled)


def test_a_sparse_class_is_drawn_from_the_pooled_covariance_wherever_it_comes():
    generator = torch.Generator().manual_seed(8)
    scale = torch.tensor([10.0, 1.0, 0.1]).repeat_interleave(50)[:, None]
    features, labels = torch.randn(150, 4, generator=generator) * scale, torch.arange(3).repeat_interleave(50)
    chosen = (labels != 1) | (torch.arange(150) % 50 < 2)
    statistics = ClassStatistics("class")
    statistics.update(features[chosen], labels[chosen])
    pooled = statistics.pooled_covariance()
    for order in ([1], [0, 1], [2, 1], [1, 2, 1]):
        with pytest.warns(UserWarning, match="Class 1 has 2 images"):
            drawn = statistics.sample(order, 20000, generator=torch.Generator().manual_seed(0))
        spread = drawn[order.index(1)].double().var(dim=0)
        torch.testing.assert_close(spread, pooled.diagonal(), rtol=0.05, atol=0)


@pytest.mark.parametrize("options", [{}, {"covariance": "class"}, {"covariance": "class", "rank": 5}])
def test_several_views_of_an_image_count_as_one(options):
    features, labels = drawn()
    views = torch.stack([features, features + 0.1 * features.flip(0)])
    statistics, flat = ClassStatistics(**options), ClassStatistics(**options)
    for part in torch.arange(90).chunk(3):
        statistics.update(views[:, part], labels[part])
    flat.update(views.flatten(0, 1), labels.repeat(2))
    assert statistics.counts == {0: 30, 1: 30, 2: 30}
    torch.testing.assert_close(statistics.mean_matrix(), flat.mean_matrix())
    torch.testing.assert_close(statistics.pooled_covariance(), flat.pooled_covariance())
    # Two images do not become four by being looked at twice.
    few = ClassStatistics("class")
    few.update(views[:, :6], labels[:6])
    with pytest.warns(UserWarning, match="Class 0 has 2 images"):
        few.class_covariance(0, few.pooled_covariance())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: ClassStatistics().update(torch.ones(3, 2), torch.zeros(2)), ["(3, 2)", "(2,)"]),
        (lambda: ClassStatistics().update(torch.ones(2), torch.zeros(2)), ["(N, C)", "(2,)"]),
        (lambda: known().update(torch.ones(3, 2), torch.zeros(3)), ["2 columns", "5"]),
        (lambda: known().combine([known(covariance="class")]), ["covariance='class'", "covariance='shared'"]),
        (lambda: known().combine([known(rank=2)]), ["rank=2", "rank=None"]),
        (lambda: known().combine([known(features=4)]), ["4", "5", "features"]),
        (lambda: known().sample([0, 7], 2), ["class 7", "[0, 1, 2]"]),
        (lambda: known(covariance="class").class_covariance(7, torch.eye(5)), ["class 7"]),
        (lambda: ClassStatistics().state(), ["No class is known"]),
        (lambda: ClassStatistics().mean_matrix(), ["No class is known"]),
        (lambda: ClassStatistics().pooled_covariance(), ["No class is known"]),
        (lambda: ClassStatistics().sample([], 2), ["No class is known"]),
        (lambda: ClassStatistics("diagonal"), ["covariance='diagonal'", "'shared'", "'class'"]),
        (lambda: ClassStatistics(rank=0), ["rank=0", "at least 1"]),
        (lambda: ClassStatistics().update(torch.tensor([[torch.nan]]), torch.tensor([0])), ["NaN"]),
        (lambda: fit_affine_map(torch.ones(3, 2), torch.ones(2, 2)), ["(3, 2)", "(2, 2)"]),
        (lambda: fit_affine_map(torch.ones(0, 2), torch.ones(0, 2)), ["(0, 2)"]),
        (lambda: fit_affine_map(torch.ones(3, 2), torch.ones(3, 2), -1), ["ridge=-1"]),
        (lambda: fit_affine_map(torch.ones(3, 2), torch.ones(3, 2), 1, torch.ones(3)), ["2 variances", "(3,)"]),
        (lambda: choose_ridge(torch.ones(3, 2), torch.ones(2, 2), torch.zeros(3)), ["(3, 2)", "(2, 2)"]),
        (lambda: left_out_errors(torch.ones(3, 2), torch.ones(2, 2), torch.zeros(3)), ["(3, 2)", "(2, 2)"]),
    ],
)
def test_unusable_input_is_refused(wrong, words):
    with pytest.raises(ValueError) as error:
        wrong()
    assert all(word in str(error.value) for word in words)


def test_shrinkage_must_be_a_share():
    statistics = ClassStatistics("class")
    statistics.update(*drawn())
    with pytest.raises(ValueError, match=r"shrinkage=1\.5"):
        statistics.class_covariance(0, statistics.pooled_covariance(), 1.5)


def test_where_all_classes_have_too_few_images_these_are_pooled():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(400).repeat_interleave(3)
    features = 5 * torch.randn(400, 4, generator=generator)[labels] + 0.05 * torch.randn(1200, 4, generator=generator)
    statistics = ClassStatistics("class")
    statistics.update(features, labels)
    pooled = statistics.pooled_covariance()
    centred = (
        features.double() - torch.stack([features[labels == label].double().mean(0) for label in range(400)])[labels]
    )
    torch.testing.assert_close(pooled, centred.T @ centred / 800)
    torch.testing.assert_close(pooled.diagonal().sqrt(), torch.full((4,), 0.05).double(), atol=0.003, rtol=0)
    single = ClassStatistics("class")
    single.update(features[::3], labels[::3])
    assert torch.equal(single.pooled_covariance(), torch.eye(4).double())


def test_a_feature_that_was_silent_does_not_choose_alone():
    before, after, labels = drifting_classes(0, 6, change=0.3, noise=0.0)
    generator = torch.Generator().manual_seed(1)
    silent, wakes = torch.zeros(len(before), 1), 0.01 * torch.randn(len(before), 1, generator=generator)
    expected = choose_ridge(before, after, labels)
    assert choose_ridge(torch.cat([before, silent], dim=1), torch.cat([after, wakes], dim=1), labels) == expected


def test_no_class_has_no_samples():
    statistics = ClassStatistics()
    statistics.update(*drawn())
    assert statistics.sample([], 7).shape == (0, 7, 5)


@pytest.mark.parametrize("covariance", ["shared", "class"])
def test_a_low_rank_covariance_holds_no_image(covariance):
    # More directions than images: all fit.
    features, labels = drawn(count=12, features=20)
    statistics = ClassStatistics(covariance, rank=16)
    statistics.update(features, labels)
    exact = ClassStatistics(covariance)
    exact.update(features, labels)
    torch.testing.assert_close(statistics.pooled_covariance(), exact.pooled_covariance())
    state = statistics.state()
    kept = torch.cat([tensor for name, tensor in state.items() if name.endswith("factor")])
    for mean in state["means"]:
        assert torch.cdist(features.double(), mean + kept).min() > 0.1
        assert torch.cdist(features.double(), mean - kept).min() > 0.1


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("covariance", ["shared", "class"])
def test_a_state_stays_what_it_was(covariance, rank):
    features, labels = drawn()
    statistics = ClassStatistics(covariance, rank)
    statistics.update(features, labels)
    state = statistics.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    copy = ClassStatistics(covariance, rank)
    copy.restore(state)
    statistics.update(10 * features, labels)
    copy.update(100 * features, labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())

"""What the first adapter tells of classes under the merged one, without their images."""

import math

import pytest
import torch
from test_dynammo import arguments, begun, learn_nothing, scenario, strong  # noqa: F401
from tiny import tiny_model

from dynammo_peft import Dynammo
from dynammo_peft.data import AffineMap, ClassStatistics, fit_affine_map, fit_correction, fit_map_of_others
from dynammo_peft.methods.anchor import Anchor, class_means, interpolate, likeness, nearness


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def many_classes(features=4, classes=40, each=20):
    """Features of classes far apart, and their labels."""
    labels = torch.arange(classes).repeat_interleave(each)
    return 3 * drawn(classes, features, seed=1)[labels] + drawn(len(labels), features, seed=2), labels


def test_a_planted_error_is_found():
    features, labels = many_classes()
    weight, bias = 0.3 * drawn(4, 4, seed=3), drawn(4, seed=4)
    correction = fit_correction(features, features @ weight + bias, labels, ridge=0.5)
    centred = features - features.mean(dim=0)
    pull = 0.5 * len(features) * torch.diag(features.var(dim=0, correction=0))
    expected = torch.linalg.solve(centred.T @ centred + pull, centred.T @ centred @ weight)
    torch.testing.assert_close(correction[:-1], expected)
    # In their middle all classes are wrong by what they have in common.
    found = features.mean(dim=0) @ correction[:-1] + correction[-1]
    torch.testing.assert_close(found, 40 / 42 * (features.mean(dim=0) @ weight + bias))


def test_with_less_pull_all_is_corrected():
    features, labels = many_classes()
    weight = 0.3 * drawn(4, 4, seed=3)
    torch.testing.assert_close(fit_correction(features, features @ weight, labels, ridge=0.0)[:-1], weight)
    assert fit_correction(features, features @ weight, labels, ridge=1e9)[:-1].abs().max() < 1e-6


def test_fewer_classes_say_less_of_all():
    features, _ = many_classes()
    errors = torch.tensor([1.0, -2.0, 0.0, 3.0]).double().expand(len(features), 4)
    for classes in (1, 2, 8):
        correction = fit_correction(features, errors, torch.arange(len(features)) % classes)
        torch.testing.assert_close(correction[-1], classes / (classes + 2) * errors[0])
        assert correction[:-1].abs().max() < 1e-12
    with pytest.raises(ValueError, match="of the same images"):
        fit_correction(features, features[:5], torch.zeros(len(features)))


def test_two_views_of_one_image_say_little_of_other_classes():
    views = torch.ones(2, 4).double() + 0.001 * drawn(2, 4)
    errors = 0.1 * drawn(2, 4, seed=1)
    away = torch.full((4,), 5.0).double()

    def corrected(**options):
        correction = fit_correction(views, errors, torch.zeros(2), **options)
        return (away @ correction[:-1] + correction[-1]).norm()

    assert corrected() > 5
    assert corrected(variances=torch.ones(4)) < 0.2


def anchored(count):
    """An anchor, and a method that has merged `count` adapters."""
    method = Dynammo(tiny_model("vit"), arguments(memory_size=0))
    method.adapters = [f"task_{index:03d}" for index in range(count)]
    return method, Anchor(method)


def test_the_path_goes_through_all_merges():
    maps = [
        AffineMap(torch.randn(3, 3).double(), torch.randn(3).double(), torch.zeros(3, 3).double()) for _ in range(3)
    ]
    _, anchor = anchored(1)
    features = torch.randn(2, 5, 3)
    expected = features
    for step in maps:
        anchor.follow(step)
        expected = step(expected)
        torch.testing.assert_close(anchor.moved(features), expected, atol=1e-4, rtol=1e-4)


def test_old_classes_take_their_share_of_what_was_wrong():
    method, anchor = anchored(1)
    merged, true, old = ClassStatistics(), {}, 5 * drawn(4, 3, seed=6)
    # Under the merged adapter all is twice as far out, and shifted; the path knows nothing of it.
    for label in range(4):
        method.adapters = [""] * (label + 1)
        anchor.take_in(old[label].repeat(1, 5, 1).float(), torch.full((5,), label))
        merged.update(old[label].repeat(5, 1), torch.full((5,), label))
        true[label] = 2 * old[label] + 1
    anchor.path = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    method.adapters = [""] * 5
    first, labels = many_classes(features=3, classes=60)
    first = torch.stack([first, first + 0.1])
    correction = fit_correction(first.flatten(0, 1), (first + 1).flatten(0, 1), labels.repeat(2))
    before = {label: mean.clone() for label, mean in merged.means.items()}
    anchor.correct(merged, first.float(), (2 * first + 1).float(), labels + 4)
    # Each class was seen in five images, all the same.
    new, none = class_means(first, labels), torch.zeros(3).double()
    alike, near = likeness(old, new, none), nearness(torch.cat([old, new]), none)
    assert alike.min() < 0.8
    # Old classes were where the path says, so that they told nothing of the new ones.
    left = new + 1 - (new @ correction[:-1] + correction[-1])
    own = interpolate(left, near[4:, 4:], near[4:, :4], 0.01)
    for label, mean in merged.means.items():
        whole = alike[label] * (old[label] @ correction[:-1] + correction[-1]) + own[label]
        share = math.log(4 / (label + 1)) / math.log(4)
        torch.testing.assert_close(mean, before[label] + share * whole, atol=1e-3, rtol=1e-3)
    # The first task's class went all the way, the newest was measured after the last merge.
    assert (merged.means[0] - true[0]).norm() < 0.5 * (before[0] - true[0]).norm()
    assert torch.equal(merged.means[3], before[3])
    identity = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    torch.testing.assert_close(anchor.path, identity + correction.float(), atol=1e-3, rtol=1e-3)


def test_a_task_of_one_image_leaves_old_classes_where_they_are():
    method, anchor = anchored(3)
    method.statistics, method.anchor, method.views = ClassStatistics(), anchor, 2
    features, labels = many_classes(classes=4)
    for statistics in (anchor.statistics, method.statistics):
        statistics.update(features, labels)
    anchor.tasks = dict.fromkeys(range(4), 1)
    anchor.path = torch.cat([torch.eye(4), torch.zeros(1, 4)])
    before = method.statistics.mean_matrix()
    # Its two views are all but the same, and go where they go by a tenth of what features vary by.
    views, moves = 1 + 0.001 * drawn(2, 1, 4, seed=7), 0.1 * drawn(2, 2, 1, 4, seed=8)
    anchor.correct(method.statistics, views.float(), (views + moves[0]).float(), torch.tensor([4]))
    assert 0 < (method.statistics.mean_matrix() - before).norm(dim=1).max() < 0.5
    before = method.statistics.mean_matrix()
    method._move_statistics(views, views + moves[1], torch.tensor([4]))
    assert 0 < (method.statistics.mean_matrix() - before).norm(dim=1).max() < 0.5


def off_the_path(places, new, deviation, times=1):
    """How far old classes at `places` have moved after new ones at `new` were seen off the path."""
    method, anchor = anchored(1)
    merged = ClassStatistics()
    for label, place in enumerate(places):
        anchor.take_in(place.repeat(1, 5, 1), torch.full((5,), label))
        merged.update(place.repeat(5, 1), torch.full((5,), label))
    anchor.path = torch.cat([torch.eye(len(new[0])), torch.zeros(1, len(new[0]))])
    method.adapters = [""] * 3
    labels = torch.arange(len(new)).repeat_interleave(5)
    moved = []
    for _ in range(times):
        anchor.correct(merged, new[labels][None], (new + deviation)[labels][None], labels + len(places))
        moved.append(merged.mean_matrix() - torch.stack(list(places)))
    return moved


def test_what_two_near_classes_are_wrong_by_holds_for_those_between_them_alone():
    # Two new classes near the first old one, off the path in one direction; the other old ones are far away.
    places = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]]).double()
    new = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    (moved,) = off_the_path(places, new, torch.tensor([0.0, 4.0]).double())
    torch.testing.assert_close(moved[0], torch.tensor([0.0, 4.0]).double(), atol=0.1, rtol=0)
    assert moved[1:].norm(dim=1).max() < 0.2 * 4


def test_what_is_known_already_is_not_corrected_twice():
    places = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0]]).double()
    new = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    once, twice = off_the_path(places, new, torch.tensor([0.0, 4.0]).double(), times=2)
    assert once[0].norm() > 3.9
    assert twice[0].norm() < 5.0


def test_the_path_is_in_the_state():
    _, anchor = anchored(1)
    anchor.take_in(drawn(1, 30, 4), torch.arange(3).repeat(10))
    anchor.follow(AffineMap(drawn(4, 4, seed=1), drawn(4, seed=2), torch.zeros(4, 4).double()))
    _, again = anchored(1)
    again.restore(anchor.state())
    assert torch.equal(again.path, anchor.path) and again.tasks == anchor.tasks
    torch.testing.assert_close(again.statistics.mean_matrix(), anchor.statistics.mean_matrix())


def test_classes_are_alike_that_are_no_farther_than_new_ones_from_each_other():
    new = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    old = torch.tensor([[0.0, 1.0], [0.0, 10.0], [3.0, 1.0]])
    # Mean squared distances to both: 1, 82 and 10; of both to each other: 4.
    torch.testing.assert_close(likeness(old, new, torch.ones(2)), torch.tensor([1.0, 4 / 82, 0.4]))
    # In units of the deviation within classes.
    torch.testing.assert_close(likeness(old, new, torch.tensor([9.0, 1.0])), torch.tensor([1.0, 4 / 82, 1.0]))
    # A single new class: old ones are 81, 9 and 90 from each other.
    torch.testing.assert_close(likeness(old, new[:1], torch.ones(2)), torch.tensor([1.0, 0.6, 1.0]))
    assert likeness(old[:1], new[:1], torch.ones(2)).tolist() == [1.0]
    # Features that never vary, and classes that are the same.
    assert likeness(old, new, torch.zeros(2)).isfinite().all()
    assert likeness(new, new, torch.ones(2)).tolist() == [1.0, 1.0]


def test_nearness_is_in_units_of_the_root_mean_square_distance():
    # Squared distances 4, 16 and 20, in units of the deviation of the second feature 4, 4 and 8.
    means = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]).double()
    expected = torch.exp(-torch.tensor([[0.0, 4.0, 4.0], [4.0, 0.0, 8.0], [4.0, 8.0, 0.0]]).double() * 3 / 16)
    torch.testing.assert_close(nearness(means, torch.tensor([1.0, 4.0]).double()), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(nearness(torch.zeros(3, 2), torch.zeros(2)), torch.ones(3, 3))


def test_interpolation_is_the_mean_of_a_gaussian_given_what_is_known():
    places = drawn(5, 2)
    near = torch.exp(-torch.cdist(places, places).square())
    values = drawn(3, 4, seed=1)
    # By the precision matrix of all five, known ones with noise, instead of their covariance.
    joint = near + torch.diag(torch.tensor([0.5, 0.5, 0.5, 0.0, 0.0]).double())
    precision = torch.linalg.inv(joint)
    expected = -torch.linalg.solve(precision[3:, 3:], precision[3:, :3] @ values)
    torch.testing.assert_close(interpolate(values, near[:3, :3], near[:3, 3:], 0.5), expected)
    torch.testing.assert_close(interpolate(values, near[:3, :3], near[:3, :3], 0.0), values)
    assert not interpolate(values, near[:3, :3], torch.zeros(3, 2).double(), 0.5).any()


def test_nothing_is_wrong_before_two_adapters_are_merged():
    _, anchor = anchored(2)
    merged = ClassStatistics()
    anchor.correct(merged, drawn(1, 4, 2), drawn(1, 4, 2, seed=1), torch.arange(4))
    assert anchor.path is None


@pytest.mark.parametrize("memory_size", [0, 10])
def test_without_exemplars_new_images_correct_old_classes(scenario, monkeypatch, memory_size):  # noqa: F811
    seen = []
    correct = Anchor.correct

    def watched(self, merged, first, found, labels):
        seen.append((merged.copy(), first, found, labels))
        correct(self, merged, first, found, labels)

    monkeypatch.setattr(Anchor, "correct", watched)
    method = begun(scenario, strong(), feature_views=1, memory_size=memory_size)
    for task in (scenario[0], scenario[1]):
        learn_nothing(method, task)
    seen.clear()
    images = scenario[2].train
    first, found = method.features(images, "task_000"), method.features(images, "merged")
    learn_nothing(method, scenario[2])
    assert (method.anchor is not None) == (memory_size == 0)
    if memory_size:
        assert seen == []
        return
    ((merged, *given),) = seen
    torch.testing.assert_close(given, [first, found, images.labels])
    assert merged.classes == [0, 1, 2, 3] and list(method.anchor.tasks.values()) == [1, 1, 2, 2, 3, 3]


def test_a_state_learned_without_it_is_told(scenario):  # noqa: F811
    method = begun(scenario, strong(), memory_size=10)
    learn_nothing(method, scenario[0])
    again = begun(scenario, strong(), memory_size=0)
    again.model = method.model
    with pytest.raises(ValueError, match="memory_size=0 needs .* learned without; set a memory_size"):
        again.restore(*method.state())


def test_a_class_that_came_back_takes_the_share_of_the_images_that_were_moved():
    method, anchor = anchored(1)
    anchor.take_in(torch.zeros(1, 10, 3), torch.zeros(10).long())
    method.adapters = [""] * 4
    anchor.take_in(torch.zeros(1, 30, 3), torch.arange(3).repeat_interleave(10))
    method.adapters = [""] * 9
    # Half of the images of the first class were there before the first merge, and half before the last four.
    later = math.log(8 / 4) / math.log(8)
    assert anchor.shares().tolist() == pytest.approx([0.5 + 0.5 * later, later, later])
    again = Anchor(method)
    again.restore(anchor.state())
    assert again.shares().tolist() == anchor.shares().tolist()


def test_no_covariance_is_kept_but_its_diagonal():
    _, anchor = anchored(1)
    features, labels = many_classes(features=16, classes=4)
    anchor.take_in(features[None], labels)
    assert max(tensor.numel() for tensor in anchor.state().values()) == 4 * 16
    exact = ClassStatistics()
    exact.update(features, labels)
    found = anchor.statistics.pooled_covariance().diagonal()
    torch.testing.assert_close(found, exact.pooled_covariance().diagonal())


@pytest.mark.parametrize("memory_size", [0, 4])
def test_old_classes_of_which_no_image_is_there_may_stray_from_the_map(memory_size):
    method = Dynammo(tiny_model("vit"), arguments(memory_size=memory_size, feature_views=1, drift_ridge=0.3))
    features, labels = many_classes(classes=3)
    method.statistics.update(features, labels)
    expected = method.statistics.copy()
    moved = features + drawn(3, 4, seed=9)[labels]
    method._move_statistics(features[None], moved[None], labels)
    variances = expected.pooled_covariance().diagonal()
    if memory_size:
        expected.move(fit_affine_map(features, moved, 0.3, variances))
    else:
        expected.move(fit_map_of_others(features, moved, labels, 0.3, variances))
    torch.testing.assert_close(method.statistics.pooled_covariance(), expected.pooled_covariance())
    torch.testing.assert_close(method.statistics.mean_matrix(), expected.mean_matrix())

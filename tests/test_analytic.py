"""Heads in closed form against scikit-learn and against least squares."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from dynammo_peft.data import ClassStatistics
from dynammo_peft.methods.analytic import linear_discriminant, regularised, ridge_regression, shrinkage_for


def drawn(classes=4, count=120, features=6):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    mixing = torch.randn(features, features, generator=generator)
    means = torch.randn(classes, features, generator=generator)
    return (means[labels] + torch.randn(count, features, generator=generator) @ mixing + 20).double(), labels


def known(features, labels):
    statistics = ClassStatistics()
    statistics.update(features, labels)
    return statistics


def test_discriminant_analysis_is_that_of_scikit_learn():
    features, labels = drawn()
    weight, bias = linear_discriminant(known(features, labels), 0.0)
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4).fit(features.numpy(), labels.numpy())
    logits = (features @ weight.T + bias).log_softmax(dim=1)
    expected = torch.from_numpy(reference.predict_log_proba(features.numpy()))
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_rare_classes_count_as_much_as_others():
    features, labels = drawn()
    chosen = (labels != 0) | (torch.arange(120) < 40)
    weight, bias = linear_discriminant(known(features[chosen], labels[chosen]), 0.0)
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4)
    reference.fit(features[chosen].numpy(), labels[chosen].numpy())
    # scikit-learn weighs the classes' covariances by the priors, we by their images; the rest is the same.
    shared = known(features[chosen], labels[chosen]).pooled_covariance()
    expected = np.linalg.solve(shared.numpy(), (reference.means_ - reference.means_.mean(axis=0)).T).T
    torch.testing.assert_close(weight, torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
    middle = torch.from_numpy(reference.means_)
    scores = middle @ weight.T + bias
    # Half way between two means their classes are equally likely, but for what few images add to the distance.
    half = ((middle[0] + middle[1]) / 2) @ weight.T + bias
    torch.testing.assert_close(half[0] - half[1], torch.tensor(6 / 2 * (1 / 10 - 1 / 30)).double(), atol=1e-3, rtol=0)
    assert scores.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_classes_of_few_images_do_not_lose_their_own_to_those_of_many():
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.nn.functional.one_hot(torch.arange(3), 150).double()

    def images(counts):
        labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
        return means[labels] + torch.randn(len(labels), 150, generator=generator).double(), labels

    weight, bias = linear_discriminant(known(*images([600, 600, 4])), 0.0)
    features, labels = images([500, 500, 500])
    right = (features @ weight.T + bias).argmax(dim=1) == labels
    recall = [right[labels == label].double().mean().item() for label in range(3)]
    # Of the third, 11% would be found if nothing were taken off for what its mean is off by.
    assert recall[2] == pytest.approx((recall[0] + recall[1]) / 2, abs=0.1) and min(recall) > 0.75


def test_ridge_regression_is_least_squares_on_class_indicators():
    features, labels = drawn()
    weight, bias = ridge_regression(known(features, labels), 0.0)
    rows = torch.cat([features, torch.ones(120, 1).double()], dim=1)
    indicators = torch.nn.functional.one_hot(labels).double()
    expected = torch.linalg.lstsq(rows, indicators).solution
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), expected.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close((features @ weight.T + bias).sum(dim=1), torch.ones(120).double())


def test_shrinkage_goes_to_the_diagonal():
    covariance = torch.tensor([[4.0, 1.0], [1.0, 9.0]]).double()
    torch.testing.assert_close(
        regularised(covariance, 0.5), torch.tensor([[4.0, 0.5], [0.5, 9.0]]).double(), rtol=1e-4, atol=0
    )
    assert torch.linalg.matrix_rank(regularised(torch.zeros(3, 3).double(), 0.1)) == 3
    with pytest.raises(ValueError, match=r"shrinkage=-0\.1"):
        regularised(covariance, -0.1)


def test_with_one_image_a_class_the_nearest_mean_wins():
    features, labels = torch.eye(3, 5).double() * 2 + 7, torch.arange(3)
    weight, bias = linear_discriminant(known(features, labels), 0.1)
    logits = features @ weight.T + bias
    distances = -torch.cdist(features, features).square() / 2
    torch.testing.assert_close(logits.log_softmax(dim=1), distances.log_softmax(dim=1))
    weight, bias = ridge_regression(known(features, labels), 0.1)
    assert (features @ weight.T + bias).argmax(dim=1).tolist() == [0, 1, 2]
    # One image in all.
    for solve in (linear_discriminant, ridge_regression):
        assert all(torch.isfinite(part).all() for part in solve(known(features[:1], labels[:1]), 0.1))


def test_few_images_for_each_feature_shrink_the_covariance_more():
    features, labels = drawn(count=120, features=6)
    # 6 / (6 + 4 * 120) is below the least.
    assert shrinkage_for(known(features, labels)) == 0.1
    assert shrinkage_for(known(features[:12], labels[:12])) == pytest.approx(6 / (6 + 48))
    assert shrinkage_for(known(features[:4], labels[:4])) == pytest.approx(6 / (6 + 16))
    assert shrinkage_for(known(features[:4], labels[:4]), 0.0) == 0.0


@pytest.mark.parametrize("head", [linear_discriminant, ridge_regression])
def test_heads_take_the_shrinkage_that_follows_from_the_images(head):
    features, labels = drawn()
    few = known(features[:8], labels[:8])
    for found, expected in zip(head(few), head(few, 6 / (6 + 32))):
        assert torch.equal(found, expected)
    assert not torch.equal(head(few)[0], head(few, 0.1)[0])

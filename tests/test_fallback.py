"""Going back to the first task's adapter: how it is judged, and what the model is then."""

import pytest
import test_going_on
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from test_dynammo import arguments, begun, fit, learn_nothing, scenario, strong  # noqa: F401
from tiny import tiny_model

from dynammo_peft import Dynammo, DynammoConfig, DynammoLoraConfig
from dynammo_peft.data import ClassStatistics
from dynammo_peft.hub import load_method
from dynammo_peft.methods import fallback
from dynammo_peft.methods.analytic import linear_discriminant
from dynammo_peft.methods.held_out import accuracy_lost, held_out_accuracy


def solve(statistics):
    return linear_discriminant(statistics, 0.0)


def nearest_mean(statistics):
    means = statistics.mean_matrix()
    return means, -means.square().sum(dim=1) / 2


def known(*means, count=10):
    """Statistics of classes with these means."""
    statistics = ClassStatistics()
    for label, mean in enumerate(means):
        statistics.update(torch.tensor([mean] * count), torch.full((count,), label))
    return statistics


def test_each_half_is_classified_by_what_is_known_of_the_other():
    # Gaussians with a common covariance, as scikit-learn's discriminant has it.
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(15, 4, generator=generator)
    features = torch.randn(1, 60, 4, generator=generator) + torch.tensor([1.0, 0, 0, 0])
    labels = torch.tensor([1, 2]).repeat(30)
    features[0, labels == 2] += torch.tensor([0, 3.0, 0, 0])
    statistics = ClassStatistics()
    statistics.update(old, torch.zeros(15))
    even = torch.arange(60) // 2 % 2 == 0
    right = torch.zeros(60, dtype=torch.bool)
    for half in (even, ~even):
        seen = torch.cat([old, features[0, half]]).numpy()
        own = torch.cat([torch.zeros(15), labels[half]]).numpy()
        expected = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(seen, own)
        scores = torch.tensor(expected.predict_proba(features[0, ~half].numpy()))
        right[~half] = scores[:, 1:].argmax(dim=1) + 1 == labels[~half]
    accuracy = held_out_accuracy(statistics, features, labels, solve)
    assert 0.6 < accuracy < 1
    assert accuracy == pytest.approx(right.double().mean().item())
    assert statistics.counts == {0: 15}


def test_classes_count_the_same_and_all_views_are_taken_in():
    # Every image of class 1 looks like those of class 2. What is known of class 0 does not matter.
    features = torch.tensor([[[7.5], [7.5], *[[8.0]] * 6], [[0.0], [0.0], *[[8.0]] * 6]])
    labels = torch.tensor([1] * 2 + [2] * 6)
    taken = []

    def watched(statistics):
        taken.append(dict(statistics.counts))
        return nearest_mean(statistics)

    assert held_out_accuracy(known([7.5]), features, labels, watched) == 0.5
    assert taken == [{0: 10, 1: 2, 2: 6}] * 2


def lost_of(shifts, exemplars=0):
    """What is lost by classes 1 and 2, whose features go where `shifts` says; class 0 was known before."""
    before = torch.tensor([[[4.0, 0.0]] * 4 + [[0.0, 4.0]] * 4])
    before += 0.1 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1] * 4 + [2] * 4)
    after = before + torch.tensor(shifts).repeat_interleave(4, dim=0)
    return accuracy_lost(known([0.0, 0.0]), before, after, labels, torch.tensor([1, 2]), 1e-6, exemplars, nearest_mean)


def test_nothing_is_lost_where_the_other_classes_tell_the_way():
    assert lost_of([[3.0, -1.0], [3.0, -1.0]]) == 0


def test_classes_are_lost_that_go_where_the_others_do_not():
    # By the other's way, each comes to lie far from its images, which are nearer to class 0.
    assert lost_of([[-3.0, 9.0], [9.0, -3.0]]) == 1


def test_exemplars_show_the_way():
    assert lost_of([[-3.0, 9.0], [9.0, -3.0]], exemplars=2) < 1


def test_of_a_single_class_it_is_not_known_where_it_goes():
    before = torch.tensor([[[4.0], [4.1], [3.9], [4.0]]])
    labels, classes = torch.tensor([1] * 4), torch.tensor([1])
    lost = [
        accuracy_lost(known([0.0]), before, before + shift, labels, classes, 1.0, 0, nearest_mean)
        for shift in (0.0, -3.0)
    ]
    assert lost == [0, 1]


def test_the_advantage_is_a_sum_over_classes(scenario, monkeypatch):  # noqa: F811
    method = begun(scenario, strong())
    merged = iter([0.9, 0.7, 0.6, 0.8])
    monkeypatch.setattr(fallback, "held_out_accuracy", lambda *_: next(merged))
    lost = iter([0.05, -0.1])
    monkeypatch.setattr(fallback, "accuracy_lost", lambda *_: next(lost))
    learn_nothing(method, scenario[0])
    assert (method.fallback.advantage, method.fallback.chosen) == (0, False)
    learn_nothing(method, scenario[1])
    assert method.fallback.advantage == pytest.approx(2 * (0.9 - 0.7) - 2 * 0.05)
    assert not method.fallback.chosen
    learn_nothing(method, scenario[2])
    assert method.fallback.advantage == pytest.approx(0.3 + 2 * (0.6 - 0.8) - 4 * -0.1)
    # Half a point for each of six classes.
    for advantage, chosen in ((-0.029, False), (-0.031, True)):
        method.fallback.advantage = advantage
        assert method.fallback.chosen == chosen


def test_it_judges_features_that_no_adapter_was_trained_on(scenario, monkeypatch):  # noqa: F811
    method = begun(scenario, strong(), feature_views=1, memory_size=10)
    learn_nothing(method, scenario[0])
    seen = []
    monkeypatch.setattr(
        fallback, "held_out_accuracy", lambda statistics, features, *_: seen.append((statistics, features)) or 0
    )
    images = scenario[1].train
    before = method.features(images, "merged")
    asked = []
    monkeypatch.setattr(fallback, "accuracy_lost", lambda *given: asked.append(given) or 0)
    learn_nothing(method, scenario[1])
    (merged, under_merged), (first, under_first) = seen
    assert merged is method.statistics and first is method.fallback.statistics
    torch.testing.assert_close(under_merged, before)
    torch.testing.assert_close(under_first, method.features(images, "task_000"))
    # Ten exemplars of two old classes.
    assert asked[0][6] == 5
    assert asked[0][4].tolist() == [2, 3]


class Forced(fallback.Fallback):
    """Chooses as it is told, task by task."""

    choices = ()

    @property
    def chosen(self):
        return self.choices[len(self.method.adapters) - 1]


def forced(monkeypatch, *choices):
    monkeypatch.setattr(Forced, "choices", choices)
    monkeypatch.setattr("dynammo_peft.methods.dynammo.Fallback", Forced)


def logits(method, scenario):  # noqa: F811
    method.model.eval()
    with torch.no_grad():
        return method.logits(method.transform(scenario[2].test.images))


LORA = {"r": 2, "feature_modules": ["vit.layers.1"]}


@pytest.mark.parametrize("config", [strong, lambda: DynammoLoraConfig(**LORA)], ids=["convolutions", "lora"])
@pytest.mark.parametrize("offload", [False, True])
def test_it_is_then_a_model_of_the_first_session(scenario, monkeypatch, tmp_path, config, offload):  # noqa: F811
    options = {"offload_adapters": str(tmp_path)} if offload else {}
    lora = isinstance(config(), DynammoLoraConfig)
    if lora and offload:
        options |= {"merge": "linear", "fall_back": True}
    expected, expected_results = fit(scenario, config(), first_session=True)
    forced(monkeypatch, False, True, True)
    method, results = fit(scenario, config(), **options)
    assert method.inference_adapters == ["merged"]
    torch.testing.assert_close(logits(method, scenario), logits(expected, scenario), atol=1e-3, rtol=1e-3)
    assert results.predictions == expected_results.predictions
    assert method.fell_back and not expected.fell_back


@pytest.mark.parametrize("offload", [False, True])
def test_later_adapters_are_merged_with_all_before_them(scenario, monkeypatch, tmp_path, offload):  # noqa: F811
    options = {"offload_adapters": str(tmp_path)} if offload else {}
    expected, expected_results = fit(scenario, strong(), fall_back=False, **options)
    forced(monkeypatch, False, True, False)
    method, results = fit(scenario, strong(), **{name: f"{path}-again" for name, path in options.items()})
    assert not method.fell_back
    assert results.predictions == expected_results.predictions
    assert torch.equal(logits(method, scenario), logits(expected, scenario))


def test_it_goes_on_from_a_published_model(monkeypatch, tmp_path):
    forced(monkeypatch, False, True, False)
    uninterrupted = test_going_on.dynammo()
    test_going_on.fit(uninterrupted, test_going_on.scenario(3))
    method = test_going_on.dynammo()
    test_going_on.fit(method, test_going_on.scenario(2))
    assert method.fell_back
    again = load_method(test_going_on.published(method, tmp_path))
    assert again.fell_back
    assert again.fallback.advantage == method.fallback.advantage
    test_going_on.fit(again, test_going_on.scenario(1, learned=2, exemplar_rows=again.exemplar_rows))
    test_going_on.assert_equal_models(again.model, uninterrupted.model)


def test_a_state_learned_without_it_is_told(scenario):  # noqa: F811
    method = begun(scenario, strong(), fall_back=False)
    learn_nothing(method, scenario[0])
    again = begun(scenario, strong())
    again.model = method.model
    with pytest.raises(ValueError, match="learned without; set fall_back=False"):
        again.restore(*method.state())


@pytest.mark.parametrize(
    ("options", "config", "on"),
    [
        ({}, {}, True),
        ({"heads": "ridge"}, {}, True),
        ({"heads": "gaussians"}, {}, False),
        ({"first_session": True}, {}, False),
        ({"merge": "uniform"}, {}, False),
        ({"merge": "uniform", "fall_back": True}, {}, True),
        ({"learned_weights": "task"}, {}, False),
        ({"fall_back": False}, {}, False),
        ({}, {"preset": "paper"}, False),
    ],
)
def test_when_it_is_on(options, config, on):
    assert (Dynammo(tiny_model("vit"), arguments(**options), DynammoConfig(**config)).fallback is not None) == on


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first_session": True}, "first_session"),
        ({"heads": "gaussians"}, "heads='gaussians'"),
        ({"learned_weights": "layer"}, "learned_weights='layer'"),
    ],
)
def test_what_it_does_not_go_with(options, words):
    with pytest.raises(ValueError, match=f"fall_back does not go with {words}; leave one of them out"):
        Dynammo(tiny_model("vit"), arguments(fall_back=True, **options))

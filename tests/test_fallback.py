"""Going back to the first task's adapter: how it is judged, and what the model is then."""

import math

import pytest
import test_going_on
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LinearRegression
from test_dynammo import arguments, begun, fit, learn_nothing, scenario, strong  # noqa: F401
from tiny import tiny_model

from dynammo_peft import Dynammo, DynammoConfig, DynammoLoraConfig
from dynammo_peft.data import ClassStatistics
from dynammo_peft.hub import load_method
from dynammo_peft.methods import fallback
from dynammo_peft.methods.analytic import linear_discriminant
from dynammo_peft.methods.anchor import Anchor
from dynammo_peft.methods.held_out import held_out_hits


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


def test_each_fifth_is_classified_by_what_is_known_of_the_others():
    # Gaussians with a common covariance, as scikit-learn's discriminant has it.
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(24, 4, generator=generator)
    features = torch.randn(1, 60, 4, generator=generator) + torch.tensor([1.0, 0, 0, 0])
    labels = torch.tensor([1, 2]).repeat(30)
    features[0, labels == 2] += torch.tensor([0, 3.0, 0, 0])
    statistics = ClassStatistics()
    statistics.update(old, torch.zeros(24))
    right = torch.zeros(60, dtype=torch.bool)
    for fold in range(5):
        # Labels alternate.
        out = torch.arange(60) // 2 % 5 == fold
        seen = torch.cat([old, features[0, ~out]]).numpy()
        own = torch.cat([torch.zeros(24), labels[~out]]).numpy()
        expected = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(seen, own)
        right[out] = torch.tensor(expected.predict(features[0, out].numpy())) == labels[out]
    hits = held_out_hits(statistics, features, labels, solve)
    assert 0.5 < hits.mean() < 1
    assert torch.equal(hits, right.double())
    assert statistics.counts == {0: 24}


def test_all_views_are_taken_in():
    # The first view of each image of class 1 looks like those of class 2, the second like no other's.
    features = torch.tensor([[[7.5], [7.5], *[[8.0]] * 6], [[0.0], [0.0], *[[8.0]] * 6]])
    labels = torch.tensor([1] * 2 + [2] * 6)
    taken = []

    def watched(statistics):
        taken.append(dict(statistics.counts))
        return nearest_mean(statistics)

    assert held_out_hits(known([-9.0]), features, labels, watched).tolist() == [0.5] * 2 + [1] * 6
    # The sixth image of class 2 is held out with the first.
    assert taken == [{0: 10, 1: 1, 2: 4}, {0: 10, 1: 1, 2: 5}, *[{0: 10, 1: 2, 2: 5}] * 3]


def test_a_single_image_tells_nothing():
    features, labels = torch.tensor([[[4.0], [8.0], [8.0]]]), torch.tensor([1, 2, 2])
    assert held_out_hits(known([0.0]), features, labels, nearest_mean).tolist() == [0, 1, 1]


def test_known_classes_are_in_the_way():
    features, labels = torch.tensor([[[4.0], [4.0], [8.0], [8.0]]]), torch.tensor([1, 1, 2, 2])
    assert held_out_hits(known([0.0]), features, labels, nearest_mean).tolist() == [1] * 4
    assert held_out_hits(known([4.0]), features, labels, nearest_mean).tolist() == [0, 0, 1, 1]


def test_classes_are_lost_whose_means_are_thought_to_be_elsewhere():
    generator = torch.Generator().manual_seed(0)
    features = 0.1 * torch.randn(2, 8, 2, generator=generator)
    features[:, :4, 0] += 4
    features[:, 4:, 1] += 4
    labels = torch.tensor([1] * 4 + [2] * 4)

    def accuracy(means):
        return held_out_hits(known([0.0, 0.0]), features, labels, nearest_mean, means).mean()

    assert accuracy(features) == accuracy(features + 0.5) == 1
    # Class 2 is thought to be behind the class known before.
    elsewhere = features.clone()
    elsewhere[:, 4:] = -features[:, 4:]
    assert accuracy(elsewhere) == 0.5
    # An image has no part in the mean that it is compared with: where two of the others are elsewhere, it is lost.
    elsewhere = features.clone()
    elsewhere[:, ::2] = -features[:, ::2]
    assert accuracy(elsewhere) == 0.5


# Tasks in which the classes came that are known before.
OLD = (1, 1, 2)


def judged(monkeypatch, tasks, labels):
    """What has judged by tasks of images with these labels: under the first adapter, as newest, as oldest classes."""
    method = Dynammo(tiny_model("vit"), arguments())
    method.adapters = []
    judge = fallback.Fallback(Anchor(method, "merged"))
    judge.anchor.path = torch.zeros(2, 1)
    judge.anchor.tasks = dict(enumerate(OLD))
    features = labels.float()[None, :, None]
    for index, hits in enumerate(tasks):
        method.adapters.append(f"task_{index:03d}")
        if index > 0:
            judge.anchor.statistics = known(*[[0.0]] * len(OLD))
            coming = iter(hits)
            monkeypatch.setattr(fallback, "held_out_hits", lambda *_, coming=coming, **__: next(coming))
            judge.weigh(judge.anchor.statistics, features, features, labels)
    return judge


def test_the_advantage_is_on_a_line_through_the_differences(monkeypatch):
    labels = torch.tensor([3, 3, 3, 3, 4, 4])
    tasks = torch.rand(5, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # The merge of one adapter is that adapter: until two are merged, nothing tells.
    for number in (1, 2):
        judge = judged(monkeypatch, tasks[:number], labels)
        assert judge.advantage == (0, 0)
        assert not judge.chosen
    # Later, a line through the origin at which one adapter is merged.
    places, points, errors = torch.tensor([2.0, 3.0, 4.0]).double().log(), [], []
    for count, (alone, newest, oldest) in zip((2, 3, 4), tasks[2:]):
        # New classes are at 3 and 4, old ones at 0.
        alike = 1 / ((9 + 16) / 2)
        share = alike * sum(math.log(count / task) for task in OLD) / (3 * math.log(count))
        difference = share * (oldest - newest) + newest - alone
        one, other = difference[:4], difference[4:]
        # Classes count the same, however many images they have.
        for part in (one, other):
            points.append(part.mean())
            errors.append((part.var(correction=0) / len(part)).sqrt())
    line = LinearRegression(fit_intercept=False).fit(places.repeat_interleave(2)[:, None], torch.stack(points))
    advantage, error = judged(monkeypatch, tasks, labels).advantage
    assert advantage == pytest.approx(line.predict([[math.log(5)]])[0])
    assert error == pytest.approx(
        expected_error(places.repeat_interleave(2), torch.stack(points), torch.stack(errors))
    )


def expected_error(places, points, errors):
    """Of the line at log(5): the larger of what images and what classes tell."""
    images = (places * errors).square().sum().sqrt() / places.square().sum()
    residuals = points - points @ places / places.square().sum() * places
    inverse = 1 / places.square().sum()
    # White's sandwich, as econometrics has it.
    classes = (inverse * (places**2 * residuals**2).sum() * inverse * len(points) / (len(points) - 1)).sqrt()
    return (max(images, classes) * math.log(5)).item()


def test_classes_that_differ_make_the_advantage_uncertain(monkeypatch):
    labels = torch.tensor([3] * 100 + [4] * 100)
    alone = torch.zeros(200, dtype=torch.float64)
    # Without a doubt of each class; but the second loses half of what the first gains.
    unlike = torch.cat([torch.ones(100), -0.5 * torch.ones(100)]).double()
    alike = torch.full((200,), 0.25, dtype=torch.float64)
    judges = [judged(monkeypatch, [torch.stack([alone, hits, hits])] * 3, labels) for hits in (unlike, alike)]
    for judge in judges:
        assert judge.advantage[0] == pytest.approx(0.25 * math.log(3) / math.log(2))
    assert judges[0].advantage[1] == pytest.approx(0.75 * math.log(3) / math.log(2))
    assert judges[1].advantage[1] == 0
    assert [judge.chosen for judge in judges] == [True, False]


def test_the_merge_has_to_be_better_by_more_than_a_standard_error(monkeypatch):
    def chosen(better, worse):
        newest = torch.zeros(100, dtype=torch.float64)
        newest[:better], newest[better : better + worse] = 1, -1
        hits = torch.stack([torch.zeros_like(newest), newest, newest])
        return judged(monkeypatch, [hits] * 3, torch.full((100,), 3)).chosen

    # Of a hundred images; the error is that of a mean.
    assert chosen(better=0, worse=0)
    assert chosen(better=6, worse=4)
    assert not chosen(better=7, worse=2)
    assert chosen(better=2, worse=9)


def test_it_judges_features_that_no_adapter_was_trained_on(scenario, monkeypatch):  # noqa: F811
    method = begun(scenario, strong(), feature_views=1, memory_size=10)
    for task in (scenario[0], scenario[1]):
        for _ in method.learn(task):
            # Training would take long to move features by as much.
            for parameter in method.model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(std=0.2)
    seen = []

    def watched(statistics, features, labels, solve, means=None):
        seen.append((statistics.copy(), features, means))
        return torch.zeros(len(labels))

    monkeypatch.setattr(fallback, "held_out_hits", watched)
    images = scenario[2].train
    before, first = method.features(images, "merged"), method.features(images, "task_000")
    merged, alone = method.statistics.copy(), method.anchor.statistics.copy()
    path = method.anchor.path
    learn_nothing(method, scenario[2])
    # Where the map of the one merge so far takes them, not where they are.
    moved = first @ path[:-1] + path[-1]
    assert (moved - before).abs().max() > 0.1
    for found, expected in zip(seen, [(alone, first, None), (merged, before, None), (merged, before, moved)]):
        torch.testing.assert_close(found[0].mean_matrix(), expected[0].mean_matrix())
        torch.testing.assert_close(found[1:], expected[1:])


def test_classes_that_come_back_are_no_evidence(scenario, monkeypatch):  # noqa: F811
    method = begun(scenario, strong())
    for task in scenario:
        learn_nothing(method, task)
    asked = []
    monkeypatch.setattr(
        fallback,
        "held_out_hits",
        lambda *given, **_: asked.append(given[2].unique()) or torch.zeros(len(given[2])),
    )
    before = method.fallback.evidence.clone()
    task = scenario[1]
    features = torch.zeros(method.views, len(task.train), method.anchor.path.shape[1])
    method.fallback.weigh(method.statistics, features, features, task.train.labels)
    assert asked == [] and torch.equal(method.fallback.evidence, before)
    # Beside classes that are new.
    method.anchor.statistics.counts.pop(2)
    method.fallback.weigh(method.statistics, features, features, task.train.labels)
    assert [labels.tolist() for labels in asked] == [[2]] * 3


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
    if lora:
        # What adds nothing takes no rank.
        assert [each.model.peft_config["merged"].r for each in (method, expected)] == [2, 2]


@pytest.mark.parametrize(
    "config, offload",
    [(strong, False), (strong, True), (lambda: DynammoLoraConfig(**LORA), False)],
    ids=["convolutions", "offloaded", "lora"],
)
def test_later_adapters_are_merged_with_all_before_them(scenario, monkeypatch, tmp_path, config, offload):  # noqa: F811
    options = {"offload_adapters": str(tmp_path)} if offload else {}
    expected, expected_results = fit(scenario, config(), fall_back=False, **options)
    forced(monkeypatch, False, True, False)
    method, results = fit(scenario, config(), **{name: f"{path}-again" for name, path in options.items()})
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
    torch.testing.assert_close(again.anchor.path, method.anchor.path)
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

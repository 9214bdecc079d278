import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from tiny import tiny_dataset, tiny_images, tiny_model, tiny_processor
from torch import nn

from dynammo_peft import ACL, ClassIncrementalScenario, Dynammo, DynammoConfig, Joint, Learner
from dynammo_peft.methods import adapters
from dynammo_peft.tuner.standardisation import Standardisation


OPTIONS = {"memory_size": 12, "adapter_epochs": 2, "adapter_batch_size": 8, "head_epochs": 1}


@pytest.fixture(scope="module")
def scenario():
    train, test = tiny_dataset(4, 8), tiny_dataset(4, 2, seed=1)
    return ClassIncrementalScenario(train, test, tiny_processor(64), classes_per_task=2, seed=0, progress=False)


def scaled_model(scale):
    """A ResNet whose classifier gets its features times `scale`."""
    model = tiny_model("resnet_basic")
    model.resnet.pooler.register_forward_hook(lambda module, inputs, output: output * scale)
    return model


def learn_first_task(method_cls, scenario, model, **options):
    """The first task's head and what it says of images, after stage 1."""
    config = options.pop("config", None)
    method = method_cls(model, method_cls.arguments_cls(**OPTIONS | options), config)
    method.begin(scenario, Accelerator(cpu=True))
    torch.manual_seed(0)
    stage = next(learning := method.learn(scenario[0]))
    initial = method.model.head.heads[method.adapters[0]].weight.detach().clone()
    Learner(method, method.accelerator, progress=False)._run(stage, scenario)
    trained = method.model.head.heads[method.adapters[0]].weight.detach().clone()
    next(learning, None)
    with torch.no_grad():
        method.model.set_adapter(method.adapters[0])
        return method, initial, trained, method.model(pixel_values=tiny_images("resnet_basic", 8)).logits


def test_standardised_features_have_no_mean_and_unit_variance():
    features = torch.randn(200, 5) * torch.tensor([0.01, 0.02, 0.05, 0.1, 0.2]) + torch.arange(5)
    standard = Standardisation.of(features)(features)
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.var(dim=0, correction=0).mean(), torch.tensor(1.0))
    # Features keep their sizes among each other.
    scales = features.std(dim=0) / standard.std(dim=0)
    torch.testing.assert_close(scales, scales.mean().expand(5))


@pytest.mark.parametrize("images", [1, 3])
def test_features_that_do_not_vary_keep_their_scale(images):
    standardisation = Standardisation.of(torch.full((images, 4), 7.0))
    assert torch.equal(standardisation(torch.full((2, 4), 9.0)), torch.full((2, 4), 2.0))


def test_features_that_vary_by_rounding_keep_their_scale():
    features = torch.full((64, 4), 7.0)
    features[-1] += 1e-6
    assert (features[-1] != features[0]).all()
    assert Standardisation.of(features).scale == 1
    # But small ones that do vary do not.
    assert Standardisation.of(1e-6 * torch.arange(8.0)[:, None]).scale < 1e-5


@pytest.mark.parametrize("further", [0, 3])
def test_a_folded_head_computes_the_same(further):
    torch.manual_seed(0)
    features = torch.randn(20, 6 + further, dtype=torch.float64) * 3 + 1
    standardisation = Standardisation.of(features[:, :6])
    head = nn.Linear(6 + further, 4, dtype=torch.float64)
    standard = standardisation(features)
    assert torch.equal(standard[:, 6:], features[:, 6:])
    expected = head(standard)
    standardisation.fold(head)
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize("method_cls", [Dynammo, ACL, Joint])
def test_stage_1_does_not_depend_on_the_scale_of_features(scenario, method_cls):
    # A power of two scales without rounding.
    (_, _, _, large), (_, _, _, small) = (
        learn_first_task(method_cls, scenario, scaled_model(scale), heads="gaussians")
        if method_cls is Dynammo
        else learn_first_task(method_cls, scenario, scaled_model(scale))
        for scale in (1.0, 2.0**-5)
    )
    torch.testing.assert_close(small, large)
    raw = [
        learn_first_task(Joint, scenario, scaled_model(scale), standardise_features=False)[3]
        for scale in (1.0, 2.0**-5)
    ]
    assert (raw[0] - raw[1]).abs().max() > 10 * (small - large).abs().max() + 1e-3


def test_the_head_is_folded_after_stage_1(scenario):
    method, _, trained, _ = learn_first_task(Joint, scenario, scaled_model(1.0))
    head = method.model.head
    assert head.standardisation is None
    folded = head.heads[method.adapters[0]].weight
    # Features that no image had left the head at zero.
    ratio = (trained / folded)[trained != 0]
    assert ratio.std() < 1e-4 * ratio.mean()
    assert (ratio.mean() - 1).abs() > 0.01


def test_an_interrupted_stage_leaves_the_head_as_it_is(scenario):
    method = Joint(scaled_model(1.0), Joint.arguments_cls(**OPTIONS))
    method.begin(scenario, Accelerator(cpu=True))
    learning = method.learn(scenario[0])
    next(learning)
    head = method.model.head
    before = head.heads[method.adapters[0]].weight.detach().clone()
    assert head.standardisation is not None
    with pytest.raises(KeyboardInterrupt):
        learning.throw(KeyboardInterrupt())
    assert head.standardisation is None
    assert torch.equal(head.heads[method.adapters[0]].weight, before)


def test_a_model_without_a_head_is_refused():
    model = get_peft_model(tiny_model("resnet_basic"), DynammoConfig())
    with (
        pytest.raises(ValueError, match="no head; give the configuration the `classes`"),
        model.base_model.standardised_features(torch.randn(4, 8)),
    ):
        pass


@pytest.mark.parametrize(
    ("preset", "option", "expected"),
    [("default", None, True), ("default", False, False), ("paper", None, False), ("paper", True, True)],
)
def test_the_preset_decides_unless_told(preset, option, expected, scenario):
    options = {"standardise_features": option, "config": DynammoConfig(preset=preset)}
    method, initial, trained, _ = learn_first_task(ACL, scenario, scaled_model(1.0), **options)
    assert method.standardises is expected
    assert not torch.equal(initial, trained)
    folded = method.model.head.heads["task_000"].weight
    assert torch.equal(folded, trained) is not expected


def test_a_large_task_is_measured_on_some_of_its_images(scenario, monkeypatch):
    monkeypatch.setattr(adapters, "SCALE_IMAGES", 5)
    method = Joint(scaled_model(1.0), Joint.arguments_cls(**OPTIONS))
    seen = []
    compute = method.features
    method.features = lambda images, adapter: seen.append(images.labels.tolist()) or compute(images, adapter)
    method.begin(scenario, Accelerator(cpu=True))
    next(method.learn(scenario[0]))
    assert [len(labels) for labels in seen] == [5]
    assert set(seen[0]) == {0, 1}

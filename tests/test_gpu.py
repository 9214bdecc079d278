"""On a GPU: what is learned is what a CPU learns, in every precision, and goes through the same files.

Without a GPU, `test_devices.py` runs them on one that is pretended, but for what needs a real one.
"""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_learner import forget_settings
from tiny import tiny_dataset, tiny_images, tiny_model, tiny_processor
from torch.nn import functional as F

from dynammo_peft import (
    METHODS,
    Checkpoints,
    ClassIncrementalScenario,
    DynammoConfig,
    DynammoLoraConfig,
    Learner,
)
from dynammo_peft.hub import from_pretrained, load_method, save_model, to_standalone
from dynammo_peft.merging import adapter_tensors, diagonal_fisher, input_grams, learn_merge_weights
from dynammo_peft.training.loop import TrainingLoop


PRETENDED = sys.modules.get("pretended_gpu")
DEVICE = PRETENDED.DEVICE if PRETENDED else torch.device("cuda")
pytestmark = pytest.mark.skipif(not (PRETENDED or torch.cuda.is_available()), reason="needs a GPU")
needs_a_real_one = pytest.mark.skipif(PRETENDED is not None, reason="needs a real GPU")
ROOT = Path(__file__).parents[1]
# Networks, each with adapters of its own: with attention, with LoRA, with BatchNorm.
NETWORKS = [("vit", DynammoConfig), ("vit", DynammoLoraConfig), ("resnet_basic", DynammoConfig)]


@pytest.fixture(autouse=True)
def _float32_without_tf32(monkeypatch):
    forget_settings()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    yield
    forget_settings()


def tasks():
    # A pretended GPU takes its time.
    classes, images = (4, 6) if PRETENDED else (6, 8)
    train, test = tiny_dataset(classes, images), tiny_dataset(classes, 4, seed=1)
    return ClassIncrementalScenario(train, test, tiny_processor(32), classes_per_task=2, progress=False)


def new_method(name="dynammo", network="vit", config=DynammoConfig, **options):
    settings = {"adapter_batch_size": 8, "adapter_learning_rate": 1e-2, "memory_size": 12}
    settings["adapter_epochs"] = 1 if PRETENDED else 2
    if name != "joint":
        settings |= {"head_epochs": 2, "head_batch_size": 8, "head_learning_rate": 3e-2}
    return METHODS[name](tiny_model(network), METHODS[name].arguments_cls(**settings | options), config())


def learn(method, resume=None, folder=None, **options):
    forget_settings()
    checkpoints = Checkpoints(folder, save_steps=2) if folder is not None else None
    learner = Learner(method, Accelerator(**options), progress=False, checkpoints=checkpoints)
    return learner.fit(tasks(), resume_from_checkpoint=resume)


def state(method):
    return {name: tensor.detach().float().cpu() for name, tensor in method.model.state_dict().items()}


def assert_near(found, expected, tolerance):
    """Tensors by name whose difference is small beside what they hold."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name].float() - tensor.float()).norm()
        assert error <= tolerance * tensor.float().norm() + 1e-5, f"{name}: {error} of {tensor.float().norm()}"


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: there[here > 0],
        lambda here, there: F.linear(here, there),
        lambda here, there: torch.randn(2, device=here.device, generator=torch.Generator()),
    ],
)
def test_devices_do_not_meet(mix):
    here, there = torch.ones(2, 2).to(DEVICE), torch.ones(2, 2)
    with pytest.raises((RuntimeError, IndexError), match="device|generator"):
        mix(here, there)
    # Numbers and indices may lie on the CPU, and copies cross.
    assert (here + torch.tensor(1.0)).sum().item() == 8
    assert here[torch.tensor([0])].device == here.device
    assert there.copy_(here).device.type == here.cpu().device.type == "cpu"


@pytest.mark.parametrize("name", ["dynammo", "acl", "joint"])
@pytest.mark.parametrize(("network", "config"), NETWORKS)
def test_a_gpu_learns_what_a_cpu_learns(name, network, config):
    if name == "joint" and config is DynammoLoraConfig:
        pytest.skip("is the same method with other adapters")
    methods = [new_method(name, network, config) for _ in range(2)]
    results = [learn(method, cpu=cpu) for method, cpu in zip(methods, (False, True))]
    devices = [{parameter.device.type for parameter in method.model.parameters()} for method in methods]
    assert devices == [{DEVICE.type}, {"cpu"}]
    # Adam turns rounding into steps where gradients all but vanish.
    assert_near(state(methods[0]), state(methods[1]), 0.2)
    assert results[0].metrics()["last_accuracy"] == pytest.approx(results[1].metrics()["last_accuracy"], abs=0.06)


@pytest.mark.parametrize("heads", ["lda", "ridge", "gaussians", "exemplars"])
@pytest.mark.parametrize("memory_size", [12, 0])
def test_heads(heads, memory_size):
    if heads == "exemplars" and not memory_size:
        pytest.skip("needs exemplars")
    methods = [new_method(heads=heads, memory_size=memory_size) for _ in range(2)]
    for method, cpu in zip(methods, (False, True)):
        learn(method, cpu=cpu)
    assert_near(state(methods[0]), state(methods[1]), 0.2)


DENSE = {"merge_options": {"density": 0.5}}
MERGES = {
    "linear": {"merge": "linear"},
    "ties": {"merge": "ties", **DENSE},
    "dare_linear": {"merge": "dare_linear", **DENSE},
    "dare_ties": {"merge": "dare_ties", **DENSE},
    "magnitude_prune": {"merge": "magnitude_prune", **DENSE},
    "moving_average": {"merge": "exponential_moving_average", "merge_options": {"decay": 0.5}},
    "fisher": {"merge": "fisher"},
    "by_task": {"learned_weights": "task"},
    "by_channel": {"learned_weights": "channel"},
    "by_entropy": {"learned_weights": "layer", "weights_objective": "entropy"},
    "first_session": {"first_session": True},
    "recalibrate": {"recalibrate": True},
    "distillation": {"feature_distillation": 1.0},
    "others": {"exemplars_as_others": True},
    "previous": {"adapter_init": "previous"},
}


@pytest.mark.parametrize("options", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("network", ["vit", "resnet_basic"])
def test_merges(options, network):
    method = new_method(network=network, **options)
    results = learn(method)
    assert {parameter.device.type for parameter in method.model.parameters()} == {DEVICE.type}
    assert all(tensor.isfinite().all() for tensor in state(method).values())
    assert results.metrics()["last_accuracy"] > 0.4  # Chance is 1 of 6, or 4.


def test_adapters_that_lie_on_the_disk(tmp_path):
    method = new_method(offload_adapters=str(tmp_path))
    assert learn(method).metrics()["last_accuracy"] > 0.4


@pytest.mark.parametrize("merge", ["cat", "regmean", "fisher"])
def test_merges_of_lora(merge):
    method = new_method(config=DynammoLoraConfig, merge=merge)
    results = learn(method)
    assert all(tensor.isfinite().all() for tensor in state(method).values())
    assert results.metrics()["last_accuracy"] > 0.4


@needs_a_real_one
@pytest.mark.parametrize("name", ["dynammo", "acl"])
@pytest.mark.parametrize(("network", "config"), NETWORKS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(name, network, config, precision):
    method = new_method(name, network, config)
    results = learn(method, mixed_precision=precision)
    assert all(tensor.isfinite().all() for tensor in state(method).values())
    assert results.metrics()["last_accuracy"] > 0.4


@pytest.mark.parametrize("heads", ["lda", "gaussians"])
def test_a_run_that_was_interrupted_goes_on(heads, tmp_path, monkeypatch):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = new_method(heads=heads)
        learn(whole)
        step, taken = TrainingLoop._step, []

        def interrupted(loop, *arguments):
            taken.append(1)
            if len(taken) == 9:
                raise KeyboardInterrupt
            return step(loop, *arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(TrainingLoop, "_step", interrupted)
            learn(new_method(heads=heads), folder=tmp_path)
        again = new_method(heads=heads)
        learn(again, resume="latest", folder=tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_near(state(again), state(whole), 1e-4)


@pytest.mark.parametrize(("network", "config"), NETWORKS)
def test_saved_on_a_gpu_and_loaded_anywhere(network, config, tmp_path):
    method = new_method(network=network, config=config)
    learn(method)
    images = tiny_images(network, 4)[:, :, :32, :32]
    with torch.no_grad():
        expected = method.logits(images.to(DEVICE)).cpu()
    folder = tmp_path / "model"
    save_model(method.model, folder, method.inference_adapters, tiny_processor(32), learning_state_of=method)
    loaded = load_method(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(images), expected, rtol=1e-3, atol=1e-3)
        loaded.model.to(DEVICE)
        torch.testing.assert_close(loaded.logits(images.to(DEVICE)).cpu(), expected, rtol=1e-4, atol=1e-4)
        model = from_pretrained(folder, subfolder="merged").to(DEVICE).eval()
        torch.testing.assert_close(model(pixel_values=images.to(DEVICE)).logits.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("network", "config"), NETWORKS)
def test_standalone_and_compiled(network, config):
    method = new_method(network=network, config=config)
    learn(method)
    images = tiny_images(network, 4)[:, :, :32, :32].to(DEVICE)
    method.model.eval()
    with torch.no_grad():
        expected = method.logits(images)
        if not PRETENDED:
            compiled = torch.compile(method.model)
            torch.testing.assert_close(compiled(pixel_values=images).logits, expected, rtol=1e-3, atol=1e-3)
        alone = to_standalone(method.model).to(DEVICE)
        torch.testing.assert_close(alone(pixel_values=images).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("vectorized", [False, True])
def test_measured_and_learned_on_the_device_of_the_model(vectorized):
    method = new_method(config=DynammoLoraConfig)
    learn(method)
    model, names = method.model, method.adapters
    images, labels = tiny_images("vit", 8).to(DEVICE), torch.tensor([0, 1] * 4).to(DEVICE)
    model.set_adapter(names[0])
    fisher = diagonal_fisher(model, names[0], [(images, labels)], vectorized=vectorized)
    grams = input_grams(model, names[0], [images])
    assert {tensor.device.type for tensor in (*fisher.values(), *grams.values())} == {DEVICE.type}
    weights = learn_merge_weights(
        model,
        names,
        [(images, labels)],
        adapter_name="by_weights",
        objective=lambda output, target: F.cross_entropy(output, target),
        forward=lambda network, batch: network(pixel_values=batch[0], return_dict=True).logits,
        steps=5,
        progress=False,
    )
    assert weights.loss_after < weights.loss_before
    assert {tensor.device.type for tensor in adapter_tensors(model, "by_weights").values()} == {DEVICE.type}


@needs_a_real_one
@pytest.mark.parametrize("launched", [["-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"], []])
def test_the_recipe(launched, tmp_path):
    options = ["--output_dir", str(tmp_path / "run"), "--adapter_epochs", "5"]
    command = [sys.executable, *launched, str(ROOT / "recipes" / "class_incremental.py")]
    command += [str(ROOT / "recipes" / "quickstart.yaml"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_MIXED_PRECISION": "bf16"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    classes = from_pretrained(tmp_path / "run", subfolder="merged").peft_config["merged"].classes
    assert sorted(chain(*classes)) == [str(digit) for digit in range(10)]

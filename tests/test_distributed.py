"""Several real processes over gloo: they agree with each other, and with one process at the same global batch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from test_kill import assert_same, result
from test_recipe import RECIPE, small_run


TESTS = Path(__file__).parent

SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from accelerate import Accelerator
from tiny import tiny_dataset, tiny_model, tiny_processor
from torch.utils.data import TensorDataset
from dynammo_peft import METHODS, ClassIncrementalScenario, DynammoConfig, Learner, Stage
from dynammo_peft.methods import Optimization
from dynammo_peft.training.loop import TrainingLoop

scenario = ClassIncrementalScenario(
    tiny_dataset(6, 9), tiny_dataset(6, 3, seed=1), tiny_processor(64), classes_per_task=2, progress=False
)
accelerator = Accelerator(cpu=True)
outcomes = []
for name, options in json.loads(sys.argv[2]):
    method_cls = METHODS[name]
    batch_size = 12 // accelerator.num_processes
    arguments = method_cls.arguments_cls(
        # Adam divides gradients that are all but zero by their size, rounding errors too.
        memory_size=12,
        adapter_optimizer="sgd",
        adapter_learning_rate=0.005,
        adapter_epochs=2,
        adapter_batch_size=batch_size,
        head_optimizer="sgd",
        head_learning_rate=0.005,
        head_epochs=3,
        head_batch_size=batch_size,
        **options,
    )
    method = method_cls(tiny_model("resnet_basic"), arguments, DynammoConfig(reduction_factor=2))
    # Raises if the processes come to differ.
    results = Learner(method, accelerator, eval_batch_size=4, progress=False).fit(scenario)
    if getattr(method, "statistics", None) is not None:
        # Every process has seen all images, once as they are and once augmented.
        assert method.statistics.counts == dict.fromkeys(range(6), 9), method.statistics.counts
    values, tensors = method.state()
    outcomes.append((values, tensors, dict(method.model.state_dict()), json.dumps(results.metrics())))
# Three batches of eleven or twelve images: two make an update, and then one.
accelerator.gradient_accumulation_steps = 2
line = torch.nn.Linear(1, 1, bias=False)
line.weight.data.zero_()
data = TensorDataset(torch.arange(34.0)[:, None], torch.zeros(34))
observe = lambda network, inputs, labels: (network(inputs).mean(), labels == 0)
optimization = Optimization("sgd", 0.5, 0.0, 3, batch_size, "constant")
list(TrainingLoop(Stage("line", line, data, observe, optimization), accelerator, scenario.transform, seed=0))
if accelerator.is_main_process:
    found = {"processes": accelerator.num_processes, "outcomes": outcomes, "accumulated": line.weight.item()}
    torch.save(found, sys.argv[3])
accelerator.wait_for_everyone()
accelerator.end_training()
"""

# One launch for all: most of its time is that of the imports.
RUNS = [
    ("dynammo", {}),
    # Features of this small network hardly vary: standardised, they would magnify rounding errors all the way down.
    ("dynammo", {"heads": "exemplars", "train_backbone": True, "standardise_features": False}),
    ("dynammo", {"heads": "gaussians", "merge": "fisher"}),
    (
        "dynammo",
        {
            "heads": "exemplars",
            "learned_weights": "layer",
            "weights_objective": "labels",
            "weights_steps": 3,
            # Adam again, on adapters that hardly differ yet.
            "weights_learning_rate": 1e-5,
            "recalibrate": True,
        },
    ),
    # On standardised features it amplifies rounding, on some processors to more than these tests allow.
    ("acl", {"standardise_features": False}),
]


def launch(processes, script, *arguments):
    """As docs/scaling.md says."""
    file = TESTS.parent / "recipes" / "accelerate" / f"{'cpu' if processes == 1 else 'cpu_processes'}.yaml"
    options = ["--config_file", file, "--num_processes", processes, "--num_cpu_threads_per_process", 1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", 0, script]
    return subprocess.Popen(
        [str(part) for part in [*command, *arguments]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each number of processes comes to."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "learn.py"
    script.write_text(SCRIPT)
    found = {}
    for processes in (1, 2, 4):
        out = folder / f"{processes}.pt"
        running = launch(processes, script, TESTS, json.dumps(RUNS), out)
        printed, _ = running.communicate()
        assert running.returncode == 0, printed[-3000:]
        found[processes] = torch.load(out, weights_only=True)
        assert found[processes]["processes"] == processes
    return found


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("run", range(len(RUNS)), ids=[f"{name} {options}" for name, options in RUNS])
def test_the_number_of_processes_does_not_matter(outcomes, processes, run):
    # Batches of nine images: four processes have three, two, two and two of them.
    values, tensors, model, measures = outcomes[processes]["outcomes"][run]
    expected_values, expected_tensors, expected_model, expected_measures = outcomes[1]["outcomes"][run]
    assert values == expected_values
    assert measures == expected_measures
    assert list(tensors) == list(expected_tensors)
    assert list(model) == list(expected_model)
    for name, tensor in {**tensors, **model}.items():
        expected = {**expected_tensors, **expected_model}[name]
        # Heads in closed form invert a covariance of more features than images, and hold large numbers.
        allowed = 1e-3 * expected.abs().max() if "_head.merged" in name else 2e-4
        assert (tensor - expected).abs().max() <= allowed, name


@pytest.mark.parametrize("processes", [2, 4])
def test_accumulated_gradients_do_not_depend_on_it_either(outcomes, processes):
    assert outcomes[processes]["accumulated"] == pytest.approx(outcomes[1]["accumulated"], rel=1e-5)


def worker(launcher, rank):
    """The process of a rank, once there is one."""
    for _ in range(600):
        for child in psutil.Process(launcher.pid).children(recursive=True):
            if child.environ().get("LOCAL_RANK") == str(rank):
                return child
        time.sleep(0.1)
    raise AssertionError("no such process")


def test_the_job_ends_with_a_process_and_is_resumed(tmp_path):
    path = small_run(tmp_path, adapter_epochs=3, adapter_batch_size=3, heads="exemplars", save_steps=1, ddp_timeout=30)
    options = [path, "--resume_from_checkpoint", "latest", "--output_dir"]
    whole = launch(2, RECIPE, *options, tmp_path / "whole")
    running = launch(2, RECIPE, *options, tmp_path / "run")
    lost = worker(running, 1)
    # In mid-task: the first has three epochs of two steps.
    while not list(tmp_path.glob("run-checkpoints/checkpoint-[3-5].json")):
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.01)
    lost.kill()
    start = time.monotonic()
    printed, _ = running.communicate()
    assert time.monotonic() - start < 30 + 10
    assert running.returncode != 0
    assert "SIGKILL" in printed
    assert not (tmp_path / "run").exists()

    again = launch(2, RECIPE, *options, tmp_path / "run")
    for process in (whole, again):
        printed, _ = process.communicate()
        assert process.returncode == 0, printed[-3000:]
    assert_same(tmp_path / "run", result(tmp_path / "whole"))


def test_a_process_that_hangs_is_waited_for_no_longer_than_asked(tmp_path):
    # Longer than one process may lag behind the other on a busy machine, and far below the default.
    path = small_run(tmp_path, adapter_epochs=30, adapter_batch_size=3, ddp_timeout=20)
    running = launch(2, RECIPE, path, "--save_steps", 1, "--output_dir", tmp_path / "run")
    waiting, hanging = worker(running, 0), worker(running, 1)
    while not list(tmp_path.glob("run-checkpoints/checkpoint-*.json")):
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.01)
    hanging.suspend()
    start = time.monotonic()
    try:
        waiting.wait(timeout=60)
    finally:
        # The launcher would first ask it to end, which it cannot hear.
        hanging.kill()
    assert time.monotonic() - start > 15
    printed, _ = running.communicate()
    assert running.returncode != 0
    # What it waited for depends on the moment: data, a message, or, of several exchanges under way at once, one that
    # another closed when it gave up.
    given_up = ("waiting 20000ms", "timeout after 20000ms", "Application timeout caused pair closure")
    assert any(message in printed for message in given_up), printed[-5000:]
    assert not (tmp_path / "run").exists()

"""Training in pieces, by FSDP2 and DeepSpeed ZeRO, ends with the weights that plain training ends with.

Two real processes over gloo. Accelerate starts FSDP on accelerators only, so its state is told that FSDP is on; what
shards, gathers and reduces is torch's own. DeepSpeed runs on a CPU, where it is installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DynamoBackend, FullyShardedDataParallelPlugin

from dynammo_peft.training.sharded import prepare, set_up_sharding, take_back, training_copy


TESTS = Path(__file__).parent

SCRIPT = """
import os, sys
import torch
tests, kinds, case, out = sys.argv[1:]
sys.path.insert(0, tests)
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
)
from peft import get_peft_model
from tiny import tiny_dataset, tiny_images, tiny_model, tiny_processor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from dynammo_peft import ClassIncrementalScenario, Dynammo, DynammoArguments, DynammoConfig, Learner
from dynammo_peft.training.sharded import prepare, set_up_sharding, take_back, training_copy

options = {"mixed_precision": "bf16", "gradient_accumulation_steps": 2} if case == "bf16" else {}

def start(kind):
    if kind.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        plugin = DeepSpeedPlugin(zero_stage=int(kind[-1]))
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
        # Otherwise tensors as small as these would stay whole.
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    else:
        # DDP would overwrite the statistics of all processes but one.
        handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
        accelerator = Accelerator(cpu=True, kwargs_handlers=handlers, **options)
    if kind == "fsdp2":
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert accelerator.num_processes == 2, accelerator.state
    set_up_sharding(accelerator)
    return accelerator

def check_pieces(trained):
    own = [value for value in trained.parameters() if isinstance(value, DTensor)]
    if kind == "fsdp2":
        assert len(own) == len(list(trained.parameters()))
        held = sum(value.to_local().numel() for value in own)
        assert held < 0.7 * sum(value.numel() for value in own)
    if kind == "zero3":
        assert all(value.ds_tensor.numel() < max(value.ds_numel, 2) for value in trained.parameters())

def train(network, inputs, labels, observe, batch_size=4):
    before = [(value, value.requires_grad) for value in network.parameters()]
    trained = training_copy(accelerator, network)
    assert (trained is network) == (kind == "plain")
    optimizer = torch.optim.SGD([value for value in trained.parameters() if value.requires_grad], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    loader = accelerator.prepare_data_loader(DataLoader(TensorDataset(inputs, labels), batch_size=batch_size))
    prepared, optimizer = prepare(accelerator, trained, optimizer, batch_size)
    scheduler = accelerator.prepare_scheduler(scheduler)
    check_pieces(trained)
    for _ in range(3):
        prepared.train()
        for inputs, labels in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(observe(prepared, inputs, labels))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    take_back(accelerator, network, prepared)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    vars(network).pop("_is_accelerate_prepared", None)
    accelerator.free_memory()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.training:
            for statistic in (module.running_mean, module.running_var):
                statistic.copy_(accelerator.reduce(statistic, reduction="mean"))
    # The same tensors as before, whole, with new values: others hold them too.
    assert all(new is old for new, (old, _) in zip(network.parameters(), before))
    assert [value.requires_grad for value in network.parameters()] == [flag for _, flag in before]
    assert not any(isinstance(value, DTensor) for value in network.parameters())
    network.eval()

def loss_of(network, images, labels):
    return torch.nn.functional.cross_entropy(network(pixel_values=images).logits.float(), labels)

def copies(state):
    return {key: value.clone() for key, value in state.items()}

def states_of(names):
    states = {}
    for name in names:
        model = get_peft_model(tiny_model(name), DynammoConfig(classes=["a", "b"], reduction_factor=2))
        # As stage 1 of a method: a mode of the head that reads a child's weight.
        with model.head_output("last_layer_logits"):
            train(model, tiny_images(name, 20), torch.arange(20) % 2, loss_of)
        with torch.no_grad():
            logits = model(tiny_images(name)).logits
        # Copied at once, since the head is trained further.
        states[name] = copies({**model.state_dict(), "logits": logits})
        # As stage 2: a head alone, after the model.
        head = model.base_model.head.heads["default"]
        head.requires_grad_(True)
        features = torch.randn(14, head.in_features, generator=torch.Generator().manual_seed(3))
        step = lambda network, inputs, labels: torch.nn.functional.cross_entropy(network(inputs).float(), labels)
        train(head, features, torch.arange(14) % 2, step, batch_size=3)
        states[f"{name} head"] = copies(head.state_dict())
    return states

def state_of_method():
    # What a method's own step does to the head must reach the copy.
    options = {"optimizer": "sgd", "learning_rate": 0.005, "epochs": 2, "batch_size": 3}
    arguments = {f"{stage}_{name}": value for stage in ("adapter", "head") for name, value in options.items()}
    arguments = DynammoArguments(heads="exemplars", feature_distillation=5.0, memory_size=4, **arguments)
    method = Dynammo(tiny_model("vit"), arguments)
    scenario = ClassIncrementalScenario(
        tiny_dataset(4, 6), tiny_dataset(4, 2), tiny_processor(32), classes_per_task=2, progress=False
    )
    Learner(method, accelerator, progress=False).fit(scenario)
    return copies(method.model.state_dict())

for kind in kinds.split(","):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = start(kind)
    states = states_of(["vit"] if case == "bf16" else ["vit", "convnext", "resnet_basic"])
    if case != "bf16":
        states["method"] = state_of_method()
    torch.save(states, f"{out}/{kind}-{accelerator.process_index}.pt")
accelerator.wait_for_everyone()
accelerator.end_training()
"""


DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


@pytest.mark.parametrize(
    ("kind", "case", "tolerance"),
    [
        ("fsdp2", "float32", 1e-5),
        ("fsdp2", "bf16", 1e-3),
        pytest.param("zero2", "float32", 1e-5, marks=DEEPSPEED),
        pytest.param("zero3", "float32", 1e-5, marks=DEEPSPEED),
    ],
)
def test_training_in_pieces_ends_with_the_same_weights(tmp_path, kind, case, tolerance):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, script, TESTS, f"plain,{kind}", case, tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    expected = torch.load(tmp_path / "plain-0.pt")
    for process in (0, 1):
        found = torch.load(tmp_path / f"{kind}-{process}.pt")
        assert found.keys() == expected.keys()
        for name, state in expected.items():
            assert found[name].keys() == state.keys()
            torch.testing.assert_close(found[name], state, rtol=tolerance, atol=tolerance)


def test_without_sharding_the_network_itself_is_trained():
    accelerator, network = Accelerator(cpu=True), torch.nn.Linear(2, 2)
    set_up_sharding(accelerator)
    assert training_copy(accelerator, network) is network
    optimizer = torch.optim.SGD(network.parameters())
    prepared, optimizer = prepare(accelerator, network, optimizer, batch_size=2)
    assert prepared is network
    take_back(accelerator, network, prepared)
    accelerator.free_memory()


class Forged:
    """An accelerator as far as `set_up_sharding` looks at it."""

    def __init__(self, distributed_type, mixed_precision="no", backend="NO", **plugin):
        self.distributed_type, self.mixed_precision = distributed_type, mixed_precision
        dynamo = SimpleNamespace(backend=DynamoBackend(backend))
        if distributed_type == DistributedType.FSDP:
            own = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **plugin})
            self.state = SimpleNamespace(fsdp_plugin=own, dynamo_plugin=dynamo)
        else:
            self.deepspeed_plugin = SimpleNamespace(deepspeed_config=plugin)


@pytest.mark.parametrize(
    ("forged", "expected"),
    [
        ({"fsdp_version": 1}, "fsdp_version=1 is not supported; set fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading=True would leave"),
        ({"activation_checkpointing": True}, "call model.gradient_checkpointing_enable()"),
        ({"backend": "INDUCTOR"}, "dynamo_backend=INDUCTOR is not supported with FSDP2"),
    ],
)
def test_settings_of_fsdp_that_cannot_be_followed(monkeypatch, forged, expected):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    accelerator = Forged(DistributedType.FSDP, **forged)
    with pytest.raises(ValueError) as caught:
        training_copy(accelerator, torch.nn.Linear(2, 2))
    assert expected in str(caught.value)


def test_settings_of_deepspeed():
    with pytest.raises(ValueError, match="mixed_precision='bf16' is not supported with DeepSpeed"):
        set_up_sharding(Forged(DistributedType.DEEPSPEED, "bf16"))
    for given, expected in (({}, 0.0), ({"gradient_clipping": "auto"}, 0.0), ({"gradient_clipping": 0.5}, 0.5)):
        accelerator = Forged(DistributedType.DEEPSPEED, **given)
        set_up_sharding(accelerator)
        assert accelerator.deepspeed_plugin.deepspeed_config["gradient_clipping"] == expected

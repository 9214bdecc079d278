"""The launch recipes: Accelerate takes every file, and those for a CPU are run by its launcher."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from safetensors.torch import load_file
from test_recipe import RECIPE, ROOT, run, small_run


FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
LAUNCHERS = {
    "simple_launcher": prepare_simple_launcher_cmd_env,
    "multi_gpu_launcher": prepare_multi_gpu_env,
    "deepspeed_launcher": prepare_deepspeed_cmd_env,
}


def launched(monkeypatch, name, *options):
    """Which launcher Accelerate takes for a file, with how many processes, and the environment it makes for them."""
    calls = []
    for launcher, prepare in LAUNCHERS.items():
        monkeypatch.setattr(
            launch, launcher, lambda args, launcher=launcher, prepare=prepare: calls.append((launcher, args, prepare))
        )
    # The recipes' port may be in use here.
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    path = str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")
    args = launch.launch_command_parser().parse_args(["--config_file", path, *options, "train.py"])
    launch.launch_command(args)
    ((launcher, args, prepare),) = calls
    prepared = prepare(args)
    environment = prepared[1] if isinstance(prepared, tuple) else prepared
    added = {key: value for key, value in environment.items() if os.environ.get(key) != value}
    return launcher, args, added


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_explained_and_loaded_without_unknown_keys(path):
    text = path.read_text(encoding="utf-8")
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert text.startswith("# ") and 1 <= len(comment) <= 4
    config = load_config_from_file(str(path))
    # What Accelerate was not told, it would fill in from elsewhere.
    assert {"distributed_type", "num_processes", "num_machines", "mixed_precision"} <= set(yaml.safe_load(text))
    assert config.num_processes >= 1
    # Inside these sections Accelerate takes keys that do not exist without a word.
    known = vars(launch.launch_command_parser().parse_args(["train.py"]))
    for section in ("fsdp_config", "deepspeed_config", "dynamo_config"):
        assert [key for key in yaml.safe_load(text).get(section, {}) if key not in known] == []


@pytest.mark.parametrize(
    ("name", "launcher", "processes", "expected"),
    [
        ("cpu", "simple_launcher", 1, {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}),
        ("cpu_processes", "multi_gpu_launcher", 2, {"ACCELERATE_MIXED_PRECISION": "no"}),
        ("gpu", "simple_launcher", 1, {"ACCELERATE_USE_CPU": "False", "CUDA_VISIBLE_DEVICES": "0"}),
        ("bf16", "simple_launcher", 1, {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        ("fp16", "simple_launcher", 1, {"ACCELERATE_MIXED_PRECISION": "fp16"}),
        ("compile", "simple_launcher", 1, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}),
        ("gpus", "multi_gpu_launcher", 2, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO"}),
        (
            "fsdp2",
            "multi_gpu_launcher",
            2,
            {
                "ACCELERATE_USE_FSDP": "true",
                "ACCELERATE_MIXED_PRECISION": "bf16",
                "FSDP_VERSION": "2",
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "FSDP_RESHARD_AFTER_FORWARD": "true",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
                "FSDP_ACTIVATION_CHECKPOINTING": "false",
            },
        ),
        (
            "deepspeed_zero2",
            "deepspeed_launcher",
            2,
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_MIXED_PRECISION": "no",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
            },
        ),
        (
            "deepspeed_zero3",
            "deepspeed_launcher",
            2,
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"},
        ),
    ],
)
def test_what_the_launcher_makes_of_a_file(monkeypatch, name, launcher, processes, expected):
    for key in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(key, raising=False)
    found, args, environment = launched(monkeypatch, name)
    assert (found, args.num_processes, args.num_machines) == (launcher, processes, 1)
    if launcher != "simple_launcher":
        assert args.nproc_per_node == str(processes)
    assert {key: environment.get(key) for key in expected} == expected


def test_what_the_launcher_makes_of_several_machines(monkeypatch):
    options = ["--machine_rank", "1", "--main_process_ip", "10.0.0.7", "--main_process_port", "29511"]
    launcher, args, _ = launched(monkeypatch, "machines", *options)
    assert launcher == "multi_gpu_launcher"
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "8")
    assert args.rdzv_endpoint == "10.0.0.7:29511"


def test_all_files_are_tested_and_in_the_table_of_the_docs():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert [path.name for path in FILES if f"`{path.name}`" not in page] == []


def start(name, options, arguments, **environment):
    """`accelerate launch --config_file recipes/accelerate/<name>.yaml <options> <recipe> <arguments>`."""
    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, *options, RECIPE, *arguments]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def end(*processes):
    """What they printed, one after the other; all must have ended well."""
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors[-3000:]
    return "".join(output for output, _ in outputs)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def report(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_bf16_and_gradient_accumulation_are_run(tmp_path):
    path = small_run(tmp_path)
    end(start("bf16", ["--num_cpu_threads_per_process", "1"], [path, "--gradient_accumulation_steps", "2"]))
    found = report(tmp_path)
    assert found["options"]["gradient_accumulation_steps"] == 2
    adapter = load_file(tmp_path / "out" / "merged" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}


def test_two_processes_on_the_cpu_and_two_machines_end_alike(tmp_path):
    path = small_run(tmp_path)
    arguments = [path, "--gradient_accumulation_steps", "2"]
    port = ["--main_process_port", "0"]
    printed = end(start("cpu_processes", port, arguments, ACCELERATE_USE_CPU="true"))
    # Had each process learned for itself, both would have said so.
    assert printed.count("Task 2/2 (class 2, class 3): accuracy") == 1
    one = load_file(tmp_path / "out" / "merged" / "adapter_model.safetensors")
    options = ["--num_processes", "2", "--main_process_port", free_port(), "--mixed_precision", "no"]
    machines = [
        start(
            "machines",
            [*options, "--machine_rank", rank],
            [*arguments, "--overwrite_output_dir", "true"],
            ACCELERATE_USE_CPU="true",
        )
        for rank in (0, 1)
    ]
    assert end(*machines).count("Last accuracy") == 1
    two = load_file(tmp_path / "out" / "merged" / "adapter_model.safetensors")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value)


def test_a_compiled_run_learns_what_a_plain_one_does(tmp_path):
    path = small_run(tmp_path, classes_per_task=4, adapter_epochs=1)
    method, _ = run([str(path)])
    plain = {key: value for key, value in method.model.state_dict().items() if "task_000" in key}
    arguments = [path, "--overwrite_output_dir", "true", "--save_task_adapters", "true"]
    # The compiler of the file, inductor, takes minutes on a CPU; what it is given to compile is the same.
    end(start("compile", ["--dynamo_backend", "eager"], arguments))
    compiled = load_file(tmp_path / "out" / "task_000" / "adapter_model.safetensors")
    for key, value in compiled.items():
        head, _, leaf = key.rpartition(".")
        name = f"{head}.task_000.{leaf}" if f"{head}.task_000.{leaf}" in plain else f"{key}.task_000"
        torch.testing.assert_close(value, plain[name], rtol=1e-4, atol=1e-5)

"""Nothing on a GPU meets what lies on the CPU: tests of GPUs on one that is pretended, in a process of their own."""

import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent
# Each goes other ways through the package; all of `test_gpu.py` would take minutes.
CHOSEN = [
    "test_devices_do_not_meet",
    "test_a_gpu_learns_what_a_cpu_learns[vit-DynammoLoraConfig-dynammo]",
    "test_a_gpu_learns_what_a_cpu_learns[resnet_basic-DynammoConfig-acl]",
    "test_merges[vit-fisher]",
    "test_merges[resnet_basic-recalibrate]",
    "test_merges_of_lora[regmean]",
    "test_adapters_that_lie_on_the_disk",
    "test_saved_on_a_gpu_and_loaded_anywhere[vit-DynammoConfig]",
]


def test_on_a_pretended_gpu():
    plugins = ["-p", "pretended_gpu", "-p", "no:xdist", "-p", "no:cacheprovider"]
    names = [f"{TESTS / 'test_gpu.py'}::{name}" for name in CHOSEN]
    command = [sys.executable, "-m", "pytest", "-vv", *plugins, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count(" PASSED") >= len(CHOSEN)
    assert " SKIPPED" not in done.stdout

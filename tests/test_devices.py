"""Nothing on a GPU meets what lies on the CPU: tests of GPUs on one that is pretended, in a process of their own."""

import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent
# Each goes other ways through the package; all of `test_gpu.py` would take minutes.
CHOSEN = [
    "test_a_gpu_learns_what_a_cpu_learns[vit-DynammoLoraConfig-dynammo]",
    "test_a_gpu_learns_what_a_cpu_learns[resnet_basic-DynammoConfig-acl]",
    "test_heads[0-gaussians]",
    "test_merges[vit-fisher]",
    "test_merges[resnet_basic-by_channel]",
    "test_merges[resnet_basic-recalibrate]",
    "test_merges_of_lora[regmean]",
    "test_adapters_that_lie_on_the_disk",
    "test_saved_on_a_gpu_and_loaded_anywhere[vit-DynammoConfig]",
]


def run(*options):
    """`pytest` with the pretended GPU; how it ended, and what was printed."""
    plugins = ["-p", "pretended_gpu", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-vv", *plugins, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, timeout=500)
    return done.returncode, done.stdout


def test_on_a_pretended_gpu():
    code, printed = run(*(f"{TESTS / 'test_gpu.py'}::{name}" for name in CHOSEN))
    assert code == 0, printed[-3000:]
    assert printed.count(" PASSED") == len(CHOSEN)


def test_the_pretended_gpu_refuses_what_a_real_one_does(tmp_path):
    (tmp_path / "test_mixed.py").write_text(
        """
import pretended_gpu, pytest, torch

@pytest.mark.parametrize("mixed", [
    lambda here, there: here + there,
    lambda here, there: torch.cat([here, there]),
    lambda here, there: there.copy_(here)[here > 0],
    lambda here, there: torch.nn.functional.linear(here, there),
    lambda here, there: torch.randn(2, device=here.device, generator=torch.Generator()),
])
def test_mixed(mixed):
    here, there = torch.ones(2, 2).to(pretended_gpu.DEVICE), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="of the CPU|on the CPU"):
        mixed(here, there)

def test_alike():
    here, there = torch.ones(2, 2).to(pretended_gpu.DEVICE), torch.ones(2, 2)
    assert (here + torch.tensor(1.0)).sum().item() == 8
    assert here[torch.tensor([0])].device == here.device
    assert there.copy_(here).device.type == here.cpu().device.type == "cpu"
"""
    )
    code, printed = run(tmp_path / "test_mixed.py", "--rootdir", tmp_path)
    assert code == 0, printed[-3000:]

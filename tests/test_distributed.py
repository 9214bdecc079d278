"""Two real processes over gloo end with the same weights, memory and measures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


TESTS = Path(__file__).parent

SCRIPT = """
import hashlib, sys
sys.path.insert(0, sys.argv[2])
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tiny import tiny_dataset, tiny_model, tiny_processor
from dynammo_peft import METHODS, AdapterMethodArguments, ClassIncrementalScenario, DynammoConfig, Learner

scenario = ClassIncrementalScenario(
    tiny_dataset(6, 9), tiny_dataset(6, 3, seed=1), tiny_processor(64), classes_per_task=2, progress=False
)
arguments = AdapterMethodArguments(
    memory_size=12, adapter_epochs=2, adapter_batch_size=4, head_epochs=3, head_batch_size=4
)
method = METHODS[sys.argv[1]](tiny_model("resnet_basic"), arguments, DynammoConfig(reduction_factor=2))
accelerator = Accelerator()
results = Learner(method, accelerator, eval_batch_size=4, progress=False).fit(scenario)

def digest(tensors):
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()

state = {key: value for key, value in method.model.state_dict().items() if "num_batches_tracked" not in key}
found = gather_object([(digest(state.values()), digest([method.memory.images().rows]), str(results.metrics()))])
assert accelerator.num_processes == 2
accelerator.wait_for_everyone()
accelerator.end_training()
assert found[0] == found[1], found
"""


@pytest.mark.parametrize("method", ["dynammo", "acl"])
def test_processes_agree(tmp_path, method):
    script = tmp_path / "agree.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, script, method, str(TESTS)], capture_output=True, text=True, env=environment, cwd=TESTS.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]

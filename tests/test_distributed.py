"""Two real processes over gloo end with the same weights, memory, statistics and measures."""

import json
import os
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent

SCRIPT = """
import hashlib, json, sys
sys.path.insert(0, sys.argv[2])
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tiny import tiny_dataset, tiny_model, tiny_processor
from dynammo_peft import METHODS, ClassIncrementalScenario, DynammoConfig, Learner

scenario = ClassIncrementalScenario(
    tiny_dataset(6, 9), tiny_dataset(6, 3, seed=1), tiny_processor(64), classes_per_task=2, progress=False
)
accelerator = Accelerator()

def digest(tensors):
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()

for name, options in json.loads(sys.argv[1]):
    method_cls = METHODS[name]
    arguments = method_cls.arguments_cls(
        memory_size=12, adapter_epochs=2, adapter_batch_size=4, head_epochs=3, head_batch_size=4, **options
    )
    method = method_cls(tiny_model("resnet_basic"), arguments, DynammoConfig(reduction_factor=2))
    results = Learner(method, accelerator, eval_batch_size=4, progress=False).fit(scenario)
    state = {key: value for key, value in method.model.state_dict().items() if "num_batches_tracked" not in key}
    statistics = getattr(method, "statistics", None)
    known = []
    if statistics is not None:
        # Every process has seen all images, once as they are and once augmented.
        assert statistics.counts == dict.fromkeys(range(6), 2 * 9), statistics.counts
        known = [statistics.mean_matrix(), statistics.pooled_covariance()]
    own = [digest(state.values()), digest([method.memory.images().rows]), digest(known), str(results.metrics())]
    found = gather_object([own])
    assert len(found) == accelerator.num_processes == 2
    assert found[0] == found[1], (name, options, found)
accelerator.wait_for_everyone()
accelerator.end_training()
"""

# One launch for all: most of its time is that of the imports.
RUNS = [
    ("dynammo", {}),
    ("dynammo", {"heads": "exemplars"}),
    ("dynammo", {"heads": "gaussians", "merge": "fisher"}),
    ("dynammo", {"learned_weights": "layer", "weights_steps": 3, "recalibrate": True}),
    ("acl", {}),
]


def test_processes_agree(tmp_path):
    script = tmp_path / "agree.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    adapters = tmp_path / "adapters"
    runs = [*RUNS, ("dynammo", {"offload_adapters": str(adapters), "adapter_init": "first"})]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, script, json.dumps(runs), str(TESTS)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # One of them has written, all have read.
    assert sorted(path.name for path in adapters.iterdir()) == ["task_000", "task_001", "task_002"]

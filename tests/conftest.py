"""Settings for all tests."""

import gc
import os


# Before transformers or datasets are imported: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch is imported: models are tiny, and the threads of tests side by side would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from loopback_hub import LoopbackHub


datasets.disable_progress_bars()


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collection():
    # Accelerate collects garbage after every stage; all that was imported need not be searched each time.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _own_accelerate_state():
    # A process has one state, with one precision: files of tests must not depend on which of them ran before in it.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture
def hub(tmp_path):
    """A Hub on 127.0.0.1; `hub.environment()` and `hub.run()` are for fresh processes."""
    with LoopbackHub(tmp_path / "clients") as running:
        yield running


@pytest.fixture
def waits(hub, monkeypatch):
    """Points this process's `huggingface_hub` at `hub`; the seconds between its tries, which it does not wait."""
    return hub.connect(monkeypatch)

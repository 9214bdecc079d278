"""Settings for all tests."""

import os


# Before transformers or datasets are imported: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import pytest
import torch


datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)

"""Processes that come to differ are told in what."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_resume import new_method, tasks

from dynammo_peft import Learner
from dynammo_peft.training import agreement


def change_weight(method):
    with torch.no_grad():
        method.model.head.heads["merged"].bias[0] += 1


def change_statistics(method):
    method.statistics.means[0] += 1e-6


def forget_an_exemplar(method):
    method.memory.restore(method.memory.images().select(torch.arange(5)))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda method: None, None),
        (change_weight, "adapter 'merged'"),
        (change_statistics, "statistics.means"),
        (forget_an_exemplar, "exemplar_rows"),
    ],
)
def test_what_differs_is_named(monkeypatch, change, part):
    method, scenario = new_method(memory_size=6, adapter_epochs=1), tasks()
    results = Learner(method, Accelerator(cpu=True), progress=False).fit(scenario)

    def gather(own):
        # What another process would say, whose method is a little different.
        change(method)
        return [*own, agreement._digests(method, results)]

    monkeypatch.setattr(agreement, "gather_object", gather)
    two = SimpleNamespace(num_processes=2)
    if part is None:
        agreement.check_agreement(two, method, scenario[2], results)
        return
    with pytest.raises(RuntimeError, match="After task 2 the processes no longer agree: process 1 differs") as error:
        agreement.check_agreement(two, method, scenario[2], results)
    assert f"in {part}." in str(error.value)

"""What it takes to resume: written while a method learns, and read back."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor

from ..data import ClassIncrementalScenario
from ..methods import Method
from .identity import check_same_run, describe_run, versions
from .method_state import ADAPTER, adapter_part, changing_adapters, method_parts, restore_method
from .results import Results
from .rng import random_states, restore_random_states
from .store import CheckpointError, CheckpointStore


LATEST = "latest"


@dataclass
class Position:
    """How far learning has come.

    Args:
        task (`int`): Index of the task that comes next, or is being learned.
        step (`int`): Training steps of all tasks.
        seconds (`float`): Spent on the task before.
        stages (`list[dict]`): What the task's finished stages have trained.
        running (`Optional[dict]`): Where the stage after them stands, if it has begun.
    """

    task: int = 0
    step: int = 0
    seconds: float = 0.0
    stages: list[dict[str, Any]] = field(default_factory=list)
    running: Optional[dict[str, Any]] = None


class Checkpoints:
    """
    Writes a checkpoint after each task, after each stage and every `save_steps` training steps; resumes from one.

    They hold adapters, the state of the method (which rows are exemplars, class statistics), optimizer, schedule,
    sources of randomness, the place in the epoch, and the measures; no image. See [`CheckpointStore`] for the files.

    Args:
        directory (`Union[str, os.PathLike]`): Where to.
        save_steps (`int`): Training steps between checkpoints of a stage.
        save_total_limit (`int`): How many checkpoints to keep.
        overwrite (`bool`): Whether a run that resumes from none deletes those of an earlier run, when it begins.

    Raises:
        ValueError: If a number is less than 1.
    """

    def __init__(
        self,
        directory: Union[str, os.PathLike],
        save_steps: int = 500,
        save_total_limit: int = 2,
        overwrite: bool = False,
    ) -> None:
        if save_steps < 1:
            raise ValueError(f"save_steps={save_steps} must be at least 1.")
        self.store = CheckpointStore(directory, save_total_limit)
        self.save_steps = save_steps
        self.overwrite = overwrite

    def begin(
        self,
        method: Method,
        scenario: ClassIncrementalScenario,
        accelerator: Accelerator,
        results: Results,
        resume_from_checkpoint: Optional[str] = None,
    ) -> Position:
        """Called after the method's own `begin`: restores method and results, if there is something to resume.

        Args:
            method (`Method`): Has learned nothing in this run.
            scenario (`ClassIncrementalScenario`): What it will learn.
            accelerator (`Accelerator`): Where and how.
            results (`Results`): Without measures.
            resume_from_checkpoint (`Optional[str]`): `"latest"`, or the path of a checkpoint.

        Returns:
            `Position`: Where to go on.

        Raises:
            ValueError: If the checkpoint is of another run, or there are checkpoints that shall not be resumed from.
            CheckpointError: If it cannot be read, or another run writes to the folder.
        """
        self._method, self._accelerator, self._results = method, accelerator, results
        self._by_main(self.store.hold)
        self._run = describe_run(method, scenario, accelerator)
        self._parts: dict[str, str] = {}
        if self.overwrite and resume_from_checkpoint is None:
            if accelerator.is_main_process:
                self.store.clear()
            accelerator.wait_for_everyone()
        if not self._is_own(resume_from_checkpoint) and self.store.paths():
            raise ValueError(
                f"{self.store.directory} has checkpoints of an earlier run; resume from them "
                "(resume_from_checkpoint='latest'), delete them, or choose another folder."
            )
        saved = self._read(resume_from_checkpoint) if resume_from_checkpoint is not None else None
        if saved is None:
            self._snapshot()
            return Position(task=scenario.first_task)
        check_same_run(saved["run"], self._run, saved["path"])
        for name, version in versions().items():
            if saved["versions"].get(name) != version:
                warnings.warn(
                    f"{saved['path']} was written with {name} {saved['versions'].get(name)}, this is {version}; the "
                    "outcome may differ by more than rounding.",
                    stacklevel=3,
                )
        if accelerator.is_main_process:
            self.store.clear(after=saved["step"])
        parts = saved["parts"]
        restore_method(method, parts, scenario)
        results.restore(parts["results"])
        stages = sorted(key for key in parts if key.startswith("stage "))
        self._parts = {key: name for key, name in saved["names"].items() if key != "running"}
        if accelerator.is_main_process and not self._is_own(resume_from_checkpoint):
            self._parts = {key: self.store.put(parts[key]) for key in self._parts}
        return Position(
            task=saved["task"],
            step=saved["step"],
            seconds=saved["seconds"],
            stages=[parts[key] for key in stages],
            running=parts.get("running"),
        )

    def end(self) -> None:
        """Called when the run ends, whether it has learned all or not: others may write to the folder."""
        self.store.release()

    def is_due(self, steps: int) -> bool:
        """Whether a stage is to be saved, `steps` after it was."""
        return steps >= self.save_steps

    def after_task(self, task: int, step: int) -> None:
        """Saves everything; `task` is the one that comes next."""
        self._snapshot()
        self._commit(task, step, 0.0, self._parts)

    def after_stage(self, task: int, stage: int, trained: Mapping[str, Tensor], step: int, seconds: float) -> None:
        """Saves what a stage of a task has trained; `seconds` were spent on the task."""
        content = {"trained": dict(trained), "random": random_states(self._accelerator)}
        if self._accelerator.is_main_process:
            self._parts[f"stage {stage:03d}"] = self.store.put(content)
        self._commit(task, step, seconds, self._parts)

    def during_stage(self, task: int, running: Mapping[str, Any], step: int, seconds: float) -> None:
        """Saves where a stage stands."""
        content = {**running, "random": random_states(self._accelerator)}
        if self._accelerator.is_main_process:
            self._commit(task, step, seconds, {**self._parts, "running": self.store.put(content)})

    def restore_randomness(self, saved: Mapping[str, Any]) -> None:
        """As it was when a stage was saved."""
        restore_random_states(saved["random"], self._accelerator)

    def _is_own(self, which: Optional[str]) -> bool:
        """Whether a checkpoint to resume from lies in this folder."""
        return which == LATEST or (
            which is not None and Path(which).parent.resolve() == self.store.directory.resolve()
        )

    def _read(self, which: str) -> Optional[dict[str, Any]]:
        """A checkpoint, read by the main process; the others need not see the folder."""

        def read() -> Optional[dict[str, Any]]:
            paths = self.store.paths() if which == LATEST else [Path(which)]
            return {**self.store.read(paths[-1]), "path": str(paths[-1])} if paths else None

        return self._by_main(read)

    def _by_main(self, function: Callable[[], Any]) -> Any:
        """What a function gives, or the `CheckpointError` it raises, in the main process; the same in all."""
        given: list[Any] = [None]
        if self._accelerator.is_main_process:
            try:
                given = [function()]
            except CheckpointError as error:
                given = [error]
        if self._accelerator.num_processes > 1:
            broadcast_object_list(given)
        if isinstance(given[0], CheckpointError):
            raise given[0]
        return given[0]

    def _snapshot(self) -> None:
        """Writes the parts that do not change while a task is learned, unless they are there from earlier."""
        if not self._accelerator.is_main_process:
            return
        model = self._method.model
        adapters = list(model.peft_config) if isinstance(model, PeftModel) else []
        changing = changing_adapters(self._method)
        known, self._parts = self._parts, {}
        for key, content in {**method_parts(self._method), "results": self._results.state()}.items():
            self._parts[key] = self.store.put(content)
        for name in adapters:
            key = f"{ADAPTER}{name}"
            if name in changing or key not in known:
                self._parts[key] = self.store.put(adapter_part(model, name))
            else:
                self._parts[key] = known[key]

    def _commit(self, task: int, step: int, seconds: float, parts: Mapping[str, str]) -> None:
        if self._accelerator.is_main_process:
            content = {
                "task": task,
                "seconds": seconds,
                "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "versions": versions(),
                "run": self._run,
            }
            self.store.commit(step, content, parts)

"""Checkpoints as files: each complete or not there."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
from filelock import BaseFileLock, FileLock, Timeout


FORMAT_VERSION = 3
# To wait for another run: what a killed one has started may outlive it by a moment.
LOCK_SECONDS = 10
_NAME = re.compile(r"checkpoint-(\d+)\.json")


class CheckpointError(OSError):
    """A checkpoint cannot be written or read."""


class CheckpointStore:
    """
    A folder of checkpoints. Each is a small JSON file that names its parts, which are files named by their content.

    A part that did not change since the last checkpoint is not written again. Files get their names once they are
    whole and on the disk, a checkpoint after its parts: whenever a process ends, the last checkpoint is complete.

    One run at a time: parts that a second one has written, and not named yet, would be taken for leftovers.

    Args:
        directory (`Union[str, os.PathLike]`): The folder; made when something is written.
        total_limit (`int`): How many checkpoints to keep.

    Raises:
        ValueError: If none is to be kept.
    """

    def __init__(self, directory: Union[str, os.PathLike], total_limit: int = 2) -> None:
        if total_limit < 1:
            raise ValueError(f"save_total_limit={total_limit} must be at least 1.")
        self.directory = Path(directory)
        self.total_limit = total_limit
        self._lock: Optional[BaseFileLock] = None

    def hold(self) -> None:
        """Keeps other runs out of the folder, until `release` or the end of the process.

        File systems that know no locks, and folders that cannot be written, are left alone.

        Raises:
            CheckpointError: If another run goes on, for `LOCK_SECONDS` at least.
        """
        self.release()
        lock = FileLock(self.directory / ".lock")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise CheckpointError(
                f"Another run writes its checkpoints to {self.directory}; wait for its end, or choose another folder."
            ) from error
        except (OSError, NotImplementedError):
            return
        self._lock = lock

    def release(self) -> None:
        """Lets other runs write to the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def _parts(self) -> Path:
        return self.directory / "parts"

    def paths(self) -> list[Path]:
        """The checkpoints, the oldest first."""
        found = [path for path in self.directory.glob("checkpoint-*.json") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))

    def put(self, part: Any) -> str:
        """Writes a part, of tensors and plain values.

        Returns:
            `str`: What checkpoints call it.

        Raises:
            CheckpointError: If it cannot be written.
        """
        buffer = io.BytesIO()
        torch.save(part, buffer)
        content = buffer.getvalue()
        name = f"{hashlib.sha256(content).hexdigest()}.pt"
        path = self._parts / name
        # Of another size only if the disk has lost some of it.
        if not (path.exists() and path.stat().st_size == len(content)):
            self._write(path, content)
        return name

    def commit(self, step: int, content: Mapping[str, Any], parts: Mapping[str, str]) -> Path:
        """Completes a checkpoint, then deletes old ones and parts that belong to none.

        Args:
            step (`int`): Training steps so far.
            content (`Mapping[str, Any]`): What else to write, as JSON.
            parts (`Mapping[str, str]`): Names of the parts, from `put`.

        Returns:
            `Path`: The checkpoint.

        Raises:
            CheckpointError: If it cannot be written.
        """
        path = self.directory / f"checkpoint-{step}.json"
        whole = {"format_version": FORMAT_VERSION, "step": step, **content, "parts": dict(parts)}
        self._write(path, (json.dumps(whole, indent=2) + "\n").encode())
        self._forget()
        return path

    def read(self, path: Path) -> dict[str, Any]:
        """A checkpoint as it was committed; its `parts` are those of `put`.

        Raises:
            CheckpointError: If a file is missing or damaged, or of another format.
        """
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            version, parts = whole["format_version"], whole["parts"]
        except OSError as error:
            raise CheckpointError(f"There is no checkpoint {path} ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no checkpoint ({type(error).__name__}: {error}).") from error
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format_version={version!r}; this version reads {FORMAT_VERSION}.")
        return {**whole, "parts": {key: self._get(path, name) for key, name in parts.items()}, "names": parts}

    def clear(self, after: int = -1) -> None:
        """Deletes all checkpoints, or those after a training step, which a run that goes on from there replaces."""
        for path in self.paths():
            if int(_NAME.fullmatch(path.name)[1]) > after:
                path.unlink()
        self._forget()

    def _get(self, checkpoint: Path, name: str) -> Any:
        path = checkpoint.parent / self._parts.name / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{checkpoint} lacks {path} ({error.strerror}); {self._advice(checkpoint)}."
            ) from error
        if f"{hashlib.sha256(content).hexdigest()}.pt" != name:
            raise CheckpointError(f"{path} is damaged; {self._advice(checkpoint)}.")
        # Whatever is in the file, no code of it is run.
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def _advice(self, checkpoint: Path) -> str:
        others = [path for path in self.paths() if path != checkpoint]
        return f"resume from {others[-1]}" if others else "start anew"

    def _write(self, path: Path, content: bytes) -> None:
        unfinished = path.with_name(f".{path.name}.unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            whole = self.paths()
            last = f"{whole[-1]} is complete" if whole else "there is none yet"
            raise CheckpointError(
                f"A checkpoint cannot be written to {self.directory} ({error.strerror}); of earlier ones, {last}."
            ) from error

    def _forget(self) -> None:
        """Deletes checkpoints beyond the limit, then parts that none names, and what was left unfinished."""
        for path in self.paths()[: -self.total_limit]:
            path.unlink()
        named: set[str] = set()
        for path in self.paths():
            try:
                named |= set(json.loads(path.read_text(encoding="utf-8"))["parts"].values())
            except (ValueError, KeyError, AttributeError, TypeError):
                continue
        for path in [*self._parts.glob("*.pt"), *self._parts.glob(".*.unfinished")]:
            if path.name not in named:
                path.unlink()


def _sync_folder(path: Path) -> None:
    """Makes sure that a file's new name is on the disk too; Windows cannot, and need not."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Decoded images in a file that is mapped into memory, for data sets larger than memory.

A file holds two arrays of NumPy's format one after the other: the images, `(N, 3, H, W)`, `uint8`, in the order of the
data set's rows, and the data set's own labels, `(N,)`. They are the images as they are. Where these are of patients,
the folder is to be guarded like the data set itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Optional, Union

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor


try:
    import fcntl
except ImportError:  # Not a POSIX system: files that a killed process has left stay.
    fcntl = None

FORMAT_VERSION = 1
UNFINISHED = ".unfinished"


class MappedImages:
    """The images of a cache file, read as they are asked for; a store of [`LabelledImages`].

    The mapping is read-only: a writable one would count as memory in full, and could not be larger than it. Processes
    share what the system holds of the file; those that are started anew (workers of a `DataLoader`) map it again.

    Args:
        path (`Union[str, os.PathLike]`): A file written by [`open_cache`].

    Raises:
        ValueError: If the file is truncated or no cache file.

    Attributes:
        labels (`Tensor`): The data set's own labels, `(N,)`.
        shape (`tuple[int, ...]`): `(N, 3, H, W)`.
    """

    def __init__(self, path: Union[str, os.PathLike]) -> None:
        self.path = os.fspath(path)
        with open(path, "rb") as file:
            if npy.read_magic(file) != (1, 0):
                raise ValueError("it has another format")
            self.shape, _, dtype = npy.read_array_header_1_0(file)
            start = file.tell()
            if dtype != np.uint8 or len(self.shape) != 4:
                raise ValueError("it does not hold images")
            file.seek(int(np.prod(self.shape)), os.SEEK_CUR)
            labels = npy.read_array(file, allow_pickle=False)
            if len(labels) != self.shape[0] or file.read(1):
                raise ValueError("it has another length than it says")
        self.labels = torch.from_numpy(labels)
        self._images = np.asarray(np.memmap(path, np.uint8, mode="r", offset=start, shape=self.shape))

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Copies of the images at some places, `(B, 3, H, W)`, `uint8`."""
        return torch.from_numpy(self._images.take(index.numpy(), axis=dim))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)


def open_cache(
    cache_dir: Union[str, os.PathLike],
    facts: dict[str, Any],
    decode: Callable[[], Iterator[tuple[Tensor, int]]],
    count: Optional[int] = None,
    newest: float = 0.0,
) -> MappedImages:
    """
    The images of a cache file, which is written first if there is none.

    The file appears under its name when it is whole, so that one process may be killed or several may write at once.

    Args:
        cache_dir (`Union[str, os.PathLike]`): Folder; made if it is not there.
        facts (`dict[str, Any]`): What the images depend on: the file's name follows from it.
        decode (`Callable`): Gives images `(3, H, W)`, `uint8`, and labels; called if there is no file yet.
        count (`Optional[int]`): How many there will be, if that is known.
        newest (`float`): When what is decoded was last changed, in seconds: a file that is older is made again.

    Returns:
        `MappedImages`: The images.

    Raises:
        ValueError: If the folder cannot be written, or has no room.
    """
    directory = Path(cache_dir).expanduser()
    content = json.dumps({"format_version": FORMAT_VERSION, **facts}, sort_keys=True, default=str)
    path = directory / f"images-{hashlib.sha256(content.encode()).hexdigest()[:32]}.npy"
    with _naming_the_folder(directory):
        if path.exists() and path.stat().st_mtime >= newest:
            try:
                return MappedImages(path)
            except ValueError as error:
                warnings.warn(f"{path} is damaged ({error}); its images are decoded again.", stacklevel=2)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_leftovers(directory)
    _write(path, decode, count)
    return MappedImages(path)


def _write(path: Path, decode: Callable[[], Iterator[tuple[Tensor, int]]], count: Optional[int]) -> None:
    with _naming_the_folder(path.parent):
        file, unfinished = _begin(path)
    try:
        labels: list[int] = []
        for pixels, label in decode():
            with _naming_the_folder(path.parent):
                if not labels:
                    _check_room(path.parent, (count or 0) * pixels.numel())
                    _write_header(file, (0, *pixels.shape))
                file.write(pixels.contiguous().numpy())
            labels.append(label)
        with _naming_the_folder(path.parent):
            npy.write_array(file, np.array(labels, dtype=np.int64), version=(1, 0))
            # NumPy leaves room in a header for the number of images to grow.
            file.seek(0)
            _write_header(file, (len(labels), *pixels.shape))
            file.flush()
            os.fsync(file.fileno())
            os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise
    finally:
        # What a full disk did not take would be tried once more.
        with suppress(OSError):
            file.close()


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _begin(path: Path) -> tuple[BinaryIO, str]:
    """A new file beside `path` for the user alone, locked while this process is at it, and its name."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=UNFINISHED, dir=path.parent)
        _lock(handle)
        # Another process may have taken it for a leftover just before it was locked.
        if os.path.exists(name):
            return os.fdopen(handle, "wb"), name
        os.close(handle)


def _remove_leftovers(directory: Path) -> None:
    """Removes what processes that were killed have left; it may be large, and it holds images."""
    for path in directory.glob(f"images-*{UNFINISHED}"):
        with suppress(OSError), open(path, "r+b") as file:
            if _lock(file.fileno()):
                path.unlink()


def _lock(handle: int) -> bool:
    """Whether no other process is at a file, which is then locked until it is closed."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _naming_the_folder(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"cache_dir={str(directory)!r} cannot be used ({error.strerror or error}); choose a folder that can be "
            "written and has room for the decoded images."
        ) from error


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ValueError(
            f"cache_dir={str(directory)!r} has {free / 1e9:.1f} GB of room, and the decoded images need "
            f"{needed / 1e9:.1f} GB; choose another folder."
        )

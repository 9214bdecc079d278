"""Folders that are written as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Union


def check_replaceable(directory: Union[str, os.PathLike]) -> None:
    """Raises a `ValueError` if a folder cannot be replaced as a whole, whatever is written."""
    if os.path.ismount(directory):
        raise ValueError(f"{os.fspath(directory)} is a mount point, which nothing can replace; choose a folder in it.")


@contextmanager
def replaced_folder(directory: Union[str, os.PathLike]) -> Iterator[Path]:
    """Gives an empty folder beside `directory` to write into, which takes its place once all is written.

    After an error `directory` is as it was, and what was written is gone.

    Args:
        directory (`Union[str, os.PathLike]`): The folder to replace; it need not exist.

    Raises:
        ValueError: If it is a mount point.
    """
    check_replaceable(directory)
    target = Path(directory).resolve()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)

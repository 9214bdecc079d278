"""A run of the recipe in a process of its own, forked from one that has imported everything, to be killed."""

import contextlib
import io
import resource
import sys
from pathlib import Path

import torch
from forking import CONTEXT


sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

from class_incremental import main


def start(log, *arguments, largest_file=None):
    """Starts the recipe; what it prints goes to the file `log`. No file may grow beyond `largest_file` bytes."""
    process = CONTEXT.Process(target=_run, args=(str(log), [str(argument) for argument in arguments], largest_file))
    process.start()
    return process


def _run(log, arguments, largest_file):
    torch.set_num_threads(1)
    sys.argv = ["class_incremental.py", *arguments]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
    except SystemExit as end:
        # What sys.exit would print.
        print(end.code, file=printed)
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        Path(log).write_text(printed.getvalue())

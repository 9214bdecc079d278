"""Real processes, killed at any moment, and disks that take no more."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import killed_run
import pytest
from safetensors.torch import load_file
from test_recipe import small_run
from torch import equal


def settings(folder, **options):
    return small_run(
        folder,
        adapter_epochs=4,
        adapter_batch_size=4,
        heads="exemplars",
        exemplars_as_others=True,
        save_steps=1,
        **options,
    )


def finished(process):
    process.join(120)
    assert process.exitcode == 0, process.exitcode


def result(folder):
    """What a run has written: tensors, and measures without times."""
    values = json.loads((folder / "results.json").read_text())
    del values["seconds"], values["options"]["output_dir"]
    return load_file(folder / "merged" / "adapter_model.safetensors"), values


def assert_same(folder, expected):
    tensors, values = result(folder)
    others, other_values = expected
    assert list(tensors) == list(others)
    assert all(equal(tensors[name], others[name]) for name in tensors)
    assert values == other_values


@pytest.mark.timeout(1800)
def test_twenty_runs_killed_at_random_moments_end_as_one_that_was_not(tmp_path):
    options = settings(tmp_path)
    log = tmp_path / "log"
    # Once for the time, with everything imported; and the result.
    finished(killed_run.start(log, options, "--output_dir", tmp_path / "first"))
    start = time.monotonic()
    finished(killed_run.start(log, options, "--output_dir", tmp_path / "whole"))
    seconds = time.monotonic() - start
    expected = result(tmp_path / "whole")
    moments, killed, where = random.Random(0), 0, set()
    for attempt in range(60):
        output = tmp_path / f"run{attempt}"
        arguments = (options, "--output_dir", output, "--resume_from_checkpoint", "latest")
        start = time.monotonic()
        process = killed_run.start(log, *arguments)
        process.join(moments.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == 0:
            # It ended before: on a machine that is less busy now.
            seconds = min(seconds, time.monotonic() - start)
        else:
            assert process.exitcode == -signal.SIGKILL
            killed += 1
            found = tmp_path.glob(f"run{attempt}-checkpoints/checkpoint-*.json")
            where.add(max(map(step, found), default=None))
            finished(killed_run.start(log, *arguments))
        assert_same(output, expected)
        assert not list(tmp_path.glob(f"run{attempt}-checkpoints/parts/.*"))
        shutil.rmtree(output)
        if killed == 20:
            break
    assert killed == 20
    # Not all at the same place.
    assert len(where) > 2, where


def good_checkpoint(folder, log):
    """Options of a run that was killed behind its first task, and the checkpoints that it has left."""
    options = settings(folder)
    process = killed_run.start(log, options)
    pattern = "out-checkpoints/checkpoint-*.json"
    # The first task has four epochs of three steps.
    while max(map(step, folder.glob(pattern)), default=0) <= 12:
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    return options, sorted(folder.glob(pattern), key=step)


def step(checkpoint):
    return int(checkpoint.stem.rpartition("-")[2])


def test_a_full_disk(tmp_path):
    log = tmp_path / "log"
    options, checkpoints = good_checkpoint(tmp_path, log)
    finished(killed_run.start(log, options, "--output_dir", tmp_path / "whole"))
    last = checkpoints[-1].read_bytes()
    # No file may grow beyond a few blocks, as if there was no room for more.
    process = killed_run.start(log, options, "--resume_from_checkpoint", "latest", largest_file=4096)
    process.join(120)
    assert process.exitcode == 1
    (error,) = log.read_text().strip().splitlines()[-1:]
    assert error.startswith("error: A checkpoint cannot be written to")
    assert "File too large" in error
    assert f"{checkpoints[-1]} is complete" in error
    assert checkpoints[-1].read_bytes() == last
    assert not list(tmp_path.glob("out-checkpoints/**/.*.unfinished"))
    finished(killed_run.start(log, options, "--resume_from_checkpoint", "latest"))
    assert_same(tmp_path / "out", result(tmp_path / "whole"))


def read_only(folder):
    """A folder into which nothing can be written, whoever asks."""
    folder.mkdir()
    folder.chmod(0o500)
    if not os.access(folder, os.W_OK):
        return folder
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, _, options, *_ = line.split()
        if "ro" in options.split(",") and os.path.isdir(place):
            return Path(place)
    # A file is no folder either.
    (folder / "file").touch()
    return folder / "file"


def test_a_folder_that_cannot_be_written(tmp_path):
    place = read_only(tmp_path / "locked")
    log = tmp_path / "log"
    process = killed_run.start(log, settings(tmp_path), "--output_dir", place / "run")
    process.join(120)
    assert process.exitcode == 1
    error = log.read_text().strip().splitlines()[-1]
    assert error.startswith(f"error: A checkpoint cannot be written to {place}/run-checkpoints (")
    assert "of earlier ones, there is none yet" in error
    assert "Traceback" not in log.read_text()

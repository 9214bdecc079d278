"""What task 100 costs against task 2: time to learn it, memory, forward time, and what goes to the disk.

    python benchmarks/long_life.py                 # 100 tasks, old adapters in the model and on the disk
    python benchmarks/long_life.py --modes disk --tasks 20 --device cuda

The classes are those of `../shared/data/tiny_imagenet_40`, and drawn ones behind them, all with equally many images.
The first task has as many classes as nearly fill the memory, all others have one, so that the memory holds about as
many exemplars at task 2 as at the last; in between, rounding to whole images a class leaves fewer. Each mode runs in a
process of its own. Times of a task are medians over nine tasks around it, as ratios to those of tasks 2 to 10. What is
timed is learning a task; scoring the test images of all classes seen takes longer with every class.

Peak memory is the process's. glibc would keep freed blocks of a megabyte and more, of which the peak then tells, so it
is told to give them back (`MALLOC_MMAP_THRESHOLD_`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from cost import median_times
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import dynammo_peft as dp
from dynammo_peft.hub import save_learning_state


SHARED = Path(__file__).resolve().parents[1].parent / "shared"
IMAGE_SIZE = 112
MODES = ("model", "disk")
MEASURED = (1, 2, 10, 50, 100)
# How many tasks around a measured one are taken together.
WINDOW = 9
# Images of a timed forward pass, and how often it is timed.
BATCH, REPEATS = 8, 15


class Timed(dp.Dynammo):
    """Notes the seconds that each task takes, those of all processors together, and with how many exemplars."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times: list[tuple[float, float, int]] = []

    def learn(self, task: dp.Task) -> Iterator[dp.Stage]:
        exemplars, start = len(self.memory), (time.perf_counter(), time.process_time())
        yield from super().learn(task)
        self.times.append((time.perf_counter() - start[0], time.process_time() - start[1], exemplars))


def drawn_images(label: int, count: int, size: int = 64) -> list[Image.Image]:
    """Images of a synthetic class: a wave of its own colour, direction and length, at random places, and noise."""
    rng = np.random.default_rng(label)
    colour, angle, length = rng.uniform(60, 195, 3), rng.uniform(0, np.pi), rng.uniform(4, 24)
    rows, columns = np.mgrid[:size, :size]
    images = []
    for _ in range(count):
        phase = rng.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * (rows * np.cos(angle) + columns * np.sin(angle)) / length + phase)
        pixels = colour + 50 * wave[..., None] + rng.normal(0, 15, (size, size, 3))
        images.append(Image.fromarray(pixels.clip(0, 255).astype("uint8")))
    return images


def split(name: str, classes: int, count: int) -> datasets.Dataset:
    """So many images of each class; classes are those of the folder, and then drawn ones."""
    folder = datasets.load_dataset("imagefolder", data_dir=str(SHARED / "data" / "tiny_imagenet_40"), split=name)
    known = folder.features["label"].names[:classes]
    names = [*known, *(f"drawn {index:03d}" for index in range(len(known), classes))]
    labels = np.array(folder["label"])
    images = []
    for label in range(classes):
        if label >= len(known):
            images.append(drawn_images(label, count))
            continue
        rows = np.flatnonzero(labels == label)[:count]
        if len(rows) < count:
            raise ValueError(f"Class {known[label]!r} has {len(rows)} {name} images, fewer than {count}.")
        images.append([row["image"].convert("RGB") for row in folder.select(rows)])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {
        "image": list(itertools.chain(*images)),
        "label": [label for label, own in enumerate(images) for _ in own],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def saved_bytes(method: dp.Dynammo) -> dict[str, int]:
    """What the newest adapter, the merged one and the method's state take on the disk."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = [method.adapters[-1], "merged"]
        method.model.save_pretrained(folder, selected_adapters=names, save_embedding_layers=False)
        sizes = {"adapter": folder_bytes(folder / names[0]), "merged": folder_bytes(folder / "merged")}
        (folder / "state").mkdir()
        save_learning_state(method, folder / "state")
        return {**sizes, "state": folder_bytes(folder / "state")}


def class_counts(args: argparse.Namespace) -> tuple[int, int]:
    """Classes of the first task, and of all; the latter is the size of the memory."""
    first = max(1, round((args.tasks - 1) / (args.images - 1)))
    return first, first + args.tasks - 1


def run(mode: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Learns all tasks in this process; returns times of each, and sizes where they are measured."""
    path = SHARED / "weights" / "deit_tiny_patch16_224"
    processor = dp.resized_image_processor(AutoImageProcessor.from_pretrained(path), IMAGE_SIZE)
    first, classes = class_counts(args)
    train, test = split("train", classes, args.images), split("test", classes, 1)
    names = train.features["label"].names
    groups = [names[:first], *([name] for name in names[first:])]
    scenario = dp.ClassIncrementalScenario(train, test, processor, groups=groups, progress=False)
    options = {"memory_size": classes, "adapter_epochs": args.epochs, "adapter_batch_size": 20}
    if mode == "disk":
        options["offload_adapters"] = folder
    method = Timed(AutoModelForImageClassification.from_pretrained(path), dp.DynammoArguments(**options))
    base = AutoModelForImageClassification.from_pretrained(path).to(args.device).eval()
    images = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, device=args.device)
    measured: dict[int, dict[str, float]] = {}

    def measure(task: dp.Task, results: dp.Results) -> None:
        count = task.index + 1
        print(f"{mode}: task {count}, {method.times[-1][0]:.2f} s", file=sys.stderr, flush=True)
        if count not in MEASURED:
            return
        # In kilobytes on Linux. It is taken first: what is measured takes memory too.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        synchronize = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
        forwards = [
            lambda: base(pixel_values=images, interpolate_pos_encoding=True),
            lambda: method.logits(images),
        ]
        with torch.no_grad():
            base_seconds, seconds = median_times(forwards, REPEATS, synchronize)
        measured[count] = {
            "peak_mebibytes": peak,
            "parameters": sum(parameter.numel() for parameter in method.model.parameters()),
            "forward_seconds": seconds,
            "forward_over_base": seconds / base_seconds,
            **{f"{name}_bytes": size for name, size in saved_bytes(method).items()},
        }

    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.device == "cpu")
    # For a batch of a size that was not met before oneDNN compiles kernels and keeps them: few sizes of the last one.
    results = dp.Learner(method, accelerator, eval_batch_size=BATCH, progress=False).fit(scenario, measure)
    return {"times": method.times, "measured": measured, "accuracy": results.metrics()["last_accuracy"]}


def around(values: Sequence[float], task: int) -> float:
    """Median over a task, counted from 1, and its neighbours; the first task has no like."""
    if task == 1:
        return values[0]
    first = max(2, min(task - WINDOW // 2, len(values) - WINDOW + 1))
    return statistics.median(values[first - 1 : first - 1 + WINDOW])


def report(mode: str, found: dict[str, Any]) -> str:
    """The table of a mode."""
    wall, processor, exemplars = zip(*found["times"])
    where = "in the model" if mode == "model" else "on the disk (offload_adapters)"
    lines = [
        f"\nOld adapters {where}\n",
        "| task | exemplars | s | / task 2 | CPU s | / task 2 | peak MiB | M parameters | forward ms | / base | "
        "adapter kB | merged kB | state kB |",
        "|" + "---|" * 13,
    ]
    for task, own in ((int(task), own) for task, own in found["measured"].items()):
        times = (
            f"{around(each, task):.2f} | {around(each, task) / around(each, 2):.3f}" for each in (wall, processor)
        )
        sizes = (f"{own[f'{name}_bytes'] / 1000:.0f}" for name in ("adapter", "merged", "state"))
        lines.append(
            f"| {task} | {around(exemplars, task):.0f} | {' | '.join(times)} | {own['peak_mebibytes']:.0f} | "
            f"{own['parameters'] / 1e6:.2f} | {1000 * own['forward_seconds']:.1f} | {own['forward_over_base']:.3f} | "
            f"{' | '.join(sizes)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="Where old adapters are kept.")
    parser.add_argument("--tasks", type=int, default=100, help="How many.")
    parser.add_argument("--images", type=int, default=20, help="Training images of each class.")
    parser.add_argument("--epochs", type=int, default=2, help="Of stage 1, for each task.")
    parser.add_argument("--mixed_precision", default="no", help="As Accelerate names it; 'bf16' keeps more kernels.")
    parser.add_argument("--device", default="cpu", help="As PyTorch names it.")
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with TemporaryDirectory() as folder:
            print(json.dumps(run(args.child, args, folder)))
        return
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU"
    print(
        f"PyTorch {torch.__version__}, {where}, {torch.get_num_threads()} threads; DeiT-Tiny, {IMAGE_SIZE} px, "
        f"{args.images} images x {args.epochs} epochs a task, memory_size={class_counts(args)[1]}; forward of {BATCH} "
        "images",
        flush=True,
    )
    for mode in args.modes:
        command = [sys.executable, *sys.argv, "--child", mode]
        environment = {"MALLOC_MMAP_THRESHOLD_": "1048576", **os.environ}
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
        print(report(mode, json.loads(output.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()

"""Whether training waits for images, and how much memory a data set larger than memory takes.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --model_name_or_path facebook/deit-tiny-patch16-224 --device cuda

Waiting is the time until the loader has handed over a batch; a step is all else: moving it to the device,
augmentation, forward, backward and the update of the adapter. Images in memory and in a cache file take turns, batch
by batch. "Not read before" is the pass before those, over a file that the system was asked to forget; how much of it
came from the disk is printed. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import get_peft_model
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

import dynammo_peft as dp
from dynammo_peft.data import BatchTransform, LabelledImages, data_loader


SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
CLASSES = [f"class {label}" for label in range(8)]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
MEGABYTE = 1e6


def drawn(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Noise as JPEG files, made as they are asked for."""
    rng = np.random.default_rng(seed)
    for row in range(count):
        file = BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "jpeg")
        yield {"image": {"bytes": file.getvalue(), "path": None}, "label": row % len(CLASSES)}


def make_scenario(count: int, size: int, cache_dir: str | None) -> dp.ClassIncrementalScenario:
    """One task of drawn images, streamed into a cache or kept in memory."""
    parts = [
        datasets.IterableDataset.from_generator(drawn, features=FEATURES, gen_kwargs={"count": rows, "seed": seed})
        for rows, seed in ((count, 0), (len(CLASSES), 1))
    ]
    if cache_dir is None:
        parts = [datasets.Dataset.from_list(list(part), features=FEATURES) for part in parts]
    processor = ViTImageProcessorPil(size={"height": size, "width": size})
    return dp.ClassIncrementalScenario(
        *parts, processor, classes_per_task=len(CLASSES), cache_dir=cache_dir, progress=False
    )


def memory(field: str) -> float:
    """A field of Linux's account of this process's memory, in MB; `VmHWM` is the most it has had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024 / MEGABYTE


def read_from_disk() -> float:
    """What this process has had read from a disk so far, in MB."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes:")).split()[1]) / MEGABYTE


def measure_memory(count: int, size: int) -> None:
    """Prints by how many MB decoding a stream raises this process's memory; to be run in a process of its own.

    Not by `getrusage`, whose peak begins with that of the process that started this one.
    """
    with tempfile.TemporaryDirectory(prefix="input_pipeline") as cache_dir:
        # What the first image loads is not the images' doing.
        make_scenario(64, size, os.path.join(cache_dir, "first"))
        # The peak starts anew: that of the imports may be higher than what is left of them.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before, anonymous, mapped = memory("VmRSS"), memory("RssAnon"), memory("RssFile")
        start = time.perf_counter()
        images = make_scenario(count, size, cache_dir)[0].train
        seconds, decoded = time.perf_counter() - start, memory("VmHWM") - before
        for _ in data_loader(images, 32):
            pass
        row = {
            "images": count * 3 * size * size / MEGABYTE,
            "images_per_second": count / seconds,
            "decoded": decoded,
            "anonymous": memory("RssAnon") - anonymous,
            "mapped": memory("RssFile") - mapped,
        }
        print(json.dumps(row))


class Training:
    """Steps of training one adapter and its head.

    Args:
        model_name_or_path (`str`): The backbone.
        size (`int`): Height and width of images, in pixels.
        device (`str`): Where to compute.
        transform (`BatchTransform`): Augments and normalises.
    """

    def __init__(self, model_name_or_path: str, size: int, device: str, transform: BatchTransform) -> None:
        base = AutoModelForImageClassification.from_pretrained(model_name_or_path)
        config = dp.DynammoConfig(classes=CLASSES, image_size=[size, size])
        self.model = get_peft_model(base, config).to(device).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-3)
        self.device, self.transform = device, transform

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One update."""
        pixel_values = self.transform(images.to(self.device), augment=True)
        with self.model.head_output("scores"):
            loss = F.cross_entropy(self.model(pixel_values=pixel_values).logits, labels.to(self.device))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def waiting(training: Training, loaders: dict[str, Any], steps: int) -> dict[str, tuple[float, float]]:
    """Seconds of waiting and of the steps for each loader, which take turns."""
    iterators = {name: iter(loader) for name, loader in loaders.items()}
    seconds = {name: [0.0, 0.0] for name in loaders}
    for step in range(steps):
        for name, iterator in iterators.items():
            start = time.perf_counter()
            batch = next(iterator)
            read = time.perf_counter()
            training.step(*batch)
            done = time.perf_counter()
            # The first step warms up; the first batch counts where it starts processes, but no pass is that short.
            if step:
                seconds[name][0] += read - start
                seconds[name][1] += done - read
    return {name: (wait, step) for name, (wait, step) in seconds.items()}


def forget(folder: str) -> None:
    """Asks the system to drop what it holds of the files of a folder, which no process has mapped yet."""
    for path in Path(folder).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_waiting(args: argparse.Namespace) -> None:
    """Prints the share of waiting for images in memory and in a file."""
    count = (args.steps + 1) * args.batch_size
    with tempfile.TemporaryDirectory(prefix="input_pipeline", dir=args.cache_dir) as cache_dir:
        make_scenario(count, args.image_size, cache_dir)
        forget(cache_dir)
        in_memory, mapped = (make_scenario(count, args.image_size, where) for where in (None, cache_dir))
        training = Training(args.model_name_or_path, args.image_size, args.device, mapped.transform)

        def loader(images: LabelledImages, workers: int = 0) -> Any:
            return data_loader(images, args.batch_size, num_workers=workers, shuffle=True, drop_last=True)

        memory, file = in_memory[0].train, mapped[0].train
        on_disk = read_from_disk()
        first = waiting(training, {"in a file, not read before": loader(file)}, args.steps)
        on_disk = read_from_disk() - on_disk
        again = {"in memory": loader(memory), "in a file": loader(file), "in a file, one worker": loader(file, 1)}
        print(f"{args.model_name_or_path}, {args.image_size} px, batches of {args.batch_size}, {args.device}")
        print("| images | waiting, ms a step | step, ms | waiting / step |\n|---|---|---|---|")
        for name, (wait, step) in {**waiting(training, again, args.steps), **first}.items():
            each = 1000 / (args.steps - 1)
            print(f"| {name} | {each * wait:.2f} | {each * step:.0f} | {100 * wait / step:.2f} % |")
        print(
            f"Not read before: {on_disk:.0f} of {count * 3 * args.image_size**2 / MEGABYTE:.0f} MB came from the disk."
        )


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(SHARED / "weights" / "deit_tiny_patch16_224"))
    parser.add_argument("--image_size", type=int, default=112)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache_dir", help="Folder on the disk to measure; one for temporary files if unset.")
    parser.add_argument("--memory_images", type=int, default=4000, help="Images of 224 px that are streamed.")
    parser.add_argument("--memory_only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_only:
        measure_memory(args.memory_images, 224)
        return
    measure_waiting(args)
    own = [sys.executable, __file__, "--memory_only", "--memory_images", str(args.memory_images)]
    row = json.loads(subprocess.run(own, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    print(
        f"\n{args.memory_images} streamed images of 224 px, {row['images']:.0f} MB decoded, at "
        f"{row['images_per_second']:.0f} a second: the process's peak memory grows by {row['decoded']:.1f} MB. Once "
        f"all were read it has {row['anonymous']:.0f} MB more of its own, and {row['mapped']:.0f} MB of the file, "
        "which the system can take back."
    )


if __name__ == "__main__":
    main()

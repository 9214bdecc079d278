"""What merging costs in accuracy, and what heads and merge functions bring back: one run, one budget.

    python benchmarks/merging.py                                   # everything; goes on where it was stopped
    python benchmarks/merging.py --backbones deit_tiny --sequences blood_cells --seeds 0 1 --rows acl paper default
    python benchmarks/merging.py --data_dir IMAGES --seeds 0       # images of yours: IMAGES/{train,test}/<class>/
    python benchmarks/merging.py --report --head_init random       # the tables of docs/measurements.md, of all --seeds

Rows of a backbone, sequence and seed start from the same adapters: stage 1 is trained once for all methods that have
the same images and the same loss in it, and kept under `docs/results/adapters` (not in version control; delete the
folder after a change of the training code). Each result is one line of `docs/results/merging.jsonl`, to which several
processes may add, each with seeds of its own; the table has means and deviations over seeds, each with a class order
of its own. With `--validation_fraction 0.25`, a quarter of the training images takes the place of the test images,
which are not read then; such results go to another file.
"""

from __future__ import annotations

import argparse
import json
import time
import typing
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal, Optional

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoImageProcessor, AutoModelForImageClassification

import dynammo_peft as dp
from dynammo_peft.methods.adapters import HeadInit
from dynammo_peft.tuner import TASK_ADAPTERS, default_adapter
from dynammo_peft.tuner.architectures import TaskAdapter
from merging_tables import compared, details, of_any_precision, overview
from shared_learner import SharedLearner


SHARED = Path(__file__).resolve().parents[1].parent / "shared"
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
IMAGE_SIZE = 112
Precision = Literal["bf16", "fp32"]

BACKBONES = {"deit_tiny": "deit_tiny_patch16_224", "resnet18": "resnet18_stages1-3"}
# Trains 1.3 times as fast in bf16 on a CPU; `SDPBackend.MATH`, for attention, 1.2 times.
MEMORY_FORMAT = {("resnet18", "cpu"): torch.channels_last}
# float32 is float32 on a GPU too, whose convolutions would take TF32 otherwise.
torch.backends.cudnn.allow_tf32 = False


@dataclass(frozen=True)
class Sequence:
    """A sequence of tasks: data sets one after the other, each cut into tasks of its own.

    Args:
        folders (`tuple[str, ...]`): Of the data sets, in `shared/data` or anywhere.
        classes_per_task (`tuple[int, ...]`): Of each data set; as the last one says until its classes end.
        memory_size (`int`): Exemplars of all classes together.
        options (`dict[str, Any]`): Of the scenario.
    """

    folders: tuple[str, ...]
    classes_per_task: tuple[int, ...]
    memory_size: int
    options: dict[str, Any] = field(default_factory=dict)


SEQUENCES = {
    "blood_cells": Sequence(("blood_cells",), (2,), 40, {"vertical_flip": True}),
    "mednist_blood_cells": Sequence(("mednist", "blood_cells"), (2,), 70),
    "tiny_imagenet_40": Sequence(("tiny_imagenet_40",), (4,), 400),
}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        method (`str`): A key of `METHODS`.
        arguments (`dict[str, Any]`): Of the method.
        config (`dict[str, Any]`): Of the adapters' configuration.
        adapter (`Optional[Literal["conv", "lora"]]`): The kind of task adapters; the backbone's default if `None`.
        at_once (`bool`): Whether all classes are learned as one task.
        forward_passes (`str`): At inference, with T tasks.
    """

    method: str = "dynammo"
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    adapter: Optional[TaskAdapter] = None
    at_once: bool = False
    forward_passes: str = "1"


# ACL and the paper as they were published, whatever `--head_init` says.
AS_PUBLISHED = {"head_init": "random"}
# The paper's recipe on the adapters of ACL and of what is compared below: its own, wider ones would be another budget.
PAPER_CONFIG = {"feature_modules": [], "scoring": "min_others"}
PAPER_ARGUMENTS = {"heads": "exemplars", "feature_views": 1, "exemplars_as_others": True, "merge": "linear"}
PAPER_ARGUMENTS |= AS_PUBLISHED
# The mean of all adapters, instead of half way to it.
MEAN = {"merge_options": {"first_share": 0.0}}
CHOICES: dict[str, Row] = {
    "default": Row(),
    "exemplar_free": Row(arguments={"memory_size": 0}),
    "mean": Row(arguments=MEAN),
    "exemplar_free, mean": Row(arguments={"memory_size": 0, **MEAN}),
    "first_session": Row(arguments={"first_session": True}),
}
BOUNDS: dict[str, Row] = {"joint": Row("joint", at_once=True), "joint, heads=lda": Row(at_once=True)}
MERGES: dict[str, Row] = {
    "merge=ties": Row(arguments={"merge": "ties", "merge_options": {"density": 0.5}}),
    "merge=dare_linear": Row(arguments={"merge": "dare_linear", "merge_options": {"density": 0.5}}),
    "merge=dare_ties": Row(arguments={"merge": "dare_ties", "merge_options": {"density": 0.5}}),
    "merge=magnitude_prune": Row(arguments={"merge": "magnitude_prune", "merge_options": {"density": 0.5}}),
    "merge=exponential_moving_average": Row(
        arguments={"merge": "exponential_moving_average", "merge_options": {"decay": 0.5}}
    ),
    "merge=fisher": Row(arguments={"merge": "fisher"}),
}
# Merges that only LoRA has, of updates, or layers of which are linear.
OF_LORA: dict[str, Row] = {f"merge={name}": Row(arguments={"merge": name}) for name in ("cat", "regmean")}
# Heads, merges and the training of adapters, each against the mean of convolutions.
COMPARED: dict[str, Row] = {
    "heads=ridge": Row(arguments={"heads": "ridge", **MEAN}),
    "heads=gaussians": Row(arguments={"heads": "gaussians", **MEAN}),
    "heads=exemplars": Row(arguments={"heads": "exemplars", **MEAN}),
    "heads=lda, last layer": Row(arguments=MEAN, config={"feature_modules": []}),
    "heads=gaussians, last layer": Row(arguments={"heads": "gaussians", **MEAN}, config={"feature_modules": []}),
    "heads=exemplars, last layer": Row(arguments={"heads": "exemplars", **MEAN}, config={"feature_modules": []}),
    **MERGES,
    "learned_weights=task": Row(arguments={"learned_weights": "task"}),
    "learned_weights=layer": Row(arguments={"learned_weights": "layer"}),
    "learned_weights=channel": Row(arguments={"learned_weights": "channel"}),
    "learned_weights=layer, entropy": Row(arguments={"learned_weights": "layer", "weights_objective": "entropy"}),
    "exemplars_as_others": Row(arguments={"exemplars_as_others": True, **MEAN}),
    "feature_distillation": Row(arguments={"feature_distillation": 10.0, **MEAN}),
    "exemplar_free, feature_distillation": Row(arguments={"memory_size": 0, "feature_distillation": 10.0, **MEAN}),
    "recalibrate": Row(arguments={"recalibrate": True, **MEAN}),
}


def _named(adapter: TaskAdapter, row: str) -> str:
    """The name of a row with adapters of one kind for all backbones; `default` needs no more."""
    return f"adapter={adapter}" + ("" if row == "default" else f", {row}")


def _on(adapter: TaskAdapter, rows: dict[str, Row]) -> dict[str, Row]:
    """The same rows with adapters of one kind for all backbones."""
    return {_named(adapter, name): replace(row, adapter=adapter) for name, row in rows.items()}


ROWS: dict[str, Row] = {
    "acl": Row("acl", AS_PUBLISHED, adapter="conv", forward_passes="T"),
    "paper": Row(arguments=PAPER_ARGUMENTS, config=PAPER_CONFIG, adapter="conv"),
    **CHOICES,
    **BOUNDS,
    **_on("conv", {**CHOICES, **BOUNDS}),
    **_on("lora", {**CHOICES, "acl": Row("acl", AS_PUBLISHED, forward_passes="T"), **MERGES, **OF_LORA}),
    "adapter=lora, exemplar_free, merge=cat": Row(arguments={"memory_size": 0, "merge": "cat"}, adapter="lora"),
    "adapter=lora, last layer": Row(config={"feature_modules": []}, adapter="lora"),
    **{name: replace(row, adapter="conv") for name, row in COMPARED.items()},
}
CORE = ("acl", "paper", "default", "exemplar_free", "first_session", "joint")
# Of the table of all backbones and sequences.
TABLE = ("acl", "paper", "default", "exemplar_free", "mean", "exemplar_free, mean")
TABLE += ("first_session", "joint", "joint, heads=lda")


def compared_on(adapter: TaskAdapter) -> tuple[list[str], list[str]]:
    """Rows that are compared on adapters of one kind, the mean of all among them, and the names that it has."""
    means = [_named(adapter, "mean"), "mean"]
    if adapter == "conv":
        return ["acl", *means, *COMPARED], means
    return [_named(adapter, "acl"), *means, *(_named(adapter, name) for name in (*OF_LORA, *MERGES))], means


def load_train_and_test(sequence: Sequence) -> tuple[datasets.Dataset, datasets.Dataset, list[list[str]]]:
    """Images of all the sequence's data sets with labels of their own, and the class names of each."""
    parts = [dp.load_image_dataset("imagefolder", data_dir=str(SHARED / "data" / name)) for name in sequence.folders]
    names = [train.features["label"].names for train, _ in parts]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(chain(*names)))})
    joined = []
    for split in (0, 1):
        rows: dict[str, list[Any]] = {"image": [], "label": []}
        for index, part in enumerate(parts):
            first = sum(len(group) for group in names[:index])
            files = part[split].cast_column("image", datasets.Image(decode=False))
            rows["image"] += files["image"]
            rows["label"] += [first + label for label in files["label"]]
        joined.append(datasets.Dataset.from_dict(rows, features=features))
    return joined[0], joined[1], names


def class_groups(names: list[list[str]], classes_per_task: tuple[int, ...], seed: int) -> list[list[str]]:
    """The tasks: the classes of each data set in an order drawn by `seed`, the data sets one after the other."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for part in names:
        order = [part[index] for index in torch.randperm(len(part), generator=generator).tolist()]
        groups += _cut(order, classes_per_task)
    return groups


def _cut(classes: list[str], sizes: tuple[int, ...]) -> list[list[str]]:
    """Classes in tasks of these sizes, the last of which is that of all that follow."""
    rest, endless = iter(classes), chain(sizes, repeat(sizes[-1]))
    return list(iter(lambda: list(islice(rest, next(endless))), []))


def run_seed(
    backbone: str,
    name: str,
    seed: int,
    epochs: Optional[int],
    rows: list[str],
    validation_fraction: float,
    out: Path,
    precision: Precision = "bf16",
    head_init: HeadInit = "zeros",
) -> None:
    """Runs rows that have no result yet on one class order, and appends their results to `out`."""
    sequence = SEQUENCES[name]
    run = {"backbone": backbone, "sequence": name, "seed": seed, "epochs": epochs, "precision": precision}
    wanted = {row: {**run, "head_init": head_init_of(row, head_init), "row": row} for row in rows}
    known = [_identity(line) for line in read(out)]
    missing = {row: where for row, where in wanted.items() if where not in known}
    if not missing:
        return
    path = SHARED / "weights" / BACKBONES[backbone]
    processor = dp.resized_image_processor(AutoImageProcessor.from_pretrained(path), IMAGE_SIZE)
    train, test, names = load_train_and_test(sequence)
    groups = class_groups(names, sequence.classes_per_task, seed)
    scenario, at_once = (
        dp.ClassIncrementalScenario(
            train,
            None if validation_fraction else test,
            processor,
            groups=tasks,
            seed=seed,
            validation_fraction=validation_fraction,
            progress=False,
            **sequence.options,
        )
        for tasks in (groups, [list(chain(*groups))])
    )
    part = f"validation_{validation_fraction}" if validation_fraction else "test"
    features: dict[tuple[str, str], Tensor] = {}
    for row, where in missing.items():
        settings = ROWS[row]
        method_cls = dp.METHODS[settings.method]
        arguments = {"memory_size": sequence.memory_size, "adapter_epochs": epochs, "seed": seed}
        arguments |= {**settings.arguments, "head_init": where["head_init"]}
        model = AutoModelForImageClassification.from_pretrained(path)
        usual = default_adapter(model)
        if plain := _plain(row, usual):
            print(f"{row}, {backbone}: is {plain}, left out", flush=True)
            continue
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
        device = accelerator.device.type
        memory_format = MEMORY_FORMAT.get((backbone, device), torch.preserve_format)
        method = method_cls(
            model.to(memory_format=memory_format),
            method_cls.arguments_cls(**arguments),
            TASK_ADAPTERS[settings.adapter or usual](**settings.config),
        )
        start = time.perf_counter()
        trained = f"{backbone}-{name}-seed_{seed}-epochs_{epochs or 'default'}-{precision}-{where['head_init']}"
        folder = out.parent / "adapters" / part / trained
        if settings.at_once:
            folder /= "at_once"
        learner = SharedLearner(method, accelerator, folder, features)
        measures = learner.fit(at_once if settings.at_once else scenario).metrics()
        line = {
            **where,
            "last": round(100 * measures["last_accuracy"], 2),
            "average": round(100 * measures["average_incremental_accuracy"], 2),
            "forgetting": round(100 * measures.get("forgetting", 0.0), 2),
            "seconds": round(time.perf_counter() - start, 1),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
        }
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def head_init_of(row: str, asked: HeadInit) -> HeadInit:
    """How heads start in stage 1 of a row: as it says, or as asked for."""
    return ROWS[row].arguments.get("head_init", asked) if row in ROWS else asked


def _plain(row: str, usual: TaskAdapter) -> Optional[str]:
    """The row that is the same as this one where these adapters are the backbone's default, if there is one."""
    name = row.removeprefix(f"adapter={usual}").removeprefix(", ") or "default"
    return name if name != row and name in ROWS and ROWS[name].adapter is None else None


def _identity(line: dict[str, Any]) -> dict[str, Any]:
    keys = ("backbone", "sequence", "seed", "epochs", "precision", "head_init", "row")
    return {key: line[key] for key in keys}


def read(path: Path) -> list[dict[str, Any]]:
    """Results so far; those that name no precision are of bf16, those that name no start of heads of a random one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [{"precision": "bf16", "head_init": "random", **json.loads(line)} for line in lines]


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--sequences", nargs="+", choices=SEQUENCES, default=list(SEQUENCES))
    parser.add_argument("--data_dir", type=Path, help="Instead of the sequences: a folder with images of yours.")
    parser.add_argument(
        "--classes_per_task",
        nargs="+",
        type=int,
        default=[2],
        help="Of data_dir; several numbers are of one task each, and the last one of all that follow.",
    )
    parser.add_argument("--memory_size", type=int, default=50, help="Exemplars of data_dir, of all classes together.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--core", action="store_true", help=f"The rows {', '.join(CORE)} only.")
    parser.add_argument(
        "--epochs", type=int, default=5, help="Of stage 1, for each task; 0: as many as the package takes by default."
    )
    parser.add_argument(
        "--precision",
        choices=[*typing.get_args(Precision), "any"],
        default="bf16",
        help="Of autocast, and of what tables show but those of heads and merges, which are of all. On a CPU without "
        "AVX-512, bf16 takes ten times as long as fp32. 'any', for --report: rows beside each other that ran in "
        "either.",
    )
    parser.add_argument(
        "--head_init",
        choices=typing.get_args(HeadInit),
        default="zeros",
        help="How heads start in stage 1; at random for ACL and the paper in any case. docs/measurements.md says "
        "which of its tables are of 'random'.",
    )
    parser.add_argument("--validation_fraction", type=float, default=0.0)
    parser.add_argument("--report", action="store_true", help="Only print the tables of the results so far.")
    args = parser.parse_args()
    if min(args.classes_per_task) < 1:
        parser.error("--classes_per_task must be positive.")
    if args.precision == "any" and not args.report:
        parser.error("--precision any is for --report; run rows in bf16 or fp32.")
    args.epochs = args.epochs or None
    if args.data_dir is not None:
        folder, classes, memory = args.data_dir.resolve(), tuple(args.classes_per_task), args.memory_size
        # Neither results nor adapters of other tasks are to be taken for these.
        name = f"{folder.name}-classes_{'_'.join(map(str, classes))}-memory_{memory}"
        SEQUENCES[name] = Sequence((str(folder),), classes, memory)
        args.sequences = [name]
    out = RESULTS / ("merging_validation.jsonl" if args.validation_fraction else "merging.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not args.report:
        for sequence in args.sequences:
            for backbone in args.backbones:
                for seed in args.seeds:
                    rows = list(CORE) if args.core else args.rows
                    with sdpa_kernel(SDPBackend.MATH):
                        fraction = args.validation_fraction
                        run_seed(
                            backbone, sequence, seed, args.epochs, rows, fraction, out, args.precision, args.head_init
                        )
    lines = [line for line in read(out) if line["seed"] in args.seeds and line["epochs"] == args.epochs]
    lines = [line for line in lines if line["head_init"] == head_init_of(line["row"], args.head_init)]
    at_once = [row for row, settings in ROWS.items() if settings.at_once]
    of_precision = [line for line in lines if line["precision"] == args.precision]
    if args.precision == "any":
        of_precision = of_any_precision(lines)
    print(overview(of_precision, TABLE, at_once))
    print(details(of_precision, list(ROWS), at_once))
    for adapter in ("conv", "lora"):
        rows, means = compared_on(adapter)
        own = {line["backbone"] for line in lines if ROWS.get(line["row"], Row()).adapter == adapter}
        print(f"\nHeads and merges, adapter={adapter}")
        print(compared([line for line in lines if line["backbone"] in own], rows, means))


if __name__ == "__main__":
    main()

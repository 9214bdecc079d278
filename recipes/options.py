"""The recipe's options: what there is to choose, read from a YAML file and the command line."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml
from accelerate.tracking import get_available_trackers
from backbone import ModelArguments
from going_on import learned_options
from publishing import HubArguments
from transformers import HfArgumentParser

from dynammo_peft import METHODS, Checkpoints
from dynammo_peft.folders import check_replaceable
from dynammo_peft.methods.two_stage import TwoStageMethod
from dynammo_peft.training.checkpoint import LATEST
from dynammo_peft.tuner.head_config import check_choice


@dataclass
class RunArguments(HubArguments):
    """What to run, and where results go."""

    method: str = field(default="dynammo", metadata={"help": f"One of {', '.join(METHODS)}."})
    output_dir: str = field(default="outputs/run", metadata={"help": "Folder for the model and results.json."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace output_dir if it is there."})
    save_task_adapters: bool = field(default=False, metadata={"help": "Save every task's adapter too."})
    save_learning_state: bool = field(
        default=False,
        metadata={
            "help": "Save what it takes to learn further classes later (load_learning_state): every task's adapter, "
            "class statistics and row numbers of exemplars, no image."
        },
    )
    eval_batch_size: int = field(default=64, metadata={"help": "Test images a step and process."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that read training images ahead; pays where the disk is slow."}
    )
    save_steps: int = field(
        default=500,
        metadata={"help": "Training steps between checkpoints, in OUTPUT_DIR-checkpoints; tasks end with one too."},
    )
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    resume_from_checkpoint: Optional[str] = field(
        default=None,
        metadata={"help": "'latest' (begins if there is none yet), or the path of a checkpoint, to go on from."},
    )
    ddp_timeout: int = field(
        default=1800, metadata={"help": "Seconds after which a process gives up waiting for the others."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches whose gradients are added up."})
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers of Accelerate, as 'tensorboard' or 'wandb'."}
    )


@dataclass
class DataArguments:
    """The data set and its tasks."""

    dataset_name: str = field(
        default="imagefolder", metadata={"help": "'imagefolder' with data_dir, 'digits', or a data set on the Hub."}
    )
    dataset_config_name: Optional[str] = field(default=None, metadata={"help": "Configuration of the data set."})
    data_dir: Optional[str] = field(
        default=None, metadata={"help": "For 'imagefolder': folder with train/<class>/ and test/<class>/."}
    )
    train_split: str = field(default="train", metadata={"help": "Name of the split with training images."})
    test_split: Optional[str] = field(default="test", metadata={"help": "Name of the split with test images."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels, a ClassLabel."})
    classes_per_task: Optional[int] = field(default=None, metadata={"help": "Classes in each task."})
    groups: Optional[str] = field(
        default=None,
        metadata={
            "help": "Instead of classes_per_task: lists of the tasks' class names, as JSON; classes may come back."
        },
    )
    class_order_seed: Optional[int] = field(
        default=None, metadata={"help": "Seed of the class order; the labels' own order if unset."}
    )
    domain_column: Optional[str] = field(
        default=None, metadata={"help": "Column that says of which domain (hospital, camera) an image is."}
    )
    domains: Optional[str] = field(
        default=None,
        metadata={"help": "Domain of each task's images: a list with a value, or a list of values, a task, as JSON."},
    )
    validation_fraction: float = field(
        default=0.0, metadata={"help": "Hold out this share of the training images and measure on them instead."}
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Mirror training images left to right at random."})
    vertical_flip: bool = field(default=False, metadata={"help": "Mirror training images top to bottom at random."})
    crop_padding: float = field(default=0.125, metadata={"help": "Largest random shift, as a share of the image."})
    exemplars_in_data_set: bool = field(
        default=False,
        metadata={
            "help": "With load_learning_state: the data set is the one that was learned from, and the rows that were "
            "exemplars are exemplars again."
        },
    )
    cache_dir: Optional[str] = field(
        default=None, metadata={"help": "Keep decoded images in this folder instead of memory; holds your images."}
    )
    streaming: bool = field(default=False, metadata={"help": "Stream the data set into cache_dir; no download."})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the lines of the description as they are."""


def parse_arguments(
    argv: list[str], description: Optional[str] = None
) -> tuple[RunArguments, ModelArguments, DataArguments, Any]:
    """Options from an optional YAML file, the first argument, and then from the command line, which wins.

    Args:
        argv (`list[str]`): The command line, without the program's name.
        description (`Optional[str]`): What `--help` begins with.

    Returns:
        `tuple`: What to run, the model, the data and the method's own options.

    Raises:
        ValueError: If the file holds an option that does not exist, or the method does not.
    """
    options: dict[str, Any] = {}
    if argv and argv[0].endswith((".yaml", ".yml")):
        options = _read_options(Path(argv[0]))
        argv = argv[1:]
    name, learned = _method_and_options(options, argv)
    groups = [RunArguments, ModelArguments, DataArguments, METHODS[name].arguments_cls]
    parser = _parser(groups, description=description, formatter_class=HelpFormatter)
    known = {action.dest: action for action in parser._actions}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"Option {option!r} does not exist for method {name!r}; see --help for those that do.")
        options[option] = _as_on_the_command_line(known[option], value)
    parser.set_defaults(**{**learned, **options, "method": name})
    parsed = parser.parse_args_into_dataclasses(argv)
    run_args, model_args, data_args, _ = parsed
    # Folders beside it are named after it, and shells complete names with a slash.
    run_args.output_dir = os.path.normpath(run_args.output_dir)
    model_args.config_overrides = _structured("config_overrides", model_args.config_overrides)
    data_args.groups = _structured("groups", data_args.groups)
    data_args.domains = _structured("domains", data_args.domains)
    return parsed


def _parser(groups: list[Any], **options: Any) -> HfArgumentParser:
    parser = HfArgumentParser(groups, allow_abbrev=False, **options)
    # Of several layers none is one choice too.
    next(action for action in parser._actions if action.dest == "feature_modules").nargs = "*"
    return parser


def _method_and_options(options: dict[str, Any], argv: list[str]) -> tuple[str, dict[str, Any]]:
    """The method, which has options of its own, and those that it has learned with where learning goes on."""
    parser = _parser([RunArguments, ModelArguments], add_help=False)
    names = ("method", "load_learning_state", "revision")
    parser.set_defaults(**{"method": None, **{name: options[name] for name in names if name in options}})
    run_args, model_args, _ = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    name, learned = run_args.method, {}
    if model_args.load_learning_state is not None:
        of_before, learned = learned_options(model_args)
        if name not in (None, of_before):
            raise ValueError(f"method={name!r} cannot go on with what method={of_before!r} has learned; leave it out.")
        name = of_before
    name = name or RunArguments.method
    if name not in METHODS:
        raise ValueError(f"method={name!r} does not exist; choose one of {', '.join(METHODS)}.")
    return name, learned


def _read_options(path: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds no options; write one a line, as in 'memory_size: 40'.")
    return options


def _as_on_the_command_line(action: argparse.Action, value: Any) -> Any:
    """A value of the YAML file as the command line would have it, which argparse takes unseen.

    Raises:
        ValueError: If it is none of the option's choices, or a list where there can be no more than one.
    """
    several = action.nargs in ("*", "+")
    if several and isinstance(value, str):
        value = [value]
    # Lists and mappings that the command line has as JSON are texts there.
    if isinstance(value, list) and not several and action.type is not str:
        raise ValueError(f"{action.dest}={value} must be one value, not a list.")
    for one in value if isinstance(value, list) else [value]:
        if action.choices is not None and one is not None:
            check_choice(action.dest, one, tuple(action.choices))
    return value


def _structured(option: str, value: Any) -> Any:
    """A list or mapping: as it is from YAML, as JSON from the command line."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f'--{option} is no JSON ({error}); write it as in \'[["a", "b"], ["c"]]\'.') from error


def check_run(
    args: RunArguments, model_args: ModelArguments, data_args: DataArguments, checkpoints: Checkpoints
) -> None:
    """Raises a `ValueError` if the run would take the place of another, or has options that are of no use."""
    # With 'latest' a run begins anew where there is no checkpoint.
    which = args.resume_from_checkpoint
    anew = which is None or (which == LATEST and not checkpoints.store.paths())
    learned = model_args.load_learning_state
    if learned is not None and os.path.realpath(learned) == os.path.realpath(args.output_dir):
        raise ValueError(
            f"output_dir={args.output_dir!r} holds what load_learning_state goes on with; choose another, so that "
            "nothing is lost if the run is interrupted."
        )
    check_replaceable(args.output_dir)
    if os.path.exists(args.output_dir) and os.listdir(args.output_dir) and anew and not args.overwrite_output_dir:
        raise ValueError(f"output_dir={args.output_dir!r} is not empty; choose another or set overwrite_output_dir.")
    for option in ("eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, option) < 1:
            raise ValueError(f"{option}={getattr(args, option)} must be at least 1.")
    if data_args.exemplars_in_data_set and model_args.load_learning_state is None:
        raise ValueError("exemplars_in_data_set is for going on to learn; give load_learning_state.")
    if args.save_learning_state and not issubclass(METHODS[args.method], TwoStageMethod):
        raise ValueError(f"method={args.method!r} does not go on learning; leave save_learning_state out.")
    for tracker in args.report_to:
        # Accelerate would leave out a tracker that is not installed without a word.
        if tracker not in {known.value for known in get_available_trackers()}:
            raise ValueError(f"report_to={tracker!r} is no tracker of Accelerate, or its package is not installed.")

"""The recipe's backbone and the task adapters that it gets."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Optional, get_args

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.utils.hub import resolve_revision

from dynammo_peft import DynammoConfig, DynammoLoraConfig
from dynammo_peft.data import resized_image_processor
from dynammo_peft.tuner import HeadConfig, default_adapter
from dynammo_peft.tuner.architectures import TaskAdapter
from dynammo_peft.tuner.flips import Flip
from dynammo_peft.tuner.head_config import Preset, Scoring


@dataclass
class ModelArguments:
    """The backbone and its adapters."""

    model_name_or_path: Optional[str] = field(
        default=None, metadata={"help": "Pretrained image classifier, on the Hub or in a folder."}
    )
    load_learning_state: Optional[str] = field(
        default=None,
        metadata={
            "help": "Instead of a model: learn further classes with what a run has saved by save_learning_state, or "
            "what was published with its learning state; a folder, or a repository on the Hub. The method and its "
            "options are as they were unless they are given."
        },
    )
    revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    model_type: Optional[str] = field(
        default=None, metadata={"help": "Instead of a pretrained one: a new model of this type, as 'convnext'."}
    )
    config_overrides: Optional[str] = field(
        default=None, metadata={"help": "Settings of the new model's configuration: a mapping, as JSON."}
    )
    image_size: Optional[int] = field(
        default=None, metadata={"help": "Height and width to resize images to, in pixels; the processor's if unset."}
    )
    adapter: Optional[TaskAdapter] = field(
        default=None,
        metadata={
            "help": "Task adapters: 'conv', convolutions in front of blocks (DynaMMo's), or 'lora', LoRA inside them. "
            "If unset, LoRA for plain transformers, unless preset='paper' or reduction_factor asks for convolutions."
        },
    )
    lora_rank: Optional[int] = field(default=None, metadata={"help": "Rank of LoRA; 8 if unset."})
    lora_alpha: Optional[int] = field(
        default=None, metadata={"help": "LoRA is multiplied by lora_alpha / lora_rank; 8 if unset."}
    )
    preset: Preset = field(default="default", metadata={"help": "Adapters as in the 'paper', or the 'default'."})
    target_modules: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Blocks to put convolutions in front of, or layers that get LoRA; they follow from the model if "
            "unset."
        },
    )
    feature_modules: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Modules whose pooled outputs the heads read too; they follow from the method if unset."},
    )
    reduction_factor: Optional[int] = field(
        default=None, metadata={"help": "Channels over bottleneck channels; chosen by cost if unset."}
    )
    scoring: Optional[Scoring] = field(
        default=None,
        metadata={
            "help": "How the heads of tasks are compared: each class with its head's \"others\" ('log_odds'), or "
            "first the heads by how little they say \"others\" ('min_others', the paper's). 'log_odds' if unset, "
            "unless preset='paper'."
        },
    )
    flips: Optional[list[str]] = field(
        default=None,
        metadata={
            "choices": get_args(Flip),
            "help": "Mirror images whose features are averaged with an image's own when it is classified: "
            "'horizontal', 'vertical' or both; each costs a forward pass.",
        },
    )


def load_model(args: ModelArguments) -> tuple[transformers.PreTrainedModel, Any]:
    """The image classifier and its image processor, from the Hub or a folder, or new."""
    if (args.model_name_or_path is None) == (args.model_type is None):
        raise ValueError(
            "Set either model_name_or_path (a pretrained model), model_type (a new one) or load_learning_state (one "
            "that has learned some classes)."
        )
    if args.config_overrides is not None and args.model_type is None:
        raise ValueError("config_overrides is for a new model (model_type); leave it out with model_name_or_path.")
    if args.model_type is not None:
        config = AutoConfig.for_model(args.model_type, **(args.config_overrides or {}))
        size = args.image_size or getattr(config, "image_size", 224)
        model = AutoModelForImageClassification.from_config(config)
        return model, transformers.ViTImageProcessorPil(size={"height": size, "width": size})
    # On the weights of a later commit adapters would compute something else.
    revision = resolve_revision(args.model_name_or_path, args.revision)
    args.revision = getattr(revision, "resolved", revision)
    try:
        model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path, revision=args.revision)
    except OSError as error:
        if os.path.isdir(args.model_name_or_path):
            raise
        raise ValueError(
            f"model_name_or_path={args.model_name_or_path!r} is no folder here, and the Hub does not give it: {error}"
        ) from error
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, revision=args.revision)
    return model, resized_image_processor(processor, args.image_size) if args.image_size else processor


def choose_adapter(args: ModelArguments, model: transformers.PreTrainedModel) -> TaskAdapter:
    """The kind of task adapters, which follows from the model and from options of one kind unless it is given."""
    if args.adapter is not None:
        return args.adapter
    convolutional = args.preset == "paper" or args.reduction_factor is not None
    return "conv" if convolutional else default_adapter(model)


def adapter_config(args: ModelArguments) -> HeadConfig:
    """The configuration of the adapters.

    Raises:
        ValueError: If an option is that of another kind of adapters.
    """
    common = {
        "target_modules": args.target_modules,
        "feature_modules": args.feature_modules,
        "scoring": args.scoring,
        "flips": args.flips,
    }
    if args.model_name_or_path is not None and not os.path.isdir(args.model_name_or_path):
        common["revision"] = args.revision
    given = {"r": args.lora_rank, "lora_alpha": args.lora_alpha}
    rank = {name: value for name, value in given.items() if value is not None}
    if args.adapter == "conv":
        if rank:
            raise ValueError("adapter='conv' has neither lora_rank nor lora_alpha; leave them out.")
        return DynammoConfig(preset=args.preset, reduction_factor=args.reduction_factor, **common)
    if args.preset != "default" or args.reduction_factor is not None:
        raise ValueError("adapter='lora' has neither preset='paper' nor reduction_factor; leave them out.")
    return DynammoLoraConfig(**rank, **common)

"""What the recipe does to learn further classes with what an earlier run has saved or published."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Optional

from backbone import ModelArguments
from transformers import AutoImageProcessor

from dynammo_peft import DynammoLoraConfig, Method
from dynammo_peft.hub import load_method, read_learning_options


def learned_options(args: ModelArguments) -> tuple[str, dict[str, Any]]:
    """The method and its options as it has learned with them, the defaults of going on.

    Raises:
        ValueError: If there is no learning state, or it is of no use.
    """
    return read_learning_options(args.load_learning_state, revision=_revision(args))


def load_learned(args: ModelArguments, method_args: Any) -> tuple[Method, Any]:
    """The method that has learned some tasks, and its image processor; `args` then say what it brought along.

    Raises:
        ValueError: If it cannot be loaded, or `args` ask for another model or other adapters.
    """
    source, revision = args.load_learning_state, _revision(args)
    plain = asdict(ModelArguments(load_learning_state=source, revision=args.revision))
    for name, value in asdict(args).items():
        if value != plain[name]:
            raise ValueError(f"load_learning_state brings its model and adapters along; leave {name} out.")
    method = load_method(source, revision, **asdict(method_args))
    try:
        image_processor = AutoImageProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} has no image processor: {error}") from error
    config = method.model.peft_config[method.adapters[0]]
    args.model_name_or_path, args.revision = config.base_model_name_or_path, config.revision or plain["revision"]
    args.feature_modules, args.flips, args.scoring = config.feature_modules, config.flips, config.scoring
    if isinstance(config, DynammoLoraConfig):
        args.adapter, args.lora_rank, args.lora_alpha = "lora", config.r, config.lora_alpha
    else:
        args.adapter, args.preset, args.reduction_factor = "conv", config.preset, config.reduction_factor
    return method, image_processor


def _revision(args: ModelArguments) -> Optional[str]:
    """`None` for the main branch, whatever it is called."""
    return None if args.revision == ModelArguments().revision else args.revision

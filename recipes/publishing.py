"""What the recipe does for the Hub: options, checks before anything is learned, and the facts of the card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Optional

from dynammo_peft import METHODS, ClassIncrementalScenario, Method, Results
from dynammo_peft.hub import CardFacts, push_to_hub
from dynammo_peft.hub.card_facts import Form
from dynammo_peft.methods.two_stage import TwoStageMethod
from dynammo_peft.tuner.head_config import check_choice


@dataclass
class HubArguments:
    """Whether and how the model is published."""

    push_to_hub: bool = field(
        default=False, metadata={"help": "Publish the model on the Hub: weights, class names, options and measures."}
    )
    hub_model_id: Optional[str] = field(default=None, metadata={"help": "Repository to publish to, as 'me/cells'."})
    hub_form: Form = field(
        default="adapter",
        metadata={
            "help": "An 'adapter' for PEFT, a 'standalone' model with its own code, or from LoRA a 'stock' model of "
            "transformers."
        },
    )
    hub_learning_state: bool = field(
        default=False,
        metadata={
            "help": "Publish what it takes to learn further classes too (load_learning_state): every task's adapter, "
            "class statistics and row numbers of exemplars, no image."
        },
    )
    hub_private_repo: bool = field(default=False, metadata={"help": "Make the repository private."})
    hub_license: Optional[str] = field(
        default=None, metadata={"help": "The model's licence, as 'apache-2.0'; unknown if unset."}
    )


def without_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run without those of its publication, which change nothing of what is learned."""
    names = {option.name for option in fields(HubArguments)}
    return {name: value for name, value in options.items() if name not in names}


def check_publishing(args: Any, model_args: Any, method_args: Any) -> None:
    """Raises a `ValueError` if what the options will learn cannot be saved or published as they say."""
    check_choice("hub_form", args.hub_form, Form)
    folder = getattr(method_args, "offload_adapters", None)
    if args.save_task_adapters and folder is not None:
        raise ValueError(
            f"save_task_adapters saves adapters that are in the model, and offload_adapters={folder!r} keeps all of "
            "them in that folder already; leave one of the two out."
        )
    if not args.push_to_hub:
        return
    if args.hub_model_id is None:
        raise ValueError("push_to_hub needs a repository; set hub_model_id, as in --hub_model_id me/cells.")
    if args.method == "acl":
        raise ValueError(
            "method='acl' keeps an adapter for each task, which cannot be published as one model; choose another "
            "method, or leave push_to_hub out."
        )
    if args.hub_learning_state and args.hub_form != "adapter":
        raise ValueError(
            f"hub_form={args.hub_form!r} is for use only; leave hub_learning_state out, or set hub_form='adapter'."
        )
    if args.hub_learning_state and not issubclass(METHODS[args.method], TwoStageMethod):
        raise ValueError(f"method={args.method!r} does not go on learning; leave hub_learning_state out.")
    trained = getattr(method_args, "train_backbone", False)
    local = model_args.model_name_or_path is None or os.path.exists(model_args.model_name_or_path)
    if args.hub_form == "adapter" and (trained or local):
        reason = "train_backbone is set" if trained else "the backbone is new or in a folder"
        raise ValueError(
            f"hub_form='adapter' needs a backbone that others can load, but {reason}; set hub_form='standalone'"
            f"{', or leave train_backbone out' if trained else ', or name a model on the Hub by model_name_or_path'}."
        )
    if args.hub_form != "stock":
        return
    if model_args.adapter != "lora":
        raise ValueError("hub_form='stock' needs an adapter that folds into the weights; set adapter='lora'.")
    reads_layers = METHODS[args.method].reads_layers and model_args.feature_modules is None
    if reads_layers or model_args.feature_modules:
        raise ValueError(
            "hub_form='stock' has no place for features of several layers; give --feature_modules without a value."
        )
    if model_args.flips:
        raise ValueError("hub_form='stock' is a plain model, which averages over no mirror images; leave out flips.")
    if model_args.scoring not in (None, "log_odds"):
        raise ValueError(f"hub_form='stock' needs scoring='log_odds', got {model_args.scoring!r}.")


def publish(
    args: Any,
    model_args: Any,
    data_args: Any,
    method: Method,
    scenario: ClassIncrementalScenario,
    image_processor: Any,
    results: Results,
    options: Mapping[str, Any],
    cost: Mapping[str, float],
) -> str:
    """Publishes what was learned, with all that its card can say.

    Returns:
        `str`: The commit's address.
    """
    adapter = method.inference_adapters[0]
    others = [name for name in method.model.peft_config if name != adapter] if args.save_task_adapters else []
    name, repository = data_set(data_args)
    held_out = data_args.validation_fraction
    split = f"{held_out:g} of {data_args.train_split}" if held_out else data_args.test_split
    # Without images of all classes learned before nothing was measured of the whole model.
    scored = set(results.references) >= set(range(len(results.learned)))
    measured = results.class_names[: len(results.learned)] == results.learned and scored
    facts = CardFacts(
        name=args.hub_model_id.rpartition("/")[2],
        form=args.hub_form,
        tasks=results.groups if measured else method.groups,
        method=args.method,
        options=options,
        metrics=results.metrics() if measured else None,
        evaluation_data=name if measured else None,
        evaluation_data_id=repository if measured else None,
        evaluation_split=split if measured else None,
        test_images=len(results.references) if measured else None,
        image_size=tuple(scenario.image_size),
        cost=cost,
        training_data=f"{name}; what earlier classes were learned from is not known" if results.learned else name,
        training_data_id=repository,
        license=args.hub_license,
    )
    return push_to_hub(
        method.model,
        args.hub_model_id,
        args.hub_form,
        image_processor,
        adapter,
        others if args.hub_form == "adapter" else (),
        facts,
        base_model_revision=model_args.revision if args.hub_form == "adapter" else None,
        learning_state_of=method if args.hub_learning_state else None,
        private=args.hub_private_repo or None,
        commit_message=f"Learn {len(facts.class_names)} classes in {len(method.groups)} tasks by {args.method}",
    )


def data_set(args: Any) -> tuple[str, Optional[str]]:
    """What the data set may be called in public, and its repository on the Hub if it has one."""
    if args.data_dir is not None or args.dataset_name == "imagefolder" or os.path.exists(args.dataset_name):
        return "a folder of images", None
    if "/" in args.dataset_name:
        return args.dataset_name, args.dataset_name
    return {"digits": "scikit-learn's handwritten digits"}.get(args.dataset_name, args.dataset_name), None

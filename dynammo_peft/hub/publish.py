"""Publishing: a learned model as a repository on the Hub, in one of three forms, and nothing else beside it."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional, Union

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from ..folders import replaced_folder
from ..methods import Dynammo
from ..methods.offload import AdapterFolder
from ..methods.two_stage import TwoStageMethod
from ..tuner.head_config import HeadConfig, check_choice
from .allowlist import ADAPTER_WEIGHTS, SUPERSEDED, publishable_files
from .card import write_model_card
from .card_facts import CardFacts, Form
from .commit import check_can_push, commit_files, hub_api, hub_errors
from .export import auto_mapping
from .learning import check_learning_state, save_learning_state
from .published_base import base_repository, published_base
from .standalone import to_standalone
from .stock import to_stock


def save_pretrained(
    model: PeftModel,
    directory: Union[str, os.PathLike],
    form: Form = "adapter",
    image_processor: Optional[Any] = None,
    adapter_name: str = "merged",
    task_adapters: Sequence[str] = (),
    facts: Optional[CardFacts] = None,
    base_model: Optional[str] = None,
    base_model_revision: Optional[str] = None,
    token: Optional[str] = None,
    learning_state_of: Optional[TwoStageMethod] = None,
    include_exemplars: bool = False,
) -> Path:
    """
    Writes a folder as it is to be published: the model in one of three forms, and its card.

    - `"adapter"`: what the adapter adds, for PEFT and this package. The base model must be on the Hub; its commit is
      written down.
    - `"standalone"`: a whole model with its own code (see [`to_standalone`]).
    - `"stock"`: a whole model without code of its own, from LoRA only (see [`to_stock`]).

    No image, exemplar or class statistic is in any of them, unless asked for. A save that fails leaves the directory
    as it was.

    Args:
        model (`PeftModel`): A model with task adapters; left as it is.
        directory (`Union[str, os.PathLike]`): Where to; replaced if it exists.
        form (`Literal["adapter", "standalone", "stock"]`): What to write.
        image_processor (`Optional[BaseImageProcessor]`): The image processor that the model was trained with.
        adapter_name (`str`): The adapter to publish, by default the merged one.
        task_adapters (`Sequence[str]`): For `"adapter"`: adapters to put into subfolders of their names.
        facts (`Optional[CardFacts]`): What the card says; of the base model and of privacy it says what is so. If
            `None`, the card says that nothing was measured.
        base_model (`Optional[str]`): The base model's repository, if it was loaded from a folder that is a copy.
        base_model_revision (`Optional[str]`): Its branch, tag or commit; `main` if `None`.
        token (`Optional[str]`): A token, for a base model that is private.
        learning_state_of (`Optional[TwoStageMethod]`): For `"adapter"`: the method whose model it is, to go on
            learning elsewhere ([`load_method`]). All task adapters, row numbers of exemplars and class statistics go
            along.
        include_exemplars (`bool`): Whether the exemplars' images go along too. Whoever sees the repository sees them.

    Returns:
        `Path`: The directory.

    Raises:
        ValueError: If the form does not exist or the adapter does not fit it, the base model is not on the Hub or was
            trained (`"adapter"`), the card tells of another model, a path of this machine would be published, or the
            directory is a mount point.
        ConnectionError: If the base model must be looked up and the Hub does not answer.

    Example:

        ```py
        >>> save_pretrained(method.model, "cells", form="standalone", image_processor=image_processor)
        ```
    """
    task_adapters = _with_learning_state(model, form, task_adapters, learning_state_of, include_exemplars)
    config = _check_adapters(model, form, adapter_name, task_adapters, learning_state_of)
    facts = _complete(facts, form, config, learning_state_of, include_exemplars)
    if form == "adapter":
        base_model, base_model_revision = published_base(model, base_model, base_model_revision, token)
        facts = replace(facts, base_model=base_model, base_model_revision=base_model_revision)
    elif facts.base_model is None:
        base_model = base_model or base_repository(model)
        facts = replace(facts, base_model=base_model, base_model_revision=base_model_revision if base_model else None)
    with replaced_folder(directory) as folder:
        if form == "adapter":
            for name, place in [(adapter_name, folder), *((name, folder / name) for name in task_adapters)]:
                stored = None if name in model.peft_config else learning_state_of.folder
                _write_adapter(model, name, place, base_model, base_model_revision, stored)
        else:
            plain = to_standalone(model, adapter_name) if form == "standalone" else to_stock(model, adapter_name)
            plain.save_pretrained(folder)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
        if learning_state_of is not None:
            save_learning_state(learning_state_of, folder, include_exemplars)
        write_model_card(facts, folder)
        publishable_files(folder, form, task_adapters, learning_state_of is not None, include_exemplars)
    return Path(directory)


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    form: Form = "adapter",
    image_processor: Optional[Any] = None,
    adapter_name: str = "merged",
    task_adapters: Sequence[str] = (),
    facts: Optional[CardFacts] = None,
    base_model: Optional[str] = None,
    base_model_revision: Optional[str] = None,
    token: Optional[str] = None,
    learning_state_of: Optional[TwoStageMethod] = None,
    include_exemplars: bool = False,
    private: Optional[bool] = None,
    revision: Optional[str] = None,
    commit_message: Optional[str] = None,
) -> str:
    """
    Publishes a model: what [`save_pretrained`] writes, as one commit. Earlier commits stay.

    Files that another form has left are deleted by the same commit; files that are no part of any form stay.

    Args:
        model (`PeftModel`): A model with task adapters; left as it is.
        repo_id (`str`): The repository, as `"owner/name"`; made if it does not exist.
        form (`Literal["adapter", "standalone", "stock"]`): As of [`save_pretrained`].
        image_processor (`Optional[BaseImageProcessor]`): The image processor that the model was trained with.
        adapter_name (`str`): The adapter to publish, by default the merged one.
        task_adapters (`Sequence[str]`): For `"adapter"`: adapters to put into subfolders of their names.
        facts (`Optional[CardFacts]`): As of [`save_pretrained`]; `repo_id` is filled in.
        base_model (`Optional[str]`): As of [`save_pretrained`].
        base_model_revision (`Optional[str]`): As of [`save_pretrained`].
        token (`Optional[str]`): A token of the Hub; the one of `HF_TOKEN` or of `hf auth login` if `None`.
        learning_state_of (`Optional[TwoStageMethod]`): As of [`save_pretrained`].
        include_exemplars (`bool`): As of [`save_pretrained`].
        private (`Optional[bool]`): Whether the repository is private; if `None`, a new one is as its owner's settings
            say. A public one that exists is refused if `True`.
        revision (`Optional[str]`): The branch, made if it does not exist; `main` if `None`.
        commit_message (`Optional[str]`): What the history says.

    Returns:
        `str`: The commit's address.

    Raises:
        ValueError: As [`save_pretrained`] and [`check_can_push`], if `repo_id` is the base model's, or if somebody
            else's commit came between.
        ConnectionError: If the Hub cannot be reached, also after some tries.

    Example:

        ```py
        >>> push_to_hub(method.model, "me/cells", image_processor=image_processor, private=True)
        'https://huggingface.co/me/cells/commit/0f3c...'
        ```
    """
    task_adapters = _with_learning_state(model, form, task_adapters, learning_state_of, include_exemplars)
    config = _check_adapters(model, form, adapter_name, task_adapters, learning_state_of)
    repo_id = check_can_push(repo_id, token, private)
    if repo_id == (base_model or base_repository(model)):
        raise ValueError(f"repo_id={repo_id!r} holds the base model, which must not be replaced; choose another.")
    if facts is None:
        facts = _unmeasured(form, config, repo_id.rpartition("/")[2])
    facts = replace(facts, repo_id=repo_id)
    with TemporaryDirectory() as temporary:
        folder = save_pretrained(
            model,
            Path(temporary) / "repository",
            form,
            image_processor,
            adapter_name,
            task_adapters,
            facts,
            base_model,
            base_model_revision,
            token,
            learning_state_of,
            include_exemplars,
        )
        files = publishable_files(folder, form, task_adapters, learning_state_of is not None, include_exemplars)
        message = commit_message or f"Add the model as {form} ({len(config.class_names)} classes)"
        with hub_errors(repo_id):
            return commit_files(hub_api(token), repo_id, files, SUPERSEDED, message, private, revision)


def _check_adapters(
    model: PeftModel,
    form: Form,
    adapter_name: str,
    task_adapters: Sequence[str],
    method: Optional[TwoStageMethod],
) -> HeadConfig:
    check_choice("form", form, Form)
    configs = dict(getattr(model, "peft_config", {}))
    if method is not None:
        configs |= {name: method.config_of(name) for name in method.adapters}
    for name in (adapter_name, *task_adapters):
        if not getattr(configs.get(name), "classes", None):
            known = ", ".join(repr(known) for known, config in configs.items() if getattr(config, "classes", None))
            raise ValueError(
                f"The model has no adapter {name!r} with classes; choose one of its own ({known or 'none'})."
            )
    if method is not None and adapter_name not in method.inference_adapters:
        raise ValueError(
            f"Learning goes on with adapter {method.inference_adapters[0]!r}, and adapter_name={adapter_name!r} would "
            "take its place; leave adapter_name or learning_state_of out."
        )
    if task_adapters and form != "adapter":
        raise ValueError(f"form={form!r} holds one adapter; leave task_adapters out, or choose form='adapter'.")
    return configs[adapter_name]


def _with_learning_state(
    model: PeftModel,
    form: Form,
    task_adapters: Sequence[str],
    method: Optional[TwoStageMethod],
    include_exemplars: bool,
) -> Sequence[str]:
    """The task adapters to publish: all of them if learning shall go on."""
    check_learning_state(model, method, include_exemplars)
    if method is None:
        return task_adapters
    if form != "adapter":
        raise ValueError(f"form={form!r} is for use only; leave learning_state_of out, or choose form='adapter'.")
    return method.adapters


def _unmeasured(form: Form, config: HeadConfig, name: str = "Image classifier") -> CardFacts:
    return CardFacts(name=name, form=form, tasks=config.classes, image_size=tuple(config.image_size))


def _complete(
    facts: Optional[CardFacts],
    form: Form,
    config: HeadConfig,
    method: Optional[TwoStageMethod],
    include_exemplars: bool,
) -> CardFacts:
    """The card's facts, made to say of privacy what is so, or those of a model of which nothing else is known."""
    facts = _unmeasured(form, config) if facts is None else facts
    if facts.form != form:
        raise ValueError(f"The facts are of form={facts.form!r}, not {form!r}; give them the form that is published.")
    if facts.class_names != config.class_names:
        raise ValueError(
            f"The facts' tasks name the classes {facts.class_names}, but the model's are {config.class_names}; give "
            "them in the order of the logits."
        )
    return replace(
        facts,
        unknown_score=form != "stock",
        exemplar_images=include_exemplars and len(method.memory) > 0,
        exemplar_indices=0 if method is None else len(method.exemplar_rows),
        class_statistics=getattr(method, "statistics", None) is not None,
        merge_statistics=isinstance(method, Dynammo) and method.merging.measurements.kind is not None,
    )


def _write_adapter(
    model: PeftModel, name: str, folder: Path, base_model: str, revision: str, stored: Optional[AdapterFolder]
) -> None:
    """As `PeftModel.save_pretrained` does, with the base model's repository and commit, and nothing else beside.

    An adapter that is not in the model is in `stored`.
    """
    folder.mkdir(exist_ok=True)
    if stored is None:
        tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    else:
        tensors = stored.tensors(name)
    tensors = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[name] if stored is None else stored.configs[name])
    config.base_model_name_or_path, config.revision, config.inference_mode = base_model, revision, True
    # That repository holds the backbone as it is now, or nothing would be written.
    config.backbone_trained = False
    config.save_pretrained(folder, auto_mapping_dict=auto_mapping(model, config))

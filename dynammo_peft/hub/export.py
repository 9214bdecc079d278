"""Saving what a method has learned, for `from_pretrained`."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.save_and_load import get_base_model_state_dict
from transformers import PreTrainedModel

from ..folders import replaced_folder
from ..methods.offload import AdapterFolder
from ..methods.two_stage import TwoStageMethod
from .learning import check_learning_state, save_learning_state


BACKBONE = "backbone"


def base_model(model: PeftModel) -> PreTrainedModel:
    """A copy of the base model without adapters, as it is now.

    Args:
        model (`PeftModel`): A model with adapters; left as it is.

    Returns:
        `PreTrainedModel`: The base model with its own classifier and labels.

    Raises:
        ValueError: If adapters are merged into its weights.
    """
    check_unmerged(model)
    adapted = model.get_base_model()
    config = copy.deepcopy(adapted.config)
    with model.disable_adapter():
        config.id2label, config.label2id = adapted.config.id2label, adapted.config.label2id
        config.problem_type = adapted.config.problem_type
    plain = type(adapted)(config)
    plain.load_state_dict(get_base_model_state_dict(model))
    return plain.eval()


def check_unmerged(model: PeftModel) -> None:
    """Raises a `ValueError` if LoRA is in the base model's weights, which are not its own then."""
    if any(isinstance(layer, LoraLayer) and layer.merged for layer in model.modules()):
        raise ValueError("LoRA adapters are merged into the backbone's weights; call `unmerge_adapter` before.")


def save_model(
    model: PeftModel,
    directory: Union[str, os.PathLike],
    adapters: Sequence[str],
    image_processor: Optional[Any] = None,
    save_backbone: Optional[bool] = None,
    learning_state_of: Optional[TwoStageMethod] = None,
    include_exemplars: bool = False,
) -> None:
    """
    Saves adapters with their heads, and what else is needed to use them on this machine, or to go on learning.

    Writes `<adapter>/adapter_model.safetensors` and its configuration for each adapter, `preprocessor_config.json`,
    and the backbone into `backbone/` if it is not as it was loaded. Where the backbone was loaded from, or was saved,
    is written down as a place on this machine; for others there is [`save_pretrained`]. A save that fails leaves the
    directory as it was.

    Args:
        model (`PeftModel`): The model; left as it is.
        directory (`Union[str, os.PathLike]`): Where to; replaced if it exists.
        adapters (`Sequence[str]`): Names of the adapters.
        image_processor (`Optional[BaseImageProcessor]`): The image processor that the model was trained with.
        save_backbone (`Optional[bool]`): Whether the backbone goes along; if `None`, one that is new, was trained or
            is a pickle. One that is in the directory stays in it.
        learning_state_of (`Optional[TwoStageMethod]`): The method whose model it is, to go on learning later
            ([`load_method`]): all task adapters, row numbers of exemplars and class statistics go along.
        include_exemplars (`bool`): Whether the exemplars' images go along too.

    Raises:
        ValueError: If an adapter does not exist, the method is of another model, has learned nothing or is in the
            middle of a task, the backbone goes along and LoRA is merged into it, or the directory is a mount point.

    Example:

        ```py
        >>> save_model(method.model, "cells", method.inference_adapters, image_processor, learning_state_of=method)
        >>> method = load_method("cells")
        ```
    """
    check_learning_state(model, learning_state_of, include_exemplars)
    if learning_state_of is not None:
        needed = [*learning_state_of.adapters, *learning_state_of.inference_adapters]
        adapters = list(dict.fromkeys([*adapters, *needed]))
    target = Path(directory).resolve()
    source = _place(model)
    if os.path.isdir(source) and Path(source).resolve().is_relative_to(target):
        # It would be gone with what is in the directory now.
        save_backbone = True
    elif save_backbone is None:
        save_backbone = _is_new_or_trained(model) or _is_pickled(source)
    stored = [name for name in adapters if name not in model.peft_config and learning_state_of is not None]
    with replaced_folder(target) as partial:
        if save_backbone:
            base_model(model).save_pretrained(partial / BACKBONE)
        place = str(target / BACKBONE) if save_backbone else source
        with _backbone_at(model, place, save_backbone):
            # There are no embeddings of words, so PEFT need not look for the base model's vocabulary.
            in_model = [name for name in adapters if name not in stored]
            model.save_pretrained(partial, selected_adapters=in_model, save_embedding_layers=False)
        for name in stored:
            _copy_stored(model, learning_state_of.folder, name, partial / name, place, save_backbone)
        if image_processor is not None:
            for folder in (partial, *(partial / name for name in adapters)):
                image_processor.save_pretrained(folder)
        if learning_state_of is not None:
            save_learning_state(learning_state_of, partial, include_exemplars)


def _is_new_or_trained(model: PeftModel) -> bool:
    """Whether the backbone is nowhere as it is now."""
    new = not getattr(model.get_base_model(), "name_or_path", "")
    return new or any(getattr(config, "backbone_trained", False) for config in model.peft_config.values())


def _is_pickled(place: str) -> bool:
    """Whether a folder has weights that nothing of this package would load again."""
    return os.path.isdir(place) and not any(Path(place).glob("*.safetensors"))


def _place(model: PeftModel) -> str:
    """Where the backbone was loaded from."""
    name = model.get_base_model().name_or_path
    # A relative path would hold only for who starts from the same folder.
    return os.path.abspath(name) if os.path.isdir(name) else name


def auto_mapping(model: PeftModel, config: PeftConfig) -> Optional[dict[str, str]]:
    """What PEFT's auto classes find the class of the base model by, where the configuration names no task."""
    base = type(model.get_base_model())
    known = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return known if config.task_type is None else None


@contextmanager
def _backbone_at(model: PeftModel, place: str, saved: bool) -> Iterator[None]:
    """The configurations of a model's adapters say that its backbone is in a place, for a while."""
    before = {name: dict(vars(config)) for name, config in model.peft_config.items()}
    for config in model.peft_config.values():
        _set_backbone(config, place, saved)
    try:
        yield
    finally:
        for name, config in model.peft_config.items():
            vars(config).update(before[name])


def _set_backbone(config: PeftConfig, place: str, saved: bool) -> None:
    config.base_model_name_or_path = place or config.base_model_name_or_path
    if saved:
        config.backbone_trained, config.revision = False, None


def _copy_stored(model: PeftModel, stored: AdapterFolder, name: str, folder: Path, place: str, saved: bool) -> None:
    """Copies an adapter that is not in the model."""
    shutil.copytree(stored.path / name, folder)
    config = copy.deepcopy(stored.configs[name])
    _set_backbone(config, place, saved)
    config.save_pretrained(folder, auto_mapping_dict=auto_mapping(model, config))

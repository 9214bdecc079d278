"""Saving what a method has learned, for `from_pretrained`."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

from peft import PeftModel
from peft.utils.save_and_load import get_base_model_state_dict
from transformers import PreTrainedModel

from ..folders import replaced_folder


BACKBONE = "backbone"


def base_model(model: PeftModel) -> PreTrainedModel:
    """A copy of the base model without adapters, as it is now.

    Args:
        model (`PeftModel`): A model with adapters; left as it is.

    Returns:
        `PreTrainedModel`: The base model with its own classifier and labels.
    """
    adapted = model.get_base_model()
    config = copy.deepcopy(adapted.config)
    with model.disable_adapter():
        config.id2label, config.label2id = adapted.config.id2label, adapted.config.label2id
        config.problem_type = adapted.config.problem_type
    plain = type(adapted)(config)
    plain.load_state_dict(get_base_model_state_dict(model))
    return plain.eval()


def save_model(
    model: PeftModel,
    directory: Union[str, os.PathLike],
    adapters: Sequence[str],
    image_processor: Optional[Any] = None,
    save_backbone: bool = False,
) -> None:
    """
    Saves adapters with their heads, and what else is needed to use them.

    Writes `<adapter>/adapter_model.safetensors` and its configuration for each adapter, `preprocessor_config.json`,
    and the backbone into `backbone/` if wanted. A save that fails leaves the directory as it was.

    Args:
        model (`PeftModel`): The model.
        directory (`Union[str, os.PathLike]`): Where to; replaced if it exists.
        adapters (`Sequence[str]`): Names of the adapters.
        image_processor (`Optional[BaseImageProcessor]`): The image processor that the model was trained with.
        save_backbone (`bool`): Whether the backbone was changed (or never saved) and must go along.
    """
    target = Path(directory).resolve()
    with replaced_folder(target) as partial:
        if save_backbone:
            base_model(model).save_pretrained(partial / BACKBONE)
        base = model.get_base_model().name_or_path
        for name in adapters:
            config = model.peft_config[name]
            if save_backbone:
                config.base_model_name_or_path, config.backbone_trained = str(target / BACKBONE), False
            elif os.path.isdir(base):
                # A relative path would hold only for who starts from the same folder.
                config.base_model_name_or_path = os.path.abspath(base)
        # There are no embeddings of words, so PEFT need not look for the base model's vocabulary.
        model.save_pretrained(partial, selected_adapters=list(adapters), save_embedding_layers=False)
        if image_processor is not None:
            for folder in (partial, *(partial / name for name in adapters)):
                image_processor.save_pretrained(folder)

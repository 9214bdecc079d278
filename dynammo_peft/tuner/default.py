"""The task adapter of a model for which none is asked for."""

from __future__ import annotations

from torch import nn

from .architectures import ARCHITECTURES, TaskAdapter
from .config import DynammoConfig
from .head_config import HeadConfig
from .lora import DynammoLoraConfig


TASK_ADAPTERS: dict[TaskAdapter, type[HeadConfig]] = {"conv": DynammoConfig, "lora": DynammoLoraConfig}


def default_adapter(model: nn.Module) -> TaskAdapter:
    """
    The kind of task adapter that suits a model, as measured on held-out images (docs/measurements.md).

    Args:
        model (`nn.Module`): The image classifier.

    Returns:
        `Literal["conv", "lora"]`: `"lora"` for plain transformers; `"conv"` for all others, unknown ones too.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return ARCHITECTURES[model_type].adapter if model_type in ARCHITECTURES else "conv"

"""Checks of a published adapter's tensors against the model that they are for, which is left as it is."""

from __future__ import annotations

import copy
from typing import Optional, Union

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..tuner import HeadConfig
from ..tuner.names import base_modules
from .checks import some
from .files import AdapterFiles, refusal


def read_tensors(files: AdapterFiles) -> dict[str, Tensor]:
    """Reads an adapter's tensors.

    Args:
        files (`AdapterFiles`): Where they are.

    Returns:
        `dict[str, Tensor]`: The tensors by their names, on the CPU; all numbers are finite.

    Raises:
        ValueError: If the file is truncated or corrupt, or holds NaN or infinite values.
    """
    where = files.shown(files.weights)
    try:
        tensors = load_file(files.weights)
    except (SafetensorError, KeyError, AttributeError, ValueError, RuntimeError) as error:
        # A type of numbers that torch does not know is no SafetensorError.
        raise refusal(
            where, f"This is no safetensors file, or a damaged one ({type(error).__name__}: {error}); fetch it again."
        ) from error
    for name, tensor in tensors.items():
        # The adapter computes in single precision.
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise refusal(where, f"Tensor {name!r} holds NaN or infinite values.")
    return tensors


def check_fit(
    files: AdapterFiles,
    config: HeadConfig,
    tensors: dict[str, Tensor],
    model: Union[nn.Module, PeftModel],
    adapter_name: str,
) -> None:
    """Raises a `ValueError` unless an adapter fits a model: its blocks and head are there, and its tensors are right.

    The adapter is attached to a copy of the model without data, so the model stays as it is.

    Args:
        files (`AdapterFiles`): Where the adapter came from.
        config (`HeadConfig`): Its configuration; left as it is.
        tensors (`dict[str, Tensor]`): Its tensors.
        model (`Union[nn.Module, PeftModel]`): The base model, or a model with adapters.
        adapter_name (`str`): What the adapter will be called.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    made_for = _described((config.auto_mapping or {}).get("base_model_class"), config.base_model_name_or_path)
    given = _described(type(base).__name__, getattr(base, "name_or_path", None))
    pair = f"the adapter was made for {made_for}, and this is {given}"
    where = files.shown(files.config)
    if config.head_module is not None and config.head_module not in dict(base_modules(base)):
        raise refusal(
            where,
            f"The base model has no classifier head_module={config.head_module!r}; load it by "
            f"AutoModelForImageClassification ({pair}).",
        )
    try:
        _check_targets(base, config)
        expected = _expected_tensors(model, config, adapter_name)
    except Exception as error:  # PEFT and the base model raise errors of many kinds.
        raise refusal(where, f"The adapter does not fit the base model: {str(error).rstrip('.')} ({pair}).") from error
    _compare(files.shown(files.weights), tensors, expected, pair)


def _check_targets(base: nn.Module, config: HeadConfig) -> None:
    targets = config.target_modules
    # PEFT would be content with the head.
    if not targets or targets == "all-linear":
        return
    if not any(BaseTuner._check_target_module_exists(config, name) for name, _ in base_modules(base)):
        shown = targets if isinstance(targets, str) else sorted(targets)
        raise ValueError(f"it has no module target_modules={shown!r}")


def _described(model_class: object, name: Optional[str]) -> str:
    return " ".join([str(model_class or "a base model"), *([repr(name)] if name else [])])


def _expected_tensors(model: nn.Module, config: HeadConfig, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of such an adapter of this model, without data."""
    try:
        # Whatever is made on the way has no data either, however large the configuration makes it.
        with torch.device("meta"):
            return _attached(_copy_without_data(model), config, adapter_name)
    except Exception as error:
        # A base model whose forward pass looks at values.
        if "meta" not in str(error).lower():
            raise
    return _attached(copy.deepcopy(model), config, adapter_name)


def _attached(model: nn.Module, config: HeadConfig, adapter_name: str) -> dict[str, Tensor]:
    config = copy.deepcopy(config)
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
    else:
        model = PeftModel(model, config, adapter_name, low_cpu_mem_usage=True)
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


def _copy_without_data(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device."""
    copies: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        copies[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, copies)


def _compare(where: str, tensors: dict[str, Tensor], expected: dict[str, Tensor], pair: str) -> None:
    foreign, missing = sorted(set(tensors) - set(expected)), sorted(set(expected) - set(tensors))
    if foreign and missing:
        raise refusal(where, f"Tensor {some(foreign)} is of another model, and {some(missing)} is missing: {pair}.")
    if foreign:
        raise refusal(where, f"Tensor {some(foreign)} is unexpected; {pair}.")
    if missing:
        raise refusal(where, f"Tensor {some(missing)} is missing; the file is incomplete, or else {pair}.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise refusal(
                where,
                f"Tensor {name!r} has shape {list(tensor.shape)} instead of {list(expected[name].shape)}; {pair}.",
            )
        if _kind(tensor) != _kind(expected[name]):
            raise refusal(where, f"Tensor {name!r} holds {_kind(tensor)} instead of {_kind(expected[name])}.")


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "truth values"
    if tensor.is_complex():
        return "complex numbers"
    return "floating-point numbers" if tensor.is_floating_point() else "whole numbers"

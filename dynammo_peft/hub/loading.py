"""Loading of published adapters: everything is checked before a model is touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional, Union

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..tuner import HeadConfig
from ..tuner.names import check_adapter_name
from .checks import read_config
from .files import HUB_ERRORS, AdapterFiles, Token, fetch, find_adapter, hub_reason, refusal
from .tensors import check_fit, read_tensors


def from_pretrained(
    repo_id_or_path: Union[str, os.PathLike],
    subfolder: Optional[str] = None,
    revision: Optional[str] = None,
    token: Token = None,
    adapter_name: str = "merged",
    base_model: Optional[PreTrainedModel] = None,
) -> PeftModel:
    """
    Loads a published adapter with its base model.

    Unlike `PeftModel.from_pretrained` it checks everything first: a model that is given stays as it was if it fails.
    Weights are read from safetensors only, of the base model too, and no code of a repository is run.

    Args:
        repo_id_or_path (`Union[str, os.PathLike]`):
            A folder with what `save_pretrained` wrote, or else a repository on the Hub.
        subfolder (`Optional[str]`): The folder in it that holds the adapter, as `"merged"`.
        revision (`Optional[str]`): The repository's branch, tag or commit; its main branch if `None`.
        token (`Optional[Union[str, bool]]`): A token for the Hub; the one of `hf auth login` if `None`.
        adapter_name (`str`): What the adapter shall be called, defaults to `"merged"`.
        base_model (`Optional[PreTrainedModel]`):
            The model to attach it to. If `None`, it is the one that the configuration names, at its revision.

    Returns:
        `PeftModel`: The model with the adapter active and frozen, in evaluation mode.

    Raises:
        ValueError: In one line, with the file and its field or tensor: if there is no adapter of this package, its
            configuration or tensors are damaged or do not fit the base model, or the Hub does not give them.

    Example:

        ```py
        >>> from dynammo_peft.hub import from_pretrained

        >>> model = from_pretrained("user/cells", subfolder="merged")
        >>> label = model.config.id2label[model(pixel_values).logits.argmax().item()]
        ```
    """
    if base_model is not None and any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise ValueError("base_model has adapters already; load a further one by load_adapter(model, ...).")
    files = find_adapter(repo_id_or_path, subfolder, revision, token)
    config, tensors = _read(files)
    base = _load_base_model(files, config, token) if base_model is None else base_model
    check_adapter_name(base, adapter_name)
    check_fit(files, config, tensors, base, adapter_name)
    model = PeftModel.from_pretrained(base, files.folder, adapter_name, config=config, torch_device="cpu")
    return model.eval()


def load_adapter(
    model: PeftModel,
    repo_id_or_path: Union[str, os.PathLike],
    adapter_name: str,
    subfolder: Optional[str] = None,
    revision: Optional[str] = None,
    token: Token = None,
) -> None:
    """
    Loads a published adapter into a model that has others, as a further one: frozen, and not active.

    Unlike `PeftModel.load_adapter` it checks everything first: the model stays as it was if it fails. Afterwards it is
    in evaluation mode.

    Args:
        model (`PeftModel`): A model with adapters of the same method.
        repo_id_or_path (`Union[str, os.PathLike]`): See [`from_pretrained`].
        adapter_name (`str`): What the adapter shall be called; a name that is free.
        subfolder (`Optional[str]`): See [`from_pretrained`].
        revision (`Optional[str]`): See [`from_pretrained`].
        token (`Optional[Union[str, bool]]`): See [`from_pretrained`].

    Raises:
        ValueError: As [`from_pretrained`], or if the model has an adapter of this name or none of this method.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"model must be a PeftModel, got {type(model).__name__}; use from_pretrained(base_model=...)."
        )
    if adapter_name in model.peft_config:
        raise ValueError(f"Adapter {adapter_name!r} exists already; choose another adapter_name.")
    files = find_adapter(repo_id_or_path, subfolder, revision, token)
    config, tensors = _read(files)
    if config.peft_type != model.peft_type:
        raise refusal(
            files.shown(files.config),
            f"peft_type={config.peft_type.value!r} does not go with the model's adapters, which are "
            f"{model.peft_type.value!r}; load it by from_pretrained.",
        )
    check_adapter_name(model.base_model.model, adapter_name)
    check_fit(files, config, tensors, model, adapter_name)
    model.load_adapter(files.folder, adapter_name, torch_device="cpu")


def find_file(
    repo_id_or_path: Union[str, os.PathLike], filename: str, revision: Optional[str] = None, token: Token = None
) -> Optional[Path]:
    """A file of a folder or of a repository on the Hub, which is fetched; `None` if there is no such file.

    Args:
        repo_id_or_path (`Union[str, os.PathLike]`): See [`from_pretrained`].
        filename (`str`): Its path in there.
        revision (`Optional[str]`): See [`from_pretrained`].
        token (`Optional[Union[str, bool]]`): See [`from_pretrained`].

    Raises:
        ValueError: In one line, if the repository does not exist or cannot be read.
    """
    root = os.fspath(repo_id_or_path)
    try:
        folder = Path(root) if os.path.isdir(root) else fetch(root, [filename], revision, token)
    except HUB_ERRORS as error:
        raise refusal(root, hub_reason(error, revision)) from error
    return folder / filename if (folder / filename).is_file() else None


def _read(files: AdapterFiles) -> tuple[HeadConfig, dict[str, Tensor]]:
    # The configuration first: its errors tell more.
    return read_config(files), read_tensors(files)


def _load_base_model(files: AdapterFiles, config: HeadConfig, token: Token) -> nn.Module:
    """The base model that a configuration names, without code of its repository and without pickles.

    Raises:
        ValueError: If none is named, or it cannot be loaded; it names the configuration's file and field.
    """
    where, base = files.shown(files.config), config.base_model_name_or_path
    if not base:
        raise refusal(where, "There is no base_model_name_or_path; load the base model and give it as base_model.")
    field = f"base_model_name_or_path={base!r}"
    try:
        if not os.path.isdir(base):
            # The Hub's own errors are plain only as long as transformers does not wrap them.
            fetch(base, ["config.json"], config.revision, token)
    except HUB_ERRORS as error:
        raise refusal(where, f"{field}: {hub_reason(error, config.revision)}") from error
    try:
        return AutoModelForImageClassification.from_pretrained(
            base, revision=config.revision, token=token, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises errors of many kinds, with long texts.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise refusal(
            where, f"{field}: It cannot be loaded ({reason}); load the base model and give it as base_model."
        ) from error

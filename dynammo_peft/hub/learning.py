"""What it takes to go on learning somewhere else: a method's adapters and state, and no image."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Optional, Union

from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..data import LabelledImages
from ..methods import METHODS, Dynammo
from ..methods.dynammo import MERGED
from ..methods.two_stage import TwoStageMethod
from .loading import find_file, from_pretrained, load_adapter


STATE, TENSORS, EXEMPLARS = "learning_state.json", "learning_state.safetensors", "exemplars.safetensors"
FORMAT_VERSION = 3


def check_learning_state(model: PeftModel, method: Optional[TwoStageMethod], include_exemplars: bool) -> None:
    """Raises a `ValueError` unless a method, if one is given, is that of the model, and exemplars are those of one."""
    if method is not None and method.model is not model:
        raise ValueError("learning_state_of is a method of another model; give the one whose model is saved.")
    if method is None and include_exemplars:
        raise ValueError("include_exemplars is for going on to learn; give learning_state_of the method.")


def save_learning_state(
    method: TwoStageMethod, directory: Union[str, os.PathLike], include_exemplars: bool = False
) -> list[str]:
    """
    Writes beside a model's task adapters what `load_method` needs to go on learning; [`save_model`] writes both.

    That is the options, which rows of the training data are exemplars and of which class, and the class statistics; no
    name of a file, and no image unless asked for. The mean of a class of one image is that image's features; a warning
    names such classes.

    Args:
        method (`TwoStageMethod`): A method that has learned some tasks.
        directory (`Union[str, os.PathLike]`): Where to.
        include_exemplars (`bool`): Whether the exemplars' images go along. Whoever gets the files sees them.

    Returns:
        `list[str]`: Names of the files.

    Raises:
        ValueError: If nothing was learned yet, or a task is not finished.
    """
    if not method.adapters:
        raise ValueError("No task was learned yet, so there is no state to save.")
    if method.unfinished:
        raise ValueError(
            f"Task {len(method.adapters) - 1} was begun and is not finished, so there is no state to save; resume "
            "from a checkpoint, or begin again with what was saved before it."
        )
    _warn_of_single_images(method)
    values, tensors = method.state()
    # A place on this machine: adapters that are there are published as those in the model.
    arguments = {name: value for name, value in asdict(method.arguments).items() if name != "offload_adapters"}
    content = {
        "format_version": FORMAT_VERSION,
        "method": method.name,
        "arguments": arguments,
        "classes": method.groups,
        **values,
        # Those of a state that was loaded too, of which no image need be at hand.
        "exemplar_rows": method.exemplar_rows,
        "exemplar_labels": method.exemplar_labels,
    }
    directory = Path(directory)
    (directory / STATE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / TENSORS)
    exemplars = method.memory.images() if include_exemplars else None
    if exemplars is None:
        return [STATE, TENSORS]
    save_file({name: getattr(exemplars, name) for name in ("images", "labels", "rows")}, directory / EXEMPLARS)
    return [STATE, TENSORS, EXEMPLARS]


def load_method(
    repo_id_or_path: Union[str, os.PathLike],
    revision: Optional[str] = None,
    token: Optional[str] = None,
    base_model: Optional[PreTrainedModel] = None,
    **arguments: Any,
) -> TwoStageMethod:
    """
    A method as it was when its model was published or saved with `learning_state_of`, to learn further tasks.

    Args:
        repo_id_or_path (`Union[str, os.PathLike]`): Repository on the Hub, or a folder.
        revision (`Optional[str]`): Branch, tag or commit.
        token (`Optional[str]`): For a private repository; the one that is logged in if `None`.
        base_model (`Optional[PreTrainedModel]`): The base model; loaded from where the adapters say if `None`.
        arguments: Options to change, as `adapter_epochs`.

    Returns:
        `TwoStageMethod`: The method. New tasks come as a scenario with `learned=method.groups`, and with
        `exemplar_rows=method.exemplar_rows` if its data set is the one that was learned from.

    Raises:
        ValueError: If there is no learning state, it is of no use, or an adapter cannot be loaded.

    Example:

        ```py
        >>> method = load_method("me/cells")
        >>> scenario = ClassIncrementalScenario(train, test, processor, groups=[["basophil"]], learned=method.groups)
        >>> Learner(method).fit(scenario)
        >>> push_to_hub(method.model, "me/cells", image_processor=processor, learning_state_of=method)
        ```
    """
    source, where = str(repo_id_or_path), {"revision": revision, "token": token}
    state = _read_state(source, where)
    method_cls = METHODS[state["method"]]
    options = _options(method_cls.arguments_cls, {**state["arguments"], **arguments}, source)
    first, *others = state["adapters"]
    model = from_pretrained(source, first, adapter_name=first, base_model=base_model, **where)
    for name in others:
        load_adapter(model, source, name, name, **where)
    if method_cls is Dynammo:
        # At the top where it was published, beside the others where it was saved.
        at_the_top = find_file(source, CONFIG_NAME, **where) is not None
        load_adapter(model, source, MERGED, None if at_the_top else MERGED, **where)
    config = replace(model.peft_config[first], classes=None, inference_mode=False)
    method = method_cls(model, options, config)
    try:
        method.restore(state, _read_tensors(source, TENSORS, where, required=True))
    except ValueError as error:
        raise ValueError(f"{source}/{STATE}: {error}") from error
    exemplars = _read_tensors(source, EXEMPLARS, where, required=False)
    if exemplars:
        method.memory.restore(LabelledImages(**exemplars))
    # As a resumed run has it: what is scored before the next task is what was published.
    method.model.set_adapter(method.inference_adapters[-1], inference_mode=True)
    return method


def read_learning_options(
    repo_id_or_path: Union[str, os.PathLike], revision: Optional[str] = None, token: Optional[str] = None
) -> tuple[str, dict[str, Any]]:
    """
    The method that a learning state is of, and the options that it has learned with; nothing else is loaded.

    Args:
        repo_id_or_path (`Union[str, os.PathLike]`): Repository on the Hub, or a folder.
        revision (`Optional[str]`): As of [`load_method`].
        token (`Optional[str]`): As of [`load_method`].

    Returns:
        `tuple[str, dict[str, Any]]`: A key of `METHODS`, and the options by name.

    Raises:
        ValueError: If there is no learning state, or it is of no use.
    """
    source = str(repo_id_or_path)
    state = _read_state(source, {"revision": revision, "token": token})
    return state["method"], asdict(_options(METHODS[state["method"]].arguments_cls, state["arguments"], source))


def _warn_of_single_images(method: TwoStageMethod) -> None:
    statistics = getattr(method, "statistics", None)
    counts = {} if statistics is None else statistics.counts
    if names := [method.class_names[label] for label, count in counts.items() if count == 1]:
        warnings.warn(
            f"Classes of one image: {', '.join(map(repr, names))}. Their means in the learning state are these "
            "images' features, from which an image may be guessed roughly; publish without it if nobody may.",
            stacklevel=3,
        )


def _read_state(source: str, where: Mapping[str, Any]) -> dict[str, Any]:
    path = find_file(source, STATE, **where)
    if path is None:
        raise ValueError(
            f"{source} has no {STATE}: it was published for use only. To go on learning, publish by push_to_hub(..., "
            "learning_state_of=method), or save by save_model(..., learning_state_of=method)."
        )
    try:
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        version, method, adapters, arguments = (
            state[key] for key in ("format_version", "method", "adapters", "arguments")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}/{STATE} is no learning state ({type(error).__name__}: {error}).") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{source}/{STATE} has format_version={version!r}; this version reads {FORMAT_VERSION}.")
    if method not in METHODS or not issubclass(METHODS[method], TwoStageMethod):
        raise ValueError(f"{source}/{STATE} has method={method!r}, which does not go on learning.")
    if not isinstance(arguments, dict) or not adapters or not all(isinstance(name, str) for name in adapters):
        raise ValueError(f"{source}/{STATE} has no usable adapters or arguments.")
    return state


def _options(arguments_cls: type, given: Mapping[str, Any], source: str) -> Any:
    known = {field.name for field in fields(arguments_cls)}
    for name in given:
        if name not in known:
            raise ValueError(f"{source}/{STATE}: option {name!r} does not exist; a newer version may have written it.")
    return arguments_cls(**given)


def _read_tensors(source: str, name: str, where: Mapping[str, Any], required: bool) -> dict[str, Tensor]:
    path = find_file(source, name, **where)
    if path is None:
        if required:
            raise ValueError(f"{source} has no {name}, which belongs to its {STATE}.")
        return {}
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{source}/{name} is truncated or no safetensors file ({error}).") from error

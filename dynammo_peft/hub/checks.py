"""Checks of a published adapter's configuration: each error is one line that names the file and the field."""

from __future__ import annotations

import json
import math
import reprlib
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, NoReturn, Union

from peft import PeftType

from ..tuner import DynammoConfig, DynammoLoraConfig, HeadConfig
from .files import AdapterFiles, refusal


CONFIGS: dict[str, type[HeadConfig]] = {"DYNAMMO": DynammoConfig, "DYNAMMO_LORA": DynammoLoraConfig}
# PEFT never writes it: it describes the process, not the adapter.
_RUNTIME_FIELDS = {"runtime_config"}
# PEFT declares a whole number, and computes with any.
_WIDER: dict[str, Any] = {"lora_alpha": float}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "an object",
    list: "a list",
}


def read_config(files: AdapterFiles) -> HeadConfig:
    """Reads an adapter's configuration.

    Args:
        files (`AdapterFiles`): Where it is.

    Returns:
        `HeadConfig`: A [`DynammoConfig`] or a [`DynammoLoraConfig`].

    Raises:
        ValueError: If the file is no JSON object, is of another method, or has a field that is unknown, of the wrong
            type, or impossible.
    """
    where = files.shown(files.config)
    try:
        values = json.loads(files.config.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise refusal(where, f"This is no JSON ({error}).") from error
    if not isinstance(values, dict):
        raise refusal(where, f"This must be a JSON object, got {reprlib.repr(values)}.")
    config_cls = _config_class(where, values.get("peft_type"))
    _check_fields(where, config_cls, values)
    try:
        return config_cls(**values)
    except Exception as error:  # PEFT's configurations raise errors of many kinds.
        raise refusal(where, error) from error


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many there are beside it."""
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} (and {len(names) - 1} more)"


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _config_class(where: str, peft_type: Any) -> type[HeadConfig]:
    ours = " and ".join(CONFIGS)
    if isinstance(peft_type, str) and peft_type in CONFIGS:
        return CONFIGS[peft_type]
    if isinstance(peft_type, str) and peft_type in PeftType.__members__:
        raise refusal(
            where,
            f"peft_type={peft_type!r} is a method of PEFT itself: load it by peft.PeftModel.from_pretrained. Here "
            f"{ours} are loaded.",
        )
    raise refusal(
        where,
        f"peft_type={reprlib.repr(peft_type)} is not known; {ours} are. A newer version of dynammo_peft or another "
        "package may have written it.",
    )


def _check_fields(where: str, config_cls: type[HeadConfig], values: dict[str, Any]) -> None:
    defaults = {field.name: field.default for field in fields(config_cls) if field.init}
    unknown = sorted(set(values) - (set(defaults) - _RUNTIME_FIELDS))
    if unknown:
        raise refusal(
            where,
            f"Field {some(unknown)} is not known; a newer version of dynammo_peft or PEFT may have written it: "
            "upgrade both.",
        )
    hints = {**typing.get_type_hints(config_cls), **_WIDER}
    for name, value in values.items():
        absent = value is None and defaults[name] is None
        if not absent and not _fits(value, hints[name]):
            raise refusal(where, f"{name}={reprlib.repr(value)} must be {_describe(hints[name])}.")
    if values.get("task_type") is not None:
        raise refusal(where, f"task_type={values['task_type']!r} is for models of language; it must be null.")
    size = values.get("image_size")
    sides = size if isinstance(size, list) else [size]
    if size is not None and (len(sides) != (2 if isinstance(size, list) else 1) or min(sides) < 1):
        raise refusal(where, f"image_size={reprlib.repr(size)} must be a number of pixels, or height and width.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a type; sets and tuples are lists there, and objects of classes are dicts."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        # Which of them are possible, the configuration says.
        return any(_fits(value, type(argument)) for argument in arguments)
    if origin in (list, set, tuple):
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value if arguments)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(entry, arguments[1]) for entry in value.values() if arguments)
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is type(None) or origin in (bool, str):
        return isinstance(value, origin)
    if isinstance(origin, type) and issubclass(origin, str):
        return isinstance(value, str)
    return origin is Any or isinstance(value, dict)


def _describe(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (Union, types.UnionType):
        # Python keeps the order in which such a union was first written anywhere.
        return " or ".join(sorted({_describe(argument) for argument in arguments if argument is not type(None)}))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (list, set, tuple):
        return f"a list of {_describe(arguments[0])}" if arguments else "a list"
    if isinstance(origin, type) and issubclass(origin, str):
        return "text"
    return _KINDS.get(origin, "an object")

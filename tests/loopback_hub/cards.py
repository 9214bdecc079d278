"""The check of a model card's metadata: the rules that a card of this package could break, not all of the Hub's."""

from __future__ import annotations

import re
from typing import Any

import yaml


_HEADER = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_ARRAYS = ("tags", "metrics", "widget", "model-index")


def card_metadata(content: str) -> Any:
    """What stands between the first `---` lines, or `None`.

    Raises:
        yaml.YAMLError: If it is no YAML.
    """
    match = _HEADER.match(content)
    return yaml.safe_load(match.group(1)) if match else None


def card_problems(content: str) -> tuple[list[str], list[str]]:
    """Errors, for which the Hub refuses the card, and warnings."""
    try:
        metadata = card_metadata(content)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML metadata must be an object"], []
    errors = [f'"{name}" must be an array' for name in _ARRAYS if not isinstance(metadata.get(name, []), list)]
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(metadata.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for name, kind in (("base_model", "model"), ("datasets", "dataset")):
        value = metadata.get(name, [])
        for identifier in value if isinstance(value, list) else [value]:
            if not isinstance(identifier, str) or not _REPO_ID.fullmatch(identifier):
                errors.append(
                    f'"{name}" with value "{identifier}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
                )
    if not errors:
        for place, entry in enumerate(metadata.get("model-index", [])):
            errors += _result_problems(f"model-index[{place}]", entry)
    return errors, []


def _result_problems(place: str, entry: Any) -> list[str]:
    if not isinstance(entry, dict) or "name" not in entry:
        return [f'"{place}.name" is required']
    errors = []
    for index, result in enumerate(entry.get("results", [])):
        where = f"{place}.results[{index}]"
        required = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
        for part, name in required:
            if name not in (result.get(part) or {}):
                errors.append(f'"{where}.{part}.{name}" is required')
        for number, metric in enumerate(result.get("metrics", [])):
            errors += [
                f'"{where}.metrics[{number}].{name}" is required' for name in ("type", "value") if name not in metric
            ]
    return errors

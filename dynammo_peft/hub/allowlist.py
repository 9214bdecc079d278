"""What a published repository may hold: files by their names, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_NAME

from . import modeling_dynammo
from .card import PICTURE
from .card_facts import Form
from .card_markdown import looks_local
from .learning import EXEMPLARS, STATE, TENSORS


# What a repository may hold, by its form; beside it what any form may hold.
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
FORM_FILES: dict[Form, tuple[str, ...]] = {
    "adapter": ADAPTER_FILES,
    "standalone": (CONFIG_NAME, SAFE_WEIGHTS_NAME, Path(modeling_dynammo.__file__).name),
    "stock": (CONFIG_NAME, SAFE_WEIGHTS_NAME),
}
LEARNING_FILES = (STATE, TENSORS)
COMMON_FILES = ("README.md", PICTURE, IMAGE_PROCESSOR_NAME)

# What another form may have left in a repository. What else its owner has put there stays.
SUPERSEDED = [
    re.compile(re.escape(name))
    for name in {
        *COMMON_FILES,
        *LEARNING_FILES,
        EXEMPLARS,
        *(name for names in FORM_FILES.values() for name in names),
    }
] + [re.compile(rf"[\w-]+/{re.escape(name)}") for name in ADAPTER_FILES]

# In these fields of a configuration stand class names, which may look like anything.
_CLASS_NAMES = {"classes", "id2label", "label2id"}


def publishable_files(
    folder: Path,
    form: Form,
    task_adapters: Sequence[str] = (),
    learning_state: bool = False,
    exemplars: bool = False,
) -> dict[str, Path]:
    """
    Lists a folder's files by their paths in the repository, and refuses any that does not belong there.

    Args:
        folder (`Path`): What [`~dynammo_peft.hub.save_pretrained`] has written.
        form (`Literal["adapter", "standalone", "stock"]`): In which form.
        task_adapters (`Sequence[str]`): Names of subfolders.
        learning_state (`bool`): Whether what it takes to go on learning may be there.
        exemplars (`bool`): Whether exemplars' images may be there.

    Returns:
        `dict[str, Path]`: All files.

    Raises:
        ValueError: If there is a file of another name, or a configuration holds a path of this machine.
    """
    allowed = {*COMMON_FILES, *FORM_FILES[form]}
    allowed |= {*(LEARNING_FILES if learning_state else ()), *([EXEMPLARS] if exemplars else [])}
    allowed.update(f"{name}/{file}" for name in task_adapters for file in ADAPTER_FILES)
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    for name, path in found.items():
        if name not in allowed or path.is_symlink():
            raise ValueError(
                f"{name!r} is no part of a model published as form={form!r}, and nothing else may be published; take "
                "it away. Custom image processors cannot be published."
            )
        for field, text in _texts(json.loads(path.read_text(encoding="utf-8"))) if path.suffix == ".json" else ():
            if looks_local(text):
                raise ValueError(f"{field}={text!r} in {name!r} would publish a path of your machine; change it.")
    return found


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a configuration but for class names, each with the name of its field."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, field)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key not in _CLASS_NAMES:
                yield from _texts(entry, key)

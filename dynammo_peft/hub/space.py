"""A page on the Hub (a Space) where a model can be tried in the browser."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Optional, Union

import jinja2
from huggingface_hub import SpaceCard, SpaceCardData

from ..tuner.head_config import check_choice
from .card_facts import Form, check_no_path, check_repository
from .card_markdown import escape, template_path


# What Spaces install before `requirements.txt`; within the bounds that stand there.
GRADIO_VERSION = "6.31.0"
PYTHON_VERSION = "3.12"


def write_space(
    directory: Union[str, os.PathLike], repo_id: str, title: Optional[str] = None, form: Form = "standalone"
) -> Path:
    """
    Writes a Gradio app that shows what a model on the Hub says of an uploaded image.

    The folder can be uploaded as it is, by `HfApi().upload_folder(repo_type="space", ...)`, or run by `python app.py`.
    The page shows the likeliest classes, the task that each was learned in, and the score for "none of these"; for a
    model of the form `"stock"` the classes alone.

    Args:
        directory (`Union[str, os.PathLike]`): Where to; made if it does not exist. Other files in it stay.
        repo_id (`str`): The model's repository, as `"owner/name"`.
        title (`Optional[str]`): The page's title, in one line; by default the repository's name.
        form (`Literal["adapter", "standalone", "stock"]`): What the repository holds: an adapter for PEFT, a whole
            model with its own code, or a plain model of transformers.

    Returns:
        `Path`: The folder, with `app.py`, `style.css`, `requirements.txt` and `README.md`.

    Raises:
        ValueError: If `repo_id` is no repository on the Hub, `form` does not exist, or the title is empty, has more
            than one line or names a file or folder.

    Example:

        ```py
        >>> write_space("cells-space", "me/cells", title="Blood cells", form="adapter")
        PosixPath('cells-space')
        ```
    """
    check_choice("form", form, Form)
    if not isinstance(repo_id, str):
        raise ValueError(f"repo_id={repo_id!r} is no repository on the Hub (owner/name).")
    check_repository("repo_id", repo_id)
    title = repo_id.split("/")[-1] if title is None else title
    _check_title(title)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # The title stands between double quotes in Python, which reads what JSON escapes.
    texts = {"repo_id": repo_id, "form": form, "title": json.dumps(title, ensure_ascii=False)[1:-1]}
    for name in ("app.py", "style.css", "requirements.txt"):
        template = jinja2.Template(_read(name), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        (directory / name).write_text(template.render(texts), encoding="utf-8", newline="\n")
    card = SpaceCard.from_template(
        SpaceCardData(
            title=title,
            sdk="gradio",
            sdk_version=GRADIO_VERSION,
            python_version=PYTHON_VERSION,
            app_file="app.py",
            models=[repo_id],
        ),
        template_path=str(template_path("space/README.md")),
        **{**texts, "title": escape(title)},
    )
    card.text = card.text.rstrip() + "\n"
    card.save(directory / "README.md")
    return directory


def _read(name: str) -> str:
    return template_path(f"space/{name}").read_text(encoding="utf-8")


def _check_title(title: str) -> None:
    if not title.strip():
        raise ValueError(f"title={title!r} is empty; leave it out to take the repository's name.")
    # Control characters, separators of lines and paragraphs, and halves of surrogate pairs.
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in title):
        raise ValueError(f"title={title!r} must be one line of text that can be printed.")
    check_no_path("title", title)

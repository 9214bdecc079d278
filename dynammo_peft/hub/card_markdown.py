"""What cards are made of: their templates, text that cannot break out of Markdown, and tables."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path


# What means nothing in Markdown or HTML wherever it stands, beside letters and digits.
_PLAIN = set(" ,;()+%.-/")
_UNPRINTABLE = {"Cc", "Cs"}


def template_path(name: str) -> Path:
    """
    Args:
        name (`str`): `"model_card.md"` or `"dataset_card.md"`.

    Returns:
        `Path`: The template: in an installed package beside its modules, in a checkout at the top.

    Raises:
        FileNotFoundError: If it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "hub_cards", package.parent / "hub_cards"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"The template {name!r} is missing; install dynammo_peft again.")


def escape(text: str) -> str:
    """Any text as Markdown that shows it as it is, in a paragraph, heading or table cell.

    Characters that might mean something become numeric entities: these stand for themselves in every dialect of
    Markdown, which backslashes do not. Control characters and halves of surrogate pairs cannot be written and become
    U+FFFD.

    Args:
        text (`str`): A label name, a data set's name or the like; line breaks and tabs are kept.

    Returns:
        `str`: One line of Markdown.
    """
    return "".join(_escaped(text, place) for place in range(len(text)))


def _escaped(text: str, place: int) -> str:
    character = text[place]
    before, after = text[max(place - 1, 0) : place], text[place + 1 : place + 2]
    if character in "\n\r\t":
        return f"&#{ord(character)};"
    if unicodedata.category(character) in _UNPRINTABLE:
        return "\ufffd"
    # Spaces at the ends are trimmed, and several become one; hyphens in a row may become a rule or a dash.
    alone = before not in ("", character) and after not in ("", character)
    plain = character.isalnum() or (character in _PLAIN and (character not in " -+" or alone))
    # Underscores inside a word are not emphasis.
    plain |= character == "_" and before.isalnum() and after.isalnum()
    # A number at the start may begin a list, and some dialects make links of bare addresses.
    if character in ".)":
        plain &= not (text[:place].isdigit() or text[:place].lower().endswith("www"))
    return character if plain or not character.isascii() else f"&#{ord(character)};"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Args:
        header (`Sequence[str]`): Titles of the columns, in Markdown.
        rows (`Sequence[Sequence[str]]`): Cells in Markdown, a row each; names must have been escaped.

    Returns:
        `str`: Lines without a line break at the end.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    """A share of 1 in per cent with one decimal, as `"94.8"`."""
    # A rounded zero has no sign.
    return f"{round(100 * share, 1) + 0.0:.1f}"


def looks_local(text: str) -> bool:
    """Whether a text holds the path of a file or folder on somebody's machine."""
    return re.search(r"""(?:^|[\s"'=(\[,]|:(?!//))(?:file:|~?/|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)\S""", text) is not None

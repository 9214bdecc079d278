"""A picture of an accuracy matrix."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Union

from .card_facts import check_matrix


# Up to so many tasks each cell shows its number, and each row its classes.
_DETAILED = 12
_LABEL_LENGTH = 28


def draw_accuracy_matrix(
    matrix: Sequence[Sequence[float]], groups: Sequence[Sequence[str]], path: Union[str, os.PathLike]
) -> None:
    """
    Draws accuracy after each task (rows) on the test images of each task (columns) as a heat map.

    The colours (cividis) go from dark to light, and are told apart without seeing red and green, and in grey.

    Args:
        matrix (`Sequence[Sequence[float]]`): Row i: accuracies from 0 to 1 after task i, `i + 1` values.
        groups (`Sequence[Sequence[str]]`): Class names of each task.
        path (`Union[str, os.PathLike]`): File to write; its ending decides the format.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the matrix is empty or does not fit the tasks.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_accuracy_matrix needs matplotlib: pip install dynammo_peft[plots]") from error
    check_matrix(matrix, len(groups))
    tasks = len(matrix)
    if not tasks:
        raise ValueError("accuracy_matrix is empty; there is nothing to draw.")
    square = [[100 * value for value in row] + [math.nan] * (tasks - len(row)) for row in matrix]
    side = min(1.5 + 0.5 * tasks, 8)
    # No pyplot: it would choose a back end for the whole process.
    figure = Figure(figsize=(1.3 * side, side), dpi=120)
    axes = figure.subplots()
    image = axes.imshow(square, cmap="cividis", vmin=0, vmax=100)
    step = 1 if tasks <= _DETAILED else 5
    places = [place for place in range(tasks) if place == 0 or (place + 1) % step == 0]
    axes.set_xticks(places, [str(place + 1) for place in places])
    labels = [_label(place, groups[place]) if tasks <= _DETAILED else str(place + 1) for place in places]
    # Dollar signs in names are no formulas.
    axes.set_yticks(places, labels, parse_math=False)
    axes.set_xlabel("test images of task")
    axes.set_ylabel("after task")
    axes.spines[["top", "right"]].set_visible(False)
    if tasks <= _DETAILED:
        _write_numbers(axes, square)
    figure.colorbar(image, label="accuracy in %")
    # Long names need more room than the figure has.
    figure.savefig(path, bbox_inches="tight")


def _label(place: int, names: Sequence[str]) -> str:
    """A task's number and its classes, on one line; cut where they are long, left out where the font lacks them."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    text = f"{place + 1}: {' '.join(', '.join(names).split())}"
    font = get_font(findfont(FontProperties()))
    if not all(font.get_char_index(ord(character)) for character in text):
        return str(place + 1)
    return text if len(text) <= _LABEL_LENGTH else f"{text[: _LABEL_LENGTH - 1].rstrip(' ,')}…"


def _write_numbers(axes: Any, square: Sequence[Sequence[float]]) -> None:
    for row, values in enumerate(square):
        for column, value in enumerate(values):
            if not math.isnan(value):
                # White on dark, black on light.
                colour = "black" if value > 50 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)

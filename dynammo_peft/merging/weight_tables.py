"""Merge weights to look at: as a table and as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Union


def table_of(means: Mapping[str, Sequence[float]], adapters: Sequence[str]) -> str:
    """Weights by layer (rows) and adapter (columns), to be printed.

    Args:
        means (`Mapping[str, Sequence[float]]`): A weight for each adapter by layer; `""` stands for all layers.
        adapters (`Sequence[str]`): Names of the adapters.
    """
    rows = {layer or "all layers": row for layer, row in means.items()}
    first = max(map(len, ["layer", *rows]))
    widths = [max(len(name), 7) for name in adapters]
    lines = [["layer", *adapters], *([layer, *(f"{w:.3f}" for w in row)] for layer, row in rows.items())]
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], widths))])
        for line in lines
    )


def draw_table(means: Mapping[str, Sequence[float]], adapters: Sequence[str], path: Union[str, os.PathLike]) -> None:
    """Draws what `table_of` prints as a heat map.

    Args:
        means (`Mapping[str, Sequence[float]]`): A weight for each adapter by layer; `""` stands for all layers.
        adapters (`Sequence[str]`): Names of the adapters.
        path (`Union[str, os.PathLike]`): File to write; its ending decides the format.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install dynammo_peft[plots]") from error
    # No pyplot: it would choose a back end for the whole process.
    figure = Figure(figsize=(3 + 0.6 * len(adapters), 1.5 + 0.3 * len(means)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(list(means.values()), aspect="auto")
    axes.set_xticks(range(len(adapters)), adapters, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(means)), [layer or "all layers" for layer in means])
    figure.colorbar(image, label="merge weight")
    figure.savefig(path)

"""Tables of the results of `merging.py`: means and deviations over seeds, each with a class order of its own."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Any


Line = dict[str, Any]


def overview(lines: list[Line], rows: Sequence[str], at_once: Collection[str]) -> str:
    """A line a row, a column a sequence and backbone: last / average, and how far `default` is from others.

    Args:
        lines (`list[Line]`): The results.
        rows (`Sequence[str]`): Those to show.
        at_once (`Collection[str]`): Rows that learn all classes as one task, which have no average.
    """
    columns = sorted({(line["sequence"], line["backbone"]) for line in lines})
    heads = [f"{sequence}, {backbone}" for sequence, backbone in columns]
    out = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    cells = [[line for line in lines if (line["sequence"], line["backbone"]) == column] for column in columns]
    for row in rows:
        out.append(f"| `{row}` | {' | '.join(_cell(cell, row, row in at_once) for cell in cells)} |")
    for other in rows:
        if other != "default":
            differences = [_difference(cell, "default", other, other in at_once) for cell in cells]
            out.append(f"| `default` less `{other}` | {' | '.join(differences)} |")
    return "\n".join(out)


def details(lines: list[Line], rows: Sequence[str], at_once: Collection[str]) -> str:
    """A table for each backbone and sequence, of all rows there are; those not in `rows` come last."""
    out = []
    for backbone, sequence in dict.fromkeys((line["backbone"], line["sequence"]) for line in lines):
        here = [line for line in lines if (line["backbone"], line["sequence"]) == (backbone, sequence)]
        out += [f"\n{backbone}, {sequence}\n", "| | last / average | less `acl` | seeds |", "|---|---|---|---|"]
        for row in dict.fromkeys([*rows, *(line["row"] for line in here)]):
            seeds = sorted(_values(here, row, "last"))
            if seeds:
                gain = "" if row == "acl" else _difference(here, row, "acl", row in at_once)
                shown = ", ".join(str(seed) for seed in seeds)
                out.append(f"| `{row}` | {_cell(here, row, row in at_once)} | {gain} | {shown} |")
    return "\n".join(out)


def _values(lines: list[Line], row: str, key: str) -> dict[int, float]:
    return {line["seed"]: line[key] for line in lines if line["row"] == row}


def _cell(lines: list[Line], row: str, last_only: bool) -> str:
    measured = [[*_values(lines, row, key).values()] for key in (("last",) if last_only else ("last", "average"))]
    return " / ".join(_spread(values) for values in measured if values)


def _difference(lines: list[Line], row: str, other: str, last_only: bool) -> str:
    """The mean of one row less the other's, over seeds that have both."""
    out = []
    for key in ("last",) if last_only else ("last", "average"):
        one, two = _values(lines, row, key), _values(lines, other, key)
        both = sorted(one.keys() & two.keys())
        if both:
            out.append(f"{statistics.mean(one[seed] - two[seed] for seed in both):+.1f}")
    return " / ".join(out)


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"

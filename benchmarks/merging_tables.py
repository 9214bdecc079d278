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
            seeds = sorted({seed for seed, _ in _values(here, row, "last")})
            if seeds:
                gain = "" if row == "acl" else _difference(here, row, "acl", row in at_once)
                shown = ", ".join(str(seed) for seed in seeds)
                out.append(f"| `{row}` | {_cell(here, row, row in at_once)} | {gain} | {shown} |")
    return "\n".join(out)


def compared(lines: list[Line], rows: Sequence[str], means: Sequence[str]) -> str:
    """A table for each sequence, with columns for each backbone: last / average, and how far last is from the mean.

    Args:
        lines (`list[Line]`): The results.
        rows (`Sequence[str]`): Those to show.
        means (`Sequence[str]`): Names of the mean of all adapters; rows are compared with the first that their
            backbone has.
    """
    out = []
    for sequence in sorted({line["sequence"] for line in lines}):
        here = [line for line in lines if line["sequence"] == sequence]
        backbones = sorted({line["backbone"] for line in here})
        heads = [f"{backbone} | less the mean | class orders" for backbone in backbones]
        out += [f"\n{sequence}\n", f"| | {' | '.join(heads)} |", "|---" * (3 * len(backbones) + 1) + "|"]
        of_backbone = [[line for line in here if line["backbone"] == backbone] for backbone in backbones]
        for row in rows:
            cells = []
            for own in of_backbone:
                mean = next((name for name in means if _values(own, name, "last")), row)
                difference = "" if row == mean else _difference(own, row, mean, last_only=True, spread=True)
                orders = len({seed for seed, _ in _values(own, row, "last")})
                cells.append(f"{_cell(own, row, False)} | {difference} | {orders or ''}")
            if any(cell.strip(" |") for cell in cells):
                out.append(f"| `{row}` | {' | '.join(cells)} |")
    return "\n".join(out)


def of_any_precision(lines: list[Line]) -> list[Line]:
    """One line for each row of a backbone, sequence and seed: the mean over the precisions that it ran in."""
    runs: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        runs.setdefault(tuple(line[key] for key in ("backbone", "sequence", "seed", "row")), []).append(line)
    means = []
    for measured in runs.values():
        mean = {key: statistics.mean(line[key] for line in measured) for key in ("last", "average")}
        means.append({**measured[0], **mean, "precision": "any"})
    return means


def _values(lines: list[Line], row: str, key: str) -> dict[tuple[int, str], float]:
    """By seed and precision: only results of the same of both are compared."""
    return {(line["seed"], line["precision"]): line[key] for line in lines if line["row"] == row}


def _cell(lines: list[Line], row: str, last_only: bool) -> str:
    measured = [_by_seed(_values(lines, row, key)) for key in (("last",) if last_only else ("last", "average"))]
    return " / ".join(_spread(values) for values in measured if values)


def _by_seed(values: dict[tuple[int, str], float]) -> list[float]:
    """The mean over precisions of each seed: one measured twice counts once."""
    seeds = sorted({seed for seed, _ in values})
    return [statistics.mean(value for (own, _), value in values.items() if own == seed) for seed in seeds]


def _difference(lines: list[Line], row: str, other: str, last_only: bool, spread: bool = False) -> str:
    """The mean of one row less the other's, over seeds that have both."""
    out = []
    for key in ("last",) if last_only else ("last", "average"):
        one, two = _values(lines, row, key), _values(lines, other, key)
        both = _by_seed({run: one[run] - two[run] for run in one.keys() & two.keys()})
        if both:
            out.append(_spread(both, "+") if spread else f"{statistics.mean(both):+.1f}")
    return " / ".join(out)


def _spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{deviation}"

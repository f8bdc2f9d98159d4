"""The lines of finished trainings, and their tables."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from ..lines import read, spread
from .grids import CONVERTED, MEASURES, ROWS, STATIC, TIMED, Grid

TITLES = ("mIoU, known styles", "mIoU, unseen style", "boundary IoU, known", "boundary IoU, unseen")


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as Markdown: for each net results at equal steps, at equal time, and what the gates did."""
    facts = lines[-1]["environment"]
    text = [
        f"Measured on {facts['date']}: {facts['device']}, torch {facts['torch']}. Percent, mean and deviation over "
        "seeds; in brackets what a row is ahead of `static` of the same seed.",
    ]
    for net in dict.fromkeys(line["net"] for line in lines):
        own = [line for line in lines if line["net"] == net]
        text += ["", f"**{net}**, seeds: {len({line['seed'] for line in own})}", ""]
        text += _results(own) + _at_equal_time(own) + _gates(own)
    return "\n".join(text) + "\n"


def _results(own: list[dict[str, Any]]) -> list[str]:
    text = [
        "| | " + " | ".join(TITLES) + " | parameters | steps | time of a step, over static |",
        "|---|" + "---|" * (len(TITLES) + 3),
    ]
    for name, found in _by_row(own).items():
        cells = []
        for measure in MEASURES:
            gain = gains(own, name, STATIC, measure) if name not in (STATIC, TIMED) else []
            shown = f" ({spread(gain, signed=True)})" if gain else ""
            cells.append(spread([line[measure] for line in found]) + shown)
        steps = round(mean(line["steps"] for line in found))
        slower = gains(own, name, STATIC, "seconds_per_step", ratio=True)
        pace = f"{mean(slower):.1f}" if slower and steps and name != TIMED else ""
        text.append(f"| {name} | " + " | ".join([*cells, f"{found[0]['parameters']:,}", str(steps), pace]) + " |")
    return text


def _at_equal_time(own: list[dict[str, Any]]) -> list[str]:
    ahead = {measure: gains(own, CONVERTED, TIMED, measure) for measure in MEASURES}
    if not all(ahead.values()):
        return []
    cells = [spread(values, signed=True) for values in ahead.values()]
    head = ["", "| `converted` over `static` | " + " | ".join(TITLES) + " |", "|---|" + "---|" * len(TITLES)]
    equal = [spread(gains(own, CONVERTED, STATIC, measure), signed=True) for measure in MEASURES]
    rows = [("at equal steps", equal), ("at equal time", cells)]
    return head + [f"| {name} | " + " | ".join(values) + " |" for name, values in rows]


def _gates(own: list[dict[str, Any]]) -> list[str]:
    kinds = list(dict.fromkeys(kind for line in own for kind in line["gates"]))
    if not kinds:
        return []
    text = ["", "| mean distance of gates from 1, at the end | " + " | ".join(kinds) + " |"]
    text.append("|---|" + "---|" * len(kinds))
    for name, found in _by_row(own).items():
        if found[0]["gates"]:
            cells = [
                f"{mean(line['gates'][kind] for line in found):.3f}" if kind in found[0]["gates"] else ""
                for kind in kinds
            ]
            text.append(f"| {name} | " + " | ".join(cells) + " |")
    return text


def _by_row(own: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = {row.name: [line for line in own if line["row"] == row.name] for row in ROWS}
    return {name: rows for name, rows in found.items() if rows}


def gains(own: list[dict[str, Any]], name: str, over: str, measure: str, *, ratio: bool = False) -> list[float]:
    """By seed, how far a row is ahead of another one that saw the same data; or how many times it is the other."""
    of = {(line["row"], line["seed"]): line[measure] for line in own}
    pairs = [(of[name, seed], of[over, seed]) for row, seed in sorted(of) if row == name and (over, seed) in of]
    return [one / other if ratio else one - other for one, other in pairs if other or not ratio]


def report(grid: Grid, file: Path) -> None:
    """Write the table."""
    order = [net.name for net in grid.nets]
    lines = sorted(read(file), key=lambda line: (order.index(line["net"]), line["seed"]))
    file.with_suffix(".md").write_text(table(lines), encoding="utf-8")

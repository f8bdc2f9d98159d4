"""What the swap buys, and what each part of the operator has to do with it: small nets on small data, budgets equal.

    python -m benchmarks.accuracy [--grid cpu|full] [--device cpu|cuda] [--only TEXT] [--processes N] [--report]

A plain net is trained for some steps. Then it goes on as it is, or is converted and goes on, for as many steps of the
same schedule and the same batches; a wider plain net has as many parameters as the converted one from the start. Five
seeds or three: each draws the data, the weights and the batches. What is done already is not done again, so a run that
was stopped goes on where it was. `cpu` takes about half an hour on two cores with `--processes 2`; `full` has wider
nets, longer trainings and five seeds, and is for a GPU. `--report` only writes table and plots.

Writes `benchmarks/results/accuracy-GRID.jsonl` (a line a training) and `.md`, and `docs/images/accuracy-GRID.png` and
`band-maps-GRID.png`.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from ..lines import read, spread
from ..timing import RESULTS, environment
from .data import TASKS
from .maps import draw_maps, edge_correlations
from .training import VARIANTS, Budget, Variant, run

IMAGES = Path(__file__).parents[2] / "docs" / "images"
MAIN = (
    *("static", "static, wider", "static in spectral coordinates"),
    *("FDConv", "FDConv, paper's parametrisation", "without FBM"),
)
ABLATED = ("textures", "boundaries")
"""Tasks on which the CPU grid has all variants; the others have the main ones."""


@dataclass(frozen=True)
class Grid:
    """Which trainings there are."""

    budget: Budget
    seeds: int

    def variants(self, task: str) -> list[Variant]:
        """Those of a task."""
        every = self.seeds > 3 or task in ABLATED
        return [variant for variant in VARIANTS if every or variant.name in MAIN]


GRIDS = {
    "cpu": Grid(Budget(), 3),
    "full": Grid(Budget(train=4000, test=2000, batch=64, before=2000, after=1500, width=32), 5),
}


def rows_of(grid: str, task: str, seed: int, names: list[str], device: str, file: Path) -> int:
    """Train some variants of one task and seed, and append a row for each to the file."""
    torch.set_num_threads(1)
    for variant in VARIANTS:
        if variant.name not in names:
            continue
        place = torch.device(device)
        outcome = run(task, variant, seed, GRIDS[grid].budget, place)
        row: dict[str, Any] = {
            "task": task,
            "variant": variant.name,
            "seed": seed,
            "before": round(outcome.before, 3),
            "after": round(outcome.after, 3),
            "parameters": outcome.parameters,
            "seconds": round(outcome.seconds, 1),
        }
        if variant.name == "FDConv":
            row["edge_correlations"] = [round(value, 3) for value in edge_correlations(outcome.model, place)]
            if (task, seed) == ("pictures", 0):
                draw_maps(outcome.model, IMAGES / f"band-maps-{grid}.png", place)
        row["environment"] = environment(place)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
    return len(names)


def gains(rows: list[dict[str, Any]], task: str, variant: str) -> list[float]:
    """By seed, how much better than the plain net that saw the same data and batches."""
    of = {(row["variant"], row["seed"]): row["after"] for row in rows if row["task"] == task}
    seeds = sorted(seed for name, seed in of if name == variant and ("static", seed) in of)
    return [of[variant, seed] - of["static", seed] for seed in seeds]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: results, gains, cost, and correlations with edges."""
    facts = rows[-1]["environment"]
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"Measured on {facts['date']}: {facts['device']}, torch {facts['torch']}. Percent, mean and deviation over "
        f"{seeds} seeds; in brackets the gain over `static` of the same seed.",
        "",
        "| | " + " | ".join(tasks) + " | parameters | seconds of a training |",
        "|---|" + "---|" * (len(tasks) + 2),
    ]
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant.name]
        if not own:
            continue
        cells = []
        for task in tasks:
            values = [row["after"] for row in own if row["task"] == task]
            gain = gains(rows, task, variant.name)
            shown = f" ({spread(gain, signed=True)})" if gain and variant.name != "static" else ""
            cells.append(spread(values) + shown if values else "")
        ablated = [row for row in own if row["task"] == ABLATED[0]] or own
        cells += [f"{ablated[0]['parameters']:,}", f"{mean(row['seconds'] for row in ablated):.0f}"]
        lines.append(f"| {variant.name} | " + " | ".join(cells) + " |")
    lines += ["", f"Parameters and seconds are those of `{ABLATED[0]}`.", ""]
    lines += [
        "| maps of | correlation with edges: above 1/4 | 1/8 to 1/4 | 1/16 to 1/8 cycles a pixel |",
        "|---|---|---|---|",
    ]
    for task in tasks:
        found = [row["edge_correlations"] for row in rows if row["task"] == task and "edge_correlations" in row]
        if found:
            lines.append(f"| {task} | " + " | ".join(_signed(list(band)) for band in zip(*found, strict=True)) + " |")
    return "\n".join(lines) + "\n"


def _signed(values: list[float]) -> str:
    return f"{mean(values):+.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The gain of every variant, a dot for each seed and a bar at the mean."""
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    names = [variant.name for variant in VARIANTS[1:] if any(row["variant"] == variant.name for row in rows)]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        for height, name in enumerate(reversed(names)):
            gain = gains(rows, task, name)
            axes.plot(gain, [height] * len(gain), "o", color="tab:blue", alpha=0.5, markersize=5)
            if gain:
                axes.plot([mean(gain)], [height], "|", color="black", markersize=14, markeredgewidth=2)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_yticks(range(len(names)), list(reversed(names)))
        axes.set_title(task)
        axes.set_xlabel("points over static")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def report(grid: str, file: Path) -> None:
    """Write table and plot."""
    order = [variant.name for variant in VARIANTS]
    rows = sorted(
        read(file), key=lambda row: (list(TASKS).index(row["task"]), order.index(row["variant"]), row["seed"])
    )
    file.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    plot(rows, IMAGES / f"accuracy-{grid}.png")


def main() -> None:
    """Train what has not been trained, and report."""
    from rich.progress import Progress

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=list(GRIDS), default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="tasks and variants whose `TASK, VARIANT` contains this")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time, each on one thread")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--report", action="store_true", help="train nothing, write table and plots")
    options = parser.parse_args()
    grid, file = GRIDS[options.grid], options.output / f"accuracy-{options.grid}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["task"], row["variant"], row["seed"]) for row in read(file)}
    wanted: dict[tuple[int, str], list[str]] = {}
    for seed in range(grid.seeds):
        for task in TASKS:
            for variant in grid.variants(task):
                key = (task, variant.name, seed)
                if options.only in f"{task}, {variant.name}" and key not in done and not options.report:
                    wanted.setdefault((seed, task), []).append(variant.name)
    with ProcessPoolExecutor(options.processes) as pool, Progress() as progress:
        bar = progress.add_task("trainings", total=sum(map(len, wanted.values())))
        jobs = [
            pool.submit(rows_of, options.grid, task, seed, names, options.device, file)
            for (seed, task), names in wanted.items()
        ]
        for job in as_completed(jobs):
            progress.advance(bar, job.result())
    if read(file):
        report(options.grid, file)
        print(f"see {file.with_suffix('.md')} and {IMAGES / f'accuracy-{options.grid}.png'}")


if __name__ == "__main__":
    main()

"""Whether a converted, really pretrained net learns as well as its plain twin, in anybody's training loop.

    python -m benchmarks.pretrained [--quick] [--device cpu|cuda] [--rows TEXT ...] [--nets TEXT] [--seeds N]
                                    [--steps N] [--processes N] [--cache FOLDER] [--output FOLDER] [--check] [--report]

Nets with pretrained weights segment glyphs that are pasted on photographs. Two stages are frozen, the head is warmed up
alone, and then every row takes the same steps on the same batches, with one AdamW that is set for the plain net and
told nothing of the conversion. Tested are glyphs that no scene to train on has, in the styles trained on and in one
that was not. Art and weights are downloaded once (npm, pip and, where there is one, apt-get) into `--cache`.

The grid of a CPU takes about an hour on two cores; that of a GPU has larger nets, scenes, and five seeds, and has not
been run yet. What is done already is not done again, so a run that was stopped goes on where it was. `--quick` tries
everything on drawn shapes in a minute, without downloads. Writes `benchmarks/results/pretrained-GRID.jsonl` (a line a
training) and `.md`.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..lines import read
from ..timing import RESULTS
from .art import material
from .grids import GRIDS, ROWS, Grid, Net, unknown_settings
from .nets import check
from .report import report
from .training import pretrained_stages, rows_of


def main(arguments: list[str] | None = None) -> None:
    """Train what has not been trained, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps on drawn shapes; nothing is downloaded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", default=[""], help="rows of this name, or else whose name contains this")
    parser.add_argument("--nets", default="", help="nets whose name contains this")
    parser.add_argument("--seeds", type=int, help="how many; else those of the grid")
    parser.add_argument("--steps", type=int, help="for all nets; goes to a file of its own")
    parser.add_argument("--processes", type=int, help="trainings at a time, each on one thread; 2, on a GPU 4")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "fdsurgery-bench")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--check", action="store_true", help="fetch, show what the weights see in photographs, and stop"
    )
    parser.add_argument("--report", action="store_true", help="train nothing, write the table")
    options = parser.parse_args(arguments)

    name = "quick" if options.quick else torch.device(options.device).type
    grid = GRIDS[name]
    if options.steps is not None:
        name += f"-{options.steps}-steps"
        grid = replace(grid, nets=tuple(replace(net, steps=options.steps) for net in grid.nets))
    if options.processes is None:
        options.processes = 4 if options.device.startswith("cuda") else 2
    file = options.output / f"pretrained-{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not options.report:
        nets = [net for net in grid.nets if options.nets in net.name]
        seeds = range(grid.seeds if options.seeds is None else options.seeds)
        _prepare(grid, nets, options)
        if options.check:
            return
        _train(grid, _wanted(nets, seeds, options.rows, read(file)), options, file)
    if read(file):
        report(grid, file)
        print(f"see {file.with_suffix('.md')}")


def _prepare(grid: Grid, nets: list[Net], options: argparse.Namespace) -> None:
    """Fetch and make once what all processes read."""
    if not grid.downloads:
        return
    material(options.cache)
    for net in nets:
        if net.family == "lite":
            print(net.name, "sees", check(net.variant, options.cache))
        pretrained_stages(grid, net, options.cache, torch.device(options.device))


def _wanted(
    nets: list[Net], seeds: range, texts: list[str], lines: list[dict[str, Any]]
) -> dict[tuple[int, Net], list[str]]:
    """The rows to train, by seed and net."""
    for row in ROWS:
        if unknown := unknown_settings(row):
            print(f"left out: {row.name}: the installed {row.operator} has no {', '.join(unknown)}")
    done = {(line["net"], line["row"], line["seed"]) for line in lines}
    wanted: dict[tuple[int, Net], list[str]] = {}
    for net in nets:  # those that take longest first
        for seed in seeds:
            for row in ROWS:
                asked = any(_means(text, row.name) for text in texts)
                if (
                    asked
                    and row.name not in net.without
                    and not unknown_settings(row)
                    and (net.name, row.name, seed) not in done
                ):
                    wanted.setdefault((seed, net), []).append(row.name)
    return wanted


def _means(text: str, name: str) -> bool:
    """Whether what was asked for is this row."""
    return text == name if any(text == row.name for row in ROWS) else text in name


def _train(grid: Grid, wanted: dict[tuple[int, Net], list[str]], options: argparse.Namespace, file: Path) -> None:
    before, total = len(read(file)), sum(map(len, wanted.values()))
    # Not forked, for CUDA would not bear it.
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool, Progress() as progress:
        bar = progress.add_task("trainings", total=total)
        jobs = [
            pool.submit(rows_of, grid, net, seed, names, options.device, options.cache, file)
            for (seed, net), names in wanted.items()
        ]
        while jobs:
            finished, waiting = wait(jobs, timeout=2)
            progress.update(bar, completed=len(read(file)) - before)
            for job in finished:
                job.result()
            jobs = list(waiting)


if __name__ == "__main__":
    main()

"""Times single layers as batch, image size and channels grow: static, the textbook path and ours, in one run.

    python -m benchmarks.layer [--device cpu|cuda] [--dtype float32|bfloat16] [--compiled] [--seconds S]

Writes `benchmarks/results/layer-DEVICE.json` and `.md`, and the plot `docs/images/layer-DEVICE.png`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fdconv import FDConv2d, FDLinear

from .plain import make_plain_
from .timing import PLOTS, call_of, environment, interleaved, turns_of, write

KINDS = ("3x3 convolution", "1x1 convolution", "linear")
MODES = ("inference", "training")
AXES: dict[str, list[tuple[int, int, int]]] = {
    "batch": [(batch, 256, 14) for batch in (1, 2, 4, 8, 16, 32)],
    "image size": [(2, 256, size) for size in (7, 14, 28, 56, 112)],
    "channels": [(2, channels, 14) for channels in (32, 64, 128, 256, 512, 1024)],
}
"""Batch, channels and image size along each axis."""


def layers(kind: str, channels: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> dict[str, nn.Module]:
    """The static layer and its dynamic twins."""
    static: nn.Module
    if kind == "linear":
        static = nn.Linear(channels, channels)
        ours: nn.Module = FDLinear.from_linear(static)
    else:
        size = int(kind[0])
        static = nn.Conv2d(channels, channels, size, padding=size // 2)
        ours = FDConv2d.from_conv(static)
    made = {"static": static, "plain": make_plain_(copy.deepcopy(ours)), "ours": ours}
    made = {name: layer.to(device, dtype) for name, layer in made.items()}
    if compiled:
        made["ours compiled"] = torch.compile(copy.deepcopy(made["ours"]))  # type: ignore[assignment]
    return made


def calls(
    kind: str, point: tuple[int, int, int], mode: str, device: torch.device, dtype: torch.dtype, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """What is timed at one point of an axis."""
    batch, channels, size = point
    shape = (batch, size * size, channels) if kind == "linear" else (batch, channels, size, size)
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=mode == "training")
    made = layers(kind, channels, device, dtype, compiled)
    return {name: call_of(layer, x, mode) for name, layer in made.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds with ratios to static, as Markdown."""
    names = list(rows[0]["milliseconds"])
    lines = ["| layer | mode | batch | channels | size | " + " | ".join(names) + " |"]
    lines += ["|---|---|---|---|---|" + "---|" * len(names)]
    for row in rows:
        base = row["milliseconds"]["static"]
        cells = [f"{row['milliseconds'][name]:.2f} ms ({row['milliseconds'][name] / base:.1f})" for name in names]
        lines.append("| " + " | ".join(map(str, [row["kind"], row["mode"], *row["point"], *cells])) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], device: torch.device) -> None:
    """Draw milliseconds against each axis, a line a variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [(kind, mode) for kind in KINDS for mode in MODES]
    figure, grid = pyplot.subplots(len(cases), len(AXES), figsize=(11, 2.4 * len(cases)), constrained_layout=True)
    for line, (kind, mode) in zip(grid, cases, strict=True):
        for axes, (axis, points) in zip(line, AXES.items(), strict=True):
            position = list(AXES).index(axis)
            own = [row for row in rows if (row["kind"], row["mode"], row["axis"]) == (kind, mode, axis)]
            values = [point[(0, 2, 1)[position]] for point in points]
            for name in own[0]["milliseconds"]:
                axes.plot(values, [row["milliseconds"][name] for row in own], marker="o", markersize=3, label=name)
            axes.set(xscale="log", yscale="log", xlabel=axis, title=f"{kind}, {mode}")
            axes.set_xticks(values, [str(value) for value in values])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        line[0].set_ylabel("ms")
    grid[0][0].legend()
    facts = environment(device)
    figure.suptitle(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}")
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / f"layer-{device.type}.png", dpi=80)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compiled", action="store_true", help="ours compiled too")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for a point")
    options = parser.parse_args()
    from rich.progress import track

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    todo = [(k, m, axis, point) for k in KINDS for m in MODES for axis, points in AXES.items() for point in points]
    rows = []
    for kind, mode, axis, point in track(todo, "points"):
        own = calls(kind, point, mode, device, dtype, options.compiled)
        times = interleaved(turns_of(own, device), options.seconds)
        rows.append({"kind": kind, "mode": mode, "axis": axis, "point": point, "milliseconds": times})
        write("layer", device, rows, table(rows))
    plot(rows, device)


if __name__ == "__main__":
    main()

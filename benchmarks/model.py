"""Times whole models: static, the textbook path, ours, ours compiled, and another implementation, in one run.

    python -m benchmarks.model [--rows TEXT] [--device cpu|cuda] [--dtype float32|bfloat16] [--compiled]
                               [--peer FDConv.py] [--seconds S] [--memory]

All variants of a row are run in turns, and what is reported is the median and its ratio to static. `--peer` takes
the file `FDConv.py` of a checkout of the public code. `--memory` measures the peak of each variant in a process of its
own.
Writes `benchmarks/results/model-DEVICE.json` and `.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import fdsurgery

from .peer import convert_to_peer_, load_peer
from .plain import make_plain_
from .timing import call_of, interleaved, peak_memory, write

CPU_ROWS = [
    ("resnet50", 1, (224, 224), "inference"),
    ("resnet50", 8, (224, 224), "inference"),
    ("resnet50", 2, (512, 512), "inference"),
    ("resnet50", 8, (224, 224), "training"),
    ("resnet50", 2, (512, 512), "training"),
    ("convnext_tiny", 8, (224, 224), "inference"),
    ("swin_tiny_patch4_window7_224", 8, (224, 224), "inference"),
    ("segformer_b0", 2, (512, 512), "inference"),
]
GPU_ROWS = [
    ("resnet50", 1, (224, 224), "inference"),
    ("resnet50", 32, (224, 224), "inference"),
    ("resnet50", 2, (800, 1280), "inference"),
    ("resnet50", 8, (224, 224), "training"),
    ("resnet50", 32, (224, 224), "training"),
    ("convnext_tiny", 32, (224, 224), "inference"),
    ("convnext_tiny", 32, (224, 224), "training"),
    ("swin_tiny_patch4_window7_224", 32, (224, 224), "inference"),
    ("segformer_b0", 8, (512, 512), "inference"),
]
Row = tuple[str, int, tuple[int, int], str]


def label(row: Row) -> str:
    """`resnet50, 8 x 224x224, inference`."""
    name, batch, (height, width), mode = row
    return f"{name}, {batch} x {height}x{width}, {mode}"


def build(name: str) -> nn.Module:
    """A plain model with random weights."""
    if name == "segformer_b0":
        import transformers

        return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig())
    return timm.create_model(name)


def variants(row: Row, names: list[str], device: torch.device, peer: Any) -> dict[str, nn.Module]:
    """The models of a row by what is timed."""
    static = build(row[0])
    plan = fdsurgery.plan(static)
    ours = fdsurgery.apply(plan, copy.deepcopy(static))
    made: dict[str, Callable[[], Any]] = {
        "static": lambda: copy.deepcopy(static),
        "static compiled": lambda: torch.compile(copy.deepcopy(static)),
        "plain": lambda: make_plain_(copy.deepcopy(ours)),
        "ours": lambda: copy.deepcopy(ours),
        "ours compiled": lambda: torch.compile(copy.deepcopy(ours)),
        "peer": lambda: convert_to_peer_(copy.deepcopy(static), plan, peer),
    }
    return {name: made[name]().to(device) for name in names}


def calls(
    row: Row, models: dict[str, nn.Module], device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """What is timed, under autocast where the dtype is not float32."""
    _, batch, size, mode = row
    x = torch.randn(batch, 3, *size, device=device)

    def under_autocast(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.autocast(device.type, dtype):
                return call()

        return run

    plain = {name: call_of(model, x, mode) for name, model in models.items()}
    return plain if dtype == torch.float32 else {name: under_autocast(call) for name, call in plain.items()}


def measure(row: Row, names: list[str], options: argparse.Namespace, peer: Any) -> dict[str, Any]:
    """Milliseconds of every variant, and its ratio to static."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    convolutional = row[0] == "resnet50"
    own = [name for name in names if name != "peer" or convolutional]
    times = interleaved(calls(row, variants(row, own, device, peer), device, dtype), device, options.seconds)
    base = times.get("static compiled", times["static"]) if device.type == "cuda" else times["static"]
    result: dict[str, Any] = {"row": label(row), "dtype": options.dtype, "milliseconds": times}
    result["ratios"] = {name: time / base for name, time in times.items()}
    if options.memory:
        result["peak_mib"] = {name: _peak_in_process(row, name, options) for name in own}
    return result


def _peak_in_process(row: Row, name: str, options: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.model", "--peak", json.dumps([row, name])]
    command += ["--device", options.device, "--dtype", options.dtype]
    if options.peer:
        command += ["--peer", str(options.peer)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds with ratios to static, as Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    lines = ["| | dtype | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for row in rows:
        cells = []
        for name in names:
            time = row["milliseconds"].get(name)
            cell = "" if time is None else f"{time:,.0f} ms ({row['ratios'][name]:.2f})"
            if time is not None and "peak_mib" in row:
                cell += f", {row['peak_mib'][name]:,.0f} MiB"
            cells.append(cell)
        lines.append(f"| {row['row']} | {row['dtype']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="rows whose label contains this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compiled", action="store_true", help="compiled variants too")
    parser.add_argument("--peer", type=Path, help="FDConv.py of a checkout of the public code")
    parser.add_argument("--seconds", type=float, default=15, help="time for a row")
    parser.add_argument("--memory", action="store_true", help="peak memory of every variant")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    peer = load_peer(options.peer) if options.peer else None
    device = torch.device(options.device)
    if options.peak:
        (name, batch, size, mode), variant = json.loads(options.peak)
        row: Row = (name, batch, tuple(size), mode)
        dtype = getattr(torch, options.dtype)
        (call,) = calls(row, variants(row, [variant], device, peer), device, dtype).values()
        print(peak_memory(call, device))
        return
    names = ["static", "plain", "ours"]
    names += ["static compiled", "ours compiled"] if options.compiled else []
    names += ["peer"] if peer else []
    rows = []
    for row in CPU_ROWS if device.type == "cpu" else GPU_ROWS:
        if options.rows in label(row):
            rows.append(measure(row, names, options, peer))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            write("model", device, rows, table(rows))


if __name__ == "__main__":
    main()

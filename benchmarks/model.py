"""Times whole models: static, the textbook path, ours in its ways, and another implementation, in one run.

    python -m benchmarks.model [--rows TEXT] [--device cpu|cuda] [--dtype float32|bfloat16] [--compiled]
                               [--peer FDConv.py] [--seconds S]

Every variant of a row has a process of its own, for memory that one gives back makes the next slower. They run in
turns, and what is reported is the fastest, its ratio to static, and the peak of memory. `ours torch` is ours on a CPU
without compiled kernels, `ours prepared` what `fdsurgery.compile_for_inference` gives. `--peer` takes the file
`FDConv.py` of a checkout of the public code.
Writes `benchmarks/results/model-DEVICE.json` and `.md`.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import fdconv
import fdsurgery

from .peer import convert_to_peer_, load_peer
from .plain import make_plain_
from .timing import call_of, interleaved, peak_memory, turn, write

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


def make(row: Row, name: str, peer: Path | None, device: torch.device) -> nn.Module:
    """The model of a variant."""
    torch.manual_seed(0)
    model = build(row[0]).to(device)
    kind, _, way = name.partition(" ")
    if kind == "peer":
        assert peer is not None
        convert_to_peer_(model, fdsurgery.plan(model), load_peer(peer))
    elif kind != "static":
        model = fdsurgery.convert(model)
    if kind == "plain":
        make_plain_(model)
    if way == "torch":
        fdconv.set_backend("torch")
    if way == "prepared":
        return fdsurgery.compile_for_inference(model)
    return torch.compile(model) if way == "compiled" else model


class Variant:
    """A variant of a row in a process of its own."""

    def __init__(self, row: Row, name: str, options: argparse.Namespace) -> None:
        spawned = multiprocessing.get_context("spawn")
        self.process = ProcessPoolExecutor(1, spawned, _prepare, (row, name, options))

    def turn(self) -> float:
        """Milliseconds of one call."""
        return self.process.submit(_turn).result()

    def peak(self) -> float:
        """MiB, of all calls so far; on a CPU with all that the process holds."""
        return self.process.submit(_peak).result()


_prepared: dict[str, Any] = {}
"""What a variant's process calls, and where it runs."""


def _prepare(row: Row, name: str, options: argparse.Namespace) -> None:
    _, batch, size, mode = row
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = make(row, name, options.peer, device)
    call = call_of(model, torch.randn(batch, 3, *size, device=device), mode)

    def under_autocast() -> Any:
        with torch.autocast(device.type, dtype):
            return call()

    _prepared.update(call=call if dtype == torch.float32 else under_autocast, device=device)


def _turn() -> float:
    return turn(_prepared["call"], _prepared["device"])


def _peak() -> float:
    return peak_memory(_prepared["call"], _prepared["device"])


def measure(row: Row, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every variant, its ratio to static, and its peak of memory."""
    own = [name for name in names if name != "peer" or row[0] == "resnet50"]
    if row[3] == "training":
        own.remove("ours prepared")
    variants = {name: Variant(row, name, options) for name in own}
    times = interleaved({name: variant.turn for name, variant in variants.items()}, options.seconds)
    cuda = torch.device(options.device).type == "cuda"
    base = times.get("static compiled", times["static"]) if cuda else times["static"]
    result: dict[str, Any] = {"row": label(row), "dtype": options.dtype, "milliseconds": times}
    result["ratios"] = {name: time / base for name, time in times.items()}
    result["peak_mib"] = {name: variant.peak() for name, variant in variants.items()}
    for variant in variants.values():
        variant.process.shutdown()
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds with ratios to static, and peaks of memory, as Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row["milliseconds"]))
    lines = ["| | dtype | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for row in rows:
        cells = []
        for name in names:
            time = row["milliseconds"].get(name)
            peak = "" if time is None else f", {row['peak_mib'][name]:,.0f} MiB"
            cells.append("" if time is None else f"{time:,.0f} ms ({row['ratios'][name]:.2f}){peak}")
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
    options = parser.parse_args()
    device = torch.device(options.device)
    names = ["static", "plain", "ours", "ours prepared"]
    names += ["ours torch"] if device.type == "cpu" else []
    names += ["static compiled", "ours compiled"] if options.compiled else []
    names += ["peer"] if options.peer else []
    rows = []
    for row in CPU_ROWS if device.type == "cpu" else GPU_ROWS:
        if options.rows in label(row):
            rows.append(measure(row, names, options))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            write("model", device, rows, table(rows))


if __name__ == "__main__":
    main()

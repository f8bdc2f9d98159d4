"""Exports static and converted models to ONNX: size of the file, error and time in onnxruntime, CPU time of the export.

    python -m benchmarks.export [--model NAME ...] [--batch N] [--threads N] [--seconds S] [--results NAME]

Writes `benchmarks/results/export-cpu.json` and `.md`. Weights are random, the modulation included, and settled.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import torch
from torch import Tensor, nn

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdsurgery.verification import relative_error

from .timing import interleaved, turns_of, write


def resnet50() -> tuple[nn.Module, Tensor]:
    """timm's, and images of 224x224."""
    import timm

    return timm.create_model("resnet50"), torch.randn(4, 3, 224, 224)


def segformer_b0() -> tuple[nn.Module, Tensor]:
    """transformers' with 150 classes, and images of 512x512; at its own scale of weights, biases drown the signal."""
    import transformers

    config = transformers.SegformerConfig(num_labels=150, initializer_range=0.1)
    return transformers.SegformerForSemanticSegmentation(config), torch.randn(4, 3, 512, 512)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"segformer-b0": segformer_b0, "resnet50": resnet50}


@torch.no_grad()
def modulated_(model: nn.Module, x: Tensor, std: float = 0.02) -> nn.Module:
    """Move the modulation of every dynamic layer away from neutral, in place, and let statistics follow a batch."""
    for layer in model.modules():
        if isinstance(layer, (FDConv2d, FDLinear)):
            for name, parameter in layer.named_parameters():
                if name.startswith(("KSM", "FBM")):
                    parameter.add_(torch.randn_like(parameter), alpha=std)
    model.train()
    for _ in range(3):
        model(x)
    return model.eval()


def export(model: nn.Module, x: Tensor, path: Path, *, dynamic: bool) -> None:
    """As a user does, with the batch left open or not."""
    shapes = ({0: "batch"},) if dynamic else None
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)


def session(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The exported model as a function of its input, giving its first output."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in loaded.get_inputs())
    return lambda x: torch.from_numpy(numpy.asarray(loaded.run(None, {name: x.numpy()})[0]))


@torch.no_grad()
def measured(name: str, batch: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    """A row for the static model, and two for the converted one: with the batch left open, and fixed."""
    torch.manual_seed(0)
    static, x = MODELS[name]()
    fdsurgery.testing.settle_(static, x)
    converted = modulated_(fdsurgery.convert(copy.deepcopy(static)), x)
    x, rows, calls = x[:batch], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for label, model, dynamic in (
            ("static", static, True),
            ("converted", converted, True),
            ("converted, fixed batch", converted, False),
        ):
            path = Path(folder) / f"{label}.onnx"
            start = time.process_time()
            export(model, x if not dynamic else torch.cat([x, x]), path, dynamic=dynamic)
            taken = time.process_time() - start
            run = session(path, threads)
            expected = model(x)
            error = relative_error(run(x), getattr(expected, "logits", expected))
            calls[label] = lambda run=run: run(x)  # type: ignore[misc]
            size = path.stat().st_size / 2**20
            row = {"model": name, "size": x.shape[-1], "batch": batch, "file": label, "mib": size, "error": error}
            rows.append(row | {"export_s": taken})
            print(rows[-1], flush=True)
        calls["torch, static"] = lambda: static(x)
        calls["torch, converted"] = lambda: converted(x)
        times = interleaved(turns_of(calls, torch.device("cpu")), seconds)
    for row in rows:
        row["ms"] = times[row["file"]]
        row["torch_ms"] = times["torch, static" if row["file"] == "static" else "torch, converted"]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | file | MiB | error | onnxruntime | ratio | torch | export, CPU |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        static = next(other for other in rows if (other["model"], other["file"]) == (row["model"], "static"))
        lines.append(
            f"| {row['model']}, {row['size']}, batch {row['batch']} | {row['file']} | {row['mib']:.1f} | "
            f"{row['error']:.1e} | {row['ms']:.0f} ms | {row['ms'] / static['ms']:.1f} | {row['torch_ms']:.0f} ms | "
            f"{row['export_s']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Export, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; all of them by default")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="about how long to time each model")
    parser.add_argument("--results", default="export", metavar="NAME", help="of the files to write")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    for name in options.model or MODELS:
        found += measured(name, options.batch, options.threads, options.seconds)
        write(options.results, torch.device("cpu"), found, table(found))
    print(table(found), end="")


if __name__ == "__main__":
    main()

"""Converts six full-size models of five families in one line each and checks what the library promises of it.

    python benchmarks/conversion.py [--output FILE.json]

For each model, built with random weights that are settled first: swaps, parameters added, relative error of the outputs
after conversion, whether one training step gives every parameter a finite gradient, and the relative error of the saved
model's outputs in a fresh process. Under two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fdsurgery

MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm resnet50": lambda: timm.create_model("resnet50"),
    "timm convnext_tiny": lambda: timm.create_model("convnext_tiny"),
    "timm swin_tiny_patch4_window7_224": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    "timm vit_small_patch16_224": lambda: timm.create_model("vit_small_patch16_224"),
    "transformers SegformerForSemanticSegmentation": lambda: transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig()
    ),
    "transformers ConvNextV2ForImageClassification": lambda: transformers.ConvNextV2ForImageClassification(
        transformers.ConvNextV2Config()
    ),
}

LOAD_AND_RUN = """
import sys, torch, fdsurgery
torch.manual_seed(0)
folder, inputs, outputs = sys.argv[1:]
with torch.no_grad():
    result = fdsurgery.load(folder)(torch.load(inputs, weights_only=True))
torch.save(result if isinstance(result, torch.Tensor) else result.logits, outputs)
"""


@dataclass(frozen=True)
class Row:
    """What was measured of one model."""

    model: str
    recipe: str
    swaps: int
    parameters: int
    parameters_added: int
    error: float
    """Relative error of the outputs after conversion."""
    finite_gradients: bool
    """True if one training step gave every parameter a gradient without inf or NaN."""
    loaded_error: float
    """Relative error of the trained model's outputs, saved and loaded in a fresh process."""
    convert_seconds: float


def check(name: str, scratch: Path) -> Row:
    """Convert one model and measure."""
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(2, 3, 224, 224)
    fdsurgery.testing.settle_(model, x)
    before = copy.deepcopy(model)

    plan = fdsurgery.plan(model)
    start = time.perf_counter()
    fdsurgery.convert(model)
    seconds = time.perf_counter() - start
    error = fdsurgery.verify(before, model, x).relative_error

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    logits_of(model.train()(x)).square().mean().backward()
    finite = all(
        parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in model.parameters()
    )
    optimizer.step()

    torch.save(x, scratch / "x.pt")
    fdsurgery.save(model.eval(), scratch / "saved")
    arguments = [str(scratch / part) for part in ("saved", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, *arguments], check=True)
    with torch.no_grad():
        expected = logits_of(model(x))
    loaded = torch.load(scratch / "y.pt", weights_only=True)
    return Row(
        name,
        plan.recipe,
        len(plan.swaps),
        sum(parameter.numel() for parameter in before.parameters()),
        plan.parameters_added,
        error,
        finite,
        float((loaded - expected).norm() / expected.norm()),
        seconds,
    )


def logits_of(output: object) -> Tensor:
    """The tensor a model's output is about."""
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]


def main() -> None:
    """Check all models and print a table; exit 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the rows as JSON too")
    output = parser.parse_args().output
    console = Console()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in MODELS:
            with console.status(f"{name} ({len(rows) + 1} of {len(MODELS)})"):
                rows.append(check(name, Path(scratch)))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "recipe"):
        table.add_column(column, overflow="fold")
    for column in ("swaps", "parameters", "added", "error", "gradients", "error, loaded", "convert"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            row.recipe,
            str(row.swaps),
            f"{row.parameters:,}",
            f"+{row.parameters_added:,}",
            f"{row.error:.1e}",
            "finite" if row.finite_gradients else "NOT FINITE",
            f"{row.loaded_error:.1e}",
            f"{row.convert_seconds:.1f} s",
        )
    console.print(table)
    if output is not None:
        machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        output.write_text(json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    broken = [row.model for row in rows if row.error > 1e-5 or row.loaded_error > 1e-5 or not row.finite_gradients]
    if broken:
        sys.exit(f"promises broken for {', '.join(broken)}")


if __name__ == "__main__":
    main()

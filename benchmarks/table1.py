"""Compares dynamic operators where their papers place them: the FDConv paper's table 1, from one command.

    python -m benchmarks.table1 [--seconds S] [--size H W] [--rows TEXT] [--skip-timing]

Parameters and multiply-adds are counted on timm's ResNet-50, whose classifier the figures leave out, for one image of
800x1280, without memory; on torchvision's Faster R-CNN and Mask R-CNN the parameters once more, and time and memory of
one image over the static detector's, each variant in a process of its own. How like the kernels' frequency responses
are is seen after a short training of one layer, the same for all.
Writes `benchmarks/results/table1-cpu.json` and `.md`, and `docs/images/table1.svg`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fdsurgery
from fdsurgery.operators import operator_of
from fdsurgery.recipe import Recipe, parse_recipe
from fdsurgery.report import in_units

from .timing import PLOTS, call_of, interleaved, peak_memory, turn, write

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """An operator in one of its placements."""

    name: str
    recipe: str
    settings: dict[str, Any]
    paper_parameters: str
    """What the FDConv paper's table says is added, in millions."""
    paper_multiply_adds: str
    expected: int
    """Parameters that the placement adds to a ResNet-50 without classifier, by the operators' formulas."""
    why: str
    """Why the paper's figures are others, where they are."""


_MIXING = "the paper's figure is met by no rule that we tried; ours counts every product of mixing and of the heads"
ROWS = (
    Row("CondConv 8x", "condconv_resnet", {}, "+90.0", "+0.01", 89_981_000, _MIXING),
    Row("DY-Conv 4x", "dyconv_resnet", {}, "+75.3", "+0.16", 75_338_144, _MIXING),
    Row(
        *("DCD", "dcd_resnet", {}, "+4.3", "+0.13", 4_049_032),
        "the paper's +4.3 M holds a dynamic classifier of 228,992 (`dcd_resnet_classifier`); ours counts each layer "
        "the way that takes fewer products: the residual in the weight, or at each position",
    ),
    Row(
        "ODConv 1x",
        "odconv_resnet",
        {"kernels": 1},
        "",
        "",
        3_078_080,
        "not in the paper's table; gates are counted on weights or on maps, whichever are fewer",
    ),
    Row("ODConv 4x", "odconv_resnet", {"kernels": 4}, "+65.1", "+0.35", 65_113_856, _MIXING),
    Row("KW 1x", "kw_resnet", {"ratio": 1}, "+2.5", "", 2_495_278, "mixing takes every cell of a warehouse"),
    Row("KW 4x", "kw_resnet", {"ratio": 4}, "+76.5", "", 76_458_112, "mixing takes every cell of a warehouse"),
    Row(
        "FADC",
        "fadc_resnet",
        {},
        "",
        "",
        926_377,
        "not in the paper's table; low-passes are counted as matrix products",
    ),
    Row("FDConv", "resnet", {"norm": "batch"}, "+3.6", "+1.8", 3_647_120, "see the page on arithmetic"),
)

# Counts


def counted(row: Row, size: tuple[int, int]) -> dict[str, Any]:
    """Sites, parameters and multiply-adds that a placement adds to a ResNet-50."""
    with torch.device("meta"):
        model = timm.create_model("resnet50")
        plan = fdsurgery.plan(model, row.recipe, example_inputs=torch.empty(1, 3, *size), **row.settings)
    added: Counter[str] = Counter()
    for decision in plan.swaps:
        added.update(decision.multiply_adds_by_component)
    return {
        "sites": len(plan.swaps),
        "parameters": plan.parameters_added,
        "multiply_adds": plan.multiply_adds_added,
        "components": dict(added.most_common()),
        "plain_multiply_adds": plan.multiply_adds,
    }


def in_backbone(row: Row) -> Recipe:
    """A recipe for a detector whose backbone follows a row's recipe."""
    return parse_recipe(f"delegate: {{backbone.body: {row.recipe}}}")


def detector(name: str, row: Row | None) -> nn.Module:
    """One of torchvision's detectors with random weights, converted or not."""
    from torchvision.models import detection

    torch.manual_seed(0)
    model: nn.Module = getattr(detection, f"{name}_resnet50_fpn")(weights=None, weights_backbone=None).eval()
    return model if row is None else fdsurgery.convert(model, in_backbone(row), **row.settings)


# Time and memory, each variant in a process of its own


class Variant:
    """A detector in a process of its own."""

    def __init__(self, name: str, row: Row | None, size: tuple[int, int]) -> None:
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (name, row, size))

    def turn(self) -> float:
        """Milliseconds of one call."""
        return self.process.submit(_turn).result()

    def facts(self) -> tuple[int, float]:
        """Parameters of the detector, and the MiB that its process held at the peak."""
        return self.process.submit(_facts).result()


_prepared: dict[str, Any] = {}


def _prepare(name: str, row: Row | None, size: tuple[int, int]) -> None:
    model = detector(name, row)
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    _prepared.update(call=call_of(model, [image], "inference"), model=model)  # type: ignore[arg-type]


def _turn() -> float:
    return turn(_prepared["call"], CPU)


def _facts() -> tuple[int, float]:
    parameters = sum(parameter.numel() for parameter in _prepared["model"].parameters())
    return parameters, peak_memory(_prepared["call"], CPU)


def timed(name: str, rows: list[Row], size: tuple[int, int], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds, parameters and memory of the static detector and of each row's."""
    found = {}
    for row in rows:  # two processes at a time: nine detectors would not fit into a laptop's memory
        variants = {"static": Variant(name, None, size), row.name: Variant(name, row, size)}
        times = interleaved({key: variant.turn for key, variant in variants.items()}, seconds)
        facts = {key: variant.facts() for key, variant in variants.items()}
        for variant in variants.values():
            variant.process.shutdown()
        found[row.name] = {
            "static_milliseconds": times["static"],
            "milliseconds": times[row.name],
            "time_ratio": times[row.name] / times["static"],
            "parameters_added": facts[row.name][0] - facts["static"][0],
            "static_mebibytes": facts["static"][1],
            "mebibytes": facts[row.name][1],
        }
        print(f"{name}, {row.name}: {times[row.name] / times['static']:.2f} times static", flush=True)
    return found


# How like the kernels are


STEPS = 200
KINDS = 4
CHANNELS = 32


def task(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of four kinds, told apart by their means, and what four kernels make of them."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(32) % KINDS
    means = torch.randn(KINDS, CHANNELS, generator=generator)
    x = torch.randn(32, CHANNELS, 10, 10, generator=generator) * 0.5 + means[kinds][..., None, None]
    kernels = torch.randn(KINDS, CHANNELS, CHANNELS, 3, 3, generator=generator) / math.sqrt(9 * CHANNELS)
    y = torch.stack([F.conv2d(one, kernels[kind], padding=1) for one, kind in zip(x, kinds, strict=True)])
    return x, y / y.std()


def trained(row: Row | None, seed: int) -> tuple[nn.Module, float, float]:
    """One layer after the training, its first loss, and its last."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Identity())
    x, y = task(seed)
    if row is not None:
        operator = "fdconv" if row.recipe == "resnet" else first_operator(row.recipe)
        recipe = parse_recipe(f"swap: [{{where: {{kind: conv}}, operator: {operator}}}]")
        fdsurgery.convert(net, recipe, example_inputs=x, **row.settings)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    losses = []
    for _ in range(STEPS):
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return net[0], losses[0], losses[-1]


def first_operator(recipe: str) -> str:
    """The operator of a shipped recipe's first rule."""
    return fdsurgery.load_recipe(recipe).swap[0].operator


def likeness(kernels: Tensor) -> float:
    """Mean cosine between the magnitudes of the kernels' frequency responses, over all pairs of kernels.

    The response is that of the kernels laid out as one image, `(C_out*k_h, C_in*k_w)`.
    """
    images = kernels.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
    responses = F.normalize(torch.fft.rfft2(images.double()).abs().flatten(1), dim=1)
    cosines = responses @ responses.T
    count = len(kernels)
    return float((cosines.sum() - cosines.trace()) / (count * (count - 1)))


def similarity(rows: list[Row], seeds: int) -> dict[str, dict[str, Any]]:
    """Of each row: the losses of the seeds, and how like the kernels and the samples' weights are at the end."""
    found: dict[str, dict[str, Any]] = {}
    for row in (None, *rows):
        own: dict[str, Any] = {"first": [], "last": [], "kernels": [], "samples": []}
        for seed in range(seeds):
            layer, first, last = trained(row, seed)
            own["first"].append(first)
            own["last"].append(last)
            operator = operator_of(layer)
            if operator is None:
                continue
            if (kernels := operator.kernels(layer)) is not None:
                own["kernels"].append(likeness(kernels))
            if hasattr(layer, "sample_weights"):
                with torch.no_grad():
                    own["samples"].append(likeness(layer.sample_weights(task(seed)[0])))
        found["static" if row is None else row.name] = own
    return found


# What is written


def _millions(count: int) -> str:
    return f"+{count:,}"


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    return f"{mean:.3f} ± {deviation:.3f}"


def table(
    rows: list[Row],
    counts: dict[str, dict[str, Any]],
    times: dict[str, dict[str, dict[str, float]]],
    alike: dict[str, dict[str, Any]],
    size: tuple[int, int],
) -> str:
    """All of it as Markdown."""
    lines = [
        f"| operator | sites | parameters | paper, M | multiply-adds at {size[0]}x{size[1]} | paper, G | of these |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        own = counts[row.name]
        parts = ", ".join(f"{in_units(count)} {name.replace('_', ' ')}" for name, count in own["components"].items())
        lines.append(
            f"| {row.name} | {own['sites']} | {_millions(own['parameters'])} | {row.paper_parameters} | "
            f"+{in_units(own['multiply_adds'])} | {row.paper_multiply_adds} | {parts} |"
        )
    lines += ["", *(f"- {row.name}: {row.why}." for row in rows), ""]
    if times:
        lines += ["| operator | " + " | ".join(f"{name}: parameters | time | memory" for name in times) + " |"]
        lines += ["|---|" + "---:|---:|---:|" * len(times)]
        for row in rows:
            cells = []
            for by_row in times.values():
                one = by_row[row.name]
                cells.append(
                    f"{_millions(int(one['parameters_added']))} | {one['time_ratio']:.2f} | "
                    f"{one['mebibytes'] / one['static_mebibytes']:.2f}"
                )
            lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "| operator | loss after 200 steps | likeness of kernels | likeness of samples' weights |",
        "|---|---:|---:|---:|",
    ]
    for name, own in alike.items():
        lines.append(f"| {name} | {_mean(own['last'])} | {_mean(own['kernels'])} | {_mean(own['samples'])} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], counts: dict[str, dict[str, Any]], alike: dict[str, dict[str, Any]]) -> None:
    """Parameters, multiply-adds and likeness side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [row.name for row in rows]
    values = {
        "parameters added, M": [counts[name]["parameters"] / 1e6 for name in names],
        "multiply-adds added, G": [counts[name]["multiply_adds"] / 1e9 for name in names],
        "likeness of kernels' responses": [
            sum(alike[name]["kernels"]) / len(alike[name]["kernels"]) if alike[name]["kernels"] else 0 for name in names
        ],
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, (title, heights) in zip(axes, values.items(), strict=True):
        axis.barh(names, heights, color="#3f51b5")
        axis.set_title(title, fontsize=10)
        for at, height in enumerate(heights):
            axis.text(height, at, f" {height:.3g}" if height else " -", va="center", fontsize=8)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(PLOTS / "table1.svg")


def main() -> None:
    """Count, time, train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose name has it")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1280), metavar=("H", "W"))
    parser.add_argument("--seconds", type=float, default=10, help="of timing for each pair")
    parser.add_argument("--seeds", type=int, default=3, help="of the short training")
    parser.add_argument("--skip-timing", action="store_true", help="only count, and train the one layer")
    options = parser.parse_args()
    size = (options.size[0], options.size[1])
    rows = [row for row in ROWS if options.rows in row.name]
    counts = {row.name: counted(row, size) for row in rows}
    for row in rows:
        if counts[row.name]["parameters"] != row.expected:
            raise SystemExit(f"{row.name} adds {counts[row.name]['parameters']:,}, and not {row.expected:,} parameters")
    alike = similarity(rows, options.seeds)
    times = {}
    if not options.skip_timing:
        times = {name: timed(name, rows, size, options.seconds) for name in ("fasterrcnn", "maskrcnn")}
    text = table(rows, counts, times, alike, size)
    print(text)
    if options.rows:
        return
    results = {"counts": counts, "detectors": times, "one layer": alike}
    write("table1", CPU, [results], text)
    draw(rows, counts, alike)


if __name__ == "__main__":
    main()

"""Tells where the arithmetic of a converted model goes: multiply-adds for one image, by component. Nothing is computed.

    python -m benchmarks.flops [--model SPEC] [--size H W ...] [--peer FDConv.py] [--output STEM]

With the authors' layers, from a checkout of theirs, torch counts those too, in the same places. Writes
`benchmarks/results/flops.json` and `.md`, or others of that stem.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fdsurgery
from fdsurgery.report import in_units
from fdsurgery.saving.source import build

from .peer import convert_to_peer_, load_peer

STEM = Path(__file__).parent / "results" / "flops"
COMPONENTS = {
    "heads": "attention heads",
    "spectrum": "scaling the spectra",
    "inverse_transform": "inverse transform of the weights",
    "local": "taps of the local branch",
    "products": "weights times their factors",
    "band_maps": "band maps, 3x3",
    "band_transforms": "low-passes, by matrix products",
    "band_products": "low-passes times their maps",
}


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of a model at one image size."""

    size: tuple[int, int]
    plain: int
    """All convolutions and linear layers of the plain model."""
    swapped: int
    """Those of them that are swapped."""
    added: dict[str, int]
    """What the swaps add, by component."""
    low_passes_by_fourier: int
    """What `band_transforms` would be by Fourier transforms, which `band_mask: interpolated` takes."""
    peer: dict[str, int]
    """What the authors' layers add in the same places, of the kinds that torch counts; empty without them."""


def costs(model: nn.Module, size: tuple[int, int], peer: Any = None) -> Costs:
    """Plan the conversion of a model on meta for one image of that size."""
    image = torch.empty(1, 3, *size, device="meta")
    plan = fdsurgery.plan(model, example_inputs=image)
    by_fourier = fdsurgery.plan(model, example_inputs=image, band_mask="interpolated")
    return Costs(
        size,
        plan.multiply_adds,
        sum(decision.site.multiply_adds for decision in plan.swaps),
        dict(_added(plan)),
        _added(by_fourier)["band_transforms"],
        {} if peer is None else _peer_added(model, image, plan, peer),
    )


def _added(plan: fdsurgery.Plan) -> Counter[str]:
    total: Counter[str] = Counter()
    for decision in plan.swaps:
        total.update(decision.multiply_adds_by_component)
    return total


def _peer_added(model: nn.Module, image: Tensor, plan: fdsurgery.Plan, peer: Any) -> dict[str, int]:
    with torch.device("meta"):
        converted = convert_to_peer_(copy.deepcopy(model), plan, peer)
    before, after = _counted(model, image), _counted(converted, image)
    return {kind: after[kind] - before[kind] for kind in after}


def _counted(model: nn.Module, image: Tensor) -> Counter[str]:
    """Multiply-adds as torch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        model.eval()(image)
    found: Counter[str] = Counter()
    for operator, flops in mode.get_flop_counts()["Global"].items():
        found["Fourier transforms" if "_fft_" in str(operator) else "convolutions and linear maps"] += flops // 2
    return found


def table(model: str, found: list[Costs]) -> str:
    """Multiply-adds and their share of the plain model's, as Markdown."""
    rows: dict[str, list[int]] = {
        "convolutions and linear layers of the plain model": [one.plain for one in found],
        "of these, swapped": [one.swapped for one in found],
        **{words: [one.added[name] for one in found] for name, words in COMPONENTS.items()},
        "**added**": [sum(one.added.values()) for one in found],
        "low-passes, if by Fourier transforms": [one.low_passes_by_fourier for one in found],
        **{f"added by the authors' layers: {kind}": [one.peer[kind] for one in found] for kind in found[0].peer},
    }
    lines = [
        f"| `{model}`, one image | " + " | ".join(f"{one.size[0]}x{one.size[1]} | share" for one in found) + " |",
        "|---|" + "---:|---:|" * len(found),
    ]
    for words, counts in rows.items():
        cells = [f"{in_units(count)} | {count / one.plain:.1%}" for count, one in zip(counts, found, strict=True)]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm:resnet50", metavar="SPEC", help="as for `fdsurgery plan`")
    parser.add_argument("--size", type=int, nargs=2, action="append", metavar=("H", "W"), help="may be repeated")
    parser.add_argument("--peer", type=Path, metavar="FILE", help="the authors' FDConv.py")
    parser.add_argument("--output", type=Path, default=STEM, metavar="STEM", help="files to write, without the ending")
    options = parser.parse_args()
    with torch.device("meta"):
        model, _ = build(options.model, pretrained=False)
    peer = None if options.peer is None else load_peer(options.peer)
    found = [costs(model, (height, width), peer) for height, width in options.size or [(224, 224), (800, 1280)]]
    text = table(options.model, found)
    content = {"model": options.model, "costs": [asdict(one) for one in found]}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()

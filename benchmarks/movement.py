"""Tells how far a few steps of AdamW move the gates of a fresh layer, by its width.

    python -m benchmarks.movement [--steps N] [--lr LR] [--output STEM]

A 3x3 layer of `C` channels in and 16 out learns to give targets drawn at random, from normal inputs of that deviation,
or from these behind a ReLU, where the weights of a logit are all pushed the same way. For each kind of gate the
table has the mean `|gate - 1|` after one step, and the most after all. `paper` is the parametrisation of the authors'
code, `isometric` ours. Writes `benchmarks/results/movement.json` and `.md`, or others of that stem.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv import FDConfig, FDConv2d
from fdconv.bands import BandModulation
from fdconv.modulation import gate
from fdconv.reference import local_gate

STEM = Path(__file__).parent / "results" / "movement"
WIDTHS = (3, 16, 32, 48, 96, 192, 480, 1024, 2048)
DEVIATIONS = (1.0, 3.0)
GATES = ("channel", "filter", "spatial", "kernel", "local", "bands")


@dataclass(frozen=True)
class Movement:
    """How far the gates of a layer moved."""

    spectrum: str
    channels: int
    inputs: str
    deviation: float
    weight: float
    """Relative movement of the static weight after one step; a plain layer's in the same place is `weight_plain`."""
    weight_plain: float
    first: dict[str, float]
    """Mean `|gate - 1|` after one step, by kind."""
    most: dict[str, float]
    """Largest `|gate - 1|` after all steps, by kind."""


@torch.no_grad()
def gates(layer: FDConv2d, x: Tensor) -> dict[str, Tensor]:
    """The gates that a layer gives an input, by kind."""
    factors = layer._factors(layer._context(x))
    found = {name: getattr(factors, name) for name in GATES[:4]}
    found["local"] = local_gate(factors, layer._weight_shape())
    assert isinstance(layer.FBM, BandModulation)
    weight, bias = layer.FBM.logits_of()
    found["bands"] = gate(F.conv2d(x, weight, bias, padding=1), layer.config.band_activation)
    return found


def drawn(inputs: str, deviation: float, channels: int) -> Tensor:
    """A batch of inputs of that deviation."""
    x = torch.randn(2, channels, 12, 12)
    return deviation * (x if inputs == "normal" else F.relu(x))


def movement(spectrum: str, channels: int, inputs: str, deviation: float, steps: int, lr: float) -> Movement:
    """Train a fresh layer and its plain twin for some steps, and look at its gates."""
    torch.manual_seed(channels)
    x, target = drawn(inputs, deviation, channels), torch.randn(2, 16, 12, 12)
    plain = nn.Conv2d(channels, 16, 3, padding=1)
    layer = FDConv2d.from_conv(plain, FDConfig(spectrum=spectrum)).train()  # type: ignore[arg-type]
    before = plain.weight.detach().clone()
    models = [(one, torch.optim.AdamW(one.parameters(), lr=lr)) for one in (layer, plain)]
    first: dict[str, float] = {}
    moved: list[float] = []
    for step in range(steps):
        for model, optimizer in models:
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
        if step == 0:
            first = {name: float((one - 1).abs().mean()) for name, one in gates(layer, x).items()}
            weights = (layer.to_conv().weight, plain.weight)
            moved = [float((weight.detach() - before).norm() / before.norm()) for weight in weights]
    most = {name: float((one - 1).abs().max()) for name, one in gates(layer, x).items()}
    return Movement(spectrum, channels, inputs, deviation, moved[0], moved[1], first, most)


def table(found: list[Movement]) -> str:
    """All movements, as Markdown."""
    lines = [
        "| parametrisation | channels | inputs | weight, of the plain one's | "
        + " | ".join(f"{name}: first, most" for name in GATES)
        + " |",
        "|---|---:|---|---:|" + "---:|" * len(GATES),
    ]
    for one in found:
        cells = [f"{one.first[name]:.3f}, {one.most[name]:.2f}" for name in GATES]
        lines.append(
            f"| {one.spectrum} | {one.channels} | {one.inputs}, {one.deviation:g} | {one.weight / one.weight_plain:.2f}"
            f" | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=STEM, metavar="STEM", help="files to write, without the ending")
    options = parser.parse_args()
    found = [
        movement(spectrum, channels, inputs, deviation, options.steps, options.lr)
        for spectrum in ("paper", "isometric")
        for inputs in ("normal", "rectified")
        for deviation in DEVIATIONS
        for channels in WIDTHS
    ]
    text = table(found)
    content = {"steps": options.steps, "lr": options.lr, "movements": [asdict(one) for one in found]}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()

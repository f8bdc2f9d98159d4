"""Times band modulation as maps grow: by Fourier transforms, by our matrix products, and the floor of a copy.

    python -m benchmarks.bands [--device cpu|cuda] [--dtype float32|bfloat16] [--seconds S]

`fft` is the textbook form (`benchmarks/plain.py`), `floor` a copy of the map and the 3x3 convolution with one output a
map, which no form can do without, and `layer` a whole FDConv2d of 3x3 with as many outputs as inputs. Peak memory is
that of one call above what there was before it. Writes `benchmarks/results/bands-DEVICE.json` and `.md`, and the plot
`docs/images/bands-DEVICE.png`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv import FDConfig, FDConv2d
from fdconv.bands import BandModulation

from .plain import band_modulated
from .timing import PLOTS, added_memory, environment, interleaved, turns_of, write

MODES = ("inference", "training")
POINTS: list[tuple[int, int, int, int]] = [
    (1, 512, 7, 7),
    (8, 512, 7, 7),
    (8, 2048, 7, 7),
    (1, 256, 14, 14),
    (8, 256, 14, 14),
    (8, 1024, 14, 14),
    (1, 128, 28, 28),
    (8, 128, 28, 28),
    (2, 256, 31, 31),
    (2, 256, 32, 32),
    (1, 64, 56, 56),
    (8, 64, 56, 56),
    (2, 256, 56, 56),
    (2, 128, 61, 61),
    (2, 128, 64, 64),
    (2, 64, 97, 97),
    (2, 64, 112, 112),
    (2, 64, 128, 128),
    (1, 64, 200, 334),
    (1, 256, 200, 334),
    (1, 64, 256, 256),
    (1, 64, 400, 400),
]
"""Batch, channels, height and width."""
WIDEST = 1024
"""Channels up to which the whole layer is timed."""


def calls(point: tuple[int, int, int, int], mode: str, place: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is timed at a point."""
    channels = point[1]
    bands = BandModulation(channels, FDConfig(), device=place["device"])
    for parameter in bands.parameters():
        nn.init.normal_(parameter, std=0.05)
    x = torch.randn(point, **place)
    weight = torch.cat([conv.weight for conv in bands.freq_weight_conv_list]).detach()  # type: ignore[misc]
    weight = weight.to(x.dtype).requires_grad_()

    def floor(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), F.conv2d(x, weight, padding=1)

    forms: dict[str, Callable[[Tensor], Any]] = {
        "floor": floor,
        "fft": lambda x: band_modulated(bands, x.float()).to(x.dtype),
        "ours": bands,
    }
    if channels <= WIDEST:
        forms["layer"] = FDConv2d(channels, channels, 3, padding=1, **place)
    return {name: _inference(form, x) if mode == "inference" else _training(form, x) for name, form in forms.items()}


def _inference(form: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    def infer() -> Any:
        with torch.inference_mode():
            return form(x)

    return infer


def _training(form: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    above: list[Tensor] = []

    def step() -> None:
        own = x.detach().requires_grad_()
        y = form(own)
        outputs = y if isinstance(y, tuple) else (y,)
        if not above:
            above.extend(torch.randn_like(output) for output in outputs)
        torch.autograd.backward(outputs, above)

    return step


def measure(point: tuple[int, int, int, int], mode: str, place: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Milliseconds and peak memory of every form at a point."""
    todo = calls(point, mode, place)
    times = interleaved(turns_of(todo, place["device"]), seconds)
    memory = {name: added_memory(call, place["device"]) for name, call in todo.items()}
    return {"point": point, "mode": mode, "milliseconds": times, "added_mib": memory}


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds and memory, how many times faster ours is than by transforms, and what it is of its layer."""
    head = ["maps", "mode", "floor", "fft", "ours", "fft / ours", "ours / floor", "share of the layer"]
    head += ["added MiB, fft", "added MiB, ours"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        floor, fft, ours = (row["milliseconds"][name] for name in ("floor", "fft", "ours"))
        batch, channels, height, width = row["point"]
        cells = [f"{batch} x {channels} x {height}x{width}", row["mode"]]
        cells += [f"{floor:.2f} ms", f"{fft:.2f} ms", f"{ours:.2f} ms", f"{fft / ours:.1f}", f"{ours / floor:.1f}"]
        cells += [f"{ours / row['milliseconds']['layer']:.0%}" if "layer" in row["milliseconds"] else ""]
        cells += [f"{row['added_mib'][name]:.1f}" for name in ("fft", "ours")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], device: torch.device) -> None:
    """Draw nanoseconds an element against the size of the map."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, pair = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True, sharey=True)
    for axes, mode in zip(pair, MODES, strict=True):
        own = [row for row in rows if row["mode"] == mode]
        for name in ("floor", "fft", "ours"):
            sizes, costs = [], []
            for row in own:
                batch, channels, height, width = row["point"]
                sizes.append((height * width) ** 0.5)
                costs.append(row["milliseconds"][name] * 1e6 / (batch * channels * height * width))
            axes.plot(sizes, costs, marker="o", markersize=4, linestyle="", label=name)
        axes.set(xscale="log", yscale="log", xlabel="side of the map", title=mode)
        axes.grid(alpha=0.3)
    pair[0].set_ylabel("ns an element")
    pair[0].legend()
    facts = environment(device)
    figure.suptitle(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['date']}")
    PLOTS.mkdir(exist_ok=True)
    figure.savefig(PLOTS / f"bands-{device.type}.png", dpi=80)


def main() -> None:
    """Measure, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.5, help="time for a point")
    options = parser.parse_args()
    from rich.progress import track

    device = torch.device(options.device)
    place = {"device": device, "dtype": getattr(torch, options.dtype)}
    rows = []
    for mode, point in track([(mode, point) for mode in MODES for point in POINTS], "points"):
        rows.append(measure(point, mode, place, options.seconds))
        write("bands", device, rows, table(rows))
    plot(rows, device)


if __name__ == "__main__":
    main()

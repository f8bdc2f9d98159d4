"""Where the time of a converted model goes on a CPU, part by part, beside the bytes that a part must move.

    python -m benchmarks.parts [--seconds S]

The parts of the loop over samples are timed from outside, one inside the other not counted twice. What they do per
weight and sample is nearly the same for all sizes, so that is the unit. Training makes the weights twice, once more for
the backward pass, and transposes three times. Writes `benchmarks/results/parts-cpu.json` and `.md`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import timm
import torch

import fdsurgery
from fdconv import FDConv2d, modulation
from fdconv.cpu import band_loop, compiled_steps, kernels, sample_loop

from .timing import call_of, write

ROWS = [(1, 224, "inference"), (8, 224, "inference"), (8, 224, "training"), (2, 512, "training")]
"""Batch, size and mode of ResNet-50."""


@dataclass(frozen=True)
class Part:
    """A function whose time is one part."""

    name: str
    owner: Any
    attribute: str
    bytes: float | None = None
    """What one call reads and writes at least, for each weight of a sample, in float32; None if not per weight."""


PARTS = [
    # A coefficient has the size of two weights, and stands for two: spectrum, scaled spectrum, group of a byte.
    Part("spectrum scaled", kernels, "scale", 4 + 4 + 0.5),
    # Along one axis, and along the other. The way there, and in training back.
    Part("transforms", torch.fft, "ifft", 2 * 4),
    Part("transforms", torch.fft, "irfft", 2 * 4),
    Part("transposed between", kernels, "transpose", 2 * 4),
    Part("weights modulated", kernels, "modulate", 2 * 4),
    Part("convolution", sample_loop, "per_sample", 4),
    # It reads the weight for the gradient of the input, and writes its own gradient.
    Part("convolution, backward", sample_loop, "per_sample_backward", 2 * 4),
    Part("modulation, backward", kernels, "modulate_backward", 3 * 4),
    Part("transforms, backward", torch.fft, "rfft", 2 * 4),
    Part("transforms, backward", torch.fft, "fft", 2 * 4),
    # Its gradient, the spectrum, the group, and a sum that is read and written.
    Part("spectrum, backward", kernels, "scale_backward", 4 + 4 + 0.5 + 2 * 4),
    Part("band modulation", band_loop._BandLoop, "forward"),
    Part("band modulation, backward", band_loop, "_backward"),
    Part("heads", modulation.GlobalModulation, "forward"),
    Part("heads", modulation.LocalModulation, "forward"),
    Part("laid out for the kernels", compiled_steps, "source"),
]


@dataclass
class Stopwatch:
    """Seconds by name, of functions that may call each other."""

    seconds: Counter[str] = field(default_factory=Counter)
    inside: list[float] = field(default_factory=list)

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function that does the same, and is timed."""

        def timed(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            self.inside.append(0.0)
            try:
                return function(*given, **named)
            finally:
                taken = time.perf_counter() - start
                self.seconds[name] += taken - self.inside.pop()
                if self.inside:
                    self.inside[-1] += taken

        return timed


def measure(batch: int, size: int, mode: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of all parts, of the whole, and of the static model, at the run where the whole was fastest."""
    static = timm.create_model("resnet50")
    ours = fdsurgery.convert(timm.create_model("resnet50"))
    weights = sum(layer.weight.numel() for layer in ours.modules() if isinstance(layer, FDConv2d))
    x = torch.randn(batch, 3, size, size)
    plain, call = call_of(static, x, mode), call_of(ours, x, mode)
    plain(), call()
    runs = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(runs) < 3:
        static_seconds = Stopwatch()
        static_seconds.around(plain, "static")()
        watch = Stopwatch()
        with ExitStack() as patches:
            for part in PARTS:
                timed = watch.around(getattr(part.owner, part.attribute), part.name)
                patches.enter_context(patch.object(part.owner, part.attribute, timed))
            watch.around(call, "all else")()
        runs.append({"static": static_seconds.seconds["static"], **watch.seconds})
    best = min(runs, key=lambda run: sum(run.values()) - run["static"])
    milliseconds = {name: spent * 1e3 for name, spent in best.items()}
    milliseconds["whole"] = sum(milliseconds.values()) - milliseconds["static"]
    return {"batch": batch, "size": size, "mode": mode, "weights": weights, "milliseconds": milliseconds}


def bandwidth() -> float:
    """Bytes a nanosecond that a copy reads and writes."""
    source, target = torch.zeros(2**26), torch.ones(2**26)
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        taken.append(time.perf_counter() - start)
    return 2 * source.numel() * 4 / min(taken) / 1e9


def table(rows: list[dict[str, Any]], copied: float) -> str:
    """Milliseconds, and nanoseconds a weight and sample, as Markdown; and what a copy moves in a nanosecond."""
    names = ["static", "whole", *dict.fromkeys(part.name for part in PARTS), "all else"]
    moved: Counter[str] = Counter()
    for part in PARTS:
        if part.bytes is not None:
            moved[part.name] += part.bytes
    head = [f"{row['batch']} x {row['size']}, {row['mode']}" for row in rows]
    lines = ["| | bytes a weight | " + " | ".join(head) + " |", "|---|---|" + "---|" * len(rows)]
    for name in names:
        cells = []
        for row in rows:
            spent = row["milliseconds"].get(name)
            each = (
                "" if spent is None or name not in moved else f" ({spent * 1e6 / row['weights'] / row['batch']:.1f} ns)"
            )
            cells.append("" if spent is None else f"{spent:,.0f} ms{each}")
        lines.append(f"| {name} | {f'{moved[name]:g}' if name in moved else ''} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"A copy moves {copied:.0f} bytes a nanosecond."]) + "\n"


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="time for a column")
    options = parser.parse_args()
    if (reason := kernels.reason_missing()) is not None:
        parser.error(f"the parts are those of the compiled kernels, and there are none here: {reason}")
    rows = [measure(*row, options.seconds) for row in ROWS]
    text = table(rows, bandwidth())
    write("parts", torch.device("cpu"), rows, text)
    print(text)


if __name__ == "__main__":
    main()

"""What the paths for CPUs share: when they serve, blocks that stay in cache, and memory that is used again."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from ..tracing import is_transformed

BLOCK = 2**19
"""Numbers that elementwise steps go through together: few enough for the shared cache, and many, for every step that
is spread over the cores costs some microseconds."""


def is_plain(x: Tensor) -> bool:
    """True for a real CPU tensor with something in it that nobody traces."""
    return not is_transformed() and x.device.type == "cpu" and type(x) is Tensor and x.numel() > 0


def blocks(samples: int, rows: int, row: int) -> list[tuple[slice, slice]]:
    """Parts of an array of `samples x rows` rows with `row` numbers each, of at most `BLOCK` numbers if rows allow."""
    if rows * row <= BLOCK:
        step = BLOCK // (rows * row)
        return [(slice(start, start + step), slice(None)) for start in range(0, samples, step)]
    step = max(1, BLOCK // row)
    return [
        (slice(sample, sample + 1), slice(start, start + step))
        for sample in range(samples)
        for start in range(0, rows, step)
    ]


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        held = self.held.get((name, dtype))
        if held is None or held.numel() < size:
            with torch.inference_mode(False):
                self.held[name, dtype] = held = torch.empty(size, dtype=dtype, device="cpu")
        return held[:size].view(shape)


buffer = _Buffers()
"""`buffer(name, shape, dtype)`: memory that the next block and the next layer use again, for each thread its own."""

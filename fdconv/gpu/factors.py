"""What the kernel that modulates weights shares with its backward: the factors and gates of a block, and its size."""

from __future__ import annotations

from torch import Tensor

from .blocks import power_of_2
from .common import jit

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None


@jit
def factor_at(pointer, offset, mask):  # type: ignore[no-untyped-def]
    if pointer is None:
        return 1.0
    else:
        return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@jit
def tap_at(context, channel, inside, channels_in, shift):  # type: ignore[no-untyped-def]
    position = channel + shift
    return tl.load(context + position, mask=inside & (position >= 0) & (position < channels_in), other=0.0).to(
        tl.float32
    )


@jit
def gate_at(context, taps, channel, inside, row, inside_row, channels_in, slope, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    # `2*sigmoid(z)` is `2/(1 + exp(-z))`, and `1 + tanh(z)` is the same of `2*z`: `slope` is 1 or 2.
    if taps is None:
        return 1.0
    else:
        logits = 0.0
        for tap in tl.static_range(TAPS):
            window = tap_at(context, channel, inside, channels_in, tap - TAPS // 2)
            logits += window * tl.load(taps + row * TAPS + tap, mask=inside_row, other=0.0).to(tl.float32)
        return 2.0 / (1.0 + tl.exp(-slope * logits))


def modulate_blocks(
    channels_out: int, channels_group: int, positions: int, grouped: bool, elements: int
) -> tuple[int, int, int]:
    """Output channels, input channels and positions of one program's block.

    The partial sums for the taps grow with the number of blocks along the input channels, those for the context with it
    along filters and positions; about 32 of the former balance the two. With groups, more is loaded for every element,
    and a full block would not fit into the registers.
    """
    if grouped:
        elements //= 2
    p = power_of_2(positions)
    i = min(power_of_2(channels_group), max(1, min(32, elements // p)))
    return min(power_of_2(channels_out), max(1, elements // (p * i))), i, p


def slope_of(activation: str) -> float:
    """What `gate_at` takes for a gate: 1 for a sigmoid, 2 for tanh."""
    return {"sigmoid": 1.0, "tanh": 2.0}[activation]


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors in rows, as the kernels read them."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]

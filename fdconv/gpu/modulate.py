"""The modulated weights of all samples as one fused GPU kernel; its backward is in `modulate_backward`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .blocks import number_of_blocks, power_of_2
from .common import ABOUT, jit
from .factors import contiguous, factor_at, gate_at, modulate_blocks, slope_of
from .tuning import Candidate, tuned

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None


def _fit_modulate(candidate: Candidate, arguments: dict[str, Any]) -> Candidate:
    channels = arguments["channels_out"], arguments["channels_group"]
    positions = arguments["K_H"] * arguments["K_W"]
    blocks = modulate_blocks(*channels, positions, arguments["GROUPED"], candidate["elements"])
    return {**dict(zip(("CO", "CI", "P"), blocks, strict=True)), "num_warps": candidate["num_warps"]}


@tuned(
    [
        {"elements": 2048, "num_warps": 4},
        {"elements": 1024, "num_warps": 4},
        {"elements": 2048, "num_warps": 8},
        {"elements": 4096, "num_warps": 8},
    ],
    _fit_modulate,
    ["channels_out", "channels_in", "channels_group", "K_H", "K_W", "TAPS", *ABOUT[:1]],
)
@partial(jit, do_not_specialize=ABOUT[:1])
def _modulate_kernel(  # type: ignore[no-untyped-def]
    image,
    context,
    taps,
    channel,
    filter_,
    spatial,
    out,
    channels_out,
    channels_in,
    channels_group,
    filters_group,
    slope,
    about_samples,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    TAPS: tl.constexpr,
    GROUPED: tl.constexpr,
    CO: tl.constexpr,
    CI: tl.constexpr,
    P: tl.constexpr,
):
    # A block of output channels, input channels and positions: what depends on one or two of them broadcasts.
    across = (channels_group + CI - 1) // CI
    down = (channels_out + CO - 1) // CO
    program = tl.program_id(0)
    sample = (program // across // down).to(tl.int64)
    o = (program // across % down * CO + tl.arange(0, CO))[:, None, None]
    i = (program % across * CI + tl.arange(0, CI))[None, :, None]
    p = tl.arange(0, P)[None, None, :]
    row = o * (K_H * K_W) + p
    inside_row = (o < channels_out) & (p < K_H * K_W)
    inside = inside_row & (i < channels_group)
    # Without groups, what belongs to an input channel is loaded once for all output channels of the block.
    if GROUPED:
        c = o // filters_group * channels_group + i
        inside_c = (o < channels_out) & (i < channels_group)
    else:
        c = i
        inside_c = i < channels_group
    base = sample * channels_out * (channels_group * K_H * K_W)
    at = (o * K_H + p // K_W) * (channels_group * K_W) + i * K_W + p % K_W
    value = tl.load(image + base + at, mask=inside, other=0.0)
    if taps is not None:
        context += sample * channels_in
    value *= gate_at(context, taps, c, inside_c, row, inside_row, channels_in, slope, TAPS)
    value *= factor_at(channel, sample * channels_in + c, inside_c)
    value *= factor_at(filter_, sample * channels_out + o, o < channels_out)
    value *= factor_at(spatial, sample * (K_H * K_W) + p, p < K_H * K_W)
    to = (o * channels_group + i) * (K_H * K_W) + p
    tl.store(out + base + to, value.to(out.dtype.element_ty), mask=inside)


def launch(
    out: Tensor,
    image: Tensor,
    context: Tensor | None,
    taps: Tensor | None,
    channel: Tensor | None,
    filter_: Tensor | None,
    spatial: Tensor | None,
    k_h: int,
    k_w: int,
    groups: int,
    activation: str,
) -> None:
    """Fill `out`; all as for `fdconv.gpu.ops.modulate`."""
    samples, channels_out, channels_group = out.shape[:3]

    def grid(sizes: dict[str, Any]) -> tuple[int]:
        return (samples * number_of_blocks(channels_out, sizes["CO"]) * number_of_blocks(channels_group, sizes["CI"]),)

    with torch.cuda.device_of(image):
        _modulate_kernel[grid](
            *contiguous(image, context, taps, channel, filter_, spatial),
            out,
            channels_out,
            channels_group * groups,
            channels_group,
            channels_out // groups,
            slope_of(activation),
            power_of_2(samples),
            K_H=k_h,
            K_W=k_w,
            TAPS=1 if taps is None else taps.shape[1],
            GROUPED=groups > 1,
        )

"""The modulated weights of all samples as one fused GPU kernel; its backward is in `modulate_backward`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .common import ABOUT, jit, number_of_blocks, register
from .factors import ARGUMENTS, contiguous, factor_at, gate_at, modulate_blocks, slope_of
from .modulate_backward import modulate_autograd, modulate_setup
from .tuning import Candidate, power_of_2, tuned

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None


def modulate(
    image: Tensor,
    context: Tensor | None,
    filters: Tensor | None,
    channel: Tensor | None,
    filter_: Tensor | None,
    spatial: Tensor | None,
    *,
    kernel_size: tuple[int, int],
    groups: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Make weight images into weights: modulated, in the convolution's layout and dtype, in one pass.

    Args:
        image: `(B, D1, D2)`, float32, `D1 = C_out*k_h`, `D2 = C_in/groups*k_w`.
        context: `(B, C_in)`, the normalised pooled input, or None without local branch.
        filters: `(C_out*k_h*k_w, taps)`, the local branch's short filters, or None without local branch.
        channel: `(B, C_in)`, factor of every input channel, or None.
        filter_: `(B, C_out)`, factor of every output channel, or None.
        spatial: `(B, k_h*k_w)`, factor of every kernel position, or None.
        kernel_size: `(k_h, k_w)`.
        groups: groups of the convolution. Short filters slide over the channels of all groups.
        activation: gate of the local branch, "sigmoid" or "tanh".
        dtype: of the weights; everything is computed in float32.

    Returns:
        `(B, C_out, C_in/groups, k_h, k_w)`, contiguous.
    """
    factors = (context, filters, channel, filter_, spatial)
    return torch.ops.fdconv.modulate(image, *factors, *kernel_size, groups, activation, dtype)


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
    filters,
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
    if filters is not None:
        context += sample * channels_in
    value *= gate_at(context, filters, c, inside_c, row, inside_row, channels_in, slope, TAPS)
    value *= factor_at(channel, sample * channels_in + c, inside_c)
    value *= factor_at(filter_, sample * channels_out + o, o < channels_out)
    value *= factor_at(spatial, sample * (K_H * K_W) + p, p < K_H * K_W)
    to = (o * channels_group + i) * (K_H * K_W) + p
    tl.store(out + base + to, value.to(out.dtype.element_ty), mask=inside)


def _modulate(
    image: Tensor,
    context: Tensor | None,
    filters: Tensor | None,
    channel: Tensor | None,
    filter_: Tensor | None,
    spatial: Tensor | None,
    k_h: int,
    k_w: int,
    groups: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    out = _modulate_fake(image, context, filters, channel, filter_, spatial, k_h, k_w, groups, activation, dtype)
    samples, channels_out, channels_group = out.shape[:3]
    if samples == 0:
        return out

    def grid(sizes: dict[str, Any]) -> tuple[int]:
        return (samples * number_of_blocks(channels_out, sizes["CO"]) * number_of_blocks(channels_group, sizes["CI"]),)

    with torch.cuda.device_of(image):
        _modulate_kernel[grid](
            *contiguous(image, context, filters, channel, filter_, spatial),
            out,
            channels_out,
            channels_group * groups,
            channels_group,
            channels_out // groups,
            slope_of(activation),
            power_of_2(samples),
            K_H=k_h,
            K_W=k_w,
            TAPS=1 if filters is None else filters.shape[1],
            GROUPED=groups > 1,
        )
    return out


def _modulate_fake(
    image: Tensor,
    context: Tensor | None,
    filters: Tensor | None,
    channel: Tensor | None,
    filter_: Tensor | None,
    spatial: Tensor | None,
    k_h: int,
    k_w: int,
    groups: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    samples, d1, d2 = image.shape
    return torch.empty((samples, d1 // k_h, d2 // k_w, k_h, k_w), dtype=dtype, device=image.device)


register(
    "modulate",
    f"({ARGUMENTS}, ScalarType dtype) -> Tensor",
    _modulate,
    _modulate_fake,
    modulate_setup,
    modulate_autograd,
)

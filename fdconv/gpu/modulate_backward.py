"""The backward of the kernel that modulates weights: gradients of the images and of all factors, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .blocks import number_of_blocks
from .common import jit
from .factors import contiguous, factor_at, gate_at, modulate_blocks, slope_of, tap_at

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None

ELEMENTS = 2048
"""Elements of one program's block in `modulate_backward`. They live in registers: it cannot be much larger."""


@jit
def _modulate_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    image,
    context,
    taps,
    channel,
    filter_,
    spatial,
    grad_image,
    grad_context,
    grad_taps,
    grad_channel,
    grad_filter,
    grad_spatial,
    samples,
    channels_out,
    channels_in,
    channels_group,
    filters_group,
    slope,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    TAPS: tl.constexpr,
    GROUPED: tl.constexpr,
    CO: tl.constexpr,
    CI: tl.constexpr,
    P: tl.constexpr,
):
    across = (channels_group + CI - 1) // CI
    down = (channels_out + CO - 1) // CO
    program = tl.program_id(0)
    tile_i = program % across
    tile_o = program // across % down
    sample = (program // across // down).to(tl.int64)
    o = (tile_o * CO + tl.arange(0, CO))[:, None, None]
    i = (tile_i * CI + tl.arange(0, CI))[None, :, None]
    p = tl.arange(0, P)[None, None, :]
    row = o * (K_H * K_W) + p
    inside_row = (o < channels_out) & (p < K_H * K_W)
    inside = inside_row & (i < channels_group)
    if GROUPED:
        c = o // filters_group * channels_group + i
        inside_c = (o < channels_out) & (i < channels_group)
    else:
        c = i
        inside_c = i < channels_group
    base = sample * channels_out * (channels_group * K_H * K_W)
    at = (o * K_H + p // K_W) * (channels_group * K_W) + i * K_W + p % K_W
    to = (o * channels_group + i) * (K_H * K_W) + p
    slope_out = tl.load(grad + base + to, mask=inside, other=0.0).to(tl.float32)
    if taps is not None:
        context += sample * channels_in
    gate = gate_at(context, taps, c, inside_c, row, inside_row, channels_in, slope, TAPS)
    by_channel = factor_at(channel, sample * channels_in + c, inside_c)
    by_filter = factor_at(filter_, sample * channels_out + o, o < channels_out)
    by_position = factor_at(spatial, sample * (K_H * K_W) + p, p < K_H * K_W)
    tl.store(grad_image + base + at, slope_out * gate * by_channel * by_filter * by_position, mask=inside)
    product = slope_out * tl.load(image + base + at, mask=inside, other=0.0)

    # Partial sums: over the block's input channels in `tile_i`, over its output channels in `rest`, which is the block,
    # or with groups, where the sum must stop at their borders, the output channel itself.
    if GROUPED:
        rest = (o * channels_group + i) + sample * channels_out * channels_group
        tap_rest = (sample * channels_out + o) * TAPS * channels_group + i
    else:
        rest = (sample * down + tile_o) * channels_group + i
        tap_rest = (sample * down + tile_o) * TAPS * channels_group + i
    if channel is not None:
        part = tl.sum(product * gate * by_filter * by_position, axis=2, keep_dims=True)
        if not GROUPED:
            part = tl.sum(part, axis=0, keep_dims=True)
        tl.store(grad_channel + rest, part, mask=inside_c)
    if filter_ is not None:
        part = tl.sum(product * gate * by_channel * by_position, axis=2, keep_dims=True)
        part = tl.sum(part, axis=1, keep_dims=True)
        tl.store(grad_filter + (tile_i * samples + sample) * channels_out + o, part, mask=o < channels_out)
    if spatial is not None:
        part = tl.sum(product * gate * by_channel * by_filter, axis=1, keep_dims=True)
        part = tl.sum(part, axis=0, keep_dims=True)
        block = (tile_o * across + tile_i) * samples + sample
        tl.store(grad_spatial + block * (K_H * K_W) + p, part, mask=p < K_H * K_W)
    if taps is not None:
        slope_logits = product * by_channel * by_filter * by_position * gate * (1.0 - 0.5 * gate) * slope
        rows = channels_out * (K_H * K_W)
        for tap in tl.static_range(TAPS):
            window = tap_at(context, c, inside_c, channels_in, tap - TAPS // 2)
            part = tl.sum(slope_logits * window, axis=1, keep_dims=True)
            to_tap = ((tile_i * samples + sample) * TAPS + tap) * rows + row
            tl.store(grad_taps + to_tap, part, mask=inside_row)
            own = tl.load(taps + row * TAPS + tap, mask=inside_row, other=0.0).to(tl.float32)
            part = tl.sum(slope_logits * own, axis=2, keep_dims=True)
            if not GROUPED:
                part = tl.sum(part, axis=0, keep_dims=True)
            tl.store(grad_context + tap_rest + tap * channels_group, part, mask=inside_c)


def launch(
    grad: Tensor,
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
) -> list[Tensor]:
    """Gradients of `image` and of those of `context, taps, channel, filter_, spatial` that are not None."""
    inputs = [context, taps, channel, filter_, spatial]
    samples, channels_out, channels_group = grad.shape[:3]
    if samples == 0:
        return [torch.zeros_like(tensor) for tensor in (image, *inputs) if tensor is not None]
    positions, count = k_h * k_w, 1 if taps is None else taps.shape[1]
    co, ci, p = modulate_blocks(channels_out, channels_group, positions, groups > 1, ELEMENTS)
    down, across = number_of_blocks(channels_out, co), number_of_blocks(channels_group, ci)
    parts = channels_out if groups > 1 else down
    shapes = (
        (samples, parts, count, channels_group),
        (across * samples, count, channels_out * positions),
        (samples, parts, channels_group),
        (across, samples, channels_out),
        (down * across, samples, positions),
    )
    partial = [None if tensor is None else image.new_empty(shape) for tensor, shape in zip(inputs, shapes, strict=True)]
    grad_image = image.new_empty(image.shape)
    with torch.cuda.device_of(image):
        _modulate_backward_kernel[(samples * down * across,)](
            *contiguous(grad, image, *inputs),
            grad_image,
            *partial,
            samples,
            channels_out,
            channels_group * groups,
            channels_group,
            channels_out // groups,
            slope_of(activation),
            K_H=k_h,
            K_W=k_w,
            TAPS=count,
            GROUPED=groups > 1,
            CO=co,
            CI=ci,
            P=p,
        )
    by_context, by_taps, by_channel, by_filter, by_spatial = partial
    sums = [
        None if by_context is None else _slide_back(_sum_parts(by_context, groups)),
        None if by_taps is None else by_taps.sum(0).t().contiguous(),
        None if by_channel is None else _sum_parts(by_channel, groups).flatten(1),
        None if by_filter is None else by_filter.sum(0),
        None if by_spatial is None else by_spatial.sum(0),
    ]
    return [grad_image] + [
        total.to(tensor.dtype)
        for total, tensor in zip(sums, inputs, strict=True)
        if total is not None and tensor is not None
    ]


def _sum_parts(partial: Tensor, groups: int) -> Tensor:
    """Add up what a group's output channels contributed: `(B, parts, ...)` to `(B, groups, ...)`."""
    return partial.unflatten(1, (groups, -1)).sum(2)


def _slide_back(taps_first: Tensor) -> Tensor:
    """What slides the taps, transposed: shift what each contributed back to the channel it read.

    Args:
        taps_first: `(B, groups, taps, C_in/groups)`.

    Returns:
        `(B, C_in)`.
    """
    by_tap = taps_first.transpose(1, 2).flatten(2)
    _, count, channels = by_tap.shape
    half = count // 2
    padded = F.pad(by_tap, (half, half))
    shifted = [padded[:, tap, 2 * half - tap :][:, :channels] for tap in range(count)]
    return torch.stack(shifted).sum(0)

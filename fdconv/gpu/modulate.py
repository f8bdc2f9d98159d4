"""The modulated weights of all samples as one fused GPU kernel and its backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .common import ABOUT, jit, number_of_blocks, register
from .tuning import Candidate, power_of_2, tuned

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None

ELEMENTS = 2048
"""Elements of one program's block in `modulate_backward`. They live in registers: it cannot be much larger."""


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


@jit
def _factor(pointer, offset, mask):  # type: ignore[no-untyped-def]
    if pointer is None:
        return 1.0
    else:
        return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@jit
def _tap(context, channel, inside, channels_in, shift):  # type: ignore[no-untyped-def]
    position = channel + shift
    return tl.load(context + position, mask=inside & (position >= 0) & (position < channels_in), other=0.0).to(
        tl.float32
    )


@jit
def _gate(context, filters, channel, inside, row, inside_row, channels_in, slope, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    # `2*sigmoid(z)` is `2/(1 + exp(-z))`, and `1 + tanh(z)` is the same of `2*z`: `slope` is 1 or 2.
    if filters is None:
        return 1.0
    else:
        logits = 0.0
        for tap in tl.static_range(TAPS):
            window = _tap(context, channel, inside, channels_in, tap - TAPS // 2)
            logits += window * tl.load(filters + row * TAPS + tap, mask=inside_row, other=0.0).to(tl.float32)
        return 2.0 / (1.0 + tl.exp(-slope * logits))


def _modulate_blocks(
    channels_out: int, channels_group: int, positions: int, grouped: bool, elements: int
) -> tuple[int, int, int]:
    """Output channels, input channels and positions of one program's block.

    The partial sums for the short filters grow with the number of blocks along the input channels, those for the
    context with it along filters and positions; about 32 of the former balance the two. With groups, more is loaded
    for every element, and a full block would not fit into the registers.
    """
    if grouped:
        elements //= 2
    p = power_of_2(positions)
    i = min(power_of_2(channels_group), max(1, min(32, elements // p)))
    return min(power_of_2(channels_out), max(1, elements // (p * i))), i, p


def _fit_modulate(candidate: Candidate, arguments: dict[str, Any]) -> Candidate:
    channels = arguments["channels_out"], arguments["channels_group"]
    positions = arguments["K_H"] * arguments["K_W"]
    blocks = _modulate_blocks(*channels, positions, arguments["GROUPED"], candidate["elements"])
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
    value *= _gate(context, filters, c, inside_c, row, inside_row, channels_in, slope, TAPS)
    value *= _factor(channel, sample * channels_in + c, inside_c)
    value *= _factor(filter_, sample * channels_out + o, o < channels_out)
    value *= _factor(spatial, sample * (K_H * K_W) + p, p < K_H * K_W)
    to = (o * channels_group + i) * (K_H * K_W) + p
    tl.store(out + base + to, value.to(out.dtype.element_ty), mask=inside)


@jit
def _modulate_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    image,
    context,
    filters,
    channel,
    filter_,
    spatial,
    grad_image,
    grad_context,
    grad_filters,
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
    if filters is not None:
        context += sample * channels_in
    gate = _gate(context, filters, c, inside_c, row, inside_row, channels_in, slope, TAPS)
    by_channel = _factor(channel, sample * channels_in + c, inside_c)
    by_filter = _factor(filter_, sample * channels_out + o, o < channels_out)
    by_position = _factor(spatial, sample * (K_H * K_W) + p, p < K_H * K_W)
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
    if filters is not None:
        slope_logits = product * by_channel * by_filter * by_position * gate * (1.0 - 0.5 * gate) * slope
        rows = channels_out * (K_H * K_W)
        for tap in tl.static_range(TAPS):
            window = _tap(context, c, inside_c, channels_in, tap - TAPS // 2)
            part = tl.sum(slope_logits * window, axis=1, keep_dims=True)
            to_tap = ((tile_i * samples + sample) * TAPS + tap) * rows + row
            tl.store(grad_filters + to_tap, part, mask=inside_row)
            short = tl.load(filters + row * TAPS + tap, mask=inside_row, other=0.0).to(tl.float32)
            part = tl.sum(slope_logits * short, axis=2, keep_dims=True)
            if not GROUPED:
                part = tl.sum(part, axis=0, keep_dims=True)
            tl.store(grad_context + tap_rest + tap * channels_group, part, mask=inside_c)


def _slope(activation: str) -> float:
    return {"sigmoid": 1.0, "tanh": 2.0}[activation]


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


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
            *_contiguous(image, context, filters, channel, filter_, spatial),
            out,
            channels_out,
            channels_group * groups,
            channels_group,
            channels_out // groups,
            _slope(activation),
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


def _modulate_backward(
    grad: Tensor,
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
) -> list[Tensor]:
    """Gradients of `image` and of those of `context, filters, channel, filter_, spatial` that are not None."""
    inputs = [context, filters, channel, filter_, spatial]
    samples, channels_out, channels_group = grad.shape[:3]
    if samples == 0:
        return [torch.zeros_like(tensor) for tensor in (image, *inputs) if tensor is not None]
    positions, taps = k_h * k_w, 1 if filters is None else filters.shape[1]
    co, ci, p = _modulate_blocks(channels_out, channels_group, positions, groups > 1, ELEMENTS)
    down, across = number_of_blocks(channels_out, co), number_of_blocks(channels_group, ci)
    parts = channels_out if groups > 1 else down
    shapes = (
        (samples, parts, taps, channels_group),
        (across * samples, taps, channels_out * positions),
        (samples, parts, channels_group),
        (across, samples, channels_out),
        (down * across, samples, positions),
    )
    partial = [None if tensor is None else image.new_empty(shape) for tensor, shape in zip(inputs, shapes, strict=True)]
    grad_image = image.new_empty(image.shape)
    with torch.cuda.device_of(image):
        _modulate_backward_kernel[(samples * down * across,)](
            *_contiguous(grad, image, *inputs),
            grad_image,
            *partial,
            samples,
            channels_out,
            channels_group * groups,
            channels_group,
            channels_out // groups,
            _slope(activation),
            K_H=k_h,
            K_W=k_w,
            TAPS=taps,
            GROUPED=groups > 1,
            CO=co,
            CI=ci,
            P=p,
        )
    by_context, by_filters, by_channel, by_filter, by_spatial = partial
    sums = [
        None if by_context is None else _slide_back(_sum_parts(by_context, groups)),
        None if by_filters is None else by_filters.sum(0).t().contiguous(),
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
    """The transposed short filter: shift what each tap contributed back to the channel it read.

    Args:
        taps_first: `(B, groups, taps, C_in/groups)`.

    Returns:
        `(B, C_in)`.
    """
    by_tap = taps_first.transpose(1, 2).flatten(2)
    _, taps, channels = by_tap.shape
    half = taps // 2
    padded = F.pad(by_tap, (half, half))
    shifted = [padded[:, tap, 2 * half - tap :][:, :channels] for tap in range(taps)]
    return torch.stack(shifted).sum(0)


def _modulate_backward_fake(
    grad: Tensor,
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
) -> list[Tensor]:
    inputs = (image, context, filters, channel, filter_, spatial)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs if x is not None]


def _modulate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:10]


def _modulate_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = iter(torch.ops.fdconv.modulate_backward(grad, *tensors, *ctx.settings))
    return (*(None if tensor is None else next(grads) for tensor in tensors), *(None,) * 5)


_MODULATE = (
    "Tensor image, Tensor? context, Tensor? filters, Tensor? channel, Tensor? filter_, Tensor? spatial, "
    "int k_h, int k_w, int groups, str activation"
)

register(
    "modulate",
    f"({_MODULATE}, ScalarType dtype) -> Tensor",
    _modulate,
    _modulate_fake,
    _modulate_setup,
    _modulate_autograd,
)
register("modulate_backward", f"(Tensor grad, {_MODULATE}) -> Tensor[]", _modulate_backward, _modulate_backward_fake)

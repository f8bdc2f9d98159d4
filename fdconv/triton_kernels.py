"""The operator's steps as fused GPU kernels: the same mathematics with less memory traffic.

Each is a custom operator of the namespace `fdconv`, so that `torch.compile` traces through it, and computes in float32.
Where sums run over samples or blocks, every program writes partial sums that are added up afterwards, never atomics:
the results are the same in every run. Block sizes of the forward kernels are chosen by measurement, and may change from
process to process how sums are rounded, unless `torch.use_deterministic_algorithms` is on. Only first derivatives are
defined.

The kernels need Triton, on a CUDA device or in Triton's interpreter (the environment variable `TRITON_INTERPRET=1`, set
before Triton is first imported); without it the module can still be imported, and `available` says no.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .composite import Convolution, convolved_size, per_sample_backward
from .triton_tuning import Candidate, power_of_2, tuned

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None

PROGRAMS = 1024
"""Programs that keep a large GPU busy; with fewer blocks than this, the samples are shared out among programs too."""

ELEMENTS = 2048
"""Elements of one program's block in `modulate_backward`. They live in registers: it cannot be much larger."""

ABOUT = ["about_samples", "about_pixels"]
"""Arguments that are for the tuner alone: numbers rounded up to powers of two, so that it is not asked for each."""


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device: CUDA with Triton, or any in Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or _interpreted())


def _interpreted() -> bool:
    return not isinstance(_tap, triton.JITFunction)


def _jit(function: Any, **options: Any) -> Any:
    """`triton.jit`, or without Triton nothing: the kernels are then plain functions that nobody calls."""
    return function if triton is None else triton.jit(function, **options)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


# Spectrum ------------------------------------------------------------------------------------------------------------


def scale_spectrum(
    spectra: Tensor, frequency_group: Tensor, kernel: Tensor, scale: float, edge: float, width: int
) -> Tensor:
    """Scale every sample's spectra group by group and sum them: the spectra of the weight images.

    Args:
        spectra: `(r, D1, D2h, 2)`, float32.
        frequency_group: `(D1, D2h)`, uint8 or int32, below `n`.
        kernel: `(B, r*n)`, float32, the factors of the groups.
        scale: factor of everything.
        edge: another one, of the edge columns: see `fdconv.spectrum`.
        width: `D2`.

    Returns:
        `(B, D1, D2h, 2)`, float32: the sum over `i` of `spectra[i] * kernel[b, i*n + group] * scale`, times `edge`.
    """
    return torch.ops.fdconv.scale_spectrum(spectra, frequency_group, kernel, scale, edge, width)


def _fit_scale(candidate: Candidate, arguments: dict[str, Any]) -> Candidate:
    block = min(candidate["elements"] // arguments["R_BLOCK"], power_of_2(arguments["size"]))
    return {"BLOCK": max(1, block), "num_warps": candidate["num_warps"]}


@_jit
def _column_scale(column, nyquist, scale, edge):  # type: ignore[no-untyped-def]
    return tl.where((column == 0) | (column == nyquist), scale * edge, scale)


@tuned(
    [
        {"elements": 1024, "num_warps": 4},
        {"elements": 512, "num_warps": 4},
        {"elements": 2048, "num_warps": 8},
        {"elements": 512, "num_warps": 2},
    ],
    _fit_scale,
    ["size", "group_count", "R", *ABOUT[:1]],
)
@partial(_jit, do_not_specialize=ABOUT[:1])
def _scale_kernel(  # type: ignore[no-untyped-def]
    spectra,
    group,
    kernel,
    out,
    size,
    samples,
    group_count,
    scale,
    edge,
    columns,
    nyquist,
    about_samples,
    R: tl.constexpr,
    R_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # An element is a real or an imaginary part; two neighbours belong to one coefficient.
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    share = tl.arange(0, R_BLOCK)[:, None]
    mask = (share < R) & inside[None, :]
    number = tl.load(group + element // 2, mask=inside, other=0).to(tl.int32)
    value = tl.load(spectra + share.to(tl.int64) * size + element[None, :], mask=mask, other=0.0)
    value *= _column_scale(element // 2 % columns, nyquist, scale, edge)[None, :]
    index = share * group_count + number[None, :]
    samples_each = (samples + tl.num_programs(1) - 1) // tl.num_programs(1)
    first = tl.program_id(1) * samples_each
    kernel += first.to(tl.int64) * (R * group_count)
    out += first.to(tl.int64) * size
    for _ in range(tl.minimum(samples - first, samples_each)):
        factor = tl.load(kernel + index, mask=mask, other=0.0)
        tl.store(out + element, tl.sum(value * factor, axis=0), mask=inside)
        kernel += R * group_count
        out += size


@_jit
def _scale_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    spectra,
    group,
    kernel,
    grad_spectra,
    grad_kernel,
    rows,
    columns,
    samples,
    samples_each,
    group_count,
    scale,
    edge,
    nyquist,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Groups are rings, so a tile of both axes meets few of them, and only those from its lowest to its highest number
    # are summed up. A stretch of one row would meet many.
    across = (columns + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0)
    chunk = tl.program_id(1)
    share = tl.program_id(2)  # which of the spectra
    row = (tile // across * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tile % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    offset = row * columns + column
    size = rows * columns
    number = tl.load(group + row * (columns // 2) + column // 2, mask=inside, other=0).to(tl.int32)
    lowest = tl.min(tl.min(tl.where(inside, number, group_count), axis=1), axis=0)
    highest = tl.max(tl.max(tl.where(inside, number, -1), axis=1), axis=0)
    factor = _column_scale(column // 2, nyquist, scale, edge)
    value = tl.load(spectra + share.to(tl.int64) * size + offset, mask=inside, other=0.0) * factor
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    first = (chunk * samples_each).to(tl.int64)
    grad += first * size
    kernel += first * (R * group_count) + share * group_count
    grad_kernel += (tile.to(tl.int64) * samples + first) * (R * group_count) + share * group_count
    for _ in range(tl.minimum(samples - chunk * samples_each, samples_each)):
        slope = tl.load(grad + offset, mask=inside, other=0.0)
        total += slope * tl.load(kernel + number, mask=inside, other=0.0)
        product = slope * value
        for one in range(lowest, highest + 1):
            part = tl.sum(tl.where(number == one, product, 0.0), axis=1)
            tl.store(grad_kernel + one, tl.sum(part, axis=0))
        grad += size
        kernel += R * group_count
        grad_kernel += R * group_count
    tl.store(grad_spectra + (chunk.to(tl.int64) * R + share) * size + offset, total * factor, mask=inside)


def _samples_each(samples: int, blocks: int) -> int:
    """How many samples one program goes through: all, unless that leaves the device idle."""
    return _blocks(samples, min(samples, _blocks(PROGRAMS, blocks)))


def _nyquist(width: int) -> int:
    """The column of the highest frequency, which an odd width does not have."""
    return -1 if width % 2 else width // 2


def _scale_spectrum(
    spectra: Tensor, frequency_group: Tensor, kernel: Tensor, scale: float, edge: float, width: int
) -> Tensor:
    spectra, frequency_group, kernel = spectra.contiguous(), frequency_group.contiguous(), kernel.contiguous()
    ratio, d1, d2_half, _ = spectra.shape
    samples, size = len(kernel), d1 * d2_half * 2
    out = spectra.new_empty((samples, d1, d2_half, 2))
    if samples == 0:
        return out

    def grid(sizes: dict[str, Any]) -> tuple[int, int]:
        blocks = _blocks(size, sizes["BLOCK"])
        return blocks, _blocks(samples, _samples_each(samples, blocks))

    with torch.cuda.device_of(spectra):
        _scale_kernel[grid](
            spectra,
            frequency_group,
            kernel,
            out,
            size,
            samples,
            kernel.shape[1] // ratio,
            scale,
            edge,
            d2_half,
            _nyquist(width),
            power_of_2(samples),
            R=ratio,
            R_BLOCK=power_of_2(ratio),
        )
    return out


def _scale_spectrum_fake(
    spectra: Tensor, frequency_group: Tensor, kernel: Tensor, scale: float, edge: float, width: int
) -> Tensor:
    return spectra.new_empty((kernel.shape[0], *spectra.shape[1:]))


def _scale_spectrum_backward(
    grad: Tensor, spectra: Tensor, frequency_group: Tensor, kernel: Tensor, scale: float, edge: float, width: int
) -> tuple[Tensor, Tensor]:
    grad, spectra = grad.contiguous(), spectra.contiguous()
    frequency_group, kernel = frequency_group.contiguous(), kernel.contiguous()
    ratio, d1, d2_half, _ = spectra.shape
    samples = len(kernel)
    if samples == 0:
        return torch.zeros_like(spectra), torch.zeros_like(kernel)
    rows, columns = min(16, power_of_2(d1)), min(64, power_of_2(2 * d2_half))
    tiles = _blocks(d1, rows) * _blocks(2 * d2_half, columns)
    each = _samples_each(samples, tiles * ratio)
    chunks = _blocks(samples, each)
    grad_spectra = spectra.new_empty((chunks, *spectra.shape))
    grad_kernel = kernel.new_zeros((tiles, *kernel.shape))  # a tile writes only the groups it meets
    with torch.cuda.device_of(spectra):
        _scale_backward_kernel[(tiles, chunks, ratio)](
            grad,
            spectra,
            frequency_group,
            kernel,
            grad_spectra,
            grad_kernel,
            d1,
            2 * d2_half,
            samples,
            each,
            kernel.shape[1] // ratio,
            scale,
            edge,
            _nyquist(width),
            R=ratio,
            ROWS=rows,
            COLUMNS=columns,
        )
    return grad_spectra.sum(0) if chunks > 1 else grad_spectra[0], grad_kernel.sum(0)


def _scale_spectrum_backward_fake(
    grad: Tensor, spectra: Tensor, frequency_group: Tensor, kernel: Tensor, scale: float, edge: float, width: int
) -> tuple[Tensor, Tensor]:
    return spectra.new_empty(spectra.shape), kernel.new_empty(kernel.shape)


def _scale_spectrum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.edge, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _scale_spectrum_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    spectra, frequency_group, kernel = ctx.saved_tensors
    grad_spectra, grad_kernel = torch.ops.fdconv.scale_spectrum_backward(
        grad, spectra, frequency_group, kernel, ctx.scale, ctx.edge, ctx.width
    )
    return grad_spectra, None, grad_kernel, None, None, None


# Modulation ----------------------------------------------------------------------------------------------------------


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


@_jit
def _factor(pointer, offset, mask):  # type: ignore[no-untyped-def]
    if pointer is None:
        return 1.0
    else:
        return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@_jit
def _tap(context, channel, inside, channels_in, shift):  # type: ignore[no-untyped-def]
    position = channel + shift
    return tl.load(context + position, mask=inside & (position >= 0) & (position < channels_in), other=0.0).to(
        tl.float32
    )


@_jit
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
@partial(_jit, do_not_specialize=ABOUT[:1])
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


@_jit
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
        return (samples * _blocks(channels_out, sizes["CO"]) * _blocks(channels_group, sizes["CI"]),)

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
    down, across = _blocks(channels_out, co), _blocks(channels_group, ci)
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


# Convolution ---------------------------------------------------------------------------------------------------------


def conv2d_per_sample(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """`F.conv2d` with a weight for every sample, without bias.

    Args:
        x: `(B, C_in, H, W)`, float32, bfloat16 or float16.
        weight: `(B, C_out, C_in/groups, k_h, k_w)`, in the dtype of `x`.
        stride: as the other arguments, what `F.conv2d` takes, but as pairs.

    Returns:
        `(B, C_out, H', W')`, in the dtype of `x`; sums are float32.
    """
    return torch.ops.fdconv.conv2d_per_sample(x, weight, stride, padding, dilation, groups)


def _fit_conv(candidate: Candidate, arguments: dict[str, Any]) -> Candidate:
    """Blocks no larger than the product, but never below 16, where there is no matrix unit to feed.

    A product of float32 has no such unit, and is unrolled along K: blocks as deep and as wide as for 16 bits would not
    fit into the registers. Nor are more warps started than have 32 sums or 16 inputs for each thread.
    """
    widest, deepest = (64, 16) if arguments["x"].element_size() == 4 else (128, 64)
    sizes = {
        "M": arguments["filters_group"],
        "N": min(arguments["out_height"] * arguments["out_width"], widest),
        "K": min(arguments["channels_group"] * arguments["K_H"] * arguments["K_W"], deepest),
    }
    m, n, k = (min(candidate[name], max(16, power_of_2(size))) for name, size in sizes.items())
    warps = max(4, m * n // 1024, n * k // 512)
    return candidate | {"M": m, "N": n, "K": k, "num_warps": min(candidate["num_warps"], warps)}


@tuned(
    # The inputs' indices cost more than the product, so the more filters share them the better, if there are so many.
    [
        {"M": 128, "N": 64, "K": 32, "num_warps": 8, "num_stages": 3},
        {"M": 64, "N": 64, "K": 32, "num_warps": 4, "num_stages": 3},
        {"M": 64, "N": 64, "K": 64, "num_warps": 8, "num_stages": 3},
        {"M": 128, "N": 128, "K": 32, "num_warps": 8, "num_stages": 2},
        {"M": 64, "N": 32, "K": 32, "num_warps": 4, "num_stages": 4},
    ],
    _fit_conv,
    ["channels_group", "filters_group", "K_H", "K_W", *ABOUT],
)
@partial(_jit, do_not_specialize=ABOUT)
def _conv_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    channels_group,
    height,
    width,
    filters_group,
    out_height,
    out_width,
    about_samples,
    about_pixels,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    P_H: tl.constexpr,
    P_W: tl.constexpr,
    D_H: tl.constexpr,
    D_W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    BEYOND: tl.constexpr = 1 << 29
    # One matrix product for every sample and group: filters times (channel, position), by that times output pixels.
    pixels = out_height * out_width
    depth = channels_group * (K_H * K_W)
    down = (filters_group + M - 1) // M
    across = (pixels + N - 1) // N
    program = tl.program_id(0)
    part = (program // down // across).to(tl.int64)
    m = (program % down * M + tl.arange(0, M))[:, None]
    n = (program // down % across * N + tl.arange(0, N))[None, :]
    x += part * channels_group * height * width
    weight += part * filters_group * depth
    out += part * filters_group * pixels
    # Indices cost more than the product, so what depends on rows or columns alone is computed for these alone.
    # Unsigned, division is cheaper, and one comparison covers both borders. What is no channel is put `BEYOND` them.
    # A column that is no pixel may read some inside them, and is not stored.
    top = n // out_width * S_H - P_H
    left = n % out_width * S_W - P_W
    x += top * width + left
    weight += m * depth
    total = tl.full([M, N], 0.0, tl.float32)
    for start in range(0, depth, K):
        k = start + tl.arange(0, K)
        a = tl.load(weight + k[None, :], mask=(m < filters_group) & (k < depth)[None, :], other=0.0)
        k = k[:, None].to(tl.uint32)
        row = k // K_W
        channel = (row // K_H).to(tl.int32)
        h = (row % K_H).to(tl.int32) * D_H
        w = (k % K_W).to(tl.int32) * D_W
        at = (channel * height + h) * width + w
        h = tl.where(k < depth, h, BEYOND)
        inside = ((top + h).to(tl.uint32) < height) & ((left + w).to(tl.uint32) < width)
        b = tl.load(x + at, mask=inside, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out + m * pixels + n, total.to(out.dtype.element_ty), mask=(m < filters_group) & (n < pixels))


def _conv(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Tensor:
    out = _conv_fake(x, weight, stride, padding, dilation, groups)
    samples, channels_out, out_height, out_width = out.shape
    if out.numel() == 0:
        return out
    if _interpreted():  # its matrix product takes bfloat16 for integers
        x, weight = x.float(), weight.float()
    filters_group, pixels = channels_out // groups, out_height * out_width

    def grid(sizes: dict[str, Any]) -> tuple[int]:
        return (samples * groups * _blocks(filters_group, sizes["M"]) * _blocks(pixels, sizes["N"]),)

    with torch.cuda.device_of(x):
        _conv_kernel[grid](
            x.contiguous(),
            weight.contiguous(),
            out,
            weight.shape[2],
            *x.shape[2:],
            filters_group,
            out_height,
            out_width,
            power_of_2(samples),
            power_of_2(pixels),
            K_H=weight.shape[3],
            K_W=weight.shape[4],
            S_H=stride[0],
            S_W=stride[1],
            P_H=padding[0],
            P_W=padding[1],
            D_H=dilation[0],
            D_W=dilation[1],
        )
    return out


def _conv_fake(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    conv = Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)
    sides = convolved_size(x.shape[2:], weight.shape[3:], conv)
    return torch.empty((x.shape[0], weight.shape[1], *sides), dtype=x.dtype, device=x.device)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)


def _conv_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.settings
    if x.shape[0] == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), None, None, None, None
    conv = Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)
    return (*per_sample_backward(grad, x, weight, conv), *(None,) * 4)


# Registration --------------------------------------------------------------------------------------------------------


def _register(name: str, schema: str, function: Any, fake: Any, setup: Any = None, backward: Any = None) -> None:
    operator = torch.library.custom_op(f"fdconv::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=setup)


_SCALE = "Tensor spectra, Tensor frequency_group, Tensor kernel, float scale, float edge, int width"
_MODULATE = (
    "Tensor image, Tensor? context, Tensor? filters, Tensor? channel, Tensor? filter_, Tensor? spatial, "
    "int k_h, int k_w, int groups, str activation"
)
_CONV = "Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups"

_register(
    "scale_spectrum",
    f"({_SCALE}) -> Tensor",
    _scale_spectrum,
    _scale_spectrum_fake,
    _scale_spectrum_setup,
    _scale_spectrum_autograd,
)
_register(
    "scale_spectrum_backward",
    f"(Tensor grad, {_SCALE}) -> (Tensor, Tensor)",
    _scale_spectrum_backward,
    _scale_spectrum_backward_fake,
)
_register(
    "modulate",
    f"({_MODULATE}, ScalarType dtype) -> Tensor",
    _modulate,
    _modulate_fake,
    _modulate_setup,
    _modulate_autograd,
)
_register("modulate_backward", f"(Tensor grad, {_MODULATE}) -> Tensor[]", _modulate_backward, _modulate_backward_fake)
_register("conv2d_per_sample", f"({_CONV}) -> Tensor", _conv, _conv_fake, _conv_setup, _conv_autograd)

"""The spectra of all samples, scaled group by group, as one fused GPU kernel and its backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .blocks import number_of_blocks, power_of_2, samples_each
from .common import ABOUT, jit
from .tuning import Candidate, tuned

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None


def _fit_scale(candidate: Candidate, arguments: dict[str, Any]) -> Candidate:
    block = min(candidate["elements"] // arguments["R_BLOCK"], power_of_2(arguments["size"]))
    return {"BLOCK": max(1, block), "num_warps": candidate["num_warps"]}


@jit
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
@partial(jit, do_not_specialize=ABOUT[:1])
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


@jit
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


def _nyquist(width: int) -> int:
    """The column of the highest frequency, which an odd width does not have."""
    return -1 if width % 2 else width // 2


def launch(
    out: Tensor, spectra: Tensor, frequency_group: Tensor, kernel: Tensor, scale: float, edge: float, width: int
) -> None:
    """Fill `out`; all as for `fdconv.gpu.ops.scale_spectrum`."""
    spectra, frequency_group, kernel = spectra.contiguous(), frequency_group.contiguous(), kernel.contiguous()
    ratio, d1, d2_half, _ = spectra.shape
    samples, size = len(kernel), d1 * d2_half * 2

    def grid(sizes: dict[str, Any]) -> tuple[int, int]:
        blocks = number_of_blocks(size, sizes["BLOCK"])
        return blocks, number_of_blocks(samples, samples_each(samples, blocks))

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


def launch_backward(
    grad: Tensor, spectra: Tensor, frequency_group: Tensor, kernel: Tensor, scale: float, edge: float, width: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `spectra` and `kernel`."""
    grad, spectra = grad.contiguous(), spectra.contiguous()
    frequency_group, kernel = frequency_group.contiguous(), kernel.contiguous()
    ratio, d1, d2_half, _ = spectra.shape
    samples = len(kernel)
    if samples == 0:
        return torch.zeros_like(spectra), torch.zeros_like(kernel)
    rows, columns = min(16, power_of_2(d1)), min(64, power_of_2(2 * d2_half))
    tiles = number_of_blocks(d1, rows) * number_of_blocks(2 * d2_half, columns)
    each = samples_each(samples, tiles * ratio)
    chunks = number_of_blocks(samples, each)
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

"""Fourier disjoint weight (FDW): a layer's weight as an image, its spectrum, and the frequency groups of the spectrum.

Shapes: `D1 = C_out*k_h`, `D2 = (C_in/groups)*k_w`, `D2h = D2//2 + 1`; `n` groups, `r` spectra (`param_ratio`).
Source: FDConv (arXiv 2503.18783), section 3.2.

What is stored is an isometric spectrum: the weight is `irfft2(scale * e * sum of the spectra)`, with the `scale` of
`isometric_scale` and `e` of `column_factors`. As a map `J` from the stored numbers to the weight it satisfies
`J J^T = 1`, so that SGD on them, momentum and decay included, moves the weight exactly as SGD on the weight does, and
Adam moves it by as much. (Columns 0 and `D2/2` of a half spectrum stand for one frequency, all others for two.)
"""

from __future__ import annotations

from math import gcd, sqrt
from typing import Any

import torch
from torch import Tensor

from .constants import constant
from .onnx_fft import planes, real_image, writes_onnx


def weight_to_image(weight: Tensor) -> Tensor:
    """Lay a convolution weight `(C_out, C_in/groups, k_h, k_w)` out as one image `(D1, D2)`."""
    out_channels, in_channels, k_h, k_w = weight.shape
    return weight.permute(0, 2, 1, 3).reshape(out_channels * k_h, in_channels * k_w)


def image_to_weight(image: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Undo `weight_to_image` on a batch: `(B, D1, D2)` to a view `(B, C_out, C_in/groups, k_h, k_w)`."""
    batch, d1, d2 = image.shape
    k_h, k_w = kernel_size
    return image.view(batch, d1 // k_h, k_h, d2 // k_w, k_w).permute(0, 1, 3, 2, 4)


EDGE = sqrt(2)
"""Factor of the edge columns of an isometric spectrum, in which one number moves one frequency, and not two."""


def isometric_scale(d1: int, d2: int, ratio: int) -> float:
    """The factor at which the weight image `(d1, d2)` comes out of `ratio` isometric spectra."""
    return sqrt(d1 * d2 / (2 * ratio))


def edge_columns(width: int, device: torch.device) -> Tensor:
    """Which columns of a half spectrum stand for one frequency, `(D2h,)`: 0, and `D2/2` of an even width `D2`."""
    column = torch.arange(width // 2 + 1, dtype=torch.int64, device=device)
    return (column == 0) | (2 * column == width)


def column_factors(width: int, scale: float, edge: float, like: Tensor) -> Tensor:
    """`scale` for each column of a half spectrum, and `scale*edge` for its edges: `(D2h, 1)`, of the kind of `like`."""
    return (scale + scale * (edge - 1) * edge_columns(width, like.device).to(like.dtype)).unsqueeze(1)


def frequency_groups(d1: int, d2: int, kernel_num: int) -> Tensor:
    """Cut the half spectrum of a `(d1, d2)` image into groups of growing frequency.

    The order is by radius, and within one radius by row and column. Radii are compared as integers, so it is the
    same on every device and with every version of torch. The first `N mod n` of the `n` groups hold one coefficient
    more than the others; where `n` exceeds the number `N` of coefficients, the last groups stay empty.

    Returns:
        The group of every coefficient, `(d1, d2//2 + 1)`, uint8 (int32 for more than 256 groups), on the CPU.
    """
    return constant(_frequency_groups, d1, d2, kernel_num).clone()


def _frequency_groups(d1: int, d2: int, kernel_num: int) -> Tensor:
    common = gcd(d1, d2)
    whole: Any = {"dtype": torch.int64, "device": "cpu"}
    rows = torch.arange(d1, **whole)
    rows = torch.minimum(rows, d1 - rows) * (d2 // common)
    columns = torch.arange(d2 // 2 + 1, **whole) * (d1 // common)
    squared_radius = rows[:, None] ** 2 + columns**2
    order = torch.sort(squared_radius.flatten(), stable=True).indices
    return groups_from_order(order, kernel_num).view(d1, d2 // 2 + 1)


def groups_from_order(order: Tensor, kernel_num: int) -> Tensor:
    """Group of every coefficient, `(N,)`, from the coefficients' flat indices `(N,)` in ascending frequency."""
    larger = len(order) % kernel_num
    whole: Any = {"dtype": torch.int64, "device": order.device}
    sizes = torch.full((kernel_num,), len(order) // kernel_num, **whole)
    sizes[:larger] += 1
    groups = torch.empty(len(order), dtype=group_dtype(kernel_num), device=order.device)
    groups[order] = torch.arange(kernel_num, **whole).repeat_interleave(sizes).to(groups.dtype)
    return groups


@torch.no_grad()
def mended_groups(groups: Tensor, d1: int, d2: int, kernel_num: int) -> Tensor | None:
    """What a map of groups was before somebody averaged it with its like and rounded down; itself if nobody did.

    Averages of a model that go over buffers of whole numbers, too, do so: a whole group falls onto the one below.

    Returns:
        A map `(d1, d2//2 + 1)` in which each group has as many coefficients as it should; None where that is not known.
    """
    held = groups.to("cpu", torch.int64)
    number, larger = divmod(held.numel(), kernel_num)
    if int(held.min()) >= 0 and int(held.max()) < kernel_num:
        sizes = held.flatten().bincount(minlength=kernel_num)
        if bool((sizes[:larger] == number + 1).all() and (sizes[larger:] == number).all()):
            return groups
    usual = frequency_groups(d1, d2, kernel_num)
    fallen = usual.to(torch.int64) - held
    return usual if bool(((fallen == 0) | (fallen == 1)).all()) else None


def group_dtype(kernel_num: int) -> torch.dtype:
    """A small integer type that holds every group number, for the map is saved with the weights.

    Not int16, which torch.distributed cannot send.
    """
    return torch.uint8 if kernel_num <= 256 else torch.int32


def image_to_spectra(image: Tensor, ratio: int) -> Tensor:
    """Split the spectrum of an image `(D1, D2)` into `ratio` spectra `(r, D1, D2h, 2)` that sum to it.

    Equal shares would receive equal gradients and stay equal for ever. So each coefficient is shared out by weights
    `(1 + cos(2*pi*i/r + phase))/r`, which sum to one, with a phase that differs from coefficient to coefficient.
    """
    spectrum = torch.view_as_real(torch.fft.rfft2(image))
    if ratio == 1:
        return spectrum.unsqueeze(0)
    d1, d2_half, _ = spectrum.shape
    golden_ratio = 0.6180339887498949  # multiples of it spread evenly over the circle
    # On the CPU, where float64 always exists: float32 has no digits left for the fraction of a large multiple.
    index = torch.arange(d1 * d2_half, dtype=torch.float64, device="cpu").view(d1, d2_half)
    turns = torch.arange(ratio, dtype=torch.float64, device="cpu").view(ratio, 1, 1) / ratio
    share = (1 + torch.cos(2 * torch.pi * (turns + golden_ratio * index))) / ratio
    return spectrum * share.to(spectrum.device, spectrum.dtype).unsqueeze(-1)


def spectra_to_image(spectra: Tensor, scale: float, edge: float, width: int) -> Tensor:
    """Sum the spectra `(r, D1, D2h, 2)`, float32 or float64, scale them and transform back.

    Args:
        scale: factor of them all.
        edge: another one, of their edge columns.
        width: `D2`; the half spectrum alone does not tell an odd width from an even one.

    Returns:
        The weight image `(1, D1, D2)`.
    """
    summed = spectra.sum(0, keepdim=True) * column_factors(width, scale, edge, spectra)
    if writes_onnx():
        return real_image(planes(summed, width), width)
    spectrum = torch.view_as_complex(summed.contiguous())
    return torch.fft.irfft2(spectrum, s=(spectrum.shape[1], width))

"""Low-pass filters of feature maps: what FBM splits its input by."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import FDConfig
from .constants import constant
from .modulation import gate
from .precision import exact_dtype
from .strides import contiguous


def fourier_basis(size: int, highest: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Orthonormal real Fourier basis up to a frequency: columns `1, cos 1, sin 1, cos 2, sin 2, ...`

    Columns come in ascending frequency, so the basis of a narrower band is the first columns of this one.

    Args:
        size: number of positions.
        highest: highest frequency, in cycles per `size` positions, at most `size // 2`.

    Returns:
        `(size, 1 + 2*highest)`.
    """
    column = torch.arange(1 + 2 * highest, dtype=torch.int64, device=device)
    frequency = (column + 1) // 2
    # The phase is reduced in integers: at large sizes a product of floats would lose digits. A sine is a cosine a
    # quarter turn later.
    phase = torch.arange(size, dtype=torch.int64, device=device)[:, None] * frequency % size
    sine = (column > 0) & (column % 2 == 0)
    # Divided last: while tracing a size is a tensor, and its quotient with a number would be of the default dtype.
    angle = (4 * phase - size * sine).to(exact_dtype(device)) * torch.pi / (2 * size)
    # The highest frequency of an even size has no sine, and its cosine is twice as long.
    twice = (frequency > 0) & (2 * frequency != size)
    return (angle.cos() * ((1 + twice.to(angle.dtype)) / size).sqrt()).to(dtype)


def ranks(height: int, width: int, k: int) -> tuple[int, int]:
    """How many basis functions of rows and of columns a band keeps: all up to `1/(2k)` cycles a position."""
    return 1 + 2 * (height // (2 * k)), 1 + 2 * (width // (2 * k))


def axis_bases(height: int, width: int, k: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The bases of rows `(H, R)` and of columns `(W, S)` of a band, and of the narrower ones in their first columns."""
    rows, columns = ranks(height, width, k)
    return fourier_basis(height, rows // 2, device, dtype), fourier_basis(width, columns // 2, device, dtype)


def flat_basis(
    height: int, width: int, bands: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, list[int]]:
    """One basis for both axes: products of their bases, those of the narrowest band first.

    Returns:
        `(H*W, N)`, and for each band how many of its columns are the band's.
    """
    rows, columns = axis_bases(height, width, bands[0], device, dtype)
    products = (rows[:, None, :, None] * columns[:, None, :]).flatten(2).flatten(0, 1)
    band = torch.zeros(rows.shape[1], columns.shape[1], dtype=torch.int64, device=device)
    for k in bands:
        kept_rows, kept_columns = ranks(height, width, k)
        band[:kept_rows, :kept_columns] += 1
    order = band.flatten().sort(descending=True, stable=True).indices
    return products[:, order].contiguous(), [math.prod(ranks(height, width, k)) for k in bands]


def low_passes(x: Tensor, bands: tuple[int, ...]) -> list[Tensor]:
    """Low-pass a feature map: for each `k` keep the frequencies with `max(|f_h|, |f_w|) <= 1/(2k)`.

    One analysis serves all bands, for their bases are nested.

    Args:
        x: `(B, C, H, W)`, float32 or float64.
        bands: the `k`, ascending.

    Returns:
        A map of the shape and dtype of `x` for each band.
    """
    height, width = x.shape[-2:]
    rows, columns = constant(axis_bases, height, width, bands[0], x.device, x.dtype, of_input=True)
    coefficients = rows.T @ (x @ columns)
    passed = []
    for k in bands:
        n_rows, n_columns = ranks(height, width, k)
        kept = coefficients[..., :n_rows, :n_columns]
        passed.append(rows[:, :n_rows] @ (kept @ columns[:, :n_columns].T))
    return passed


def interpolated_masks(
    height: int, width: int, bands: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The masks that official checkpoints were trained with: those of a 64x64 map, stretched to this one.

    The stretch is by nearest neighbour in FFT order, so a mask may keep a frequency and drop its negative.

    Returns:
        `(bands, H, W//2 + 1)`, zeros and ones.
    """
    # In float32 whatever the default: there 0.25 + 1e-8 rounds to 0.25, and band 2 loses the frequency 1/4 itself.
    row_frequency = torch.fft.fftfreq(64, device=device, dtype=torch.float32).abs()
    column_frequency = torch.fft.rfftfreq(64, device=device, dtype=torch.float32)
    frequency = torch.maximum(row_frequency[:, None], column_frequency)
    masks = torch.stack([(frequency < 0.5 / k + 1e-8).to(dtype) for k in bands])
    return F.interpolate(masks.unsqueeze(0), size=(height, width // 2 + 1), mode="nearest")[0]


def interpolated_low_passes(x: Tensor, bands: tuple[int, ...]) -> list[Tensor]:
    """The low-passes that official checkpoints were trained with, by `interpolated_masks`; as `low_passes` else."""
    masks = constant(interpolated_masks, *x.shape[-2:], bands, x.device, x.dtype, of_input=True)
    if x.numel() == 0:  # of which torch takes no transform
        return [x] * len(bands)
    spectrum = torch.fft.rfft2(x)
    return [torch.fft.irfft2(spectrum * mask, s=x.shape[-2:]) for mask in masks]


def soft_low_passes(x: Tensor, edges: Tensor, softness: float) -> list[Tensor]:
    """Low-passes whose edges may be learned: either axis keeps its frequencies `f` to `sigmoid((edge - |f|)/softness)`.

    Args:
        x: `(B, C, H, W)`, float32 or float64.
        edges: `(B, bands)`, or `(1, bands)` for all samples, in cycles a position.
        softness: in cycles a position.

    Returns:
        A map of the shape and dtype of `x` for each band.
    """

    def along(size: int) -> Tensor:
        """The low-passes of one axis as matrices, `(bands, B, 1, size, size)`."""
        basis = constant(fourier_basis, size, size // 2, x.device, x.dtype, of_input=True)[:, :size]
        frequency = ((torch.arange(size, dtype=torch.int64, device=x.device) + 1) // 2).to(x.dtype) / size
        kept = torch.sigmoid((edges.T[..., None] - frequency) / softness)
        return ((basis * kept.unsqueeze(2)) @ basis.T).unsqueeze(2)

    return [rows @ x @ columns for rows, columns in zip(along(x.shape[2]), along(x.shape[3]), strict=True)]


def steps(logits: Tensor, config: FDConfig) -> Tensor:
    """The factors of the input and of its low-passes, from the logits of the maps `A`.

    The paper's sum over bands, rearranged so that no band has to be formed, is `A_1*x + sum_i (A_{i+1} - A_i)*L_i(x)`,
    with the last `A` being 1 unless `band_lowfreq`.

    Args:
        logits: `(B, groups*maps, H, W)`.
        config: the operator's settings.

    Returns:
        `(B*groups, 1 + bands, H, W)`.
    """
    logits = logits.unflatten(1, (config.band_groups, -1)).flatten(0, 1)
    maps = gate(logits.movedim(1, -1), config.band_activation).movedim(-1, 1)
    parts = [maps[:, :1], maps[:, 1:] - maps[:, :-1]]
    return torch.cat(parts if config.band_lowfreq else [*parts, 1 - maps[:, -1:]], dim=1)


def modulated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    config: FDConfig,
    edges: Tensor | None = None,
    split: Callable[[Tensor, tuple[int, ...]], list[Tensor]] | None = None,
) -> Tensor:
    """Weigh the bands of a feature map, in differentiable operations of torch.

    Args:
        x: `(B, C, H, W)`, float32 or float64.
        weight: of the convolution that gives the maps' logits, `(groups*maps, C/groups, 3, 3)`.
        bias: of it, `(groups*maps,)`.
        config: the operator's settings.
        edges: of the bands, `(B, bands)` or `(1, bands)`, where they move.
        split: gives the low-passes, as `low_passes` does, where they are none of ours.

    Returns:
        The shape and dtype of `x`.
    """
    x = contiguous(x)
    factors = steps(F.conv2d(x, weight, bias, padding=1, groups=config.band_groups), config)
    groups = x.unflatten(1, (config.band_groups, -1)).flatten(0, 1)
    y = factors[:, :1] * groups
    if split is not None:
        low = split(groups, config.bands)
    elif edges is not None:
        shared = edges.shape[0] == 1
        edges = edges if shared else edges.repeat_interleave(config.band_groups, 0)
        low = soft_low_passes(groups, edges, config.band_softness)
    else:
        low = (low_passes if config.band_mask == "exact" else interpolated_low_passes)(groups, config.bands)
    for band, passed in enumerate(low, 1):
        y = y + factors[:, band : band + 1] * passed
    return y.unflatten(0, (-1, config.band_groups)).flatten(1, 2)

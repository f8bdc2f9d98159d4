"""FreqSelect: maps that weigh the frequency bands of a feature map (FADC, arXiv 2403.05369, section 3.4).

The sum over bands is FDConv's FBM; the low-passes are not. The authors cut a square out of the centred spectrum whose
sides are rounded, and of an even size it holds a frequency without its negative; then they take the real part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fdconv import FDConfig
from fdconv.bands import BandModulation
from fdconv.constants import constant
from fdconv.low_pass import fourier_basis, modulated
from fdconv.precision import exact_dtype, fft_dtype, without_autocast


class Axis(NamedTuple):
    """The low-passes of one axis, in its real Fourier basis."""

    basis: Tensor
    """`(size, N)`, columns `1, cos 1, sin 1, cos 2, ...`"""
    other: Tensor
    """For each column that of the sine to a cosine, and the other way round, `(N,)`."""
    even: list[Tensor]
    """For each band by how much its columns are multiplied: a half for a frequency that lacks its negative."""
    odd: list[Tensor]
    """For each band by how much the other column is added to its columns."""


def highest(size: int, k: int) -> int:
    """A frequency that the band does not exceed. For `k` from 2 it is at most `size // 2`."""
    return (size + k) // (2 * k)


def axis(size: int, bands: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Axis:
    """The bands of one axis.

    Of the centred spectrum a band keeps what lies from `round(size/2 - size/(2k))` to before
    `round(size/2 + size/(2k))`, halves rounded to even.
    """
    exact = exact_dtype(device)
    column = torch.arange(1 + 2 * highest(size, bands[0]), dtype=torch.int64, device=device)
    frequency = (column + 1) // 2
    whole = column * 0 + size  # a tensor: while somebody traces, the size is a symbol, which Python does not round
    is_sine = (column > 0) & (column % 2 == 0)
    even, odd = [], []
    for k in bands:
        low = torch.round((whole * (k - 1)).to(exact) / (2 * k))
        high = torch.round((whole * (k + 1)).to(exact) / (2 * k))
        plus, minus = (
            ((at >= low) & (at < high)).to(dtype)
            for at in ((whole // 2 + frequency) % size, (whole // 2 - frequency) % size)
        )
        even.append((plus + minus) / 2)
        odd.append((plus - minus) / 2 * torch.where(is_sine, 1, -1))
    other = torch.where(is_sine, column - 1, torch.where(column > 0, column + 1, column))
    return Axis(fourier_basis(size, highest(size, bands[0]), device, dtype), other, even, odd)


def centred_low_passes(x: Tensor, bands: tuple[int, ...]) -> list[Tensor]:
    """The real parts of what the authors' masks of the centred spectrum leave of a feature map.

    A mask `M` is a product of one for rows and one for columns, but its mean with its mirror image, which is what the
    real part amounts to, is the sum of two: `Re(A x B) = Re A x Re B - Im A x Im B`. `Im A` turns the cosine of the
    frequency that lacks its negative into the sine, and the other way round.

    Args:
        x: `(B, C, H, W)`, float32 or float64.
        bands: the `k` from 2 on, ascending.

    Returns:
        A map of the shape and dtype of `x` for each band.
    """
    rows, columns = (constant(axis, size, bands, x.device, x.dtype, of_input=True) for size in x.shape[-2:])
    coefficients = rows.basis.T @ (x @ columns.basis)
    turned = coefficients.index_select(-2, rows.other).index_select(-1, columns.other)
    passed = []
    for band, k in enumerate(bands):
        kept = coefficients * (rows.even[band][:, None] * columns.even[band])
        kept = kept - turned * (rows.odd[band][:, None] * columns.odd[band])
        to_rows, to_columns = rows.basis, columns.basis
        if all(isinstance(size, int) for size in x.shape[-2:]):  # of symbols nobody knows that fewer are fewer
            n_rows, n_columns = (1 + 2 * highest(size, k) for size in x.shape[-2:])
            kept, to_rows, to_columns = kept[..., :n_rows, :n_columns], to_rows[:, :n_rows], to_columns[:, :n_columns]
        passed.append(to_rows @ (kept @ to_columns.T))
    return passed


class FreqSelect(BandModulation):
    """`(B, C, H, W)` to the same shape, any float dtype; while its maps are neutral the input itself, exactly.

    `y = sum_i A_i (L_(i-1) x - L_i x) + A x's rest`, with a map `A_i = 2 sigmoid(conv_i x)` for each group of channels.
    Parameters have the official names, shapes and scale: `freq_weight_conv_list.{i}.{weight, bias}`.

    Args:
        in_channels: `C`.
        bands: the `k` of the low-passes, from 2 on, ascending.
        low_band: give what the last low-pass leaves a map too.
        map_groups: groups of channels that have maps of their own; divides `C`.
        like: a tensor whose dtype and device the parameters have.

    Raises:
        ValueError: `map_groups` does not divide `C`.
    """

    def __init__(self, in_channels: int, bands: Sequence[int], low_band: bool, map_groups: int, like: Tensor) -> None:
        config = FDConfig(spectrum="paper", bands=tuple(bands), band_lowfreq=low_band, band_groups=map_groups)
        super().__init__(in_channels, config, like.device, like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            wide = x.to(fft_dtype(x.dtype))
            weight, bias = (one.to(wide.dtype) for one in self.logits_of())
            return modulated(wide, weight, bias, self.config, split=centred_low_passes).to(x.dtype)

    def maps(self, x: Tensor) -> Tensor:
        """`A`, `(B, groups, maps, H, W)`, that of the highest band first."""
        weight, bias = (one.to(x.dtype) for one in self.logits_of())
        logits = F.conv2d(x, weight, bias, padding=1, groups=self.config.band_groups)
        return 2 * torch.sigmoid(logits.unflatten(1, (self.config.band_groups, -1)))

    def multiply_adds(self, height: int, width: int) -> dict[str, int]:
        """What a sample of this size costs: its maps, and splitting and weighing its bands."""
        weight, _ = self.logits_of()
        channels = self.config.band_groups * weight.shape[1]
        maps = weight.numel() * height * width
        ranks = [(1 + 2 * highest(height, k), 1 + 2 * highest(width, k)) for k in self.config.bands]
        rows, columns = ranks[0]
        split = (height * width + rows * height) * columns
        split += sum(2 * rows * columns + (n * m + height * n) * width for n, m in ranks)
        weighing = (1 + len(ranks)) * height * width
        return {"maps": maps, "bands": channels * (split + weighing)}

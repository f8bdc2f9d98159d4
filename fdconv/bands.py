"""Frequency band modulation (FBM): maps that weigh the frequency bands of a feature map, position by position.

The exact low-pass is a product of a row set and a column set of frequencies, so it is a projection onto cosines and
sines on either axis: real matrix products, at any size. Source: FDConv (arXiv 2503.18783), section 3.4.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import FDConfig
from .modulation import ZeroInit, gate
from .precision import exact_dtype, fft_dtype, without_autocast


def fourier_basis(size: int, highest: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Orthonormal real Fourier basis up to a frequency: columns `1, cos 1, sin 1, cos 2, sin 2, ...`

    Columns come in ascending frequency, so the basis of a narrower band is the first columns of this one.

    Args:
        size: number of positions.
        highest: highest frequency, in cycles per `size` positions, at most `size // 2`.

    Returns:
        `(size, 1 + 2*highest)`.
    """
    column = torch.arange(1 + 2 * highest, device=device)
    frequency = (column + 1) // 2
    # The phase is reduced in integers: at large sizes a product of floats would lose digits. A sine is a cosine a
    # quarter turn later.
    phase = torch.arange(size, device=device)[:, None] * frequency % size
    sine = (column > 0) & (column % 2 == 0)
    angle = (4 * phase - size * sine).to(exact_dtype(device)) * (torch.pi / (2 * size))
    # The highest frequency of an even size has no sine, and its cosine is twice as long.
    twice = (frequency > 0) & (2 * frequency != size)
    return (angle.cos() * ((1 + twice.to(angle.dtype)) / size).sqrt()).to(dtype)


@lru_cache(maxsize=64)
def _cached_basis(size: int, highest: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return fourier_basis(size, highest, device, dtype)


def _basis(size: int, highest: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Tensors made while tracing belong to the trace and must not outlive it.
    if torch.compiler.is_compiling() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return fourier_basis(size, highest, device, dtype)
    return _cached_basis(size, highest, device, dtype)


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
    rows = _basis(height, height // (2 * bands[0]), x.device, x.dtype)
    columns = _basis(width, width // (2 * bands[0]), x.device, x.dtype)
    coefficients = rows.T @ (x @ columns)
    passed = []
    for k in bands:
        n_rows, n_columns = 1 + 2 * (height // (2 * k)), 1 + 2 * (width // (2 * k))
        kept = coefficients[..., :n_rows, :n_columns]
        passed.append(rows[:, :n_rows] @ (kept @ columns[:, :n_columns].T))
    return passed


def interpolated_low_passes(x: Tensor, bands: tuple[int, ...]) -> list[Tensor]:
    """The low-passes that official checkpoints were trained with: masks of a 64x64 map, stretched to this one.

    The stretch is by nearest neighbour in FFT order, so a mask may keep a frequency and drop its negative. It takes and
    returns what `low_passes` does.
    """
    height, width = x.shape[-2:]
    # In float32 whatever the default: there 0.25 + 1e-8 rounds to 0.25, and band 2 loses the frequency 1/4 itself.
    row_frequency = torch.fft.fftfreq(64, device=x.device, dtype=torch.float32).abs()
    column_frequency = torch.fft.rfftfreq(64, device=x.device, dtype=torch.float32)
    frequency = torch.maximum(row_frequency[:, None], column_frequency)
    masks = torch.stack([(frequency < 0.5 / k + 1e-8).to(x.dtype) for k in bands])
    masks = F.interpolate(masks.unsqueeze(0), size=(height, width // 2 + 1), mode="nearest")[0]
    spectrum = torch.fft.rfft2(x)
    return [torch.fft.irfft2(spectrum * mask, s=(height, width)) for mask in masks]


class BandModulation(nn.Module):
    """FBM: `(B, C, H, W)` to the same shape; with neutral maps the input itself, exactly.

    `y = A_1*x + sum_i (A_{i+1} - A_i)*L_i(x)`, with the last `A` being 1 unless `band_lowfreq`. This is the paper's sum
    over bands, rearranged so that no band has to be formed. Raises `ValueError` if `band_groups` does not divide `C`.
    """

    def __init__(
        self,
        in_channels: int,
        config: FDConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels % config.band_groups:
            raise ValueError(f"band_groups={config.band_groups} does not divide the {in_channels} input channels")
        self.config = config
        shape = (config.band_groups, in_channels // config.band_groups, 3, 3)
        maps = len(config.bands) + config.band_lowfreq
        self.freq_weight_conv_list = nn.ModuleList(ZeroInit(*shape, device=device, dtype=dtype) for _ in range(maps))

    def maps(self, x: Tensor) -> Tensor:
        """The maps `A` of `(B, C, H, W)`: `(B, groups, 1, H, W, maps)`, in the dtype of `x`; neutral 1."""
        groups = self.config.band_groups
        convs: Any = self.freq_weight_conv_list
        weight = torch.stack([conv.weight for conv in convs], dim=1).flatten(0, 1)
        bias = torch.stack([conv.bias for conv in convs], dim=1).flatten()
        logits = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1, groups=groups)
        logits = logits.unflatten(1, (groups, 1, len(convs)))
        return gate(logits.movedim(3, -1), self.config.band_activation)

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        split = low_passes if config.band_mask == "exact" else interpolated_low_passes

        def in_groups(t: Tensor) -> Tensor:
            return t.unflatten(1, (config.band_groups, -1))

        with without_autocast(x.device):
            wide = x.to(fft_dtype(x.dtype))
            maps = self.maps(wide).unbind(-1)  # wide as well: logits beyond float16's range make a softmax NaN
            if not config.band_lowfreq:
                maps = (*maps, torch.ones_like(maps[0]))
            y = maps[0] * in_groups(wide)
            for above, below, passed in zip(maps[:-1], maps[1:], split(wide, config.bands), strict=True):
                y = y + (below - above) * in_groups(passed)
            return y.flatten(1, 2).to(x.dtype)

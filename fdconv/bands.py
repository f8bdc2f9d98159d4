"""Frequency band modulation (FBM): maps that weigh the frequency bands of a feature map, position by position.

The exact low-pass is a product of a row set and a column set of frequencies, so it is a projection onto cosines and
sines on either axis: real matrix products, at any size. Source: FDConv (arXiv 2503.18783), section 3.4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import FDConfig
from .cpu import band_loop
from .cpu.workspace import is_plain
from .low_pass import modulated
from .modulation import ZeroInit, gate
from .precision import fft_dtype, without_autocast

SLOW_MAPS = 48
"""Channels from which on the weights of the maps' logits are scaled by the inverse of their number: the more inputs a
logit has, the further a step of Adam moves it."""


class BandEdges(nn.Module):
    """Edges of the bands that training moves, in cycles a position: `(B, bands)`, or `(1, bands)` unless `dynamic`."""

    def __init__(
        self, in_channels: int, config: FDConfig, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.bands = config.bands
        self.edge = nn.Parameter(torch.empty(1, len(config.bands), device=device, dtype=dtype))
        dynamic = config.band_edges == "dynamic"
        self.scale = ZeroInit(len(config.bands), in_channels, device=device, dtype=dtype) if dynamic else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the edges of the fixed bands."""
        with torch.no_grad():
            for band, k in enumerate(self.bands):
                self.edge[:, band] = 0.5 / k

    def forward(self, x: Tensor) -> Tensor:
        edges = self.edge.to(x.dtype)
        if self.scale is None or self.scale.bias is None:
            return edges
        weight, bias = self.scale.weight.to(x.dtype), self.scale.bias.to(x.dtype)
        return edges * gate(F.linear(x.mean((2, 3)), weight, bias), "sigmoid")


class BandModulation(nn.Module):
    """FBM: `(B, C, H, W)` to the same shape; with neutral maps the input itself, exactly.

    Raises `ValueError` if `band_groups` does not divide `C`.
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
        self.speed = 1.0 if config.spectrum == "paper" else min(1.0, SLOW_MAPS / shape[1])
        maps = len(config.bands) + config.band_lowfreq
        self.freq_weight_conv_list = nn.ModuleList(ZeroInit(*shape, device=device, dtype=dtype) for _ in range(maps))
        self.edges = BandEdges(in_channels, config, device, dtype) if config.band_edges != "fixed" else None

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            wide = x.to(fft_dtype(x.dtype))  # the maps as well: logits beyond float16's range make a softmax NaN
            weight, bias = (one.to(wide.dtype) for one in self.logits_of())
            if self.edges is None and is_plain(wide):
                return band_loop.apply(wide, weight, bias, self.config).to(x.dtype)
            edges = None if self.edges is None else self.edges(wide)
            return modulated(wide, weight, bias, self.config, edges).to(x.dtype)

    def logits_of(self) -> tuple[Tensor, Tensor]:
        """Weight `(groups*maps, C/groups, 3, 3)` and bias of the convolution that gives the maps' logits."""
        convs: Any = self.freq_weight_conv_list
        weight, bias = (self._by_group([getattr(conv, name) for conv in convs]) for name in ("weight", "bias"))
        return (weight if self.speed == 1.0 else weight * self.speed), bias

    def _by_group(self, parameters: list[Tensor]) -> Tensor:
        """Those of all maps, `(groups, ...)` each, as `(groups*maps, ...)`: the maps of a group follow one another."""
        # Concatenated first, so that what flows back to each parameter lies in memory as it does.
        return torch.cat(parameters).unflatten(0, (len(parameters), -1)).transpose(0, 1).flatten(0, 1)

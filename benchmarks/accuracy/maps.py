"""Where the maps of band modulation are bright.

The paper expects high bands to be kept at edges, and low ones in flat parts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdsurgery.inspect import band_maps

from .data import HELD_OUT, picture

SIDE = 192
"""Of the middle of a picture that is looked at."""


def edge_correlations(model: nn.Module, device: torch.device) -> list[float]:
    """Correlation of each band's map with edge strength, high band first, over pictures that no task trains on.

    Edge strength is the magnitude of Sobel's gradient of the picture, averaged down to a layer's map. Pearson's
    correlation over the positions of a map, then the mean over layers and pictures.
    """
    found = []
    for name in HELD_OUT:
        image = middle(name)
        edges = edge_strength(image).to(device)
        for found_maps in band_maps(model, image.to(device)).values():
            maps = found_maps[0, 0]
            seen = F.adaptive_avg_pool2d(edges, maps.shape[-2:]).flatten()
            found.append([_correlation(one.flatten(), seen) for one in maps])
    return np.nanmean(np.array(found), axis=0).tolist()


def middle(name: str) -> Tensor:
    """The middle of a picture, with mean 0 and deviation 1: `(1, 1, S, S)`."""
    whole = torch.from_numpy(np.ascontiguousarray(picture(name)))
    top, left = ((size - SIDE) // 2 for size in whole.shape)
    part = whole[top : top + SIDE, left : left + SIDE]
    return ((part - part.mean()) / part.std())[None, None]


def edge_strength(image: Tensor) -> Tensor:
    """Magnitude of Sobel's gradient: `(1, 1, S, S)` to the same."""
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([across, across.T]).unsqueeze(1)
    return F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1, keepdim=True)


def draw_maps(model: nn.Module, path: Path, device: torch.device) -> None:
    """Pictures, their edge strength, and the maps of the first layer that has any."""
    from matplotlib.figure import Figure

    shown = HELD_OUT[:3]
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    grid = figure.subplots(len(shown), 5)
    titles = ("picture", "edge strength", "above 1/4", "1/8 to 1/4", "1/16 to 1/8 cycles a pixel")
    for row, name in zip(grid, shown, strict=True):
        image = middle(name)
        first = next(iter(band_maps(model, image.to(device)).values()))
        columns = [image[0, 0], edge_strength(image)[0, 0], *first[0, 0].cpu()]
        for axes, title, values in zip(row, titles, columns, strict=True):
            axes.imshow(values, cmap="gray")
            axes.axis("off")
            if name == shown[0]:
                axes.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=60)


def _correlation(one: Tensor, other: Tensor) -> float:
    if float(one.std()) < 1e-6:  # a map that stayed neutral
        return float("nan")
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])

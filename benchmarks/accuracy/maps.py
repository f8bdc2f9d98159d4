"""Where the maps of band modulation are bright.

The paper expects high bands to be kept at edges, and low ones in flat parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv import FDConv2d
from fdconv.modulation import gate

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
        for maps in band_maps(model, image.to(device)):
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


@torch.no_grad()
def band_maps(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The maps that each layer with band modulation makes: `(bands, H, W)`, high band first, neutral at 1."""
    made: list[Tensor] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, FDConv2d) and layer.FBM is not None
        convs: Any = layer.FBM.freq_weight_conv_list
        logits = torch.cat([F.conv2d(inputs[0], conv.weight, conv.bias, padding=1) for conv in convs], dim=1)
        made.append(gate(logits.movedim(1, -1), layer.config.band_activation).movedim(-1, 1)[0])

    hooks = [
        layer.register_forward_pre_hook(look)
        for layer in model.modules()
        if isinstance(layer, FDConv2d) and layer.FBM is not None
    ]
    try:
        model.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
    return made


def draw_maps(model: nn.Module, path: Path, device: torch.device) -> None:
    """Pictures, their edge strength, and the maps of the first layer that has any."""
    from matplotlib.figure import Figure

    shown = HELD_OUT[:3]
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    grid = figure.subplots(len(shown), 5)
    titles = ("picture", "edge strength", "above 1/4", "1/8 to 1/4", "1/16 to 1/8 cycles a pixel")
    for row, name in zip(grid, shown, strict=True):
        image = middle(name)
        columns = [image[0, 0], edge_strength(image)[0, 0], *band_maps(model, image.to(device))[0].cpu()]
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

"""How the layers of a model share warehouses of cells: which layers, cells of what shape, and which cell is whose.

KernelWarehouse (Li and Yao, ICML 2024, arXiv 2406.07879), section 3: kernel partition and warehouse construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RecipeError

AGREED = ("ratio", "cell_in_ratio", "cell_out_ratio", "spatial_partition", "nonlocal_basis_ratio")
"""Settings that are of the warehouse, so that its layers cannot differ in them."""

WORKED_OUT = ("first", "start", "places", "cells", "cell_shape")
"""Settings that follow from all layers of a warehouse."""

FEW_CHANNELS = 16
"""Below that a layer shares with its like only, unless a rule names its warehouse."""

MOST_COEFFICIENTS = 2**29
"""Numbers in the last maps of the attention of all layers of a warehouse, beyond which it makes no sense."""


@dataclass(frozen=True)
class Shape:
    """What a warehouse must know of a layer."""

    name: str
    out_channels: int
    in_channels: int
    """Of one group."""
    kernel_size: tuple[int, int]
    """`(1, 1)` for a linear layer."""
    groups: int = 1

    @property
    def numel(self) -> int:
        """Numbers in the static weight."""
        return self.out_channels * self.in_channels * math.prod(self.kernel_size)


def stage_of(shape: Shape) -> str:
    """The warehouse of a layer whose rule names none: that of its stage.

    The stage is the part of the layer's name up to the first number, as in `layer1` of `layer1.0.conv2` and `stages.0`
    of `stages.0.blocks.1.conv`, and `all` where no module around it is numbered. Layers whose filters see few channels,
    of the image or of a group, are apart from the others, because cells that fit both would be very small.
    """
    parts = shape.name.split(".")[:-1]
    numbered = next((at for at, part in enumerate(parts) if part[-1:].isdigit()), None)
    stage = "all" if numbered is None else ".".join(parts[: numbered + 1])
    if shape.groups == 1 and shape.in_channels >= FEW_CHANNELS:
        return stage
    return f"{stage}, filters of {shape.in_channels} channels"


def shared_out(shapes: Sequence[Shape], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings of all layers in order, completed with their warehouse, its size and their places in it.

    Raises:
        RecipeError: layers of one warehouse cannot share, and why.
    """
    named = [
        {**its, "warehouse": stage_of(shape) if its.get("warehouse") is None else its["warehouse"]}
        for shape, its in zip(shapes, settings, strict=True)
    ]
    members: dict[str, list[int]] = {}
    for at, its in enumerate(named):
        members.setdefault(its["warehouse"], []).append(at)
    for name, group in members.items():
        found = _one_warehouse(name, [shapes[at] for at in group], [named[at] for at in group])
        for at, told in zip(group, found, strict=True):
            named[at] |= told
    return named


def _one_warehouse(name: str, shapes: Sequence[Shape], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    common = settings[0]
    for shape, its in zip(shapes, settings, strict=True):
        for key in AGREED:
            if its[key] != common[key]:
                raise RecipeError(
                    f"layers of the warehouse {name!r} differ in {key}: {common[key]} for {shapes[0].name!r}, "
                    f"{its[key]} for {shape.name!r}; give them one value, or warehouses of their own"
                )
    cell = _cell_shape(name, shapes, common)
    places = [shape.numel // math.prod(cell) for shape in shapes]
    ratio = common["ratio"]
    cells = max(int(ratio * sum(places)), 1)
    starts = [0]
    for count in places:
        starts.append(starts[-1] + cells_taken(count, ratio))
    if starts[-1] > cells:
        raise RecipeError(
            f"the warehouse {name!r} has {cells} cells at ratio {ratio:g}, and its layers of {places} places would "
            f"take {starts[-1]}: 1 over the ratio must divide the places of each layer"
        )
    needed = 0
    for shape, count, its in zip(shapes, places, settings, strict=True):
        own, basis = logits_of(count, cells, ratio, common["nonlocal_basis_ratio"])
        width = max(int(shape.in_channels * shape.groups * its["reduction"]), its["min_channels"])
        needed += count * (own + basis + 1) * width
    if needed > MOST_COEFFICIENTS:
        weights = sum(shape.numel for shape in shapes)
        raise RecipeError(
            f"the warehouse {name!r} has {cells:,} cells of {'x'.join(map(str, cell))}, and the attention of its "
            f"{len(shapes)} layers, {shapes[0].name!r} first, would need {needed:,} numbers to mix them for "
            f"{weights:,} weights; put layers that have few channels in common into warehouses of their own, or lower "
            "nonlocal_basis_ratio"
        )
    return [
        {"first": shapes[0].name, "start": start, "places": count, "cells": cells, "cell_shape": list(cell)}
        for start, count in zip(starts, places, strict=False)
    ]


def _cell_shape(name: str, shapes: Sequence[Shape], common: dict[str, Any]) -> tuple[int, int, int, int]:
    c_o = max(int(math.gcd(*(shape.out_channels for shape in shapes)) * common["cell_out_ratio"]), 1)
    c_i = max(int(math.gcd(*(shape.in_channels for shape in shapes)) * common["cell_in_ratio"]), 1)
    for shape in shapes:
        if shape.out_channels % c_o or shape.in_channels % c_i:
            raise RecipeError(
                f"cells of {c_o}x{c_i} channels do not tile {shape.name!r} of the warehouse {name!r}, which has "
                f"{shape.out_channels}x{shape.in_channels}: choose cell_out_ratio and cell_in_ratio so that they do"
            )
    if common["spatial_partition"]:
        return c_o, c_i, 1, 1
    sizes = {shape.kernel_size: shape.name for shape in shapes}
    if len(sizes) > 1:
        told = " and ".join(f"{h}x{w} of {one!r}" for (h, w), one in list(sizes.items())[:2])
        raise RecipeError(
            f"without spatial_partition a cell is as large as the kernel, and kernels of {name!r} differ: {told}"
        )
    return c_o, c_i, *shapes[0].kernel_size


def logits_of(places: int, cells: int, ratio: float, nonlocal_basis_ratio: float) -> tuple[int, int]:
    """How many logits of a place are for single cells, and how many for the basis that spans the others."""
    own = int(ratio * places)
    if nonlocal_basis_ratio >= 1 or own == cells:
        return cells, 0
    return own, max(int((cells - own) * nonlocal_basis_ratio), 16)


def cells_taken(places: int, ratio: float) -> int:
    """How many cells a layer takes for itself."""
    return places * int(ratio) if ratio >= 1 else sum(_is_filled(place, round(1 / ratio)) for place in range(places))


def assigned_cells(start: int, places: int, ratio: float, cells: int) -> list[int]:
    """The cell of each place that it has to itself; `cells`, which is beyond the last, stands for none."""
    if ratio >= 1:
        return [start + place * int(ratio) for place in range(places)]
    assigned, following = [], start
    for place in range(places):
        filled = _is_filled(place, round(1 / ratio))
        assigned.append(following if filled else cells)
        following += filled
    return assigned


def _is_filled(place: int, every: int) -> bool:
    return place % every == (place // every) % every

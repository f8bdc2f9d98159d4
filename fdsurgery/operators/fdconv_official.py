"""Checkpoints of the authors' FDConv code (https://github.com/Linwei-Chen/FDConv)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from fdconv import FDConv2d, FDLinear
from fdconv.official import (
    OURS,
    divides_evenly,
    public_arguments,
    public_groups,
    public_obstacle,
    public_setting_obstacle,
)

from .base import OfficialForm

MODULATION = ("KSM_Global.", "KSM_Local.", "FBM.")
"""How the names of the modulation's tensors begin."""


class FDConvOfficialForm(OfficialForm):
    """The spectrum as in the paper, groups of one size, no order saved, interpolated band masks."""

    settings = MappingProxyType({"spectrum": "paper"})
    written_of_plain = ("dft_weight",)

    def is_official(self, leaves: Collection[str]) -> bool:
        return "frequency_group" not in leaves

    def starts_anew(self, leaf: str, present: Collection[str]) -> bool:
        modulated = any(one.startswith(MODULATION) for one in present)
        return leaf in ("frequency_group", OURS) or (leaf.startswith(MODULATION) and not modulated)

    def is_ours_alone(self, leaf: str) -> bool:
        return leaf == OURS

    def misfit(self, present: Collection[str], expected: Collection[str]) -> str | None:
        local = "KSM_Local.conv.weight"
        if local in present and local not in expected:
            return "it is modulated as a convolution, and is a linear layer here"
        return None

    def factors(self, layer: nn.Module) -> dict[str, Tensor]:
        return _ours(layer).factors_from_paper()

    def complete(self, layer: nn.Module) -> None:
        own = _ours(layer)
        own.reset_modulation()
        own.frequency_group.copy_(public_groups(own))

    def obstacle(self, layer: nn.Module, *, from_plain: bool) -> str | None:
        own = _ours(layer)
        obstacle = public_obstacle(own) or public_setting_obstacle(own)
        if obstacle is None and not from_plain and not divides_evenly(own):
            return f"its coefficients make no {own.config.kernel_num} groups of one size"
        return obstacle

    def notes_on_reading(self) -> Iterator[str]:
        yield (
            "official checkpoints do not save the order of coefficients of equal radius; it was computed as the public "
            f"code does with torch {torch.__version__}, and is saved as frequency_group"
        )

    def notes_on_writing(
        self, layers: Mapping[str, nn.Module], read: Callable[[str, str], Tensor | None], *, from_plain: bool
    ) -> Iterator[str]:
        own = {fqn: _ours(layer) for fqn, layer in layers.items()}
        uneven = [fqn for fqn, layer in own.items() if not divides_evenly(layer)] if from_plain else []
        if uneven:
            yield (
                f"{len(uneven)} layers, {uneven[0]!r} first, make no {own[uneven[0]].config.kernel_num} groups of one "
                "size; the public code needs another kernel_num there"
            )
        told = Counter(json.dumps(public_arguments(layer)) for layer in own.values())
        for text, count in told.items():
            if arguments := json.loads(text):
                shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
                yield f"{count} layers of the public code must be built with {shown}, which no tensor tells"
        moved = total = 0
        for fqn, layer in own.items():
            if (groups := read(fqn, "frequency_group")) is not None:
                moved += int((groups != public_groups(layer)).sum())
                total += groups.numel()
        if moved:
            yield (
                f"{moved / total:.2%} of the coefficients are in another group in the order that the public code "
                f"computes with torch {torch.__version__}; it does not read frequency_group"
            )
        exact = sum(layer.config.band_mask == "exact" and layer.FBM is not None for layer in own.values())
        if exact and not from_plain:
            yield f"{exact} layers cut their bands exactly (band_mask: exact), and the public code interpolates a mask"


def _ours(layer: nn.Module) -> FDConv2d | FDLinear:
    assert isinstance(layer, (FDConv2d, FDLinear))
    return layer

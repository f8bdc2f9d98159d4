"""Frequency Dynamic Convolution as an operator."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from fdconv import FDConfig, FDConv2d, FDLinear

from ..discovery.effective import effective_layer
from ..discovery.site import Site
from ..errors import RecipeError, RewriteError, near_misses
from .same_padding import SameFDConv2d

_PLAIN_CLASS = "_plain_class"
"""Attribute of a layer in the place of one whose class was derived from `nn.Conv2d` or `nn.Linear`."""


class FDConvOperator:
    """Puts `FDConv2d` in the place of convolutions and `FDLinear` in the place of linear layers."""

    name = "fdconv"

    def settings(self, values: dict[str, Any]) -> dict[str, Any]:
        known = [field.name for field in fields(FDConfig)]
        for key in values:
            if key not in known:
                raise RecipeError(
                    f"{key!r} is no setting of fdconv; known: {', '.join(known)}{near_misses(key, known)}"
                )
        try:
            return FDConfig(**values).to_dict()
        except (TypeError, ValueError) as error:
            raise RecipeError(str(error)) from None

    def saved_settings(self, values: dict[str, Any]) -> dict[str, Any]:
        return self.settings({"spectrum": "paper", **values})  # version 0.1 knew no other, and did not say so

    def refusal(self, site: Site, settings: dict[str, Any]) -> str | None:
        config = FDConfig(**settings)
        banded = site.kind == "conv" and site.kernel_size[0] == site.kernel_size[1] in config.fbm_kernel_sizes
        if banded and site.in_channels % config.band_groups:
            return f"band_groups={config.band_groups} does not divide its {site.in_channels} input channels"
        return None

    def replace(self, layer: nn.Module, settings: dict[str, Any]) -> nn.Module:
        config = FDConfig(**settings)
        effective = effective_layer(layer)
        if isinstance(effective, str):
            raise RewriteError(effective)
        new: FDConv2d | FDLinear
        if isinstance(effective.layer, nn.Linear):
            new = FDLinear.from_linear(effective.layer, config)
        else:
            kind = SameFDConv2d if effective.pads_same else FDConv2d
            new = kind.from_conv(effective.layer, config)
        weight = layer._parameters.get("weight")
        if weight is not None:  # what is known of it holds for its spectrum: no decay, a learning rate of its own
            vars(new.dft_weight).update(vars(weight))
        if effective.verbatim and type(layer) not in (nn.Conv2d, nn.Linear):
            vars(new)[_PLAIN_CLASS] = type(layer)
        return new

    def owns(self, layer: nn.Module) -> bool:
        return isinstance(layer, (FDConv2d, FDLinear))

    def settings_of(self, layer: nn.Module) -> dict[str, Any]:
        assert isinstance(layer, (FDConv2d, FDLinear))
        return layer.config.to_dict()

    def restore(self, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, (FDConv2d, FDLinear))
        plain: nn.Module = layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear()
        vars(plain.weight).update(vars(layer.dft_weight))
        plain.__class__ = vars(layer).get(_PLAIN_CLASS, type(plain))
        return plain

"""The maps by which layers weigh the frequency bands of their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..operators import Operator, made_layers


@torch.no_grad()
def band_maps(model: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """The maps that the layers with band modulation make in one forward in evaluation mode.

    Args:
        model: on the device of its inputs; its mode is put back afterwards.
        inputs: of its forward.

    Returns:
        By the layer's name, in the order of the calls: `(B, band_groups, maps, H, W)` at the size of the layer's
        input, the map of the highest band first, neutral at 1. Of a layer that is called again, those of its last call.

    Examples:
        >>> import torch
        >>> from fdconv import FDConv2d
        >>> from fdsurgery.inspect import band_maps
        >>> model = torch.nn.Sequential(FDConv2d(8, 8, 3))
        >>> maps = band_maps(model, torch.randn(2, 8, 16, 16))
        >>> {name: tuple(of_layer.shape) for name, of_layer in maps.items()}
        {'0': (2, 1, 3, 16, 16)}
    """
    found: dict[str, Tensor] = {}

    def look(name: str, operator: Operator, layer: nn.Module, x: Tensor) -> None:
        maps = operator.band_maps(layer, x)
        if maps is not None:
            found[name] = maps

    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name, its=its: look(name, its, layer, inputs[0]))
        for name, (layer, its) in made_layers(model).items()
    ]
    training = model.training
    try:
        model.eval()(*inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found

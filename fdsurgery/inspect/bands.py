"""The maps by which layers weigh the frequency bands of their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv import FDConv2d
from fdconv.modulation import gate


@torch.no_grad()
def band_maps(model: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """The maps that the layers with band modulation make in one forward in evaluation mode.

    Args:
        model: on the device of its inputs; its mode is put back afterwards.
        inputs: of its forward.

    Returns:
        By the layer's name, in the order of the calls: `(B, band_groups, maps, H, W)` at the size of the layer's
        input, the map of the highest band first, neutral at 1. Of a layer that is called again, those of its last call.
    """
    found: dict[str, Tensor] = {}

    def look(name: str, layer: FDConv2d, x: Tensor) -> None:
        assert layer.FBM is not None
        groups = layer.config.band_groups
        logits = F.conv2d(x, *layer.FBM.logits_of(), padding=1, groups=groups).unflatten(1, (groups, -1))
        found[name] = gate(logits.movedim(2, -1), layer.config.band_activation).movedim(-1, 2)

    layers = {name: one for name, one in model.named_modules() if isinstance(one, FDConv2d) and one.FBM is not None}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: look(name, layer, inputs[0]))
        for name, layer in layers.items()
    ]
    training = model.training
    try:
        model.eval()(*inputs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found

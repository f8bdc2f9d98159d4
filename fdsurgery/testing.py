"""What tests of converted models need."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def settle_(model: nn.Module, *batch: Any) -> nn.Module:
    """Make a freshly initialised model fit for `verify`, in place; a trained one needs no such thing.

    Fresh models hide what their blocks compute behind zero-initialised norms and layer scales of 1e-6, so that a wrong
    conversion would look right. All vectors and all constant or tiny parameters are drawn anew (biases from N(0, 0.1²),
    the others from U(0.5, 1.5)), then running statistics follow the batch three times.

    Args:
        model: changed in place.
        *batch: positional arguments of its forward.

    Returns:
        The same object, in eval mode.

    Examples:
        >>> import timm, torch, fdsurgery
        >>> model = timm.create_model("test_resnet")
        >>> model = fdsurgery.testing.settle_(model, torch.randn(2, 3, 64, 64))
        >>> model.training
        False
    """
    for name, parameter in model.named_parameters():
        constant = parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
        if parameter.dim() <= 1 or constant or float(parameter.abs().max()) < 1e-3:
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.uniform_(0.5, 1.5)
    model.train()
    for _ in range(3):
        model(*batch)
    return model.eval()

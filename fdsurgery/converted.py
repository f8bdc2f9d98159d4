"""What a converted model holds: its dynamic layers."""

from __future__ import annotations

from torch import nn

from .integrations.ultralytics import network_of
from .operators import operator_of
from .wrappers import plain_modules


def dynamic_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The dynamic layers of a model, of whatever operator.

    Args:
        model: converted or not. It may be compiled, or wrapped in DDP or an average of its weights, and so may its
            parts.

    Returns:
        The layers by the names that they have in the plain model, in its order. A layer that is used in several places
        is there once, by its first name. Empty if the model has none.
    """
    return {name: layer for name, layer in plain_modules(network_of(model)) if operator_of(layer) is not None}

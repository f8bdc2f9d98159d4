"""torch's transformer encoders, which in evaluation read the weights of their layers past them, in fused kernels."""

from __future__ import annotations

from torch import nn

from ..operators import made_layers

_SWITCHES = ((nn.TransformerEncoderLayer, "activation_relu_or_gelu"), (nn.TransformerEncoder, "use_nested_tensor"))
"""What each class asks before it takes the fused path, or packs its input for layers that take it."""

_BEFORE = "fused_path_of_plain_layers"
"""The attribute that keeps a switch as it was while there are dynamic layers."""


def choose_paths(model: nn.Module) -> None:
    """Make encoders with dynamic layers call their layers one by one; encoders without any are as they were before."""
    for module in model.modules():
        for kind, switch in _SWITCHES:
            if isinstance(module, kind):
                _choose(module, switch)


def _choose(module: nn.Module, switch: str) -> None:
    own = vars(module)
    if made_layers(module):
        if own.get(switch):
            own[_BEFORE] = own[switch]
            own[switch] = type(own[switch])(0)
    elif _BEFORE in own:
        own[switch] = own.pop(_BEFORE)

"""LoRA beside dynamic layers. Imports peft, and so is imported only where PEFT has met one; see `registration`.

PEFT takes a dynamic layer for the plain one that it is a subclass of. The sum `layer(x) + BAx` is right for it. Wrong
is what reads or writes the layer's weight, which is computed anew for each use: merging, initialisations that move a
part of the weight into the adapter, DoRA. And for a convolution PEFT makes A and B of the layer's own class, so they
would be dynamic too, and their initialisation be lost.
"""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from torch import nn

from ...discovery.kinds import convolves
from ...errors import UnsupportedModelError
from ...operators import operator_of

_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""Those that leave the base weight alone."""


class BesideDynamic:
    """What is said of LoRA beside any dynamic layer. A mixin before PEFT's own classes."""

    base_layer: nn.Module
    lora_variant: dict[str, Any]

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            UnsupportedModelError: it is not plain LoRA, or its initialisation changes the layer's weight.
        """
        config = kwargs.get("config")
        wanted = kwargs if config is None else vars(config)
        initialisation = wanted.get("init_lora_weights", True)
        if initialisation not in _INITIALISATIONS:
            raise UnsupportedModelError(
                f"init_lora_weights={initialisation!r} changes the weight of the layer, and a dynamic layer has one "
                "for each sample; use True, 'gaussian' or 'orthogonal', or leave dynamic layers out by exclude_modules"
            )
        dynamic = self.base_layer
        operator = operator_of(dynamic)
        self.base_layer = dynamic if operator is None else operator.restore(dynamic)
        try:
            super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.base_layer = dynamic
        if adapter_name in self.lora_variant:
            raise UnsupportedModelError(
                f"{type(self.lora_variant[adapter_name]).__name__} needs the weight of the layer, and a dynamic layer "
                "has one for each sample; use plain LoRA, or leave dynamic layers out by exclude_modules"
            )

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Not possible.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "an adapter cannot be merged into a dynamic layer: its modulation would change what is merged. Keep the "
            "adapter beside the layer and save it with model.save_pretrained, or give it up with model.unload(). "
            "The model computes what it did before this call"
        )


class DynamicLinear(BesideDynamic, lora.Linear):  # type: ignore[misc]
    """LoRA beside a dynamic linear layer."""


class DynamicConv2d(BesideDynamic, lora.Conv2d):  # type: ignore[misc]
    """LoRA beside a dynamic convolution: A and B are plain convolutions."""


def beside(dynamic: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module:
    """A LoRA layer for a dynamic one: what PEFT calls where it has found a target.

    Args:
        dynamic: the layer.
        adapter_name: of its first adapter.
        **kwargs: as PEFT passes them to its own class.
    """
    for name in ("parameter_name", "lora_config"):  # the second as releases before 0.19 call it
        kwargs.pop(name, None)
    beside_it = DynamicConv2d if convolves(dynamic) else DynamicLinear
    return beside_it(dynamic, adapter_name, **kwargs)

"""DCD as an operator: settings, costs, and layers of the authors' own code. See `dcd_layers` for what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt, prod
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor, nn

from fdconv.reference import output_size

from ..discovery.site import Site
from ..errors import CheckpointError
from .base import Shaped
from .dcd_layers import DCDConv2d, DCDLayer, DCDLinear, misfit
from .dynamic_operator import CONV_WORDS, DynamicOperator, Settings, check_config, loaded, plain_conv

Width = Annotated[int, Ge(1)]


class DCDSettings(Settings):
    """Settings of DCD."""

    variant: Literal["bottleneck", "basic", "mobilenet"] = "bottleneck"
    """Whose rules say what the other settings leave open: those of ResNet-50's blocks, of ResNet-18's or of
    MobileNetV2's. Linear layers have one form, that of the authors' classifier."""
    pool: Literal[1, 2] | None = None
    """Side of the map of means that the gates see."""
    dim: Width | None = None
    """Channels of the residual."""
    squeeze: Width | None = None
    """Width of the gates."""


class DCDOperator(DynamicOperator):
    """Gives filters a factor and adds a residual of few channels, both for each sample.

    The authors' rules give the gates of a layer with less than 16 input channels no width at all, silently; here it is
    4 at least, as elsewhere in their file. The rules of MobileNetV2 are read from the authors' code, and no numbers of
    theirs were compared.
    """

    name = "dcd"
    title = "[Dynamic convolution by matrix decomposition](https://arxiv.org/abs/2103.08756)"
    leaf = "dcd_weight"
    official_leaf = "fc_phi.weight"
    unseen_settings = ("variant",)
    settings_class = DCDSettings
    conv_layer = DCDConv2d
    linear_layer = DCDLinear

    def refusal(self, site: Site, settings: dict[str, Any]) -> str | None:
        if not site.convolves:
            return "a linear layer has no map, which pool: 2 needs" if settings["pool"] == 2 else None
        if site.groups > 1 and site.groups == site.in_channels:
            return "it is depthwise, and the residual would mix its channels"
        if settings["variant"] == "mobilenet" and site.kernel_size != (1, 1):
            return "the mobilenet variant takes convolutions of 1x1"
        return misfit(site, site.pads_same)

    def multiply_adds(self, layer: nn.Module, sample: tuple[int, ...]) -> dict[str, int]:
        """In evaluation. In training the residual is computed at each position, whatever that costs."""
        assert isinstance(layer, DCDLayer)
        positions = prod(sample[:-1])
        if isinstance(layer, DCDConv2d):
            left, right, top, bottom = layer._pads()
            padded = (sample[1] + top + bottom, sample[2] + left + right)
            positions = prod(output_size(padded, layer.kernel_size, layer.stride, layer.dilation))
        return layer.products(positions, folded=layer.is_cheaper_folded(positions))

    def settings_of_tensors(self, plain: nn.Module, tensors: Mapping[str, Shaped], official: bool) -> dict[str, Any]:
        width, seen = tensors["fc.0.weight"].shape
        return {
            "pool": isqrt(seen // int(plain.in_channels)) if isinstance(plain, nn.Conv2d) else 1,
            "dim": tensors["bn1.weight"].shape[0],
            "squeeze": width,
        }

    # Layers of the authors' code

    def load_official(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        """A `conv_dy` of the authors' ResNets or MobileNetV2, or a `DYCls` (`cls.weight`, variant `classifier`).

        What `config` leaves open (`pool`, `dim`, `squeeze`) is read from the shapes.
        """
        check_config(config, (*CONV_WORDS, *_WORDS))
        kind = "cls" if "cls.weight" in state else "conv"
        if missing := {f"{kind}.weight", "fc.0.weight", "bn1.weight"} - state.keys():
            raise CheckpointError(f"the state is no layer of DCD: it has no {sorted(missing)[0]}")
        if not state["fc.0.weight"].numel():
            raise CheckpointError(
                "the gates of the layer have no width: its C_in is below 16, and it was never dynamic"
            )
        weight = state[f"{kind}.weight"]
        plain = _plain_linear(state, config) if kind == "cls" else plain_conv(config, weight)
        if kind == "conv" and plain.bias is not None:
            raise CheckpointError("the authors' convolution has no bias")
        settings = {key: config[key] for key in DCDSettings.model_fields if config.get(key) is not None}
        if settings.get("variant") == "classifier":
            del settings["variant"]
        settings = self.settings({**self.settings_of_tensors(plain, state, True), **settings})
        layer = self.make(plain, settings).train(config.get("mode") == "train")
        return loaded(layer, self.own_state(layer, state))

    def own_state(self, layer: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ours = {theirs: own for own, theirs in _names(layer).items()}
        return {ours.get(name, name): tensor for name, tensor in state.items()}

    def official_state(self, layer: nn.Module) -> dict[str, Tensor]:
        """What the authors' layer would have saved. Raises `CheckpointError` for a convolution with a bias."""
        assert isinstance(layer, DCDLayer)
        if isinstance(layer, DCDConv2d) and layer.bias is not None:
            raise CheckpointError("the authors' convolution has no bias")
        names = _names(layer)
        return {names.get(name, name): tensor for name, tensor in layer.state_dict().items()}


_WORDS = ("variant", "pool", "dim", "squeeze", "in_features", "out_features")


def _names(layer: nn.Module) -> dict[str, str]:
    """The authors' names of what is called otherwise here."""
    if isinstance(layer, DCDLinear):
        return {"dcd_weight": "cls.weight", "bias": "cls.bias"}
    assert isinstance(layer, DCDConv2d)
    mobile = {"q.weight": "conv_q.weight", "p.weight": "conv_p.weight"}
    return {"dcd_weight": "conv.weight", **(mobile if layer.settings["variant"] == "mobilenet" else {})}


def _plain_linear(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Linear:
    weight = state["cls.weight"]
    out_features, in_features = weight.shape
    shape = config.get("in_features", in_features), config.get("out_features", out_features)
    return nn.Linear(*shape, "cls.bias" in state, device="meta", dtype=weight.dtype)

"""An operator whose layers are `DynamicLayer`s: most of the contract of an operator, said once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from ..discovery.site import Site
from ..errors import CheckpointError, RecipeError, near_misses
from .base import Operator, ParameterKind
from .dynamic_layer import DynamicConv2d, DynamicLayer, DynamicLinear
from .standing_in import stand_back, stand_in

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Settings(BaseModel):
    """Settings of an operator, with their defaults and limits."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class DynamicOperator(Operator):
    """Needs `name`, `title`, `settings_class`, `conv_layer`, perhaps `linear_layer`; each layer stands for itself."""

    settings_class: ClassVar[type[Settings]] = Settings
    conv_layer: ClassVar[type[DynamicConv2d]]
    linear_layer: ClassVar[type[DynamicLinear] | None] = None

    def settings(self, values: dict[str, Any]) -> dict[str, Any]:
        known = list(self.settings_class.model_fields)
        for key in values:
            if key not in known:
                raise RecipeError(
                    f"{key!r} is no setting of {self.name}; known: {', '.join(known) or 'none'}"
                    f"{near_misses(key, known)}"
                )
        try:
            return self.settings_class.model_validate(values).model_dump(mode="json")
        except ValidationError as error:
            told = error.errors()[0]
            where = ".".join(map(str, told["loc"])) or "settings"
            raise RecipeError(f"{self.name}: {where}: {told['msg']}, not {told['input']!r}") from None

    def settings_schema(self) -> dict[str, dict[str, Any]]:
        """The JSON schema of each setting, for editors."""
        return dict(self.settings_class.model_json_schema().get("properties", {}))

    def refusal(self, site: Site, settings: dict[str, Any]) -> str | None:
        if site.kind == "linear" and self.linear_layer is None:
            return f"{self.name} takes convolutions only"
        return None

    def replace(self, layer: nn.Module, settings: dict[str, Any]) -> nn.Module:
        return stand_in(layer, lambda plain, pads_same: self.make(plain, settings, pads_same))

    def make(self, plain: nn.Conv2d | nn.Linear, settings: dict[str, Any], pads_same: bool = False) -> DynamicLayer:
        """A layer for one that is of torch's own class."""
        kind = self.linear_layer if isinstance(plain, nn.Linear) else self.conv_layer
        if kind is None:
            raise RecipeError(f"{self.name} takes convolutions only")
        return kind(plain, settings, pads_same)

    def owns(self, layer: nn.Module) -> bool:
        kinds = (self.conv_layer,) if self.linear_layer is None else (self.conv_layer, self.linear_layer)
        return isinstance(layer, kinds)

    def settings_of(self, layer: nn.Module) -> dict[str, Any]:
        assert isinstance(layer, DynamicLayer)
        return dict(layer.settings)

    def restore(self, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, DynamicLayer)
        return stand_back(layer, layer.to_plain())

    def kernels(self, layer: nn.Module) -> Tensor | None:
        assert isinstance(layer, DynamicLayer)
        stored = layer._stored()
        return stored.detach() if stored.dim() == 5 and len(stored) > 1 else None

    def parameter_kinds(self, layer: nn.Module) -> dict[nn.Parameter, ParameterKind]:
        assert isinstance(layer, DynamicLayer)
        kinds: dict[nn.Parameter, ParameterKind] = dict.fromkeys(layer.parameters(), "modulation")
        kinds[layer._stored()] = "weight"
        return kinds | super().parameter_kinds(layer)

    # Layers of the authors' code, in whole models

    official_leaf: ClassVar[str] = ""
    """A tensor that each layer of the authors' has, and no other operator's; empty where checkpoints are not read."""

    def official_state(self, layer: nn.Module) -> dict[str, Tensor]:
        """The state of one layer under the authors' names, at their scale."""
        raise CheckpointError(f"no form of the authors' is known for layers of {self.name}")

    def own_state(self, layer: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Undo `official_state`: tensors of the layer, under our names, of those that the authors' code saves."""
        raise CheckpointError(f"no form of the authors' is known for layers of {self.name}")

    def to_official(self, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        return {
            f"{fqn}.{name}": tensor
            for fqn, layer in layers.items()
            for name, tensor in self.official_state(layer).items()
        }

    def from_official(self, layers: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for fqn, layer in layers.items():
            own = {name: state[f"{fqn}.{name}"] for name in self.official_state(layer)}
            found.update({f"{fqn}.{name}": tensor for name, tensor in self.own_state(layer, own).items()})
        return found

    def is_official(self, names: Collection[str]) -> bool:
        return bool(self.official_leaf) and any(name.endswith(f".{self.official_leaf}") for name in names)


# Layers of the authors' code

CONV_WORDS = (
    *("operator", "mode", "source", "in_channels", "out_channels", "in_planes", "out_planes", "kernel_size"),
    *("stride", "padding", "dilation", "groups", "bias"),
)
"""What the configuration of any such convolution may say: what it is, `train` or `eval`, and its geometry."""


def check_config(config: Mapping[str, Any], known: Collection[str], needed: Collection[str] = ()) -> None:
    """Raise `CheckpointError` for words of a layer's configuration that nobody knows, or that are missing."""
    for key in config:
        if key not in known:
            raise CheckpointError(f"{key!r} is nothing that is known of such a layer{near_misses(key, known)}")
    if missing := [key for key in needed if key not in config]:
        raise CheckpointError(f"the configuration of the layer does not say {', '.join(missing)}")


def plain_conv(config: Mapping[str, Any], weight: Tensor) -> nn.Conv2d:
    """A plain convolution on meta of this geometry, in the dtype of a weight.

    Args:
        config: `in_channels` (or `in_planes`), `out_channels` (`out_planes`), `kernel_size`, and `stride`, `padding`,
            `dilation`, `groups`, `bias` where they are not the defaults of `nn.Conv2d` (no bias).
        weight: of the layer, in any shape.
    """
    channels: list[Any] = [config.get(f"{way}_channels", config.get(f"{way}_planes")) for way in ("in", "out")]
    if None in channels or "kernel_size" not in config:
        raise CheckpointError("the configuration of the layer does not say in_channels, out_channels and kernel_size")
    geometry: dict[str, Any] = {
        key: config[key] for key in ("stride", "padding", "dilation", "groups") if key in config
    }
    geometry |= {"bias": bool(config.get("bias", False)), "device": "meta", "dtype": weight.dtype}
    in_channels, out_channels = channels
    return nn.Conv2d(in_channels, out_channels, config["kernel_size"], **geometry)


def loaded(layer: ModuleT, state: Mapping[str, Tensor]) -> ModuleT:
    """A layer that was built on meta, with the tensors of a state.

    Raises:
        CheckpointError: they do not fit, or some are missing.
    """
    mode = layer.training
    device = next(iter(state.values())).device
    layer.to_empty(device=device)
    try:
        layer.load_state_dict(dict(state))
    except RuntimeError as error:
        raise CheckpointError(f"the state does not fit the layer: {error}") from None
    return layer.train(mode)

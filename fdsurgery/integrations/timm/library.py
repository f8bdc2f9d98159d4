"""timm as a library of models by name."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from ...errors import CheckpointError, near_misses
from ..base import Library, ModelSource, SourceError, loading
from . import SUFFIX
from .allowed import timm_arguments, timm_name


class Timm(Library):
    """Its models tell by `pretrained_cfg` what they are and what they take."""

    name = "timm"
    requirement = "fdsurgery[timm]"
    forms = ("timm:NAME",)
    families = "timm architectures, e.g. `convnext*`"
    hooks: ClassVar = {"timm.models._factory": f"{__package__}.registration:enter"}

    def build(self, spec: str, *, pretrained: bool) -> tuple[nn.Module, ModelSource]:
        name = spec.partition(":")[2]
        model = self._create(name, pretrained)
        elsewhere = ":" in name or "/" in name  # its config is not in timm's registry
        source = self.infer(model) if elsewhere else ModelSource(self.name, name)
        if source is None:
            raise SourceError(f"{spec} does not say of which architecture it is")
        return model, source

    def rebuild(self, source: ModelSource) -> nn.Module:
        name = timm_name(source.name).removesuffix(SUFFIX)
        if self.module().get_pretrained_cfg(name) is None:
            name = name.partition(".")[0]  # the tag is of another release; the weights are ours anyway
        return self._create(name, False, **timm_arguments(source.arguments, name))

    def infer(self, model: nn.Module) -> ModelSource | None:
        config = getattr(model, "pretrained_cfg", None)
        if not config or not config.get("architecture"):
            return None
        return ModelSource(self.name, self._tagged_name(config), _arguments_of(model))

    def family(self, model: nn.Module) -> str | None:
        config = getattr(model, "config", None)
        model_type = getattr(config, "model_type", None)
        if isinstance(model_type, str) and model_type:  # of transformers, which wraps models of timm
            architecture = getattr(config, "architecture", None)
            return architecture if model_type == "timm_wrapper" and isinstance(architecture, str) else None
        for name in ("pretrained_cfg", "default_cfg"):
            settings = getattr(model, name, None)
            architecture = settings.get("architecture") if isinstance(settings, Mapping) else None
            if isinstance(architecture, str):
                return architecture
        return None

    def image_shape(self, model: nn.Module) -> tuple[int, int, int] | None:
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
        size = config.get("input_size") if isinstance(config, Mapping) else None
        return (size[0], size[1], size[2]) if isinstance(size, (tuple, list)) and len(size) == 3 else None

    def specs_of(self, is_meant: Callable[[str], bool]) -> list[str]:
        names = sorted(filter(is_meant, self.module().list_models()), key=lambda name: (len(name), name))
        return [f"timm:{name}" for name in names]

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        if not hasattr(model, "reset_classifier"):
            return ()
        names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
        return (names,) if isinstance(names, str) else tuple(names)

    def _create(self, name: str, pretrained: bool, **arguments: Any) -> nn.Module:
        timm = self.module()
        if not timm.is_model(name.partition(".")[0]) and "/" not in name:
            raise SourceError(f"timm has no model {name!r}{near_misses(name, timm.list_models())}")

        def make() -> nn.Module:
            return timm.create_model(name, pretrained=pretrained, **arguments)

        return loading(f"timm:{name}", make, downloads=pretrained)

    def _tagged_name(self, pretrained_cfg: dict[str, Any]) -> str:
        """With the tag, by which more than weights differs: the number of classes, and how images are prepared."""
        name = pretrained_cfg["architecture"].removesuffix(SUFFIX)
        tag = pretrained_cfg.get("tag")
        tagged = f"{name}.{tag}"
        return tagged if tag and self.module().get_pretrained_cfg(tagged) is not None else name


def _arguments_of(model: Any) -> dict[str, Any]:
    """What a model was built with, as far as it can be written down; see `factory` for who notes it."""
    layers = importlib.import_module("timm.layers")
    arguments: dict[str, Any] = {}
    for name, value in vars(model).get("_model_args", {}).items():
        if isinstance(value, type):
            value = next((known for known in _names_of(value) if _is_layer(layers, known, value)), None)
        if value is None or name == "recipe":
            continue
        with contextlib.suppress(CheckpointError):
            arguments.update(timm_arguments({name: value}, model.pretrained_cfg["architecture"].removesuffix(SUFFIX)))
    if isinstance(getattr(model, "num_classes", None), int):  # also after reset_classifier
        arguments["num_classes"] = model.num_classes
    return arguments


def _names_of(layer: type) -> tuple[str, ...]:
    """Names by which timm may know an activation or a norm."""
    plain = layer.__name__.lower()
    return plain, layer.__name__


def _is_layer(layers: Any, name: str, layer: type) -> bool:
    for find in (layers.get_act_layer, layers.get_norm_layer):
        try:
            if find(name) is layer:
                return True
        except Exception:  # it says so in its own way where it does not know the name
            continue
    return False

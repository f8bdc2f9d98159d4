"""Where a model comes from: `timm:resnet50`, `hf:FOLDER`, `torchvision:maskrcnn_resnet50_fpn`, `file.py:function`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..allowed import plain, timm_arguments, timm_name, torchvision_arguments, transformers_config
from ..errors import CheckpointError, SurgeryError, near_misses
from ..integrations.timm import SUFFIX

FORMS = "timm:NAME, hf:REPO_OR_FOLDER, transformers:CLASS, torchvision:NAME or FILE.py:FUNCTION"
_EXTRAS = {"timm": "timm", "transformers": "hf", "torchvision": "torchvision"}


class SourceError(SurgeryError):
    """A model cannot be built from what was given."""


@dataclass(frozen=True)
class ModelSource:
    """Enough to build the plain model again, without its weights."""

    library: str
    """`timm`, `transformers`, `torchvision` or `file`."""
    name: str
    """Architecture, model class, builder, or `FILE.py:FUNCTION`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the builder; for transformers, the model's config."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `ModelSource.from_dict` undoes it."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Any) -> ModelSource:
        """Undo `to_dict`. Raises `CheckpointError` for data that is no source; `rebuild` looks at what it asks for."""
        if not isinstance(data, dict) or not data.keys() <= {"library", "name", "arguments"}:
            raise CheckpointError("a source is a mapping of library, name and arguments")
        source = ModelSource(data.get("library", ""), data.get("name", ""), data.get("arguments", {}))
        if not (isinstance(source.library, str) and isinstance(source.name, str) and source.library and source.name):
            raise CheckpointError("a source has a library and a name, both text")
        if not isinstance(source.arguments, dict):
            raise CheckpointError(f"a source's arguments are a mapping, not a {type(source.arguments).__name__}")
        plain(source.arguments, "arguments of the source")
        return source


def build(spec: str, *, pretrained: bool) -> tuple[nn.Module, ModelSource]:
    """Build the model a SPEC names.

    Args:
        spec: `timm:NAME`, `hf:REPO_OR_FOLDER`, `transformers:CLASS` (its default config), `torchvision:NAME` or
            `FILE.py:FUNCTION`.
        pretrained: load trained weights (for a file, what its function loads is its own affair).

    Returns:
        The model in eval mode, and the source to save with it.

    Raises:
        SourceError: the SPEC has no known form, names nothing, or what it names cannot be loaded.
    """
    library, separator, name = spec.partition(":")
    if library == "timm" and name:
        model, source = _timm(name, pretrained)
    elif library == "transformers" and name:
        model, source = _transformers_class(name, pretrained)
    elif library == "hf" and name:
        model, source = _transformers(name, pretrained)
    elif library == "torchvision" and name:
        model, source = _torchvision(name, pretrained)
    elif ".py:" in spec:
        model, source = _file(spec)
    else:
        guess = near_misses(library, ("timm", "hf", "transformers", "torchvision")) if separator else ""
        raise SourceError(f"{spec!r} names no model; expected {FORMS}{guess}")
    return model.eval(), source


def import_library(source: ModelSource) -> None:
    """Import what `rebuild` takes the model from, if it takes it from a library.

    Raises:
        SourceError: it is not installed.
    """
    if source.library in _EXTRAS:
        getattr(_import(source.library), source.name, None)  # transformers imports the file of a class only now


def rebuild(source: ModelSource) -> nn.Module:
    """Build the plain model of a saved source, with weights that mean nothing yet.

    Raises:
        CheckpointError: the source is a file, whose code is not run without being asked for, is unknown, or asks for
            what no file may ask for.
        SourceError: the library is missing or does not know the model.
    """
    if source.library == "timm":
        name = timm_name(source.name).removesuffix(SUFFIX)
        if _import("timm").get_pretrained_cfg(name) is None:
            name = name.partition(".")[0]  # the tag is of another release; the weights are ours anyway
        return _create_timm(name, pretrained=False, **timm_arguments(source.arguments, name))
    if source.library == "torchvision":
        _import("torchvision")
        return _create_torchvision(source.name, pretrained=False, **torchvision_arguments(source.arguments))
    if source.library == "transformers":
        transformers = _import("transformers")
        model_class: Any = getattr(transformers, source.name, None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise CheckpointError(f"transformers {transformers.__version__} has no model class {source.name!r}")
        config_class: Any = getattr(model_class, "config_class", None)
        if config_class is None:
            raise CheckpointError(f"transformers' {source.name} has no config of its own, and cannot be built")
        config = transformers_config({**source.arguments, "model_type": config_class.model_type}, source.name)
        return _loading(f"transformers:{source.name}", False, lambda: model_class(config_class.from_dict(config)))
    if source.library == "file":
        raise CheckpointError(
            f"the model was built by {source.name}, and code is not run on loading; "
            "build the plain model yourself and pass it: fdsurgery.load(folder, model=...)"
        )
    raise CheckpointError(f"unknown source library {source.library!r}; expected timm, transformers or torchvision")


def infer(model: nn.Module) -> ModelSource:
    """The source of a model that its own attributes tell: transformers' config, timm's `pretrained_cfg`.

    Raises:
        CheckpointError: the model does not say where it comes from.
    """
    library = type(model).__module__.partition(".")[0]
    config: Any = getattr(model, "config", None)
    if library == "transformers" and config is not None:
        return ModelSource(
            "transformers", type(model).__name__, transformers_config(config.to_dict(), "the model's config")
        )
    cfg = getattr(model, "pretrained_cfg", None)
    if library == "timm" and cfg and cfg.get("architecture"):
        return ModelSource("timm", _timm_name_of(cfg), _timm_arguments_of(model))
    raise CheckpointError(
        f"a {type(model).__name__} does not say how it was built; pass source=, a fdsurgery.ModelSource such as "
        'ModelSource("torchvision", "resnet50") or ModelSource("file", "models.py:build")'
    )


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, ModelSource]:
    model = _create_timm(name, pretrained)
    elsewhere = ":" in name or "/" in name  # its config is not in timm's registry
    return model, infer(model) if elsewhere else ModelSource("timm", name)


def _timm_name_of(pretrained_cfg: dict[str, Any]) -> str:
    """With the tag, by which other things than weights differ too: the number of classes, how images are prepared."""
    name = pretrained_cfg["architecture"].removesuffix(SUFFIX)
    tag = pretrained_cfg.get("tag")
    tagged = f"{name}.{tag}"
    return tagged if tag and _import("timm").get_pretrained_cfg(tagged) is not None else name


def _timm_arguments_of(model: Any) -> dict[str, Any]:
    """What a model was built with, as far as it can be written down; see `timm_models.factory` for who notes it."""
    layers = _import("timm.layers")
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


def _create_timm(name: str, pretrained: bool, **arguments: Any) -> nn.Module:
    timm = _import("timm")
    if not timm.is_model(name.partition(".")[0]) and "/" not in name:
        raise SourceError(f"timm has no model {name!r}{near_misses(name, timm.list_models())}")
    return _loading(f"timm:{name}", pretrained, lambda: timm.create_model(name, pretrained=pretrained, **arguments))


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, ModelSource]:
    model = _create_torchvision(name, pretrained)
    frozen_norm = _import("torchvision").ops.FrozenBatchNorm2d
    epsilons = {module.eps for module in model.modules() if isinstance(module, frozen_norm)}
    return model, ModelSource("torchvision", name, {"frozen_norms": epsilons.pop()} if epsilons else {})


def _create_torchvision(name: str, pretrained: bool, frozen_norms: float | None = None, **arguments: Any) -> nn.Module:
    """A torchvision model by its name.

    Args:
        name: of the builder.
        pretrained: with torchvision's weights. Detectors then have norms that do not learn, and else BatchNorms.
        frozen_norms: without weights, too, give the backbone norms that do not learn, of this epsilon.
        **arguments: of the builder.
    """
    models = _import("torchvision").models
    known = models.list_models()
    if name not in known:
        raise SourceError(f"torchvision has no model {name!r}{near_misses(name, known)}")
    # Detection and segmentation builders load a pretrained backbone unless told not to.
    backbone = "weights_backbone" in models.get_model_builder(name).__annotations__
    weights = {"weights": "DEFAULT" if pretrained else None, **({"weights_backbone": None} if backbone else {})}

    def make() -> nn.Module:
        model = models.get_model(name, **weights, **arguments)
        if frozen_norms is not None:
            _freeze_norms(model.backbone.body, float(frozen_norms))
        return model

    return _loading(f"torchvision:{name}", pretrained, make)


def _freeze_norms(module: nn.Module, eps: float) -> None:
    frozen_norm = _import("torchvision").ops.FrozenBatchNorm2d
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, frozen_norm(child.num_features, eps))
        else:
            _freeze_norms(child, eps)


def _transformers(name: str, pretrained: bool) -> tuple[nn.Module, ModelSource]:
    transformers = _import("transformers")
    spec = f"hf:{name}"
    config = _loading(spec, True, lambda: transformers.AutoConfig.from_pretrained(name))
    architectures = getattr(config, "architectures", None) or []
    model_class = getattr(transformers, architectures[0], None) if architectures else transformers.AutoModel
    if model_class is None:
        raise SourceError(f"{spec}: transformers {transformers.__version__} has no model class {architectures[0]!r}")
    if pretrained:
        model = _loading(spec, True, lambda: model_class.from_pretrained(name))
    elif architectures:
        model = model_class(config)
    else:
        model = model_class.from_config(config)
    return model, infer(model)


def _transformers_class(name: str, pretrained: bool) -> tuple[nn.Module, ModelSource]:
    transformers = _import("transformers")
    spec = f"transformers:{name}"
    if pretrained:
        raise SourceError(f"{spec} has no trained weights; name a repository or folder as hf:..., or --no-pretrained")
    model_class: Any = getattr(transformers, name, None)
    if not hasattr(model_class, "config_class"):
        known = {
            entry
            for entry in dir(transformers)
            if entry.endswith(("Model", "Classification", "Segmentation")) and not entry.startswith("Auto")
        }
        raise SourceError(f"transformers has no model class {name!r}{near_misses(name, known)}")
    model = _loading(spec, True, lambda: model_class(model_class.config_class()))
    return model, infer(model)


def _file(spec: str) -> tuple[nn.Module, ModelSource]:
    path_text, _, function_name = spec.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # scripts may exit
        raise SourceError(f"{path}: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise SourceError(f"{path} has no function {function_name!r}{near_misses(function_name, functions)}")
    try:
        model = function()
    except (Exception, SystemExit) as error:
        raise SourceError(f"{spec}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module")
    return model, ModelSource("file", f"{path.name}:{function_name}")


def _loading(spec: str, pretrained: bool, make: Any) -> Any:
    """Build or download; what goes wrong is told in one line."""
    try:
        return make()
    except SurgeryError:
        raise
    except Exception as error:
        advice = "; for random weights use --no-pretrained" if pretrained else ""
        lines = str(error).strip().splitlines() or [""]
        raise SourceError(f"{spec} could not be loaded: {type(error).__name__}: {lines[0]}{advice}") from error


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise SourceError(
            f"{library} is not installed ({error}); pip install 'fdsurgery[{_EXTRAS[library]}]'"
        ) from None

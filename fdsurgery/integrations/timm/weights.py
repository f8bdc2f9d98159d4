"""Weights of converted models in timm's ways of loading, and plain ones that a converted model is given."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import CheckpointError, near_misses
from ...finetune import remember
from ...operators import BuildError, Wanted, build_layers, made_layers, operators
from ...recipe import FineTune
from ...rewrite.tree import swapped
from ...saving.folder import DESCRIPTION, described_layers, read_description, replacements_for
from ..base import ModelSource
from . import SUFFIX
from .allowed import timm_arguments, timm_name

_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source")
"""Entries of a pretrained config that tell where the weights are."""
_FOREIGN = (".npz", ".npy")
"""Files that only the plain model's own `load_pretrained` reads."""
NOT_THE_MODEL = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "cache_dir",
    "device",
    "dtype",
)
"""Arguments of an entry point that say nothing of what is built, but where its weights come from and where it goes."""


@dataclass(frozen=True)
class PlainCheckpoints:
    """Lets `load_state_dict` of a converted model take checkpoints of the plain one. A pre-hook of the model.

    The state dict goes through the plain model, which knows what its layers compute from their weights, and the
    dynamic layers take that over. Their modulation is neutral then, whatever it was.
    """

    name: str
    """The plain architecture."""
    arguments: dict[str, Any]
    """What `timm.create_model` builds it with."""

    @staticmethod
    def of(name: str, pretrained_cfg: dict[str, Any], arguments: dict[str, Any]) -> PlainCheckpoints:
        """For a model that timm has built.

        Args:
            name: the plain architecture.
            pretrained_cfg: the plain model's.
            arguments: of the entry point.
        """
        config = {key: value for key, value in pretrained_cfg.items() if key not in _SOURCES}
        kept = {key: value for key, value in arguments.items() if key not in NOT_THE_MODEL}
        return PlainCheckpoints(name, {**kept, "pretrained_cfg": config})

    def __call__(
        self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *ignored: Any, **more_ignored: Any
    ) -> None:
        # The arguments that follow are local_metadata, strict, missing_keys, unexpected_keys and error_msgs.
        _, strict, _, _, errors = ignored
        dynamic = {name: one.layer for name, one in made_layers(model).items()}
        plain = [name for name in dynamic if f"{prefix}{name}.weight" in state_dict]
        if not plain:
            return
        half = [name for name, layer in dynamic.items() if f"{prefix}{name}.{_mark(layer)}" in state_dict]
        if half:
            errors.append(
                f"{len(plain)} layers that are dynamic in this model are plain in the checkpoint, {plain[0]!r} first, "
                f"while {len(half)} are dynamic in both: the checkpoint is of a model converted by another recipe"
            )
            return
        try:
            renewed = self._converted(state_dict, prefix, model, plain, strict)
        except (RuntimeError, BuildError, CheckpointError) as error:
            errors.append(f"the checkpoint is one of the plain {self.name}, and does not fit that: {error}")
            return
        for name, layer in renewed.items():
            for key in [key for key in state_dict if key.startswith(f"{prefix}{name}.")]:
                del state_dict[key]
            state_dict.update(layer.state_dict(prefix=f"{prefix}{name}."))

    def _converted(
        self, state_dict: dict[str, Any], prefix: str, model: nn.Module, dynamic: list[str], strict: bool
    ) -> dict[str, nn.Module]:
        """Layers like the named dynamic ones of a model, that stand for those of the plain one with this state dict."""
        twin: nn.Module = importlib.import_module("timm").create_model(self.name, **self.arguments)
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        twin.load_state_dict(own, strict=strict)
        layers = dict(twin.named_modules())
        described = described_layers(model)
        wanted = [Wanted(name, layers[name], **described[name]) for name in dynamic]
        return build_layers(wanted)


def converted_tensors(arguments: dict[str, Any], model: nn.Module | None = None) -> dict[str, Tensor] | None:
    """The weights that the arguments of an entry point name in a place of their own, if a converted model has them.

    Args:
        arguments: with `pretrained_cfg` and `pretrained_cfg_overlay`.
        model: with its dynamic layers in place, to recognise those of any operator; else of those with a `leaf`.

    Returns:
        The state dict; None for weights of a plain model, such as all those in timm's registry.
    """
    tensors = _read(_settings(arguments), arguments.get("cache_dir"))
    if tensors is None:
        return None
    if model is not None:
        return tensors if _renamed(tensors, _marks(model)) else None
    leaves = {operator.leaf for operator in operators().values()}
    return tensors if any(key.rpartition(".")[2] in leaves for key in tensors) else None


def load_converted(model: nn.Module, tensors: dict[str, Tensor], arguments: dict[str, Any]) -> None:
    """Load the weights of a converted model as timm loads pretrained ones: another head or stem is adapted.

    Args:
        model: with its dynamic layers in place.
        tensors: a state dict of the whole model, also where `model` gives features only.
        arguments: those that the model was built with.

    Raises:
        CheckpointError: the tensors do not fit.
    """
    models = importlib.import_module("timm.models")
    try:
        if arguments.get("features_only"):
            own = _renamed(tensors, model.state_dict())
            model.load_state_dict(own)
        else:
            config: Any = model.pretrained_cfg
            first = {key: value for key, value in config.items() if key not in _SOURCES}
            models.load_pretrained(
                model,
                pretrained_cfg={**first, "state_dict": dict(tensors)},
                num_classes=getattr(model, "num_classes", arguments.get("num_classes", 1000)),
                in_chans=arguments.get("in_chans", first.get("input_size", (3,))[0]),
            )
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"the weights do not fit the converted model: {' '.join(lines[:3])}") from error
    _check_complete(model, tensors)


def saved_folder(arguments: dict[str, Any]) -> Path | None:
    """The folder of `fdsurgery.save` that `local-dir:` named, if it was one."""
    settings = _settings(arguments)
    folder = Path(settings.get("file") or "")
    return folder if settings.get("source") == "local-dir" and (folder / DESCRIPTION).exists() else None


def folder_config(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]] | None:
    """What timm wants to know of a `local-dir:`, for a folder that `fdsurgery.save` has written.

    Returns:
        The pretrained config, the name of the architecture and its arguments; None for other folders.

    Raises:
        CheckpointError: the folder is damaged, or its model is not timm's.
    """
    if not (folder / DESCRIPTION).exists() or (folder / "config.json").exists():
        return None
    told = read_description(folder)["source"]
    if told is None:
        raise CheckpointError(
            f"{folder} does not say how its model is built, so timm cannot build it; call fdsurgery.load(folder, "
            "model=plain)"
        )
    source = ModelSource.from_dict(told)
    if source.library != "timm":
        raise CheckpointError(
            f"{folder} holds a model of {source.library}, {source.name}, which timm cannot build; call "
            "fdsurgery.from_pretrained"
        )
    name = timm_name(source.name).removesuffix(SUFFIX)
    registered = importlib.import_module("timm").get_pretrained_cfg(name)
    config = {} if registered is None else registered.to_dict(remove_source=True)
    config.pop("label_offset", None)  # it was applied when the weights were first loaded
    if "in_chans" in source.arguments:
        config["input_size"] = (source.arguments["in_chans"], *config.get("input_size", (3, 224, 224))[1:])
    if "num_classes" in source.arguments:
        config["num_classes"] = source.arguments["num_classes"]
    config.update(file=str(folder), source="local-dir", custom_load=False)
    return config, name.partition(".")[0] + SUFFIX, dict(timm_arguments(source.arguments, name))


def put_in_layers(model: nn.Module, folder: Path) -> None:
    """Make dynamic what is dynamic in a folder of `fdsurgery.save`, with the settings it tells.

    Args:
        model: the plain model, changed in place; where it gives features only, it may lack layers.
        folder: with the description.

    Raises:
        CheckpointError: the folder is damaged, or the model has none of the layers.
    """
    layers = dict(model.named_modules())
    description = read_description(folder)
    described = description["layers"]
    found = _renamed(described, layers)
    if not found:
        raise CheckpointError(
            f"{folder}: the model has no layer {next(iter(described))!r}, nor any other that is named"
        )
    replacements = replacements_for(model, found, folder / DESCRIPTION)
    with swapped(model, replacements):
        pass
    remember(model, FineTune.from_dict(description.get("finetune", {})))


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The pretrained config that the caller gave, not the one of the registry."""
    given = arguments.get("pretrained_cfg")
    if is_dataclass(given) and not isinstance(given, type):
        given = asdict(given)
    return {**(given if isinstance(given, dict) else {}), **(arguments.get("pretrained_cfg_overlay") or {})}


def _read(settings: dict[str, Any], cache_dir: Any) -> dict[str, Tensor] | None:
    """The state dict that a pretrained config names by a file, a folder, itself, or as the source of the config."""
    models = importlib.import_module("timm.models")
    file = str(settings.get("file") or "")
    if settings.get("source") == "hf-hub":
        more = {"cache_dir": cache_dir} if cache_dir else {}
        if settings.get("hf_hub_filename"):
            more["filename"] = settings["hf_hub_filename"]
        return models.load_state_dict_from_hf(settings["hf_hub_id"], **more)
    if settings.get("source") == "local-dir":
        return importlib.import_module("timm.models._hub").load_state_dict_from_path(Path(file))
    if settings.get("state_dict"):
        return settings["state_dict"]
    if file and not file.endswith(_FOREIGN):
        return models.load_state_dict(file)
    return None


def _renamed(entries: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Of entries by name in the whole model, those that `names` has, under the names there.

    Models that give features only put the whole one under a name, or write `stages_0` for `stages.0`.
    """
    plain = {name.replace(".", "_"): entry for name, entry in entries.items()}
    pairs = ((name, _without_wrapper(name).replace(".", "_")) for name in names)
    return {name: plain[other] for name, other in pairs if other in plain}


def _without_wrapper(name: str) -> str:
    for wrapper in ("model.", "body.", "graph_module."):
        name = name.removeprefix(wrapper)
    return name


def _mark(layer: nn.Module) -> str | None:
    """A name in a dynamic layer's state dict that a plain layer's has not; None where another layer owns its weight."""
    return next((leaf for leaf in layer.state_dict() if leaf not in ("weight", "bias")), None)


def _marks(model: nn.Module) -> list[str]:
    return [f"{name}.{mark}" for name, one in made_layers(model).items() if (mark := _mark(one.layer)) is not None]


def _check_complete(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """See that every dynamic layer was there, as timm only logs what is missing where a head is adapted."""
    own = _marks(model)
    found = _renamed(tensors, own)
    missing = [name for name in own if name not in found]
    if missing:
        raise CheckpointError(
            f"the weights are of a model converted otherwise: they lack {len(missing)} of {len(own)} dynamic layers, "
            f"{missing[0]!r} first{near_misses(missing[0], tensors)}"
        )

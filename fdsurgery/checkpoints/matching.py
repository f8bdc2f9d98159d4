"""A model and a checkpoint: under which name, and in which part of what, the one has the tensors of the other."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fdconv import FDConv2d, FDLinear
from fdconv.official import OURS

from ..errors import CheckpointError, SurgeryError, near_misses
from ..operators import get_operator
from ..operators.fdconv import FDConvOperator
from ..recipe import Recipe
from ..saving.description import Description, is_description
from ..saving.folder import DESCRIPTION, FORMAT, METADATA, WEIGHTS
from ..saving.source import ModelSource, build
from .files import DTYPES, INDEX, Checkpoint, Stored, read_json
from .naming import Foreign, Naming, Recognised, namings, recognise

Form = Literal["plain", "official", "ours"]
CONFIG = "config.json"
FORMS: tuple[Form, ...] = ("plain", "official", "ours")
_MODULATION = ("KSM_Global.", "KSM_Local.", "FBM.")
_CONSTANTS = ("relative_position_index", "relative_coords_table", "attn_mask", "position_ids")
"""Buffers that older releases saved and newer ones compute."""
_INVISIBLE = ("temperature", "kernel_temperature", "global_activation", "kernel_activation", "band_activation", "bands")
"""Settings that a layer's tensors do not show, or not all of."""
_SHOWN = 10
"""Problems of one kind that a message lists."""


@dataclass(frozen=True)
class Problem:
    """One tensor or layer that does not fit."""

    kind: Literal["missing", "unexpected", "wrong shape", "no counterpart"]
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}{self.detail}"


class MisfitError(CheckpointError):
    """A checkpoint does not fit the model; `problems` has all that does not."""

    def __init__(self, head: str, problems: tuple[Problem, ...]) -> None:
        self.problems = problems
        counts = Counter(problem.kind for problem in problems)
        said = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        lines = [f"{head}: {said}; nothing was written"]
        for kind, count in counts.items():
            lines += [f"  {problem}" for problem in problems if problem.kind == kind][:_SHOWN]
            lines += [f"  ... and {count - _SHOWN} more {kind}"] * (count > _SHOWN)
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Piece:
    """A run of bytes of a tensor in the checkpoint."""

    tensor: str
    start: int
    stop: int


def form_of(checkpoint: Checkpoint) -> Form:
    """`plain`, or whose dynamic layers it has: ours save the group of every coefficient, official ones do not."""
    leaves = {name.rpartition(".")[2] for name in checkpoint.tensors}
    if "dft_weight" not in leaves:
        return "plain"
    return "ours" if "frequency_group" in leaves else "official"


@dataclass(frozen=True)
class Asked:
    """What the caller wants."""

    checkpoint: Checkpoint
    destination: Path
    form: Form
    to: Form
    recipe: str | Path | Recipe
    overrides: dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """A layer that is dynamic in the result."""

    fqn: str
    template: nn.Module
    """See `Build.template`."""
    settings: dict[str, Any]
    dynamic: FDConv2d | FDLinear
    """The dynamic layer, on meta."""

    def state(self) -> dict[str, torch.Tensor]:
        """The dynamic layer's tensors, on meta."""
        return self.dynamic.state_dict()


@dataclass(frozen=True)
class Fit:
    """A model, and where the checkpoint has its tensors."""

    asked: Asked
    spec: str
    model: nn.Module
    """Plain, and on meta where it can be built there."""
    source: ModelSource
    known: tuple[Naming, ...]
    found: Recognised
    layers: dict[str, Layer]
    """Those that are dynamic in the checkpoint, under every name they have."""
    expected: dict[str, tuple[int, ...]]
    """Shape of every tensor that the model takes, by its own names; dynamic layers as such."""
    pieces: dict[str, Piece]
    """Where they are."""
    problems: tuple[Problem, ...]
    unclaimed: tuple[str, ...]
    """Tensors of the checkpoint that are of other parts."""
    notes: tuple[str, ...]

    @property
    def keeps_names(self) -> bool:
        """True if the result has the names of the checkpoint."""
        return self.asked.to == "official" and (
            self.found.naming.official or not any(naming.official for naming in self.known)
        )


def _build(spec: str, meta: bool) -> tuple[nn.Module, ModelSource]:
    if not meta:
        return build(spec, pretrained=False)
    with torch.device("meta"):
        return build(spec, pretrained=False)


def fit_model(asked: Asked, spec: str, *, meta: bool) -> Fit:
    """Find every tensor of a model in the checkpoint."""
    checkpoint = asked.checkpoint
    model, source = _build(spec, meta)
    known = namings(model, tuple(model.state_dict()))
    found = _recognise(checkpoint, known, spec)
    notes: tuple[str, ...] = ()
    classes = _classes(checkpoint, model, source, found)
    if classes is not None:
        with torch.device("meta" if meta else "cpu"):
            model.reset_classifier(classes)  # type: ignore[operator]
        source = replace(source, arguments={**source.arguments, "num_classes": classes})
        notes += (
            f"the checkpoint's classifier has {classes} classes" if classes else "the checkpoint has no classifier",
        )
        known = namings(model, tuple(model.state_dict()))
        found = _recognise(checkpoint, known, spec)
    layers: dict[str, Layer] = {}
    if asked.form != "plain":
        layers, guessed = _dynamic_layers(asked, model, found)
        notes += guessed
    empty = Fit(asked, spec, model, source, known, found, layers, {}, {}, (), (), notes + checkpoint.notes)
    return _located(empty)


def _recognise(checkpoint: Checkpoint, known: tuple[Naming, ...], spec: str) -> Recognised:
    found = recognise(known, checkpoint.tensors)
    if found is None:
        names = list(known[-1].table)
        raise CheckpointError(
            f"{checkpoint.path}: none of its {len(checkpoint.tensors)} tensors is named like one of {spec}; the first "
            f"are {', '.join(map(repr, list(checkpoint.tensors)[:2]))}, the model's {', '.join(map(repr, names[:2]))}"
        )
    return found


def _classes(checkpoint: Checkpoint, model: nn.Module, source: ModelSource, found: Recognised) -> int | None:
    """The number of classes a timm model must have for the checkpoint; None where it has it already."""
    if source.library != "timm" or not hasattr(model, "reset_classifier"):
        return None
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        foreign = found.naming.table.get(f"{name}.weight")
        weight = model.state_dict().get(f"{name}.weight")
        if weight is None or any(key.startswith(f"{name}.dft_weight") for key in checkpoint.tensors):
            continue
        stored = None if foreign is None else checkpoint.tensors.get(found.name(foreign))
        if stored is None:
            return 0
        if stored.shape[1:] == weight.shape[1:] and stored.shape[0] != weight.shape[0]:
            return stored.shape[0]
    return None


def _dynamic_layers(asked: Asked, model: nn.Module, found: Recognised) -> tuple[dict[str, Layer], tuple[str, ...]]:
    """The layers whose spectrum a checkpoint has, by what it tells of their settings, and what had to be guessed."""
    tensors = asked.checkpoint.tensors
    described = _described_settings(asked.checkpoint, model) if asked.form == "ours" else {}
    layers = {}
    guessed: list[str] = []
    made: dict[nn.Module, Layer] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        inner = found.layer(fqn)
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or inner is None or f"{inner}.dft_weight" not in tensors:
            continue
        if module not in made:
            dtype = DTYPES.get(tensors[f"{inner}.dft_weight"].code, torch.float32)
            leaves = {name[len(inner) + 1 :]: one for name, one in tensors.items() if name.startswith(inner + ".")}
            if (settings := described.get(fqn)) is None:
                settings = settings_of(module, leaves, official=asked.form == "official")
                guessed.append(fqn)
            operator = get_operator(FDConvOperator.name)
            settings = operator.settings({**settings, **asked.overrides})
            stored = _stored_spectrum(leaves)
            if asked.form == "ours" and settings["spectrum"] != stored:
                raise CheckpointError(
                    f"{asked.checkpoint.path}: the spectrum of {inner!r} is stored with spectrum: {stored}, and the "
                    f"settings say {settings['spectrum']!r}, which does not change what is stored"
                )
            try:
                template = operator.replace(copy.deepcopy(module).to("meta", dtype), settings)
            except (ValueError, RuntimeError, TypeError) as error:
                raise CheckpointError(f"{asked.checkpoint.path}: {inner!r} makes no layer: {error}") from None
            assert isinstance(template, (FDConv2d, FDLinear))
            made[module] = Layer(fqn, template, settings, template)
        layers[fqn] = made[module]
    return layers, tuple(_guess(guessed, asked.overrides))


def _guess(names: list[str], overrides: dict[str, Any]) -> Iterator[str]:
    """What to know of layers whose settings nothing tells."""
    if names:
        defaults = FDConvOperator().settings(overrides)
        shown = ", ".join(f"{name} {defaults[name]}" for name in _INVISIBLE)
        yield (
            f"the settings of {len(names)} layers, {names[0]!r} first, are guessed from the shapes of their tensors; "
            f"what shows in none is taken as {shown}: where the model had others, give them by --set"
        )


def _described_settings(checkpoint: Checkpoint, model: nn.Module) -> dict[str, dict[str, Any]]:
    """The settings that a converted model was saved with, by layer; none where nothing tells them.

    They stand in the folder, be it ours or transformers', in the metadata of the files, or beside a file.
    """
    path = checkpoint.path
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (found := _settings_of_folder(folder, model)):
        return found
    for shard in checkpoint.shards:
        if METADATA in shard.metadata:
            return _settings_of_metadata(shard.path, shard.metadata[METADATA])
    beside = not path.is_dir() and path.name in (WEIGHTS, INDEX)
    return _settings_of_folder(folder, model) if beside else {}


def _settings_of_folder(folder: Path, model: nn.Module) -> dict[str, dict[str, Any]]:
    if (folder / DESCRIPTION).is_file():
        content = read_json(folder / DESCRIPTION)
        return _settings_by_layer(folder / DESCRIPTION, content)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    given: Any = config.get("quantization_config") if isinstance(config, dict) else None
    if not is_description(given):
        return {}
    try:
        description = Description.from_dict(given)
        found = description.find(model)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    settings = {found[name]: group.settings for group in description.layers for name in group.shapes if name in found}
    named = model.named_modules(remove_duplicate=False)
    return {fqn: settings[module] for fqn, module in named if module in settings}


def _settings_of_metadata(path: Path, text: str) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: what its metadata says of the layers is no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected metadata of format {FORMAT}; a newer fdsurgery may read it")
    return _settings_by_layer(path, content)


def _settings_by_layer(path: Path, content: Any) -> dict[str, dict[str, Any]]:
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise CheckpointError(f"{path} is damaged: it has no layers")
    try:
        return {fqn: get_operator(entry["operator"]).saved_settings(entry["settings"]) for fqn, entry in layers.items()}
    except (KeyError, TypeError, AttributeError, SurgeryError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _stored_spectrum(leaves: Mapping[str, Stored]) -> str:
    """How a layer of ours has its spectrum, by its tensors."""
    return "isometric" if OURS in leaves else "paper"


def settings_of(layer: nn.Conv2d | nn.Linear, leaves: Mapping[str, Stored], *, official: bool) -> dict[str, Any]:
    """What the tensors of a dynamic layer tell of its settings; the others are the defaults.

    Args:
        layer: its plain twin.
        leaves: the dynamic layer's tensors by their name within it.
        official: True for the authors' layers, whose band masks are `interpolated`.
    """
    settings: dict[str, Any] = {"band_mask": "interpolated"} if official else {}
    # Official layers are put into our form as they are read; what version 0.1 saved stays in theirs.
    settings["spectrum"] = "isometric" if official else _stored_spectrum(leaves)
    if not any(leaf.startswith(_MODULATION) for leaf in leaves):
        return settings
    in_channels = layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features
    spectra, squeeze = leaves["dft_weight"].shape, leaves.get("KSM_Global.fc.weight")
    ratio = spectra[0] if spectra else 1
    settings |= {"param_ratio": ratio, "ksm_global": squeeze is not None}
    if squeeze is not None and squeeze.shape:
        heads = leaves.get("KSM_Global.kernel_fc.weight")
        settings["kernel_num"] = max(1, heads.shape[0] // max(1, ratio)) if heads and heads.shape else 1
        width = squeeze.shape[0]
        if width != max(in_channels // 16, 16):
            settings |= {"reduction": (width + 0.5) / in_channels, "min_attention_channels": 1}
        normed = "rms" if "KSM_Global.norm.weight" in leaves else "batch"
        usual = "rms" if settings["spectrum"] == "isometric" or isinstance(layer, nn.Linear) else "batch"
        settings["norm"] = "auto" if normed == usual else normed
    if isinstance(layer, nn.Conv2d):
        settings["ksm_local"] = "KSM_Local.conv.weight" in leaves
        maps = [one for leaf, one in leaves.items() if leaf.startswith("FBM.") and leaf.endswith(".weight")]
        settings["fbm_kernel_sizes"] = [layer.kernel_size[0]] if maps else []
        if "FBM.edges.edge" in leaves:
            settings["band_edges"] = "dynamic" if "FBM.edges.scale.weight" in leaves else "learned"
        if len(maps) == 4:
            settings["band_lowfreq"] = True
        if maps and maps[0].shape:
            settings["band_groups"] = maps[0].shape[0]
    return settings


def _located(fit: Fit) -> Fit:
    """The fit, with every tensor looked for."""
    found, tensors = fit.found, fit.asked.checkpoint.tensors
    expected: dict[str, tuple[int, ...]] = {}
    theirs: dict[str, Foreign | None] = {}
    groups: dict[Any, list[str]] = {}
    for name, tensor in fit.model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] not in fit.layers:
            expected[name] = tuple(tensor.shape)
            theirs[name] = found.naming.table.get(name)
            groups.setdefault(id(tensor), []).append(name)
    for fqn, layer in fit.layers.items():
        for leaf, tensor in layer.state().items():
            expected[f"{fqn}.{leaf}"] = tuple(tensor.shape)
            theirs[f"{fqn}.{leaf}"] = Foreign(f"{found.naming.layer(fqn)}.{leaf}")
            groups.setdefault((id(layer), leaf), []).append(f"{fqn}.{leaf}")

    pieces: dict[str, Piece] = {}
    missing: list[str] = []
    problems: list[Problem] = []
    notes: list[str] = []
    used: set[str] = set()
    for name, shape in expected.items():
        foreign = theirs[name]
        stored = None if foreign is None else tensors.get(found.name(foreign))
        if stored is None or foreign is None:
            missing.append(name)
            continue
        used.add(stored.name)
        if _part_shape(stored, foreign) == squeezed(shape):
            size = stored.nbytes // foreign.parts
            pieces[name] = Piece(stored.name, foreign.part * size, (foreign.part + 1) * size)
        elif fit.keeps_names and "pos" in name and fit.asked.form == "plain":
            notes.append(f"{stored.name} is {_shown(stored.shape)}, {_shown(shape)} in the model; it is kept as it is")
        else:
            detail = f" is {_shown(stored.shape)} in the checkpoint, {_shown(shape)} in the model"
            problems.append(Problem("wrong shape", stored.name, detail))

    elsewhere = {other for group in groups.values() if any(name in pieces for name in group) for other in group}
    problems += [
        Problem(
            "no counterpart",
            f"{found.layer(fqn)}",
            ": it is modulated as a convolution, and is a linear layer here",
        )
        for fqn in fit.layers
        if f"{found.layer(fqn)}.KSM_Local.conv.weight" in tensors and f"{fqn}.KSM_Local.conv.weight" not in expected
    ]
    missing = [name for name in missing if name not in elsewhere and not _starts_anew(fit, name)]
    unused = [name for name in tensors if name not in used]
    constants = [name for name in unused if name.rpartition(".")[2] in _CONSTANTS]
    unexpected = [name for name in unused if found.claims(name) and name not in constants]
    if constants and not fit.keeps_names:
        notes.append(f"{len(constants)} tensors that the model computes itself are left out, {constants[0]!r} first")
    absent = [found.name(one) if (one := theirs[name]) else name for name in missing]
    problems += [Problem("missing", name, _near(at, name, unused)) for at, name in enumerate(absent)]
    problems += [Problem("unexpected", name, _near(at, name, absent)) for at, name in enumerate(unexpected)]
    unclaimed = tuple(name for name in unused if not found.claims(name))
    return replace(
        fit,
        expected=expected,
        pieces=pieces,
        problems=tuple(problems),
        unclaimed=unclaimed,
        notes=(*fit.notes, *notes),
    )


def _near(at: int, name: str, known: list[str]) -> str:
    """Near misses for those problems that are shown: each takes a look at every name."""
    return near_misses(name, known, 1) if at < _SHOWN else ""


def _starts_anew(fit: Fit, name: str) -> bool:
    """True for tensors that a checkpoint may lack, for they have a start of their own."""
    fqn, leaf = next(
        ((fqn, name[len(fqn) + 1 :]) for fqn in fit.layers if name.startswith(fqn + ".")), name.rpartition(".")[::2]
    )
    if fqn not in fit.layers:
        return leaf == "num_batches_tracked"
    if fit.asked.form != "official":
        return False
    if leaf in ("frequency_group", OURS):
        return True
    inner = fit.found.layer(fqn)
    modulated = any(
        key.startswith(tuple(f"{inner}.{part}" for part in _MODULATION)) for key in fit.asked.checkpoint.tensors
    )
    return leaf.startswith(_MODULATION) and not modulated


def _part_shape(stored: Stored, foreign: Foreign) -> tuple[int, ...] | None:
    """The shape of a part of a stored tensor; None if it does not divide."""
    shape = stored.shape
    if foreign.parts > 1:
        if not shape or shape[0] % foreign.parts:
            return None
        shape = (shape[0] // foreign.parts, *shape[1:])
    return squeezed(shape)


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the two last axes where these are of one pixel: a 1x1 convolution's, as a linear layer has it."""
    return shape[:-2] if len(shape) == 4 and shape[-2:] == (1, 1) else shape


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"

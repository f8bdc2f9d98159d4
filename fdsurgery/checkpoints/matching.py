"""A model and a checkpoint: under which name, and in which part of what, the one has the tensors of the other."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..discovery.kinds import kind_of
from ..errors import CheckpointError, near_misses
from ..integrations.base import ModelSource
from ..operators import BuildError, Operator, Wanted, build_layers, get_operator, operators
from ..recipe import Recipe
from ..saving.folder import METADATA
from ..saving.source import build, library_of_source
from .described import described_layers
from .files import DTYPES, Checkpoint, Stored
from .naming import Foreign, Naming, Recognised, namings, recognise

Form = Literal["plain", "official", "ours"]
FORMS: tuple[Form, ...] = ("plain", "official", "ours")
_CONSTANTS = ("relative_position_index", "relative_coords_table", "attn_mask", "position_ids")
"""Buffers that older releases saved and newer ones compute."""
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
    """`plain`, or whose dynamic layers it has: by what our files say of themselves, else by the names of tensors."""
    if any(METADATA in shard.metadata for shard in checkpoint.shards):
        return "ours"
    leaves = {name.rpartition(".")[2] for name in checkpoint.tensors}
    seen = [operator for operator in operators().values() if operator.leaf in leaves]
    if not seen:
        return "plain"
    official = all(one.official is not None and one.official.is_official(leaves) for one in seen)
    return "official" if official else "ours"


@dataclass(frozen=True)
class Asked:
    """What the caller wants."""

    checkpoint: Checkpoint
    destination: Path
    form: Form
    to: Form
    recipe: str | Path | Recipe
    overrides: dict[str, Any]
    operator: str | None = None


@dataclass(frozen=True)
class Layer:
    """A layer that is dynamic in the result."""

    fqn: str
    template: nn.Module
    """See `Build.template`."""
    settings: dict[str, Any]
    dynamic: nn.Module
    """The dynamic layer, on meta."""
    operator: Operator

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
    """The number of classes a model must be reset to for the checkpoint; None where it has it already."""
    for name in library_of_source(source).classifiers(model):
        foreign = found.naming.table.get(f"{name}.weight")
        weight = model.state_dict().get(f"{name}.weight")
        if weight is None or _operator_at(name, checkpoint) is not None:
            continue
        stored = None if foreign is None else checkpoint.tensors.get(found.name(foreign))
        if stored is None:
            return 0
        if stored.shape[1:] == weight.shape[1:] and stored.shape[0] != weight.shape[0]:
            return stored.shape[0]
    return None


def _operator_at(inner: str, checkpoint: Checkpoint) -> Operator | None:
    """The operator of the dynamic layer that a checkpoint has under a name, by its tensors."""
    return next((one for one in operators().values() if one.leaf and f"{inner}.{one.leaf}" in checkpoint.tensors), None)


def _dynamic_layers(asked: Asked, model: nn.Module, found: Recognised) -> tuple[dict[str, Layer], tuple[str, ...]]:
    """The layers that are dynamic in a checkpoint, by what it tells of their settings, and what had to be guessed."""
    checkpoint, tensors = asked.checkpoint, asked.checkpoint.tensors
    described = described_layers(checkpoint, model) if asked.form == "ours" else {}
    guessed: list[tuple[str, Operator]] = []
    wanted: dict[nn.Module, Wanted] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        inner = found.layer(fqn)
        if kind_of(module) is None or inner is None or module in wanted:
            continue
        name, settings = described.get(fqn, (None, None))
        operator = _operator_at(inner, checkpoint) if name is None else get_operator(name)
        if operator is None:
            continue
        leaves = {name[len(inner) + 1 :]: one for name, one in tensors.items() if name.startswith(inner + ".")}
        if settings is None:
            settings = operator.settings_of_tensors(module, leaves, asked.form == "official")
            guessed.append((fqn, operator))
        settings = operator.settings({**settings, **asked.overrides})
        if asked.form == "ours" and (misfit := operator.check_tensors(settings, leaves)) is not None:
            raise CheckpointError(f"{checkpoint.path}: {inner!r} {misfit}")
        stored = [DTYPES.get(one.code, torch.float32) for leaf, one in leaves.items() if leaf != "bias"]
        first = [DTYPES.get(leaves[operator.leaf].code, torch.float32)] if operator.leaf in leaves else []
        dtype = next((one for one in first + stored if one.is_floating_point), torch.float32)
        wanted[module] = Wanted(fqn, copy.deepcopy(module).to("meta", dtype), operator.name, settings)
    try:
        made = build_layers(wanted.values())
    except BuildError as error:
        if not isinstance(error.__cause__, (ValueError, RuntimeError, TypeError)):
            raise
        inner = found.layer(error.name) or error.name
        raise CheckpointError(f"{checkpoint.path}: {inner!r} makes no layer: {error.__cause__}") from None
    layers = {
        module: Layer(one.name, made[one.name], one.settings, made[one.name], get_operator(one.operator))
        for module, one in wanted.items()
    }
    named = model.named_modules(remove_duplicate=False)
    return {fqn: layers[module] for fqn, module in named if module in layers}, tuple(_guess(guessed, asked.overrides))


def _guess(guessed: list[tuple[str, Operator]], overrides: dict[str, Any]) -> Iterator[str]:
    """What to know of layers whose settings nothing tells."""
    for operator in dict.fromkeys(operator for _, operator in guessed):
        names = [name for name, its in guessed if its is operator]
        defaults = operator.settings(overrides)
        shown = ", ".join(f"{name} {defaults[name]}" for name in operator.unseen_settings) or "the defaults"
        yield (
            f"the settings of {len(names)} layers, {names[0]!r} first, are guessed from the shapes of their tensors; "
            f"what shows in none is taken as {shown}: where the model had others, give them by --set"
        )


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
        Problem("no counterpart", f"{found.layer(fqn)}", f": {misfit}")
        for fqn, layer in fit.layers.items()
        if (misfit := _misfit(layer, _within(f"{found.layer(fqn)}", tensors)))
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


def _within(layer: str, names: Iterable[str]) -> list[str]:
    """The names of a layer's tensors, as they are within it."""
    return [name[len(layer) + 1 :] for name in names if name.startswith(layer + ".")]


def _misfit(layer: Layer, present: list[str]) -> str | None:
    official = layer.operator.official
    return None if official is None else official.misfit(present, layer.state())


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
    official = fit.layers[fqn].operator.official
    if fit.asked.form != "official" or official is None:
        return False
    return official.starts_anew(leaf, _within(f"{fit.found.layer(fqn)}", fit.asked.checkpoint.tensors))


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

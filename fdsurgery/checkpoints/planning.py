"""What converting a checkpoint would do, tensor by tensor, from names and shapes. Nothing is written."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fdconv import FDConv2d, FDLinear
from fdconv.official import (
    OURS,
    divides_evenly,
    public_arguments,
    public_groups,
    public_obstacle,
    public_setting_obstacle,
)

from ..errors import CheckpointError, DiscoveryError, SurgeryError, near_misses
from ..operators import get_operator
from ..operators.fdconv import FDConvOperator
from ..plan import Plan
from ..planning import plan
from ..recipe import Recipe, load_recipe, matches_any
from ..saving.folder import DESCRIPTION, FORMAT
from ..saving.source import SourceError
from .files import CODES, DTYPES, Checkpoint, open_checkpoint
from .matching import FORMS, Asked, Fit, Form, Layer, MisfitError, Piece, Problem, fit_model, form_of, squeezed
from .naming import Naming

RECORD = "conversion.json"
"""In a folder that a conversion wrote: what it was."""
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Destinations that are files."""
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Output:
    """A tensor to be written."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Copy:
    """A tensor that is written as it is, from pieces that lie one after another; zeros where there is none."""

    output: Output
    pieces: tuple[Piece, ...]

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Those of this step."""
        return (self.output,)


@dataclass(frozen=True)
class Rescale:
    """A tensor that is multiplied on the way, for one side stores it isometrically and the other as in the paper."""

    output: Output
    piece: Piece
    factor: Tensor = field(repr=False)
    """Float64, broadcasts to the tensor."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """That of this step."""
        return (self.output,)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """That of this step."""
        return (self.piece,)


@dataclass(frozen=True)
class Build:
    """A dynamic layer made on the way, and those of its tensors that are written."""

    layer: str
    template: nn.Module = field(repr=False)
    """On meta: the plain layer, or the dynamic one where the checkpoint has its spectrum."""
    settings: dict[str, Any] | None
    """Of the operator that replaces a plain template; None for a dynamic template, which only gives its start."""
    inputs: dict[str, Piece]
    """The plain layer's tensors, by their name within it."""
    made: dict[str, Output]
    """By name within the layer."""

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Those of this step."""
        return tuple(self.made.values())


Step = Copy | Rescale | Build


@dataclass(frozen=True)
class OutputFile:
    """A file to be written, and how."""

    name: str
    steps: tuple[Step, ...]

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The tensors of the file."""
        return tuple(output for step in self.steps for output in step.outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the file."""
        return sum(output.nbytes for output in self.outputs)


@dataclass(frozen=True)
class CheckpointPlan:
    """What a conversion reads, makes and writes."""

    checkpoint: Checkpoint
    destination: Path
    source_form: Form
    target_form: Form
    model: str
    """The model that the checkpoint is of."""
    recipe: str | None
    """The recipe that chose the layers; None where the checkpoint has dynamic layers already."""
    naming: str
    """How the tensors of the checkpoint are named, in words."""
    settings: dict[str, dict[str, Any]]
    """Operator and settings of each dynamic layer of the result, as the model calls it."""
    files: tuple[OutputFile, ...]
    left_behind: tuple[str, ...]
    """Tensors of the checkpoint that belong to other parts, such as a detector's neck, and are not written."""
    notes: tuple[str, ...]
    description: dict[str, Any] | None
    """What `fdsurgery.load` needs besides the weights; None where the result is no model of ours."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The dynamic layers of the result, as the model calls them."""
        return tuple(self.settings)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors to be written."""
        return sum(file.nbytes for file in self.files)

    @property
    def is_folder(self) -> bool:
        """True if the result is a folder, False if a file."""
        return self.destination.suffix not in FILE_SUFFIXES

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types, without the weights' places."""
        return {
            "from": str(self.checkpoint.path),
            "to": str(self.destination),
            "source_form": self.source_form,
            "target_form": self.target_form,
            "model": self.model,
            "recipe": self.recipe,
            "naming": self.naming,
            "layers": list(self.layers),
            "bytes": self.nbytes,
            "files": {file.name: {one.name: [one.code, *one.shape] for one in file.outputs} for file in self.files},
            "left_behind": list(self.left_behind),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        tensors = sum(len(file.outputs) for file in self.files)
        by = "as the checkpoint has them" if self.recipe is None else f"by recipe {self.recipe}"
        parts = Counter(name.partition(".")[0] + ".*" for name in self.left_behind)
        lines = [
            f"{self.checkpoint.path}: {len(self.checkpoint.tensors)} tensors, {_in_units(self.checkpoint.nbytes)}, "
            f"{len(self.checkpoint.shards)} file(s), {self.source_form}, {self.naming}",
            f"{self.model}: {len(self.layers)} dynamic layers, {by}",
            f"{self.destination}: {tensors} tensors, {_in_units(self.nbytes)}, {len(self.files)} file(s), "
            f"{self.target_form}",
        ]
        if parts:
            lines.append("left behind: " + ", ".join(f"{part} ({count})" for part, count in parts.most_common()))
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def plan_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    model: str | None = None,
    recipe: str | Path | Recipe = "auto",
    to: str = "ours",
    source_form: str = "auto",
    key: str | None = None,
    settings: dict[str, Any] | None = None,
) -> CheckpointPlan:
    """Plan the conversion of a checkpoint, and check that every tensor has its place.

    Args:
        source: see `open_checkpoint`.
        destination: a folder, or a `.safetensors`, `.pth`, `.pt` or `.bin` file.
        model: SPEC of the plain model that the checkpoint is of; see `fdsurgery.saving.source.build`. Without it,
            what the source's own `config.json` says, else the first timm model of the recipe that fits.
        recipe: which layers of a plain checkpoint become dynamic. Checkpoints that have dynamic layers tell themselves.
        to: `ours` for `fdsurgery.load` and converted models, `official` for the authors' code: its names, and from a
            plain checkpoint what its conversion tool writes.
        source_form: `plain`, `official` or `ours`; `auto` to see by its tensors.
        key: entry of a pickled checkpoint to read.
        settings: operator settings that win over the recipe's or those seen in the checkpoint.

    Raises:
        MisfitError: the checkpoint does not fit the model.
        CheckpointError: it cannot be read, or the destination is no place for the result.
        SurgeryError: the model cannot be built or planned.
    """
    source, destination = Path(source), Path(destination)
    if to not in ("ours", "official"):
        raise CheckpointError(f"the result can be 'ours' or 'official', not {to!r}{near_misses(to, FORMS)}")
    if source_form not in ("auto", *FORMS):
        raise CheckpointError(f"a checkpoint is one of {', '.join(FORMS)}, not {source_form!r}")
    try:
        _check_destination(source, destination)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror or error}") from None
    checkpoint = open_checkpoint(source, key)
    seen = form_of(checkpoint)
    form = next((form for form in FORMS if form == source_form), seen)
    if (form == "plain") != (seen == "plain"):
        has = "has" if form == "plain" else "has no"
        raise CheckpointError(f"{source} is no {form} checkpoint: it {has} tensors called dft_weight")
    target: Form = "official" if to == "official" else "ours"
    asked = Asked(checkpoint, destination, form, target, recipe, settings or {})
    if (form, target) == ("plain", "official"):  # to be what the authors' layers are
        asked = replace(asked, overrides={"spectrum": "paper", **asked.overrides})
    if model is None and source.is_dir() and (source / "config.json").is_file():
        model = f"hf:{source}"
    if model is not None:
        return _with_model(asked, model)
    if recipe == "auto":
        raise CheckpointError(f"{source} does not say what model it is of; give --model SPEC, or --recipe NAME")
    return _with_search(asked, recipe if isinstance(recipe, Recipe) else load_recipe(recipe))


def _check_destination(source: Path, destination: Path) -> None:
    here, there = source.resolve(), destination.resolve()
    if here == there or here.is_relative_to(there):
        raise CheckpointError(f"{destination} is or holds what is to be read; give another place")
    if destination.suffix in FILE_SUFFIXES:
        if destination.is_dir():
            raise CheckpointError(f"{destination} is a folder; give a file")
        return
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; give a folder, or a name that ends in .safetensors or .pth")
    earlier = any((destination / name).exists() for name in (RECORD, DESCRIPTION))
    if destination.is_dir() and any(destination.iterdir()) and not earlier:
        raise CheckpointError(f"{destination} is not empty and holds no earlier conversion; give a new folder")


def _with_model(asked: Asked, spec: str) -> CheckpointPlan:
    """The plan, with the model built without memory where that works."""
    try:
        return _complete(fit_model(asked, spec, meta=True), described=True)
    except (SourceError, DiscoveryError):
        return _complete(fit_model(asked, spec, meta=False), described=True)


def _with_search(asked: Asked, recipe: Recipe) -> CheckpointPlan:
    """The plan with the first timm model that a recipe is for and the checkpoint fits."""
    try:
        import timm
    except ImportError:
        raise CheckpointError("timm is not installed, so give --model SPEC to say what model this is of") from None
    names = [name for name in timm.list_models() if matches_any(recipe.match.timm, name)]
    for name in sorted(names, key=lambda name: (len(name), name)):
        try:
            fit = fit_model(asked, f"timm:{name}", meta=True)
        except SurgeryError:
            continue
        if not fit.problems:
            # Other models may have the very same tensors and compute something else, so the result does not name this.
            return _complete(fit, described=False)
    which = f"none of the {len(names)} timm models" if names else "no timm model, for there is none"
    raise CheckpointError(
        f"{asked.checkpoint.path} fits {which} that recipe {recipe.name} is for; give --model SPEC to see what "
        "does not fit"
    )


def _complete(fit: Fit, *, described: bool) -> CheckpointPlan:
    """The plan of a model and a checkpoint that fit."""
    asked = fit.asked
    made: Plan | None = None
    layers = fit.layers
    if fit.problems:
        raise MisfitError(f"{asked.checkpoint.path} does not fit {fit.spec}", fit.problems)
    if asked.form == "plain":
        made = plan(fit.model, asked.recipe, **asked.overrides)
        layers = _planned_layers(fit, made)
    if not layers:
        raise CheckpointError(f"{asked.checkpoint.path}: no layer of {fit.spec} would be dynamic")
    refused = tuple(_refusals(fit, layers))
    if refused:
        raise MisfitError(f"{asked.checkpoint.path} cannot be converted", refused)
    steps = list(_official_steps(fit, layers) if asked.to == "official" else _own_steps(fit, layers))
    canonical = {layer.fqn: layer for layer in layers.values()}
    naming, prefix = fit.found.naming.label, fit.found.prefix
    return CheckpointPlan(
        asked.checkpoint,
        asked.destination,
        asked.form,
        asked.to,
        fit.spec,
        None if made is None else made.recipe,
        f"{naming} after {prefix!r}" if prefix else naming,
        {fqn: {"operator": FDConvOperator.name, "settings": layer.settings} for fqn, layer in canonical.items()},
        _files(asked, steps),
        () if fit.keeps_names else fit.unclaimed,
        (*fit.notes, *_notes(fit, canonical)),
        _description(fit, canonical, made) if described and asked.to == "ours" else None,
    )


def _planned_layers(fit: Fit, made: Plan) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for decision in made.swaps:
        assert decision.operator is not None
        fqn = decision.site.name
        template = copy.deepcopy(fit.model.get_submodule(fqn)).to("meta")
        piece = fit.pieces.get(f"{fqn}.weight")
        code = "F32" if piece is None else fit.asked.checkpoint.tensors[piece.tensor].code
        if code in _FLOATS:
            template = template.to(DTYPES[code])
        dynamic = get_operator(decision.operator).replace(template, decision.settings)
        if not isinstance(dynamic, (FDConv2d, FDLinear)):
            raise CheckpointError(
                f"{fqn}: checkpoints are converted to layers of fdconv, and the recipe asks for {decision.operator!r}; "
                "load the checkpoint into the plain model, then convert and save that"
            )
        layer = Layer(fqn, template, decision.settings, dynamic)
        layers |= dict.fromkeys((fqn, *decision.site.aliases), layer)
    return layers


def _refusals(fit: Fit, layers: dict[str, Layer]) -> Iterator[Problem]:
    """The layers that cannot be made, or that the other side has no counterpart of."""
    for fqn, layer in layers.items():
        piece = fit.pieces.get(f"{fqn}.weight") or fit.pieces.get(f"{fqn}.dft_weight")
        if piece is not None and (code := fit.asked.checkpoint.tensors[piece.tensor].code) not in _FLOATS:
            yield Problem("no counterpart", fqn, f": its weight is stored as {code}, and a spectrum needs real numbers")
        if fit.asked.to == "official":
            obstacle = public_obstacle(layer.dynamic) or public_setting_obstacle(layer.dynamic)
            if obstacle is None and _official_layer(fit, fqn) is None:
                obstacle = "it is a part of another tensor there"
            if obstacle is None and fit.asked.form != "plain" and not divides_evenly(layer.dynamic):
                obstacle = f"its coefficients make no {layer.settings['kernel_num']} groups of one size"
            if obstacle is not None:
                yield Problem("no counterpart", fqn, f": {obstacle}")


def _official_layer(fit: Fit, fqn: str) -> str | None:
    """What a layer is called in the result, for the authors' code."""
    return fit.found.layer(fqn) if fit.keeps_names else _target(fit).layer(fqn)


def _target(fit: Fit) -> Naming:
    return next((naming for naming in fit.known if naming.official), fit.known[-1])


def _own_steps(fit: Fit, layers: dict[str, Layer]) -> Iterator[Step]:
    """The result under the model's own names."""
    begun: set[str] = set()
    for name, shape in fit.expected.items():
        fqn = next((fqn for fqn in _ancestors(name) if fqn in layers), None)
        if fqn is None:
            if (piece := fit.pieces.get(name)) is not None:
                yield Copy(_output(name, fit, piece, shape), (piece,))
            elif name.endswith("num_batches_tracked"):
                yield Copy(Output(name, "I64", (), 8), ())
        elif fit.asked.form == "plain":
            if fqn not in begun and f"{fqn}.weight" in fit.pieces:
                begun.add(fqn)
                yield _build_step(fit, layers[fqn], fqn, fqn, tuple(layers[fqn].state()))
        elif (piece := fit.pieces.get(name)) is not None:
            yield _in_form(fit, layers[fqn], name[len(fqn) + 1 :], _output(name, fit, piece, shape), piece)
        elif fqn not in begun and f"{fqn}.dft_weight" in fit.pieces:
            begun.add(fqn)
            leaves = [leaf for leaf in layers[fqn].state() if f"{fqn}.{leaf}" not in fit.pieces]
            yield _build_step(fit, layers[fqn], fqn, fqn, tuple(leaves))


def _official_steps(fit: Fit, layers: dict[str, Layer]) -> Iterator[Step]:
    """The result under the names that the authors' code has; from a plain checkpoint what their tool writes."""
    spectra = {}
    for fqn, layer in layers.items():
        if (piece := fit.pieces.get(f"{fqn}.weight")) is not None and fit.asked.form == "plain":
            spectra[piece.tensor] = _build_step(fit, layer, fqn, f"{_official_layer(fit, fqn)}", ("dft_weight",))
    if fit.keeps_names:
        dynamic = {fit.found.layer(fqn): layer for fqn, layer in layers.items() if fit.asked.form == "ours"}
        for name, stored in fit.asked.checkpoint.tensors.items():
            whole = Piece(name, 0, stored.nbytes)
            output = Output(name, stored.code, stored.shape, stored.nbytes)
            owner = next((inner for inner in _ancestors(name) if inner in dynamic), None)
            if owner is None:
                yield spectra.get(name) or Copy(output, (whole,))
            elif not name.endswith(f".{OURS}"):
                yield _in_form(fit, dynamic[owner], name[len(owner) + 1 :], output, whole)
        return
    fused: dict[str, list[tuple[int, Piece]]] = {}
    for name, piece in fit.pieces.items():
        shape = fit.expected[name]
        if piece.tensor in spectra:
            yield spectra[piece.tensor]
            continue
        owner = next((fqn for fqn in _ancestors(name) if fqn in layers), None)
        if owner is not None:
            output = _output(f"{_official_layer(fit, owner)}{name[len(owner) :]}", fit, piece, shape)
            if not name.endswith(f".{OURS}"):
                yield _in_form(fit, layers[owner], name[len(owner) + 1 :], output, piece)
            continue
        foreign = _target(fit).table[name]
        parts = fused.setdefault(foreign.name, [])
        parts.append((foreign.part, piece))
        if len(parts) == foreign.parts:
            shape = (shape[0] * foreign.parts, *shape[1:]) if foreign.parts > 1 else shape
            shape = (*squeezed(shape), *foreign.tail) if foreign.tail else shape
            ordered = tuple(piece for _, piece in sorted(parts, key=lambda part: part[0]))
            yield Copy(_output(foreign.name, fit, piece, shape, foreign.parts), ordered)


def _in_form(fit: Fit, layer: Layer, leaf: str, output: Output, piece: Piece) -> Step:
    """A tensor of a dynamic layer in the form that the result has."""
    factor = None if fit.asked.form == fit.asked.to else layer.dynamic.factors_from_paper().get(leaf)
    if factor is None:
        return Copy(output, (piece,))
    return Rescale(output, piece, factor if fit.asked.to == "ours" else 1 / factor)


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _output(name: str, fit: Fit, piece: Piece, shape: tuple[int, ...], parts: int = 1) -> Output:
    code = fit.asked.checkpoint.tensors[piece.tensor].code
    return Output(name, code, shape, (piece.stop - piece.start) * parts)


def _build_step(fit: Fit, layer: Layer, fqn: str, name: str, leaves: tuple[str, ...]) -> Build:
    """A layer under its name in the model, and what it is called in the result."""
    plain = fit.asked.form == "plain"
    inputs = {leaf: fit.pieces[f"{fqn}.{leaf}"] for leaf in layer.template.state_dict() if plain}
    made = {}
    for leaf, tensor in layer.state().items():
        if leaf in leaves:
            code = CODES[tensor.dtype]
            made[leaf] = Output(f"{name}.{leaf}", code, tuple(tensor.shape), tensor.numel() * tensor.element_size())
    return Build(layer.fqn, layer.template, layer.settings if plain else None, inputs, made)


def _files(asked: Asked, steps: list[Step]) -> tuple[OutputFile, ...]:
    """The steps by the file of the checkpoint that they read from, so that one of ours comes from one of theirs."""
    if asked.destination.suffix in FILE_SUFFIXES:
        return (OutputFile(asked.destination.name, tuple(steps)),)
    by_shard: dict[int, list[Step]] = {}
    last = 0
    for step in steps:
        read = tuple(step.inputs.values()) if isinstance(step, Build) else step.pieces
        last = asked.checkpoint.shard_index(read[0].tensor) if read else last
        by_shard.setdefault(last, []).append(step)
    if len(by_shard) == 1:
        return (OutputFile("model.safetensors", tuple(steps)),)
    count = len(by_shard)
    return tuple(
        OutputFile(f"model-{number:05}-of-{count:05}.safetensors", tuple(by_shard[shard]))
        for number, shard in enumerate(sorted(by_shard), 1)
    )


def _notes(fit: Fit, layers: dict[str, Layer]) -> Iterator[str]:
    """Where the authors' code is another than ours: groups of one size, no order saved, interpolated band masks."""
    form, to = fit.asked.form, fit.asked.to
    if form == "plain" and to == "official":
        uneven = [layer for layer in layers.values() if not divides_evenly(layer.dynamic)]
        if uneven:
            yield (
                f"{len(uneven)} layers, {uneven[0].fqn!r} first, make no {uneven[0].settings['kernel_num']} groups of "
                "one size; the public code needs another kernel_num there"
            )
    if form == "official" and to == "ours":
        yield (
            "official checkpoints do not save the order of coefficients of equal radius; it was computed as the public "
            f"code does with torch {torch.__version__}, and is saved as frequency_group"
        )
    if to == "official":
        told = Counter(json.dumps(public_arguments(layer.dynamic)) for layer in layers.values())
        for text, count in told.items():
            if arguments := json.loads(text):
                shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
                yield f"{count} layers of the public code must be built with {shown}, which no tensor tells"
    if form != "ours" or to != "official":
        return
    moved = total = 0
    for fqn, layer in layers.items():
        piece = fit.pieces.get(f"{fqn}.frequency_group")
        if piece is not None:
            groups = fit.asked.checkpoint.read(piece.tensor)
            moved += int((groups != public_groups(layer.dynamic)).sum())
            total += groups.numel()
    if moved:
        yield (
            f"{moved / total:.2%} of the coefficients are in another group in the order that the public code computes "
            f"with torch {torch.__version__}; it does not read frequency_group"
        )
    exact = sum(layer.settings["band_mask"] == "exact" and layer.dynamic.FBM is not None for layer in layers.values())
    if exact:
        yield f"{exact} layers cut their bands exactly (band_mask: exact), and the public code interpolates a mask"


def _description(fit: Fit, layers: dict[str, Layer], made: Plan | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "versions": {"fdsurgery": version("fdsurgery"), "torch": torch.__version__},
        "source": fit.source.to_dict(),
        "layers": {fqn: {"operator": FDConvOperator.name, "settings": layer.settings} for fqn, layer in layers.items()},
        "finetune": {} if made is None else made.finetune.to_dict(),
        "plan": None if made is None else made.to_dict(),
    }


def _in_units(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"

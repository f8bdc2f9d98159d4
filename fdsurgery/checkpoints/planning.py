"""What converting a checkpoint would do, tensor by tensor, from names and shapes. Nothing is written."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, DiscoveryError, SurgeryError, near_misses
from ..integrations import LIBRARIES, SourceError
from ..operators import BuildError, Operator, Wanted, build_layers, get_operator, operators
from ..plan import Plan
from ..planning import plan
from ..recipe import Recipe, load_recipe, matches_any
from ..saving.folder import DESCRIPTION, FORMAT
from .files import DTYPES, Checkpoint, open_checkpoint
from .matching import FORMS, Asked, Fit, Form, Layer, MisfitError, Problem, fit_model, form_of
from .steps import FILE_SUFFIXES, OutputFile, files_of, official_form, official_layer, official_steps, own_steps
from .whole import WholePlan, official_operator, plan_reading, plan_writing

RECORD = "conversion.json"
"""In a folder that a conversion wrote: what it was."""
_FLOATS = ("F64", "F32", "F16", "BF16")


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
    operator: str | None = None,
    settings: dict[str, Any] | None = None,
) -> CheckpointPlan | WholePlan:
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
        operator: takes the place of the recipe's, where a plain checkpoint becomes dynamic.
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
    if (theirs := official_operator(checkpoint)) is not None and source_form in ("auto", "official") and to == "ours":
        return _reading_whole(checkpoint, destination, theirs, model, recipe, settings or {})
    seen = form_of(checkpoint)
    if seen == "ours" and to == "official" and _has_no_streaming_form(checkpoint):
        return plan_writing(checkpoint, _as_file(destination))
    form = next((form for form in FORMS if form == source_form), seen)
    if (form == "plain") != (seen == "plain"):
        has = "has" if form == "plain" else "has no"
        raise CheckpointError(f"{source} is no {form} checkpoint: it {has} tensors of dynamic layers")
    target: Form = "official" if to == "official" else "ours"
    asked = Asked(checkpoint, destination, form, target, recipe, settings or {}, operator)
    if model is None and source.is_dir() and (source / "config.json").is_file():
        model = f"hf:{source}"
    if model is not None:
        return _with_model(asked, model)
    if recipe == "auto":
        raise CheckpointError(f"{source} does not say what model it is of; give --model SPEC, or --recipe NAME")
    return _with_search(asked, recipe if isinstance(recipe, Recipe) else load_recipe(recipe))


def _reading_whole(
    checkpoint: Checkpoint,
    destination: Path,
    operator: Operator,
    model: str | None,
    recipe: str | Path | Recipe,
    settings: dict[str, Any],
) -> WholePlan:
    if model is None:
        raise CheckpointError(
            f"{checkpoint.path} is a checkpoint of {operator.name}, by the names of its tensors, and does not say what "
            "model it is of; give --model SPEC"
        )
    if destination.suffix in FILE_SUFFIXES:
        raise CheckpointError(f"{destination} is a file, and what is made of {checkpoint.path} is a folder; give one")
    return plan_reading(checkpoint, destination, operator, model, recipe, settings)


def _has_no_streaming_form(checkpoint: Checkpoint) -> bool:
    """True for a folder of ours with layers that the authors' code names otherwise than we do."""
    leaves = {name.rpartition(".")[2] for name in checkpoint.tensors}
    return any(one.leaf in leaves and one.official is None for one in operators().values())


def _as_file(destination: Path) -> Path:
    if destination.suffix not in FILE_SUFFIXES:
        raise CheckpointError(f"{destination} must be a file that ends in {', '.join(FILE_SUFFIXES)}")
    return destination


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
    """The plan with the first model that a recipe is for and the checkpoint fits."""
    try:
        specs = [
            spec
            for name, globs in recipe.match.root.items()
            for spec in LIBRARIES[name].specs_of(partial(matches_any, globs))
        ]
    except SourceError as error:
        raise CheckpointError(f"{error}; or give --model SPEC to say what model this is of") from None
    for spec in specs:
        try:
            fit = fit_model(asked, spec, meta=True)
        except SurgeryError:
            continue
        if not fit.problems:
            # Other models may have the very same tensors and compute something else, so the result does not name this.
            return _complete(fit, described=False)
    which = f"none of the {len(specs)} models" if specs else "no model by name, for there is none"
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
        made = plan(fit.model, asked.recipe, operator=asked.operator, **asked.overrides)
        layers = _planned_layers(fit, made)
    if not layers:
        raise CheckpointError(f"{asked.checkpoint.path}: no layer of {fit.spec} would be dynamic")
    refused = tuple(_refusals(fit, layers))
    if refused:
        raise MisfitError(f"{asked.checkpoint.path} cannot be converted", refused)
    steps = list(official_steps(fit, layers) if asked.to == "official" else own_steps(fit, layers))
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
        _described(canonical),
        files_of(asked, steps),
        () if fit.keeps_names else fit.unclaimed,
        (*fit.notes, *_notes(fit, canonical)),
        _description(fit, canonical, made) if described and asked.to == "ours" else None,
    )


def _planned_layers(fit: Fit, made: Plan) -> dict[str, Layer]:
    wanted: dict[str, Wanted] = {}
    for decision in made.swaps:
        operator, fqn = get_operator(str(decision.operator)), decision.site.name
        template = copy.deepcopy(fit.model.get_submodule(fqn)).to("meta")
        piece = fit.pieces.get(f"{fqn}.weight")
        code = "F32" if piece is None else fit.asked.checkpoint.tensors[piece.tensor].code
        if code in _FLOATS:
            template = template.to(DTYPES[code])
        settings = decision.settings
        if fit.asked.to == "official":  # to be what the authors' layers are
            usual = official_form(fqn, operator).settings.items()
            settings = {**settings, **{key: value for key, value in usual if key not in fit.asked.overrides}}
        wanted[fqn] = Wanted(fqn, template, operator.name, settings)
    try:
        dynamic = build_layers(wanted.values())
    except BuildError as error:
        raise CheckpointError(f"{fit.asked.checkpoint.path}: {error}") from error
    layers = {
        fqn: Layer(fqn, one.layer, one.settings, dynamic[fqn], get_operator(one.operator))
        for fqn, one in wanted.items()
    }
    return {name: layers[one.site.name] for one in made.swaps for name in (one.site.name, *one.site.aliases)}


def _refusals(fit: Fit, layers: dict[str, Layer]) -> Iterator[Problem]:
    """The layers that cannot be made, or that the other side has no counterpart of."""
    for fqn, layer in layers.items():
        leaf = layer.state().get(str(layer.operator.leaf))
        counts = leaf is not None and not leaf.is_floating_point()  # then its dtype tells nothing of the weight's
        piece = fit.pieces.get(f"{fqn}.weight") or (None if counts else fit.pieces.get(f"{fqn}.{layer.operator.leaf}"))
        if piece is not None and (code := fit.asked.checkpoint.tensors[piece.tensor].code) not in _FLOATS:
            yield Problem(
                "no counterpart", fqn, f": its weight is stored as {code}, and a dynamic layer needs real numbers"
            )
        if fit.asked.to == "official":
            form = official_form(fqn, layer.operator)
            obstacle = form.obstacle(layer.dynamic, from_plain=fit.asked.form == "plain")
            if obstacle is None and official_layer(fit, fqn) is None:
                obstacle = "it is a part of another tensor there"
            if obstacle is not None:
                yield Problem("no counterpart", fqn, f": {obstacle}")


def _notes(fit: Fit, layers: dict[str, Layer]) -> Iterator[str]:
    """Where the authors' code is another than ours."""
    form, to = fit.asked.form, fit.asked.to

    def read(fqn: str, leaf: str) -> Tensor | None:
        piece = fit.pieces.get(f"{fqn}.{leaf}")
        return None if piece is None else fit.asked.checkpoint.read(piece.tensor)

    for operator in dict.fromkeys(layer.operator for layer in layers.values()):
        if operator.official is None:
            continue
        if form == "official" and to == "ours":
            yield from operator.official.notes_on_reading()
        if to == "official":
            own = {fqn: layer.dynamic for fqn, layer in layers.items() if layer.operator is operator}
            yield from operator.official.notes_on_writing(own, read, from_plain=form == "plain")


def _described(layers: dict[str, Layer]) -> dict[str, dict[str, Any]]:
    return {fqn: {"operator": layer.operator.name, "settings": layer.settings} for fqn, layer in layers.items()}


def _description(fit: Fit, layers: dict[str, Layer], made: Plan | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "versions": {"fdsurgery": version("fdsurgery"), "torch": torch.__version__},
        "source": fit.source.to_dict(),
        "layers": _described(layers),
        "finetune": {} if made is None else made.finetune.to_dict(),
        "plan": None if made is None else made.to_dict(),
    }


def _in_units(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"

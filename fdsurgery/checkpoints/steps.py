"""The steps of a conversion: what is copied, rescaled or built, and into which file it goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..operators import OfficialForm, Operator
from .files import CODES
from .matching import Asked, Fit, Layer, Piece, squeezed
from .naming import Naming

FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Destinations that are files."""


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
class Part:
    """A dynamic layer that is made on the way, and those of its tensors that are written."""

    layer: str
    operator: str
    template: nn.Module = field(repr=False)
    """On meta: the plain layer, or the dynamic one where the checkpoint has its spectrum."""
    settings: dict[str, Any] | None
    """Of the operator that replaces a plain template; None for a dynamic template, which only gives its start."""
    inputs: dict[str, Piece]
    """The plain layer's tensors, by their name within it."""
    made: dict[str, Output]
    """By name within the layer."""


@dataclass(frozen=True)
class Build:
    """Dynamic layers made on the way: one, or all that share weights."""

    parts: tuple[Part, ...]

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Those of this step."""
        return tuple(output for part in self.parts for output in part.made.values())

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Those of this step."""
        return tuple(piece for part in self.parts for piece in part.inputs.values())


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


def official_form(fqn: str, operator: Operator) -> OfficialForm:
    if operator.official is None:
        raise CheckpointError(
            f"{fqn}: no form of the authors' is known for layers of {operator.name!r}; take --to ours"
        )
    return operator.official


def official_layer(fit: Fit, fqn: str) -> str | None:
    """What a layer is called in the result, for the authors' code."""
    return fit.found.layer(fqn) if fit.keeps_names else _target(fit).layer(fqn)


def _target(fit: Fit) -> Naming:
    return next((naming for naming in fit.known if naming.official), fit.known[-1])


def own_steps(fit: Fit, layers: dict[str, Layer]) -> Iterator[Step]:
    """The result under the model's own names."""
    begun: set[str] = set()
    for name, shape in fit.expected.items():
        fqn = next((fqn for fqn in ancestors(name) if fqn in layers), None)
        if fqn is None:
            if (piece := fit.pieces.get(name)) is not None:
                yield Copy(_output(name, fit, piece, shape), (piece,))
            elif name.endswith("num_batches_tracked"):
                yield Copy(Output(name, "I64", (), 8), ())
        elif fit.asked.form == "plain":
            together = _made_with(fqn, layers)
            if fqn not in begun and all(f"{one}.weight" in fit.pieces for one in together):
                begun.update(together)
                yield Build(tuple(_part(fit, layers[one], one, one, tuple(layers[one].state())) for one in together))
        elif (piece := fit.pieces.get(name)) is not None:
            yield _in_form(fit, layers[fqn], name[len(fqn) + 1 :], _output(name, fit, piece, shape), piece)
        elif fqn not in begun and f"{fqn}.{layers[fqn].operator.leaf}" in fit.pieces:
            begun.add(fqn)
            leaves = [leaf for leaf in layers[fqn].state() if f"{fqn}.{leaf}" not in fit.pieces]
            yield Build((_part(fit, layers[fqn], fqn, fqn, tuple(leaves)),))


def _made_with(fqn: str, layers: dict[str, Layer]) -> list[str]:
    """The layers that are made together with one, itself among them, each under one name."""
    operator = layers[fqn].operator
    if not operator.builds_together:
        return [fqn]
    return list(dict.fromkeys(layer.fqn for layer in layers.values() if layer.operator is operator))


def official_steps(fit: Fit, layers: dict[str, Layer]) -> Iterator[Step]:
    """The result under the names that the authors' code has; from a plain checkpoint what their tool writes."""
    spectra = {}
    for fqn, layer in layers.items():
        if (piece := fit.pieces.get(f"{fqn}.weight")) is not None and fit.asked.form == "plain":
            written = official_form(fqn, layer.operator).written_of_plain
            spectra[piece.tensor] = Build((_part(fit, layer, fqn, f"{official_layer(fit, fqn)}", written),))
    if fit.keeps_names:
        dynamic = {fit.found.layer(fqn): layer for fqn, layer in layers.items() if fit.asked.form == "ours"}
        for name, stored in fit.asked.checkpoint.tensors.items():
            whole = Piece(name, 0, stored.nbytes)
            output = Output(name, stored.code, stored.shape, stored.nbytes)
            owner = next((inner for inner in ancestors(name) if inner in dynamic), None)
            if owner is None:
                yield spectra.get(name) or Copy(output, (whole,))
            elif not official_form(owner, dynamic[owner].operator).is_ours_alone(leaf := name[len(owner) + 1 :]):
                yield _in_form(fit, dynamic[owner], leaf, output, whole)
        return
    fused: dict[str, list[tuple[int, Piece]]] = {}
    for name, piece in fit.pieces.items():
        shape = fit.expected[name]
        if piece.tensor in spectra:
            yield spectra[piece.tensor]
            continue
        owner = next((fqn for fqn in ancestors(name) if fqn in layers), None)
        if owner is not None:
            output = _output(f"{official_layer(fit, owner)}{name[len(owner) :]}", fit, piece, shape)
            if not official_form(owner, layers[owner].operator).is_ours_alone(leaf := name[len(owner) + 1 :]):
                yield _in_form(fit, layers[owner], leaf, output, piece)
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
    official = layer.operator.official
    same = fit.asked.form == fit.asked.to or official is None
    factor = None if same or official is None else official.factors(layer.dynamic).get(leaf)
    if factor is None:
        return Copy(output, (piece,))
    return Rescale(output, piece, factor if fit.asked.to == "ours" else 1 / factor)


def ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _output(name: str, fit: Fit, piece: Piece, shape: tuple[int, ...], parts: int = 1) -> Output:
    code = fit.asked.checkpoint.tensors[piece.tensor].code
    return Output(name, code, shape, (piece.stop - piece.start) * parts)


def _part(fit: Fit, layer: Layer, fqn: str, name: str, leaves: tuple[str, ...]) -> Part:
    """A layer under its name in the model, and what it is called in the result."""
    plain = fit.asked.form == "plain"
    inputs = {leaf: fit.pieces[f"{fqn}.{leaf}"] for leaf in layer.template.state_dict() if plain}
    made = {}
    for leaf, tensor in layer.state().items():
        if leaf in leaves:
            code = CODES[tensor.dtype]
            made[leaf] = Output(f"{name}.{leaf}", code, tuple(tensor.shape), tensor.numel() * tensor.element_size())
    return Part(layer.fqn, layer.operator.name, layer.template, layer.settings if plain else None, inputs, made)


def files_of(asked: Asked, steps: list[Step]) -> tuple[OutputFile, ...]:
    """The steps by the file of the checkpoint that they read from, so that one of ours comes from one of theirs."""
    if asked.destination.suffix in FILE_SUFFIXES:
        return (OutputFile(asked.destination.name, tuple(steps)),)
    by_shard: dict[int, list[Step]] = {}
    last = 0
    for step in steps:
        last = asked.checkpoint.shard_index(step.pieces[0].tensor) if step.pieces else last
        by_shard.setdefault(last, []).append(step)
    if len(by_shard) == 1:
        return (OutputFile("model.safetensors", tuple(steps)),)
    count = len(by_shard)
    return tuple(
        OutputFile(f"model-{number:05}-of-{count:05}.safetensors", tuple(by_shard[shard]))
        for number, shard in enumerate(sorted(by_shard), 1)
    )

"""Carrying out the conversion of a checkpoint: file by file, never more than a layer in memory, all or nothing.

Everything is written in a scratch folder beside the destination, file by file, and takes its place at the end by one
rename. A run that is killed leaves its scratch folder, and the same run goes on with the files that are whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fdconv.precision import rescaled

from ..errors import CheckpointError
from ..operators import Wanted, build_layers, get_operator
from ..saving.atomic import UNFINISHED, put_back, replace_folder, whole_file, write_text
from ..saving.folder import DESCRIPTION, weights_metadata
from .files import DTYPES, INDEX, Checkpoint, bytes_of
from .planning import RECORD, CheckpointPlan
from .steps import Build, Copy, Output, OutputFile, Part, Rescale, Step
from .whole import WholePlan, carry_out_whole

OnBytes = Callable[[int], None]
_STAMP = "stamp"
_CONTENT = "content"
_OLDER = "older"
_ZEROS = memoryview(bytes(8))


def carry_out(plan: CheckpointPlan | WholePlan, on_bytes: OnBytes = lambda count: None) -> Path:
    """Convert a checkpoint as planned.

    Args:
        plan: made by `plan_checkpoint`.
        on_bytes: called with the number of bytes that were written since the last call; with those of a file that an
            earlier run has left at once.

    Returns:
        The destination.

    Raises:
        CheckpointError: the checkpoint has changed or holds what has no spectrum, or the result cannot be written. The
            destination is as it was.
    """
    if isinstance(plan, WholePlan):
        carry_out_whole(plan)
        on_bytes(plan.nbytes)
        return plan.destination
    destination = Path(os.path.abspath(plan.destination))
    scratch = destination.parent / f".{destination.name}.partial"
    try:
        _check_ours(scratch)
        put_back(destination, scratch / _OLDER)
        try:
            content = _begin(scratch, _fingerprint(plan))
            _write_all(content, plan, on_bytes)
            # From here on the scratch folder may hold the older result, which must not be taken for finished files.
            write_text(scratch / _STAMP, "done")
            if plan.is_folder:
                replace_folder(content, destination, scratch / _OLDER)
            else:
                os.replace(content / plan.files[0].name, destination)
        except Exception:
            _discard(scratch)
            raise
        _discard(scratch)
    except (OSError, RuntimeError, MemoryError) as error:
        # torch.save, cut short by a full disk, fails again on closing its file.
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(first, "strerror", None) or str(first) or type(first).__name__
        raise CheckpointError(f"{plan.destination} cannot be written: {reason}; it is as it was") from error
    return plan.destination


def _write_all(content: Path, plan: CheckpointPlan, on_bytes: OnBytes) -> None:
    for file in plan.files:
        _write_file(content / file.name, file, plan, on_bytes)
    if plan.is_folder:
        _write_descriptions(content, plan)


def _check_ours(scratch: Path) -> None:
    ours = (_STAMP, f"{_STAMP}{UNFINISHED}", _CONTENT, _OLDER)
    if scratch.exists() and any(entry.name not in ours for entry in scratch.iterdir()):
        raise CheckpointError(f"{scratch} is in the way and was not written by a conversion; remove it")


def _begin(scratch: Path, stamp: str) -> Path:
    """The folder for the new files, with those in it that an earlier run of the same conversion has finished."""
    note = scratch / _STAMP
    if not note.is_file() or note.read_text(encoding="utf-8") != stamp:
        _discard(scratch)
        scratch.mkdir(parents=True)
        write_text(note, stamp)
    content = scratch / _CONTENT
    content.mkdir(exist_ok=True)
    return content


def _discard(scratch: Path) -> None:
    """Remove a scratch folder, its stamp last: while there is content, the stamp must say what it is worth."""
    for part in (scratch / _CONTENT, scratch / _OLDER, scratch):
        shutil.rmtree(part, ignore_errors=True)


def _fingerprint(plan: CheckpointPlan) -> str:
    """What tells two conversions apart: the files that are read, as they are now, and all that is made of them."""
    files = [(str(shard.path.resolve()), *_state_of(shard.path)) for shard in plan.checkpoint.shards]
    steps = [repr(step) for file in plan.files for step in file.steps]
    text = json.dumps([torch.__version__, files, plan.to_dict(), plan.description, steps], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _state_of(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _write_file(path: Path, file: OutputFile, plan: CheckpointPlan, on_bytes: OnBytes) -> None:
    """Write one file, unless an earlier run has."""
    if path.exists():
        on_bytes(file.nbytes)
        return
    with whole_file(path) as stream:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt"} if plan.target_form == "official" else weights_metadata(plan.settings)
            _write_safetensors(stream, file, plan.checkpoint, metadata, on_bytes)
        else:
            _write_torch(stream, file, plan.checkpoint, on_bytes)


def _write_safetensors(
    stream: BinaryIO, file: OutputFile, checkpoint: Checkpoint, metadata: dict[str, str], on_bytes: OnBytes
) -> None:
    header, starts = _layout(file.outputs, metadata)
    stream.write(header)
    for step in file.steps:
        for output, offset, chunk in _produced(step, checkpoint):
            stream.seek(starts[output.name] + offset)
            stream.write(chunk)
            on_bytes(len(chunk))


def _write_torch(stream: BinaryIO, file: OutputFile, checkpoint: Checkpoint, on_bytes: OnBytes) -> None:
    """As torch.save writes it, which takes all tensors at once."""
    tensors: dict[str, Tensor] = {}
    for step in file.steps:
        for output, offset, chunk in _produced(step, checkpoint):
            if output.code not in DTYPES:
                raise CheckpointError(f"{output.name!r} is of type {output.code}, which torch.save here cannot write")
            if output.name not in tensors:
                tensors[output.name] = torch.empty(output.shape, dtype=DTYPES[output.code], device="cpu")
            flat = tensors[output.name].view(-1).view(torch.uint8)
            flat[offset : offset + len(chunk)] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
            on_bytes(len(chunk))
    for one in file.outputs:  # those without a number, of which no bytes came
        tensors.setdefault(one.name, torch.empty(one.shape, dtype=DTYPES[one.code], device="cpu"))
    torch.save({one.name: tensors[one.name] for one in file.outputs}, stream)


def _layout(outputs: tuple[Output, ...], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where in the file each tensor starts."""
    # Wide types first: a reader that maps the file needs every tensor at a multiple of its element's size.
    ordered = sorted(outputs, key=lambda one: -_element_size(one))
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for one in ordered:
        header[one.name] = {"dtype": one.code, "shape": list(one.shape), "data_offsets": [at, at + one.nbytes]}
        at += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    starts = {one.name: first + header[one.name]["data_offsets"][0] for one in ordered}
    return len(text).to_bytes(8, "little") + text, starts


def _element_size(output: Output) -> int:
    dtype = DTYPES.get(output.code)
    return 1 if dtype is None else dtype.itemsize


def _produced(step: Step, checkpoint: Checkpoint) -> Iterator[tuple[Output, int, memoryview]]:
    """The bytes of a step's outputs, a run at a time: the tensor, where in it they go, and the bytes."""
    if isinstance(step, Copy):
        if not step.pieces:
            yield step.output, 0, _ZEROS[: step.output.nbytes]
        at = 0
        for piece in step.pieces:
            for chunk in checkpoint.chunks(piece.tensor, piece.start, piece.stop):
                yield step.output, at, chunk
                at += len(chunk)
        return
    if isinstance(step, Rescale):
        yield step.output, 0, bytes_of(_rescaled(step, checkpoint))
        return
    layers = _built(step, checkpoint)
    for part in step.parts:
        state = layers[part.layer].state_dict()
        for leaf, output in part.made.items():
            yield output, 0, bytes_of(state[leaf])


def _rescaled(step: Rescale, checkpoint: Checkpoint) -> Tensor:
    """The tensor of a step, in memory."""
    value = checkpoint.read(step.piece.tensor).flatten()
    size = value.element_size()
    value = value[step.piece.start // size : step.piece.stop // size].view(step.output.shape)
    return rescaled(value, step.factor)


def _built(step: Build, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The dynamic layers of a step, in memory."""
    with torch.random.fork_rng(devices=()):
        # The first map of the attention is drawn at random. The same layer gets the same one, in whatever run.
        torch.manual_seed(zlib.crc32(step.parts[0].layer.encode()))
        wanted = []
        started = {}
        for part in step.parts:
            layer = copy.deepcopy(part.template).to_empty(device="cpu")
            if part.settings is None:
                official = get_operator(part.operator).official
                assert official is not None
                official.complete(layer)
                started[part.layer] = layer
            else:
                _fill(layer, part, checkpoint)
                wanted.append(Wanted(part.layer, layer, part.operator, part.settings))
        return {**started, **build_layers(wanted)}


def _fill(layer: nn.Module, part: Part, checkpoint: Checkpoint) -> None:
    """Give a plain layer its values."""
    for leaf, tensor in layer.state_dict().items():
        piece = part.inputs[leaf]
        value = checkpoint.read(piece.tensor).view(-1)
        size = value.element_size()
        value = value[piece.start // size : piece.stop // size].view(tensor.shape)
        if leaf != "bias" and value.is_floating_point() and not value.isfinite().all():
            count = int((~value.isfinite()).sum())
            raise CheckpointError(
                f"{piece.tensor!r} holds {count} values that are not finite, and every coefficient of its spectrum "
                "would be NaN; mend it, or keep the layer static by a rule"
            )
        tensor.copy_(value)


def _write_descriptions(content: Path, plan: CheckpointPlan) -> None:
    """What stands beside the weights: an index where they are in several files, and what they are."""
    if len(plan.files) > 1:
        weight_map = {output.name: file.name for file in plan.files for output in file.outputs}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(content / INDEX, json.dumps(index, indent=1))
    if plan.description is not None:
        write_text(content / DESCRIPTION, json.dumps(plan.description, indent=1))
    record = {key: value for key, value in plan.to_dict().items() if key not in ("files", "to")}
    write_text(content / RECORD, json.dumps(record, indent=1))

"""Checkpoints as they lie on disk: which tensors there are, and their bytes when asked for. Nothing is executed.

A safetensors file is never mapped into memory: its header is checked, and bytes are read where they are needed.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, near_misses

CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of the types that torch checkpoints of models have."""
DTYPES = {code: dtype for dtype, code in CODES.items()}

INDEX = "model.safetensors.index.json"
_FOLDER_ENTRIES = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "module", "model_ema", "state_dict_ema", "ema")
_CHUNK = 8 << 20
_MOST_JSON_BYTES = 100 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint, not read."""

    name: str
    code: str
    """Its type, as safetensors names it; types that torch here does not know are carried all the same."""
    shape: tuple[int, ...]
    nbytes: int


class Shard(Protocol):
    """One file of a checkpoint."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]
    """What the file says of itself, beside its tensors."""

    def chunks(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes of a tensor from `start` to `stop`, a few MiB at a time; each void once the next is there."""


@dataclass(frozen=True)
class Checkpoint:
    """All files of a checkpoint."""

    path: Path
    shards: tuple[Shard, ...]
    wrapper: str | None = None
    """The entry of a pickled checkpoint that held the weights."""
    notes: tuple[str, ...] = ()
    """What the reader should know, in words."""
    tensors: dict[str, Stored] = field(init=False)
    """All tensors by name, in the order of the files."""
    _shard_of: dict[str, Shard] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", {k: v for shard in self.shards for k, v in shard.tensors.items()})
        object.__setattr__(self, "_shard_of", {name: shard for shard in self.shards for name in shard.tensors})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def shard_index(self, name: str) -> int:
        """Which of the files holds a tensor."""
        return self.shards.index(self._shard_of[name])

    def chunks(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """See `Shard.chunks`."""
        return self._shard_of[name].chunks(name, start, stop)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own. Raises `CheckpointError` for types that torch here does not know."""
        stored = self.tensors[name]
        if stored.code not in DTYPES:
            raise CheckpointError(f"{self.path}: {name!r} is stored as {stored.code}, which cannot be computed with")
        buffer = bytearray(stored.nbytes)
        at = 0
        for chunk in self.chunks(name, 0, stored.nbytes):
            buffer[at : at + len(chunk)] = chunk
            at += len(chunk)
        dtype = DTYPES[stored.code]
        if not buffer:
            return torch.empty(stored.shape, dtype=dtype, device="cpu")
        return torch.frombuffer(buffer, dtype=dtype).view(stored.shape)


def open_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Find out what a checkpoint holds, without reading its weights.

    Args:
        path: a `.safetensors` file, a pickled one (`.pth`, `.pt`, `.bin`, `.ckpt`), an index (`.index.json`) of either,
            or a folder with one of these under the name that transformers gives it.
        key: entry of a pickled checkpoint to read, where it holds several models; else the first of `state_dict`,
            `model`, ..., `model_ema`, ... that is there.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or reading it would mean executing what it says.
    """
    path = Path(path)
    file = _entry_of(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        return _open_index(path, file, key)
    shard, wrapper, notes = _open_shard(file, key)
    return Checkpoint(path, (shard,), wrapper, notes)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, on the CPU. Takes and raises what `open_checkpoint` does."""
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in the order that safetensors has them."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    content: Any = flat.numpy()
    return memoryview(content)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `CheckpointError`."""
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes; no index is that long")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None


def _entry_of(folder: Path) -> Path:
    """The file of a folder that stands for the checkpoint."""
    for name in _FOLDER_ENTRIES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", *_TORCH_SUFFIXES))
    if len(found) == 1:
        return found[0]
    holds = "holds " + ", ".join(file.name for file in found[:5]) if found else "holds no weights"
    raise CheckpointError(f"{folder}: {holds}; name the file, or an index of several")


def _open_index(path: Path, index: Path, key: str | None) -> Checkpoint:
    content = read_json(_regular(index))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' from tensors to files")
    for file in weight_map.values():
        # A name that leaves the folder could make any file of the machine part of the result.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0:]+", file) or file in (".", ".."):
            raise CheckpointError(f"{index}: {file!r} is no name of a file beside it")
    opened = [_open_shard(index.parent / file, key) for file in sorted(set(weight_map.values()))]
    shards = tuple(shard for shard, _, _ in opened)
    promised: dict[str, set[str]] = {shard.path.name: set() for shard in shards}
    for name, file in weight_map.items():
        promised[file].add(name)
    for shard in shards:
        for name in sorted(promised[shard.path.name] ^ shard.tensors.keys()):
            where = next((other.path.name for other in shards if name in other.tensors), None)
            here = "has it all the same" if name in shard.tensors else "does not have it"
            elsewhere = f"; it is in {where}" if where not in (None, shard.path.name) else ""
            says = weight_map.get(name, "nowhere")
            raise CheckpointError(f"{index}: says that {name!r} is in {says}, and {shard.path.name} {here}{elsewhere}")
    return Checkpoint(
        path, shards, opened[0][1], tuple(dict.fromkeys(note for _, _, notes in opened for note in notes))
    )


def _open_shard(file: Path, key: str | None) -> tuple[Shard, str | None, tuple[str, ...]]:
    _regular(file)
    if file.suffix == ".safetensors":
        if key is not None:
            raise CheckpointError(f"{file}: a safetensors file has no entries to choose {key!r} from")
        return SafetensorsShard(file), None, ()
    if file.suffix not in _TORCH_SUFFIXES:
        known = ".safetensors, .index.json, " + ", ".join(_TORCH_SUFFIXES)
        raise CheckpointError(f"{file}: expected one of {known}{near_misses(file.suffix, known.split(', '))}")
    shard = TorchShard(file, key)
    return shard, shard.wrapper, shard.notes


def _regular(file: Path) -> Path:
    """The file, if it is one: reading a pipe or a device may never end."""
    if not file.exists():
        beside = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise CheckpointError(f"{file}: no such file{near_misses(file.name, beside)}")
    if not file.is_file():
        raise CheckpointError(f"{file} is no regular file")
    return file


class SafetensorsShard:
    """A safetensors file, of which only the header is in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self._start: dict[str, int] = {}
        try:
            with safe_open(str(path), framework="pt"):
                pass  # it checks the header: sizes, types, and that the tensors fill the file without a gap
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is no whole safetensors file: {error}") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            self.tensors[name] = Stored(name, entry["dtype"], tuple(entry["shape"]), end - begin)
            self._start[name] = 8 + length + begin

    def chunks(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(_CHUNK, stop - start)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start[name] + start)
            while start < stop:
                count = file.readinto(buffer[: min(len(buffer), stop - start)])
                if not count:
                    raise CheckpointError(f"{self.path}: ends within {name!r}; it was whole when it was opened")
                yield buffer[:count]
                start += count


class TorchShard:
    """A file that torch.save wrote, mapped into memory where its format allows; only tensors are unpickled."""

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        state = _unpickle(path)
        state, self.wrapper, self.notes = _unwrap(state, key, path)
        self._state = state
        size = path.stat().st_size
        self.tensors = {name: _stored(name, tensor, size, path) for name, tensor in state.items()}

    def chunks(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        content = bytes_of(self._state[name])
        for at in range(start, stop, _CHUNK):
            yield content[at : min(stop, at + _CHUNK)]


def _unpickle(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                squeezed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            if squeezed:  # torch writes none, and a few bytes of it may stand for any number
                raise CheckpointError(f"{path}: {squeezed[0]!r} in it is compressed; torch.save writes no such files")
        return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks for {asked.group(1)}" if asked else str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path}: holds more than tensors ({why}), and reading that could execute code; "
            "open it where you trust it and save its state dict alone"
        ) from None
    except Exception as error:  # a damaged pickle can make the unpickler fail in any way
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path} is no whole torch checkpoint: {type(error).__name__}: {reason}") from None


def _unwrap(state: Any, key: str | None, path: Path) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    """The weights in what a training run saved, the entry they were in, and what else there was."""
    wrapper: str | None = None
    notes: tuple[str, ...] = ()
    for _ in range(3):  # {"model": {"state_dict": ...}} exists
        if not isinstance(state, dict):
            break
        candidates = [name for name, value in state.items() if isinstance(value, dict) and value]
        if key is not None and wrapper is None:
            if key not in candidates:
                found = ", ".join(map(str, candidates)) or "none"
                raise CheckpointError(f"{path}: has no entry {key!r} with weights; its entries are {found}")
            chosen = key
        elif any(isinstance(value, Tensor) for value in state.values()):
            break
        else:
            known = [name for name in _WRAPPERS if name in candidates]
            if not known:
                break
            chosen = known[0]
            others = [name for name in known[1:] if any(isinstance(value, Tensor) for value in state[name].values())]
            if others:
                notes += (f"{chosen!r} was read; {', '.join(map(repr, others))} of the file too hold weights (--key)",)
        state, wrapper = state[chosen], chosen if wrapper is None else f"{wrapper}.{chosen}"
    weights = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not weights or not all(isinstance(name, str) for name in weights):
        found = ", ".join(map(str, state)) if isinstance(state, dict) else f"a {type(state).__name__}"
        raise CheckpointError(f"{path}: holds no weights by name; it holds {found[:200] or 'nothing'}")
    rest = [str(name) for name in state if name not in weights]
    if rest:
        notes += (f"{len(rest)} entries are no tensors and were passed over, {rest[0]!r} first",)
    return weights, wrapper, notes


def _stored(name: str, tensor: Tensor, file_size: int, path: Path) -> Stored:
    nbytes = math.prod(tensor.shape) * tensor.element_size()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in CODES:
        kind = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
        raise CheckpointError(f"{path}: {name!r} is a {kind} tensor; only plain dense ones are read")
    if nbytes > file_size:  # an expanded view: one number on disk can claim any shape
        raise CheckpointError(f"{path}: {name!r} claims {nbytes:,} bytes, and the file has {file_size:,}")
    return Stored(name, CODES[tensor.dtype], tuple(tensor.shape), nbytes)

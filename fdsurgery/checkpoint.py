"""Converted models on disk: a folder with the weights and a description from which the model can be built again.

```
DIR/model.safetensors    the state dict
DIR/fdsurgery.json       the plain model's source, and which layers are dynamic, with which settings
```
Only data is read back: JSON and safetensors.
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import CheckpointError, SurgeryError, near_misses
from .huggingface.description import Origin, describe
from .operators import get_operator, operator_of
from .planning import Plan
from .rewrite.folded import Folded, folded_norms, is_norm
from .rewrite.tree import swapped
from .sources import Source, infer, rebuild

FORMAT = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "fdsurgery.json"


def save(model: nn.Module, folder: str | Path, *, source: Source | None = None, plan: Plan | None = None) -> Path:
    """Save a converted model so that `load` needs nothing else. All or nothing: an older save stays until it is done.

    Args:
        model: the converted model, trained or not.
        folder: made, or replaced if it holds an earlier save.
        source: how to build the plain model; by default what the model says of itself (transformers, timm).
        plan: kept for the record of which rule swapped what.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model has no dynamic layers, does not say how it was built, or the folder is in use.
    """
    folder = Path(folder)
    layers = {
        fqn: {"operator": operator.name, "settings": operator.settings_of(layer)}
        for fqn, layer in model.named_modules()
        if (operator := operator_of(layer)) is not None
    }
    if not layers:
        raise CheckpointError("the model has no dynamic layers; convert it first, or save it as you would without us")
    tensors = _tensors_once(model)
    source = infer(model) if source is None else source
    _check_source(model, source)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / DESCRIPTION).exists():
        raise CheckpointError(f"{folder} is not empty and holds no earlier save; give a new folder")
    description = {
        "format": FORMAT,
        "versions": {"fdsurgery": version("fdsurgery"), "torch": torch.__version__},
        "source": source.to_dict(),
        "layers": layers,
        "folded": folded_norms(model),
        "plan": None if plan is None else plan.to_dict(),
    }
    try:
        text = json.dumps(description, indent=1)
    except TypeError as error:
        raise CheckpointError(f"the model's source cannot be written as JSON: {error}") from None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
            fresh.mkdir()
            save_file(tensors, str(fresh / WEIGHTS), metadata={"format": "pt"})
            (fresh / DESCRIPTION).write_text(text, encoding="utf-8")
            _put_in_place(fresh, folder, old)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def load(folder: str | Path, *, model: nn.Module | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """Build a saved converted model again, in eval mode.

    Args:
        folder: written by `save`.
        model: the plain model to build upon, needed only for a model that came from your own code. Changed in place.
        device: where the model goes.

    Returns:
        The converted model.

    Raises:
        CheckpointError: the folder is no save, is damaged, or does not fit the model.
    """
    folder = Path(folder)
    description = _read_description(folder)
    if model is None:
        model = rebuild(Source(**description["source"]))
    layers = dict(model.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    for fqn, entry in description["layers"].items():
        if fqn not in layers:
            raise CheckpointError(
                f"{folder / DESCRIPTION}: the model that {description['source']['library']} builds has no layer {fqn!r}"
                f"{near_misses(fqn, layers)}"
            )
        if operator_of(layers[fqn]) is None:
            replacements[layers[fqn]] = get_operator(entry["operator"]).replace(layers[fqn], entry["settings"])
    replacements |= _folded(folder, layers, description.get("folded", []))
    try:
        with swapped(model, replacements):
            model.load_state_dict(_under_every_name(load_file(str(folder / WEIGHTS)), model), strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"{folder / WEIGHTS}: no such file") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{folder / WEIGHTS} does not fit the model: {' '.join(lines[:3])}") from error
    plan = description.get("plan")
    describe(model, Origin(plan.get("recipe")) if isinstance(plan, dict) else None)
    return model.to(device).eval()


def _folded(folder: Path, layers: dict[str, nn.Module], names: list[str]) -> dict[nn.Module, nn.Module]:
    """What stands in the place of each norm that was folded before the save."""
    for fqn in names:
        if not (fqn in layers and (isinstance(layers[fqn], Folded) or is_norm(layers[fqn]))):
            kind = f"a {type(layers[fqn]).__name__}" if fqn in layers else f"nothing{near_misses(fqn, layers)}"
            raise CheckpointError(
                f"{folder / DESCRIPTION}: the norm {fqn!r} was folded before this save, and the model has {kind} there"
            )
    return {layers[fqn]: Folded(layers[fqn]) for fqn in names if not isinstance(layers[fqn], Folded)}


def _put_in_place(fresh: Path, folder: Path, old: Path) -> None:
    """Replace a save. A process that is killed leaves either one; only between saves of two models there is a moment
    at which the older one is still, or already, beside the folder."""
    if _describe_the_same(fresh, folder):  # as in training: then either description fits either file of weights
        for name in (WEIGHTS, DESCRIPTION):
            os.replace(fresh / name, folder / name)
        return
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(fresh, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise


def _describe_the_same(fresh: Path, folder: Path) -> bool:
    """True if a folder holds a save, and nothing else, of a model with the same source and layers."""
    if not folder.exists() or {path.name for path in folder.iterdir()} != {WEIGHTS, DESCRIPTION}:
        return False
    try:
        ours, theirs = (_read_description(one) for one in (fresh, folder))
    except CheckpointError:
        return False
    return all(ours[key] == theirs[key] for key in ("format", "source", "layers")) and ours.get("folded") == theirs.get(
        "folded"
    )


def _tensors_once(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: shared tensors under their first name only, no overlapping memory."""
    names: dict[int, str] = {}
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name!r} is a {type(tensor).__name__}; only tensors can be saved")
        if tensor.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device and has no values to save; load the weights first")
        if names.setdefault(id(tensor), name) == name:
            storage = tensor.untyped_storage().data_ptr()
            detached = tensor.detach().contiguous()
            tensors[name] = detached.clone() if storage in storages else detached
            storages.add(storage)
    return tensors


def _under_every_name(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Undo `_tensors_once`: tensors that the model knows under several names under each of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    full = dict(tensors)
    for group in names.values():
        saved = next((tensors[name] for name in group if name in tensors), None)
        if saved is not None:
            full.update(dict.fromkeys(group, saved))
    return full


def _check_source(model: nn.Module, source: Source) -> None:
    """Refuse a source that builds another model: found on saving it costs a moment, on loading it costs the weights."""
    if source.library == "file":
        return
    try:
        with torch.device("meta"):
            twin = rebuild(source)
    except SurgeryError:
        raise
    except Exception:  # some builders cannot run on meta; then there is nothing to compare without paying for a model
        return
    swapped_names = {fqn for fqn, layer in model.named_modules() if operator_of(layer) is not None}
    swapped_names |= set(folded_norms(model))
    expected = _shapes(twin, swapped_names)
    actual = _shapes(model, swapped_names)
    if expected != actual:
        different = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        raise CheckpointError(
            f"{source.library}:{source.name} with {source.arguments or 'no arguments'} builds another model than this "
            f"one ({len(different)} tensors differ, {different[0]!r} first); pass source= with the arguments it was "
            "built with"
        )


def _shapes(model: nn.Module, without: set[str]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if not any(name.startswith(fqn + ".") for fqn in without)
    }


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no saved converted model: it has no {DESCRIPTION}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise CheckpointError(f"{path}: expected format {FORMAT}, found {found!r}; a newer fdsurgery may read it")
    try:
        Source(**description["source"])
        for entry in description["layers"].values():
            get_operator(entry["operator"]).settings(entry["settings"])
        if not all(isinstance(fqn, str) for fqn in description.get("folded", [])):
            raise TypeError("'folded' must be a list of names")
    except (KeyError, TypeError, AttributeError, SurgeryError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return description

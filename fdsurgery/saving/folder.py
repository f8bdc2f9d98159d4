"""Converted models on disk: a folder with the weights and a description from which the model can be built again.

```
DIR/model.safetensors    the state dict
DIR/fdsurgery.json       the plain model's source, and which layers are dynamic, with which settings
```
Only data is read back: JSON and safetensors.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..allowed import no_larger_than
from ..discovery.kinds import kind_of
from ..errors import CheckpointError, SurgeryError, first_lines, near_misses
from ..finetune import remember, remembered
from ..integrations.base import ModelSource, SourceError
from ..likeness import first_difference
from ..operators import BuildError, Wanted, build_layers, get_operator, made_layers, operator_of
from ..plan import Plan
from ..recipe import FineTune
from ..rewrite.folded import Folded, folded_norms, is_norm
from ..rewrite.tree import swapped
from ..surroundings import undisturbed
from ..wrappers import unwrapped
from .atomic import replace_files, replace_folder, scratch_beside
from .description import Origin, check_plan, describe
from .source import infer, library_of_source, rebuild
from .tensors import match_dtypes, named_tensors, tensors_once, under_every_name, unsaved_dtypes

FORMAT = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "fdsurgery.json"
METADATA = "fdsurgery"
"""The entry of a safetensors file's metadata that holds the layers' settings."""


def save(model: nn.Module, folder: str | Path, *, source: ModelSource | None = None, plan: Plan | None = None) -> Path:
    """Save a converted model so that `load` needs nothing else. All or nothing: an older save stays until it is done.

    Args:
        model: the converted model, trained or not.
        folder: made, or replaced if it holds an earlier save.
        source: how to build the plain model; by default what the model says of itself (transformers, timm). Where it
            says nothing, a warning tells that `load` will want the plain model.
        plan: kept for the record of which rule swapped what.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model has no dynamic layers, the source builds another one, or the folder is in use.

    Examples:
        >>> import timm, fdsurgery
        >>> model = fdsurgery.convert(timm.create_model("test_resnet"))
        >>> folder = fdsurgery.save(model, "resnet-fdconv")
        >>> sorted(path.name for path in folder.iterdir())
        ['fdsurgery.json', 'model.safetensors']
    """
    with unwrapped(model) as plain_named:
        return _save(plain_named, Path(folder), source, plan)


def _save(model: nn.Module, folder: Path, source: ModelSource | None, plan: Plan | None) -> Path:
    layers = described_layers(model)
    if not layers:
        raise CheckpointError("the model has no dynamic layers; convert it first, or save it as you would without us")
    tensors = tensors_once(model)
    check_plan(plan, model)
    describe(model, None if plan is None else Origin.of(plan, model))  # layers may have been put back by hand since
    source = infer(model) if source is None else source
    if source is not None:
        _check_source(model, source)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / DESCRIPTION).exists():
        raise CheckpointError(f"{folder} is not empty and holds no earlier save; give a new folder")
    description = {
        "format": FORMAT,
        "versions": {"fdsurgery": version("fdsurgery"), "torch": torch.__version__},
        "source": None if source is None else source.to_dict(),
        "layers": layers,
        "folded": folded_norms(model),
        "buffers": unsaved_dtypes(model),
        "finetune": remembered(model).to_dict(),
        "plan": None if plan is None else plan.to_dict(),
    }
    try:
        text = json.dumps(description, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the model's source cannot be written as JSON: {error}; pass source=") from None
    try:
        with scratch_beside(folder) as scratch:
            fresh = scratch / "fresh"
            fresh.mkdir()
            save_file(tensors, str(fresh / WEIGHTS), metadata=weights_metadata(layers))
            (fresh / DESCRIPTION).write_text(text, encoding="utf-8")
            _put_in_place(fresh, folder, scratch / "older")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from error
    if source is None:
        warnings.warn(
            f"a {type(model).__name__} does not say how it was built, so {folder} is loaded onto the plain model: "
            f"fdsurgery.load({str(folder)!r}, model=plain). To need none, pass source=, such as "
            'fdsurgery.ModelSource("torchvision", "resnet50")',
            stacklevel=3,
        )
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

    Examples:
        >>> import timm, torch, fdsurgery
        >>> model = fdsurgery.convert(timm.create_model("test_resnet")).eval()
        >>> again = fdsurgery.load(fdsurgery.save(model, "resnet-fdconv"))
        >>> images = torch.randn(1, 3, 64, 64)
        >>> torch.allclose(again(images), model(images), atol=1e-6)
        True
    """
    folder = Path(folder)
    description = read_description(folder)
    with undisturbed(), _ordinary_defaults():
        tensors = _read_weights(folder)
        given = model is not None
        if model is None:
            if description["source"] is None:
                raise CheckpointError(
                    f"{folder} was saved of a model that does not say how it is built: give the plain model, "
                    f"fdsurgery.load({str(folder)!r}, model=plain)"
                )
            model = _rebuilt(ModelSource.from_dict(description["source"]), tensors, folder)
        replacements = replacements_for(model, description["layers"], folder / DESCRIPTION, tensors)
        replacements |= _folded(folder / DESCRIPTION, model, description.get("folded", []))
        before = [(tensor, tensor.data, tensor.data.clone()) for _, tensor in named_tensors(model) if given]
        try:
            with swapped(model, replacements):
                full = under_every_name(tensors, model)
                match_dtypes(model, full, description.get("buffers") or {})
                model.load_state_dict(full, strict=True)
        except (RuntimeError, NotImplementedError) as error:
            for tensor, data, values in before:  # the caller's model is his as it was
                tensor.data = data.copy_(values)
            raise CheckpointError(f"{folder / WEIGHTS} does not fit the model: {first_lines(error)}") from error
        remember(model, FineTune.from_dict(description.get("finetune", {})))
        plan = description.get("plan")
        recipe = plan.get("recipe") if isinstance(plan, dict) else None
        describe(model, Origin(recipe) if isinstance(recipe, str) else None)
        try:
            return model.to(device).eval()
        except (RuntimeError, AssertionError) as error:
            raise CheckpointError(f"the model cannot be put on {device!r}: {first_lines(error)}") from error


def described_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The operator and settings of each dynamic layer, by its name."""
    return {
        fqn: {"operator": operator.name, "settings": operator.settings_of(layer)}
        for fqn, (layer, operator) in made_layers(model).items()
    }


def weights_metadata(layers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What a file of weights says of itself, so that it tells its layers' settings without a description beside it."""
    return {"format": "pt", METADATA: json.dumps({"format": FORMAT, "layers": layers})}


def replacements_for(
    model: nn.Module, described: dict[str, Any], where: Path, tensors: dict[str, Tensor] | None = None
) -> dict[nn.Module, nn.Module]:
    """A dynamic layer for each plain one that is described.

    Args:
        model: what holds the layers; those that are dynamic already stay.
        described: operator and settings by the layer's name.
        where: the file that says so.
        tensors: if given, layers must have the shapes of these before they get memory.

    Raises:
        CheckpointError: the model lacks a layer, or has one in its place that cannot be swapped.
    """
    layers = dict(model.named_modules())
    wanted: list[Wanted] = []
    for fqn, entry in described.items():
        if fqn not in layers:
            raise CheckpointError(f"{where}: the model has no layer {fqn!r}{near_misses(fqn, layers)}")
        layer = layers[fqn]
        if operator_of(layer) is not None:
            continue
        if kind_of(layer) is None:
            raise CheckpointError(f"{where}: {fqn!r} is a {type(layer).__name__}, not a layer that can be swapped")
        wanted.append(Wanted(fqn, layer, entry["operator"], entry["settings"]))
    try:
        if tensors is not None:
            twins = build_layers(replace(one, layer=copy.deepcopy(one.layer).to("meta")) for one in wanted)
            for fqn, twin in twins.items():
                _check_shapes(twin, fqn, tensors)
        made = build_layers(wanted)
    except BuildError as error:
        cause = error.__cause__ or error
        raise CheckpointError(f"{where}: {error.name!r} cannot be made dynamic: {first_lines(cause)}") from error
    except SurgeryError as error:
        raise CheckpointError(f"{where}: {first_lines(error)}") from error
    return {layers[fqn]: layer for fqn, layer in made.items()}


def _check_shapes(layer: nn.Module, fqn: str, tensors: dict[str, Tensor]) -> None:
    for leaf, tensor in layer.state_dict().items():
        stored = tensors.get(f"{fqn}.{leaf}", tensor)
        if stored.shape != tensor.shape:
            raise CheckpointError(
                f"{fqn!r} cannot be made dynamic: by its settings {leaf!r} has the shape {tuple(tensor.shape)}, and "
                f"the weights hold {tuple(stored.shape)}, so {WEIGHTS} does not fit the model"
            )


@contextlib.contextmanager
def _ordinary_defaults() -> Iterator[None]:
    """The CPU and float32, whatever defaults the caller has set: buffers that are computed anew depend on them."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # a damaged header can make the reader fail in any way
        raise CheckpointError(f"{path} is no whole safetensors file: {first_lines(error)}") from error


def _rebuilt(source: ModelSource, tensors: dict[str, Tensor], folder: Path) -> nn.Module:
    held = sum(tensor.numel() for tensor in tensors.values())
    where = f"{folder / DESCRIPTION}: its source"
    library_of_source(source).load_source(source)  # what is made on a library's import needs memory, and is made once
    with contextlib.suppress(SourceError), no_larger_than(len(tensors), held, where), torch.device("meta"):
        rebuild(source)  # without memory first; some builders cannot run there
    with no_larger_than(len(tensors), held, where):
        return rebuild(source)


def _folded(where: Path, model: nn.Module, names: list[str]) -> dict[nn.Module, nn.Module]:
    """What stands in the place of each norm that was folded before the save."""
    layers = dict(model.named_modules())
    for fqn in names:
        if not (fqn in layers and (isinstance(layers[fqn], Folded) or is_norm(layers[fqn]))):
            kind = f"a {type(layers[fqn]).__name__}" if fqn in layers else f"nothing{near_misses(fqn, layers)}"
            raise CheckpointError(
                f"{where}: the norm {fqn!r} was folded before this save, and the model has {kind} there"
            )
    return {layers[fqn]: Folded(layers[fqn]) for fqn in names if not isinstance(layers[fqn], Folded)}


def _put_in_place(fresh: Path, folder: Path, aside: Path) -> None:
    """Replace a save. A process that is killed leaves either one, or, where names cannot be exchanged in one step, the
    older one beside the folder."""
    if _describe_the_same(fresh, folder):  # as in training: then either description fits either file of weights
        replace_files(fresh, folder, last=DESCRIPTION)
    else:
        replace_folder(fresh, folder, aside)


def _describe_the_same(fresh: Path, folder: Path) -> bool:
    """True if a folder holds a save, and nothing else, of a model with the same source and layers."""
    if not folder.exists() or {path.name for path in folder.iterdir()} != {WEIGHTS, DESCRIPTION}:
        return False
    try:
        ours, theirs = (read_description(one) for one in (fresh, folder))
    except CheckpointError:
        return False
    return all(ours.get(key) == theirs.get(key) for key in ("format", "source", "layers", "folded", "buffers"))


def _check_source(model: nn.Module, source: ModelSource) -> None:
    """Refuse a source that builds another model: found on saving it costs a moment, on loading it costs the weights."""
    library = library_of_source(source)
    if not library.rebuilds:
        return
    with undisturbed(), _ordinary_defaults():
        try:
            with torch.device("meta"):
                twin = rebuild(source)
        except SourceError:  # some builders cannot run on meta
            twin = rebuild(source)
        with swapped(twin, _folded(Path(f"{source.library}:{source.name}"), twin, folded_norms(model))):
            difference = first_difference(model, twin)
    if difference is not None:
        raise CheckpointError(
            f"{source.library}:{source.name} with {library.arguments_in_words(source)} builds another model than this "
            f"one: {difference}; pass source= with the arguments it was built with, or "
            'ModelSource("file", "models.py:build") and load it onto a model that you build'
        )


def read_description(folder: Path) -> dict[str, Any]:
    """What a folder says of the model in it. Raises `CheckpointError` where it says nothing that can be read."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no saved converted model: it has no {DESCRIPTION}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise CheckpointError(f"{path}: expected format {FORMAT}, found {found!r}; a newer fdsurgery may read it")
    try:
        if description["source"] is not None:
            ModelSource.from_dict(description["source"])
        if not isinstance(description["layers"], dict) or not isinstance(description.get("buffers") or {}, dict):
            raise CheckpointError("layers and buffers are mappings by name")
        for entry in description["layers"].values():
            if not isinstance(entry["operator"], str) or not isinstance(entry["settings"], dict):
                raise CheckpointError("an operator is a name, and its settings are a mapping")
            entry["settings"] = get_operator(entry["operator"]).saved_settings(entry["settings"])
        folded = description.get("folded", [])
        if not isinstance(folded, list) or not all(isinstance(fqn, str) for fqn in folded):
            raise CheckpointError("'folded' must be a list of names")
        FineTune.from_dict(description.get("finetune", {}))
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: it has no {error}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return description

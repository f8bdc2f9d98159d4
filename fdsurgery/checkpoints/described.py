"""What saved files say of their dynamic layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError, SurgeryError
from ..operators import get_operator
from ..saving.description import Description, is_description
from ..saving.folder import DESCRIPTION, FORMAT, METADATA, WEIGHTS
from .files import INDEX, Checkpoint, read_json

Described = tuple[str, dict[str, Any]]
"""Name and settings of an operator."""


CONFIG = "config.json"


def described_layers(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Described]:
    """The operator and settings of each layer that a converted model was saved with; none where nothing tells them.

    They stand in the folder, be it ours or transformers', in the metadata of the files, or beside a file.
    """
    path = checkpoint.path
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (found := _layers_of_folder(folder, model)):
        return found
    for shard in checkpoint.shards:
        if METADATA in shard.metadata:
            return _layers_of_metadata(shard.path, shard.metadata[METADATA])
    beside = not path.is_dir() and path.name in (WEIGHTS, INDEX)
    return _layers_of_folder(folder, model) if beside else {}


def _layers_of_folder(folder: Path, model: nn.Module) -> dict[str, Described]:
    if (folder / DESCRIPTION).is_file():
        content = read_json(folder / DESCRIPTION)
        return _layers_by_name(folder / DESCRIPTION, content)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    given: Any = config.get("quantization_config") if isinstance(config, dict) else None
    if not is_description(given):
        return {}
    try:
        description = Description.from_dict(given)
        found = description.find(model)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    layers = {
        found[name]: (group.operator, group.settings)
        for group in description.layers
        for name in group.shapes
        if name in found
    }
    named = model.named_modules(remove_duplicate=False)
    return {fqn: layers[module] for fqn, module in named if module in layers}


def _layers_of_metadata(path: Path, text: str) -> dict[str, Described]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: what its metadata says of the layers is no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected metadata of format {FORMAT}; a newer fdsurgery may read it")
    return _layers_by_name(path, content)


def _layers_by_name(path: Path, content: Any) -> dict[str, Described]:
    layers = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise CheckpointError(f"{path} is damaged: it has no layers")
    try:
        return {
            fqn: (entry["operator"], get_operator(entry["operator"]).saved_settings(entry["settings"]))
            for fqn, entry in layers.items()
        }
    except (KeyError, TypeError, AttributeError, SurgeryError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None

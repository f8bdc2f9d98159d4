"""Layers of KernelWarehouse under the names of the authors' code: chains of layers that share warehouses.

There the cells are `warehouse_manager.weights.{j}` of the whole model; what else a layer has is `NAME.attention.*` and
`NAME.bias`, of a linear layer `NAME.conv.attention.*` and `NAME.conv.bias`. Values are the same here and there, but for
those that make the logits, which are larger here by powers of two.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, RecipeError
from .dynamic_operator import check_config, loaded, plain_conv
from .kernel_warehouse_layers import KernelWarehouseLayer, KernelWarehouseLinear, Warehouse
from .warehouse import assigned_cells

CELLS = "warehouse_manager.weights."
SETTINGS = {
    "reduction": "reduction",
    "cell_num_ratio": "ratio",
    "cell_inplane_ratio": "cell_in_ratio",
    "cell_outplane_ratio": "cell_out_ratio",
    "nonlocal_basis_ratio": "nonlocal_basis_ratio",
    "spatial_partition": "spatial_partition",
    "norm": "norm",
}
"""Settings of ours by the words that the authors have for them."""
_WHOLE = (*SETTINGS, "operator", "mode", "source", "sharing_range", "tau", "between_layers", "layers")
_GEOMETRY = ("in_planes", "out_planes", "kernel_size", "stride", "padding", "dilation", "groups")
_LAYER = (
    *("name", "layer_type", "warehouse_name", "warehouse_id", "cell_shape", "start_cell", "num_local_mixture"),
    *("cell_num_ratio", "assigned_cells", *_GEOMETRY),
)

_OURS = ("cells", "tau", "assigned_cells")
"""Tensors of a layer that the authors have elsewhere, or not in a state dict."""

Build = Callable[[Sequence[str], Sequence[nn.Module], Sequence[dict[str, Any]]], list[nn.Module]]


def chain_of(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    build: Build,
    complete: Callable[[dict[str, Any]], dict[str, Any]],
) -> nn.Sequential:
    """Layers one after another, from a state dict and what they were made with; see `load_official`.

    Args:
        state: under the official names.
        config: see `_WHOLE` and `_LAYER`.
        build: makes the layers of a model.
        complete: completes settings with the defaults.
    """
    check_config(config, _WHOLE, ("layers",))
    told = {ours: config[theirs] for theirs, ours in SETTINGS.items() if theirs in config}
    names, plains, settings = [], [], []
    for entry in config["layers"]:
        check_config(entry, _LAYER, ("name", "warehouse_id", *_GEOMETRY[:3]))
        names.append(str(entry["name"]))
        plains.append(_plain(entry, state).train(config.get("mode") == "train"))
        ratio = {"ratio": entry["cell_num_ratio"]} if "cell_num_ratio" in entry else {}
        settings.append({**told, **ratio, "warehouse": str(entry["warehouse_id"])})
    try:
        layers: list[Any] = build(names, plains, [complete(its) for its in settings])
    except RecipeError as error:
        raise CheckpointError(f"the layers cannot share warehouses as they are configured: {error}") from None
    for entry, layer in zip(config["layers"], layers, strict=True):
        _check_entry(entry, layer.settings)
    named = dict(zip(names, layers, strict=True))
    numbers = {
        layer.warehouse: int(entry["warehouse_id"]) for entry, layer in zip(config["layers"], layers, strict=True)
    }
    expected = to_official(named, numbers)
    if different := sorted(state.keys() ^ expected.keys()):
        what = "is not of its layers" if different[0] in state else "is missing"
        raise CheckpointError(f"the state does not fit the configuration: {different[0]!r} {what}")
    own = from_official(named, state, numbers)
    for name, layer in named.items():
        own[f"{name}.assigned_cells"] = torch.tensor(layer.assigned(), dtype=torch.int64, device="cpu")
        own[f"{name}.tau"] = state[official_name(name, layer, "attention.fc1.weight")].new_full(
            (1,), float(config.get("tau", 0.0))
        )
    chain = _chained(named, config.get("between_layers"))
    return loaded(chain.train(config.get("mode") == "train"), own)


def _plain(entry: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The plain layer of an entry, on meta, in the dtype of the state."""
    linear = entry.get("layer_type") == "linear"
    name = f"{entry['name']}.conv" if linear else f"{entry['name']}"
    weight = next(iter(state.values()), torch.zeros(1, dtype=torch.float32, device="cpu"))
    bias = f"{name}.bias" in state
    if linear:
        return nn.Linear(entry["in_planes"], entry["out_planes"], bias, device="meta", dtype=weight.dtype)
    if entry.get("layer_type", "conv2d") != "conv2d":
        raise CheckpointError(f"{entry['name']!r} is a {entry['layer_type']!r}; known are conv2d and linear")
    return plain_conv({**{key: entry[key] for key in _GEOMETRY if key in entry}, "bias": bias}, weight)


def _check_entry(entry: Mapping[str, Any], its: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where a configuration says something else of a place than follows from all layers."""
    shape = [its["cells"], *its["cell_shape"]]
    follows = {
        "cell_shape": shape[: len(entry["cell_shape"])] if "cell_shape" in entry else shape,
        "start_cell": its["start"],
        "num_local_mixture": its["places"],
        "assigned_cells": assigned_cells(its["start"], its["places"], its["ratio"], its["cells"]),
    }
    for key, value in follows.items():
        if key in entry and list(_listed(entry[key])) != list(_listed(value)):
            raise CheckpointError(
                f"{entry['name']}: {key} is {entry[key]}, and {value} follows from its warehouse's layers"
            )


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _chained(layers: Mapping[str, nn.Module], between: Any) -> nn.Sequential:
    if between not in (None, "tanh"):
        raise CheckpointError(f"between_layers is {between!r}; known is 'tanh'")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for at, (name, layer) in enumerate(layers.items()):
        if at and between == "tanh":
            parts[f"tanh{at}"] = nn.Tanh()
        parts[name] = layer
    return nn.Sequential(parts)


def official_name(layer_name: str, layer: nn.Module, leaf: str) -> str:
    """What a tensor of a layer is called in the authors' whole model."""
    return ".".join(filter(None, [layer_name, "conv" if isinstance(layer, KernelWarehouseLinear) else "", leaf]))


def numbered(layers: Mapping[str, KernelWarehouseLayer]) -> dict[Warehouse, int]:
    """The warehouses, in the order in which the model has their first layers."""
    return {one: at for at, one in enumerate(dict.fromkeys(layer.warehouse for layer in layers.values()))}


def to_official(layers: Mapping[str, KernelWarehouseLayer], numbers: Mapping[Warehouse, int]) -> dict[str, Tensor]:
    """The state of layers under the official names; `tau`, and what follows from their order, is left out as there."""
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for leaf, tensor in layer.state_dict().items():
            if leaf not in _OURS:
                state[official_name(name, layer, leaf)] = tensor / scale if (scale := _scale(layer, leaf)) else tensor
    for warehouse, number in numbers.items():
        cells = warehouse.owner.cells.detach()
        users = [layer for layer in layers.values() if layer.warehouse is warehouse]
        flat = all(isinstance(layer, KernelWarehouseLinear) for layer in users)  # whose cells have one position there
        state[f"{CELLS}{number}"] = cells.squeeze(-1) if flat else cells
    return state


def from_official(
    layers: Mapping[str, KernelWarehouseLayer], state: Mapping[str, Tensor], numbers: Mapping[Warehouse, int]
) -> dict[str, Tensor]:
    """Undo `to_official`."""
    own: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for leaf, tensor in layer.state_dict().items():
            if leaf == "cells":
                own[f"{name}.cells"] = state[f"{CELLS}{numbers[layer.warehouse]}"].reshape(tensor.shape)
            elif leaf not in _OURS:
                official = state[official_name(name, layer, leaf)]
                own[f"{name}.{leaf}"] = official * scale if (scale := _scale(layer, leaf)) else official
    return own


def _scale(layer: KernelWarehouseLayer, leaf: str) -> float | None:
    return layer.attention.official_scales().get(leaf.removeprefix("attention."))

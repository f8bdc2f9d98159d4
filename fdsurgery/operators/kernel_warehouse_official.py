"""Layers of KernelWarehouse under the names of the authors' code: chains of layers that share warehouses.

There the cells are `warehouse_manager.weights.{j}` of the whole model; what else a layer has is `NAME.attention.*` and
`NAME.bias`, of a linear layer `NAME.conv.attention.*` and `NAME.conv.bias`. Values are the same here and there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, RecipeError
from .dynamic_operator import check_config, plain_conv
from .kernel_warehouse_layers import KernelWarehouseLayer, KernelWarehouseLinear
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
    chain = _chained(names, layers, config.get("between_layers"))
    own: dict[str, Tensor] = {}
    for entry, name, layer in zip(config["layers"], names, layers, strict=True):
        _check_entry(entry, layer.settings)
        prefix = f"{name}.conv." if isinstance(layer, nn.Linear) else f"{name}."
        own |= {f"{name}.{key[len(prefix) :]}": value for key, value in state.items() if key.startswith(prefix)}
        its = layer.settings
        own[f"{name}.assigned_cells"] = torch.tensor(
            assigned_cells(its["start"], its["places"], its["ratio"], its["cells"])
        )
        like = state[f"{prefix}attention.fc1.weight"] if f"{prefix}attention.fc1.weight" in state else torch.zeros(1)
        own[f"{name}.tau"] = like.new_full((1,), float(config.get("tau", 0.0)))
        cells = f"{CELLS}{entry['warehouse_id']}"
        if layer.warehouse.owner is layer and cells in state:
            own[f"{name}.cells"] = state[cells].reshape(layer.cells.shape)
    known = tuple(f"{name}." for name in names)
    own |= {key: value for key, value in state.items() if not key.startswith((CELLS, *known))}  # to be told as too many
    return _loaded(chain, own)


def _plain(entry: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The plain layer of an entry, on meta, in the dtype of the state."""
    linear = entry.get("layer_type") == "linear"
    name = f"{entry['name']}.conv" if linear else f"{entry['name']}"
    weight = next(iter(state.values()), torch.zeros(1))
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


def _chained(names: Sequence[str], layers: Sequence[nn.Module], between: Any) -> nn.Sequential:
    if between not in (None, "tanh"):
        raise CheckpointError(f"between_layers is {between!r}; known is 'tanh'")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for at, (name, layer) in enumerate(zip(names, layers, strict=True)):
        if at and between == "tanh":
            parts[f"tanh{at}"] = nn.Tanh()
        parts[name] = layer
    return nn.Sequential(parts)


def _loaded(chain: nn.Sequential, state: Mapping[str, Tensor]) -> nn.Sequential:
    chain.to_empty(device=next(iter(state.values())).device)
    try:
        chain.load_state_dict(dict(state))
    except RuntimeError as error:
        raise CheckpointError(f"the state does not fit the layers: {error}") from None
    return chain


def official_names(model: nn.Module) -> dict[str, Tensor]:
    """The state of all layers of KernelWarehouse in a model, under the official names.

    Warehouses are numbered as the model has their first layers. `tau` and what follows from the order of the layers is
    left out, as there.
    """
    state: dict[str, Tensor] = {}
    numbers: dict[Any, int] = {}
    linear: dict[Any, bool] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, KernelWarehouseLayer):
            continue
        warehouse = layer.warehouse
        numbers.setdefault(warehouse, len(numbers))
        is_linear = isinstance(layer, KernelWarehouseLinear)
        linear[warehouse] = linear.get(warehouse, True) and is_linear
        prefix = ".".join(filter(None, [name, "conv" if is_linear else ""]))
        for key, value in layer.state_dict().items():
            if key not in ("cells", "tau", "assigned_cells"):
                state[".".join(filter(None, [prefix, key]))] = value
    for warehouse, number in numbers.items():
        cells = warehouse.owner.cells.detach()
        state[f"{CELLS}{number}"] = cells.squeeze(-1) if linear[warehouse] else cells
    return state

"""KernelWarehouse as an operator of whole models (Li and Yao, ICML 2024, arXiv 2406.07879)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import AfterValidator
from torch import Tensor, nn

from ..discovery.site import Site
from .base import ParameterKind, Shaped
from .dynamic_layer import DynamicLayer
from .dynamic_operator import DynamicOperator, Settings
from .kernel_warehouse_layers import KernelWarehouseConv2d, KernelWarehouseLayer, KernelWarehouseLinear, Warehouse
from .kernel_warehouse_official import CELLS, chain_of, from_official, numbered, to_official
from .standing_in import stand_in
from .warehouse import Shape, cells_taken, shared_out


def _whole_or_part(ratio: int | float) -> int | float:
    if ratio >= 1 and ratio != int(ratio):
        raise ValueError("a ratio above 1 is a whole number, such as 2 or 4")
    if ratio < 1 and abs(1 / ratio - round(1 / ratio)) > 1e-6:
        raise ValueError("a ratio below 1 is 1 over a whole number, such as 0.5 or 0.25")
    return int(ratio) if ratio >= 1 else ratio


class KernelWarehouseSettings(Settings):
    """Settings of KernelWarehouse."""

    warehouse: Annotated[str, MinLen(1)] | None = None
    """Layers whose warehouses have one name share it. By default one for each stage, told by the names of layers."""
    ratio: Annotated[int | float, Gt(0), Le(64), AfterValidator(_whole_or_part)] = 1
    """How many cells the warehouse has for each place of its layers. Below 1 for the authors' checkpoints only."""
    reduction: Annotated[float, Gt(0), Le(1)] = 0.0625
    """Width of the attention, as a part of the input channels."""
    min_channels: Annotated[int, Ge(1)] = 16
    """The least width of the attention."""
    norm: Literal["batch", "layer"] = "batch"
    """The norm of the attention; `layer` as in the authors' ConvNeXt."""
    nonlocal_basis_ratio: Annotated[float, Gt(0), Le(1)] = 1
    """Below 1 the coefficients of the cells of other layers are spanned by so many basis vectors, as a part of them,
    which makes the attention of large warehouses smaller."""
    spatial_partition: bool = True
    """Cells of 1x1, so that kernels of any size share them; else as large as the kernels, which must be alike."""
    cell_in_ratio: Annotated[float, Gt(0), Le(1)] = 1
    """Input channels of a cell, as a part of the greatest common divisor of the layers'."""
    cell_out_ratio: Annotated[float, Gt(0), Le(1)] = 1
    """Output channels of a cell, as `cell_in_ratio`."""
    first: str | None = None
    """Worked out: the first layer of the warehouse, which sets apart warehouses of one name."""
    start: Annotated[int, Ge(0)] | None = None
    """Worked out: the first cell that is assigned to the layer."""
    places: Annotated[int, Ge(1)] | None = None
    """Worked out: how many cells make up the layer's weight."""
    cells: Annotated[int, Ge(1)] | None = None
    """Worked out: how many cells the warehouse has."""
    cell_shape: Annotated[list[Annotated[int, Ge(1)]], MinLen(4), MaxLen(4)] | None = None
    """Worked out: output channels, input channels, height and width of a cell."""


class KernelWarehouseOperator(DynamicOperator):
    """Puts layers that mix the cells of shared warehouses in the place of convolutions and linear layers.

    Cost: mixing takes `cells` times the layer's weights a sample, and the attention has `places * (cells + 1)` logits,
        so
    both grow with the square of the warehouse. Name smaller ones, or lower `nonlocal_basis_ratio`.
    """

    name = "kernel_warehouse"
    title = "[KernelWarehouse](https://arxiv.org/abs/2406.07879)"
    leaf = "assigned_cells"
    unseen_settings = ("warehouse",)
    settings_class = KernelWarehouseSettings
    conv_layer = KernelWarehouseConv2d
    linear_layer = KernelWarehouseLinear
    builds_together = True

    # The plan

    def refusal_of_trained(self, site: Site, settings: dict[str, Any]) -> str | None:
        return super().refusal(site, settings)

    def refusal(self, site: Site, settings: dict[str, Any]) -> str | None:
        if settings["ratio"] < 1:
            return f"no exact start exists at ratio {settings['ratio']:g}: its cells are fewer numbers than the weights"
        return super().refusal(site, settings)

    def resolve(self, sites: Sequence[Site], settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        shapes = [
            Shape(site.name, site.out_channels, site.in_channels // site.groups, site.kernel_size, site.groups)
            for site in sites
        ]
        return shared_out(shapes, settings)

    def multiply_adds(self, layer: nn.Module, sample: tuple[int, ...]) -> dict[str, int]:
        assert isinstance(layer, KernelWarehouseLayer)
        its = layer.settings
        return {"attention": layer.attention.products(), "mixing": its["places"] * layer._stored().numel()}

    # The layers

    def replace(self, layer: nn.Module, settings: dict[str, Any]) -> nn.Module:
        return self.build(["0"], [layer], [settings])[0]

    def build(
        self, names: Sequence[str], layers: Sequence[nn.Module], settings: Sequence[dict[str, Any]]
    ) -> list[nn.Module]:
        """The layers of one model; those of a warehouse share its cells, which the one that starts first owns.

        Raises:
            ValueError: layers of one warehouse differ in dtype or device, or claim the same cells.
            RecipeError: they cannot share.
        """
        complete = _completed(names, layers, settings)
        groups: dict[Any, list[int]] = {}
        for at, its in enumerate(complete):
            key = (its["warehouse"], its["first"], its["cells"], *its["cell_shape"])
            groups.setdefault(key, []).append(at)
        made: dict[int, nn.Module] = {}
        for group in groups.values():
            group.sort(key=lambda at: complete[at]["start"])
            _check_together([names[at] for at in group], [layers[at] for at in group], [complete[at] for at in group])
            warehouse = Warehouse()
            built = []
            for at in group:
                made[at] = one = _stand_in(self, layers[at], complete[at], warehouse)
                built.append(one)
            trains = [one.attention.fc1.weight.requires_grad for one in built]
            warehouse.owner.cells.requires_grad_(any(trains))
        return [made[at] for at in range(len(layers))]

    def release(self, leaving: Collection[nn.Module], staying: Sequence[nn.Module]) -> None:
        for warehouse in {layer.warehouse for layer in leaving if isinstance(layer, KernelWarehouseLayer)}:
            warehouse.leave(leaving, preferred=staying)  # else one outside of the part of a model that this is

    def kernels(self, layer: nn.Module) -> Tensor | None:
        return None  # cells are no kernels

    def parameter_kinds(self, layer: nn.Module) -> dict[nn.Parameter, ParameterKind]:
        kinds = super().parameter_kinds(layer)
        own = set(layer.parameters())
        return {parameter: kind for parameter, kind in kinds.items() if parameter in own}

    def schedule(self, layer: nn.Module, progress: float) -> bool:
        """The paper's warm-up, `tau` from 1 to 0 (section 3.3). It is meant for training from scratch: a converted
        layer starts at 0, and is off by up to 0.1 % of its output while `tau` is above."""
        assert isinstance(layer, KernelWarehouseLayer)
        with torch.no_grad():
            layer.tau.fill_(max(0.0, 1 - progress))
        return True

    # What is saved

    def settings_of_tensors(self, plain: nn.Module, tensors: Mapping[str, Shaped], official: bool) -> dict[str, Any]:
        """All but the names of warehouses: layers with equally many cells are taken to share, in the model's order."""
        places = tensors["assigned_cells"].shape[0]
        basis, squeeze = tensors.get("attention.fc3.weight"), tensors["attention.fc1.weight"].shape
        logits = tensors["attention.fc2.bias" if basis is None else "attention.basis_bias"].shape[0]
        count = logits // places - 1
        settings: dict[str, Any] = {"places": places, "cells": count, "warehouse": f"{count} cells"}
        settings["norm"] = "batch" if "attention.norm1.running_mean" in tensors else "layer"
        if squeeze[0] != max(squeeze[1] // 16, 16):
            settings |= {"reduction": min(1.0, (squeeze[0] + 0.5) / squeeze[1]), "min_channels": 1}
            if squeeze[0] > squeeze[1]:
                settings["min_channels"] = squeeze[0]
        if basis is not None:
            settings["nonlocal_basis_ratio"] = min(1 - 1e-6, (basis.shape[1] + 0.5) / max(1, basis.shape[0]))
        if "cells" in tensors:
            settings["cell_shape"] = list(tensors["cells"].shape[1:])
        return settings

    def load_official(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        """A chain of layers, `nn.Sequential` with the names of the configuration, which share warehouses.

        Args:
            state: `warehouse_manager.weights.{j} (n, c_o, c_i, h, w)`, `NAME.attention.*`, `NAME.bias`; of a linear
                layer `NAME.conv.attention.*` and so on.
            config: `layers`, each with `name`, `layer_type`, `warehouse_id` and its geometry; `tau` (0 if it is not
                said), `between_layers` (`tanh`, or nothing), and the authors' names of the settings. What follows from
                all layers, such as `start_cell`, is checked where it is said.
        """
        return chain_of(state, config, self.build, self.settings)

    def official_state(self, layer: nn.Module) -> dict[str, Tensor]:
        """What `load_official` reads, of one layer or of all in a model."""
        return self.to_official({name: one for name, one in layer.named_modules() if self.owns(one)})

    def to_official(self, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        own = _own(layers)
        return to_official(own, numbered(own))

    def from_official(self, layers: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = _own(layers)
        return from_official(own, state, numbered(own))

    def is_official(self, names: Collection[str]) -> bool:
        return any(CELLS in name for name in names)


def _own(layers: Mapping[str, nn.Module]) -> dict[str, KernelWarehouseLayer]:
    return {name: layer for name, layer in layers.items() if isinstance(layer, KernelWarehouseLayer)}


def _stand_in(
    operator: KernelWarehouseOperator, layer: nn.Module, settings: dict[str, Any], warehouse: Warehouse
) -> KernelWarehouseLayer:
    def make(plain: nn.Conv2d | nn.Linear, pads_same: bool) -> DynamicLayer:
        kind = KernelWarehouseLinear if isinstance(plain, nn.Linear) else KernelWarehouseConv2d
        return kind(plain, settings, pads_same, warehouse)

    made = stand_in(layer, make)
    assert isinstance(made, KernelWarehouseLayer)
    return made


def _shape(name: str, layer: Any) -> Shape:
    if isinstance(layer, nn.Linear):
        return Shape(name, layer.out_features, layer.in_features, (1, 1))
    return Shape(name, layer.out_channels, layer.in_channels // layer.groups, layer.kernel_size, layer.groups)


def _completed(
    names: Sequence[str], layers: Sequence[nn.Module], settings: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The settings with what follows from all layers, where no plan has worked it out."""
    complete = [dict(its) for its in settings]
    fresh = [at for at, its in enumerate(complete) if its["places"] is None]
    if fresh:
        shapes = [_shape(names[at], layers[at]) for at in fresh]
        for at, its in zip(fresh, shared_out(shapes, [complete[at] for at in fresh]), strict=True):
            complete[at] = its
    seen: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for its in complete:
        if its["start"] is None:  # told by tensors
            seen.setdefault((its["warehouse"], its["cells"]), []).append(its)
    for (name, cells), group in seen.items():
        ratio, rest = divmod(cells, sum(its["places"] for its in group))
        shape = next((its["cell_shape"] for its in group if its["cell_shape"] is not None), None)
        if rest or not ratio or shape is None:
            raise ValueError(f"the layers of {name} do not make up a warehouse of {cells} cells; give their settings")
        start = 0
        for its in group:
            its |= {"first": name, "start": start, "ratio": ratio, "cell_shape": shape}
            start += cells_taken(its["places"], ratio)
    return complete


def _check_together(names: Sequence[str], layers: Sequence[nn.Module], settings: Sequence[dict[str, Any]]) -> None:
    """Raise `ValueError` where layers cannot share one parameter."""
    weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    first, end = weights[0], 0
    for name, weight, its in zip(names, weights, settings, strict=True):
        for what in ("dtype", "device"):
            here, there = getattr(first, what), getattr(weight, what)
            if here != there:
                raise ValueError(
                    f"layers of the warehouse {its['warehouse']!r} differ in {what}: {here} for {names[0]!r}, "
                    f"{there} for {name!r}; give them one, or warehouses of their own"
                )
        if its["start"] < end:
            raise ValueError(f"{name!r} starts at cell {its['start']} of {its['warehouse']!r}, which has another layer")
        end = its["start"] + cells_taken(its["places"], its["ratio"])
        if end > its["cells"]:
            raise ValueError(f"{name!r} ends at cell {end} of {its['warehouse']!r}, which has {its['cells']}")

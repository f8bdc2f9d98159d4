"""The layers of KernelWarehouse, and the cells that they share.

KernelWarehouse (Li and Yao, ICML 2024, arXiv 2406.07879). A layer's weight is cut into places; each is a mixture of all
cells of its warehouse, with coefficients that an attention computes from the mean of the input (section 3, equations 2
and 3).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv.modulation import SLOW_HEADS, ContextBatchNorm, Squeeze, ZeroInit, linear_of, normed
from fdconv.precision import rescaled

from .dynamic_layer import DynamicConv2d, DynamicLayer, DynamicLinear
from .warehouse import assigned_cells, logits_of

SMALLEST_SUM = 1e-3
"""Added to what coefficients are divided by."""
START = 1 + SMALLEST_SUM
"""A logit of 1 beside zeros gives one over this, so cells are this times the static weight."""


class Warehouse:
    """The layers that mix one set of cells, and the one of them that owns it.

    No module, so that none of the layers has the others as parts; and what replaces modules in a model does not look
    into it, for it has slots only. It knows its layers weakly: one that is thrown away is not kept. Copies and pickles
    of several layers share a copy of it; copies of one layer bring a copy of the owner along.
    """

    __slots__ = ("_layers", "owner")

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.owner: Any = None

    def enter(self, layer: nn.Module) -> None:
        """Make a layer one of those that share; the first one owns the cells."""
        self._layers.add(layer)
        if self.owner is None:
            self.owner = layer

    @property
    def layers(self) -> list[Any]:
        """Those that share, in order."""
        return sorted(self._layers, key=lambda layer: layer.settings["start"])

    def leave(self, leaving: Collection[nn.Module], preferred: Collection[nn.Module]) -> None:
        """Have a layer that stays own the cells, if one does: the same parameter, so that optimizers go on with it."""
        for layer in leaving:
            self._layers.discard(layer)
        heirs = self.layers
        if heirs and self.owner in leaving:
            heir = next((one for one in heirs if one in preferred), heirs[0])
            heir._parameters["cells"] = self.owner._parameters.pop("cells")
            self.owner = heir

    def __reduce__(self) -> Any:
        return type(self), (), (self.owner,)

    def __setstate__(self, state: tuple[Any]) -> None:
        (self.owner,) = state


def _power_of_two(number: float) -> float:
    """The next above a number, at least 1: factors that change no digit of an official checkpoint."""
    return 2.0 ** math.ceil(math.log2(max(1.0, number)))


class CellAttention(nn.Module):
    """The coefficients of all cells for each place of a layer, `(B, C_in)` to `(B, places, cells)`.

    Neutral at the start: a coefficient of 1/1.001 for the cell that is assigned to the place, 0 for all others,
    whatever the input. These have a gradient, for the derivative of `|z|` is 0 at 0, as long as no cell is zero.

    Logits are those that are stored over `logit_scale`, and what `fc2` is applied to over `hidden_scale`, powers of
    two: a place's logits are divided by the sum of their sizes, and a step of Adam moves each of the hundreds that are
    zero as far as any other, by which the share of the assigned cell would drop. In a ResNet-18 at ratio 4 it fell to
    0.2 in one step at 1e-3, and now to 0.8.

    Args:
        in_channels: `C_in`.
        settings: of the layer, complete.
        assigned: `(places,)`, the cell of each; `cells` for none.
        like: a tensor of the dtype and on the device that parameters are to have.
    """

    def __init__(self, in_channels: int, settings: dict[str, Any], assigned: Tensor, like: Tensor) -> None:
        super().__init__()
        self.places, self.cells, self.start = settings["places"], settings["cells"], settings["start"]
        self.width = max(int(in_channels * settings["reduction"]), settings["min_channels"])
        self.logit_scale = _power_of_two((self.cells + 1) ** 0.5)
        self.hidden_scale = self.logit_scale * _power_of_two(self.width / SLOW_HEADS)
        made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        layer_norm = settings["norm"] == "layer"
        self.fc1 = Squeeze(self.width, in_channels, bias=layer_norm, **made)
        self.norm1: nn.Module = nn.LayerNorm(self.width, **made) if layer_norm else ContextBatchNorm(self.width, **made)
        nonlocal_ratio = settings["nonlocal_basis_ratio"]
        self.own, self.basis = logits_of(self.places, self.cells, settings["ratio"], nonlocal_ratio)
        self.fc3: Squeeze | None = None
        self.basis_bias: nn.Parameter | None = None
        if self.basis:
            self.fc3 = Squeeze(self.cells - self.own, self.basis, **made)
            self.basis_bias = nn.Parameter(like.new_empty(self.places * (self.cells + 1)))
        logits = self.places * (self.own + self.basis + 1)
        self.fc2 = ZeroInit(logits, self.width, bias=self.fc3 is None, **made)
        self._start_(assigned)

    @property
    def bias(self) -> nn.Parameter:
        """`(places*(cells + 1),)`, the logits at zero modulation, times `logit_scale`."""
        bias = self.fc2.bias if self.basis_bias is None else self.basis_bias
        assert bias is not None
        return bias

    def one_hot(self, assigned: Tensor, dtype: torch.dtype) -> Tensor:
        """`(places, cells + 1)`: 1 where a cell is assigned to a place."""
        return (assigned[:, None] == torch.arange(self.cells + 1, dtype=assigned.dtype, device=assigned.device)).to(
            dtype
        )

    def _bias_at_start(self, assigned: Tensor) -> Tensor:
        return self.one_hot(assigned, self.bias.dtype).flatten() * self.logit_scale

    @torch.no_grad()
    def _start_(self, assigned: Tensor) -> None:
        self.bias.copy_(self._bias_at_start(assigned))

    def reset_(self, assigned: Tensor) -> None:
        """Draw the first map anew, and be neutral."""
        for module in (self.fc1, self.norm1, self.fc2, self.fc3):
            if module is not None:
                module.reset_parameters()  # type: ignore[operator]
        self._start_(assigned)

    def modulation(self, assigned: Tensor) -> list[Tensor]:
        """Tensors that are all zero where the attention is neutral."""
        return [self.fc2.weight, self.bias - self._bias_at_start(assigned)]

    def official_scales(self) -> dict[str, float]:
        """By what tensors are larger than in the authors' code, where they are."""
        return {"fc2.weight": self.hidden_scale, "fc2.bias": self.logit_scale, "basis_bias": self.logit_scale}

    def products(self) -> int:
        """Multiply-adds for a sample."""
        spread = 0 if self.fc3 is None else self.places * self.fc3.weight.numel()
        return self.fc1.weight.numel() + self.fc2.weight.numel() + spread

    def forward(self, context: Tensor, assigned: Tensor, tau: Tensor) -> Tensor:
        hidden = F.relu(normed(self.norm1, linear_of(self.fc1, context), self.fc1.weight.dtype))
        logits = F.linear(hidden / self.hidden_scale, self.fc2.weight.to(hidden.dtype))
        logits = logits.unflatten(1, (self.places, -1))
        if self.fc3 is not None:
            own, basis, empty = logits.split([self.own, self.basis, 1], 2)
            others = linear_of(self.fc3, basis)
            logits = torch.cat([others[..., : self.start], own, others[..., self.start :], empty], 2)
        logits = logits + self.bias.to(logits.dtype).view(self.places, -1) / self.logit_scale
        tau = tau.to(logits.dtype)
        mixture = logits / (logits.abs().sum(2, keepdim=True) + SMALLEST_SUM)
        mixture = (1 - tau) * mixture + tau * self.one_hot(assigned, logits.dtype)
        return mixture[..., :-1]  # what the empty cell has adds nothing


class KernelWarehouseLayer(DynamicLayer):
    """What both layers share.

    The cells of a warehouse, `cells (n, c_o, c_i, h, w)`, are one parameter. The first of its layers owns it, the
    others reach it through `warehouse`, which is no module. So:

    - `named_parameters`, the state dict, optimizers, DDP and `requires_grad_` of a model meet the cells once, under the
      owner. A wrapper that shards parameters and gathers them part by part (FSDP) must take all layers of a warehouse
      as one part. `nn.DataParallel` is refused.
    - Freezing a part of the model that does not hold the owner freezes what mixes the cells there, not the cells:
      freeze `*.cells` by the owner's name for that. Cells train if any of the plain layers that they are made of did.
    - `fdsurgery.restore` of some layers leaves the others as they are. Where the owner is among them, the next layer
      owns the same parameter from then on. A plain layer that is put in the owner's place by hand takes the cells out
      of the model's parameters; let `fdsurgery.restore(model, names)` do it.
    - `copy.deepcopy` and pickling of a model keep what is shared within the copy; those of one layer bring a copy of
      the owner along, so that the copy computes the same and shares with nobody.
    - A module that a model uses twice is one layer of the warehouse. Layers that share a weight are not swapped.
    - The static weight of one layer is its cells. Where other layers have learned to mix these, writing it changes
      them.

    `tau (1,)` draws the mixture towards the assigned cells alone, wholly at 1. `assigned_cells (places,)` says which.
    """

    stored_name = "cells"
    told_by = "assigned_cells"
    assigned_cells: Tensor
    tau: Tensor
    warehouse: Warehouse

    def __init__(
        self, plain: Any, settings: dict[str, Any], pads_same: bool = False, warehouse: Warehouse | None = None
    ) -> None:
        object.__setattr__(self, "warehouse", Warehouse() if warehouse is None else warehouse)
        super().__init__(plain, settings, pads_same)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.warehouse.enter(self)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel copies layers one by one, and these share their cells; use DistributedDataParallel"
        )

    def _stored(self) -> nn.Parameter:
        cells: nn.Parameter = self.warehouse.owner.cells
        return cells

    def _build(self, weight: Tensor) -> None:
        its = self.settings
        self.register_buffer("assigned_cells", torch.tensor(self.assigned(), dtype=torch.int64, device=weight.device))
        self.register_buffer("tau", weight.new_zeros(1))
        self.attention = CellAttention(self._in_channels(), its, self.assigned_cells, weight)
        if self.warehouse.owner is None:
            out_channels, _, k_h, k_w = self._kernel_shape()
            cells = weight.new_empty(its["cells"], *its["cell_shape"])
            # Those that no place is assigned to are never zero, or nobody would begin to mix them.
            self.cells = nn.Parameter(cells.normal_(0, (2 / (out_channels * k_h * k_w)) ** 0.5))
        self.warehouse.enter(self)
        if its["ratio"] >= 1:
            self.set_weight(weight)

    def assigned(self) -> list[int]:
        """The cell that each place has to itself, by the settings; `cells`, beyond the last, stands for none."""
        its = self.settings
        return assigned_cells(its["start"], its["places"], its["ratio"], its["cells"])

    # The weight

    def _grid(self) -> tuple[int, ...]:
        """How many cells lie along each axis of the kernel, as `_kernel_shape` has them."""
        shape = self.settings["cell_shape"]
        return tuple(whole // part for whole, part in zip(self._kernel_shape(), shape, strict=True))

    def _cut(self, kernel: Tensor) -> Tensor:
        """`(C_out, C_in/groups, k_h, k_w)` to the places `(places, c_o, c_i, h, w)`: position, output, input block."""
        c_o, c_i, h, w = self.settings["cell_shape"]
        o, i, y, x = self._grid()
        return kernel.reshape(o, c_o, i, c_i, y, h, x, w).permute(4, 6, 0, 2, 1, 3, 5, 7).reshape(-1, c_o, c_i, h, w)

    def _joined(self, places: Tensor) -> Tensor:
        """Places `(B, places, ...)` to kernels `(B, C_out, C_in/groups, k_h, k_w)`."""
        c_o, c_i, h, w = self.settings["cell_shape"]
        o, i, y, x = self._grid()
        return (
            places.reshape(-1, y, x, o, i, c_o, c_i, h, w)
            .permute(0, 3, 5, 4, 6, 1, 7, 2, 8)
            .reshape(-1, *self._kernel_shape())
        )

    def _given(self, context: Tensor) -> list[Tensor]:
        coefficients: Tensor = self.attention(context, self.assigned_cells, self.tau)
        return [coefficients]

    def _make(self, given: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        (coefficients,), (cells,) = given, shared
        return self._joined(coefficients.flatten(0, 1) @ cells.flatten(1).to(coefficients.dtype))

    def _neutral_weight(self) -> Tensor:
        cells = self._stored()
        if self.settings["ratio"] < 1:
            cells = torch.cat([cells, cells.new_zeros(1, *cells.shape[1:])])  # type: ignore[assignment]
        return self._joined((cells[self.assigned_cells] / START)[None])[0].reshape(self._static_shape())

    def _modulation(self) -> list[Tensor]:
        return [*self.attention.modulation(self.assigned_cells), self.tau]

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        if self.settings["ratio"] < 1:
            raise ValueError(
                f"at ratio {self.settings['ratio']:g} {type(self).__name__} has fewer numbers than a weight, and "
                "cannot hold one"
            )
        self._write(self._stored(), self._checked(weight))

    def _write(self, cells: Tensor, weight: Tensor) -> None:
        places = self._cut(weight.reshape(self._kernel_shape()))
        places = rescaled(places, torch.tensor(START, dtype=torch.float64, device=places.device))
        cells.index_copy_(0, self.assigned_cells, places.to(cells.dtype))

    def _multiply(self, scale: Tensor) -> None:
        if bool((self._factors(scale) != 1).any()):
            raise ValueError(
                f"{type(self).__name__} mixes cells that others mix too, so its weight is not multiplied alone: leave "
                "the norm behind it as it is, as fdsurgery.fuse_norms does"
            )

    def reset_parameters(self) -> None:
        """Be neutral, with a weight drawn as the plain layer draws it."""
        self.attention.reset_(self.assigned_cells)
        nn.init.zeros_(self.tau)
        super().reset_parameters()  # type: ignore[misc]

    # State

    def _expect_plain(self, state_dict: dict[str, Tensor], prefix: str) -> str | None:
        if self._stored().is_meta and not state_dict[f"{prefix}weight"].is_meta:
            return f"{prefix}weight: the cells that are to hold it have no memory; load it before the conversion"
        return super()._expect_plain(state_dict, prefix)

    def _fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The cells of other layers stay as they are: their weights may be read before or after this one's."""
        with torch.random.fork_rng(devices=[]):
            fresh = CellAttention(self._in_channels(), self.settings, self.assigned_cells, weight)
        state = {f"attention.{name}": tensor for name, tensor in fresh.state_dict().items()}
        state |= {"assigned_cells": self.assigned_cells, "tau": torch.zeros_like(self.tau)}
        cells = self._stored().detach()
        if self.warehouse.owner is self:
            state["cells"] = cells = cells.clone()
        self._write(cells, weight.to(cells.device))
        return state


class KernelWarehouseConv2d(KernelWarehouseLayer, DynamicConv2d):  # type: ignore[misc, override]
    """KernelWarehouse in the place of `nn.Conv2d`."""


class KernelWarehouseLinear(KernelWarehouseLayer, DynamicLinear):  # type: ignore[misc, override]
    """KernelWarehouse in the place of `nn.Linear`: the attention looks at the mean over positions."""

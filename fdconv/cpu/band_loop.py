"""Band modulation for CPUs: a block of channels at a time, so that what lies between input and result stays in cache.

The low-passes of a whole feature map are maps of its size, written by one step and read by the next; here they exist
for a block only, in buffers that are used again. The backward pass forms them once more.

The mathematics is that of `fdconv.low_pass`, which serves for second derivatives, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import low_pass
from ..config import FDConfig
from ..constants import constant
from ..tracing import wants_operations
from .workspace import blocks, buffer

FLAT = 200
"""Positions of a map up to which both axes are one: a product more costs less there than two steps."""


def apply(x: Tensor, weight: Tensor, bias: Tensor, config: FDConfig) -> Tensor:
    """`fdconv.low_pass.modulated(x, weight, bias, config)`, block by block.

    Args:
        x: `(B, C, H, W)`, float32 or float64.
        weight: `(groups*maps, C/groups, 3, 3)`, in the dtype of `x`.
        bias: `(groups*maps,)`.
        config: the settings of the operator.
    """
    result: Tensor = _BandLoop.apply(x.contiguous(), weight, bias, config)  # type: ignore[no-untyped-call]
    return result


class _BandLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, config: FDConfig) -> Tensor:
        logits = _logits(x, weight, bias, config.band_groups)
        ctx.save_for_backward(x, weight, bias, logits)
        ctx.config = config
        steps = low_pass.steps(logits, config)
        split = _split(x, config)
        result = torch.empty_like(x)
        whole, to = in_groups(x, config.band_groups), in_groups(result, config.band_groups)
        for samples, channels in _blocks(whole):
            own, mixed = whole[samples, channels], to[samples, channels]
            torch.mul(own, steps[samples, :1], out=mixed)
            for band, passed in enumerate(split.passes(own), 1):
                mixed.addcmul_(steps[samples, band : band + 1], passed)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, logits = ctx.saved_tensors
        wanted = [position for position, need in enumerate(ctx.needs_input_grad[:3]) if need]
        if wants_operations(grad):
            leaves = [(x, weight, bias)[position] for position in wanted]
            with torch.enable_grad():
                y = low_pass.modulated(x, weight, bias, ctx.config)
            found = torch.autograd.grad(y, leaves, grad, create_graph=torch.is_grad_enabled())
            gradients = dict(zip(wanted, found, strict=True))
        else:
            every = _backward(grad.contiguous(), x, weight, logits, ctx.config)
            gradients = {position: every[position] for position in wanted}
        return (*(gradients.get(position) for position in range(3)), None)


def in_groups(x: Tensor, groups: int) -> Tensor:
    """`(B, C, H, W)` to `(B*groups, C/groups, H, W)`, for a group has maps of its own."""
    return x.view(-1, x.shape[1] // groups, *x.shape[2:])


def _blocks(x: Tensor) -> list[tuple[slice, slice]]:
    return blocks(x.shape[0], x.shape[1], x.shape[2] * x.shape[3])


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, logits: Tensor, config: FDConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to input, weight and bias."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        steps = low_pass.steps(logits, config)
    split = _split(x, config)
    to_x, to_steps = torch.empty_like(x), torch.zeros_like(steps)
    whole, grads, to = (in_groups(it, config.band_groups) for it in (x, grad, to_x))
    factors = steps.detach()
    for samples, channels in _blocks(whole):
        own, above, below = whole[samples, channels], grads[samples, channels], to[samples, channels]
        product = buffer("band product", tuple(own.shape), own.dtype)
        to_steps[samples, 0] += torch.mul(above, own, out=product).sum(1)
        for band, passed in enumerate(split.passes(own), 1):
            to_steps[samples, band] += torch.mul(above, passed, out=product).sum(1)
        torch.mul(above, factors[samples, :1], out=below)
        split.add_passes(above, factors[samples, 1:], below)
    (to_logits,) = torch.autograd.grad(steps, logits, to_steps)
    to_weight, to_bias = _logits_backward(to_logits, x, weight, config.band_groups, to_x)
    return to_x, to_weight, to_bias


# The maps: a 3x3 convolution with few outputs is a product with nine small ones, moved and added up


def _by_position(weight: Tensor, groups: int) -> Tensor:
    """`(groups*maps, C/groups, 3, 3)` as a matrix for each group, `(groups, maps*9, C/groups)`, positions backwards."""
    return weight.flip(2, 3).flatten(2).transpose(1, 2).reshape(groups, -1, weight.shape[1])


def _logits(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=1, groups=groups)`."""
    size = x.shape[2:]
    planes = _by_position(weight, groups) @ x.view(len(x), groups, -1, size.numel())
    return F.fold(planes.flatten(1, 2), size, 3, padding=1) + bias.view(-1, 1, 1)


def _logits_backward(to_logits: Tensor, x: Tensor, weight: Tensor, groups: int, to_x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to weight and bias; that to the input is added to `to_x`."""
    planes = F.unfold(to_logits, 3, padding=1).unflatten(1, (groups, -1))
    shape = (len(x), groups, -1, planes.shape[-1])
    by_position = (planes @ x.view(shape).transpose(2, 3)).sum(0)
    to_weight = by_position.view(len(weight), 3, 3, -1).permute(0, 3, 1, 2).flip(2, 3)
    columns = _by_position(weight, groups).transpose(1, 2).expand(len(x), -1, -1, -1)
    to_x.view(-1, weight.shape[1], planes.shape[-1]).baddbmm_(columns.flatten(0, 1), planes.flatten(0, 1))
    return to_weight, to_logits.sum((0, 2, 3))


# The low-passes of a block


def _split(x: Tensor, config: FDConfig) -> _Products | _Transforms:
    size, place = tuple(x.shape[2:]), (x.device, x.dtype)
    if config.band_mask == "interpolated":
        return _Transforms(constant(low_pass.interpolated_masks, *size, config.bands, *place, of_input=True))
    if math.prod(size) <= FLAT:
        basis, kept = constant(low_pass.flat_basis, *size, config.bands, *place, of_input=True)
        return _Products(None, basis, [(1, columns) for columns in kept])
    rows, columns = constant(low_pass.axis_bases, *size, config.bands[0], *place, of_input=True)
    return _Products(rows, columns, [low_pass.ranks(size[0], size[1], k) for k in config.bands])


class _Products(NamedTuple):
    """Low-passes as projections onto the first columns of a basis of rows and of one of columns.

    Lines and planes are multiplied all at once, as two large matrices: products of many small ones are slow. So
    coefficients are laid out `(columns, planes, rows)`, in which each axis in turn is that of a matrix, without a copy.
    """

    rows: Tensor | None
    """`(H, R)`; None where `columns` are for all positions, `(H*W, S)`."""
    columns: Tensor
    """`(W, S)`."""
    kept: list[tuple[int, int]]
    """For each band how many columns of the two belong to it, widest first."""

    def passes(self, x: Tensor) -> Iterator[Tensor]:
        """The low-passes of a block `(b, c, H, W)`, one after the other in the same memory."""
        coefficients = self._analysed(x, *self.kept[0], "band coefficients")
        for rows, columns in self.kept:
            passed = buffer("band passed", tuple(x.shape), x.dtype)
            lines, basis = self._lines(coefficients[:columns, :, :rows])
            torch.mm(lines, basis, out=passed.view(-1, basis.shape[1]))
            yield passed

    def add_passes(self, x: Tensor, factors: Tensor, to: Tensor) -> None:
        """Add the low-passes of `x` times factors `(b, bands, H, W)`, band by band, to `to`."""
        coefficients = x.new_empty(0)
        for band, (rows, columns) in enumerate(self.kept):
            product = buffer("band product", tuple(x.shape), x.dtype)
            torch.mul(x, factors[:, band : band + 1], out=product)
            if band == 0:
                coefficients = self._analysed(product, rows, columns, "band coefficients")
            else:
                coefficients[:columns, :, :rows] += self._analysed(product, rows, columns, "narrower coefficients")
        lines, basis = self._lines(coefficients)
        to.view(-1, basis.shape[1]).addmm_(lines, basis)

    def _analysed(self, x: Tensor, rows: int, columns: int, name: str) -> Tensor:
        """Coefficients of a block, `(columns, b*c, rows)`."""
        planes = x.shape[0] * x.shape[1]
        lines = x.view(-1, len(self.columns))
        basis = self.columns[:, :columns]
        found = buffer(name, (columns, planes * rows), x.dtype)
        if self.rows is None:
            return torch.mm(basis.T, lines.T, out=found).view(columns, planes, 1)
        along = buffer("band lines", (columns, len(lines)), x.dtype)
        torch.mm(basis.T, lines.T, out=along)
        torch.mm(along.view(-1, len(self.rows)), self.rows[:, :rows], out=found.view(-1, rows))
        return found.view(columns, planes, rows)

    def _lines(self, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors of the map that coefficients stand for, `(b*c*H, columns)` and `(columns, W)`."""
        columns, planes, rows = coefficients.shape
        basis = self.columns[:, :columns].T
        if self.rows is None:
            return coefficients.view(columns, planes).T, basis
        along = buffer("band lines", (columns * planes, len(self.rows)), coefficients.dtype)
        # Its rows are apart by those of the widest band: a view, for the two axes before are contiguous.
        flat = coefficients.as_strided((columns * planes, rows), (coefficients.stride(1), 1))
        torch.mm(flat, self.rows[:, :rows].T, out=along)
        return along.view(columns, -1).T, basis


class _Transforms(NamedTuple):
    """Low-passes by Fourier transforms, for masks of any form."""

    masks: Tensor
    """`(bands, H, W//2 + 1)`."""

    def passes(self, x: Tensor) -> Iterator[Tensor]:
        """As `_Products.passes`."""
        spectrum = torch.fft.rfft2(x)
        for mask in self.masks:
            yield torch.fft.irfft2(spectrum * mask, s=tuple(x.shape[2:]))

    def add_passes(self, x: Tensor, factors: Tensor, to: Tensor) -> None:
        """As `_Products.add_passes`: the low-passes are their own adjoints, masks without symmetry included."""
        spectra = (torch.fft.rfft2(x * factors[:, band, None]) * mask for band, mask in enumerate(self.masks))
        total = sum(spectra)
        assert isinstance(total, Tensor)
        to += torch.fft.irfft2(total, s=tuple(x.shape[2:]))

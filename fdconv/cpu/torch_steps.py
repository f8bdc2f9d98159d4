"""The steps of the loop over samples in torch's own operations, block by block: see `fdconv.cpu.sample_loop`.

`fdconv.cpu.compiled_steps` has the same functions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..modulation import Factors
from ..reference import WeightShape, channel_windows, edge_entries
from ..spectrum import column_factors
from .workspace import blocks, buffer


class Source(NamedTuple):
    """What weights are made of."""

    spectra: Tensor
    """`(r, D1, D2h, 2)`."""
    group: Tensor
    """`(D1, D2h)`, int32."""
    tables: Tensor | None
    """`(b, r, entries)`, the scaled factors of the groups: see `fdconv.reference.edge_entries`."""
    entries: Tensor
    """`(D1, D2h)`, int32, which of them each coefficient has."""
    factors: Factors
    shape: WeightShape

    def of(self, samples: slice) -> Source:
        """What those of some of the samples are made of."""
        tables = None if self.tables is None else self.tables[samples]
        return self._replace(tables=tables, factors=self.factors.of(samples))


def source(spectra: Tensor, group: Tensor, factors: Factors, shape: WeightShape) -> Source:
    """What the weights of all samples are made of."""
    group = group.int()
    if factors.kernel is None:
        return Source(spectra, group, None, group, factors, shape)
    scaled = factors.kernel.unflatten(1, (len(spectra), -1)) * spectra_scale(factors, shape)
    tables, entries = edge_entries(scaled, group, shape)
    return Source(spectra, group, tables, entries, factors, shape)


def images(source: Source) -> Tensor:
    """The weights of a chunk before they are modulated in space, `(b, C_out, k_h, k_w, C_in/groups)`, a view."""
    factors, shape = source.factors, source.shape
    scaled = torch.view_as_complex(_scaled(source))
    image = torch.fft.irfft2(scaled, s=(scaled.shape[1], shape.width))
    k_h, k_w = shape.kernel_size
    image = image.view(-1, shape.out_channels, k_h, shape.in_channels, k_w).transpose(-1, -2)
    return image.expand(factors.batch, -1, -1, -1, -1)


def spectra_scale(factors: Factors, shape: WeightShape) -> float:
    """Of the spectra: twice that of the weights where `_Local` gives half the factors, so that no pass doubles them."""
    return shape.scale if factors.context is None else 2 * shape.scale


def _scaled(source: Source) -> Tensor:
    """The spectra scaled group by group, summed over `r`: `(b, D1, D2h, 2)`."""
    spectra, tables, shape = source.spectra, source.tables, source.shape
    ratio, *axes = spectra.shape
    if tables is None:
        factors = column_factors(shape.width, spectra_scale(source.factors, shape), shape.edge, spectra)
        return spectra.sum(0, keepdim=True) * factors
    scaled = buffer("scaled", (len(tables), *axes), spectra.dtype)
    for samples, rows in blocks(len(tables), axes[0], math.prod(axes[1:])):
        for position in range(ratio):
            gain = _gain(tables[samples, position], source.entries[rows])
            if position == 0:
                torch.mul(gain, spectra[0, rows], out=scaled[samples, rows])
            else:
                scaled[samples, rows].addcmul_(gain, spectra[position, rows])
    return scaled


def _gain(table: Tensor, group: Tensor) -> Tensor:
    """The factor of each real and imaginary part, `(b, rows, D2h, 2)`, from those of the groups, `(b, entries)`."""
    # Looked up as pairs: half the look-ups, and no factor that broadcasts along an axis of two.
    pairs = torch.complex(table, table)
    found = buffer("gain", (len(table), group.numel()), pairs.dtype)
    for sample, row in enumerate(pairs):
        torch.index_select(row, 0, group.flatten(), out=found[sample])
    return torch.view_as_real(found).view(len(table), *group.shape, 2)


def weights(source: Source, images: Tensor) -> Tensor:
    """The weights of a chunk, `(b, C_out, C_in/groups, k_h, k_w)`, in a buffer that the next chunk writes to."""
    factors, shape = source.factors, source.shape
    made = buffer("weights", (len(images), shape.out_channels, shape.in_channels, *shape.kernel_size), images.dtype)
    local, vectors = _Local.of(factors, shape), _Vectors.of(factors, shape)
    for samples, channels in _channel_blocks(len(images), shape):
        image, place = images[samples, channels], made[samples, channels].permute(0, 1, 3, 4, 2)
        # One position has the weight's own order, so what is multiplied need not be moved afterwards.
        product = place if shape.kernel_size == (1, 1) else buffer("product", tuple(image.shape), image.dtype)
        if local is None:
            product.copy_(image)
        else:
            torch.mul(image, local.gate(samples, channels, shape), out=product)
        vectors.multiply(product, samples, channels, shape)
        if product is not place:
            place.copy_(product)
    return made


class _Local(NamedTuple):
    """The local branch, ready to give half the factors of a block of weights: `sigmoid(z)`, of `2*sigmoid(z)`.

    `1 + tanh(z)` is `2*sigmoid(2*z)`, so one function serves both activations.
    """

    taps: Tensor
    """`(groups, taps, C_out/groups, k_h*k_w)`: taps first, for a factor of a few of them that broadcasts is slow."""
    windows: Tensor
    """What they see, `(b, groups, taps, C_in/groups)`."""

    @classmethod
    def of(cls, factors: Factors, shape: WeightShape) -> _Local | None:
        if factors.context is None or factors.taps is None:
            return None
        taps = (factors.taps * steepness(shape)).T.contiguous()
        taps = taps.view(len(taps), shape.groups, -1, math.prod(shape.kernel_size)).transpose(0, 1)
        return cls(taps, channel_windows(factors, shape).contiguous())

    def gate(self, samples: slice, channels: slice, shape: WeightShape) -> Tensor:
        """`(b, C_out, k_h, k_w, C_in/groups)` of a block."""
        taps, windows = self.taps[:, :, channels].flatten(2), self.windows[samples]
        logits = buffer("gate", (*windows.shape[:2], taps.shape[2], windows.shape[3]), windows.dtype)
        torch.matmul(taps.mT, windows, out=logits)
        return logits.sigmoid_().view(len(windows), -1, *shape.kernel_size, shape.in_channels)


def steepness(shape: WeightShape) -> int:
    """Factor of the logits, with which half the gate is a sigmoid for both activations."""
    return 1 if shape.activation == "sigmoid" else 2


def row_factors(factors: Factors, shape: WeightShape) -> Tensor | None:
    """Filter times spatial, `(b, C_out, k_h*k_w)`; None stands for ones."""
    rows = None
    if factors.filter is not None:
        rows = factors.filter[:, :, None]
    if factors.spatial is not None:
        rows = factors.spatial[:, None] if rows is None else rows * factors.spatial[:, None]
    return None if rows is None else rows.expand(-1, shape.out_channels, math.prod(shape.kernel_size))


class _Vectors(NamedTuple):
    """The global branch but for the frequency groups: a factor for each row of a weight, and one for each column.

    A row is an output channel and a position of the kernel. `None` stands for ones.
    """

    rows: Tensor | None
    """`(b, groups, C_out/groups, k_h*k_w)`: filter times spatial."""
    columns: Tensor | None
    """`(b, groups, 1, C_in/groups)`."""

    @classmethod
    def of(cls, factors: Factors, shape: WeightShape) -> _Vectors:
        rows = row_factors(factors, shape)
        if rows is not None:
            rows = rows.unflatten(1, (shape.groups, -1))
        columns = None if factors.channel is None else factors.channel.view(-1, shape.groups, 1, shape.in_channels)
        return cls(rows, columns)

    def multiply(self, product: Tensor, samples: slice, channels: slice, shape: WeightShape) -> None:
        """Multiply a block `(b, C_out, k_h, k_w, C_in/groups)`, in place."""
        by_group = product.view(len(product), shape.groups, -1, shape.in_channels)
        if self.rows is not None:
            by_group.mul_(self.rows[samples, :, channels].flatten(2)[..., None])
        if self.columns is not None:
            by_group.mul_(self.columns[samples])

    def or_ones(self, images: Tensor, shape: WeightShape) -> tuple[Tensor, Tensor]:
        """Rows and columns, with ones in place of what is not there."""
        one, batch, groups = images.new_ones(1), len(images), shape.groups
        rows = one.expand(batch, groups, shape.out_channels // groups, math.prod(shape.kernel_size))
        columns = one.expand(batch, groups, 1, shape.in_channels)
        return rows if self.rows is None else self.rows, columns if self.columns is None else self.columns


def _channel_blocks(samples: int, shape: WeightShape) -> list[tuple[slice, slice]]:
    """Blocks of samples and output channels. The groups of a grouped convolution stay together."""
    if shape.groups > 1:
        return [(slice(sample, sample + 1), slice(None)) for sample in range(samples)]
    return blocks(samples, shape.out_channels, shape.numel // shape.out_channels)


# And back


def modulation_backward(
    source: Source, grads: Tensor, images: Tensor, to_taps: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients to the images and to all factors but that of the spectrum, from that of the weights of a chunk.

    What goes to the taps, which are the layer's, is added to `to_taps`.
    """
    factors, shape = source.factors, source.shape
    k_h, k_w = shape.kernel_size
    batch = len(grads)
    to_images = buffer("to images", (batch, shape.out_channels, k_h, shape.in_channels, k_w), grads.dtype)
    local, vectors = _Local.of(factors, shape), _Vectors.of(factors, shape)
    rows, columns = vectors.or_ones(images, shape)
    to_rows = None if vectors.rows is None else torch.empty_like(rows)
    to_columns = None if vectors.columns is None else torch.zeros_like(columns)
    taps, windows, by_sample, to_windows = None, None, None, None
    if local is not None:
        taps, windows = local.taps * rows[:, :, None], local.windows * columns
        by_sample, to_windows = torch.empty_like(taps), torch.zeros_like(windows)
    for samples, channels in _channel_blocks(batch, shape):
        image, above = images[samples, channels], grads[samples, channels].permute(0, 1, 3, 4, 2)
        place = to_images[samples, channels].transpose(-1, -2)
        grad = place if shape.kernel_size == (1, 1) else buffer("grad", tuple(image.shape), grads.dtype)
        gate = None if local is None else local.gate(samples, channels, shape)
        if gate is None:
            grad.copy_(above)
        else:
            torch.mul(above, gate, out=grad)
        product = torch.mul(grad, image, out=buffer("product", tuple(image.shape), grads.dtype))
        vectors.multiply(grad, samples, channels, shape)
        if grad is not place:
            place.copy_(grad)
        # Gradient times weight, but for rows and columns: these are multiplied where the result is small.
        by_group = product.view(len(product), shape.groups, -1, shape.in_channels)
        if to_columns is not None:
            to_columns[samples] += rows[samples, :, channels].flatten(2)[:, :, None] @ by_group
        if to_rows is not None:
            place = to_rows[samples, :, channels]
            place.copy_((by_group @ columns[samples].mT).view(place.shape))
        if gate is not None:
            assert taps is not None and windows is not None and by_sample is not None and to_windows is not None
            # Of log(sigmoid(z)) the derivative is 1 - sigmoid(z).
            torch.addcmul(product, product, gate, value=-1, out=product)
            place = by_sample[samples, :, :, channels]
            place.copy_((by_group @ windows[samples].mT).mT.reshape(place.shape))
            to_windows[samples] += taps[samples, :, :, channels].flatten(3) @ by_group
    to_context = None
    if to_taps is not None and by_sample is not None and to_windows is not None:
        summed = (by_sample * rows[:, :, None]).sum(0).transpose(0, 1).flatten(1)
        to_taps += summed.T * steepness(shape)
        to_context = _from_windows(to_windows * columns)
    to_channel = None if to_columns is None else to_columns.flatten(1)
    return to_images, [to_channel, *split_rows(None if to_rows is None else to_rows.flatten(1, 2), factors), to_context]


def split_rows(to_rows: Tensor | None, factors: Factors) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to the filter and the spatial factors, from that to their product `(b, C_out, k_h*k_w)`."""
    if to_rows is None:
        return None, None
    to_filter = to_spatial = None
    if factors.filter is not None:
        to_filter = (to_rows if factors.spatial is None else to_rows * factors.spatial[:, None]).sum(2)
    if factors.spatial is not None:
        to_spatial = (to_rows if factors.filter is None else to_rows * factors.filter[..., None]).sum(1)
    return to_filter, to_spatial


def _from_windows(to_windows: Tensor) -> Tensor:
    """Gradient to the context, from that to the windows `(b, groups, taps, C_in/groups)` that show parts of it."""
    to_windows = to_windows.transpose(1, 2).flatten(2)
    batch, count, channels = to_windows.shape
    padded = to_windows.new_zeros(batch, channels + count - 1)
    for tap in range(count):
        padded[:, tap : tap + channels] += to_windows[:, tap]
    return padded[:, count // 2 : count // 2 + channels]


def spectrum_backward(source: Source, to_images: Tensor, counted: Tensor, to_spectra: Tensor) -> Tensor | None:
    """Gradient to the kernel factors of a chunk; that to the spectra, but for their `counts`, is added to `to_spectra`.

    `counted` are the spectra times their `counts`.
    """
    group, kernel, shape = source.group, source.factors.kernel, source.shape
    if kernel is None:
        to_images = to_images.sum(0, keepdim=True)
    rows = shape.out_channels * shape.kernel_size[0]
    to_scaled = torch.view_as_real(torch.fft.rfft2(to_images.view(-1, rows, shape.width)))
    if kernel is None:
        to_spectra += to_scaled
        return None
    tables = kernel.unflatten(1, (len(to_spectra), -1))
    # The shares of the real and of the imaginary part are added up side by side, which saves a pass.
    sums = torch.zeros(tables.shape, dtype=tables.dtype.to_complex(), device=tables.device)
    for samples, rows_ in blocks(len(kernel), rows, 2 * to_scaled.shape[2]):
        own = to_scaled[samples, rows_]
        numbers = group[rows_]
        for position in range(len(to_spectra)):
            products = buffer("products", tuple(own.shape), own.dtype)
            torch.mul(own, counted[position, rows_], out=products)
            gain = _gain(tables[samples, position], numbers)
            for sample, summands in enumerate(torch.view_as_complex(products).flatten(1)):
                sums[samples, position][sample].index_add_(0, numbers.flatten(), summands)
                to_spectra[position, rows_].addcmul_(own[sample], gain[sample])
    return (sums.real + sums.imag).flatten(1)

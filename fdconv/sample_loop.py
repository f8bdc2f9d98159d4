"""The operator for CPUs: a few samples at a time, so that what lies between spectrum and result stays in cache.

A batch of per-sample weights is far larger than any cache: written by one pass and read by the next, it is memory that
costs, and fresh pages. Here a chunk of samples goes all the way from the spectrum through its convolution before the
next one begins, in buffers that are used again. Used weights are forgotten; the backward pass makes them once more.

The mathematics is that of `fdconv.composite`, which serves for second derivatives, too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .composite import (
    Convolution,
    WeightShape,
    channel_windows,
    differentiable_gradients,
    output_size,
    per_sample,
    per_sample_backward,
)
from .cpu import blocks, buffer, is_plain
from .modulation import Factors

CHUNK = 2**19
"""Weights that are made at a time, unless a single sample has more."""


def serves(x: Tensor, spectra: Tensor, factors: Factors) -> bool:
    """True if this path takes the call: real CPU tensors, a weight for every sample, and nobody who traces."""
    return is_plain(x) and spectra.device.type == "cpu" and bool(factors.per_sample)


def apply(
    x: Tensor, spectra: Tensor, group: Tensor, factors: Factors, shape: WeightShape, conv: Convolution | None
) -> Tensor:
    """`per_sample(x, sample_weights(spectra, group, factors, shape).to(x.dtype), conv)`, chunk by chunk.

    Args:
        x: `(B, C_in, H, W)`; without a `Convolution` `(B, ..., C_in)`.
        spectra: `(r, D1, D2h, 2)`, float32 or float64.
        group: `(D1, D2h)`.
        factors: of the modulation, in the dtype of the spectra.
        shape: of the weight.
        conv: what the weight is used in; None for a linear layer.
    """
    # A factor of an input channel or of a filter may as well scale a channel of the input or of the result, often fewer
    # numbers than a sample has weights. It must lose no precision there, and what is left must tell samples apart.
    movable = x.dtype == spectra.dtype and (factors.kernel is not None or factors.context is not None)
    if factors.channel is not None and movable and x[0].numel() <= shape.numel:
        x = x * _along_channels(factors.channel, x, conv)
        factors = factors._replace(channel=None)
    filter_ = None
    if factors.filter is not None and movable and _outputs(x, shape, conv) <= shape.numel:
        filter_, factors = factors.filter, factors._replace(filter=None)
    result: Tensor
    if torch.is_grad_enabled():
        result = _SampleLoop.apply(x, spectra, group, *factors, shape, conv)  # type: ignore[no-untyped-call]
    else:
        result = _forward(x, spectra, group, factors, shape, conv)
    return result if filter_ is None else result * _along_channels(filter_, result, conv)


def _along_channels(factor: Tensor, x: Tensor, conv: Convolution | None) -> Tensor:
    """A factor `(B, C)` so that it broadcasts to `x`."""
    between = (1,) * (x.dim() - 2)
    return factor.view(len(factor), *between, -1) if conv is None else factor.view(len(factor), -1, *between)


def _outputs(x: Tensor, shape: WeightShape, conv: Convolution | None) -> int:
    """Numbers that a sample of the result has."""
    if conv is None:
        return x[0].numel() // shape.in_channels * shape.out_channels
    padded = (length + 2 * padding for length, padding in zip(x.shape[2:], conv.padding, strict=True))
    size = output_size(padded, shape.kernel_size, conv.stride, conv.dilation)
    return shape.out_channels * math.prod(size)


class _SampleLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spectra: Tensor, group: Tensor, *rest: Any) -> Tensor:
        *given, shape, conv = rest
        ctx.save_for_backward(x, spectra, group, *given)
        ctx.shape, ctx.conv = shape, conv
        return _forward(x, spectra, group, Factors(*given), shape, conv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, spectra, group, *given = inputs = ctx.saved_tensors
        factors = Factors(*given)
        wanted = [position for position, need in enumerate(ctx.needs_input_grad[: len(inputs)]) if need]
        if torch.is_grad_enabled():  # somebody will differentiate the gradients
            leaves = [inputs[position] for position in wanted]
            found = differentiable_gradients(grad, x, spectra, group, factors, ctx.shape, ctx.conv, leaves)
            gradients = dict(zip(wanted, found, strict=True))
        else:
            every = _backward(x, spectra, group, factors, ctx.shape, ctx.conv, grad)
            gradients = {position: gradient for position in wanted if (gradient := every[position]) is not None}
        return (*(gradients.get(position) for position in range(len(inputs))), None, None)


def _forward(
    x: Tensor, spectra: Tensor, group: Tensor, factors: Factors, shape: WeightShape, conv: Convolution | None
) -> Tensor:
    source = _Source(spectra, group.int())
    results = []
    for part in _chunks(shape, x.shape[0]):
        chunk = factors.of(part)
        weights = _weights(_images(source, chunk, shape), chunk, shape)
        results.append(per_sample(x[part], weights.to(x.dtype), conv))
    return _joined(results)


def _chunks(shape: WeightShape, batch: int) -> list[slice]:
    """The samples whose weights are made at a time."""
    step = max(1, min(batch, CHUNK // shape.numel))
    return [slice(start, start + step) for start in range(0, batch, step)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# From the spectrum to the weight


class _Source(NamedTuple):
    """What the weights of all samples are made of."""

    spectra: Tensor
    """`(r, D1, D2h, 2)`."""
    group: Tensor
    """`(D1, D2h)`, int32."""


def _images(source: _Source, factors: Factors, shape: WeightShape) -> Tensor:
    """The weights of a chunk before they are modulated in space, `(b, C_out, k_h, k_w, C_in/groups)`, a view."""
    scaled = torch.view_as_complex(_scaled(source, factors.kernel, _scale(factors, shape)))
    image = torch.fft.irfft2(scaled, s=(scaled.shape[1], shape.width))
    k_h, k_w = shape.kernel_size
    image = image.view(-1, shape.out_channels, k_h, shape.in_channels, k_w).transpose(-1, -2)
    return image.expand(factors.batch, -1, -1, -1, -1)


def _scale(factors: Factors, shape: WeightShape) -> float:
    """Of the spectra: twice that of the weights where `_Local` gives half the factors, so that no pass doubles them."""
    return shape.scale if factors.context is None else 2 * shape.scale


def _scaled(source: _Source, kernel: Tensor | None, scale: float) -> Tensor:
    """The spectra scaled group by group, summed over `r`: `(b, D1, D2h, 2)`."""
    ratio, *axes = source.spectra.shape
    if kernel is None:
        return source.spectra.sum(0, keepdim=True) * scale
    scaled = buffer("scaled", (len(kernel), *axes), source.spectra.dtype)
    tables = (kernel * scale).unflatten(1, (ratio, -1))
    for samples, rows in blocks(len(kernel), axes[0], math.prod(axes[1:])):
        for position in range(ratio):
            gain = _gain(tables[samples, position], source.group[rows])
            if position == 0:
                torch.mul(gain, source.spectra[0, rows], out=scaled[samples, rows])
            else:
                scaled[samples, rows].addcmul_(gain, source.spectra[position, rows])
    return scaled


def _gain(table: Tensor, group: Tensor) -> Tensor:
    """The factor of each real and imaginary part, `(b, rows, D2h, 2)`, from those of the groups, `(b, n)`."""
    # Looked up as pairs: half the look-ups, and no factor that broadcasts along an axis of two.
    pairs = torch.complex(table, table)
    found = buffer("gain", (len(table), group.numel()), pairs.dtype)
    for sample, row in enumerate(pairs):
        torch.index_select(row, 0, group.flatten(), out=found[sample])
    return torch.view_as_real(found).view(len(table), *group.shape, 2)


def _weights(images: Tensor, factors: Factors, shape: WeightShape) -> Tensor:
    """The weights of a chunk, `(b, C_out, C_in/groups, k_h, k_w)`, in a buffer that the next chunk writes to."""
    weights = buffer("weights", (len(images), shape.out_channels, shape.in_channels, *shape.kernel_size), images.dtype)
    local, vectors = _Local.of(factors, shape), _Vectors.of(factors, shape)
    for samples, channels in _channel_blocks(len(images), shape):
        image, place = images[samples, channels], weights[samples, channels].permute(0, 1, 3, 4, 2)
        # One position has the weight's own order, so what is multiplied need not be moved afterwards.
        product = place if shape.kernel_size == (1, 1) else buffer("product", tuple(image.shape), image.dtype)
        if local is None:
            product.copy_(image)
        else:
            torch.mul(image, local.gate(samples, channels, shape), out=product)
        vectors.multiply(product, samples, channels, shape)
        if product is not place:
            place.copy_(product)
    return weights


class _Local(NamedTuple):
    """The local branch, ready to give half the factors of a block of weights: `sigmoid(z)`, of `2*sigmoid(z)`.

    `1 + tanh(z)` is `2*sigmoid(2*z)`, so one function serves both activations.
    """

    filters: Tensor
    """`(groups, taps, C_out/groups, k_h*k_w)`: taps first, for a factor of a few taps that broadcasts is slow."""
    windows: Tensor
    """What they see, `(b, groups, taps, C_in/groups)`."""

    @classmethod
    def of(cls, factors: Factors, shape: WeightShape) -> _Local | None:
        if factors.context is None or factors.taps is None:
            return None
        filters = (factors.taps * _steepness(shape)).T.contiguous()
        filters = filters.view(len(filters), shape.groups, -1, math.prod(shape.kernel_size)).transpose(0, 1)
        return cls(filters, channel_windows(factors, shape).contiguous())

    def gate(self, samples: slice, channels: slice, shape: WeightShape) -> Tensor:
        """`(b, C_out, k_h, k_w, C_in/groups)` of a block."""
        filters, windows = self.filters[:, :, channels].flatten(2), self.windows[samples]
        logits = buffer("gate", (*windows.shape[:2], filters.shape[2], windows.shape[3]), windows.dtype)
        torch.matmul(filters.mT, windows, out=logits)
        return logits.sigmoid_().view(len(windows), -1, *shape.kernel_size, shape.in_channels)


def _steepness(shape: WeightShape) -> int:
    return 1 if shape.activation == "sigmoid" else 2


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
        rows = None
        if factors.filter is not None:
            rows = factors.filter[:, :, None]
        if factors.spatial is not None:
            rows = factors.spatial[:, None] if rows is None else rows * factors.spatial[:, None]
        if rows is not None:
            rows = rows.expand(-1, shape.out_channels, math.prod(shape.kernel_size)).unflatten(1, (shape.groups, -1))
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


def _backward(
    x: Tensor,
    spectra: Tensor,
    group: Tensor,
    factors: Factors,
    shape: WeightShape,
    conv: Convolution | None,
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of all tensors that `_SampleLoop` takes."""
    source = _Source(spectra, group.int())
    # The adjoint of the inverse transform of a half spectrum counts what stands for two coefficients twice.
    counts = spectra.new_ones(spectra.shape[2:])
    counts[1 : (shape.width + 1) // 2] = 2
    counts *= _scale(factors, shape) / (spectra.shape[1] * shape.width)
    counted = source._replace(spectra=spectra * counts)
    to_x = []
    to_spectra = torch.zeros_like(spectra)
    to_taps = None if factors.taps is None else torch.zeros_like(factors.taps)
    to_factors = [None if factor is None else torch.empty_like(factor) for factor in factors[:5]]
    for part in _chunks(shape, x.shape[0]):
        chunk = factors.of(part)
        images = _images(source, chunk, shape)
        weights = _weights(images, chunk, shape).to(x.dtype)
        to_part, to_weights = per_sample_backward(grad[part], x[part], weights, conv)
        to_x.append(to_part)
        to_weights = to_weights.to(spectra.dtype)
        to_images, found = _modulation_backward(to_weights, images, chunk, shape, to_taps)
        to_kernel = _spectrum_backward(to_images, counted, chunk.kernel, shape, to_spectra)
        for whole, own in zip(to_factors, [to_kernel, *found], strict=True):
            if whole is not None and own is not None:
                whole[part] = own
    return [_joined(to_x), to_spectra.mul_(counts), None, *to_factors, to_taps]


def _modulation_backward(
    grads: Tensor, images: Tensor, factors: Factors, shape: WeightShape, to_taps: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients to the images and to all factors but that of the spectrum, from that of the weights of a chunk.

    What goes to the short filters, which are the layer's, is added to `to_taps`.
    """
    k_h, k_w = shape.kernel_size
    batch = len(grads)
    to_images = buffer("to images", (batch, shape.out_channels, k_h, shape.in_channels, k_w), grads.dtype)
    local, vectors = _Local.of(factors, shape), _Vectors.of(factors, shape)
    rows, columns = vectors.or_ones(images, shape)
    to_rows = None if vectors.rows is None else torch.empty_like(rows)
    to_columns = None if vectors.columns is None else torch.zeros_like(columns)
    filters, windows, to_filters, to_windows = None, None, None, None
    if local is not None:
        filters, windows = local.filters * rows[:, :, None], local.windows * columns
        to_filters, to_windows = torch.empty_like(filters), torch.zeros_like(windows)
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
            assert filters is not None and windows is not None and to_filters is not None and to_windows is not None
            # Of log(sigmoid(z)) the derivative is 1 - sigmoid(z).
            torch.addcmul(product, product, gate, value=-1, out=product)
            place = to_filters[samples, :, :, channels]
            place.copy_((by_group @ windows[samples].mT).mT.reshape(place.shape))
            to_windows[samples] += filters[samples, :, :, channels].flatten(3) @ by_group
    to_context = None
    if to_taps is not None and to_filters is not None and to_windows is not None:
        taps = (to_filters * rows[:, :, None]).sum(0).transpose(0, 1).flatten(1)
        to_taps += taps.T * _steepness(shape)
        to_context = _from_windows(to_windows * columns)
    to_channel = None if to_columns is None else to_columns.flatten(1)
    return to_images, [to_channel, *_from_rows(to_rows, factors), to_context]


def _from_rows(to_rows: Tensor | None, factors: Factors) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to the filter and the spatial factors, from that to their product."""
    if to_rows is None:
        return None, None
    to_rows = to_rows.flatten(1, 2)
    to_filter = to_spatial = None
    if factors.filter is not None:
        to_filter = (to_rows if factors.spatial is None else to_rows * factors.spatial[:, None]).sum(2)
    if factors.spatial is not None:
        to_spatial = (to_rows if factors.filter is None else to_rows * factors.filter[..., None]).sum(1)
    return to_filter, to_spatial


def _from_windows(to_windows: Tensor) -> Tensor:
    """Gradient to the context, from that to the windows `(b, groups, taps, C_in/groups)` that show parts of it."""
    to_windows = to_windows.transpose(1, 2).flatten(2)
    batch, taps, channels = to_windows.shape
    padded = to_windows.new_zeros(batch, channels + taps - 1)
    for tap in range(taps):
        padded[:, tap : tap + channels] += to_windows[:, tap]
    return padded[:, taps // 2 : taps // 2 + channels]


def _spectrum_backward(
    to_images: Tensor, counted: _Source, kernel: Tensor | None, shape: WeightShape, to_spectra: Tensor
) -> Tensor | None:
    """Gradient to the kernel factors of a chunk; that to the spectra, but for their `counts`, is added to `to_spectra`.

    `counted` has the spectra times their `counts`.
    """
    if kernel is None:
        to_images = to_images.sum(0, keepdim=True)
    rows = shape.out_channels * shape.kernel_size[0]
    to_scaled = torch.view_as_real(torch.fft.rfft2(to_images.view(-1, rows, shape.width)))
    if kernel is None:
        to_spectra += to_scaled
        return None
    tables = kernel.unflatten(1, (len(to_spectra), -1))
    # The shares of the real and of the imaginary part are added up side by side, which saves a pass.
    sums = torch.zeros(tables.shape, dtype=tables.dtype.to_complex())
    for samples, rows_ in blocks(len(kernel), rows, 2 * to_scaled.shape[2]):
        own = to_scaled[samples, rows_]
        group = counted.group[rows_]
        for position in range(len(to_spectra)):
            products = buffer("products", tuple(own.shape), own.dtype)
            torch.mul(own, counted.spectra[position, rows_], out=products)
            gain = _gain(tables[samples, position], group)
            for sample, summands in enumerate(torch.view_as_complex(products).flatten(1)):
                sums[samples, position][sample].index_add_(0, group.flatten(), summands)
                to_spectra[position, rows_].addcmul_(own[sample], gain[sample])
    return (sums.real + sums.imag).flatten(1)

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
    global_factors,
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
    result: Tensor = _SampleLoop.apply(x, spectra, group, *factors, shape, conv)  # type: ignore[no-untyped-call]
    return result


class _SampleLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spectra: Tensor, group: Tensor, *rest: Any) -> Tensor:
        *given, shape, conv = rest
        factors = Factors(*given)
        ctx.save_for_backward(x, spectra, group, *factors)
        ctx.shape, ctx.conv = shape, conv
        source = _Source(spectra, group.int())
        results = []
        for part in _chunks(shape, x.shape[0]):
            chunk = factors.of(part)
            weights = _weights(_images(source, chunk, shape), chunk, shape)
            results.append(per_sample(x[part], weights.to(x.dtype), conv))
        return _joined(results)

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
    scaled = torch.view_as_complex(_scaled(source, factors.kernel, shape.scale))
    image = torch.fft.irfft2(scaled, s=(scaled.shape[1], shape.width))
    k_h, k_w = shape.kernel_size
    image = image.view(-1, shape.out_channels, k_h, shape.in_channels, k_w).transpose(-1, -2)
    return image.expand(factors.batch, -1, -1, -1, -1)


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
    local, globally = _Local.of(factors, shape), global_factors(factors, shape)
    factors_of_all = globally if local is not None else globally[1:]
    for samples, channels in _channel_blocks(len(images), shape):
        image, place = images[samples, channels], weights[samples, channels].permute(0, 1, 3, 4, 2)
        # One position has the weight's own order, so what is multiplied need not be moved afterwards.
        product = place if shape.kernel_size == (1, 1) else buffer("product", tuple(image.shape), image.dtype)
        if local is not None:
            torch.mul(image, local.gate(samples, channels, shape), out=product)
        elif globally:
            torch.mul(image, _part(globally[0], samples, channels), out=product)
        else:
            product.copy_(image)
        for factor in factors_of_all:
            product.mul_(_part(factor, samples, channels))
        if product is not place:
            place.copy_(product)
    return weights


class _Local(NamedTuple):
    """The local branch, ready to give the factors of a block of weights."""

    filters: Tensor
    """`(groups, C_out/groups, k_h*k_w, taps)`."""
    windows: Tensor
    """What they see, `(b, groups, taps, C_in/groups)`."""

    @classmethod
    def of(cls, factors: Factors, shape: WeightShape) -> _Local | None:
        if factors.context is None or factors.taps is None:
            return None
        filters = factors.taps.view(shape.groups, -1, math.prod(shape.kernel_size), factors.taps.shape[1])
        return cls(filters, channel_windows(factors, shape))

    def gate(self, samples: slice, channels: slice, shape: WeightShape) -> Tensor:
        """`(b, C_out, k_h, k_w, C_in/groups)` of a block."""
        filters, windows = self.filters[:, channels].flatten(1, 2), self.windows[samples]
        logits = buffer("gate", (*windows.shape[:2], filters.shape[1], windows.shape[3]), windows.dtype)
        torch.matmul(filters, windows, out=logits)
        gate = logits.sigmoid_().mul_(2) if shape.activation == "sigmoid" else logits.tanh_().add_(1)
        return gate.view(len(windows), -1, *shape.kernel_size, shape.in_channels)


def _part(factor: Tensor, samples: slice, channels: slice) -> Tensor:
    """What a factor that may broadcast over the output channels has for a block."""
    return factor[samples] if factor.shape[1] == 1 else factor[samples, channels]


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
        to_kernel = _spectrum_backward(to_images, source, chunk.kernel, shape, to_spectra)
        for whole, own in zip(to_factors, [to_kernel, *found], strict=True):
            if whole is not None and own is not None:
                whole[part] = own
    return [_joined(to_x), to_spectra, None, *to_factors, to_taps]


def _modulation_backward(
    grads: Tensor, images: Tensor, factors: Factors, shape: WeightShape, to_taps: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients to the images and to all factors but that of the spectrum, from that of the weights of a chunk.

    What goes to the short filters, which are the layer's, is added to `to_taps`.
    """
    k_h, k_w = shape.kernel_size
    batch = len(grads)
    to_images = buffer("to images", (batch, shape.out_channels, k_h, shape.in_channels, k_w), grads.dtype)
    local, globally = _Local.of(factors, shape), global_factors(factors, shape)
    to_windows = None if local is None else torch.zeros_like(local.windows)
    to_rows = None if factors.channel is None else grads.new_empty(batch, shape.out_channels, k_h * k_w)
    to_channel = None if factors.channel is None else torch.zeros_like(factors.channel)
    for samples, channels in _channel_blocks(batch, shape):
        image = images[samples, channels]
        grad = buffer("grad", tuple(image.shape), grads.dtype)
        grad.copy_(grads[samples, channels].permute(0, 1, 3, 4, 2))
        product = torch.mul(grad, image, out=buffer("product", tuple(image.shape), grads.dtype))
        own = [_part(factor, samples, channels) for factor in globally]
        for factor in own:
            grad.mul_(factor)
        gate = None if local is None else local.gate(samples, channels, shape)
        if gate is not None:
            grad.mul_(gate)
            product.mul_(gate)
        to_images[samples, channels] = grad.transpose(-1, -2)
        # `product` is gradient times weight, but for the global factors: its sums are their gradients.
        if to_channel is not None and to_rows is not None:
            assert factors.channel is not None
            by_group = product.view(len(product), shape.groups, -1, shape.in_channels)
            rows = own[0] if len(own) == 2 else product.new_ones(1, 1, 1, 1, 1)
            rows = rows.expand(*product.shape[:4], 1).reshape(len(product), shape.groups, 1, -1)
            to_channel[samples] += (rows @ by_group).view(len(product), -1)
            channel = factors.channel[samples].view(len(product), shape.groups, shape.in_channels, 1)
            to_rows[samples, channels] = (by_group @ channel).view(len(product), -1, k_h * k_w)
        if local is not None and gate is not None and to_windows is not None and to_taps is not None:
            for factor in own:
                product.mul_(factor)
            # Of log(2*sigmoid(z)) the derivative is 1 - gate/2, of log(1 + tanh(z)) it is 2 - gate.
            torch.addcmul(product, product, gate, value=-0.5, out=product)
            if shape.activation != "sigmoid":
                product.mul_(2)
            to_logits = product.view(len(product), shape.groups, -1, shape.in_channels)
            filters, windows = local.filters[:, channels].flatten(1, 2), local.windows[samples]
            to_filters = to_taps.view(local.filters.shape)[:, channels]
            to_filters += (to_logits @ windows.transpose(-1, -2)).sum(0).view(to_filters.shape)
            to_windows[samples] += filters.transpose(-1, -2) @ to_logits
    to_context = None if to_windows is None else _from_windows(to_windows)
    return to_images, [to_channel, *_from_rows(to_rows, factors), to_context]


def _from_rows(to_rows: Tensor | None, factors: Factors) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to the filter and the spatial factors, from that to their product."""
    to_filter = to_spatial = None
    if to_rows is not None and factors.filter is not None:
        to_filter = (to_rows if factors.spatial is None else to_rows * factors.spatial[:, None]).sum(2)
    if to_rows is not None and factors.spatial is not None:
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
    to_images: Tensor, source: _Source, kernel: Tensor | None, shape: WeightShape, to_spectra: Tensor
) -> Tensor | None:
    """Gradient to the kernel factors of a chunk; that to the spectra is added to `to_spectra`."""
    if kernel is None:
        to_images = to_images.sum(0, keepdim=True)
    rows = shape.out_channels * shape.kernel_size[0]
    # The adjoint of the inverse transform of a half spectrum counts what stands for two coefficients twice.
    transform = torch.fft.rfft2(to_images.view(-1, rows, shape.width))
    transform[..., 1 : (shape.width + 1) // 2].mul_(2)
    to_scaled = torch.view_as_real(transform).mul_(shape.scale / (rows * shape.width))
    if kernel is None:
        to_spectra += to_scaled
        return None
    tables = kernel.unflatten(1, (len(to_spectra), -1))
    # The shares of the real and of the imaginary part are added up side by side, which saves a pass.
    sums = torch.zeros(tables.shape, dtype=transform.dtype)
    for samples, rows_ in blocks(len(kernel), rows, 2 * to_scaled.shape[2]):
        own = to_scaled[samples, rows_]
        group = source.group[rows_]
        for position in range(len(to_spectra)):
            products = buffer("products", tuple(own.shape), own.dtype)
            torch.mul(own, source.spectra[position, rows_], out=products)
            gain = _gain(tables[samples, position], group)
            for sample, summands in enumerate(torch.view_as_complex(products).flatten(1)):
                sums[samples, position][sample].index_add_(0, group.flatten(), summands)
                to_spectra[position, rows_].addcmul_(own[sample], gain[sample])
    return (sums.real + sums.imag).flatten(1)

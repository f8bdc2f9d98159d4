"""The operator for CPUs: a few samples at a time, so that what lies between spectrum and result stays in cache.

A batch of per-sample weights is far larger than any cache: written by one pass and read by the next, it is memory that
costs, and fresh pages. Here a chunk of samples goes all the way from the spectrum through its convolution before the
next one begins, in buffers that are used again. Used weights are forgotten; the backward pass makes them once more.

The mathematics is that of `fdconv.reference`, which serves for second derivatives, too.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ..modulation import Factors
from ..reference import (
    Convolution,
    WeightShape,
    convolved_size,
    differentiable_gradients,
    per_sample,
    per_sample_backward,
)
from ..spectrum import column_factors
from ..strides import owned
from ..tracing import wants_operations
from .torch_steps import spectra_scale
from .workspace import is_plain

CHUNK = 2**19
"""Weights that are made at a time, unless a single sample has more."""


class Steps(Protocol):
    """What is done for each chunk, forward and backward: `fdconv.cpu.torch_steps` or `fdconv.cpu.compiled_steps`."""

    def source(self, spectra: Tensor, group: Tensor, factors: Factors, shape: WeightShape, /) -> Any: ...

    def images(self, source: Any, /) -> Tensor: ...

    def weights(self, source: Any, images: Tensor, /) -> Tensor: ...

    def modulation_backward(
        self, source: Any, grads: Tensor, images: Tensor, to_taps: Tensor | None, /
    ) -> tuple[Tensor, list[Tensor | None]]: ...

    def spectrum_backward(
        self, source: Any, to_images: Tensor, counted: Tensor, to_spectra: Tensor, /
    ) -> Tensor | None: ...


def serves(x: Tensor, spectra: Tensor, factors: Factors) -> bool:
    """True if this path takes the call: real CPU tensors, a weight for every sample, and nobody who traces."""
    if not (is_plain(x) and spectra.device.type == "cpu"):  # asked first, for a tracer may not take the rest
        return False
    return bool(factors.per_sample) and factors.batch == x.shape[0]


def apply(
    x: Tensor,
    spectra: Tensor,
    group: Tensor,
    factors: Factors,
    shape: WeightShape,
    conv: Convolution | None,
    steps: Steps,
) -> Tensor:
    """`per_sample(x, sample_weights(spectra, group, factors, shape).to(x.dtype), conv)`, chunk by chunk.

    Args:
        x: `(B, C_in, H, W)`; without a `Convolution` `(B, ..., C_in)`.
        spectra: `(r, D1, D2h, 2)`, float32 or float64.
        group: `(D1, D2h)`.
        factors: of the modulation, in the dtype of the spectra.
        shape: of the weight.
        conv: what the weight is used in; None for a linear layer.
        steps: `fdconv.cpu.torch_steps` or `fdconv.cpu.compiled_steps`.
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
        result = _SampleLoop.apply(x, spectra, group, *factors, shape, conv, steps)  # type: ignore[no-untyped-call]
    else:
        result = _forward(x, steps.source(spectra, group, factors, shape), conv, steps)
    return result if filter_ is None else result * _along_channels(filter_, result, conv)


def _along_channels(factor: Tensor, x: Tensor, conv: Convolution | None) -> Tensor:
    """A factor `(B, C)` so that it broadcasts to `x`."""
    between = (1,) * (x.dim() - 2)
    return factor.view(len(factor), *between, -1) if conv is None else factor.view(len(factor), -1, *between)


def _outputs(x: Tensor, shape: WeightShape, conv: Convolution | None) -> int:
    """Numbers that a sample of the result has."""
    if conv is None:
        return x[0].numel() // shape.in_channels * shape.out_channels
    return shape.out_channels * math.prod(convolved_size(x.shape[2:], shape.kernel_size, conv))


class _SampleLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spectra: Tensor, group: Tensor, *rest: Any) -> Tensor:
        *given, shape, conv, steps = rest
        ctx.save_for_backward(x, spectra, group, *given)
        ctx.settings = shape, conv, steps
        return owned(_forward(x, steps.source(spectra, group, Factors(*given), shape), conv, steps))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, spectra, group, *given = inputs = ctx.saved_tensors
        factors = Factors(*given)
        shape, conv, steps = ctx.settings
        wanted = [position for position, need in enumerate(ctx.needs_input_grad[: len(inputs)]) if need]
        if wants_operations(grad):
            leaves = [inputs[position] for position in wanted]
            found = differentiable_gradients(grad, x, spectra, group, factors, shape, conv, leaves)
            gradients = dict(zip(wanted, found, strict=True))
        else:
            every = _backward(x, spectra, group, factors, shape, conv, steps, grad)
            gradients = {position: gradient for position in wanted if (gradient := every[position]) is not None}
        return (*(gradients.get(position) for position in range(len(inputs))), None, None, None)


def _forward(x: Tensor, source: Any, conv: Convolution | None, steps: Steps) -> Tensor:
    results = []
    for part in _chunks(source.shape, x.shape[0]):
        chunk = source.of(part)
        weights = steps.weights(chunk, steps.images(chunk))
        results.append(per_sample(x[part], weights.to(x.dtype), conv))
    return _joined(results)


def _chunks(shape: WeightShape, batch: int) -> list[slice]:
    """The samples whose weights are made at a time."""
    step = max(1, min(batch, CHUNK // shape.numel))
    return [slice(start, start + step) for start in range(0, batch, step)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# And back


def _backward(
    x: Tensor,
    spectra: Tensor,
    group: Tensor,
    factors: Factors,
    shape: WeightShape,
    conv: Convolution | None,
    steps: Steps,
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of all tensors that `_SampleLoop` takes."""
    source = steps.source(spectra, group, factors, shape)
    # The adjoint of the inverse transform of a half spectrum counts what stands for two coefficients twice.
    scale = spectra_scale(factors, shape) / (spectra.shape[1] * shape.width)
    counts = column_factors(shape.width, 2 * scale, shape.edge / 2, spectra)
    counted = (spectra * counts).contiguous()
    to_x = []
    to_spectra = torch.zeros_like(spectra, memory_format=torch.contiguous_format)
    to_taps = None if factors.taps is None else torch.zeros_like(factors.taps)
    to_factors = [None if factor is None else torch.empty_like(factor) for factor in factors.every_per_sample]
    for part in _chunks(shape, x.shape[0]):
        chunk = source.of(part)
        images = steps.images(chunk)
        weights = steps.weights(chunk, images).to(x.dtype)
        to_part, to_weights = per_sample_backward(grad[part], x[part], weights, conv)
        to_x.append(to_part)
        to_weights = to_weights.to(spectra.dtype)
        to_images, found = steps.modulation_backward(chunk, to_weights, images, to_taps)
        to_kernel = steps.spectrum_backward(chunk, to_images, counted, to_spectra)
        for whole, own in zip(to_factors, [to_kernel, *found], strict=True):
            if whole is not None and own is not None:
                whole[part] = own
    return [_joined(to_x), to_spectra.mul_(counts), None, *to_factors, to_taps]

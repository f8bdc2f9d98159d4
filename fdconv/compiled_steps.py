"""The steps of the loop over samples by compiled kernels, each in one pass over memory: see `fdconv.sample_loop`.

`fdconv.torch_steps` has the same functions. Complex transforms run along the last axis of spectra that lie transposed,
for the library reads and writes those along another one several times slower.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cpu_kernels
from .composite import WeightShape
from .cpu import buffer
from .modulation import Factors
from .torch_steps import spectra_scale, split_rows, steepness


def serves(spectra: Tensor, factors: Factors) -> bool:
    """True if these steps can be taken: in float32, with factors of the frequency groups, where kernels compile."""
    return spectra.dtype == torch.float32 and factors.kernel is not None and cpu_kernels.reason_missing() is None


def index(group: Tensor) -> Tensor:
    """The groups of the coefficients `(D1, D2h)` as these steps look them up."""
    return group.contiguous()


def images(spectra: Tensor, group: Tensor, factors: Factors, shape: WeightShape) -> Tensor:
    """The weights of a chunk before they are modulated in space, as images `(b, D1, D2)`."""
    assert factors.kernel is not None
    samples, (ratio, rows, columns, _) = len(factors.kernel), spectra.shape
    across = buffer("spectra", (samples, columns, rows, 2), spectra.dtype)
    tables = (factors.kernel * spectra_scale(factors, shape)).view(samples, ratio, -1)
    cpu_kernels.scale(spectra.contiguous(), group, tables, across)
    halfway = torch.fft.ifft(torch.view_as_complex(across), dim=2)
    scaled = across.view(samples, rows, columns, 2)  # what was there is no longer needed
    cpu_kernels.transpose(torch.view_as_real(halfway), scaled)
    return torch.fft.irfft(torch.view_as_complex(scaled), shape.width, dim=2)


def weights(images: Tensor, factors: Factors, shape: WeightShape) -> Tensor:
    """The weights of a chunk, `(b, C_out, C_in/groups, k_h, k_w)`, in a buffer that the next chunk writes to."""
    made = buffer("weights", (len(images), shape.out_channels, shape.in_channels, *shape.kernel_size), images.dtype)
    cpu_kernels.modulate(_modulation(factors, shape), images, made)
    return made


def _modulation(factors: Factors, shape: WeightShape) -> cpu_kernels.Modulation:
    positions, one = math.prod(shape.kernel_size), torch.ones(1)
    rows = (one if factors.filter is None else factors.filter)[..., None]
    if factors.spatial is not None:
        rows = rows * factors.spatial[:, None]
    columns = one if factors.channel is None else factors.channel
    context = shorts = None
    if factors.context is not None and factors.taps is not None:
        half = factors.taps.shape[1] // 2
        context, shorts = F.pad(factors.context, (half, half)), factors.taps.T * steepness(shape)
    return cpu_kernels.Modulation.of(
        shape,
        context,
        shorts,
        rows.expand(factors.batch, shape.out_channels, positions),
        columns.expand(factors.batch, shape.groups * shape.in_channels),
    )


def modulation_backward(
    grads: Tensor, images: Tensor, factors: Factors, shape: WeightShape, to_taps: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients to the images and to all factors but that of the spectrum, from that of the weights of a chunk.

    What goes to the short filters, which are the layer's, is added to `to_taps`.
    """
    to_images = buffer("to images", tuple(images.shape), images.dtype)
    to_rows, to_columns, to_shorts, to_context = cpu_kernels.modulate_backward(
        _modulation(factors, shape), grads.contiguous(), images, to_images
    )
    if to_taps is not None and to_shorts is not None and to_context is not None:
        to_taps.add_(to_shorts.T, alpha=steepness(shape))
        half = to_taps.shape[1] // 2
        to_context = to_context[:, half : half + shape.groups * shape.in_channels]
    to_channel = None if factors.channel is None else to_columns
    return to_images, [to_channel, *split_rows(to_rows, factors), to_context]


def spectrum_backward(
    to_images: Tensor,
    counted: Tensor,
    group: Tensor,
    kernel: Tensor | None,
    shape: WeightShape,
    to_spectra: Tensor,
) -> Tensor | None:
    """Gradient to the kernel factors of a chunk; that to the spectra, but for their `counts`, is added to `to_spectra`.

    `counted` are the spectra times their `counts`.
    """
    assert kernel is not None
    samples, (ratio, rows, columns, _) = len(kernel), counted.shape
    halfway = torch.fft.rfft(to_images, dim=2)
    across = buffer("spectra", (samples, columns, rows, 2), counted.dtype)
    cpu_kernels.transpose(torch.view_as_real(halfway), across)
    to_scaled = torch.view_as_real(torch.fft.fft(torch.view_as_complex(across), dim=2))
    tables = kernel.reshape(samples, ratio, -1).contiguous()
    return cpu_kernels.scale_backward(to_scaled, counted, group, tables, to_spectra).flatten(1)

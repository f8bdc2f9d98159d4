"""The steps of the loop over samples by compiled kernels, each in one pass over memory: see `fdconv.cpu.sample_loop`.

`fdconv.cpu.torch_steps` has the same functions. Complex transforms run along the last axis of spectra that lie
transposed, for the library takes longer along another one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modulation import Factors
from ..reference import WeightShape
from . import kernels
from .torch_steps import row_factors, spectra_scale, split_rows, steepness
from .workspace import buffer


def serves(spectra: Tensor, factors: Factors) -> bool:
    """True if these steps can be taken: in float32, with factors of the frequency groups, where kernels compile."""
    return spectra.dtype == torch.float32 and factors.kernel is not None and kernels.reason_missing() is None


class Source(NamedTuple):
    """What weights are made of. All is float32 and contiguous."""

    spectra: Tensor
    """`(r, D1, D2h, 2)`, or `(r, 1, D2h*D1, 2)` of a spectrum that lies transposed."""
    group: Tensor
    """`(D1, D2h)`, or `(1, D2h*D1)`."""
    tables: Tensor
    """`(b, r, n)`, the factors of the groups."""
    factors: Factors
    shape: WeightShape
    context: Tensor | None
    """`(b, C_in + taps - 1)`, what the taps slide along."""
    taps: Tensor | None
    """`(taps, C_out*k_h*k_w)`, those of the local branch."""
    rows: Tensor
    """`(b, C_out, k_h*k_w)`, filter times spatial."""
    columns: Tensor
    """`(b, C_in)`."""

    def of(self, samples: slice) -> Source:
        """What those of some of the samples are made of."""
        if samples == slice(0, len(self.tables)):
            return self
        return self._replace(
            tables=self.tables[samples],
            factors=self.factors.of(samples),
            context=None if self.context is None else self.context[samples],
            rows=self.rows[samples],
            columns=self.columns[samples],
        )

    @property
    def modulation(self) -> kernels.Modulation:
        return kernels.Modulation.of(self.shape, self.context, self.taps, self.rows, self.columns)


def source(spectra: Tensor, group: Tensor, factors: Factors, shape: WeightShape) -> Source:
    """What the weights of all samples are made of."""
    assert factors.kernel is not None
    tables = _tables(factors.kernel * spectra_scale(factors, shape), len(spectra))
    context = taps = None
    if factors.context is not None and factors.taps is not None:
        half = factors.taps.shape[1] // 2
        context, taps = F.pad(factors.context, (half, half)), (factors.taps.T * steepness(shape)).contiguous()
    rows, columns = row_factors(factors, shape), factors.channel
    if rows is None:
        rows = tables.new_ones(len(tables), shape.out_channels, math.prod(shape.kernel_size))
    if columns is None:
        columns = tables.new_ones(len(tables), shape.groups * shape.in_channels)
    if spectra.transpose(1, 2).is_contiguous() and group.T.is_contiguous():  # nothing need be transposed
        spectra, group = spectra.transpose(1, 2).view(len(spectra), 1, -1, 2), group.T.view(1, -1)
    return Source(
        spectra.contiguous(),
        group.contiguous(),
        tables,
        factors,
        shape,
        None if context is None else context.contiguous(),
        taps,
        rows.contiguous(),
        columns.contiguous(),
    )


def _tables(kernel: Tensor, ratio: int) -> Tensor:
    """`(b, r*n)` as `(b, r, n)`, contiguous."""
    return kernel.reshape(len(kernel), ratio, -1).contiguous()


def _axes(shape: WeightShape) -> tuple[int, int]:
    """`D1` and `D2h`."""
    return shape.out_channels * shape.kernel_size[0], shape.width // 2 + 1


def images(source: Source) -> Tensor:
    """The weights of a chunk before they are modulated in space, as images `(b, D1, D2)`."""
    samples, (rows, columns) = len(source.tables), _axes(source.shape)
    across = buffer("spectra", (samples, columns, rows, 2), torch.float32)
    edges = kernels.Edges.of(source.shape, turned=len(source.group) == 1)
    kernels.scale(source.spectra, source.group, source.tables, edges, across)
    halfway = torch.fft.ifft(torch.view_as_complex(across), dim=2).contiguous()
    scaled = across.view(samples, rows, columns, 2)  # what was there is no longer needed
    kernels.transpose(torch.view_as_real(halfway), scaled)
    return torch.fft.irfft(torch.view_as_complex(scaled), source.shape.width, dim=2).contiguous()


def weights(source: Source, images: Tensor) -> Tensor:
    """The weights of a chunk, `(b, C_out, C_in/groups, k_h, k_w)`, in a buffer that the next chunk writes to."""
    shape = source.shape
    size = (len(images), shape.out_channels, shape.in_channels, *shape.kernel_size)
    made = buffer("weights", size, torch.float32)
    kernels.modulate(source.modulation, images, made)
    return made


def modulation_backward(
    source: Source, grads: Tensor, images: Tensor, to_taps: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients to the images and to all factors but that of the spectrum, from that of the weights of a chunk.

    What goes to the taps, which are the layer's, is added to `to_taps`.
    """
    factors, shape = source.factors, source.shape
    to_images = buffer("to images", tuple(images.shape), images.dtype)
    to_rows, to_columns, of_chunk, to_context = kernels.modulate_backward(
        source.modulation, grads.contiguous(), images, to_images
    )
    if to_taps is not None and of_chunk is not None and to_context is not None:
        to_taps.add_(of_chunk.T, alpha=steepness(shape))
        half = to_taps.shape[1] // 2
        to_context = to_context[:, half : half + shape.groups * shape.in_channels]
    to_channel = None if factors.channel is None else to_columns
    return to_images, [to_channel, *split_rows(to_rows, factors), to_context]


def spectrum_backward(source: Source, to_images: Tensor, counted: Tensor, to_spectra: Tensor) -> Tensor | None:
    """Gradient to the kernel factors of a chunk; that to the spectra, but for their `counts`, is added to `to_spectra`.

    `counted` are the spectra times their `counts`.
    """
    samples, (rows, columns) = len(source.tables), _axes(source.shape)
    halfway = torch.fft.rfft(to_images, dim=2).contiguous()
    across = buffer("spectra", (samples, columns, rows, 2), torch.float32)
    kernels.transpose(torch.view_as_real(halfway), across)
    to_scaled = torch.view_as_real(torch.fft.fft(torch.view_as_complex(across), dim=2).contiguous())
    assert source.factors.kernel is not None
    tables = _tables(source.factors.kernel, ratio=source.tables.shape[1])
    group = source.group if len(source.group) == rows else source.group.view(columns, rows).T.contiguous()
    return kernels.scale_backward(to_scaled, counted, group, tables, to_spectra).flatten(1)

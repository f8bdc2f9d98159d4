"""What a dynamic layer costs, by component, and the formulas by which `torch.utils.flop_counter` counts it.

The unit is the multiply-add: one product, with the addition to a sum that may follow it; torch counts it as 2 FLOPs.
Products are counted, wherever they are; what comes without one is not: means, biases, norms, the exponentials of gates.
The Fourier transform of `N` real numbers counts as `5/2 * N*log2(N)` FLOPs, that of `N` complex ones as twice as many,
on any number of axes and for any `N`, as FFTW's benchmarks have it (https://www.fftw.org/speed/method.html).

Importing this module, which `import fdconv` does, registers formulas for Fourier transforms, of which torch has none,
for the fused kernels, and for the gradients of a grouped convolution, so that
`torch.utils.flop_counter.FlopCounterMode` counts what `LayerCost` names, but for what is elementwise: of that torch
counts nothing. The counter sees the mathematics (`fdconv.reference`), not that some paths make their weights a second
time for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2, prod
from typing import Any

import torch

from .config import FDConfig
from .import_hook import on_import
from .layers import FDConv2d, FDLinear
from .modulation import GlobalModulation
from .reference import output_size

FLOPS_PER_REAL_POINT = 2.5
"""FLOPs of a Fourier transform for each real number and each doubling of their number."""


@dataclass(frozen=True)
class LayerCost:
    """Multiply-adds of a dynamic layer for one sample, by component.

    Examples:
        >>> from fdconv import FDConv2d, layer_cost
        >>> cost = layer_cost(FDConv2d(64, 64, 3, padding=1), (64, 56, 56))
        >>> f"{cost.added / cost.convolution:.0%}"
        '26%'
    """

    convolution: int
    """The convolution or matrix product itself: what the static layer costs."""
    heads: int
    """The linear maps that compute the global attention (KSM)."""
    spectrum: int
    """Scaling the spectra group by group (FDW). Elementwise."""
    inverse_transform: int
    """From the spectrum to the weight (FDW)."""
    local: int
    """The taps of the local branch (KSM)."""
    products: int
    """The weight times its factors. Elementwise."""
    band_maps: int
    """The 3x3 convolutions that give the maps (FBM)."""
    band_transforms: int
    """Low-passing the input (FBM)."""
    band_products: int
    """The low-passed inputs times their maps (FBM). Elementwise."""

    @property
    def elementwise(self) -> int:
        """What `FlopCounterMode` leaves out."""
        return self.spectrum + self.products + self.band_products

    @property
    def total(self) -> int:
        """All components."""
        return self.convolution + self.added

    @property
    def added(self) -> int:
        """What the static layer does not cost."""
        transforms = self.inverse_transform + self.band_transforms
        return self.heads + self.local + self.band_maps + transforms + self.elementwise


def layer_cost(layer: FDConv2d | FDLinear, sample_shape: Sequence[int]) -> LayerCost:
    """Count the multiply-adds of a layer for one sample.

    More samples cost as many times as much, but for what they share: the spectrum and its transform where no attention
    scales them, and the matrices of learned band edges.

    Args:
        layer: on any device, meta included.
        sample_shape: of the layer's input without the batch axis: `(C_in, H, W)`, or `(..., C_in)` for `FDLinear`.

    Examples:
        >>> from fdconv import FDLinear, layer_cost
        >>> layer_cost(FDLinear(64, 256), (49, 64))
        LayerCost(convolution=802816, heads=7168, spectrum=16896, ...)
    """
    out_channels, in_channels, k_h, k_w = layer._kernel_shape()
    weights = out_channels * in_channels * k_h * k_w
    ksm, local, bands = layer.KSM_Global, layer.KSM_Local, layer.FBM
    return LayerCost(
        convolution=_positions(layer, sample_shape) * weights,
        heads=0 if ksm is None else sum(head.weight.numel() for head in _linear_maps(ksm)),
        spectrum=layer.dft_weight.numel(),
        inverse_transform=round(_real_transform_flops(weights) / 2),
        local=0 if local is None else weights * local.taps.shape[1],
        products=weights * _factors(layer),
        band_maps=0 if bands is None else 9 * prod(sample_shape) * len(bands.freq_weight_conv_list),
        band_transforms=0 if bands is None else band_transforms(sample_shape, layer.config),
        band_products=0 if bands is None else prod(sample_shape) * (1 + len(layer.config.bands)),
    )


def band_transforms(shape: Sequence[int], config: FDConfig) -> int:
    """Multiply-adds of all low-passes of a feature map `(C, H, W)`.

    The exact ones are products with nested bases, from the right: `rows.T @ (x @ columns)` once, and for each band
    `rows @ (kept @ columns.T)` with the first rows and columns. Where edges move, a band has a square matrix for each
    axis, made of the whole basis. The interpolated ones are one Fourier transform and an inverse one for each band.
    """
    channels, height, width = shape
    if config.band_mask == "interpolated":
        transforms = channels * (1 + len(config.bands))
        return round(transforms * _real_transform_flops(height * width) / 2)
    if config.band_edges != "fixed":
        edges = channels if config.band_edges == "dynamic" else 0
        matrices = height**3 + width**3
        return len(config.bands) * (edges + matrices + channels * height * width * (height + width))
    ranks = [(1 + 2 * (height // (2 * k)), 1 + 2 * (width // (2 * k))) for k in config.bands]
    rows, columns = ranks[0]
    analysis = (height * width + rows * height) * columns
    synthesis = sum((rows * columns + height * rows) * width for rows, columns in ranks)
    return channels * (analysis + synthesis)


def _positions(layer: FDConv2d | FDLinear, sample_shape: Sequence[int]) -> int:
    """Number of times that each weight is used."""
    if isinstance(layer, FDLinear):
        return prod(sample_shape[:-1])
    left, right, top, bottom = layer._pads()
    padded = (sample_shape[-2] + top + bottom, sample_shape[-1] + left + right)
    return prod(output_size(padded, layer.kernel_size, layer.stride, layer.dilation))


def _linear_maps(ksm: GlobalModulation) -> list[Any]:
    maps = (ksm.fc, ksm.channel_fc, ksm.filter_fc, ksm.spatial_fc, ksm.kernel_fc)
    return [one for one in maps if one is not None]


def _factors(layer: FDConv2d | FDLinear) -> int:
    """How often each weight is multiplied: the factors of filters and kernel positions are one, for they are small."""
    ksm = layer.KSM_Global
    rows = ksm is not None and (ksm.filter_fc is not None or ksm.spatial_fc is not None)
    return (layer.KSM_Local is not None) + (ksm is not None) + rows


def _real_transform_flops(points: int) -> float:
    return FLOPS_PER_REAL_POINT * points * log2(points)


# For torch's counter: the operator's arguments, with shapes in place of tensors, to FLOPs


def _real_to_complex(x: Sequence[int], dim: Sequence[int], *_: Any, **__: Any) -> int:
    return _transform_flops(x, dim)


def _complex_to_real(_x: Sequence[int], dim: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return _transform_flops(out_shape, dim)


def _complex_to_complex(x: Sequence[int], dim: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _transform_flops(x, dim)


def _transform_flops(shape: Sequence[int], dim: Sequence[int]) -> int:
    points = prod(shape[axis] for axis in dim)
    return round(prod(shape) // points * _real_transform_flops(points)) if points else 0


def _convolution_backward(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """Either gradient takes the products of the convolution itself."""
    return 2 * prod(x if transposed else grad) * prod(weight[1:]) * sum(wanted[:2])


def _modulate(image: Sequence[int], _context: Any, taps: Sequence[int] | None, *_: Any, **__: Any) -> int:
    return 0 if taps is None else 2 * prod(image) * taps[1]


def _modulate_backward(_grad: Any, *arguments: Any, **_: Any) -> int:
    """The taps once more, and the gradients to them and to what they see."""
    return 3 * _modulate(*arguments)


def _conv2d_per_sample(_x: Any, weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[2:])


def _register(flop_counter: Any) -> None:
    aten, fused = torch.ops.aten, torch.ops.fdconv
    # Up to torch 2.15 its formula counts the gradient to the weight as many times as there are groups, and here every
    # sample of a batch is a group (https://github.com/pytorch/pytorch/pull/183405).
    flop_counter.flop_registry.pop(aten.convolution_backward, None)
    formulas: dict[Any, Any] = {
        aten._fft_r2c: _real_to_complex,
        aten._fft_c2r: _complex_to_real,
        aten._fft_c2c: _complex_to_complex,
        aten.convolution_backward: _convolution_backward,
        fused.modulate: _modulate,
        fused.modulate_backward: _modulate_backward,
        fused.conv2d_per_sample: _conv2d_per_sample,
    }
    for operator, formula in formulas.items():
        if operator not in flop_counter.flop_registry:  # torch may come to have its own
            flop_counter.register_flop_formula(operator)(formula)


on_import("torch.utils.flop_counter", _register)  # which imports Triton

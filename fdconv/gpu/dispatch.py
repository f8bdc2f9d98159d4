"""The operator on GPUs: where the kernels serve, and which way convolves."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import Backend
from ..modulation import Factors
from ..reference import Convolution, WeightShape, convolved_size, per_sample
from ..spectrum import column_factors
from .autotune import Fastest
from .blocks import power_of_2
from .ops import conv2d_per_sample, modulate, scale_spectrum

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") != "0"
"""True where Triton may be told to interpret kernels, on any device."""


def serves(x: Tensor, spectra: Tensor, backend: Backend) -> bool:
    able = _available(x.device) and spectra.dtype == torch.float32
    if backend == "triton" and not able:
        raise ValueError(
            f"the backend triton does not serve a {spectra.dtype} layer on {x.device}: it needs Triton, an NVIDIA GPU "
            "and less than float64"
        )
    return able and (backend == "triton" or (backend == "auto" and x.device.type == "cuda"))


def _available(device: torch.device) -> bool:
    """As `fdconv.gpu.common.available`, which is imported, and Triton with it, only where kernels may serve."""
    if device.type != "cuda" and not _INTERPRETED:
        return False
    from .common import available

    return available(device)


def weights(
    spectra: Tensor, *given: Tensor | None, frequency_group: Tensor, shape: WeightShape, dtype: torch.dtype
) -> Tensor:
    factors = Factors(*given)
    if factors.kernel is None:
        scaled = spectra.sum(0, keepdim=True) * column_factors(shape.width, shape.scale, shape.edge, spectra)
    else:
        scaled = scale_spectrum(spectra, frequency_group, factors.kernel, shape.scale, shape.edge, shape.width)
    image = torch.fft.irfft2(torch.view_as_complex(scaled), s=(scaled.shape[1], shape.width))
    return modulate(
        image.expand(factors.batch, -1, -1),
        factors.context,
        factors.taps,
        factors.channel,
        factors.filter,
        factors.spatial,
        kernel_size=shape.kernel_size,
        groups=shape.groups,
        activation=shape.activation,
        dtype=dtype,
    )


def convolves(shape: WeightShape, conv: Convolution | None) -> bool:
    """Dense convolutions of more than one position; anything else is a matrix product, or too thin for one."""
    return conv is not None and conv.groups == 1 and shape.kernel_size != (1, 1)


def convolve(x: Tensor, weight: Tensor, conv: Convolution | None) -> Tensor:
    assert conv is not None
    if weight.shape[0] == 1:  # one for all samples, which is a plain convolution
        return per_sample(x, weight, conv)
    if x.device.type == "cuda" and x.shape[0]:
        return _fastest(x, weight, conv)
    return _as_one_product(x, weight, conv)


def _as_one_product(x: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    return conv2d_per_sample(x, weight, *conv)


def _as_groups(x: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    return per_sample(x, weight, conv)


def _one_by_one(x: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    pairs = zip(x.split(1), weight, strict=True)
    return torch.cat([F.conv2d(own, its, None, conv.stride, conv.padding, conv.dilation) for own, its in pairs])


def _unfolded(x: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    kernel_size = tuple(weight.shape[3:])
    columns = F.unfold(x, kernel_size, conv.dilation, conv.padding, conv.stride)
    return (weight.flatten(2) @ columns).unflatten(2, convolved_size(x.shape[2:], kernel_size, conv))


def _kind(x: Tensor, weight: Tensor, conv: Convolution) -> tuple[Any, ...]:
    """Calls of the same kind take the same way: batch and pixels count as powers of two."""
    about = power_of_2(x.shape[0]), power_of_2(x.shape[2] * x.shape[3])
    return (x.device, x.dtype, weight.shape[1:], conv, about)


_fastest = Fastest([_as_one_product, _as_groups, _one_by_one, _unfolded], _kind)

"""Frequency responses of convolution kernels."""

from __future__ import annotations

import torch
from torch import Tensor

_KERNELS_AT_ONCE = 1024  # padded, a kernel takes 64 KiB: all of a layer's, for a batch, would fill the memory


def kernel_response(weight: Tensor, size: int = 64) -> Tensor:
    """Mean magnitude of the kernels' frequency responses, zero frequency in the middle.

    Each `k_h x k_w` kernel is padded with zeros to `size x size` and transformed, as in FDConv (arXiv 2503.18783),
    figure 1.

    Args:
        weight: `(..., k_h, k_w)`.
        size: frequencies on either axis.

    Returns:
        `(size, size)`, float64; index `size // 2` is frequency 0, index 0 half a cycle a pixel.

    Examples:
        >>> import torch
        >>> from fdsurgery.inspect import kernel_response
        >>> blur = torch.ones(1, 1, 3, 3) / 9
        >>> response = kernel_response(blur)
        >>> round(float(response[32, 32]), 3), round(float(response[0, 0]), 3)
        (1.0, 0.111)
    """
    kernels = weight.detach().to("cpu").reshape(-1, *weight.shape[-2:])
    total = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    for some in kernels.split(_KERNELS_AT_ONCE):
        total += torch.fft.fft2(some.double(), s=(size, size)).abs().sum(0)
    return torch.fft.fftshift(total / len(kernels))


def radial_profile(response: Tensor) -> tuple[Tensor, Tensor]:
    """Average a response over circles.

    Args:
        response: `(size, size)`, zero frequency in the middle.

    Returns:
        Radii in cycles a pixel from 0 to 0.5, and the mean of the response at each; both `(size // 2 + 1,)`.

    Examples:
        >>> import torch
        >>> from fdsurgery.inspect import kernel_response, radial_profile
        >>> radii, profile = radial_profile(kernel_response(torch.ones(1, 1, 3, 3) / 9))
        >>> float(radii[-1]), bool(profile[0] > profile[-1])
        (0.5, True)
    """
    size = len(response)
    axis = torch.arange(size, dtype=torch.int64, device=response.device) - size // 2
    radius = (axis[:, None] ** 2 + axis**2).to(torch.float64).sqrt().round().long()
    inside = radius <= size // 2
    sums = response.new_zeros(size // 2 + 1).index_add_(0, radius[inside], response[inside])
    counts = torch.bincount(radius[inside], minlength=size // 2 + 1)
    radii = torch.arange(size // 2 + 1, dtype=response.dtype, device=response.device)
    return radii / size, sums / counts

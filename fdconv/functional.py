"""The operator as one function, and the choice among the ways to compute it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import sample_loop
from .composite import Convolution, WeightShape, per_sample, sample_weights
from .modulation import Factors


def frequency_dynamic(
    x: Tensor,
    spectra: Tensor,
    frequency_group: Tensor,
    factors: Factors,
    shape: WeightShape,
    conv: Convolution | None,
    dtype: torch.dtype,
) -> Tensor:
    """Convolve each sample with its own weight, or multiply it, without a bias.

    Args:
        x: `(B, C_in, H, W)`; without a `Convolution` `(B, ..., C_in)`.
        spectra: `(r, D1, D2h, 2)`, float32 or float64.
        frequency_group: `(D1, D2h)`, group of every coefficient.
        factors: of the modulation, in the dtype of the spectra.
        shape: of the weight.
        conv: what the weight is used in; None for a linear layer.
        dtype: of the weight where it is used, unless autocast is on and has its own.

    Returns:
        `(B, C_out, H', W')` or `(B, ..., C_out)`.
    """
    device = x.device.type
    if torch.amp.autocast_mode.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
    if x.dtype == dtype and sample_loop.serves(x, spectra, factors, conv):
        return sample_loop.apply(x, spectra, frequency_group, factors, shape, conv)
    # In the layer's dtype, so that an input of another one is refused as PyTorch's own layers refuse it.
    return per_sample(x, sample_weights(spectra, frequency_group, factors, shape).to(dtype), conv)

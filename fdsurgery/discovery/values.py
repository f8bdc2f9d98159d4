"""What the numbers in a weight say against replacing its layer."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_DESIGNED = 32
"""Different values that a weight thought out by a person has at most; a learned one has nearly as many as entries."""
_SAMPLE = 4096
_FAINT = 1 / 100
"""A filter so much weaker than the root mean square of all: the rounding of the transform, 1e-7 of that mean,
is then more than 1e-5 of the filter."""
_DEAD = 1e-5
"""A filter so much weaker than the usual one is dead; its rounding is below what is promised of a whole layer."""
_MOSTLY = 0.01


def obstacle_in_values(weight: Tensor) -> str | None:
    """Why a spectrum cannot hold this weight, or should not; None if nothing is wrong, or it has no values yet.

    Args:
        weight: the parameter of a layer, floating point.
    """
    if weight.is_meta or not weight.numel():
        return None
    with torch.no_grad():
        if not weight.requires_grad and is_designed(weight):
            return "its weight is a constant: it does not train, and its values are no learned ones"
        filters = weight.detach().flatten(1)
        norms = torch.linalg.vector_norm(filters, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
        if not bool(norms.isfinite().all()):
            return "its weight holds values that are not finite"
        if weight.dtype == torch.float16 and (most := _largest_coefficient(weight)) > torch.finfo(torch.float16).max:
            return f"its spectrum would overflow in float16 ({most:.0f}); convert it in float32 or bfloat16"
        overall = norms.square().mean().sqrt()
        faint = (norms < _FAINT * overall) & (norms > _DEAD * norms.median())
        if weight.dtype == torch.float32 and bool(faint.any()):
            return (
                f"its filters differ too much in scale ({int(faint.sum())} of them are weaker than the rest by more "
                f"than {1 / _FAINT:.0f} times): a float32 transform of all would not hold each to 1e-5"
            )
    return None


def caution_in_values(weight: Tensor) -> str | None:
    """Zeros inside live filters, which something may hold there and a spectrum would not."""
    if weight.is_meta or not weight.numel():
        return None
    nonzero = int(torch.count_nonzero(weight))
    if nonzero == weight.numel() or nonzero == 0:
        return None
    filled = weight.detach() != 0
    alive = filled.flatten(1).any(1).sum() * filled.transpose(0, 1).flatten(1).any(1).sum() * weight[0, 0].numel()
    zeros = 1 - nonzero / int(alive)
    if zeros <= _MOSTLY:
        return None
    return f"{zeros:.0%} of its weight is exactly zero, as by pruning or a mask, and would not stay so in training"


def is_designed(weight: Tensor) -> bool:
    """True for integers, ramps, and values that recur as in blur, Haar and Sobel filters; not for all-equal ones."""
    values = weight.detach().flatten().double()
    sample = values[:_SAMPLE]
    if bool((sample == sample[0]).all()) and bool((values == values[0]).all()):
        return len(values) == 1 and bool(values[0] != 0) and bool(values[0].frac() == 0)
    if bool((sample.frac() == 0).all()) and bool((values.frac() == 0).all()):
        return True
    different = len(sample.abs().unique())
    if different <= min(_MOST_DESIGNED, len(sample) / 2) and len(values.abs().unique()) <= _MOST_DESIGNED:
        return True
    steps = values.diff()
    return len(values) > 3 and bool(torch.allclose(steps, steps[0], rtol=1e-4, atol=0))


def _largest_coefficient(weight: Tensor) -> float:
    """Of the stored spectrum of a weight (see `fdconv.spectrum`); a bound where that is safe and quick."""
    image = weight.detach().float()
    scale = max(1, min(weight.shape[0], weight.shape[1]) // 2)
    bound = float(image.abs().sum()) / scale
    if bound < torch.finfo(torch.float16).max / 2:
        return bound
    kernel = image.reshape(*image.shape[:2], *(image.shape[2:] or (1, 1)))
    plane = kernel.permute(0, 2, 1, 3).reshape(kernel.shape[0] * kernel.shape[2], -1)
    return float(torch.view_as_real(torch.fft.rfft2(plane)).abs().max()) / scale

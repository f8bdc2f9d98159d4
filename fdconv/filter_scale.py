"""A scale for each filter: recognised in a weight that somebody has made from another one."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import exact_dtype

ROUNDING = 1.5
"""What rounding may have changed, in units of a dtype's `eps`: each time loses half of one."""

OWN_ROUNDING = 8.0
"""What the comparison itself may lose, in units of the `eps` of the dtype in which it is made."""

LARGEST_FACTOR = 1e3
"""By which a filter that is zero, up to what its dtype can hold, may have been multiplied."""


@torch.no_grad()
def filter_multiple(new: Tensor, old: Tensor) -> Tensor | None:
    """The factor of each filter by which `new` is `old`, if it is: what folding a norm into a weight does.

    Args:
        new: `(C_out, ...)`, any float dtype.
        old: of the same shape and dtype.

    Returns:
        `(C_out,)`, float64 (float32 where a device has no better); NaN for a filter that is zero in both, up to what
        the dtype can hold, for that tells no factor. None where some filter of `new` is more than rounding away from a
        multiple of that of `old`, or is not finite.
    """
    if new.shape != old.shape or new.dtype != old.dtype or new.is_meta or not new.dim():
        return None
    exact = exact_dtype(old.device)
    rows, base = new.to(old.device, exact).flatten(1), old.to(exact).flatten(1)
    least = torch.finfo(old.dtype).tiny
    silent = torch.linalg.vector_norm(base, dim=1) <= least
    scale = (rows * base).sum(1) / base.square().sum(1)
    off = torch.linalg.vector_norm(torch.where(silent[:, None], rows, rows - scale[:, None] * base), dim=1)
    rounding = ROUNDING * torch.finfo(old.dtype).eps + OWN_ROUNDING * torch.finfo(exact).eps
    allowed = rounding * torch.linalg.vector_norm(rows, dim=1)
    allowed = torch.where(silent, least * LARGEST_FACTOR, allowed)
    if not bool((off <= allowed).all()):  # comparisons with NaN are false
        return None
    return torch.where(silent, torch.nan, scale)


@torch.no_grad()
def common_factor(scale: Tensor, dtype: torch.dtype) -> float | None:
    """The one factor that all filters have, up to what `dtype` rounds; None where they differ.

    Args:
        scale: `(C_out,)` of `filter_multiple`; NaN agrees with any.
        dtype: in which the weights were that it was found in.
    """
    known = scale[~scale.isnan()]
    if not len(known):
        return 1.0
    mean = known.mean()
    rounding = 0.75 * torch.finfo(dtype).eps + OWN_ROUNDING * torch.finfo(scale.dtype).eps
    return float(mean) if bool(((known - mean).abs() <= rounding * mean.abs()).all()) else None

"""A scale for each filter: recognised in a weight that somebody has made from another one."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import exact_dtype

ROUNDING = 1.5
"""What rounding may have changed, in units of a dtype's `eps`: each time loses half of one."""

OWN_ROUNDING = 8.0
"""What the comparison itself may lose, in units of the `eps` of the dtype in which it is made."""


@torch.no_grad()
def filter_multiple(new: Tensor, old: Tensor) -> Tensor | None:
    """The factor of each filter by which `new` is `old`, if it is: what folding a norm into a weight does.

    Args:
        new: `(C_out, ...)`, any float dtype.
        old: of the same shape and dtype.

    Returns:
        `(C_out,)`, float64 (float32 where a device has no better), or None where some filter of `new` is more than
        rounding away from a multiple of that of `old`, is not finite, or belongs to a filter of zeros.
    """
    if new.shape != old.shape or new.dtype != old.dtype or new.is_meta or not new.dim():
        return None
    exact = exact_dtype(old.device)
    rows, base = new.to(old.device, exact).flatten(1), old.to(exact).flatten(1)
    squares = base.square().sum(1)
    scale = (rows * base).sum(1) / squares
    off = torch.linalg.vector_norm(rows - scale[:, None] * base, dim=1)
    rounding = ROUNDING * torch.finfo(old.dtype).eps + OWN_ROUNDING * torch.finfo(exact).eps
    allowed = rounding * torch.linalg.vector_norm(rows, dim=1)
    return scale if bool((off <= allowed).all()) else None  # comparisons with NaN, as of filters of zeros, are false

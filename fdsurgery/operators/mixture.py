"""Several kernels in the place of one, mixed for each sample by an attention (CondConv, DY-Conv, ODConv)."""

from __future__ import annotations

import torch
from torch import Tensor


def mixed(attention: Tensor, kernels: Tensor) -> Tensor:
    """`(B, K)` by `(K, ...)` to `(B, ...)`, in the dtype of the attention."""
    return (attention @ kernels.to(attention.dtype).flatten(1)).unflatten(1, kernels.shape[1:])


def mean_kernel(kernels: Tensor) -> Tensor:
    """The mean over the first axis; where all are equal, exactly that."""
    return kernels[0] + (kernels - kernels[:1]).mean(0)


def apart(kernels: Tensor) -> Tensor:
    """All zero where the kernels are equal."""
    return kernels - kernels[:1]


@torch.no_grad()
def move_(kernels: Tensor, weight: Tensor) -> None:
    """Have this mean, in place; what tells the kernels apart stays."""
    exact = torch.promote_types(kernels.dtype, weight.dtype)
    kernels.copy_(weight.to(exact) + (kernels.to(exact) - mean_kernel(kernels.to(exact))))


def full_deltas(deltas: Tensor) -> Tensor:
    """`(K-1, C_out)` to `(K, C_out)`: the last is such that all add up to zero, so that their mean stays the bias."""
    return torch.cat([deltas, -deltas.sum(0, keepdim=True)])

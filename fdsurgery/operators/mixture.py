"""Several kernels in the place of one, mixed for each sample by an attention (CondConv, DY-Conv, ODConv)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fdconv.modulation import ZeroInit

HOTTEST = 30.0
"""Temperature at which an attention starts that is annealed: near uniform, while the kernels are young."""


class RandomHead(ZeroInit):
    """Logits of kernels. Equal ones move apart only if their attention differs, so this one is not zero at the start.

    The weight is drawn as the authors of DY-Conv and ODConv do (Kaiming, fan-out); the bias is zero.
    """

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        super().reset_parameters()
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


@torch.no_grad()
def anneal_(temperature: Tensor, progress: float) -> None:
    """`1 + 29*max(0, 1 - progress)`, in place: linear from `HOTTEST` to 1.

    Args:
        temperature: `(1,)`.
        progress: 0 at the first step, 1 at the last one and ever after.
    """
    temperature.fill_(1 + (HOTTEST - 1) * (1 - min(max(progress, 0.0), 1.0)))


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

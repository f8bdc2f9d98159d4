"""Convolving every sample with a weight of its own, which somebody makes from numbers of that sample.

The path of all dynamic layers whose weight is not a spectrum. Weights are made for a few samples at a time, used, and
forgotten; the backward pass makes them once more. A batch of them is the largest thing that such a layer has: 2.4
million numbers a sample in the last stage of a ResNet-50.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import chosen_backend
from .gpu import dispatch as gpu
from .out_of_memory import explained
from .precision import autocast_is_on, without_autocast
from .reference import Convolution, WeightShape, per_sample, per_sample_backward
from .strides import owned
from .tracing import is_transformed, wants_operations

Make = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Makes weights `(B, C_out, C_in/groups, k_h, k_w)` from numbers of each sample and from what all samples share."""

CHUNK = 2**22
"""Weights that are made at a time on a CPU, unless a single sample has more: memory that is used again, not fresh."""


def convolve_made(
    x: Tensor,
    make: Make,
    given: Sequence[Tensor],
    shared: Sequence[Tensor],
    kernel: tuple[int, int, int, int],
    conv: Convolution | None,
    dtype: torch.dtype,
) -> Tensor:
    """Convolve each sample with the weight that `make` gives it, or multiply it, without a bias.

    Args:
        x: `(B, C_in, H, W)`; without a `Convolution` `(B, ..., C_in)`.
        make: `make(given, shared)`, differentiable, for any number of samples.
        given: tensors `(B, ...)`, float32 or float64, from which the weights are made; at least one.
        shared: tensors of the layer, of any float dtype: `make` computes in that of `given`.
        kernel: `(C_out, C_in/groups, k_h, k_w)`, the shape of one sample's weight; a linear layer's is `1x1`.
        conv: what the weight is used in; None for a linear layer.
        dtype: of the weight where it is used, unless autocast is on and has its own.

    Returns:
        `(B, C_out, H', W')` or `(B, ..., C_out)`.

    Raises:
        torch.OutOfMemoryError: torch's own, with what to lower.
    """
    if x.dtype != torch.float64 and autocast_is_on(x.device):  # which leaves float64 alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
    out_channels, in_channels, k_h, k_w = kernel
    groups = 1 if conv is None else conv.groups
    shape = WeightShape(out_channels, in_channels, (k_h, k_w), groups, 1.0, 1.0, "sigmoid")
    with without_autocast(x.device), explained(x, shape):
        if not torch.jit.is_tracing() and x.shape[0] == 0:
            # A weight for nobody, from which gradients flow, all zero, to whatever a batch's would flow to.
            nobody = [one.sum(0, keepdim=True) for one in given]
            return per_sample(x, make(nobody, shared).to(dtype), conv)
        # In the layer's dtype, so that an input of another one is refused as PyTorch's own layers refuse it.
        if is_transformed() or x.dtype != dtype:
            return per_sample(x, make(given, shared).to(dtype), conv)
        on_gpu = gpu.convolves(shape, conv) and gpu.serves(x, given[0], chosen_backend())
        convolve = gpu.convolve if on_gpu else per_sample
        step = x.shape[0] if x.is_cuda else max(1, CHUNK // shape.numel)
        if torch.is_grad_enabled():
            made: Tensor = _Made.apply(make, convolve, conv, step, len(given), x, *given, *shared)  # type: ignore[no-untyped-call]
            return made
        return _forward(make, convolve, conv, step, x, given, shared)


def _forward(
    make: Make,
    convolve: Any,
    conv: Convolution | None,
    step: int,
    x: Tensor,
    given: Sequence[Tensor],
    shared: Sequence[Tensor],
) -> Tensor:
    parts: list[Tensor] = []
    for part in _parts(len(x), step):
        weights = make([one[part] for one in given], shared).to(x.dtype)
        parts.append(convolve(x[part], weights, conv))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parts(batch: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


class _Made(torch.autograd.Function):
    """Convolve with weights that are forgotten, and made once more for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, make: Make, convolve: Any, conv: Convolution | None, step: int, count: int, x: Tensor, *rest: Tensor
    ) -> Tensor:
        ctx.how = make, conv, step, count
        ctx.save_for_backward(x, *rest)
        return owned(_forward(make, convolve, conv, step, x, rest[:count], rest[count:]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        with without_autocast(x.device):
            if wants_operations(grad):
                found = _differentiable(ctx.how, grad, x, rest, wanted)
            else:
                found = _gradients(ctx.how, grad, x, rest, wanted)
        return (None, None, None, None, None, *found)


def _differentiable(
    how: Any, grad: Tensor, x: Tensor, rest: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """As `_gradients`, to be differentiated once more."""
    make, conv, _, count = how
    with torch.enable_grad():
        y = per_sample(x, make(rest[:count], rest[count:]).to(x.dtype), conv)
    leaves = [one for one, want in zip([x, *rest], wanted, strict=True) if want]
    create = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(y, leaves, grad, create_graph=create, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def _gradients(
    how: Any, grad: Tensor, x: Tensor, rest: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients to the input, to what is given for each sample and to what is shared, where they are wanted."""
    make, conv, step, count = how
    to_x, to_rest = (
        [],
        [None if not want else torch.zeros_like(one) for one, want in zip(rest, wanted[1:], strict=True)],
    )
    for part in _parts(len(x), step):
        with torch.enable_grad():
            own = [one[part] if at < count else one for at, one in enumerate(rest)]
            leaves = [one.detach().requires_grad_(want) for one, want in zip(own, wanted[1:], strict=True)]
            weights = make(leaves[:count], leaves[count:])
        used = weights.detach().to(x.dtype)
        to_part, to_weights = per_sample_backward(grad[part], x[part], used, conv)
        to_x.append(to_part)
        behind = [leaf for leaf in leaves if leaf.requires_grad]
        if not behind or not weights.requires_grad:
            continue
        found = iter(torch.autograd.grad(weights, behind, to_weights.to(weights.dtype), allow_unused=True))
        for at, leaf in enumerate(leaves):
            gradient = next(found) if leaf.requires_grad else None
            whole = to_rest[at]
            if gradient is not None and whole is not None:
                if at < count:
                    whole[part] = gradient
                else:
                    whole += gradient
    to_input = None if not wanted[0] else to_x[0] if len(to_x) == 1 else torch.cat(to_x)
    return [to_input, *to_rest]

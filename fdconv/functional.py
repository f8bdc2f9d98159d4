"""The operator as one function, and the choice among the ways to compute it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backend import Backend, chosen_backend, known
from .cpu import compiled_steps, kernels, sample_loop, torch_steps
from .gpu import dispatch as gpu
from .modulation import Factors
from .out_of_memory import explained
from .precision import autocast_is_on, without_autocast
from .reference import (
    Convolution,
    WeightShape,
    differentiable_gradients,
    per_sample,
    per_sample_backward,
    sample_weights,
)
from .strides import owned
from .tracing import is_transformed, wants_operations


def frequency_dynamic(
    x: Tensor,
    spectra: Tensor,
    frequency_group: Tensor,
    factors: Factors,
    shape: WeightShape,
    conv: Convolution | None,
    dtype: torch.dtype,
    *,
    backend: Backend | None = None,
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
        backend: for this call; the one of `set_backend` if None.

    Returns:
        `(B, C_out, H', W')` or `(B, ..., C_out)`.

    Raises:
        ValueError: there is no such backend, or it cannot serve: no compiler, no device, or float64 with Triton.
        torch.OutOfMemoryError: torch's own, with what to lower.
    """
    if x.dtype != torch.float64 and autocast_is_on(x.device):  # which leaves float64 alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
    backend = chosen_backend() if backend is None else known(backend)
    with without_autocast(x.device), explained(x, shape):
        if not torch.jit.is_tracing() and x.shape[0] == 0:
            return _of_no_samples(x, spectra, frequency_group, factors, shape, conv, dtype)
        if gpu.serves(x, spectra, backend):
            make = partial(gpu.weights, frequency_group=frequency_group, shape=shape, dtype=dtype)
            convolve = gpu.convolve if gpu.convolves(shape, conv) else per_sample
        elif x.dtype == dtype and sample_loop.serves(x, spectra, factors):
            steps = compiled_steps if _compiled_serves(spectra, factors, backend) else torch_steps
            return sample_loop.apply(x, spectra, frequency_group, factors, shape, conv, steps)
        else:
            make = partial(_torch_weights, frequency_group=frequency_group, shape=shape, dtype=dtype)
            convolve = per_sample
        # In the layer's dtype, so that an input of another one is refused as PyTorch's own layers refuse it.
        if x.dtype == dtype and torch.is_grad_enabled() and not is_transformed() and factors.batch > 1:
            recomputed: Tensor = _Recomputed.apply(make, convolve, conv, x, spectra, *factors)  # type: ignore[no-untyped-call]
            return recomputed
        return convolve(x, make(spectra, *factors), conv)


def _of_no_samples(
    x: Tensor,
    spectra: Tensor,
    frequency_group: Tensor,
    factors: Factors,
    shape: WeightShape,
    conv: Convolution | None,
    dtype: torch.dtype,
) -> Tensor:
    """The result for an empty batch, from which gradients flow, all zero, to whatever a batch's would flow to."""
    y = per_sample(x, sample_weights(spectra, frequency_group, Factors(), shape).to(dtype), conv)
    empty = [factor.sum() for factor in factors.per_sample]
    if factors.taps is not None:
        empty.append(factors.taps[:0].sum())
    return y + torch.stack(empty).sum().to(y.dtype) if empty else y


def _compiled_serves(spectra: Tensor, factors: Factors, backend: Backend) -> bool:
    if backend not in ("auto", "cpp"):
        return False
    if backend == "cpp" and (reason := kernels.reason_missing()) is not None:
        raise ValueError(f"the backend cpp does not serve here: {reason}")
    return compiled_steps.serves(spectra, factors)


def _torch_weights(
    spectra: Tensor, *factors: Tensor | None, frequency_group: Tensor, shape: WeightShape, dtype: torch.dtype
) -> Tensor:
    return sample_weights(spectra, frequency_group, Factors(*factors), shape).to(dtype)


# Four ways to convolve each sample with a weight of its own, without groups


class _Recomputed(torch.autograd.Function):
    """Convolve with weights that are forgotten, and made once more for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, make: Any, convolve: Any, conv: Convolution | None, x: Tensor, *rest: Tensor | None
    ) -> Tensor:
        ctx.make, ctx.conv = make, conv
        ctx.save_for_backward(x, *rest)
        result: Tensor = owned(convolve(x, make(*rest), conv))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        wanted = [position for position, need in enumerate(ctx.needs_input_grad[3:]) if need]
        with without_autocast(x.device), explained(x, ctx.make.keywords["shape"]):
            if wants_operations(grad):
                spectra, *given = rest
                group, shape = ctx.make.keywords["frequency_group"], ctx.make.keywords["shape"]
                inputs = [[x, *rest][i] for i in wanted]
                found = differentiable_gradients(grad, x, spectra, group, Factors(*given), shape, ctx.conv, inputs)
            else:
                found = _recomputed_gradients(ctx.make, ctx.conv, grad, x, rest, wanted)
        gradients = dict(zip(wanted, found, strict=True))
        return (None, None, None, *(gradients.get(position) for position in range(1 + len(rest))))


def _recomputed_gradients(
    make: Any, conv: Convolution | None, grad: Tensor, x: Tensor, rest: list[Tensor | None], wanted: list[int]
) -> list[Tensor]:
    """Gradients to those of `[x, *rest]` that are wanted."""
    with torch.enable_grad():
        leaves = [None if one is None else one.detach() for one in rest]
        behind = [leaf for i in wanted if i and (leaf := leaves[i - 1]) is not None]
        for leaf in behind:
            leaf.requires_grad_()
        weight = make(*leaves)
    to_x, to_weight = per_sample_backward(grad, x, weight.detach(), conv)
    found = list(torch.autograd.grad(weight, behind, to_weight)) if behind else []
    return [to_x, *found] if 0 in wanted else found

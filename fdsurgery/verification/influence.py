"""What a layer means for the outputs of a model: the change that noise in place of its output makes, or would make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..discovery import Inputs
from .error import largest_error
from .layers import Comparison, hooked
from .outputs import outputs_of, run


def influences_of(
    model: nn.Module, arguments: Inputs, comparisons: Sequence[Comparison], tolerance: float
) -> list[float]:
    """The relative change of the outputs that noise in place of each layer's output makes, or would make.

    A gradient tells of all layers at once. But it may be zero, or none, where noise has an influence: behind a ReLU, in
    a forward without gradients. So layers without one are tried, first all together.
    """
    found = _by_gradient(model, arguments, comparisons)
    doubtful = [index for index, influence in enumerate(found) if not influence > tolerance]
    if doubtful:
        usual = outputs_of(model, arguments)
        together = _with_noise(model, arguments, [comparisons[index] for index in doubtful], usual)
        alone = together > tolerance and len(doubtful) > 1
        for index in doubtful:
            found[index] = _with_noise(model, arguments, [comparisons[index]], usual) if alone else together
    return found


def _with_noise(
    model: nn.Module, arguments: Inputs, comparisons: Sequence[Comparison], usual: Sequence[Tensor]
) -> float:
    generator = torch.Generator().manual_seed(0)

    def replace(_one: Any, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32, device="cpu")
        return (noise.to(output.device) * _size(output)).to(output.dtype)

    with hooked(comparisons, replace):
        return largest_error(outputs_of(model, arguments), usual)


def _by_gradient(model: nn.Module, arguments: Inputs, comparisons: Sequence[Comparison]) -> list[float]:
    """By the gradient of random projections of the outputs, each in units of its norm.

    For a projection on Gaussian noise, the norm of the gradient is that of the Jacobian in expectation; so times the
    size of an output's entries it is the change that independent noise of this size makes.
    """
    added: dict[str, list[tuple[Tensor, float]]] = {one.fqn: [] for one in comparisons}

    def add_zero(one: Comparison, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
        zero = torch.zeros_like(output, requires_grad=True)
        added[one.fqn].append((zero, _size(output)))
        return output + zero

    try:
        with torch.inference_mode(False), torch.enable_grad(), hooked(comparisons, add_zero):
            outputs = run(model, arguments)
            projected = sum(_projected(output) for output in outputs)
            zeros = [zero for calls in added.values() for zero, _ in calls]
            gradients = iter(torch.autograd.grad(projected, zeros, allow_unused=True))  # type: ignore[arg-type]
    except Exception:  # no gradient, or no memory for it; noise needs neither
        return [0.0] * len(comparisons)
    return [
        sum(
            (
                _size(gradient) ** 2 * gradient.numel() * size**2
                for _, size in calls
                if (gradient := next(gradients)) is not None
            ),
            0.0,
        )
        ** 0.5
        for calls in added.values()
    ]


def _projected(output: Tensor) -> Tensor:
    noise = torch.randn(
        output.shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    ).to(output.device)
    exact = output.to(torch.promote_types(output.dtype, torch.float32))
    return (exact * noise).sum() / exact.detach().norm().clamp_min(torch.finfo(torch.float32).tiny)


def _size(tensor: Tensor) -> float:
    """Root of the mean square of the entries."""
    return float(tensor.detach().float().norm()) / max(tensor.numel(), 1) ** 0.5

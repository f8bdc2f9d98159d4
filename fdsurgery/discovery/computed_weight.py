"""Whether the weight that a class computes learns as a plain one does: what it is made of, and how it moves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .watched_call import watch

HOLDS_ZEROS = "holds some of its weight at zero, as masked convolutions do"


def why_not_free(layer: Any, x: Tensor, modes: Iterable[bool]) -> str | None:
    """Why the weight that a class computes, in these modes, cannot be taken for one that learns freely."""
    parameters = dict(layer.named_parameters())
    own = {name: parameter for name, parameter in parameters.items() if name not in ("weight", "bias")}
    learning = {parameter.requires_grad for name, parameter in parameters.items() if name != "bias"}
    if len(learning) > 1:
        return "computes its weight from parameters of which some are frozen"
    if x.is_meta:
        return None
    call = None
    always = torch.ones_like(layer.weight, dtype=torch.bool)
    for _ in range(2):  # what is zero each time is so by the class, and not by chance or for want of digits
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name != "bias":
                    parameter.uniform_(0.5, 1.5)
                parameter.requires_grad_()
            before = {name: parameter.clone() for name, parameter in parameters.items()}
        call = watch(layer, x, differentiable=bool(own))
        assert call is not None
        always = always & (call["weight"] == 0)
    assert call is not None
    if bool(always.any()):
        return HOLDS_ZEROS
    made = [call[key] for key in ("weight", "bias") if call[key] is not None and call[key].requires_grad]
    if any(not torch.equal(parameter, before[name]) for name, parameter in parameters.items()):
        return "writes to its own parameters as it runs"
    reached = torch.autograd.grad([value.sum() for value in made], list(own.values()), allow_unused=True) if own else ()
    for name, gradient in zip(own, reached, strict=True):
        if gradient is None:
            return f"has a parameter {name!r} that is no part of its weight and would be lost"
    return _of_how_it_learns(layer, x, modes)


def _of_how_it_learns(layer: Any, x: Tensor, modes: Iterable[bool]) -> str | None:
    """What shows when the parameters move: rounding, gradients that are scaled or stopped, weights of one sign."""
    source = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=source, dtype=torch.float32, device="cpu").to(like.device)

    def weight_at(step: float, training: bool) -> Tensor:
        with torch.no_grad():
            for parameter, start, direction in zip(learned, starts, directions, strict=True):
                parameter.copy_(start + step * direction)
        call = watch(layer, x, training, differentiable=True)
        assert call is not None
        weight: Tensor = call["weight"]
        return weight

    learned = list(layer.parameters())
    starts, directions = ([drawn(parameter) for parameter in learned] for _ in range(2))
    in_evaluation = None
    for training in modes:
        weight = weight_at(0, training)
        if in_evaluation is None:
            in_evaluation = weight.detach().clone()
        if not torch.equal(weight, in_evaluation):
            return "computes another weight in training than in evaluation"
        if bool((weight >= 0).all()):
            return "keeps its weight from being negative"
        if weight.dtype not in (torch.float32, torch.float64):
            continue  # too few digits for differences
        output_side = drawn(weight).to(weight.dtype)
        gradients: Any = [None] * len(learned)
        if weight.requires_grad:
            gradients = torch.autograd.grad(weight, learned, output_side, allow_unused=True)
        told = [gradient * way for gradient, way in zip(gradients, directions, strict=True) if gradient is not None]
        ahead, behind = (weight_at(step, training).detach().clone() for step in (_STEP, -_STEP))
        moved = output_side * (ahead - behind) / (2 * _STEP)
        size = sum(float(terms.norm()) ** 2 for terms in (moved, *told)) ** 0.5
        if abs(float(moved.sum()) - sum(float(terms.sum()) for terms in told)) > 0.05 * size:
            return "passes on other gradients than those of its weight, as where weights are rounded"
    return None


_STEP = 1e-3
"""Small against the weights of the probe, which are from N(0, 1), and large against their rounding."""

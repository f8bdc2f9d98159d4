"""The check that conversion changed nothing: both models on the same inputs, output by output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .discovery import Inputs


@dataclass(frozen=True)
class Verification:
    """What `verify` measured."""

    relative_error: float
    """Largest 2-norm of a difference over the 2-norm of the output before; infinite if the outputs' shapes differ."""
    tolerance: float
    outputs: int
    """Number of floating-point tensors compared."""

    @property
    def ok(self) -> bool:
        """True if the error is within the tolerance."""
        return self.relative_error <= self.tolerance

    def __str__(self) -> str:
        if not self.outputs:
            return "nothing to compare: the model returned no floating-point tensor for these inputs"
        verdict = "unchanged" if self.ok else "CHANGED"
        return (
            f"outputs {verdict}: relative error {self.relative_error:.1e} over {self.outputs} tensor(s), "
            f"tolerance {self.tolerance:.0e}"
        )


def verify(model_before: nn.Module, model_after: nn.Module, inputs: Any, tolerance: float = 1e-5) -> Verification:
    """Run two models in eval mode on the same inputs and compare every floating-point output.

    Args:
        model_before: a copy of the model from before the conversion (`copy.deepcopy(model)`).
        model_after: the converted model.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        tolerance: largest relative error that passes.

    Returns:
        The measurement; its `ok` is the verdict, which is no where nothing can be compared. Modes and random state are
        as before.
    """
    before, after = _outputs(model_before, inputs), _outputs(model_after, inputs)
    error = 0.0 if before and len(before) == len(after) else float("inf")
    for expected, actual in zip(before, after, strict=False):
        error = max(error, relative_error(actual, expected))
    return Verification(error, tolerance, len(before))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||` in float64; infinite where the shapes differ or a value is not finite."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.to("cpu", torch.float64)
    difference = (actual.to("cpu", torch.float64) - expected).norm()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)) if difference else 0.0


@torch.no_grad()
def settle_(model: nn.Module, *batch: Any) -> nn.Module:
    """Make a freshly initialised model fit for `verify`, in place; a trained one needs no such thing.

    Fresh models hide what their blocks compute behind zero-initialised norms and layer scales of 1e-6, so that a wrong
    conversion would look right. All vectors and all constant or tiny parameters are drawn anew (biases from N(0, 0.1²),
    the others from U(0.5, 1.5)), then running statistics follow the batch three times.

    Args:
        model: changed in place.
        *batch: positional arguments of its forward.

    Returns:
        The same object, in eval mode.
    """
    for name, parameter in model.named_parameters():
        constant = parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all())
        if parameter.dim() <= 1 or constant or float(parameter.abs().max()) < 1e-3:
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            else:
                parameter.uniform_(0.5, 1.5)
    model.train()
    for _ in range(3):
        model(*batch)
    return model.eval()


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    arguments = Inputs.of(inputs)
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(0)  # some models draw at random even in eval mode
        outputs = model(*arguments.args, **arguments.kwargs)
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module is back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

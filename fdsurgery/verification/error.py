"""Relative errors of tensors, and how large one may be in which dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = 1e-5
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Where numbers have fewer digits: about four units of the last place."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||` in float64; infinite where the shapes differ or a value is not finite."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.detach().to("cpu", torch.float64)
    difference = (actual.detach().to("cpu", torch.float64) - expected).norm()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)) if difference else 0.0


def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of the outputs of two models; infinite where there are none, or not as many of each."""
    if not expected or len(actual) != len(expected):
        return float("inf")
    return max(map(_error_of_outputs, actual, expected))


def _error_of_outputs(actual: Tensor, expected: Tensor) -> float:
    """As `relative_error`, of the values that are finite in either: hidden logits of -inf in both are no difference."""
    if actual.shape == expected.shape and actual.layout == expected.layout == torch.strided:
        same = ((actual == expected) | (actual.isnan() & expected.isnan())) & ~expected.isfinite()
        if bool(same.any()) and not bool(same.all()):
            actual, expected = actual.masked_fill(same, 0), expected.masked_fill(same, 0)
    return relative_error(actual, expected)


def tolerance_of(tensor: Tensor) -> float:
    """By the dtype."""
    return TOLERANCES.get(tensor.dtype, TOLERANCE)

"""What the kernels for GPUs share. They are the operator's steps, fused: the same mathematics, less memory traffic.

Each is launched by a custom operator (`fdconv.gpu.ops`), and computes in float32.
Where sums run over samples or blocks, every program writes partial sums that are added up afterwards, never atomics:
the results are the same in every run. Block sizes of the forward kernels are chosen by measurement, and may change from
process to process how sums are rounded, unless `torch.use_deterministic_algorithms` is on. Only first derivatives are
defined.

The kernels need Triton, on a CUDA device or in Triton's interpreter (the environment variable `TRITON_INTERPRET=1`, set
before Triton is first imported); without it the modules can still be imported, and `available` says no.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None

ABOUT = ["about_samples", "about_pixels"]
"""Arguments that are for the tuner alone: numbers rounded up to powers of two, so that it is not asked for each."""


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device: CUDA with Triton, or any in Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or is_interpreted())


def is_interpreted() -> bool:
    """Whether Triton only interprets kernels."""
    return not isinstance(_nothing, triton.JITFunction)


def jit(function: Any, **options: Any) -> Any:
    """`triton.jit`, or without Triton nothing: the kernels are then plain functions that nobody calls."""
    return function if triton is None else triton.jit(function, **options)


@jit
def _nothing():  # type: ignore[no-untyped-def]
    pass

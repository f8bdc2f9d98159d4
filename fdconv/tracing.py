"""Whether somebody traces, transforms or differentiates once more what is called."""

from __future__ import annotations

import torch
from torch import Tensor


def is_transformed() -> bool:
    """True where somebody traces or transforms what is called, and wants to see differentiable operations of torch."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.utils._python_dispatch._get_current_dispatch_mode() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def wants_operations(grad: Tensor) -> bool:
    """True in a backward pass that somebody differentiates once more, transforms or takes many gradients at once in."""
    return torch.is_grad_enabled() or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)

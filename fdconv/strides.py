"""Results laid out in memory as PyTorch's own layers lay them out, whatever way they were computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def is_channels_last(x: Tensor) -> bool:
    """True for `(B, C, H, W)` whose strides PyTorch takes for channels-last, sliced and expanded ones included."""
    if x.dim() != 4 or torch.jit.is_tracing():  # a traced graph has no strides
        return False
    return bool(suggest_memory_format(x) == torch.channels_last)


def as_conv_result(y: Tensor, x: Tensor, weight_is_channels_last: bool) -> Tensor:
    """The result of a convolution in the memory format that `nn.Conv2d` gives it.

    Args:
        y: the result, `(B, C_out, H', W')`.
        x: the layer's input, `(B, C_in, H, W)`.
        weight_is_channels_last: of the weight that `nn.Conv2d` would have.
    """
    either = weight_is_channels_last or is_channels_last(x)
    if either and not (x.is_cuda and x.dtype == torch.float64):  # cuDNN has no such format for float64
        return y.contiguous(memory_format=torch.channels_last)
    return y.contiguous()


def contiguous(x: Tensor) -> Tensor:
    """The same values in rows, in a way that holds for what a compiled graph meets when it runs.

    A tracer may take a tensor for contiguous that is not when the graph runs: some operations keep the strides of their
    input in eager mode only. A reshape would then be recorded as a view, which fails.
    """
    if torch.compiler.is_compiling():
        return x.clone(memory_format=torch.contiguous_format)
    return x.contiguous()


def owned(x: Tensor) -> Tensor:
    """The same tensor, but no view of another one: what a custom autograd function returns may be changed in place."""
    result: Tensor = torch.ops.aten._unsafe_view(x, x.shape) if x._is_view() else x
    return result


def memory_format(channels_last: bool) -> torch.memory_format:
    """The memory format of four axes: channels-last, or in rows."""
    return torch.channels_last if channels_last else torch.contiguous_format

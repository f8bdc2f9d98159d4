"""What to lower where a dynamic layer runs out of memory."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .reference import WeightShape


def explained(x: Tensor, shape: WeightShape) -> contextlib.AbstractContextManager[None]:
    """A region in which `torch.OutOfMemoryError` also tells what a layer holds, and what would make it less.

    It stays the same error, with torch's message first, for programs that catch it and look there.

    Args:
        x: the layer's input, `(B, ...)`.
        shape: of the layer's weight.
    """
    if torch.compiler.is_compiling():  # older compilers take no context managers of others
        return contextlib.nullcontext()
    return _Explained(x, shape)


class _Explained:
    def __init__(self, x: Tensor, shape: WeightShape) -> None:
        self.x, self.shape = x, shape

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            error.args = (f"{error}\n{advice(self.x.shape[0], self.shape)}",)


def advice(samples: int, shape: WeightShape) -> str:
    """What to lower, for a layer with a weight for each of some samples."""
    own = (shape.out_channels, shape.in_channels, *shape.kernel_size)
    size = samples * shape.numel * 4 / 2**20
    return (
        f"This was in a dynamic layer. Each of its {samples} samples has a weight {own} of its own, in float32 "
        f"{size:,.0f} MiB together, and more while they are made. Lower the batch size (and accumulate "
        "gradients), or keep the widest layers static by a recipe. Where images are large, lower their size, or "
        "recompute activations (torch.utils.checkpoint; gradient_checkpointing in transformers)"
    )

"""What follows from sizes alone, made once: bases, masks, maps of groups, twiddle factors."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .tracing import is_transformed

T = TypeVar("T")


def constant(make: Callable[..., T], *arguments: Any, of_input: bool = False) -> T:
    """What `make` gives for some sizes, devices and dtypes, kept for the next call; the latest 64 are.

    Args:
        make: gives tensors, on a device that it or an argument of it names.
        *arguments: of it; hashable.
        of_input: True if they are sizes of an input, which may be symbols while somebody traces. Then `make` is a part
            of the trace, and nothing is kept. Otherwise what it gives is a constant of the trace.
    """
    if of_input and is_transformed():
        return make(*arguments)
    return _kept(make, *arguments)


@lru_cache(maxsize=64)
def _kept(make: Callable[..., T], *arguments: Any) -> T:
    # The first call may come in inference mode, or while tracing with fake tensors; what is kept must be neither.
    with _disable_current_modes(), torch.inference_mode(False):
        return make(*arguments)

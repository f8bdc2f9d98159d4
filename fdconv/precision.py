"""In which precision the operator computes, whatever the model and autocast use around it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def fft_dtype(dtype: torch.dtype) -> torch.dtype:
    """Fourier transforms and means run in float32, or in float64 where the data is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """The most precise dtype of a device, for what is computed once: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A region in which autocast, if on, does not lower the precision."""
    if torch.amp.autocast_mode.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()  # where autocast is off, or unknown as on meta


def holds_no_values(tensor: torch.Tensor) -> bool:
    """True on the meta device and for the fake tensors of a tracer."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)

"""In which precision the operator computes, whatever the model and autocast use around it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def fft_dtype(dtype: torch.dtype) -> torch.dtype:
    """Fourier transforms and means run in float32, or in float64 where the data is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """The most precise dtype of a device, for what is computed once: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def rescaled(values: Tensor, factor: Tensor) -> Tensor:
    """Values times a factor that broadcasts to them, rounded once to their dtype."""
    exact = exact_dtype(values.device)
    return (values.to(exact) * factor.to(exact).to(values.device)).to(values.dtype)


def autocast_is_on(device: torch.device) -> bool:
    """True where autocast would choose the precision on this kind of device."""
    if torch.compiler.is_compiling():  # the compiler of torch 2.7 cannot trace the question below
        known = device.type in ("cpu", "cuda", "mps", "xpu")
    else:
        known = torch.amp.autocast_mode.is_autocast_available(device.type)  # not on meta
    return known and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A region in which autocast, if on, does not lower the precision."""
    if autocast_is_on(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def holds_no_values(tensor: torch.Tensor) -> bool:
    """True on the meta device and for the fake tensors of a tracer."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)

"""The inverse Fourier transform of spectra in real arithmetic, for exported models.

ONNX has no complex numbers, and onnxruntime's `DFT` is slow and inexact at sizes that are no power of two. Here an axis
is transformed digit by digit (Cooley and Tukey, mixed radix), in products with small real matrices that hold the
twiddle factors as well: any size, and operators that every runtime has.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from .constants import constant

LARGEST = 16
"""Factor up to which runtimes take a step about as fast as memory goes."""

_TELLS_MODELS = torch.__version__ >= "2.8"
"""Whether `torch.onnx.export(dynamo=True)` lets a model know that it is traced for ONNX."""


def writes_onnx() -> bool:
    """True while `torch.onnx.export` traces what calls."""
    if torch.onnx.is_in_onnx_export():
        return True
    if _TELLS_MODELS or not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
        return False
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        if frame.f_globals.get("__name__", "").startswith("torch.onnx."):
            return True
    return False


def refuse_old_exporter() -> None:
    """Raises `RuntimeError` within `torch.onnx.export(..., dynamo=False)`, whose operators do not suffice."""
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "torch.onnx.export(..., dynamo=False) cannot export dynamic layers, for its operators do not suffice: "
            "use torch.onnx.export(model, args, file, dynamo=True, dynamic_shapes=({0: 'batch'},))"
        )


def factors(size: int) -> list[int]:
    """Factors of a size, each the largest up to `LARGEST`, or the smallest where there is none; `[1]` of 1."""
    if size == 1:
        return [1]
    found = []
    while size > 1:
        divisors = [divisor for divisor in range(2, size + 1) if size % divisor == 0]
        found.append(max((divisor for divisor in divisors if divisor <= LARGEST), default=divisors[0]))
        size //= found[-1]
    return found


def padded(x: Tensor, width: int) -> Tensor:
    """Zeros behind the columns of half spectra, `(..., D2h)` to the `(..., D2p)` that `real_image` takes."""
    first = factors(width)[0]
    return F.pad(x, (0, (first // 2 + 1) * (width // first) - x.shape[-1]))


def planes(spectra: Tensor, width: int) -> Tensor:
    """Lay half spectra out for `real_image`, each column as often as the image has a frequency of its kind.

    Args:
        spectra: `(..., D1, D2h, 2)`, float32 or float64.
        width: `D2`.

    Returns:
        `(..., 2, D1, D2p)`.
    """
    times = constant(_times, width, spectra.dtype).to(spectra.device)
    return padded((spectra * times).movedim(-1, -3), width)


def real_image(x: Tensor, width: int) -> Tensor:
    """What `torch.fft.irfft2` gives for spectra that `planes` laid out.

    Args:
        x: `(B, 2, D1, D2p)`, real and imaginary parts, float32 or float64.
        width: `D2`.

    Returns:
        `(B, D1, D2)`.
    """
    rows = _transformed(x.flatten(1, 2), x.shape[2], real=False)
    return _transformed(rows.transpose(1, 2), width, real=True).transpose(1, 2)


def _transformed(x: Tensor, size: int, *, real: bool) -> Tensor:
    """Transform an axis that holds real and then imaginary parts: `(B, 2*n, M)` to `(B, size, 2*M)`, or `M` if real."""
    batch, digits = x.shape[0], factors(size)
    for step in constant(_steps, size, real, x.dtype):
        x = step.to(x.device) @ x.reshape(batch, step.shape[0], step.shape[2], -1)
    # This turns the digits round, and the caller moves one axis: runtimes do either in blocks, and number by number
    # what is both.
    x = x.reshape(batch, *digits, -1).permute(0, *range(len(digits), 0, -1), -1)
    return x.reshape(batch, size, -1)


def _times(width: int, dtype: torch.dtype) -> Tensor:
    """How often each column of a half spectrum counts, `(D2h, 1)`: twice if it stands for a negative frequency, too."""
    column = torch.arange(width // 2 + 1, dtype=torch.int64, device="cpu")
    return (2 - ((column == 0) | (2 * column == width)).to(dtype)).unsqueeze(1)


def _steps(size: int, real: bool, dtype: torch.dtype) -> list[Tensor]:
    """Matrices that transform an axis, for each factor `f` `(K, f*2, 2*f)`, with `K` the product of the factors before.

    With frequencies `n = n_1*size/f_1 + n_2*size/(f_1*f_2) + ...` and positions `k = k_1 + f_1*k_2 + ...`, step `j`
    sums over the digit `n_j` for each `(k_1, ..., k_{j-1})` and leaves `k_j` in its place. If real, the first step has
    no columns for frequencies above half, and the last one no rows for imaginary parts.
    """
    steps, position, done = [], torch.zeros(1, dtype=torch.int64, device="cpu"), 1
    for factor in factors(size):
        position = position[:, None] + done * torch.arange(factor, dtype=torch.int64, device="cpu")
        done *= factor
        taken = factor // 2 + 1 if real and factor == done else factor
        # Reduced in integers: a product of floats would lose the digits that count.
        columns = torch.arange(taken, dtype=torch.int64, device="cpu")
        angle = (position[..., None] * columns % done).double() * (2 * torch.pi / done)
        cos, sin = angle.cos() / factor, angle.sin() / factor
        parts = [torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)]
        steps.append(torch.stack(parts[:1] if real and done == size else parts, 2).flatten(1, 2).to(dtype))
        position = position.flatten()
    return steps

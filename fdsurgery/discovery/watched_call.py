"""One call of a layer, watched: the convolution or product that it ends in, and what else it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fdconv.precision import without_autocast

from .kinds import known_kind


def watch(
    layer: nn.Module, x: Tensor, training: bool = False, differentiable: bool = False, autocast: bool = False
) -> dict[str, Any] | None:
    """The arguments of the only convolution or product; None if what is returned is not its result.

    Besides: whether the layer `draws` from a generator of its own and `reads` its input or output, and the dtype that
    it `gives`.
    """
    for module in layer.modules():
        module.__dict__["training"] = training  # not `train()`, which a class may have filled with more
    precision = torch.autocast(x.device.type, torch.bfloat16) if autocast else without_autocast(x.device)
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable), precision:
        given = x.clone().requires_grad_().view_as(x) if differentiable else x
        version = given._version
        with _Calls(given) as calls:
            result = type(layer).forward(layer, given)
    if len(calls.seen) != 1 or calls.seen[0][1] is not result:
        return None
    call = calls.seen[0][0]
    hooked = [tensor for tensor in (result, call["weight"]) if tensor._backward_hooks]
    call["reads"] = calls.reads or bool(hooked) or given._version != version
    call["gives"], call["draws"] = result.dtype, calls.draws
    if call["input"] is given:
        call["input"] = x
    return call


class _Calls(TorchFunctionMode):
    """What a layer computes with, and whether it does more with its input or output than a plain one."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.seen: list[tuple[dict[str, Any], Tensor]] = []
        self.draws = False
        self.reads = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.draws |= isinstance((kwargs or {}).get("generator"), torch.Generator)
        if func in _ARGUMENTS:
            given = {**_DEFAULTS, **dict(zip(_ARGUMENTS[func], args, strict=False)), **(kwargs or {})}
            self.seen.append((given, result))
        elif isinstance(result, Tensor) and func is not F.pad:
            used = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
            self.reads |= any(value is self.x and result is not value for value in used)
            self.reads |= any(value is output for value in used for _, output in self.seen)
        return result


_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    F.linear: ("input", "weight", "bias"),
}
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def probes(layer: Any) -> list[Tensor]:
    """Two inputs of sizes at which every way of padding shows."""
    made: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    kind = known_kind(layer)
    channels, _ = kind.channels(layer)
    shapes: list[tuple[int, ...]] = [(1, 4, channels), (2, 3, channels)]
    if kind.convolves:
        reach = [
            (kernel - 1) * dilation + 1 for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        shapes = [(batch, channels, *(size + axis + 1 + batch for axis, size in enumerate(reach))) for batch in (1, 2)]
    source = torch.Generator().manual_seed(0)
    if layer.weight.is_meta:
        return [torch.empty(shape, **made) for shape in shapes]
    return [torch.randn(shape, generator=source, dtype=torch.float32, device="cpu").to(**made) for shape in shapes]


def alike(first: dict[str, Any] | None, second: dict[str, Any] | None) -> bool:
    """True if two calls, on different inputs, used the same weights in the same way."""
    if first is None or second is None:
        return first is second
    return all(
        _same(second[key], given) if isinstance(given, Tensor) else second[key] == given
        for key, given in first.items()
        if key in _ARGUMENTS[F.conv2d] and key != "input"
    )


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and (a.is_meta or torch.equal(a, b))


def pair(value: Any) -> list[int]:
    """Height and width, where one number may stand for both."""
    return [value, value] if isinstance(value, int) else list(value)

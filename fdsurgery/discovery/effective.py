"""The plain layer that a layer amounts to, where its class computes the weight or pads the input in a way of its own.

Weight standardisation (BiT, NFNet), TensorFlow's padding (`tf_efficientnet_*`), `torch.nn.utils.parametrize`: each ends
in one call of `F.conv2d` or `F.linear`. That call is watched, so no class has to be known by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from fdconv.precision import without_autocast

from .twin import same_random_numbers, twin_of


@dataclass(frozen=True)
class Effective:
    """What a layer amounts to."""

    layer: nn.Conv2d | nn.Linear
    """The layer itself if it is a plain one; else a plain one with a copy of the weight that the layer computes."""
    pads_same: bool = False
    """True if the input is padded with zeros first, by `same_padding`."""


def same_padding(size: Sequence[int], conv: nn.Conv2d) -> list[int]:
    """TensorFlow's padding for an input of `(height, width)`: the output's size is the input's over the stride.

    Returns:
        left, right, top and bottom, as `F.pad` takes them; the odd zero is put at the right and the bottom.
    """
    pads: list[int] = []
    for length, kernel, stride, dilation in zip(size, conv.kernel_size, conv.stride, conv.dilation, strict=True):
        total = max((-(-length // stride) - 1) * stride + (kernel - 1) * dilation + 1 - length, 0)
        pads = [total // 2, total - total // 2, *pads]
    return pads


def effective_layer(layer: nn.Module) -> Effective | str:
    """The plain layer that `layer` amounts to, or why there is none, in words.

    Args:
        layer: an `nn.Conv2d` or `nn.Linear`, or of a class derived from one. A copy of it is called, in eval mode.
    """
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    if _is_own(layer) and not parametrize.is_parametrized(layer):
        return Effective(layer)
    # Spectral norm, for one, takes a step whenever its weight is read in training mode.
    with same_random_numbers(layer):
        effective = _watched(twin_of(layer, meta=False)[0])
    if isinstance(effective, Effective):
        effective.layer.train(layer.training)
    return effective


def _watched(layer: Any) -> Effective | str:
    if _is_own(layer):
        return Effective(_plain(layer, layer.weight, layer.bias))
    base = "nn.Conv2d" if isinstance(layer, nn.Conv2d) else "nn.Linear"
    unlike = f"its forward is not {base}'s own: {type(layer).__name__} "
    try:
        calls = [_watch(layer, x) for x in _probes(layer)]
    except Exception as error:
        return f"{unlike}could not be called by itself ({type(error).__name__})"
    if any(call is None for call in calls):
        return f"{unlike}does more than one convolution or product"
    (x, first), (y, second) = calls  # type: ignore[misc]
    weight, bias = first["weight"], first["bias"]
    if not weight.is_meta and not (torch.equal(weight, second["weight"]) and weight.shape == layer.weight.shape):
        return f"{unlike}computes its weight from the input"
    if isinstance(layer, nn.Linear):
        return Effective(_plain(layer, weight, bias)) if first["input"] is x else f"{unlike}changes the input first"
    if any(tuple(_pair(first[key])) != tuple(getattr(layer, key)) for key in ("stride", "dilation")):
        return f"{unlike}convolves with another stride or dilation than it says"
    if first["input"] is x and second["input"] is y:
        conv = _plain(layer, weight, bias)
        if not isinstance(first["padding"], str):
            first["padding"] = tuple(_pair(first["padding"]))
        conv.padding = first["padding"]
        return Effective(conv) if conv.padding_mode == "zeros" else f"{unlike}ignores its padding mode"
    padded = all(_is_padded_same(layer, given, call["input"]) for given, call in ((x, first), (y, second)))
    if padded and not any(_pair(first["padding"])):
        conv = _plain(layer, weight, bias)
        conv.padding = (0, 0)
        return Effective(conv, pads_same=True)
    return f"{unlike}changes the input first"


def _is_own(layer: nn.Module) -> bool:
    """True if the layer's class computes what its base does."""
    base = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    kind: Any = type(layer)
    return kind.forward is base.forward and getattr(kind, "_conv_forward", None) is getattr(base, "_conv_forward", None)


def _plain(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> Any:
    """A plain layer of the same geometry with copies of these tensors."""
    plain: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Conv2d):
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias is not None,
            layer.padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    learns = any(parameter.requires_grad for parameter in layer.parameters())
    plain.weight = nn.Parameter(weight.detach().clone(), learns)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), learns and bias.requires_grad)
    return plain


class _Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[dict[str, Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ARGUMENTS:
            given = {**_DEFAULTS, **dict(zip(_ARGUMENTS[func], args, strict=False)), **(kwargs or {})}
            self.seen.append((given, result))
        return result


_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    F.linear: ("input", "weight", "bias"),
}
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@torch.no_grad()
def _watch(layer: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any]] | None:
    """The input, and the arguments of the only convolution or product; None if what is returned is not its result."""
    with _Calls() as calls, without_autocast(x.device):
        result = type(layer).forward(layer, x)
    return (x, calls.seen[0][0]) if len(calls.seen) == 1 and calls.seen[0][1] is result else None


def _probes(layer: nn.Conv2d | nn.Linear) -> list[Tensor]:
    """Two inputs of sizes at which every way of padding shows."""
    made: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        shapes: list[tuple[int, ...]] = [(2, 3, layer.in_features)] * 2
    else:
        reach = [
            (kernel - 1) * dilation + 1 for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        shapes = [(1, layer.in_channels, reach[0] + extra, reach[1] + extra + 1) for extra in (2, 3)]
    source = torch.Generator().manual_seed(0)
    if layer.weight.is_meta:
        return [torch.empty(shape, **made) for shape in shapes]
    return [torch.randn(shape, generator=source).to(**made) for shape in shapes]


def _is_padded_same(conv: nn.Conv2d, x: Tensor, padded: Tensor) -> bool:
    expected = F.pad(x, same_padding(x.shape[-2:], conv))
    return expected.shape == padded.shape and (x.is_meta or torch.equal(expected, padded))


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)

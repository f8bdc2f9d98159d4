"""The plain layer that a layer amounts to, where its class computes the weight or pads the input in a way of its own.

Weight standardisation (BiT, NFNet), TensorFlow's padding (`tf_efficientnet_*`), `torch.nn.utils.parametrize`: each ends
in one call of `F.conv2d` or `F.linear`. That call is watched, so no class has to be known by name.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from fdconv.precision import without_autocast

from .shadow import same_random_numbers, twin_of

HOLDS_ZEROS = "holds some of its weight at zero, as masked convolutions do"


@dataclass(frozen=True)
class Effective:
    """What a layer amounts to."""

    layer: nn.Conv2d | nn.Linear
    """The layer itself if it is a plain one; else a plain one with a copy of the weight that the layer computes."""
    pads_same: bool = False
    """True if the input is padded with zeros first, by `same_padding`."""
    verbatim: bool = True
    """True if the weight is the layer's own as it stands, and not computed from it."""


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
        layer: an `nn.Conv2d` or `nn.Linear`, or of a class derived from one. If the class has a forward of its own, a
            copy is called, more than once: in eval mode, and in training mode, where it must do the same.
    """
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    if is_plain(layer):
        return Effective(layer)
    with same_random_numbers():
        effective = _watched(_private_twin(layer), next(layer.parameters()).device)
    if isinstance(effective, Effective):
        effective.layer.train(layer.training)
    return effective


def is_plain(layer: nn.Module) -> bool:
    """True if a layer's class computes what `nn.Conv2d` or `nn.Linear` does, with its parameters as they stand."""
    return _is_own(layer) and not parametrize.is_parametrized(layer)


_MOST_FILLED = 2**22
"""Values of a layer on the meta device that gets numbers for the probe; a larger one is only asked for its shapes."""


def _private_twin(layer: nn.Module) -> nn.Module:
    """A copy in eval mode that may write to its own weights, on a device that computes."""
    count = sum(parameter.numel() for parameter in layer.parameters())
    on_meta = any(parameter.is_meta for parameter in layer.parameters())
    twin = twin_of(layer, meta=False)[0]
    with torch.no_grad():
        if on_meta and count <= _MOST_FILLED:
            twin.to_empty(device="cpu")
            for buffer in twin.buffers():
                buffer.fill_(1)
            for parameter in twin.parameters():
                parameter.uniform_(0.5, 1.5)
        else:
            shared = {id(parameter) for parameter in layer.parameters()}
            for module in twin.modules():
                for key, held in module._parameters.items():
                    if held is not None and id(held) in shared:
                        module._parameters[key] = nn.Parameter(held.detach().clone(), held.requires_grad)
    return twin


def _watched(layer: Any, device: torch.device) -> Effective | str:
    """What a copy of a layer, which may be spoilt, amounts to."""
    base = "nn.Conv2d" if isinstance(layer, nn.Conv2d) else "nn.Linear"
    unlike = f"its forward is not {base}'s own: {type(layer).__name__} "
    if parametrize.is_parametrized(layer) and _is_own(layer):
        unlike = "its weight is parametrised: it "
    before, state = _members(layer), _random_states()
    x, y = _probes(layer)
    in_training = not _is_of_torch(layer)
    try:
        calls = [_watch(layer, x), _watch(layer, y, training=in_training, differentiable=in_training)]
        if in_training and not _alike(*calls) and _alike(calls[0], _watch(layer, y)):
            return f"{unlike}does something else in training than in evaluation"
    except Exception as error:
        return f"{unlike}could not be called by itself ({type(error).__name__})"
    first, second = calls
    if first is None or second is None:
        return f"{unlike}does more than one convolution or product"
    if _random_states() != state or first["draws"] or second["draws"]:
        return f"{unlike}draws random numbers"
    if stored := sorted(key for key, value in _members(layer).items() if before.get(key) != value):
        if stored[0] in layer._parameters:
            return f"{unlike}writes to its own parameters as it runs"
        return f"{unlike}stores {stored[0]!r} on the layer as it runs, which others may read"
    weight, bias = first["weight"], first["bias"]
    if weight.shape != _shape(layer) or not _alike(first, second):
        return f"{unlike}computes its weight from the input"
    if first["reads"] or second["reads"]:
        if first["input"] is x and second["input"] is y:
            return f"{unlike}uses its input or its output for something else too"
        return f"{unlike}changes the input first"
    if _stays_float(layer, x):
        return f"{unlike}computes in float32 where autocast is on"
    plain = _plain(layer, weight, bias, device)
    verbatim = weight is layer._parameters.get("weight") and bias is layer._parameters.get("bias")
    if reason := _of_what_it_computes_from(layer, x, modes=(False, True) if in_training else ()):
        return unlike + reason
    if isinstance(layer, nn.Linear):
        return Effective(plain, verbatim=verbatim) if first["input"] is x else f"{unlike}changes the input first"
    if any(tuple(_pair(first[key])) != tuple(getattr(layer, key)) for key in ("stride", "dilation")):
        return f"{unlike}convolves with another stride or dilation than it says"
    if first["input"] is x and second["input"] is y:
        if not isinstance(first["padding"], str):
            first["padding"] = tuple(_pair(first["padding"]))
        verbatim = verbatim and layer.padding == first["padding"]
        plain.padding = first["padding"]
        return (
            Effective(plain, verbatim=verbatim)
            if plain.padding_mode == "zeros"
            else f"{unlike}ignores its padding mode"
        )
    padded = all(_is_padded_same(layer, given, call["input"]) for given, call in ((x, first), (y, second)))
    if padded and not any(_pair(first["padding"])):
        verbatim = verbatim and not isinstance(layer.padding, str) and not any(layer.padding)
        plain.padding = (0, 0)
        return Effective(plain, pads_same=True, verbatim=verbatim)
    return f"{unlike}changes the input first"


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and (a.is_meta or torch.equal(a, b))


def _members(layer: nn.Module) -> dict[str, Any]:
    """What shows whether a forward has left something on its layer: who the attributes are, and how long."""
    held = {
        key: (id(value), value._version if isinstance(value, Tensor) else len(value) if isinstance(value, Sized) else 0)
        for key, value in vars(layer).items()
        if key != "training"
    }
    counted = {
        key: (id(tensor), tensor._version) for key, tensor in (*layer.named_parameters(), *layer.named_buffers())
    }
    # Spectral norm takes a step of its power iteration whenever its weight is read in training mode.
    return held | {key: value for key, value in counted.items() if not key.startswith("parametrizations.")}


def _is_of_torch(layer: nn.Module) -> bool:
    """True for torch's own norms of weights, which do nothing at random but may keep the running estimate of a norm."""
    parts = [part for part in layer.modules() if part is not layer]
    return _is_own(layer) and all(
        type(part).__module__.startswith(("torch.nn.utils.", "torch.nn.modules.container")) for part in parts
    )


def _alike(first: dict[str, Any] | None, second: dict[str, Any] | None) -> bool:
    """True if two calls, on different inputs, used the same weights in the same way."""
    if first is None or second is None:
        return first is second
    return all(
        _same(second[key], given) if isinstance(given, Tensor) else second[key] == given
        for key, given in first.items()
        if key in _ARGUMENTS[F.conv2d] and key != "input"
    )


def _random_states() -> list[Any]:
    """Of every generator that a forward may draw from without being given one."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    tensors = [state.tolist() for state in (torch.get_rng_state(), *on_gpus)]
    numpy = sys.modules.get("numpy")
    return [*tensors, random.getstate(), repr(numpy.random.get_state(legacy=False)) if numpy else None]


def _stays_float(layer: nn.Module, x: Tensor) -> bool:
    """True if the layer gives float32 under autocast, where a plain one gives fewer digits."""
    if x.dtype != torch.float32 or x.is_meta:
        return False
    call = _watch(layer, x, autocast=True)
    return call is not None and bool(call["weight"].dtype == torch.float32) and call["gives"] == torch.float32


def _shape(layer: nn.Conv2d | nn.Linear) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def _of_what_it_computes_from(layer: Any, x: Tensor, modes: Iterable[bool]) -> str | None:
    """Why the weight that a class computes, in these modes, cannot be taken for one that learns freely."""
    parameters = dict(layer.named_parameters())
    own = {name: parameter for name, parameter in parameters.items() if name not in ("weight", "bias")}
    learning = {parameter.requires_grad for name, parameter in parameters.items() if name != "bias"}
    if len(learning) > 1:
        return "computes its weight from parameters of which some are frozen"
    if x.is_meta:
        return None
    call = None
    always = torch.ones_like(layer.weight, dtype=torch.bool)
    for _ in range(2):  # what is zero each time is so by the class, and not by chance or for want of digits
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name != "bias":
                    parameter.uniform_(0.5, 1.5)
                parameter.requires_grad_()
            before = {name: parameter.clone() for name, parameter in parameters.items()}
        call = _watch(layer, x, differentiable=bool(own))
        assert call is not None
        always = always & (call["weight"] == 0)
    assert call is not None
    if bool(always.any()):
        return HOLDS_ZEROS
    made = [call[key] for key in ("weight", "bias") if call[key] is not None and call[key].requires_grad]
    if any(not torch.equal(parameter, before[name]) for name, parameter in parameters.items()):
        return "writes to its own parameters as it runs"
    reached = torch.autograd.grad([value.sum() for value in made], list(own.values()), allow_unused=True) if own else ()
    for name, gradient in zip(own, reached, strict=True):
        if gradient is None:
            return f"has a parameter {name!r} that is no part of its weight and would be lost"
    return _of_how_it_learns(layer, x, modes)


def _of_how_it_learns(layer: Any, x: Tensor, modes: Iterable[bool]) -> str | None:
    """What shows when the parameters move: rounding, gradients that are scaled or stopped, weights of one sign."""
    source = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=source, dtype=torch.float32, device="cpu").to(like.device)

    def weight_at(step: float, training: bool) -> Tensor:
        with torch.no_grad():
            for parameter, start, direction in zip(learned, starts, directions, strict=True):
                parameter.copy_(start + step * direction)
        call = _watch(layer, x, training, differentiable=True)
        assert call is not None
        weight: Tensor = call["weight"]
        return weight

    learned = list(layer.parameters())
    starts, directions = ([drawn(parameter) for parameter in learned] for _ in range(2))
    in_evaluation = None
    for training in modes:
        weight = weight_at(0, training)
        if in_evaluation is None:
            in_evaluation = weight.detach().clone()
        if not torch.equal(weight, in_evaluation):
            return "computes another weight in training than in evaluation"
        if bool((weight >= 0).all()):
            return "keeps its weight from being negative"
        if weight.dtype not in (torch.float32, torch.float64):
            continue  # too few digits for differences
        output_side = drawn(weight).to(weight.dtype)
        gradients: Any = [None] * len(learned)
        if weight.requires_grad:
            gradients = torch.autograd.grad(weight, learned, output_side, allow_unused=True)
        told = [gradient * way for gradient, way in zip(gradients, directions, strict=True) if gradient is not None]
        ahead, behind = (weight_at(step, training).detach().clone() for step in (_STEP, -_STEP))
        moved = output_side * (ahead - behind) / (2 * _STEP)
        size = sum(float(terms.norm()) ** 2 for terms in (moved, *told)) ** 0.5
        if abs(float(moved.sum()) - sum(float(terms.sum()) for terms in told)) > 0.05 * size:
            return "passes on other gradients than those of its weight, as where weights are rounded"
    return None


_STEP = 1e-3
"""Small against the weights of the probe, which are from N(0, 1), and large against their rounding."""


def _is_own(layer: nn.Module) -> bool:
    """True if the layer's class computes what its base does."""
    base = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    kind: Any = type(layer)
    return kind.forward is base.forward and getattr(kind, "_conv_forward", None) is getattr(base, "_conv_forward", None)


def _plain(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None, device: torch.device) -> Any:
    """A plain layer of the same geometry with copies of these tensors."""
    weight_learns = any(parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")
    own_bias = layer._parameters.get("bias")
    bias_learns = weight_learns if own_bias is None else own_bias.requires_grad
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
    plain.weight = nn.Parameter(weight.detach().clone().to(device), weight_learns)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone().to(device), bias_learns)
    return plain


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


def _watch(
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


def _probes(layer: nn.Conv2d | nn.Linear) -> list[Tensor]:
    """Two inputs of sizes at which every way of padding shows."""
    made: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        shapes: list[tuple[int, ...]] = [(1, 4, layer.in_features), (2, 3, layer.in_features)]
    else:
        reach = [
            (kernel - 1) * dilation + 1 for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        shapes = [(batch, layer.in_channels, reach[0] + 1 + batch, reach[1] + 2 + batch) for batch in (1, 2)]
    source = torch.Generator().manual_seed(0)
    if layer.weight.is_meta:
        return [torch.empty(shape, **made) for shape in shapes]
    return [torch.randn(shape, generator=source, dtype=torch.float32, device="cpu").to(**made) for shape in shapes]


def _is_padded_same(conv: nn.Conv2d, x: Tensor, padded: Tensor) -> bool:
    expected = F.pad(x, same_padding(x.shape[-2:], conv))
    return expected.shape == padded.shape and (x.is_meta or torch.equal(expected, padded))


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)

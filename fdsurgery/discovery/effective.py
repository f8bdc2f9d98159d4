"""The plain layer that a layer amounts to, where its class computes the weight or pads the input in a way of its own.

Weight standardisation (BiT, NFNet), TensorFlow's padding (`tf_efficientnet_*`), `torch.nn.utils.parametrize`: each ends
in one call of `F.conv2d` or `F.linear`. That call is watched, so no class has to be known by name.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .computed_weight import why_not_free
from .kinds import known_kind
from .shadow import same_random_numbers, twin_of
from .watched_call import alike, pair, probes, watch


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
    if is_plain(layer):
        return Effective(layer)  # type: ignore[arg-type]
    with same_random_numbers():
        effective = _watched(_private_twin(layer), next(layer.parameters()).device)
    if isinstance(effective, Effective):
        effective.layer.train(layer.training)
    return effective


def is_plain(layer: nn.Module) -> bool:
    """True if a layer's class computes what `nn.Conv2d` or `nn.Linear` does, with its parameters as they stand."""
    return _is_own(layer) and not parametrize.is_parametrized(layer)


def _is_own(layer: nn.Module) -> bool:
    """True if the layer's class computes what its base does."""
    base: Any = known_kind(layer).plain
    kind: Any = type(layer)
    return kind.forward is base.forward and getattr(kind, "_conv_forward", None) is getattr(base, "_conv_forward", None)


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
    kind = known_kind(layer)
    unlike = f"its forward is not nn.{kind.plain.__name__}'s own: {type(layer).__name__} "
    if parametrize.is_parametrized(layer) and _is_own(layer):
        unlike = "its weight is parametrised: it "
    before, state = _members(layer), _random_states()
    x, y = probes(layer)
    in_training = not _is_of_torch(layer)
    try:
        calls = [watch(layer, x), watch(layer, y, training=in_training, differentiable=in_training)]
        if in_training and not alike(*calls) and alike(calls[0], watch(layer, y)):
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
    if weight.shape != kind.weight_shape(layer) or not alike(first, second):
        return f"{unlike}computes its weight from the input"
    if first["reads"] or second["reads"]:
        if first["input"] is x and second["input"] is y:
            return f"{unlike}uses its input or its output for something else too"
        return f"{unlike}changes the input first"
    if _stays_float(layer, x):
        return f"{unlike}computes in float32 where autocast is on"
    plain = _plain(layer, weight, bias, device)
    verbatim = weight is layer._parameters.get("weight") and bias is layer._parameters.get("bias")
    if reason := why_not_free(layer, x, modes=(False, True) if in_training else ()):
        return unlike + reason
    if not kind.convolves:
        return Effective(plain, verbatim=verbatim) if first["input"] is x else f"{unlike}changes the input first"
    if any(tuple(pair(first[key])) != tuple(getattr(layer, key)) for key in ("stride", "dilation")):
        return f"{unlike}convolves with another stride or dilation than it says"
    if first["input"] is x and second["input"] is y:
        if not isinstance(first["padding"], str):
            first["padding"] = tuple(pair(first["padding"]))
        verbatim = verbatim and layer.padding == first["padding"]
        plain.padding = first["padding"]
        return (
            Effective(plain, verbatim=verbatim)
            if plain.padding_mode == "zeros"
            else f"{unlike}ignores its padding mode"
        )
    padded = all(_is_padded_same(layer, given, call["input"]) for given, call in ((x, first), (y, second)))
    if padded and not any(pair(first["padding"])):
        verbatim = verbatim and not isinstance(layer.padding, str) and not any(layer.padding)
        plain.padding = (0, 0)
        return Effective(plain, pads_same=True, verbatim=verbatim)
    return f"{unlike}changes the input first"


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
    call = watch(layer, x, autocast=True)
    return call is not None and bool(call["weight"].dtype == torch.float32) and call["gives"] == torch.float32


def _plain(layer: nn.Module, weight: Tensor, bias: Tensor | None, device: torch.device) -> Any:
    """A plain layer of the same geometry with copies of these tensors."""
    weight_learns = any(parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")
    own_bias = layer._parameters.get("bias")
    bias_learns = weight_learns if own_bias is None else own_bias.requires_grad
    kind = known_kind(layer)
    plain = kind.make(*kind.channels(layer), bias=bias is not None, **kind.geometry(layer))
    plain.weight = nn.Parameter(weight.detach().clone().to(device), weight_learns)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone().to(device), bias_learns)
    return plain


def _is_padded_same(conv: nn.Conv2d, x: Tensor, padded: Tensor) -> bool:
    expected = F.pad(x, same_padding(x.shape[-2:], conv))
    return expected.shape == padded.shape and (x.is_meta or torch.equal(expected, padded))

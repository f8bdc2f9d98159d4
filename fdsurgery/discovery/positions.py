"""Positions that must not see each other: what attention masks, causal convolutions and packed samples tell of a model.

A dynamic layer makes its weight from the mean over all positions of its input. Where a model keeps positions apart (the
future from the past, one packed sample from another, padding from the rest), such a layer would carry over, once it is
trained, what the model must not know. That convolutions or windows see only what is near is no such thing: through
their stack all positions meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention, arguments_of, attentions_in, stack_of
from .flow import Flow, Node, layer_input, shape_of
from .inputs import Inputs
from .kinds import convolves, known_kind
from .mask_values import MaskValues
from .ops import LAYOUT


def positions_apart(model: nn.Module, flow: Flow, inputs: Inputs, masked: dict[str, str]) -> dict[str, str]:
    """For every layer whose input holds positions that must not see each other, the reason in words.

    Args:
        model: the model whose forward `flow` shows.
        flow: one forward.
        inputs: what the forward was called with; masks among them count with their values.
        masked: convolutions that hold some of their weight at zero, with what is to be said of them.
    """
    values = MaskValues(model, flow, inputs)
    found = _beside(flow, _masked_convolutions(flow, masked))
    attentions = list(attentions_in(flow, values))
    apart: dict[tuple[str, int], str] = {}
    for key in {(attention.stack, attention.length) for attention in attentions}:
        group = [attention for attention in attentions if (attention.stack, attention.length) == key]
        reason = _kept_apart(group)
        if reason:
            apart[key] = reason
    stacks = {(attention.stack, attention.length) for attention in attentions}
    for name, calls in flow.calls.items():
        length = _positions(flow, calls[0])
        if (stack_of(name), length) in stacks:  # what its own stack does decides
            keys = [(stack_of(name), length)]
        else:
            keys = [key for key in apart if key[1] == length and _connected(flow, calls, attentions, key)]
        reason = next((apart[key] for key in keys if key in apart), None)
        if reason and name not in found and length > 1:
            found[name] = reason
    return _beside(flow, _masked_features(flow, values)) | found


def _positions(flow: Flow, call: Node) -> int:
    shape = shape_of(layer_input(call)) or ()
    return known_kind(flow.layer(call)).positions(shape)


def _kept_apart(group: list[Attention]) -> str | None:
    """Why the positions of a stack do not all meet, over all of its layers; None if they do."""
    allowed = torch.zeros(1, group[0].length, group[0].length, dtype=torch.bool, device="cpu")
    for attention in group:
        if allowed.shape[0] != attention.allowed.shape[0] and 1 not in (allowed.shape[0], attention.allowed.shape[0]):
            return None
        allowed = allowed | attention.allowed
    if bool(allowed.all()):
        return None
    where = str(group[0].node.meta.get("fqn", "")) or "the model"
    if bool((~allowed.any(1)).any()):
        return (
            f"attention masks some positions (in {where!r}), such as padding: the mean over all, from which its weight "
            "is made, would count them"
        )
    reached = allowed | torch.eye(allowed.shape[-1], dtype=torch.bool, device="cpu")
    for _ in range(max(1, math.ceil(math.log2(allowed.shape[-1])))):
        reached = (reached.float() @ reached.float()) > 0
    if bool(reached.all()):
        return None
    if not bool(torch.triu(allowed, 1).any()):
        return (
            f"attention is causal (in {where!r}): its weight is made from the mean over all positions, and would let "
            "later ones change earlier ones"
        )
    return (
        f"attention keeps positions apart (in {where!r}), as for packed samples: its weight is made from the mean over "
        "all positions, and would mix them"
    )


def _connected(flow: Flow, calls: list[Node], attentions: list[Attention], key: tuple[str, int]) -> bool:
    nodes = {attention.node for attention in attentions if (attention.stack, attention.length) == key}
    return any(not nodes.isdisjoint(_upstream(flow, call)) for call in calls) or any(
        not _upstream(flow, node).isdisjoint(calls) for node in nodes
    )


def _upstream(flow: Flow, node: Node) -> set[Node]:
    return set(flow.backward(node, lambda _: True))


def _masked_convolutions(flow: Flow, masked: dict[str, str]) -> dict[Node, str]:
    """Calls of masked or causal convolutions, with what is to be said of them."""
    sources: dict[Node, str] = {}
    for name, calls in flow.calls.items():
        for call in calls:
            if name in masked:
                sources[call] = masked[name]
            elif _is_causal_convolution(flow, call):
                sources[call] = f"{name!r} is padded on one side only, as causal convolutions are"
    return sources


def _masked_features(flow: Flow, values: MaskValues) -> dict[Node, str]:
    """Where a mask takes all channels of some positions out: by a factor of zero, by filling or by writing."""
    sources: dict[Node, str] = {}
    scores = {
        score
        for node in flow.nodes
        for made in ([node] if flow.op[node] == "softmax" else _masks_of(flow, node))
        for score in _scores(flow, made)
    }
    for node in flow.nodes:
        op, given = flow.op[node], node.all_input_nodes
        if op not in ("mul", "masked_fill", "where", "setitem") or node in scores:
            continue
        if not any(source in values.learned and shape_of(source) == shape_of(node) for source in given):
            continue  # no features, or spread out over pairs of positions
        index = node.args[1] if op == "setitem" and len(node.args) > 1 else None
        masks = [index] if op == "setitem" else [other for other in given if other not in values.learned]
        if any(_takes_positions_out(values(mask), shape_of(node) or (), op) for mask in masks):
            where = str(node.meta.get("fqn", "")) or "the model"
            sources[node] = f"a mask takes some positions out (in {where!r}), such as padding"
    return sources


def _masks_of(flow: Flow, node: Node) -> list[Node]:
    mask = arguments_of(node, "query key value attn_mask").get("attn_mask")
    return [mask] if flow.op[node] == "scaled_dot_product_attention" and isinstance(mask, Node) else []


def _scores(flow: Flow, softmax: Node) -> Iterator[Node]:
    """What an attention computes of pairs of positions, before its softmax or mask and right behind it."""
    pair = (shape_of(softmax) or ())[-2:]
    yield from (user for user in softmax.users if (shape_of(user) or ())[-2:] == pair)
    yield from flow.backward(softmax, lambda node: (shape_of(node) or ())[-2:] == pair, 100)


def _takes_positions_out(mask: Tensor | None, shape: tuple[int, ...], op: str) -> bool:
    """True if a mask of features `(N, L, C)`, `(N, H, W, C)` or `(N, C, H, W)` differs between positions only."""
    if mask is None or len(shape) < 3 or not (mask.dtype == torch.bool or op == "mul"):
        return False
    out = mask if mask.dtype == torch.bool and op != "mul" else mask == 0
    if op == "setitem" and mask.dim() < len(shape):  # the axes that are left are those of the channels
        return len(shape) == mask.dim() + 1 and bool(out.any()) and not bool(out.all())
    out = out.expand(shape)
    some = out.flatten(1).any(1) & ~out.flatten(1).all(1)
    axes = (1, -1) if len(shape) == 4 else (-1,)
    return bool(some.any()) and any(torch.equal(out, out.narrow(axis, 0, 1).expand(shape)) for axis in axes)


def _beside(flow: Flow, sources: dict[Node, str]) -> dict[str, str]:
    """Layers before and behind what hides positions, over more than one position."""
    reason = "its weight would be made from the mean over all positions, those not to be seen among them"
    found: dict[str, str] = {}
    for source, what in sources.items():
        before = _upstream(flow, source)
        behind = {source}
        for node in flow.nodes[flow.index[source] :]:
            if not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
        for name, calls in flow.calls.items():
            if name not in found and _positions(flow, calls[0]) > 1 and not (before | behind).isdisjoint(calls):
                found[name] = f"{what}: {reason}"
    return found


def _is_causal_convolution(flow: Flow, call: Node) -> bool:
    layer: Any = flow.layer(call)
    if not convolves(layer):
        return False
    pad = layer_input(call)
    while flow.op[pad] in LAYOUT and pad.all_input_nodes:
        pad = pad.all_input_nodes[0]
    if flow.op[pad] not in ("pad", "constant_pad_nd") or any(
        layer.padding if not isinstance(layer.padding, str) else ()
    ):
        return False
    given = pad.args[1] if len(pad.args) > 1 else pad.kwargs.get("pad", ())
    pads = [value for value in given if isinstance(value, int)] if isinstance(given, (tuple, list)) else []
    for axis in range(min(2, len(pads) // 2)):
        reach = (layer.kernel_size[1 - axis] - 1) * layer.dilation[1 - axis]
        sides = sorted(pads[2 * axis : 2 * axis + 2])
        if layer.stride[1 - axis] == 1 and reach > 1 and sides == [0, reach]:
            return True
    return False

"""Positions that must not see each other: what attention masks, causal convolutions and packed samples tell of a model.

A dynamic layer makes its weight from the mean over all positions of its input. Where a model keeps positions apart (the
future from the past, one packed sample from another, padding from the rest), such a layer would carry over, once it is
trained, what the model must not know. That convolutions or windows see only what is near is no such thing: through
their stack all positions meet.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .flow import Flow, Node, layer_input, shape_of
from .inputs import Inputs
from .ops import LAYOUT

_HIDDEN = -5e3
"""What is added to a score to hide it: -inf, the lowest float, -1e9, -1e4. Swin's -100 only tells windows apart."""
_MOST_STEPS = 400
_MOST_PAIRS = 2**24


@dataclass(frozen=True)
class _Attention:
    node: Node
    length: int
    allowed: Tensor
    """`(samples, length, length)`, bool: which position reads from which; one sample if all are alike."""

    @property
    def stack(self) -> str:
        return _stack(str(self.node.meta.get("fqn", "")))


def positions_apart(model: nn.Module, flow: Flow, inputs: Inputs, masked: dict[str, str]) -> dict[str, str]:
    """For every layer whose input holds positions that must not see each other, the reason in words.

    Args:
        model: the model whose forward `flow` shows.
        flow: one forward.
        inputs: what the forward was called with; masks among them count with their values.
        masked: convolutions that hold some of their weight at zero, with what is to be said of them.
    """
    values = _Values(model, flow, inputs)
    found = _beside(flow, _masked_convolutions(flow, masked))
    attentions = list(_attentions(flow, values))
    apart: dict[tuple[str, int], str] = {}
    for key in {(attention.stack, attention.length) for attention in attentions}:
        group = [attention for attention in attentions if (attention.stack, attention.length) == key]
        reason = _kept_apart(group)
        if reason:
            apart[key] = reason
    stacks = {(attention.stack, attention.length) for attention in attentions}
    for name, calls in flow.calls.items():
        length = _positions(flow, calls[0])
        if (_stack(name), length) in stacks:  # what its own stack does decides
            keys = [(_stack(name), length)]
        else:
            keys = [key for key in apart if key[1] == length and _connected(flow, calls, attentions, key)]
        reason = next((apart[key] for key in keys if key in apart), None)
        if reason and name not in found and length > 1:
            found[name] = reason
    return _beside(flow, _masked_features(flow, values)) | found


def _stack(name: str) -> str:
    """What a name has before its first number: the list of blocks that the module is in."""
    parts = name.split(".")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdigit()), 0)])


def _positions(flow: Flow, call: Node) -> int:
    shape = shape_of(layer_input(call)) or ()
    if isinstance(flow.layer(call), nn.Conv2d):
        return math.prod(shape[-2:])
    return math.prod(shape[1:-1])


def _kept_apart(group: list[_Attention]) -> str | None:
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


def _connected(flow: Flow, calls: list[Node], attentions: list[_Attention], key: tuple[str, int]) -> bool:
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


def _masked_features(flow: Flow, values: _Values) -> dict[Node, str]:
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
    mask = _arguments(node, "query key value attn_mask").get("attn_mask")
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
    if not isinstance(layer, nn.Conv2d):
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


def _attentions(flow: Flow, values: _Values) -> Iterator[_Attention]:
    """Self-attention in the graph, with who may read from whom, where that can be told."""
    for node in flow.nodes:
        match flow.op[node]:
            case "scaled_dot_product_attention":
                given = _arguments(node, "query key value attn_mask dropout_p is_causal")
                lengths = [(shape_of(given[key]) or (0, 0))[-2] for key in ("query", "key")]
                mask = given.get("attn_mask")
                hidden = [_hidden_by(values(mask), true_hides=False)]
                if mask in values.learned:
                    hidden += _hidden_in(flow, mask, values)
                causal = given.get("is_causal") is True
                between = given["query"], given["key"], True
            case "multi_head_attention_forward":
                given = _arguments(node, "query key")
                lengths = [(shape_of(given[key]) or (0,))[0] for key in ("query", "key")]
                mask, padding = (values(node.kwargs.get(key)) for key in ("attn_mask", "key_padding_mask"))
                hidden = [_hidden_by(mask, true_hides=True)]
                if padding is not None:
                    hidden.append(_hidden_by(padding[..., None, :], true_hides=True))
                causal, between = False, (given["query"], given["key"], False)
            case "softmax" if len(shape_of(node) or ()) >= 3:
                lengths = list((shape_of(node) or ())[-2:])
                hidden, causal, between = _hidden_before(flow, node, values), False, (*_compared(flow, node), True)
            case "flex_attention" if "mask_mod" in node.meta:
                lengths = [(shape_of(given) or (0, 0))[-2] for given in node.all_input_nodes[:2]]
                hidden, causal = [_hidden_by(_evaluated(node.meta["mask_mod"], lengths), true_hides=False)], False
                between = node.all_input_nodes[0], node.all_input_nodes[1], True
            case "cumsum" | "cumprod" | "logcumsumexp" if node in values.learned and "flip" not in flow.op.values():
                axis = _arguments(node, "input dim").get("dim")
                shape = shape_of(node) or ()
                if not isinstance(axis, int) or len(shape) < 3:
                    continue
                lengths, hidden, causal, between = [shape[axis]] * 2, [], True, (None, None, True)
            case _:
                continue
        length = lengths[0]
        if lengths[0] != lengths[1] or length < 2 or length**2 > _MOST_PAIRS:
            continue
        if _reads_others(flow, *between[:2], projected=between[2]):
            continue
        allowed = torch.ones(1, length, length, dtype=torch.bool, device="cpu")
        for entries in hidden:
            if entries is not None and entries.dim() >= 2 and entries.shape[-1] == length:
                allowed = allowed & ~_by_sample(entries, length)
        yield _Attention(node, length, allowed.tril() if causal else allowed)


def _evaluated(mask_mod: Callable[..., Any], lengths: list[int]) -> Tensor | None:
    """A mask that FlexAttention computes from indices, for the first sample and head."""
    queries, keys = (torch.arange(length, dtype=torch.int64, device="cpu") for length in lengths)
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    try:
        allowed = mask_mod(zero, zero, queries[:, None], keys[None])
    except Exception:  # code of other people, called in a way of our own
        return None
    return allowed if isinstance(allowed, Tensor) and allowed.dtype == torch.bool else None


def _by_sample(entries: Tensor, length: int) -> Tensor:
    """Hidden entries as `(samples, length, length)`; those of several heads count where all heads hide them."""
    entries = entries.expand(*entries.shape[:-2], length, length)
    if entries.dim() == 2:
        return entries[None]
    return entries.flatten(1, -3).all(1) if entries.dim() > 3 else entries


def _arguments(node: Node, names: str) -> dict[str, Any]:
    return {**dict(zip(names.split(), node.args, strict=False)), **node.kwargs}


def _hidden_by(mask: Tensor | None, *, true_hides: bool) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return mask if true_hides else ~mask
    return mask <= _HIDDEN


def _hidden_before(flow: Flow, softmax: Node, values: _Values) -> list[Tensor | None]:
    """What masks hide of the scores that a softmax reads, or of what it gives."""
    hidden = _hidden_in(flow, softmax.all_input_nodes[0], values)
    for user in softmax.users:  # a mask of ones and zeros
        for other in user.all_input_nodes if flow.op[user] == "mul" else ():
            factors = None if other is softmax else values(other)
            hidden.append(None if factors is None else factors == 0)
    return hidden


def _hidden_in(flow: Flow, scores: Node, values: _Values) -> list[Tensor | None]:
    """What additions of masks, and fills by them, hide of scores, or of a learned bias that is added to them."""
    hidden: list[Tensor | None] = []
    pair = (shape_of(scores) or ())[-2:]
    steps = [scores]
    for node in steps:
        if (shape_of(node) or ())[-2:] != pair or len(steps) > _MOST_STEPS:
            continue
        op, sources = flow.op[node], node.all_input_nodes
        learned = [source for source in sources if source in values.learned and source not in steps]
        if op == "add" or (op in ("sub", "mul", "div", *LAYOUT) and len(learned) == 1):
            for other in sources:
                if op == "add" and other not in values.learned:
                    hidden.append(_hidden_by(values(other), true_hides=True))
        elif op == "masked_fill" and len(node.args) == 3 and _fills(node.args[2], values):
            hidden.append(_hidden_by(values(node.args[1]), true_hides=True))
        elif op == "where" and len(node.args) == 3 and len(learned) == 1:
            condition, kept, fill = node.args
            if _fills(fill if kept is learned[0] else kept, values):
                hidden.append(_hidden_by(values(condition), true_hides=kept is not learned[0]))
        else:
            if op == "baddbmm":
                hidden.append(_hidden_by(values(node.args[0]), true_hides=True))
            continue
        steps += learned
    return hidden


def _reads_others(flow: Flow, query: Any, key: Any, *, projected: bool) -> bool:
    """True for queries of one sequence and keys of another, as where a decoder reads what an encoder gives.

    Args:
        flow: one forward.
        query: what is compared,
        key: with what.
        projected: whether both are made by a layer each from what they come from, or as they are.
    """
    if not (isinstance(query, Node) and isinstance(key, Node)):
        return False
    first, second = _made_by(flow, [query]), _made_by(flow, [key])
    if projected and first.isdisjoint(second):
        first, second = (
            _made_by(flow, [source for node in nodes for source in node.all_input_nodes]) for nodes in (first, second)
        )
    return bool(first) and bool(second) and first.isdisjoint(second)


def _made_by(flow: Flow, nodes: list[Node]) -> set[Node]:
    """The layers, or inputs of the model, that values come from with none in between."""
    ends: set[Node] = set()
    for start in nodes:
        for node in flow.backward(start, lambda node: not flow.is_learned(node)):
            if flow.is_learned(node) or node.op == "placeholder":
                ends.add(node)
    return ends


def _compared(flow: Flow, softmax: Node) -> tuple[Any, Any]:
    """Queries and keys of an attention that is written out."""
    pair = (shape_of(softmax) or ())[-2:]
    for node in flow.backward(softmax, lambda node: (shape_of(node) or ())[-2:] == pair, 100):
        if flow.op[node] in ("matmul", "bmm", "einsum", "baddbmm") and len(node.all_input_nodes) >= 2:
            query, key = node.all_input_nodes[-2:]
            return query, key
    return None, None


def _fills(value: Any, values: _Values) -> bool:
    if isinstance(value, Node):
        filled = values(value)
        return filled is not None and bool((filled <= _HIDDEN).all())
    return isinstance(value, (int, float)) and value <= _HIDDEN


def takes_shape(flow: Flow, node: Node) -> bool:
    """True where a new tensor takes shape, dtype and device of another one, and none of its values."""
    op = flow.op[node]
    return (op.endswith("_like") or op.startswith("new_")) and len(node.all_input_nodes) == 1


def _read_by(flow: Flow, node: Node) -> list[Node]:
    """What a node takes values from, and not only shape, dtype and device."""
    if takes_shape(flow, node):
        return []
    as_another = flow.op[node] in ("expand_as", "view_as", "reshape_as", "type_as")
    return node.all_input_nodes[:1] if as_another else node.all_input_nodes


class _Values:
    """Values of masks, computed from what the graph says of them: constants, buffers and the model's inputs."""

    def __init__(self, model: nn.Module, flow: Flow, inputs: Inputs) -> None:
        self.model, self.flow = model, flow
        self.inputs = dict(inputs.tensors())
        self.known: dict[Node, Any] = {}
        self.learned: set[Node] = set()
        """Nodes whose values depend on learned layers; those that only take their shape do not."""
        for node in flow.nodes:
            if flow.is_learned(node) or any(source in self.learned for source in _read_by(flow, node)):
                self.learned.add(node)

    @torch.no_grad()
    def __call__(self, node: Any) -> Tensor | None:
        """None where a value depends on learned layers, or cannot be told."""
        if not isinstance(node, Node) or node in self.learned:
            return None
        try:
            value = self._of(node)
        except Exception:  # code of other people, read from afar
            return None
        return value if isinstance(value, Tensor) and not value.is_meta else None

    def _of(self, wanted: Node) -> Any:
        steps = [wanted]
        for node in steps:
            steps += [source for source in _read_by(self.flow, node) if source not in steps]
            if len(steps) > _MOST_STEPS:
                return None
        steps.sort(key=self.flow.index.__getitem__)
        for node in steps:
            if node not in self.known:
                self.known[node] = self._run(node)
        return self.known[wanted]

    def _run(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self.inputs[str(node.target)].detach().cpu()
        if "value" in node.meta:
            return node.meta["value"].detach().cpu()
        if node.op == "get_attr":
            owner, _, key = str(node.target).rpartition(".")
            return getattr(self.model.get_submodule(owner), key).detach().cpu()
        read = _read_by(self.flow, node)
        for like in node.all_input_nodes:
            if like not in read and like not in self.known:
                dtype: Any = like.meta.get("dtype")
                self.known[like] = torch.empty(1, dtype=dtype, device="cpu").expand(shape_of(like) or ())
        args, kwargs = self._filled(node.args), self._filled(node.kwargs)
        if node.target is operator.setitem:
            if node.args[1] is None:
                raise LookupError("a view of the tensor was written to, and which one is not told")
            args[0][args[1]] = args[2]
            return args[0]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Callable[..., Any] = node.target  # type: ignore[assignment]
        return function(*args, **kwargs)

    def _filled(self, value: Any) -> Any:
        if isinstance(value, Node):
            known = self.known[value]
            # What is written in place later must not change what was read before.
            return known.clone() if isinstance(known, Tensor) else known
        if isinstance(value, (tuple, list)):
            return type(value)(self._filled(item) for item in value)
        if isinstance(value, dict):
            return {key: self._filled(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self._filled(value.start), self._filled(value.stop), self._filled(value.step))
        return torch.device("cpu") if isinstance(value, torch.device) else value

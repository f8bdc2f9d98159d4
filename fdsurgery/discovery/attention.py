"""Self-attention in the graph of a forward: which position reads from which, as its masks say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .flow import Flow, Node, shape_of
from .mask_values import MOST_STEPS, MaskValues
from .ops import LAYOUT

_HIDDEN = -5e3
"""What is added to a score to hide it: -inf, the lowest float, -1e9, -1e4. Swin's -100 only tells windows apart."""
_MOST_PAIRS = 2**24


@dataclass(frozen=True)
class Attention:
    """Who reads from whom in one self-attention."""

    node: Node
    """The call that computes it."""
    length: int
    allowed: Tensor
    """`(samples, length, length)`, bool: which position reads from which; one sample if all are alike."""

    @property
    def stack(self) -> str:
        return stack_of(str(self.node.meta.get("fqn", "")))


def stack_of(name: str) -> str:
    """What a name has before its first number: the list of blocks that the module is in."""
    parts = name.split(".")
    return ".".join(parts[: next((i for i, part in enumerate(parts) if part.isdigit()), 0)])


def attentions_in(flow: Flow, values: MaskValues) -> Iterator[Attention]:
    """Self-attention in the graph, with who may read from whom, where that can be told."""
    for node in flow.nodes:
        match flow.op[node]:
            case "scaled_dot_product_attention":
                given = arguments_of(node, "query key value attn_mask dropout_p is_causal")
                lengths = [(shape_of(given[key]) or (0, 0))[-2] for key in ("query", "key")]
                mask = given.get("attn_mask")
                hidden = [_hidden_by(values(mask), true_hides=False)]
                if mask in values.learned:
                    hidden += _hidden_in(flow, mask, values)
                causal = given.get("is_causal") is True
                between = given["query"], given["key"], True
            case "multi_head_attention_forward":
                given = arguments_of(node, "query key")
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
                axis = arguments_of(node, "input dim").get("dim")
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
        yield Attention(node, length, allowed.tril() if causal else allowed)


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


def arguments_of(node: Node, names: str) -> dict[str, Any]:
    """The arguments of a call by these names, as far as they are given."""
    return {**dict(zip(names.split(), node.args, strict=False)), **node.kwargs}


def _hidden_by(mask: Tensor | None, *, true_hides: bool) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return mask if true_hides else ~mask
    return mask <= _HIDDEN


def _hidden_before(flow: Flow, softmax: Node, values: MaskValues) -> list[Tensor | None]:
    """What masks hide of the scores that a softmax reads, or of what it gives."""
    hidden = _hidden_in(flow, softmax.all_input_nodes[0], values)
    for user in softmax.users:  # a mask of ones and zeros
        for other in user.all_input_nodes if flow.op[user] == "mul" else ():
            factors = None if other is softmax else values(other)
            hidden.append(None if factors is None else factors == 0)
    return hidden


def _hidden_in(flow: Flow, scores: Node, values: MaskValues) -> list[Tensor | None]:
    """What additions of masks, and fills by them, hide of scores, or of a learned bias that is added to them."""
    hidden: list[Tensor | None] = []
    pair = (shape_of(scores) or ())[-2:]
    steps = [scores]
    for node in steps:
        if (shape_of(node) or ())[-2:] != pair or len(steps) > MOST_STEPS:
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


def _fills(value: Any, values: MaskValues) -> bool:
    if isinstance(value, Node):
        filled = values(value)
        return filled is not None and bool((filled <= _HIDDEN).all())
    return isinstance(value, (int, float)) and value <= _HIDDEN

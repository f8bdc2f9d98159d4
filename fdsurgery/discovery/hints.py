"""What in the graph of a forward may keep positions apart without a mask that could be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from .flow import Flow, Node, shape_of
from .kinds import convolves
from .mask_values import takes_shape
from .ops import ACTIVATION, ELEMENTWISE, JOIN, LAYOUT, NORM

FEWEST_POSITIONS = 6  # so that two places have two positions on either side


def hint(flow: Flow, masks_read: bool = False) -> str | None:
    """What in the graph may keep positions apart without a mask that could be read; None if there is no such thing.

    Args:
        flow: one forward.
        masks_read: True where masks were read and had to do with positions kept apart: then they explain what is
            triangular in the graph.
    """
    written: Counter[tuple[Any, Any]] = Counter()
    selections = Counter(node.all_input_nodes[0] for node in flow.nodes if _is_crop(flow, node))
    for node in flow.nodes:
        op = flow.op[node]
        if not masks_read and _is_triangular(op, shape_of(node)):
            return "a triangular matrix"
        if node.meta.get("unwatched") and (shape_of(node) or ())[:1] == (flow.batch,):
            return "code that cannot be watched"
        if node not in flow.from_input:
            continue
        if op == "unseen_operation" or _is_custom(node):
            return "code that cannot be watched"
        if op in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return "a recurrent layer"
        if op in ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp") and node in flow.after_learned:
            return "a running sum"
        if op == "setitem":
            key = node.meta.get("fqn"), shape_of(node)
            written[key] += 1
            if written[key] >= FEWEST_POSITIONS:
                return "a tensor written to part by part"
        if op in JOIN and (_joins_steps(flow, node, selections) or _shifts(flow, node)):
            return "parts joined along positions"
        if _crops_convolution(flow, node):
            return "a convolution cropped on one side"
        if op in ("pad", "constant_pad_nd") and _pads_one_side(flow, node):
            return "padding on one side"
        if any(mask in flow.after_learned and mask in flow.from_input for mask in _masks(op, node)):
            return "a mask made from features"
    return None


def _is_triangular(op: str, shape: tuple[int, ...] | None) -> bool:
    """Triangles of a matrix, or indices compared with one another."""
    if op in ("lt", "le", "gt", "ge"):
        return shape is not None and len(shape) == 2 and shape[0] == shape[1] >= FEWEST_POSITIONS
    return op in ("tril", "triu")


def _is_custom(node: Node) -> bool:
    """An operation that an extension registered with torch."""
    target: Any = node.target
    named = getattr(target, "_qualified_op_name", None) or getattr(target, "_schema", None)
    if named is None and hasattr(target, "overloadpacket"):
        named = target.overloadpacket
    name = getattr(named, "name", None) or named
    return isinstance(name, str) and "::" in name and name.split("::")[0] not in ("aten", "prims", "torchvision")


def _joins_steps(flow: Flow, node: Node, selections: Counter[Node]) -> bool:
    """Parts of one tensor, as many as there may be positions, laid side by side again."""
    parts = [part for part in node.all_input_nodes if part in flow.from_input]
    if len(parts) < FEWEST_POSITIONS or len({shape_of(part) for part in parts}) > 1:
        return False
    if not any(selections[source] >= FEWEST_POSITIONS for source in flow.backward(node, lambda _: True)):
        return False
    return flow.op[node] == "stack" or bool(_grown(shape_of(parts[0]), shape_of(node)))


def _shifts(flow: Flow, node: Node) -> bool:
    """Positions moved on by some: the front filled up, the end cut off."""
    parts = [part for part in node.all_input_nodes if part in flow.from_input and not takes_shape(flow, part)]
    if len(parts) != 1 or len(node.all_input_nodes) < 2 or not _is_crop(flow, parts[0]):
        return False
    return bool(grown := _grown(shape_of(parts[0]), shape_of(node))) and set(grown) <= set(_cropped(parts[0]))


def _grown(part: tuple[int, ...] | None, whole: tuple[int, ...] | None) -> list[int]:
    """Axes, of those that may be positions, along which the whole is longer than a part."""
    part, whole = part or (), whole or ()
    if len(part) != len(whole):
        return []
    first = 1 if len(whole) == 3 else 2
    return [axis for axis in range(first, len(whole)) if whole[axis] > part[axis]]


def _is_crop(flow: Flow, node: Node) -> bool:
    return flow.op[node] in ("getitem", "narrow", "select", "slice") and bool(node.all_input_nodes)


def _cropped(node: Node) -> list[int]:
    whole, part = shape_of(node.all_input_nodes[0]) or (), shape_of(node) or ()
    return [axis for axis in range(len(part)) if part[axis] < whole[axis]] if len(whole) == len(part) else []


def _crops_convolution(flow: Flow, node: Node) -> bool:
    if not _is_crop(flow, node) or _is_centred(node):
        return False
    if flow.op[node.all_input_nodes[0]].endswith("irfft"):
        return True
    if not any(axis >= 2 for axis in _cropped(node)):
        return False
    passed = LAYOUT | NORM | ACTIVATION | ELEMENTWISE
    walk = flow.backward(node, lambda at: at is node or flow.op[at] in passed, 40)
    return any(_is_convolution(flow, at) or flow.op[at].endswith("irfft") for at in walk)


def _is_centred(node: Node) -> bool:
    """As much is cut off in front as at the end."""
    index = node.args[1] if len(node.args) > 1 else None
    index = index if isinstance(index, tuple) else (index,)
    shape = shape_of(node.all_input_nodes[0]) or ()
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (len(shape) - len(index) + 1), *index[at + 1 :])
    try:
        spans = [part.indices(size) for part, size in zip(index, shape, strict=False)]
    except (AttributeError, TypeError):
        return False
    return all(start == size - stop or step != 1 for (start, stop, step), size in zip(spans, shape, strict=False))


def _is_convolution(flow: Flow, node: Node) -> bool:
    return convolves(flow.layer(node)) or flow.op[node] in ("conv1d", "conv2d", "conv3d", "convolution")


def _pads_one_side(flow: Flow, node: Node) -> bool:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
    pads = [value for value in given if isinstance(value, int)] if isinstance(given, (tuple, list)) else []
    sides = list(zip(pads[::2], pads[1::2], strict=False))
    if len(shape_of(node) or ()) == 3 and any(left * right < 0 for left, right in sides):
        return True  # tokens, moved on by some: what is cut off at one end is put on at the other
    reader: Node | None = node
    while reader is not None and (reader is node or flow.op[reader] in LAYOUT):
        reader = next(iter(reader.users), None)
    one_sided = any(abs(left - right) > 1 for left, right in sides)
    return one_sided and reader is not None and _is_convolution(flow, reader)


def _masks(op: str, node: Node) -> Iterator[Node]:
    place = {"where": (0, "condition"), "masked_fill": (1, "mask"), "scaled_dot_product_attention": (3, "attn_mask")}
    if op in place:
        at, key = place[op]
        mask = node.args[at] if len(node.args) > at else node.kwargs.get(key)
        if isinstance(mask, Node) and len(set((shape_of(mask) or (0, 1))[-2:])) == 1:  # square: of self-attention
            yield mask

"""What part each layer plays, read off the data flow."""

from __future__ import annotations

import math
from typing import Any

from .ffn import find_ffns
from .flow import Flow, Node, layer_input, shape_of
from .kinds import convolves, known_kind
from .ops import ACTIVATION, ADD, DROPOUT, JOIN, LAYOUT, MOVE, NORM, POOL, REDUCTION, UPSAMPLE
from .site import Role

_ON_THE_WAY = LAYOUT | MOVE | NORM | ACTIVATION | DROPOUT | POOL | REDUCTION | {"mul", "div"}
_WRITES_THROUGH = LAYOUT | MOVE | DROPOUT | {"interpolate", "upsample", "pixel_shuffle"}
_AVERAGES = frozenset({"add", "sub", "mul", "div"}) | JOIN | REDUCTION


def find_roles(flow: Flow) -> dict[str, tuple[Role, str | None]]:
    """The role of every layer, called or not, and the FFN it belongs to (the name of its project layer) or None."""
    roles: dict[str, tuple[Role, str | None]] = {
        name: (role_by_geometry(layer), None) for name, layer in flow.layers.items()
    }
    for ffn in find_ffns(flow):
        roles[ffn.expand] = ("expand", ffn.project)
        roles[ffn.project] = ("project", ffn.project)
        if ffn.gate is not None:
            roles[ffn.gate] = ("gate", ffn.project)
    heads = _heads(flow)
    for name, calls in flow.calls.items():
        if roles[name][1] is None and all(call in heads for call in calls):
            roles[name] = ("head", None)
    for name in _shortcuts(flow):
        if roles[name][0] in ("pointwise", "spatial"):
            roles[name] = ("shortcut", None)
    for name, calls in flow.calls.items():
        if convolves(flow.layers[name]) and all(_reads_image(flow, call) for call in calls):
            roles[name] = ("stem", None)
    return roles


def role_by_geometry(layer: Any) -> Role:
    """The role of a layer of which nothing is known but its own shape."""
    kind = known_kind(layer)
    if not kind.convolves:
        return "linear"
    if kind.is_depthwise(layer):
        return "depthwise"
    return "pointwise" if math.prod(layer.kernel_size) == 1 else "spatial"


def _reads_image(flow: Flow, call: Node) -> bool:
    """True if no learned layer stands between the model's input and this call."""
    source = layer_input(call)
    return source in flow.from_input and source not in flow.after_learned


def _heads(flow: Flow) -> set[Node]:
    """The calls whose outputs leave the model with nothing but layout on the way, or averaged with their like."""
    candidates = {
        call
        for calls in flow.calls.values()
        for call in calls
        if call not in flow.before_learned and call in flow.from_input
    }
    # Values that are one head's output, or several heads' mixed (distilled DeiT averages two), going forward.
    written: dict[Node, set[Node]] = {call: {call} for call in candidates}
    heads: set[Node] = set()
    for node in flow.nodes:
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if node.op == "output":
            heads.update(*(written[source] for source in sources if source in written))
        elif node not in written and sources and any(source in written for source in sources):
            writers = set().union(*(written.get(source, set()) for source in sources))
            op = flow.op[node]
            alike = all(source in written for source in sources) and all(
                not convolves(flow.layer(writer)) for writer in writers
            )
            if (op in _WRITES_THROUGH and sources[0] in written) or (op in JOIN) or (op in _AVERAGES and alike):
                written[node] = writers
    return heads


def _shortcuts(flow: Flow) -> set[str]:
    """The lone convolutions on the short side of a residual add, beside at least two layers on the long side."""
    found: set[str] = set()
    for node in flow.nodes:
        if flow.op[node] not in ADD:
            continue
        sides = [side for side in node.all_input_nodes if side in flow.from_input]
        if len(sides) != 2 or shape_of(sides[0]) != shape_of(sides[1]):
            continue
        for short, long in (sides, sides[::-1]):
            conv, forks = _lone_conv(flow, short)
            if conv is not None and _layers_since(flow, long, forks, conv) >= 2:
                found.add(str(conv.target))
    return found


def _lone_conv(flow: Flow, side: Node) -> tuple[Node | None, set[Node]]:
    """The only convolution on a straight way back from an add, and the nodes before it where the other may fork."""
    conv: Node | None = None
    forks: set[Node] = set()
    node = side
    for _ in range(60):
        if conv is not None:
            forks.add(node)
        if flow.is_layer(node):
            if conv is not None or not convolves(flow.layer(node)):
                break
            conv, node = node, layer_input(node)
            continue
        # What does not come from the input is a constant, such as the shift of a frozen norm.
        sources = [source for source in node.all_input_nodes if source in flow.from_input]
        if flow.op[node] not in _ON_THE_WAY | ADD or len(sources) != 1:
            break
        node = sources[0]
    return conv, forks


def _layers_since(flow: Flow, side: Node, forks: set[Node], without: Node) -> int:
    """Number of learned layers on the ways from one of `forks` to `side`; 0 if they lead through `without` or upsample.

    Feature pyramids add a convolution of one scale to upsampled features of a coarser one, which were computed from the
    same place by many layers; those are no shortcuts.
    """
    if not forks:
        return 0
    first = min(flow.index[fork] for fork in forks)

    def passes(node: Node) -> bool:
        return flow.index[node] > first and node not in forks

    steps = list(flow.backward(side, passes))
    if without in steps or any(flow.op[step] in UPSAMPLE for step in steps) or forks.isdisjoint(steps):
        return 0
    reached = set(forks)
    count = 0
    for step in sorted(set(steps) - forks, key=flow.index.__getitem__):
        if any(source in reached for source in step.all_input_nodes):
            reached.add(step)
            count += flow.is_learned(step)
    return count

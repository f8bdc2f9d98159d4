"""Feed-forward networks, found by how data flows and not by how they are called.

An FFN widens each token or pixel by itself, bends it, narrows it again, and is added to what it was computed from:
`x + project(act(expand(x)))`, with norms, dropout, scales, a gate or a depthwise convolution anywhere in between. Its
layers are linears or 1x1 convolutions. Attention does not look like that (its projections are separated by a product of
two tensors and a softmax), nor does a ResNet bottleneck (a dense convolution stands between), nor a prediction head
(nothing is added to it that it was computed from).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .flow import Flow, Node, layer_input, shape_of
from .kinds import kind_of, known_kind
from .ops import ACTIVATION, ADD, DROPOUT, ELEMENTWISE, JOIN, LAYOUT, MOVE, NORM

_PASSES = LAYOUT | JOIN | MOVE | NORM | DROPOUT | ELEMENTWISE | ACTIVATION
_SAME_TENSOR = LAYOUT | DROPOUT | {"clamp", "clamp_min", "clamp_max"}
# Between an FFN's last layer and the residual add: norms, layer scale, layout; parallel branches are stacked, summed;
# `x + a * (ffn(x) - x)` subtracts first.
_TO_RESIDUAL = LAYOUT | MOVE | NORM | DROPOUT | frozenset("mul div sub clamp stack sum where pow rsqrt mean".split())

_MOST_SOURCES = 8
_MOST_STEPS = 200  # an FFN is a local thing; a walk this long has left it


@dataclass(frozen=True)
class FFN:
    """The layers of one feed-forward network, by name."""

    expand: str
    project: str
    gate: str | None = None


def find_ffns(flow: Flow) -> list[FFN]:
    """All FFNs in a graph, in the order in which they run, each once however often it is called."""
    found: dict[str, FFN] = {}
    taken: set[str] = set()
    for node in flow.nodes:
        if not flow.is_layer(node) or str(node.target) in taken:
            continue
        ffn = _ffn_ending_in(flow, node)
        if ffn is None:
            continue
        names = {ffn.expand, ffn.project, *filter(None, (ffn.gate,))}
        if not names & taken:
            found[ffn.project] = ffn
            taken |= names
    return list(found.values())


def _ffn_ending_in(flow: Flow, project: Node) -> FFN | None:
    if not _mixes_channels(flow, project):
        return None
    sources = _without_inner(flow, _sources(flow, project))
    if not 1 <= len(sources) <= 2:
        return None
    first = list(sources)
    kind = known_kind(flow.layer(project))
    if not any(sources.values()):
        return None
    if any(kind_of(flow.layer(source)) is not kind or source.target == project.target for source in first):
        return None
    width, hidden = _widths(flow, first[0])
    project_in, project_out = _widths(flow, project)
    if any(_widths(flow, source) != (width, hidden) for source in first) or project_out != width:
        return None
    packed_gate = len(first) == 1 and hidden == 2 * project_in
    if hidden != project_in and not packed_gate:
        return None
    # A depthwise bottleneck narrows first; token mixers made of linears may do so too and still are FFNs.
    if kind.convolves and hidden < width:
        return None
    read = {_same_tensor(flow, layer_input(source)) for source in first}
    if len(read) != 1 or not read <= flow.from_input:
        return None
    if not _is_residual(flow, project, layer_input(first[0])):
        return None
    if len(first) == 1:
        return FFN(str(first[0].target), str(project.target))
    # The gate is the branch with the activation. Where both have one, it is the one called second.
    first.sort(key=lambda source: (sources[source], flow.index[source]))
    expand, gate = (str(source.target) for source in first)
    return FFN(expand, str(project.target), gate)


def _mixes_channels(flow: Flow, node: Node) -> bool:
    """True for a linear layer or dense 1x1 convolution over more than one position per sample."""
    layer = flow.layer(node)
    kind = kind_of(layer)
    return kind is not None and kind.is_product(layer) and not flow.sees_one_position(node)


def _widths(flow: Flow, node: Node) -> tuple[int, int]:
    layer = flow.layer(node)
    return known_kind(layer).channels(layer)


def _sources(flow: Flow, project: Node) -> dict[Node, bool]:
    """The layers whose outputs `project` is a function of, token by token; True where an activation lies between.

    Empty if anything but such layers is met: a product of matrices, a pool, a dense convolution, the model's input.
    """
    sources: dict[Node, bool] = {}
    start = (layer_input(project), False)
    seen, queue = {start}, [start]
    for node, bent in queue:
        if len(sources) > _MOST_SOURCES or len(seen) > _MOST_STEPS:
            return {}
        if node.op == "get_attr" or (node.op == "call_function" and not node.all_input_nodes):
            continue
        if flow.is_layer(node) and not _is_aside(flow, node):
            if not _mixes_channels(flow, node):
                return {}
            sources[node] = sources.get(node, False) or bent
            continue
        op = flow.op[node]
        if not (flow.is_layer(node) or op in _PASSES or flow.is_global_pool(node)):
            return {}
        bent = bent or op in ACTIVATION
        fresh = [step for source in node.all_input_nodes if (step := (source, bent)) not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return sources


def _is_aside(flow: Flow, node: Node) -> bool:
    """True for layers that may stand inside an FFN: depthwise convolutions, squeeze-excitation on pooled pixels."""
    layer = flow.layer(node)
    return known_kind(layer).is_depthwise(layer) or flow.sees_one_position(node)


def _without_inner(flow: Flow, sources: dict[Node, bool]) -> dict[Node, bool]:
    """Drop layers that stand inside the FFN, such as gMLP's spatial gate: they read only what the others computed."""
    if len(sources) < 2 or len(sources) > _MOST_SOURCES:
        return sources
    outer = dict(sources)
    for source in sources:
        own = _sources(flow, source)
        if own and own.keys() <= outer.keys() - {source}:
            bent = outer.pop(source)
            for feeding in own:
                outer[feeding] = outer[feeding] or bent or own[feeding]
    return outer


def _same_tensor(flow: Flow, node: Node) -> Node:
    """The node whose values `node` shows in another shape, dtype or range."""
    while flow.op[node] in _SAME_TENSOR and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _is_residual(flow: Flow, project: Node, start: Node) -> bool:
    """True if the output of `project` is added to something that the FFN's input `start` was computed from, or with."""
    origin: set[Node] | None = None
    seen, queue = {project}, [project]
    for node in queue:
        if len(seen) > _MOST_STEPS:
            return False
        for user in node.users:
            op = flow.op[user]
            if op in ADD:
                if origin is None:
                    origin = _origin(flow, start)
                others = [other for other in user.all_input_nodes if other not in seen and other in flow.from_input]
                if any(not origin.isdisjoint(_origin(flow, other)) for other in others):
                    return True
            elif op not in _TO_RESIDUAL:
                continue
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return False


def _origin(flow: Flow, node: Node) -> set[Node]:
    """What a tensor was computed from without mixing channels: norms undone, residual sums taken apart."""

    def passes(node: Node) -> bool:
        return flow.op[node] in _PASSES or flow.is_global_pool(node) or (flow.is_layer(node) and _is_aside(flow, node))

    near: Iterable[Node] = flow.backward(node, passes, limit=60)
    return {step for step in near if step in flow.from_input and shape_of(step) is not None}

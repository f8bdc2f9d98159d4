"""A graph together with what is asked of it again and again: who reads what, in which order, and what is a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

from torch import fx, nn

from .kinds import known_kind
from .ops import LEARNED, POOL, REDUCTION, op_name

Node = fx.Node


class Flow:
    """Data flow of one forward.

    Args:
        graph: nodes carry `meta["shape"]`, and convolutions and linear layers are `call_module` nodes.
        layers: the convolutions and linear layers by the names that the graph calls them.
    """

    def __init__(self, graph: fx.Graph, layers: Mapping[str, nn.Module]) -> None:
        self.graph = graph
        self.layers = layers
        self.nodes: list[Node] = list(graph.nodes)
        self.index = {node: position for position, node in enumerate(self.nodes)}
        self.op = {node: op_name(node) for node in self.nodes}

    @cached_property
    def calls(self) -> dict[str, list[Node]]:
        """The calls of each layer, in order; layers never called are absent."""
        calls: dict[str, list[Node]] = {}
        for node in self.nodes:
            if self.is_layer(node):
                calls.setdefault(str(node.target), []).append(node)
        return calls

    @cached_property
    def from_input(self) -> set[Node]:
        """The nodes whose values depend on what the model is called with."""
        found: set[Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    @cached_property
    def after_learned(self) -> set[Node]:
        """The nodes with a learned layer at or before them."""
        found: set[Node] = set()
        for node in self.nodes:
            if self.is_learned(node) or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    @cached_property
    def before_learned(self) -> set[Node]:
        """The nodes that some learned layer reads, directly or through others."""
        found: set[Node] = set()
        for node in reversed(self.nodes):
            if any(self.is_learned(user) or user in found for user in node.users):
                found.add(node)
        return found

    @cached_property
    def batch(self) -> int:
        """Number of samples that the model was called with."""
        given = {str(node.target): shape_of(node) or () for node in self.nodes if node.op == "placeholder"}
        in_a_list = [shape for name, shape in given.items() if "." in name and len(shape) == 3]
        if in_a_list:  # images, each of a size of its own
            return len(in_a_list)
        shapes = [shape for shape in given.values() if len(shape) > 1]
        if not shapes:
            return 1
        # Rows may be the patches of all images; then another input has a row for each image.
        return min(shape[0] for shape in shapes) if len(shapes[0]) == 2 else shapes[0][0]

    def is_layer(self, node: Node) -> bool:
        """True for a call of a convolution or linear layer."""
        return node.op == "call_module" and node.target in self.layers

    def layer(self, node: Node) -> nn.Module | None:
        """The layer that the node calls."""
        return self.layers.get(str(node.target)) if node.op == "call_module" else None

    def is_learned(self, node: Node) -> bool:
        """True for anything with a weight that mixes features: layers, but no norms and scales."""
        return self.is_layer(node) or self.op[node] in LEARNED

    def sees_one_position(self, node: Node) -> bool:
        """True for a layer call whose input has a single pixel or token per sample, as after global pooling."""
        shape = shape_of(layer_input(node)) or ()
        return known_kind(self.layer(node)).sees_one_position(shape, self.batch)

    def is_global_pool(self, node: Node) -> bool:
        """True for reductions and for pooling down to one pixel."""
        op = self.op[node]
        return op in REDUCTION or (op in POOL and math.prod((shape_of(node) or (0,))[-2:]) == 1)

    def backward(self, start: Node, passes: Callable[[Node], bool], limit: int = 10**9) -> Iterator[Node]:
        """Walk from `start` towards the inputs, breadth first; a node that does not pass is given, but ends the way."""
        seen, queue = {start}, [start]
        for node in queue:
            yield node
            if len(seen) > limit:
                return
            if passes(node):
                fresh = [source for source in node.all_input_nodes if source not in seen]
                seen.update(fresh)
                queue.extend(fresh)


def shape_of(node: Node | None) -> tuple[int, ...] | None:
    """Shape of the node's value, or None where it is not one tensor or not known."""
    return None if node is None else node.meta.get("shape")


def layer_input(node: Node) -> Node:
    """The node that a layer call reads: its first argument, however it was passed."""
    given = node.args[0] if node.args else node.kwargs.get("input")
    return given if isinstance(given, Node) else node.all_input_nodes[0]

"""Values of masks, computed from what the graph of a forward says of them, without running the model."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .flow import Flow, Node, shape_of
from .inputs import Inputs

MOST_STEPS = 400
"""Nodes that are followed back from one mask, or from the scores of one attention."""


class MaskValues:
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
            if len(steps) > MOST_STEPS:
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

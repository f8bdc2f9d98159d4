"""The eye of discovery: one eager forward, written down as a `torch.fx.Graph`.

A `torch.fx` graph records what code does for all inputs and so refuses much of what models do. This one records what
one forward did: torch functions as they are called, and every layer of the kinds in `kinds` as a single `call_module`
node. Whoever reads the graph needs nothing from here: each node carries `meta["shape"]` (a tuple, or None where the
value is not one tensor), `meta["dtype"]` and `meta["fqn"]`, the module whose forward was running. The call of a layer
whose weight was not its own, or that ran inside a function transform, says so in `meta["foreign"]`.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .inputs import Inputs
from .kinds import kind_of
from .ops import DROPOUT, LAYOUT, canonical_name
from .shadow import original_of, same_random_numbers, twin_of

# Attributes of a tensor that are tensors made of its values; all other attributes are metadata.
_VALUE_ATTRIBUTES = {"data", "T", "mT", "H", "mH", "real", "imag"}


def record(model: nn.Module, inputs: Inputs, *, meta: bool, hooks: bool = False) -> fx.Graph:
    """Run one forward in eval mode on a copy of the model and write down what it did.

    The model, its mode, hooks and weights, and the state of all random generators stay as they are.

    Args:
        model: any module.
        inputs: what to call it with.
        meta: run on the meta device, without memory or computation; otherwise on real tensors, sharing the weights.
        hooks: run copies of the forward hooks that users hung onto the model; otherwise it runs without them.

    Returns:
        The graph: `placeholder` nodes for the tensors of `inputs`, `call_module` nodes for convolutions and linear
        layers, `call_function` and `call_method` nodes for everything else, `get_attr` nodes for parameters, buffers,
        constants (the latter with targets that begin with `<`), and an `output` node with all tensors of the result.

    Raises:
        Exception: whatever the model's forward raises.
    """
    twin, constants = twin_of(model, meta=meta, hooks=hooks)
    if meta:
        inputs = inputs.map(lambda tensor: tensor.to("meta"))
    recorder = _Recorder(twin, constants)
    with torch.no_grad(), same_random_numbers(), _without_compiler():
        for path, tensor in inputs.tensors():
            recorder.place(path, tensor)
        with recorder:
            result = twin(*inputs.args, **inputs.kwargs)
    recorder.finish(result)
    return recorder.graph


class _Recorder(TorchFunctionMode):
    def __init__(self, twin: nn.Module, constants: list[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.frames = [""]
        self.paused = False
        # Weak, so that a real forward does not hold all of its activations at once.
        self.producers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for tensor in constants:
            self.names[tensor] = "<constant>"
        for name, module in twin.named_modules():
            prefix = f"{name}." if name else ""
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if isinstance(tensor, Tensor) and self.names.get(tensor, "<constant>") == "<constant>":
                    self.names[tensor] = prefix + key
            self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        """Put a wrapper around the forward of one module of the copy."""
        forward: Callable[..., Any] = module.forward
        call: Callable[..., Any] = self._module_call
        if kind_of(module) is not None:
            call = functools.partial(self._layer_call, module, dict(module._parameters))

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if self.paused else call(name, forward, args, kwargs)

        module.__dict__["forward"] = watched

    def _layer_call(
        self, layer: nn.Module, own: dict[str, Any], name: str, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        inputs = self._written(args), self._written(kwargs)
        foreign = self._foreign(layer, own)
        self.paused = True
        try:
            with _failing_in(name):
                result = forward(*args, **kwargs)
        finally:
            self.paused = False
        node = self._emit("call_module", name, *inputs, result)
        if foreign:
            node.meta["foreign"] = foreign
        return result

    def _foreign(self, layer: nn.Module, own: dict[str, Any]) -> str | None:
        """What is not as it seems in a call of a layer, in words."""
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None:
            name = transform.key().name.lower()
            return f"it is called inside a function transform (torch.{name}), where samples cannot be told apart"
        if any(layer._parameters.get(key) is not value for key, value in own.items()):
            return "its weight is put in from outside for the call, as by torch.func.functional_call"
        written = [self.producers.get(value) for value in own.values() if isinstance(value, Tensor)]
        if any(node is not None and node.op != "get_attr" for node in written):
            return "its weight is written to by the model's forward before it is called"
        return None

    def _module_call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.frames.append(name)
        try:
            with _failing_in(name):
                result = forward(*args, **kwargs)
            # Compiled code (TorchScript, extensions) makes tensors behind our back: what a module returns comes from
            # what it was given, at least.
            unseen = [
                tensor for tensor in tensors_in(result) if tensor not in self.producers and not self._named(tensor)
            ]
            if unseen:
                given = [self._node_of(tensor) for tensor in tensors_in((args, kwargs))]
                self._emit("call_function", unseen_operation, tuple(given), {}, unseen)
            return result
        finally:
            self.frames.pop()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", type(func).__name__)
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            value = func(*args, **kwargs)
            if name in _VALUE_ATTRIBUTES and isinstance(value, Tensor):
                self._emit("call_function", getattr, (self._written(args[0]), name), {}, value)
            return value
        reads: tuple[Any, Any] = ((), {})
        if _has_tensor(args) or _has_tensor(kwargs):
            reads = self._written(args), self._written(kwargs)
        value = func(*args, **kwargs)
        if name == "__setitem__":
            self._rewrite(args[0], self._create("call_function", operator.setitem, reads[0], reads[1], args[0]))
        elif name == "__set__" and len(args) == 2 and isinstance(args[1], Tensor):  # x.data = y
            self._rewrite(args[0], self._node_of(args[1]))
        elif _has_tensor(value):
            if not reads[0] and not reads[1]:  # what a constant is made from
                reads = self._written(args), self._written(kwargs)
            if value is (args[0] if args else None) and canonical_name(name) in LAYOUT | DROPOUT:
                return value  # nothing to do, nothing done: the tensor came back as it was
            is_method = getattr(torch.Tensor, name, None) is func
            op, target = ("call_method", name) if is_method else ("call_function", func)
            node = self._emit(op, target, reads[0], reads[1], value)
            if name == "flex_attention" and len(args) > 4:
                node.meta["mask_mod"] = args[4][-1]  # a function of indices
        return value

    def place(self, path: str, tensor: Tensor) -> None:
        """A tensor that the model is called with."""
        self.producers[tensor] = self._create("placeholder", path, (), {}, tensor)

    def finish(self, result: Any) -> None:
        """The model's result ends the graph."""
        self.graph.create_node("output", "output", (tuple(self._node_of(tensor) for tensor in tensors_in(result)),))

    def _create(self, op: str, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        single = isinstance(value, Tensor)
        node.meta.update(
            shape=tuple(value.shape) if single else None, dtype=value.dtype if single else None, fqn=self.frames[-1]
        )
        return node

    def _emit(self, op: str, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        """Write a node, and remember it as the producer of every tensor in `value`."""
        node = self._create(op, target, args, kwargs, value)
        if isinstance(value, Tensor):
            self._rewrite(value, node)
            return node
        for key, item in _items(value):
            if isinstance(item, Tensor):
                self._rewrite(item, self._create("call_function", operator.getitem, (node, key), {}, item))
            else:
                for tensor in tensors_in(item):
                    self._rewrite(tensor, node)
        return node

    def _rewrite(self, tensor: Tensor, node: fx.Node) -> None:
        """From now on `tensor` holds what `node` computed."""
        base = tensor._base if tensor in self.producers else None
        self.producers[tensor] = node
        if base is not None and base is not tensor and (base in self.producers or self._named(base)):
            # A view was written to, and with it the tensor that it looks at.
            self.producers[base] = self._create(
                "call_function", operator.setitem, (self._node_of(base), None, node), {}, base
            )

    def _named(self, tensor: Tensor) -> bool:
        return self.names.get(tensor) is not None

    def _node_of(self, tensor: Tensor) -> fx.Node:
        node = self.producers.get(tensor)
        if node is None:
            # Seen for the first time as an argument: a weight, or a constant that nothing of ours computed.
            node = self._create("get_attr", self.names.get(tensor, "<constant>"), (), {}, tensor)
            if node.target == "<constant>":
                node.meta["value"] = original_of(tensor)
                node.meta["unwatched"] = tensor not in self.names  # no part of the model, and nothing seen made it
            self.producers[tensor] = node
        return node

    def _written(self, value: Any) -> Any:
        """An argument as the graph holds it: tensors as nodes, plain values as they are, anything else as None."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, (tuple, list)):
            written = [self._written(item) for item in value]
            return tuple(written) if type(value) is tuple else written
        if isinstance(value, dict):
            return {str(key): self._written(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(self._written(value.start), self._written(value.stop), self._written(value.step))
        plain = (str, int, float, bool, complex, torch.dtype, torch.device, type(...), type(None))
        return value if isinstance(value, plain) else None


def unseen_operation(*tensors: Any) -> None:
    """Stands in a graph for code that could not be watched."""
    raise NotImplementedError("a recorded graph is read, not run")


@contextlib.contextmanager
def _failing_in(name: str) -> Iterator[None]:
    """Let an error tell the innermost module that it comes from."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "failed_in"):
            error.failed_in = name  # type: ignore[attr-defined]
        raise


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))


def tensors_in(value: Any, depth: int = 8) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif depth:
        for _, item in _items(value):
            yield from tensors_in(item, depth - 1)


def _has_tensor(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def _without_compiler() -> contextlib.AbstractContextManager[Any]:
    """Functions that the model has compiled run as they were written."""
    if "torch._dynamo" not in sys.modules:  # importing it takes longer than all of discovery
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")

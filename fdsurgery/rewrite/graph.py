"""Turns the functional calls of a `torch.fx` graph into modules, which a plan can name and the tree rewriter can swap.

What `torch.export` gives, and some of what `torch.fx` traces, has no layers: `conv2d(x, weight, bias)` stands in the
graph, and the weight is an attribute. Here each such call becomes a call of an ordinary `nn.Conv2d` or `nn.Linear`
that holds the very same parameters. From then on there is one way of deciding and of swapping, whatever the model is.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..discovery.site import Kind
from ..errors import RewriteError, SurgeryError, UnsupportedModelError
from .check_model import refuse_unsupported

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class LayerCall:
    """A call of a convolution or linear function in a graph: the layer it amounts to, or why it is none."""

    node: fx.Node
    """The call, in the graph module's graph."""
    name: str = ""
    """Where the layer is put: the name that its weight's name tells (`fc1` of `fc1.weight`), or one derived from it
    (`w_conv` of `w`). Equal for calls that share their parameters and all arguments but the input: one layer."""
    aliases: tuple[str, ...] = ()
    """Other places where the layer is put, because its parameters are held there too."""
    layer: Layer | None = None
    """A plain layer that holds the call's own parameters; None where the call stays."""
    parameters: tuple[str, ...] = ()
    """All names of those parameters."""
    obstacle: str | None = None
    """Why the call stays, in words; None if nothing stands in the way."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for calls of one layer in several graphs."""
        return self.name, self.aliases, self.parameters, repr(self.layer)


def layer_calls(graph_module: fx.GraphModule) -> list[LayerCall]:
    """The functional convolutions and linear layers of a graph, in order. Nothing is touched.

    Args:
        graph_module: from `torch.fx.symbolic_trace`, `torch.export.export(...).module()`, a feature extractor, ...

    Returns:
        One entry for each call of a convolution or linear function, with an `obstacle` for those that
        `modules_from_calls` leaves as they are: the weight is computed or has other uses, the convolution is transposed
        or not two-dimensional, ... What is called as a module is none of these.

    Raises:
        UnsupportedModelError: it is no graph module.
    """
    _refuse_other_than_graphs(graph_module)
    return _calls_in_all(graph_module, _graphs(graph_module))[0]


def modules_from_calls(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Make modules of the functional convolutions and linear layers of a graph. The outputs stay exactly the same.

    A weight called `blocks.0.mlp.fc1.weight` is from then on that of an `nn.Linear` at `blocks.0.mlp.fc1`, so that
    names in the state dict stay. Where the name is not of that form, or the module there holds other things too, they
    change: `w` becomes `w_conv.weight` (or `w_linear.weight`), and its bias `w_conv.bias`.

    Args:
        graph_module: changed in place, all or nothing: it is given a new graph, with new modules for what can be one
            (see `layer_calls`) and everything else as it was. The parameters are the same objects. New modules are in
            its mode; where `torch.export` has fixed the mode, in the one that it was exported in.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: it is no graph module, or of a kind that cannot be changed.
        RewriteError: the new graph does not hold together; the graph module is as it was.
    """
    with calls_as_modules(graph_module):
        pass
    return graph_module


@contextmanager
def calls_as_modules(graph_module: fx.GraphModule) -> Iterator[list[LayerCall]]:
    """Make modules of functional calls; if that fails, or the body raises, put everything back."""
    _refuse_other_than_graphs(graph_module)
    refuse_unsupported(graph_module)
    old = _graphs(graph_module)
    held = [(module, dict(module._parameters), dict(module._modules)) for module in graph_module.modules()]
    try:
        try:
            # The old graphs are never written to, so that putting them back puts back every node.
            new = [copy.deepcopy(graph) for graph in old]
            calls = _calls_in_all(graph_module, new)
            training = _is_training(graph_module)
            for call in {call.name: call for call in calls[0] if call.layer is not None}.values():
                _move_parameters(graph_module, call, training)
            for call in itertools.chain(*calls):
                _call_module(call)
            moved = {name for call in calls[0] for name in call.parameters}
            for graph in new:
                for node in reversed(graph.nodes):
                    if node.op == "get_attr" and node.target in moved:
                        graph.erase_node(node)
            _exchange_graphs(graph_module, old, new)
            for graph in new:
                graph.lint()
        except SurgeryError:
            raise
        except Exception as error:
            raise RewriteError(
                f"the graph could not be rewritten: {type(error).__name__}: {error}; nothing was changed"
            ) from error
        yield calls[0]
    except BaseException:
        for module, parameters, modules in held:
            _refill(module._parameters, parameters)
            _refill(module._modules, modules)
        _exchange_graphs(graph_module, _graphs(graph_module), old)
        raise


def _move_parameters(graph_module: fx.GraphModule, call: LayerCall, training: bool) -> None:
    """Take the parameters from where they are, and put the layer in its place."""
    assert call.layer is not None
    for name in call.parameters:
        owner, _, key = name.rpartition(".")
        del graph_module.get_submodule(owner)._parameters[key]
    call.layer.train(training)
    for place in (call.name, *call.aliases):
        parent, _, key = place.rpartition(".")
        graph_module.get_submodule(parent)._modules[key] = call.layer


def _is_training(graph_module: fx.GraphModule) -> bool:
    """The mode for new layers.

    What `torch.export` gives has the mode of the model written into its calls, for good: its `train` and `eval` refuse,
    and its own flag says `training` whatever the model was.
    """
    if "train" not in vars(graph_module):
        return graph_module.training
    for node in graph_module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            names = [argument.name for argument in node.target._schema.arguments]
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            if given.get("training") is True or given.get("train") is True:
                return True
    return False


def _call_module(call: LayerCall) -> None:
    """Make the node itself the call of the module: its name, place and metadata stay."""
    if call.layer is None:
        return
    given = _given(call.node)["input"]
    call.node.op, call.node.target = "call_module", call.name
    call.node.args, call.node.kwargs = (given,), {}


def _graphs(graph_module: fx.GraphModule) -> list[fx.Graph]:
    """The graph that runs, and others that the module may switch to, as torchvision's does between train and eval."""
    held = [graph_module.graph, *(value for value in vars(graph_module).values() if isinstance(value, fx.Graph))]
    return list({id(graph): graph for graph in held}.values())


def _exchange_graphs(graph_module: fx.GraphModule, old: list[fx.Graph], new: list[fx.Graph]) -> None:
    exchanged = {id(graph): other for graph, other in zip(old, new, strict=True)}
    for name, value in list(vars(graph_module).items()):
        if isinstance(value, fx.Graph) and name != "_graph":
            setattr(graph_module, name, exchanged[id(value)])
    graph_module.graph = exchanged[id(graph_module.graph)]  # and its code, which is made anew


def _refill(registry: Any, content: dict[str, Any]) -> None:
    registry.clear()
    registry.update(content)


def _refuse_other_than_graphs(graph_module: Any) -> None:
    refuse_unsupported(graph_module)
    if not isinstance(graph_module, fx.GraphModule):
        raise UnsupportedModelError(
            f"expected a torch.fx.GraphModule, not {type(graph_module).__name__}; a model that was not traced is "
            "converted by fdsurgery.convert"
        )


# What is a call of a layer

_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTION = (*_CONV2D[:6], "transposed", "output_padding", "groups")
_LINEAR = ("input", "weight", "bias")
_aten = torch.ops.aten

_FUNCTIONS: dict[Any, tuple[Kind, tuple[str, ...]]] = {
    F.conv2d: ("conv", _CONV2D),
    torch.conv2d: ("conv", _CONV2D),
    _aten.conv2d: ("conv", _CONV2D),
    torch.convolution: ("conv", _CONVOLUTION),
    _aten.convolution: ("conv", _CONVOLUTION),
    F.linear: ("linear", _LINEAR),
    _aten.linear: ("linear", _LINEAR),
}
"""The functions that may be layers: their kind, and their arguments in order."""

_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "transposed": False}

_TRANSPOSED = "a transposed convolution has no dynamic counterpart"
_OTHER_RANK = "only two-dimensional convolutions have a dynamic counterpart"
_NEVER: dict[Any, str] = {
    function: reason
    for names, reason in (
        (("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _TRANSPOSED),
        (("conv1d", "conv3d"), _OTHER_RANK),
    )
    for name in names
    for function in (getattr(F, name), getattr(_aten, name))
}


def _function(node: fx.Node) -> Any:
    """What a node calls, without the overload: `aten.conv2d.padding` is `aten.conv2d`."""
    return getattr(node.target, "overloadpacket", node.target) if node.op == "call_function" else None


def _given(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by name."""
    _, names = _FUNCTIONS[_function(node)]
    return {**_DEFAULTS, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _calls_in_all(graph_module: fx.GraphModule, graphs: list[fx.Graph]) -> list[list[LayerCall]]:
    """The calls in each graph. One is a layer only if it is the same in all of them."""
    found = [_calls_in(graph_module, graph) for graph in graphs]
    common = set.intersection(*({call.identity for call in calls if call.layer is not None} for calls in found))
    different = "the module switches between graphs, and not all of them call it with the same arguments"
    return [
        [
            call if call.layer is None or call.identity in common else LayerCall(call.node, obstacle=different)
            for call in calls
        ]
        for calls in found
    ]


def _calls_in(graph_module: fx.GraphModule, graph: fx.Graph) -> list[LayerCall]:
    uses = _uses(graph_module, graph)
    obstacles = {node: _obstacle_of_input(node) for node in graph.nodes if _function(node) in _FUNCTIONS}
    alike = Counter(_signature(node) for node, obstacle in obstacles.items() if obstacle is None)
    layers: dict[str, LayerCall] = {}
    calls: list[LayerCall] = []
    for node in graph.nodes:
        if _function(node) in _NEVER:
            calls.append(LayerCall(node, obstacle=_NEVER[_function(node)]))
        elif node not in obstacles:
            continue
        elif obstacles[node] is not None:
            calls.append(LayerCall(node, obstacle=obstacles[node]))
        else:
            signature = _signature(node)
            if signature not in layers:
                taken = {call.name for call in layers.values()}
                layers[signature] = _layer_call(graph_module, node, uses, alike[signature], taken)
            calls.append(replace(layers[signature], node=node))
    return calls


def _signature(node: fx.Node) -> str:
    """Equal for calls that one layer can make: the same parameters, and the same other arguments."""
    kind, _ = _FUNCTIONS[_function(node)]
    given = {
        name: value.target if isinstance(value, fx.Node) and value.op == "get_attr" else value
        for name, value in _given(node).items()
        if name != "input"
    }
    return f"{kind} {given}"


def _layer_call(
    graph_module: fx.GraphModule, node: fx.Node, uses: Counter[int], calls: int, taken: set[str]
) -> LayerCall:
    layer = _layer(graph_module, node, uses, calls)
    if isinstance(layer, str):
        return LayerCall(node, obstacle=layer)
    names = [
        name
        for name, parameter in graph_module.named_parameters(remove_duplicate=False)
        if parameter is layer.weight or parameter is layer.bias
    ]
    places = _places(graph_module, layer, names, taken)
    if not places:
        return LayerCall(node, obstacle=f"its parameters are held under several names, {', '.join(names)}")
    return LayerCall(node, places[0], places[1:], layer, tuple(names))


def _layer(graph_module: fx.GraphModule, node: fx.Node, uses: Counter[int], calls: int) -> Layer | str:
    """The layer that `calls` calls like this one amount to, or why there is none."""
    kind, names = _FUNCTIONS[_function(node)]
    given = _given(node)
    unknown = [name for name in node.kwargs if name not in names]
    if unknown:
        return f"it is given {unknown[0]!r}, which a layer does not take"
    tensors: list[nn.Parameter | None] = []
    for name in ("weight", "bias"):
        parameter = _parameter(graph_module, name, given[name], uses, calls)
        if isinstance(parameter, str):
            return parameter
        tensors.append(parameter)
    weight, bias = tensors
    assert weight is not None
    for name in names[3:]:
        if not _is_constant(given[name]):
            return f"its {name} is computed as the model runs"
    if given["transposed"]:
        return _TRANSPOSED
    if kind == "conv":
        return _conv(weight, bias, given) if weight.dim() == 4 else _OTHER_RANK
    return _linear(weight, bias) if weight.dim() == 2 else f"its weight has {weight.dim()} axes, not 2"


def _parameter(
    graph_module: fx.GraphModule, role: str, source: Any, uses: Counter[int], calls: int
) -> nn.Parameter | str | None:
    """The parameter that an argument of a call is, or why it is none."""
    if source is None:
        return None if role == "bias" else "it has no weight"
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return f"its {role} is computed as the model runs"
    value = _value(graph_module, source)
    if not isinstance(value, nn.Parameter):
        return f"its {role} {source.target!r} is not a parameter"
    if uses[id(value)] != calls:
        return f"its {role} {source.target!r} has another use"
    return value


def _uses(graph_module: fx.GraphModule, graph: fx.Graph) -> Counter[int]:
    """How often the graph uses each parameter, by id."""
    reads: Counter[fx.Node] = Counter()
    for node in graph.nodes:
        fx.map_arg((node.args, node.kwargs), lambda source: reads.update([source]))
    uses: Counter[int] = Counter()
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        value = _value(graph_module, node)
        if isinstance(value, Tensor):
            uses[id(value)] += reads[node]
        elif isinstance(value, nn.Module):
            uses.update(id(parameter) for parameter in value.parameters())
    return uses


def _value(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    return functools.reduce(getattr, str(node.target).split("."), graph_module)


def _is_constant(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(isinstance(entry, int) for entry in value)
    return isinstance(value, (int, str))


def _conv(weight: nn.Parameter, bias: nn.Parameter | None, given: dict[str, Any]) -> nn.Conv2d | str:
    out_channels, in_channels, k_h, k_w = weight.shape
    padding = given["padding"] if isinstance(given["padding"], str) else _pair(given["padding"])
    try:
        conv = nn.Conv2d(
            in_channels * given["groups"],
            out_channels,
            (k_h, k_w),
            _pair(given["stride"]),
            padding,
            _pair(given["dilation"]),
            given["groups"],
            bias is not None,
            device="meta",
        )
    except ValueError as error:
        return f"nn.Conv2d does not take its arguments: {error}"
    return _holding(conv, weight, bias)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _holding(linear, weight, bias)


def _holding(layer: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> Any:
    layer.weight, layer.bias = weight, bias
    return layer


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Height and width; functions take one number for both, and a list of one."""
    first, *rest = (value,) if isinstance(value, int) else value
    return first, rest[0] if rest else first


def _obstacle_of_input(call: fx.Node) -> str | None:
    """The obstacle of a linear layer whose samples do not lie along the first axis, as far as symbolic sizes tell."""
    if _FUNCTIONS[_function(call)][0] != "linear":
        return None
    batch: set[Any] = set()
    for node in call.graph.nodes:
        if node.op == "placeholder":
            batch.update(*(_symbols(size) for size in _shape(node)[:1]))
    axes = [axis for axis, size in enumerate(_shape(_given(call)["input"])) if _symbols(size) & batch]
    if axes and axes[0] != 0:
        return f"its input has the batch on axis {axes[0]}; a dynamic linear layer takes the first axis for the sample"
    return None


def _shape(node: Any) -> Sequence[Any]:
    """Shape of a node's value, symbolic where it was exported so; empty where it is not known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, Tensor) else ()


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _places(graph_module: fx.GraphModule, layer: Layer, names: list[str], taken: set[str]) -> tuple[str, ...]:
    """Where to put a layer: in the place of the modules that hold its parameters and nothing else, or beside them.

    Empty where parameters of several names lie among other things.
    """
    own = {"weight": layer.weight} if layer.bias is None else {"weight": layer.weight, "bias": layer.bias}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    holders = [dict(_held(graph_module.get_submodule(owner))) for owner in owners]
    alone = all(held.keys() == own.keys() and all(held[key] is value for key, value in own.items()) for held in holders)
    if alone and "" not in owners:
        return tuple(owners)
    if len(names) != len(own):
        return ()
    (weight,) = (name for name in names if functools.reduce(getattr, name.split("."), graph_module) is layer.weight)
    beside = weight + ("_conv" if isinstance(layer, nn.Conv2d) else "_linear")
    owner = beside.rpartition(".")[0]
    name, number = beside, 0
    while name in taken or hasattr(graph_module.get_submodule(owner), name.rpartition(".")[2]):
        number += 1
        name = f"{beside}_{number}"
    return (name,)


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything that is registered with a module."""
    for registry in (module._parameters, module._buffers, module._modules):
        yield from ((name, value) for name, value in registry.items() if value is not None)

"""Which calls of a `torch.fx` graph a plain layer can make: convolutions and products whose weight is a parameter."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..discovery.kinds import CONV, LINEAR, LayerKind, known_kind

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


_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONVOLUTION = (*_CONV2D[:6], "transposed", "output_padding", "groups")
_LINEAR = ("input", "weight", "bias")
_aten = torch.ops.aten

_FUNCTIONS: dict[Any, tuple[LayerKind, tuple[str, ...]]] = {
    F.conv2d: (CONV, _CONV2D),
    torch.conv2d: (CONV, _CONV2D),
    _aten.conv2d: (CONV, _CONV2D),
    torch.convolution: (CONV, _CONVOLUTION),
    _aten.convolution: (CONV, _CONVOLUTION),
    F.linear: (LINEAR, _LINEAR),
    _aten.linear: (LINEAR, _LINEAR),
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


def given_to(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by name."""
    _, names = _FUNCTIONS[_function(node)]
    return {**_DEFAULTS, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def calls_in_all(graph_module: fx.GraphModule, graphs: list[fx.Graph]) -> list[list[LayerCall]]:
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
        for name, value in given_to(node).items()
        if name != "input"
    }
    return f"{kind.name} {given}"


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
    given = given_to(node)
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
    if weight.dim() != 2 + kind.axes:
        return _OTHER_RANK if kind.convolves else f"its weight has {weight.dim()} axes, not 2"
    return _holding(kind, weight, bias, given)


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


def _holding(kind: LayerKind, weight: nn.Parameter, bias: nn.Parameter | None, given: dict[str, Any]) -> Layer | str:
    """A layer of that kind that holds these parameters, with the call's other arguments."""
    out_channels, in_channels, *kernel_size = weight.shape
    geometry: dict[str, Any] = {}
    if kind.convolves:
        in_channels *= given["groups"]
        geometry = {name: _per_axis(given[name], kind.axes) for name in ("stride", "padding", "dilation")}
        geometry |= {"kernel_size": tuple(kernel_size), "groups": given["groups"]}
    try:
        layer = kind.make(in_channels, out_channels, bias=bias is not None, **geometry)
    except ValueError as error:
        return f"nn.{kind.plain.__name__} does not take its arguments: {error}"
    layer.weight, layer.bias = weight, bias
    return layer


def _per_axis(value: int | str | Sequence[int], axes: int) -> tuple[int, ...] | str:
    """A number for each axis; functions take one number for all, and a list of one. A name of a padding stays."""
    if isinstance(value, str):
        return value
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers


def _obstacle_of_input(call: fx.Node) -> str | None:
    """The obstacle of a linear layer whose samples do not lie along the first axis, as far as symbolic sizes tell."""
    if _FUNCTIONS[_function(call)][0].convolves:
        return None
    batch: set[Any] = set()
    for node in call.graph.nodes:
        if node.op == "placeholder":
            batch.update(*(_symbols(size) for size in _shape(node)[:1]))
    axes = [axis for axis, size in enumerate(_shape(given_to(call)["input"])) if _symbols(size) & batch]
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
    beside = f"{weight}_{known_kind(layer).name}"
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

"""The graphs of other tracers, brought into the form that the recorder writes, to compare what they see.

Whatever has traced the model, its graph is run once under the recorder. That gives every node a shape, opens the
modules that the tracer left closed, and leaves one form of graph for the matcher to read. What `torch.export` writes
has functions in place of layers, as symbolic tracing has where a layer is a class of its own; where the graph says that
a layer called them, they become calls of layers again.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import fx, nn

from ..errors import DiscoveryError
from .inputs import Inputs
from .observe import Observation, layers_of, observe, one_line, shown_by
from .ops import op_name
from .record import record
from .shadow import same_random_numbers, twin_of

TracedBy = Literal["fx", "timm", "export"]
"""`fx` is `torch.fx.symbolic_trace`, `timm` the tracer of timm's feature extraction, `export` is `torch.export`."""

TRACERS: tuple[TracedBy, ...] = get_args(TracedBy)


def observe_by(tracer: TracedBy, model: nn.Module, example_inputs: Any = None) -> Observation:
    """What the graph of another tracer shows; as `observe`, which also finds the inputs.

    Raises:
        DiscoveryError: also if the tracer refuses the model, or there is none of that name.
    """
    if tracer not in TRACERS:
        raise DiscoveryError(f"there is no tracer {tracer!r}; there are {', '.join(TRACERS)}")
    inputs = observe(model, example_inputs).inputs
    try:
        graph = trace(model, inputs, tracer, layers_of(model))
    except Exception as error:
        raise DiscoveryError(
            f"{type(model).__name__} could not be traced by {tracer}: {one_line(error)}. A recorded forward takes more "
            "models: call observe"
        ) from error
    return shown_by(graph, model, inputs, tracer)


def trace(model: nn.Module, inputs: Inputs, tracer: TracedBy, layers: Mapping[str, nn.Module]) -> fx.Graph:
    """The graph that another tracer sees, in the form of `fdsurgery.discovery.record`.

    Args:
        model: any module; a copy of it on the meta device is traced.
        inputs: what to call it with. Arguments that are not among them are fixed at their defaults.
        tracer: which one to use; `timm` needs timm.
        layers: the convolutions and linear layers of the model by name.

    Raises:
        Exception: whatever the tracer raises for a model that it cannot trace.
    """
    twin, _ = twin_of(model, meta=True)
    on_meta = inputs.map(lambda tensor: tensor.to("meta"))
    with same_random_numbers():
        match tracer:
            case "fx":
                graph_module = fx.symbolic_trace(twin, concrete_args=_not_given(twin, inputs))
            case "timm":
                graph_module = _traced_by_timm(twin, layers.values())
            case "export":
                program = torch.export.export(twin, on_meta.args, dict(on_meta.kwargs), strict=False)
                graph_module = program.module()
    called = _called(program.graph if tracer == "export" else graph_module.graph)
    graph = record(graph_module, inputs, meta=True)
    _call_layers(graph, _first_names(twin, layers), called)
    return graph


def _not_given(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of a forward that keep their defaults."""
    parameters = inspect.signature(model.forward).parameters
    given = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in given and parameter.default is not parameter.empty
    }


def _traced_by_timm(model: nn.Module, layers: Iterable[nn.Module]) -> fx.GraphModule:
    """The model up to its last node, as timm's feature extraction cuts it, with its layers left closed."""
    from timm.layers import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    tracing = {
        "leaf_modules": [*get_notrace_modules(), *{type(layer) for layer in layers}],
        "autowrap_functions": list(get_notrace_functions()),
    }
    with warnings.catch_warnings():  # that the graphs for training and for evaluation differ, as they may
        warnings.simplefilter("ignore")
        _, names = get_graph_node_names(model, tracing)
        extractor: fx.GraphModule = create_feature_extractor(model, [names[-1]], tracer_kwargs=tracing)
    return extractor


def _called(graph: fx.Graph) -> set[str]:
    """Names of the modules whose forwards called the functions in a graph."""
    stacks = (node.meta.get("nn_module_stack") for node in graph.nodes)
    return {next(reversed(stack.values()))[0] for stack in stacks if stack}


def _first_names(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The name in `layers` for each name of a layer."""
    first = {id(model.get_submodule(name)): name for name in layers}
    return {
        alias: first[id(module)] for alias, module in model.named_modules(remove_duplicate=False) if id(module) in first
    }


def _call_layers(graph: fx.Graph, names: Mapping[str, str], called: set[str]) -> None:
    """Make calls of the layers that were called of the functions that read their weights."""
    called_first = {names[name] for name in called if name in names}
    for node in list(graph.nodes):
        if node.op == "call_module":
            node.target = names.get(str(node.target), node.target)
        if op_name(node) not in ("conv2d", "convolution", "linear"):
            continue
        x, *read = node.all_input_nodes
        owner, _, key = str(read[0].target).rpartition(".") if read else ("", "", "")
        if key == "weight" and names.get(owner) in called_first:
            node.op, node.target, node.args, node.kwargs = "call_module", names[owner], (x,), {}
            for source in read:
                if not source.users:
                    graph.erase_node(source)

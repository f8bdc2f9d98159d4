"""Turns the functional calls of a `torch.fx` graph into modules, which a plan can name and the tree rewriter can swap.

What `torch.export` gives, and some of what `torch.fx` traces, has no layers: `conv2d(x, weight, bias)` stands in the
graph, and the weight is an attribute. Here each such call becomes a call of an ordinary `nn.Conv2d` or `nn.Linear`
that holds the very same parameters. From then on there is one way of deciding and of swapping, whatever the model is.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ..errors import RewriteError, SurgeryError, UnsupportedModelError
from .check_model import refuse_unsupported
from .layer_call import LayerCall, calls_in_all, given_to


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
    return calls_in_all(graph_module, _graphs(graph_module))[0]


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
            calls = calls_in_all(graph_module, new)
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
    given = given_to(call.node)["input"]
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

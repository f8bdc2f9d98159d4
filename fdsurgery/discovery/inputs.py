"""What to call a model with, when nobody says: guesses, best first, each tried until the model's forward runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..inputs import BATCH, ExampleTensors, Inputs, image_channels, image_sizes
from ..integrations import example_inputs, image_shape
from .kinds import convolves, kind_of, known_kind

_TOKENS = 16


def guesses(model: nn.Module) -> Iterator[Inputs]:
    """Inputs that the model may take, the most likely first, on its device and in its dtype.

    The library that a model comes from is asked. Else channels and sizes come from the model's own configuration and
    first convolution, then the usual image sizes are tried, and token inputs if the model begins with a linear. What
    `torch.export` wrote tells its own.
    """
    make = ExampleTensors(model)
    if isinstance(model, fx.GraphModule):
        yield from _for_exported(model, make)
    known = example_inputs(model)
    yield from _for_others(model, make) if known is None else known


def _for_others(model: nn.Module, make: ExampleTensors) -> Iterator[Inputs]:
    first = next((module for module in model.modules() if kind_of(module) is not None), None)
    if first is not None and not convolves(first):
        features, _ = known_kind(first).channels(first)
        yield Inputs((make.floats(BATCH, _TOKENS, features),))
        yield Inputs((make.floats(BATCH, features),))
        yield Inputs((make.floats(BATCH, 8, 8, features),))
    shape = image_shape(model)
    for channels, size in product(image_channels(model, shape), image_sizes(model, shape)):
        yield Inputs((make.image(channels, *size),))


def _for_exported(graph_module: fx.GraphModule, make: ExampleTensors) -> Iterator[Inputs]:
    """Inputs like those that the graph was exported with."""
    like = [node.meta.get("val") for node in graph_module.graph.nodes if node.op == "placeholder"]
    structure = getattr(graph_module, "_in_spec", None)
    if structure is None or not all(isinstance(value, Tensor) for value in like):
        return
    made = [
        make.floats(*map(int, value.shape)).to(value.dtype)
        if value.is_floating_point()
        else make.ones(*map(int, value.shape)).to(value.dtype)
        for value in like
    ]
    args, kwargs = pytree.tree_unflatten(made, structure)
    yield Inputs(args, kwargs)

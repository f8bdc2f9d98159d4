"""Look at a model: its sites, and the data flow that shows what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import fx, nn

from ..errors import DiscoveryError
from .flow import Flow, layer_input, shape_of
from .inputs import Inputs, guesses
from .obstacles import find_obstacles
from .record import LAYERS, record
from .roles import find_roles
from .site import Kind, Layout, Site

_MOST_REAL_TRIES = 3  # a real forward of a large model takes seconds, and fails at one size much as at another


@dataclass(frozen=True)
class Observation:
    """What one forward of a model showed."""

    graph: fx.Graph
    """Data flow; see `fdsurgery.discovery.record` for how to read it."""
    sites: tuple[Site, ...]
    """One for each convolution and linear layer, in the order of `model.named_modules()`."""
    inputs: Inputs
    """What the model was called with."""
    tracer: Literal["meta", "real"]
    """Whether the forward ran on meta tensors (no memory, no computation) or had to be real."""
    calls: Mapping[str, int]
    """How often each convolution and linear layer was called, by name; 0 for those that never were."""
    note: str = ""
    """Why meta tensors did not do, if they did not."""


def sites(model: nn.Module, example_inputs: Any = None) -> tuple[Site, ...]:
    """All convolutions and linear layers of a model, with what one forward shows about each.

    Args:
        model: any module; it is not changed in any way.
        example_inputs: what to call the model with. A tensor is its only argument, a tuple or list holds positional
            arguments, a mapping keyword arguments. Guessed if None (see `example_inputs`).

    Returns:
        One site for each module object, in the order of `model.named_modules()`.

    Raises:
        DiscoveryError: the model's forward ran with no inputs that could be guessed, or not with those given.
    """
    return observe(model, example_inputs).sites


def example_inputs(model: nn.Module) -> Inputs:
    """Inputs with which the model's forward runs: a batch of 2 from its own configuration, or of a usual size.

    Returns:
        `Inputs`, with tensors on the model's device and in its dtype; `model(*inputs.args, **inputs.kwargs)`.

    Raises:
        DiscoveryError: none could be found.
    """
    return observe(model).inputs


def observe(model: nn.Module, example_inputs: Any = None) -> Observation:
    """Run one forward of a copy of the model in eval mode, on meta tensors if it can be, and tell what was seen.

    Args:
        model: any module; it is not changed in any way, and neither are the states of random generators.
        example_inputs: as for `sites`.

    Returns:
        The data flow as a graph, and the sites with their roles in it.

    Raises:
        DiscoveryError: the model's forward ran with no inputs that could be guessed, or not with those given.
    """
    layers = _layers(model)
    if isinstance(model, torch.jit.ScriptModule):
        graph, inputs, tracer, note = fx.Graph(), Inputs(), "meta", "TorchScript cannot be watched"
    else:
        graph, inputs, tracer, note = _first_that_runs(model, example_inputs)
    flow = Flow(graph, layers)
    found = _sites(model, flow)
    calls = {name: len(flow.calls.get(name, ())) for name in layers}
    return Observation(graph, found, inputs, cast(Literal["meta", "real"], tracer), calls, note)


def _first_that_runs(model: nn.Module, example_inputs: Any) -> tuple[fx.Graph, Inputs, str, str]:
    given = None if example_inputs is None else Inputs.of(example_inputs)
    tried: list[tuple[str, Inputs, str]] = []
    for inputs in [given] if given is not None else guesses(model):
        try:
            return record(model, inputs, meta=True), inputs, "meta", ""
        except Exception as error:
            tried.append(("meta", inputs, _one_line(error)))
    if not any(weight.is_meta for weight in model.parameters()):
        for inputs in [given] if given is not None else islice(guesses(model), _MOST_REAL_TRIES):
            try:
                return record(model, inputs, meta=False), inputs, "real", f"on meta tensors: {tried[0][2]}"
            except Exception as error:
                tried.append(("real", inputs, _one_line(error)))
    first = next((attempt for attempt in tried if attempt[0] == "real"), tried[0])
    others = (
        ""
        if given is not None or len(tried) == 1
        else f" ({len(tried)} attempts in all, with other sizes and on meta tensors)"
    )
    raise DiscoveryError(
        f"{type(model).__name__} could not be observed: its forward failed with {first[1]}{others}. "
        f"It said: {first[2]}. "
        + (
            "Pass example_inputs= that it takes: a tensor, a tuple of positional arguments, or a dict of keywords."
            if given is None
            else "Are these example_inputs what it takes? A tuple is read as positional arguments, a dict as keywords."
        )
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by first name. What is inside one of them is a part of it."""
    layers: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and id(module) not in inside:
            layers[name] = module
            inside.update(id(part) for part in module.modules() if part is not module)
    return layers


def _sites(model: nn.Module, flow: Flow) -> tuple[Site, ...]:
    names: dict[int, list[str]] = {}
    by_name: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        by_name[name] = module
    roles = find_roles(flow)
    obstacles = find_obstacles(model, flow)
    found: list[Site] = []
    for name, module in model.named_modules():
        parent = by_name[name.rpartition(".")[0]] if name else None
        common: dict[str, Any] = {
            "name": name,
            "aliases": tuple(names[id(module)][1:]),
            "parent_class": type(parent).__name__ if parent is not None else "",
        }
        if name in flow.layers:
            role, ffn = roles[name]
            calls = flow.calls.get(name, [])
            shape = shape_of(layer_input(calls[0])) if calls else None
            found.append(
                Site(
                    role=role,
                    ffn=ffn,
                    layer_class=type(module).__name__,
                    layout=_layout(module, shape),
                    input_shape=shape,
                    calls=len(calls),
                    obstacle=obstacles.get(name),
                    **common,
                    **_geometry(module),
                )
            )
        elif getattr(module, "original_name", None) in ("Conv2d", "Linear") and isinstance(
            module, torch.jit.ScriptModule
        ):
            geometry = _geometry(module)
            found.append(
                Site(
                    role="spatial" if geometry["kind"] == "conv" else "linear",
                    layer_class=str(module.original_name),
                    obstacle="it is inside a torch.jit.ScriptModule, which is compiled; convert before scripting",
                    **common,
                    **geometry,
                )
            )
    return tuple(found)


def _geometry(layer: Any) -> dict[str, Any]:
    kind: Kind = "linear" if hasattr(layer, "in_features") else "conv"
    if kind == "linear":
        return {"kind": kind, "in_channels": layer.in_features, "out_channels": layer.out_features}
    pairs = {key: tuple(getattr(layer, key)) for key in ("kernel_size", "stride", "dilation")}
    return {
        "kind": kind,
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "groups": layer.groups,
    } | pairs


def _layout(layer: nn.Module, shape: tuple[int, ...] | None) -> Layout | None:
    if shape is None:
        return None
    if isinstance(layer, nn.Conv2d):
        return "NCHW"
    if len(shape) <= 2:
        return "rows"
    return "tokens" if len(shape) == 3 else "NHWC"

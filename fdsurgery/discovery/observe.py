"""Look at a model: its sites, and the data flow that shows what they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from ..errors import DiscoveryError
from .flow import Flow, layer_input, shape_of
from .inputs import Inputs, guesses
from .kinds import KINDS, LayerKind, kind_of, known_kind
from .probe import probe
from .record import record
from .roles import find_roles
from .shadow import has_hooks
from .site import Layout, Role, Site
from .unsupported import find_cautions, find_obstacles

Recorded = Literal["meta", "real"]

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
    tracer: str
    """How the graph was made: by a forward recorded on `meta` tensors (no memory, no computation) or, where that did
    not do, on `real` ones; or the name of another tracer (see `fdsurgery.discovery.trace`)."""
    input_shapes: Mapping[str, tuple[tuple[int, ...], ...]]
    """Shape of the input of each call of each convolution and linear layer, by name; `()` where it is not known."""
    batch: int
    """Number of samples that the model was called with."""
    note: str = ""
    """Why meta tensors did not do, if they did not."""
    hooks: bool = False
    """True if the model ran only with the hooks that hang on it."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Layers with learned weights that are of no kind that can be swapped: how many there are of each class."""

    @property
    def calls(self) -> dict[str, int]:
        """How often each convolution and linear layer was called, by name; 0 for those that never were."""
        return {name: len(shapes) for name, shapes in self.input_shapes.items()}


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

    Examples:
        >>> import torch, fdsurgery
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> sites = fdsurgery.sites(model, torch.randn(2, 3, 16, 16))
        >>> [(site.name, site.role) for site in sites]
        [('0', 'stem'), ('2', 'spatial'), ('4', 'head')]
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
        DiscoveryError: the model's forward ran with no inputs that could be guessed, or not with those given; or it has
            lazy layers, which are nothing yet.
    """
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(weight):
            raise DiscoveryError(f"{name!r} has no shape yet (a lazy layer); call the model once on real inputs first")
    hooks = False
    try:
        graph, inputs, tracer, note = _first_that_runs(model, example_inputs)
    except DiscoveryError:
        if not has_hooks(model):
            raise
        # Some models collect their features by hooks, and do not run without them.
        hooks = True
        graph, inputs, tracer, note = _first_that_runs(model, example_inputs, hooks)
    return shown_by(graph, model, inputs, tracer, note, hooks)


def shown_by(
    graph: fx.Graph, model: nn.Module, inputs: Inputs, tracer: str, note: str = "", hooks: bool = False
) -> Observation:
    """What the graph of a forward shows of the model; for the arguments see `Observation`."""
    layers = layers_of(model)
    flow = Flow(graph, layers)
    found = _sites(model, flow, inputs)
    cautions = probe(model, flow, inputs, found, hooks)
    found = tuple(replace(site, caution=cautions.get(site.name, site.caution)) for site in found)
    shapes = {name: tuple(shape_of(layer_input(call)) or () for call in flow.calls.get(name, ())) for name in layers}
    return Observation(graph, found, inputs, tracer, shapes, flow.batch, note, hooks, _left_out(model))


def _first_that_runs(
    model: nn.Module, example_inputs: Any, hooks: bool = False
) -> tuple[fx.Graph, Inputs, Recorded, str]:
    """The graph of the first forward that runs, its inputs, how it ran, and why not on meta tensors if it did not."""
    if isinstance(model, torch.jit.ScriptModule):
        return fx.Graph(), Inputs(), "meta", "TorchScript cannot be watched"
    candidates = guesses(model) if example_inputs is None else iter([Inputs.of(example_inputs)])
    real_tries = 0 if _has_meta_weights(model) else _MOST_REAL_TRIES
    failures: list[_Failure] = []

    def attempt(inputs: Inputs, tracer: Recorded) -> fx.Graph | None:
        try:
            return record(model, inputs, meta=tracer == "meta", hooks=hooks)
        except Exception as error:
            failures.append(_Failure(inputs, tracer, one_line(error)))
            return None

    # Meta forwards are cheap, so all guesses get one. A real one is for those that meta tensors could not serve, which
    # is no fault of the guess, and at the end for the likeliest of the others.
    refused: list[Inputs] = []
    for inputs in candidates:
        graph = attempt(inputs, "meta")
        if graph is not None:
            return graph, inputs, "meta", ""
        if not failures[-1].wants_values or real_tries == 0:
            refused.append(inputs)
            continue
        why = failures[-1].said
        real_tries -= 1
        graph = attempt(inputs, "real")
        if graph is not None:
            return graph, inputs, "real", f"on meta tensors: {why}"
    for inputs in refused[:real_tries]:
        graph = attempt(inputs, "real")
        if graph is not None:
            return graph, inputs, "real", f"on meta tensors: {failures[0].said}"
    raise DiscoveryError(_what_failed(model, failures, guessed=example_inputs is None))


@dataclass(frozen=True)
class _Failure:
    inputs: Inputs
    tracer: Recorded
    said: str

    @property
    def wants_values(self) -> bool:
        """True where the forward asked for values that a meta tensor does not have."""
        return self.tracer == "meta" and "meta" in self.said.lower()


def _has_meta_weights(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def _what_failed(model: nn.Module, failures: list[_Failure], *, guessed: bool) -> str:
    """The failure that tells most, in words, and what to do about it."""
    on_meta = _has_meta_weights(model)
    telling = [failure for failure in failures if (failure.wants_values if on_meta else failure.tracer == "real")]
    shown = (telling or failures)[0]
    attempts = f" ({len(failures)} attempts in all, with other sizes and on meta tensors)"
    if shown.wants_values:
        remedy = "Its weights are on the meta device, and this forward needs values: load or initialise them first."
    elif guessed:
        remedy = "Pass example_inputs= that it takes: a tensor, a tuple of positional arguments, or a dict of keywords."
    else:
        remedy = "Are these example_inputs what it takes? A tuple is read as positional arguments, a dict as keywords."
    return (
        f"{type(model).__name__} could not be observed: its forward failed with {shown.inputs}"
        f"{attempts if guessed and len(failures) > 1 else ''}. It said: {shown.said}. {remedy}"
    )


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by first name. What is inside one of them is a part of it."""
    layers: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if kind_of(module) is not None and id(module) not in inside:
            layers[name] = module
            inside.update(id(part) for part in module.modules() if part is not module)
    return layers


_OTHER_LAYERS = (nn.modules.conv._ConvNd, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)


def _left_out(model: nn.Module) -> dict[str, int]:
    """Learned layers other than sites, by class: 1-D, 3-D and transposed convolutions, recurrent layers, ..."""
    kinds = Counter(
        type(module).__name__
        for module in model.modules()
        # transformers' Conv1D is a linear layer that holds its weight the other way round.
        if (isinstance(module, _OTHER_LAYERS) or type(module).__name__ == "Conv1D") and kind_of(module) is None
    )
    return dict(kinds.most_common())


def _sites(model: nn.Module, flow: Flow, inputs: Inputs) -> tuple[Site, ...]:
    names: dict[int, list[str]] = {}
    by_name: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        by_name[name] = module
    roles = find_roles(flow)
    obstacles, padded = find_obstacles(model, flow)
    cautions = find_cautions(model, flow, inputs, obstacles)
    found: list[Site] = []
    for name, module in model.named_modules():
        seen: dict[str, Any]
        scripted = _scripted_kind(module)
        if name in flow.layers:
            seen = _seen(flow, name, *roles[name]) | {
                "obstacle": obstacles.get(name),
                "caution": cautions.get(name),
                "pads_same": name in padded,
            }
        elif scripted is not None:
            seen = _SCRIPTED | {"role": "spatial" if scripted.convolves else "linear"}
        else:
            continue
        parent = by_name[name.rpartition(".")[0]] if name else None
        found.append(
            Site(
                name=name,
                aliases=tuple(names[id(module)][1:]),
                layer_class=str(getattr(module, "original_name", type(module).__name__)),
                parent_class=type(parent).__name__ if parent is not None else "",
                **_geometry(scripted or known_kind(module), module),
                **seen,
            )
        )
    return tuple(found)


_SCRIPTED = {"obstacle": "it is inside a torch.jit.ScriptModule, which is compiled; convert before scripting"}


def _scripted_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a layer that was scripted or traced, which torch's classes do not tell."""
    if not isinstance(module, torch.jit.ScriptModule):
        return None
    return next((kind for kind in KINDS if module.original_name == kind.plain.__name__), None)


def _seen(flow: Flow, name: str, role: Role, ffn: str | None) -> dict[str, Any]:
    """What the forward showed about one layer."""
    calls = flow.calls.get(name, [])
    shape = shape_of(layer_input(calls[0])) if calls else None
    layout = _layout(known_kind(flow.layers[name]), shape)
    return {
        "role": role,
        "ffn": ffn,
        "calls": len(calls),
        "input_shape": shape,
        "layout": layout,
        "multiply_adds": sum(_multiply_adds(flow, call) for call in calls) // flow.batch,
    }


def _multiply_adds(flow: Flow, call: fx.Node) -> int:
    """Of one call, over the whole batch: each output value is a sum over the inputs that one filter sees."""
    layer = flow.layer(call)
    _, *inputs = known_kind(layer).weight_shape(layer)
    return math.prod(shape_of(call) or (0,)) * math.prod(inputs)


def _geometry(kind: LayerKind, layer: Any) -> dict[str, Any]:
    if not hasattr(layer, kind.in_and_out[0]):  # a traced layer keeps its tensors and forgets the rest
        out_channels, in_channels, *kernel_size = layer.weight.shape
        geometry: dict[str, Any] = {"kernel_size": tuple(kernel_size)} if kernel_size else {}
    else:
        in_channels, out_channels = kind.channels(layer)
        geometry = kind.geometry(layer)
    return {"kind": kind.name, "in_channels": in_channels, "out_channels": out_channels} | geometry


def _layout(kind: LayerKind, shape: tuple[int, ...] | None) -> Layout | None:
    if shape is None:
        return None
    if kind.convolves:
        return "NCHW"
    if len(shape) <= 2:
        return "rows"
    return "tokens" if len(shape) == 3 else "NHWC"

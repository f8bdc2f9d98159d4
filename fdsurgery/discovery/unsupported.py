"""Why a layer cannot be replaced, in words for the person who wondered."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..operators.register import operator_of
from .computed_weight import HOLDS_ZEROS
from .effective import effective_layer
from .flow import Flow, Node, layer_input, shape_of
from .inputs import Inputs
from .kinds import LayerKind, known_kind
from .ops import LAYOUT
from .positions import positions_apart
from .values import caution_in_values, obstacle_in_values

MOST_WEIGHTS = 32
"""Of one layer for one sample of the model, such as one for each frame of a video."""

_TAKE_AFTER = {"to", "type_as", "view_as", "reshape_as", "expand_as"}


def find_obstacles(model: nn.Module, flow: Flow) -> tuple[dict[str, str], set[str]]:
    """The reason against replacing, for every layer that has one; and the others that pad as TensorFlow does.

    Args:
        model: the model whose forward `flow` shows; its layers have the names used there.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = _owners(model)
    readers = _readers(flow)
    functions = _functions_that_hold(model)
    found: dict[str, str] = {}
    padded: set[str] = set()
    for name, layer in flow.layers.items():
        reason = (
            _of_the_layer(name, layer)
            or _of_its_weights(name, layer, owners)
            or _read_past(readers.get(name), modules)
            or _of_its_calls(flow.calls.get(name, ()), layer)
            or functions.get(id(layer))
            or _of_its_input(flow, name)
            or _of_its_members(layer)
            or _of_its_values(layer)
        )
        if reason is None:
            effective = effective_layer(layer)
            if isinstance(effective, str):
                reason = effective
            elif effective.pads_same:
                padded.add(name)
        if reason is not None:
            found[name] = reason
    return found, padded


def find_cautions(model: nn.Module, flow: Flow, inputs: Inputs, obstacles: Mapping[str, str]) -> dict[str, str]:
    """For every layer that has one, the reason for which a dynamic layer in its place would change the model's meaning.

    Args:
        model: the model whose forward `flow` shows; its layers have the names used there.
        flow: one forward of the model.
        inputs: what it was called with.
        obstacles: what `find_obstacles` found.
    """
    masked = {name: f"{name!r} {HOLDS_ZEROS}" for name, reason in obstacles.items() if HOLDS_ZEROS in reason}
    with torch.device("cpu"):  # whatever the caller's default is: masks are computed
        apart = positions_apart(model, flow, inputs, masked)
    found: dict[str, str] = {}
    for name, layer in flow.layers.items():
        weight = layer._parameters.get("weight")
        reason = apart.get(name) or _packed(flow, name) or (None if weight is None else caution_in_values(weight))
        if reason:
            found[name] = reason
    return found


def _packed(flow: Flow, name: str) -> str | None:
    """Several samples in one entry of the first axis, which is given one weight for all."""
    calls = flow.calls.get(name, [])
    sure = max(known_kind(flow.layers[name]).sample_axes, 2)  # two axes may be tokens of one sample
    for call in calls:
        shape = shape_of(layer_input(call)) or ()
        first = shape[0] if len(shape) > sure else flow.batch
        # Samples that are taken one after the other have a call each.
        if first * len(calls) < flow.batch and layer_input(call) in flow.from_input:
            return (
                f"its input {shape} holds a batch of {flow.batch} in {first}: samples packed together would be given "
                "one weight, made from all of them"
            )
    return None


def _of_the_layer(name: str, layer: nn.Module) -> str | None:
    if not name:
        return "it is the whole model; put it into a module, and that module can be converted"
    if operator_of(layer) is not None:
        return "it is dynamic already"
    if "forward" in vars(layer) and "_hf_hook" not in vars(layer):
        return "its forward was replaced on this very module, and would be lost with it"
    return None


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Where each parameter is held, by its `_place`: by modules, and by lists and the like that they keep."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_place(parameter), []).append(prefix + key)
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                for parameter in _held(value, nn.Parameter):
                    owners.setdefault(_place(parameter), []).append(prefix + key)
    return owners


def _place(parameter: Tensor) -> int:
    """The same for parameters that are one object, or that share their memory."""
    try:
        memory = parameter.data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
        memory = 0
    return memory or -id(parameter)


def _held(value: Any, kind: type | tuple[type, ...], depth: int = 4) -> Iterator[Any]:
    """What of a kind is in a value, or in the containers that it consists of."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple, set, frozenset, deque, Mapping)) and depth:
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _held(entry, kind, depth - 1)


def _of_its_weights(name: str, layer: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    weight = layer._parameters.get("weight")
    if parametrize.is_parametrized(layer, "weight"):
        # What it is computed from. To read the weight itself is to compute it, which may draw numbers or keep count.
        weight = next(layer.parametrizations["weight"].parameters())  # type: ignore[operator, union-attr, index]
    if weight is None:
        return "its weight is no parameter but computed before each call, as by weight norm, spectral norm or pruning"
    if not weight.is_floating_point():
        return f"its weight is not floating point but {weight.dtype}; dequantise the model first"
    if type(weight.data) is not Tensor or type(weight) is not nn.Parameter:
        kind = type(weight) if type(weight.data) is Tensor else type(weight.data)
        return f"its weight is a {kind.__name__}, not a plain {'parameter' if kind is type(weight) else 'tensor'}"
    for parameter in layer.parameters():
        others = [other for other in owners.get(_place(parameter), ()) if not other.startswith(name + ".")]
        if others:
            return f"it shares a parameter with {others[0]!r}; the two would drift apart"
    if any(len(owners.get(_place(parameter), ())) > 1 for parameter in layer.parameters()):
        return "it holds a parameter under two names; the two would drift apart"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has hooks, which would wait for gradients that no longer come"
    tensors = [key for key, value in vars(weight).items() if any(held.dim() for held in _held(value, Tensor))]
    if tensors:
        return f"its weight carries a tensor {tensors[0]!r} of others, which would not fit its spectrum"
    return None


_USUAL_MEMBERS = frozenset(
    "__init__ __module__ __doc__ __qualname__ __annotations__ __annotate_func__ __annotations_cache__ __constants__ "
    "__firstlineno__ __static_attributes__ __parameters__ __orig_bases__ __repr__ __weakref__ __dict__ __slots__ "
    "forward _conv_forward reset_parameters extra_repr _get_name __abstractmethods__ _abc_impl".split()
)


def _of_its_members(layer: nn.Module) -> str | None:
    """Methods of its own class, or put onto the layer, which others may call and a dynamic layer would not have."""
    base = known_kind(layer).plain
    name = type(layer).__name__
    for kind in type(layer).__mro__[: type(layer).__mro__.index(base)]:
        if parametrize.is_parametrized(layer) and kind is type(layer):
            continue  # what torch makes for the occasion
        own = sorted(set(vars(kind)) - _USUAL_MEMBERS)
        if own:
            return f"its class {name} has {own[0]!r} of its own, which a dynamic layer would not have"
    arguments = list(inspect.signature(type(layer).forward).parameters.values())[2:]
    if arguments:
        return f"its forward takes {arguments[0].name!r} besides the input"
    for key, value in vars(layer).items():
        if getattr(value, "__self__", None) is layer and key not in ("forward", "_old_forward"):
            return f"a method {key!r} was put on this very layer, and would go on with its old weight"
    return None


def _functions_that_hold(model: nn.Module) -> dict[int, str]:
    """For layers, by id, that functions kept by the model hold for themselves, where a swap does not reach, the reason.

    Closures, partial functions and bound methods; not the forward that stands on a module.
    """
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("forward", "_old_forward", "_parameters", "_buffers", "_modules"):
                continue
            for function in _held(value, _FUNCTIONS):
                for layer in _held(_closed_over(function), nn.Module):
                    if layer is not module or isinstance(function, FunctionType):
                        where = f"{name}.{key}" if name else key
                        found.setdefault(id(layer), f"a function that the model keeps ({where!r}) holds it for itself")
    return found


_FUNCTIONS = (FunctionType, MethodType, functools.partial)


def _closed_over(function: Any) -> list[Any]:
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values()]
    if isinstance(function, MethodType):
        return [function.__self__]
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return held


def _of_its_values(layer: nn.Module) -> str | None:
    weight = layer._parameters.get("weight")
    return None if weight is None else obstacle_in_values(weight)


def _of_its_calls(calls: Sequence[Node], layer: nn.Module) -> str | None:
    for call in calls:
        if "foreign" in call.meta:
            return str(call.meta["foreign"])
        given = [*call.args[1:], *(value for key, value in call.kwargs.items() if key != "input")]
        if given:
            name = next((key for key in call.kwargs if key != "input"), "")
            return f"its forward is called with {f'the argument {name!r}' if name else 'more'} besides the input"
    return None


def _readers(flow: Flow) -> dict[str, str]:
    """Layers whose parameters are read other than by calling them, with the module whose forward does so."""
    readers: dict[str, str] = {}
    holders = {id(parameter): name for name, layer in flow.layers.items() for parameter in layer.parameters()}
    for node in flow.nodes:
        owner = str(node.target).rpartition(".")[0] if node.op == "get_attr" else ""
        owner = holders.get(id(node.meta.get("value")), owner)  # by code that holds the layer, or its weight, itself
        users = [user for user in node.users if _reads_values(flow, user, node)] if owner in flow.layers else []
        if users:
            readers.setdefault(owner, users[0].meta.get("fqn", ""))
    return readers


def _reads_values(flow: Flow, user: Node, weight: Node) -> bool:
    """False where only dtype, device or shape of the weight matter, which a new layer's weight has too."""
    op = flow.op[user]
    if op.endswith("_like") or op.startswith("new_") or (op in LAYOUT and not user.users):
        return False
    return op not in _TAKE_AFTER or user.all_input_nodes[0] is weight


def _read_past(reader: str | None, modules: Mapping[str, nn.Module]) -> str | None:
    if reader is None:
        return None
    kind = type(modules[reader]).__name__ if reader in modules else "the model"
    return f"its weight is read past the layer by {reader or 'the model'!r} ({kind})"


def _of_its_input(flow: Flow, name: str) -> str | None:
    calls = flow.calls.get(name)
    if not calls:
        return "the model's forward never calls it"
    inputs = [layer_input(call) for call in calls]
    kind = known_kind(flow.layers[name])
    if kind.convolves and all(kind.positions(shape_of(given) or (0,)) == 1 for given in inputs):
        return "its input is one pixel: it costs nothing and offers nothing to adapt to"
    if not any(given in flow.from_input for given in inputs):
        return "its input does not depend on the model's input, so there is nothing to adapt to"
    return _of_its_axes([shape_of(given) or () for given in inputs], flow.batch, kind)


def _of_its_axes(shapes: list[tuple[int, ...]], batch: int, kind: LayerKind) -> str | None:
    """Why the first axis of a layer's input is not that of the samples, each of which is given a weight of its own."""
    for shape in shapes:
        if not kind.convolves and len(shape) > 2 and shape[1] == batch != shape[0]:  # queries of Mask2Former
            return f"its input {shape} has positions first and samples second; a weight would be one position's"
        weights = shape[0] // batch if len(shape) > kind.sample_axes else 0
        if weights > MOST_WEIGHTS:  # time in place of space as in VideoPrism, pixels of a patch as in TNT, boxes
            return f"its batch axis holds {weights} parts of every sample, and each would be given a weight of its own"
    return None

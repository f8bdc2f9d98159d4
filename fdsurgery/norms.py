"""Batch norms behind dynamic layers, folded into them: exact, for a factor of a filter commutes with its modulation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .discovery import observe
from .discovery.flow import Flow, Node, shape_of
from .discovery.kinds import known_kind
from .discovery.shadow import has_hooks, same_random_numbers
from .errors import UnsupportedModelError
from .operators import Operator, made_layers
from .rewrite.check_model import refuse_unsupported
from .rewrite.folded import Folded, is_norm
from .rewrite.tree import swapped
from .saving.description import describe


def fuse_norms(model: nn.Module, *, example_inputs: Any = None) -> nn.Module:
    """Fold each norm that follows a dynamic layer into that layer, for inference. The outputs do not change.

    In evaluation mode a batch norm multiplies each channel by a constant and adds another. So does the layer from then
    on (`scale_filters`), whatever its modulation is, and something that does nothing stands in the norm's place; what
    timm's norms do besides, dropout and activation, stays. What torch's own `fuse_conv_bn_eval`, `model.fuse()` and
    the like would do to the neutral weight alone is thereby done right.

    A norm is folded if it computes a constant scale and shift of each channel from running statistics (`BatchNorm`,
    `SyncBatchNorm`, the frozen norms of torchvision, timm and transformers), and if one observed forward shows that it
    reads what a dynamic layer gives, that nothing else reads it, and that it reads nothing else. Layers and norms with
    hooks are left as they are: a hook may read what lies between the two.

    Args:
        model: converted and in evaluation mode; changed in place, all or nothing.
        example_inputs: as for `fdsurgery.plan`: needed only where they cannot be told from the model.

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: the model is in training mode, has no dynamic layers or no values, was prepared for
            inference already, or is wrapped, compiled, quantised or scripted.
        DiscoveryError: the model could not be observed.

    Examples:
        >>> from torch import nn
        >>> import fdsurgery
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
        >>> model = fdsurgery.convert(model).eval()
        >>> any(isinstance(module, nn.BatchNorm2d) for module in fdsurgery.fuse_norms(model).modules())
        False
    """
    refuse_unsupported(model)
    _refuse_unready(model)
    folds = _folds(model, example_inputs)
    training = [fold.norm_name for fold in folds if fold.norm.training or fold.layer.training]
    if training:
        raise UnsupportedModelError(
            f"{training[0]!r} or the layer before it is in training mode, where it computes statistics of each batch; "
            "call model.eval() first"
        )
    kept = [(fold.layer, dict(fold.layer._parameters), dict(fold.layer._buffers)) for fold in folds]
    try:
        with swapped(model, {fold.norm: Folded(fold.norm) for fold in folds}):
            for fold in folds:
                fold.operator.scale_filters(fold.layer, fold.scale, fold.shift)
    except BaseException:
        for layer, parameters, buffers in kept:
            layer._parameters, layer._buffers = parameters, buffers
        raise
    describe(model)
    return model


def _refuse_unready(model: nn.Module) -> None:
    made = made_layers(model)
    if not made:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no dynamic layers: convert it first, fdsurgery.convert(model)"
        )
    if model.training:
        raise UnsupportedModelError(
            "norms are folded for inference, and this model is in training mode, where they compute statistics of each "
            "batch; call model.eval() first"
        )
    if any(operator.is_prepared(layer) for layer, operator in made.values()):
        raise UnsupportedModelError("this model was prepared for inference already, and its norms are folded")
    for name, (layer, _) in made.items():
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise UnsupportedModelError(f"{name!r} is on the meta device and has no values; load the weights first")


@dataclass(frozen=True)
class _Fold:
    """A norm, and the layer that it goes into."""

    layer: nn.Module
    operator: Operator
    norm: nn.Module
    norm_name: str
    scale: Tensor
    """`(C_out,)`, float64."""
    shift: Tensor
    """`(C_out,)`, float64."""


def _folds(model: nn.Module, example_inputs: Any) -> list[_Fold]:
    modules = dict(model.named_modules())
    norms = {name: module for name, module in modules.items() if is_norm(module)}
    made = made_layers(model)
    layers = {name: layer for name, (layer, operator) in made.items() if operator.folds_norms}
    if not norms:
        return []
    flow = Flow(observe(model, example_inputs).graph, layers)
    seen = _Norms.of(flow, norms)
    found = []
    with same_random_numbers():
        for name, layer in layers.items():
            norm_name = _only_reader(flow, seen, name)
            if norm_name is None or _is_watched(layer) or _is_watched(norms[norm_name]):
                continue
            constants = _constants(norms[norm_name], layer)
            if constants is not None:
                found.append(_Fold(layer, made[name].operator, norms[norm_name], norm_name, *constants))
    return found


def _is_watched(module: nn.Module) -> bool:
    """True if somebody besides the model sees what the module reads or gives."""
    return has_hooks(module) or "forward" in vars(module)


# Which norm reads a layer


@dataclass(frozen=True)
class _Norms:
    """The norms in a graph."""

    around: dict[Node, str]
    """The norm whose forward, or that of a part of it, made a node."""
    reads: dict[str, set[Node]]
    """The values that a norm reads from outside, but for its own tensors."""

    @staticmethod
    def of(flow: Flow, norms: Iterable[str]) -> _Norms:
        names, around = set(norms), {}
        reads: dict[str, set[Node]] = {}
        for node in flow.nodes:
            fqn = str(node.meta.get("fqn", ""))
            while fqn and fqn not in names:
                fqn = fqn.rpartition(".")[0]
            if fqn:
                around[node] = fqn
        for node, norm in around.items():
            outside = {one for one in node.all_input_nodes if around.get(one) != norm and one.op != "get_attr"}
            reads.setdefault(norm, set()).update(outside)
        return _Norms(around, reads)


def _only_reader(flow: Flow, norms: _Norms, name: str) -> str | None:
    """The norm that reads all that a layer gives, if nothing else reads it and the norm reads nothing else."""
    values: set[Node] = set()
    readers: set[str | None] = set()
    for call in flow.calls.get(name, ()):
        for value, reader in _readings(call, flow, norms):
            values.add(value)
            readers.add(norms.around.get(reader) if _has_channels(value, flow.layers[name]) else None)
    if len(readers) != 1:
        return None
    (found,) = readers
    return found if found is not None and norms.reads[found] <= values else None


def _readings(value: Node, flow: Flow, norms: _Norms) -> Iterator[tuple[Node, Node]]:
    """Who reads the values of a node, and as which node: the rows of a linear layer may be laid out anew in between."""
    for reader in value.users:
        op = flow.op[reader]
        if op in ("reshape_as", "view_as", "expand_as") and reader.all_input_nodes[0] is not value:
            continue  # only its shape is read
        before, after = shape_of(value) or (), shape_of(reader) or ()
        rows = op in ("flatten", "reshape", "view") and reader not in norms.around
        if rows and before[-1:] == after[-1:]:
            yield from _readings(reader, flow, norms)
        else:
            yield value, reader


def _has_channels(value: Node, layer: nn.Module) -> bool:
    """True if the second axis of a value is that of a layer's filters."""
    shape, kind = shape_of(value) or (), known_kind(layer)
    if kind.convolves:
        return len(shape) == 1 + kind.sample_axes and value.op == "call_module"
    _, features = kind.channels(layer)
    return len(shape) == 2 and shape[1] == features  # of three axes a norm would take positions for channels


# What a norm computes


def _constants(norm: Any, layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The scale and shift of each channel in evaluation mode; None for a norm that does anything else.

    What a class computes is tried, so that none need be known by name.
    """
    twin = copy.deepcopy(norm).to("cpu", torch.float64).eval()
    variance, mean = twin.running_var, twin.running_mean
    weight, bias = (getattr(twin, name, None) for name in ("weight", "bias"))
    with torch.no_grad():
        scale = torch.rsqrt(variance + getattr(twin, "eps", 1e-5))
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        kind = known_kind(layer)
        x = torch.randn(3, len(mean), *range(1 + kind.axes, 1, -1), dtype=torch.float64, device="cpu")
        try:
            expected = Folded(twin)(x * kind.along_outputs(scale) + kind.along_outputs(shift))
            same = torch.allclose(twin(x), expected, rtol=1e-9, atol=1e-9)
        except Exception:  # a norm of other inputs
            return None
    return (scale, shift) if same and len(scale) == len(layer.weight) else None  # type: ignore[arg-type]

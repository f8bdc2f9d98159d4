"""Each swapped layer beside the one that it replaced: both are given the very same input, in one forward."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..discovery.kinds import known_kind
from ..errors import SurgeryError
from ..inference import Replayed, without_graphs
from ..operators import operator_of
from ..rewrite.graph import modules_from_calls
from .error import TOLERANCE, relative_error, tolerance_of
from .verdict import LayerVerification


@dataclass
class Comparison:
    """A layer of one model next to the layer of that name in another, over the calls of one forward."""

    fqn: str
    layer: nn.Module
    twin: nn.Module | None
    """None if there is none, or none that should give the same."""
    calls: int = 0
    error: float = 0.0
    signal: float = 0.0
    """How far an output shows the weight, in the call that shows most: 0 for none, 1 for all of it."""
    tolerance: float = TOLERANCE

    def measured(self, tolerance: float, influence: float, reaches_output: bool) -> LayerVerification:
        """What the calls have shown, together with what the layer means for the outputs."""
        unseen = None
        if not self.calls:
            unseen = "these inputs never lead to a call of it"
        elif self.twin is None and not reaches_output:
            unseen = "the model before has no layer of this name that should give the same"
        elif self.twin is not None and self.signal <= tolerance:
            unseen = "it gets nothing but zeros, or so little that only its bias shows"
        error = None if unseen or self.twin is None else self.error
        return LayerVerification(self.fqn, error, tolerance, self.calls, influence, reaches_output, unseen)


def comparisons_of(before: nn.Module, after: nn.Module) -> list[Comparison]:
    """The layers that are dynamic in either model."""
    twins = {
        fqn.replace("_orig_mod.", ""): layer
        for fqn, layer in _with_layers(before).named_modules(remove_duplicate=False)
    }
    found = []
    for fqn, layer in after.named_modules():
        fqn = fqn.replace("_orig_mod.", "")
        twin = twins.get(fqn)
        if any(one is not None and operator_of(one) is not None for one in (layer, twin)):
            # With a norm folded into it, a layer gives what the norm gave.
            folded = [getattr(one, "filter_scale", None) is not None for one in (layer, twin)]
            found.append(Comparison(fqn, layer, twin if folded[0] == folded[1] else None))
    return found


def skips_hooks(model: nn.Module) -> bool:
    """True for what was compiled or recorded before, and would not call hooks that are new."""
    parts = list(model.modules())
    return isinstance(model.forward, Replayed) or any(
        part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in parts
    )


@contextmanager
def layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Nothing runs compiled or recorded, so that hooks see every layer."""
    compiled = "torch._dynamo" in sys.modules
    with without_graphs(model), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def _with_layers(model: nn.Module) -> nn.Module:
    """The model; of a graph whose layers are functional calls, a copy in which they are layers."""
    if not isinstance(model, fx.GraphModule):
        return model
    try:
        return modules_from_calls(copy.deepcopy(model))
    except SurgeryError:
        return model


Hook = Callable[[Comparison, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]


@contextmanager
def hooked(comparisons: Sequence[Comparison], hook: Hook) -> Iterator[None]:
    """See, and perhaps replace, what each layer gives, before hooks of others do."""

    def bound(one: Comparison) -> Callable[..., Tensor | None]:
        return lambda _, args, kwargs, output: hook(one, args, kwargs, output)

    handles = [one.layer.register_forward_hook(bound(one), prepend=True, with_kwargs=True) for one in comparisons]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def compare(one: Comparison, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
    """Measure one call of a layer: give its twin the same input, and keep the largest error."""
    one.calls += 1
    if one.twin is None:
        return
    try:
        expected = one.twin.forward(*args, **kwargs)  # its hooks would change the input, or the output, once more
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # of shapes or dtypes that it does not take
        one.error = one.signal = float("inf")
        return
    one.tolerance = max(one.tolerance, tolerance_of(output), tolerance_of(expected))
    one.error = max(one.error, relative_error(output, expected))
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if any(bool(value.any()) for value in given):
        one.signal = max(one.signal, _signal(one.twin, expected))


def _signal(layer: nn.Module, output: Tensor) -> float:
    """The share of an output that is not bias. All of it if there is nothing else: a weight of zeros gives that."""
    bias: Any = getattr(layer, "bias", None)
    if bias is None or not output.numel():
        return 1.0
    return relative_error(known_kind(layer).along_outputs(bias).expand_as(output), output) or 1.0

"""Whether two models are of the same architecture: module by module, and by one forward without memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .discovery.inputs import guesses
from .discovery.kinds import kind_of
from .discovery.shadow import twin_of
from .operators import made_layers, operator_of
from .rewrite.tree import swapped

_SWITCHES = {
    "self",
    "training",
    "device",
    "dtype",
    "inplace",
    "grad_checkpointing",
    "use_checkpoint",
    "memory_efficient",
}
"""Constructor arguments that change how a module computes, and not what."""
_GUESSES = 3
"""Inputs that are tried, so that what takes none of them costs no more than that."""
_UNKNOWN = object()


def first_difference(model: nn.Module, rebuilt: nn.Module) -> str | None:
    """What sets a converted model apart from the plain one that its source builds, in words; None if nothing does.

    Args:
        model: converted; only read. Of its dynamic layers the geometry is compared with the plain layer's.
        rebuilt: plain, best on meta. It is changed: use it for nothing else.
    """
    dynamic = set(made_layers(model))
    return (
        _of_modules(model, rebuilt, dynamic)
        or _of_tensors(model, rebuilt, dynamic)
        or _of_forwards(model, rebuilt, dynamic)
    )


def _of_modules(model: nn.Module, rebuilt: nn.Module, dynamic: set[str]) -> str | None:
    ours = {fqn: module for fqn, module in model.named_modules() if not _is_inside(fqn, dynamic)}
    theirs = dict(rebuilt.named_modules())
    for fqn, module in ours.items():
        where = repr(fqn) if fqn else "the model itself"
        if fqn not in theirs:
            return f"{where}, a {type(module).__name__}, is not in that one"
        other = theirs[fqn]
        if fqn in dynamic:
            if operator_of(other) is None and kind_of(other) is None:
                return f"{where} is a {type(other).__name__} there"
        elif (kind := _name_of(type(module))) != (kind_there := _name_of(type(other))):
            return f"{where} is a {kind}, and a {kind_there} there"
        kinds: list[Any] = [type(module), type(other)]
        for name in sorted(frozenset.intersection(*map(_parameters, kinds))):
            mine, its = (_comparable(vars(one).get(name, _UNKNOWN)) for one in (module, other))
            if _UNKNOWN not in (mine, its) and mine != its:
                return f"{where} has {name}={_shown(mine)}, and {_shown(its)} there"
    for fqn, other in theirs.items():
        if fqn not in ours and not _is_inside(fqn, dynamic):
            return f"that one has {fqn!r}, a {type(other).__name__}"
    return None


def _of_tensors(model: nn.Module, rebuilt: nn.Module, dynamic: set[str]) -> str | None:
    ours, theirs = (
        {name: tuple(value.shape) for name, value in one.state_dict().items() if not _is_inside(name, dynamic)}
        for one in (model, rebuilt)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return f"the tensor {name!r} has the shape {ours.get(name, 'none')}, and {theirs.get(name, 'none')} there"
    return None


def _of_forwards(model: nn.Module, rebuilt: nn.Module, dynamic: set[str]) -> str | None:
    """By the operations of one forward on meta tensors; None where the model does not run there."""
    try:
        twin, _ = twin_of(model, meta=True)
        other, _ = twin_of(rebuilt, meta=True)
        # The same plain layers in both, for one that prepares its weight has operations of its own.
        plain = {fqn: _plain(layer) for fqn, layer in twin.named_modules() if fqn in dynamic}
        for one in (twin, other):
            layers = dict(one.named_modules())
            with swapped(one, {layers[fqn]: layer for fqn, layer in plain.items()}):
                pass
        dtypes = {name: tensor.dtype for name, tensor in (*twin.named_parameters(), *twin.named_buffers())}
        for name, tensor in (*other.named_parameters(), *other.named_buffers()):
            tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
        inputs = list(islice(guesses(twin), _GUESSES))
    except Exception:
        return None
    for given in inputs:
        try:
            ours = _operations(twin, given)
        except Exception:
            continue
        try:
            theirs = _operations(other, given)
        except Exception as error:
            return f"it runs on {given}, and that one does not: {type(error).__name__}"
        for at, (mine, its) in enumerate(zip(ours, theirs, strict=False)):
            if mine != its:
                return f"on {given} it computes {_step(mine)} as step {at + 1}, and that one {_step(its)}"
        if len(ours) != len(theirs):
            return f"on {given} it takes {len(ours)} steps, and that one {len(theirs)}"
        return None
    return None


def _plain(layer: nn.Module) -> nn.Module:
    operator = operator_of(layer)
    assert operator is not None
    return operator.restore(layer)


Step = tuple[str, tuple[tuple[int, ...], ...]]


class _Log(TorchFunctionMode):
    """Notes the name of every operation and the shapes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(leaf.shape) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        if shapes:
            self.steps.append((getattr(func, "__name__", str(func)), shapes))
        return result


@torch.no_grad()
def _operations(model: nn.Module, inputs: Any) -> list[Step]:
    with _Log() as log:
        model(*inputs.args, **inputs.kwargs)
    return log.steps


def _step(step: Step) -> str:
    return f"{step[0]} of shape {', '.join('x'.join(map(str, shape)) for shape in step[1])}"


def _is_inside(name: str, dynamic: Iterable[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in dynamic for end in range(1, len(parts)))


@lru_cache(maxsize=4096)
def _parameters(kind: Any) -> frozenset[str]:
    """What the constructors of a class and its bases take."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base not in (nn.Module, object) and "__init__" in vars(base):
            try:
                found |= set(inspect.signature(base.__init__).parameters)
            except (TypeError, ValueError):
                continue
    return frozenset(found - _SWITCHES)


def _comparable(value: Any) -> Any:
    """A constant that can be compared; `_UNKNOWN` for all else."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return "nan" if value != value else value
    if isinstance(value, (tuple, list)):
        entries = tuple(map(_comparable, value))
        return _UNKNOWN if _UNKNOWN in entries else entries
    if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return _name_of(value)
    return _UNKNOWN


def _name_of(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

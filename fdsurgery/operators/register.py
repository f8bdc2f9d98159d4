"""The operators that are known, and layers made by them.

A package of its own registers operators by an entry point of the group `fdsurgery.operators`, a program by
`fdsurgery.register_operator`.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ..errors import RecipeError, SurgeryError, near_misses
from .base import Operator

OperatorT = TypeVar("OperatorT", bound=Operator)

GROUP = "fdsurgery.operators"
"""Entry points of packages that bring operators."""
_SHIPPED = (
    "fdsurgery.operators.fdconv:FDConvOperator",
    "fdsurgery.operators.condconv:CondConvOperator",
    "fdsurgery.operators.dyconv:DyConvOperator",
    "fdsurgery.operators.odconv:ODConvOperator",
    "fdsurgery.operators.fadc:FADCOperator",
    "fdsurgery.operators.dcd:DCDOperator",
    "fdsurgery.operators.kernel_warehouse:KernelWarehouseOperator",
)
_WORDS = ("all", "dynamic", "modulation")
"""Names that `fdsurgery.freeze` has another use for."""

_operators: dict[str, Operator] = {}
_loading = threading.RLock()
_is_begun = _is_loaded = False


def register_operator(operator: OperatorT) -> OperatorT:
    """Make an operator known, so that recipes, plans and saved models may name it.

    Args:
        operator: an instance of a subclass of `Operator`. Registering one of the same class again takes its place.

    Returns:
        The same object.

    Raises:
        SurgeryError: it is no operator, its name is no name, or another operator has it.

    Examples:
        >>> import fdsurgery
        >>> class Mine(fdsurgery.Operator):
        ...     name = "fdconv"
        >>> fdsurgery.register_operator(Mine())
        Traceback (most recent call last):
            ...
        fdsurgery.errors.SurgeryError: an operator called 'fdconv' is registered already, by fdsurgery.operators.fdconv
    """
    if not isinstance(operator, Operator):
        what = f"the class {operator.__name__}" if isinstance(operator, type) else f"a {type(operator).__name__}"
        raise SurgeryError(f"an operator is an instance of a subclass of fdsurgery.Operator, not {what}")
    name = getattr(operator, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise SurgeryError(f"{type(operator).__name__}.name must be a word such as 'fdconv', not {name!r}")
    if name in _WORDS:
        raise SurgeryError(f"{name!r} is no name for an operator: fdsurgery.freeze gives the word another meaning")
    _load_all()
    _add(operator)
    return operator


def operators() -> dict[str, Operator]:
    """The operators that are known, by their names."""
    _load_all()
    return dict(_operators)


def get_operator(name: str) -> Operator:
    """The operator of that name.

    Raises:
        RecipeError: there is none; with near misses.

    Examples:
        >>> import fdsurgery
        >>> fdsurgery.get_operator("condconv").settings({})
        {'experts': 8}
    """
    known = operators()
    if name not in known:
        raise RecipeError(
            f"no operator is called {name!r}; known: {', '.join(known)}{near_misses(name, known)}. Import the package "
            "that brings it, or see fdsurgery.register_operator"
        )
    return known[name]


def operator_of(layer: nn.Module) -> Operator | None:
    """The operator that made a layer; None for a layer that no operator made."""
    _load_all()
    return next((operator for operator in _operators.values() if operator.owns(layer)), None)


class Made(NamedTuple):
    """A layer in a model that an operator made."""

    layer: nn.Module
    operator: Operator


def made_layers(model: nn.Module) -> dict[str, Made]:
    """All that operators made in a model, by name; each once, by its first."""
    return {
        name: Made(layer, operator)
        for name, layer in model.named_modules()
        if (operator := operator_of(layer)) is not None
    }


def _add(operator: Operator) -> None:
    there = _operators.get(operator.name)
    if there is not None and _place(type(there)) != _place(type(operator)):
        raise SurgeryError(f"an operator called {operator.name!r} is registered already, by {type(there).__module__}")
    _operators[operator.name] = operator


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _load_all() -> None:
    """Ours, then those of installed packages, each once. One that cannot be loaded is told, and stops nobody."""
    global _is_begun, _is_loaded
    if _is_loaded:
        return
    with _loading:  # others wait; what is loaded here may ask, or register itself
        if not _is_begun:
            _is_begun = True
            _load_shipped_and_installed()
            _is_loaded = True


def _load_shipped_and_installed() -> None:
    for place in _SHIPPED:
        module, _, name = place.partition(":")
        _add(getattr(importlib.import_module(module), name)())
    for entry in entry_points(group=GROUP):
        try:
            _add_from(entry)
        except Exception as error:
            warnings.warn(
                f"the operator {entry.name!r} of {entry.value} cannot be used: {type(error).__name__}: {error}",
                stacklevel=3,
            )


def _add_from(entry: EntryPoint) -> None:
    found = entry.load()
    operator = found() if isinstance(found, type) else found
    if not isinstance(operator, Operator):
        raise TypeError(f"it is a {type(operator).__name__}, not an Operator")
    _add(operator)


# Layers that are made together


@dataclass(frozen=True)
class Wanted:
    """A layer that is to be made."""

    name: str
    """Of the plain layer, in its model."""
    layer: nn.Module
    """The plain layer."""
    operator: str
    settings: dict[str, Any]


class BuildError(Exception):
    """A dynamic layer could not be built; `__cause__` says why."""

    def __init__(self, name: str, cause: Exception) -> None:
        self.name = name
        """Of the layer, or of several."""
        super().__init__(f"{name}: {type(cause).__name__}: {cause}")


def build_layers(wanted: Iterable[Wanted]) -> dict[str, nn.Module]:
    """The dynamic layers of one model, by name.

    Raises:
        BuildError: one could not be made.
        RecipeError: there is no such operator.
    """
    by_operator: dict[str, list[Wanted]] = {}
    for one in wanted:
        by_operator.setdefault(one.operator, []).append(one)
    made: dict[str, nn.Module] = {}
    for name, group in by_operator.items():
        operator = get_operator(name)
        for part in [group] if operator.builds_together else [[one] for one in group]:
            names = [one.name for one in part]
            try:
                built = operator.build(names, [one.layer for one in part], [one.settings for one in part])
                made.update(zip(names, built, strict=True))
            except Exception as error:
                where = names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]!r} first"
                raise BuildError(where, error) from error
    return made

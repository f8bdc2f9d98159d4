"""What may be put in a site's place. One file an operator; `get_operator` finds it by the name recipes use."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from ..discovery.site import Site
from ..errors import RecipeError, near_misses
from .fdconv import FDConvOperator


class Operator(Protocol):
    """A dynamic layer that can stand for a plain one. Implementations hold no state."""

    name: str

    def settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """`values` completed with the defaults, as plain JSON types. Raises `RecipeError` for what is not a setting."""

    def saved_settings(self, values: dict[str, Any]) -> dict[str, Any]:
        """As `settings`, of what an earlier version may have saved, which means what it meant there."""

    def refusal(self, site: Site, settings: dict[str, Any]) -> str | None:
        """Why this operator cannot take the site, in words; None if it can."""

    def replace(self, layer: nn.Module, settings: dict[str, Any]) -> nn.Module:
        """A dynamic layer that computes what `layer` does, with its device, dtype, mode and `requires_grad`."""

    def owns(self, layer: nn.Module) -> bool:
        """True for the layers that `replace` makes."""

    def settings_of(self, layer: nn.Module) -> dict[str, Any]:
        """The settings a layer of this operator was made with."""

    def restore(self, layer: nn.Module) -> nn.Module:
        """The plain layer that a layer of this operator stands for at neutral modulation."""


OPERATORS: dict[str, Operator] = {operator.name: operator for operator in (FDConvOperator(),)}


def get_operator(name: str) -> Operator:
    """The operator of that name. Raises `RecipeError`, with near misses, if there is none."""
    if name not in OPERATORS:
        raise RecipeError(
            f"no operator is called {name!r}; known: {', '.join(OPERATORS)}{near_misses(name, OPERATORS)}"
        )
    return OPERATORS[name]


def operator_of(layer: nn.Module) -> Operator | None:
    """The operator that made a layer; None for a layer that no operator made."""
    return next((operator for operator in OPERATORS.values() if operator.owns(layer)), None)

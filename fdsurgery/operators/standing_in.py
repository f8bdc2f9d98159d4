"""A dynamic layer in the place of a plain one, and the plain one again: what is the same for every operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fdconv.weight_property import WithStaticWeight

from ..discovery.effective import effective_layer
from ..errors import RewriteError

_PLAIN_CLASS = "_plain_class"
"""Attribute of a layer in the place of one whose class was derived from `nn.Conv2d` or `nn.Linear`."""

Make = Callable[[Any, bool], WithStaticWeight]
"""Makes a dynamic layer of a plain one; told whether the plain one pads as TensorFlow does."""


def stand_in(layer: nn.Module, make: Make) -> WithStaticWeight:
    """What `make` makes of the plain layer that a layer amounts to; it remembers the layer's class.

    Raises:
        RewriteError: the layer amounts to no plain one.
    """
    effective = effective_layer(layer)
    if isinstance(effective, str):
        raise RewriteError(effective)
    new = make(effective.layer, effective.pads_same)
    weight = layer._parameters.get("weight")
    if weight is not None:  # what is known of it holds for what it is computed from: no decay, a learning rate
        vars(new._stored()).update(vars(weight))
    if effective.verbatim and type(layer) not in (nn.Conv2d, nn.Linear):
        vars(new)[_PLAIN_CLASS] = type(layer)
    return new


def stand_back(layer: WithStaticWeight, plain: nn.Module) -> nn.Module:
    """The plain layer that `layer` stood for, with what `stand_in` took over."""
    vars(plain.weight).update(vars(layer._stored()))
    plain.__class__ = vars(layer).get(_PLAIN_CLASS, type(plain))
    return plain

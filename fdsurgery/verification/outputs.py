"""What a model returns, for a comparison: in eval mode, with the same random numbers each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..discovery import Inputs


@torch.no_grad()
def outputs_of(model: nn.Module, arguments: Inputs) -> list[Tensor]:
    """As `run`, without gradients."""
    return run(model, arguments)


def run(model: nn.Module, arguments: Inputs) -> list[Tensor]:
    """The floating-point tensors that a model returns."""
    own = arguments.map(torch.clone)  # some models change their inputs in place
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some models draw at random even in eval mode
        outputs = model(*own.args, **own.kwargs)
    tensors = [leaf for leaf in _leaves(outputs) if isinstance(leaf, Tensor)]
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    return [tensor for tensor in real if tensor.is_floating_point()]


def _leaves(outputs: Any) -> Iterator[Any]:
    """What is in nested containers and dataclasses."""
    for leaf in pytree.tree_leaves(outputs):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from _leaves(getattr(leaf, field.name))
        else:
            yield leaf


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module is back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

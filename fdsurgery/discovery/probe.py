"""Positions and samples that must not see each other, found by trying: change a part of the input, see what changes.

The graph of a forward shows masks (`fdsurgery.discovery.positions`), but not what a loop, a crop, a mask made from
features or compiled code do to positions. Where it holds any of these, the model is run on real tensors, with some
positions of its input changed: if, all over the model, what changes lies on one side of them, the model keeps later
positions from earlier ones, and a mean over all positions would undo it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .flow import Flow, Node, layer_input, shape_of
from .hints import hint
from .inputs import Inputs
from .perturbation import kept_apart
from .record import record
from .site import Site

MOST_MULTIPLY_ADDS = 5 * 10**10
"""Of the layers in one forward of the example inputs: some seconds on one CPU core, and a probe runs up to ten."""


def probe(model: nn.Module, flow: Flow, inputs: Inputs, sites: Sequence[Site], hooks: bool = False) -> dict[str, str]:
    """For sites of which nothing is said so far, a caution found by trying, where there is reason to try.

    A probe that fails says nothing: the forward that failed is one of ours, which the model need not take.

    Args:
        model: the model whose forward `flow` shows.
        flow: one forward.
        inputs: what it was called with.
        sites: what is known of its layers.
        hooks: run copies of the hooks that hang on the model, as for `fdsurgery.discovery.record.record`.
    """
    open_sites = [site for site in sites if site.obstacle is None and site.caution is None]
    names = [site.name for site in open_sites if site.calls]
    found: dict[str, str] = {}
    if any(_may_be_packed(flow, site) for site in open_sites):
        with contextlib.suppress(Exception):
            found |= {
                name: told for name, told in packed_when_doubled(model, flow, inputs, hooks).items() if name in names
            }
    size = flow.batch * sum(site.multiply_adds for site in sites)
    tensors = [*model.parameters(), *model.buffers(), *(tensor for _, tensor in inputs.tensors())]
    runs = size <= MOST_MULTIPLY_ADDS and not any(tensor.is_meta for tensor in tensors)
    if names and runs and hint(flow, masks_read=any(site.caution for site in sites)):
        with contextlib.suppress(Exception):
            found = kept_apart(model, flow, inputs, names, hooks) | found
    return {name: reason for name, reason in found.items() if name in names}


def _may_be_packed(flow: Flow, site: Site) -> bool:
    """One sample alone does not show it, nor do entries of which each sample has no whole number."""
    return site.calls > 0 and (flow.batch == 1 or (site.input_shape or (0,))[0] % flow.batch > 0)


def packed_when_doubled(model: nn.Module, flow: Flow, inputs: Inputs, hooks: bool) -> dict[str, str]:
    """Layers whose input grows with the batch, but not in its first axis, with the reason in words.

    One sample alone does not show that samples are packed together: the model is recorded once more, on meta tensors,
    with twice as many.

    Args:
        model: the model whose forward `flow` shows.
        flow: one forward.
        inputs: what it was called with; every tensor with a first axis of `flow.batch` is doubled along it.
        hooks: as for `fdsurgery.discovery.record.record`.
    """

    def doubled(tensor: Tensor) -> Tensor:
        tensor = tensor.to("meta")
        return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == flow.batch else tensor

    twice = Flow(record(model, inputs.map(doubled), meta=True, hooks=hooks), flow.layers)
    found: dict[str, str] = {}
    for name, calls in flow.calls.items():
        pairs = zip(calls, twice.calls.get(name, ()), strict=False)
        if len(calls) == len(twice.calls.get(name, ())) and any(_grows_elsewhere(*pair) for pair in pairs):
            shape = shape_of(layer_input(calls[0]))
            found[name] = (
                f"the first axis of its input {shape} stays as it is when the batch is doubled: samples packed "
                "together would be given one weight, made from all of them"
            )
    return found


def _grows_elsewhere(call: Node, twice: Node) -> bool:
    before, after = (shape_of(layer_input(node)) or () for node in (call, twice))
    return len(before) > 1 and before[:1] == after[:1] and math.prod(after) > math.prod(before)

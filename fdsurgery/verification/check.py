"""The check that conversion changed nothing: layer by layer on the inputs that each really gets, and as a whole.

Agreement of the outputs alone may be worth nothing. Fresh networks end their blocks in norms of zero or layer scales
of 1e-6, and behind these any layer may be wrong. So every swapped layer is compared with the one that it replaced, on
the very same input, and it is measured whether the outputs would show a difference at all.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..discovery import Inputs
from ..wrappers import inner_of
from .error import TOLERANCE, largest_error, tolerance_of
from .influence import influences_of
from .layers import compare, comparisons_of, hooked, layer_by_layer, skips_hooks
from .outputs import evaluating, outputs_of
from .verdict import Verification


def verify(
    model_before: nn.Module, model_after: nn.Module, inputs: Any, tolerance: float | None = None
) -> Verification:
    """Compare two models in eval mode on the same inputs: every swapped layer by itself, and every output.

    In one forward of the converted model, the output of each dynamic layer is compared with that of the layer of the
    same name in `model_before`, given the very same input. Then it is measured how much each layer's output means for
    the model's: by a gradient, and for layers that seem to have no influence, with noise in place of their output.

    Args:
        model_before: a copy of the model from before the conversion (`copy.deepcopy(model)`). It may have dynamic
            layers too: those layers are compared that are dynamic in either model.
        model_after: the converted model. If it is wrapped, compiled or prepared for inference, its layers are compared
            in a forward of their own.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        tolerance: largest relative error that passes; by default 1e-5, in float16 4e-3 and in bfloat16 3e-2; in these
            `sqrt(layers) / 4` times that for the outputs of more than 16 layers.

    Returns:
        The measurement; its `ok` is the verdict, which is no where something could not be compared. Modes and random
        state are as before.

    Examples:
        >>> import copy, torch, fdsurgery
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> before = copy.deepcopy(model)
        >>> checked = fdsurgery.verify(before, fdsurgery.convert(model), torch.randn(2, 3, 16, 16))
        >>> print(checked)
        outputs unchanged: relative error ... over 1 tensor(s), tolerance 1e-05; 1 of 1 agree layer by layer, ...
        >>> assert checked.ok, checked
    """
    arguments = Inputs.of(inputs)
    before, after = inner_of(model_before), inner_of(model_after)
    with evaluating(model_before), evaluating(model_after):
        expected = outputs_of(model_before, arguments)
        comparisons = comparisons_of(before, after)
        with layer_by_layer(after), hooked(comparisons, compare):
            outputs = outputs_of(after, arguments)
        if after is not model_after or skips_hooks(after):
            outputs = outputs_of(model_after, arguments)
        allowed = [tolerance or one.tolerance for one in comparisons]
        limit = max([TOLERANCE, *allowed, *map(tolerance_of, expected), *map(tolerance_of, outputs)])
        if limit > TOLERANCE:  # roundings add up, as the root of their number: four units are those of 16 layers
            limit *= max(1.0, len(comparisons) ** 0.5 / 4)
        limit = tolerance or limit
        with layer_by_layer(after):
            influences = influences_of(after, arguments, comparisons, limit)
    layers = tuple(
        one.measured(allows, influence, influence > limit)
        for one, allows, influence in zip(comparisons, allowed, influences, strict=True)
    )
    return Verification(largest_error(outputs, expected), limit, len(expected), layers)

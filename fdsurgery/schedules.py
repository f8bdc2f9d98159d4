"""What some operators change as training goes on: temperatures of attention, and how fast a warehouse opens."""

from __future__ import annotations

from torch import nn

from .errors import FineTuningError
from .operators import made_layers


def schedule(model: nn.Module, step: int, steps: int) -> int:
    """Set the temperatures and the like of a model's dynamic layers to what they are at a step of training.

    A converted model needs none of it: all stand at the end of their schedule from the start. It is for training from
    scratch, or for leaving the pretrained function slowly. The values are buffers of the layers, saved with them.

    DY-Conv and ODConv: temperature `1 + 29*max(0, 1 - step/steps)`; the papers take `steps` as those of 10 epochs.
    KernelWarehouse: `tau = max(0, 1 - step/steps)`, there of 20 epochs.

    Args:
        model: a converted one.
        step: steps of the optimizer so far, 0 before the first.
        steps: after how many the schedule ends.

    Returns:
        The number of layers that have a schedule.

    Raises:
        FineTuningError: no layer of the model has a schedule, or the numbers make no sense.

    Examples:
        >>> import timm, fdsurgery
        >>> model = fdsurgery.convert(timm.create_model("test_resnet"), operator="odconv")
        >>> fdsurgery.schedule(model, step=0, steps=1000)
        9
    """
    if steps < 1 or step < 0:
        raise FineTuningError(f"a schedule goes from step 0 over 1 or more steps, not from {step} over {steps}")
    progress = min(1.0, step / steps)
    dynamic = made_layers(model).values()
    count = sum(operator.schedule(layer, progress) for layer, operator in dynamic)
    if count:
        return count
    if not dynamic:
        raise FineTuningError(
            f"{type(model).__name__} has no dynamic layers: convert it first, fdsurgery.convert(model)"
        )
    names = ", ".join(sorted({operator.name for _, operator in dynamic}))
    raise FineTuningError(f"none of the {len(dynamic)} dynamic layers ({names}) has a schedule: nothing is to be set")


def steps_of(fraction: float, steps: float) -> int:
    """After how many of all steps a schedule ends that takes a fraction of them."""
    if not 0 < fraction <= 1:
        raise FineTuningError(f"fraction must be above 0 and at most 1, not {fraction}")
    if steps == float("inf"):
        raise FineTuningError("training has no last step (max_steps=-1), so a fraction of it is none: set max_steps")
    return max(1, round(fraction * steps))

"""For transformers' `Trainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..schedules import schedule, steps_of


class ScheduleCallback(TrainerCallback):
    """Sets what dynamic layers change as training goes on, before every step: see `fdsurgery.schedule`.

    Args:
        fraction: of all steps, after which the schedule ends; the papers take 10 or 20 of 100 to 300 epochs.

    Raises:
        FineTuningError: no layer of the model has a schedule, or `fraction` is not above 0 and at most 1.

    Examples:
        >>> from fdsurgery.callbacks.trainer import ScheduleCallback
        >>> callback = ScheduleCallback(fraction=0.1)  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, fraction: float = 0.1) -> None:
        self.fraction = fraction
        steps_of(fraction, 1)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Called by the trainer."""
        schedule(model, state.global_step, steps_of(self.fraction, state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Called by the trainer, after the last step."""
        schedule(model, state.global_step, steps_of(self.fraction, state.max_steps))

"""For Lightning's `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:  # the package of the same classes by which they were installed for years
        from pytorch_lightning import Callback, LightningModule, Trainer

from ..schedules import schedule, steps_of


class ScheduleCallback(Callback):
    """Sets what dynamic layers change as training goes on, before every step: see `fdsurgery.schedule`.

    Args:
        fraction: of all steps, after which the schedule ends; the papers take 10 or 20 of 100 to 300 epochs.

    Raises:
        FineTuningError: no layer of the model has a schedule, or `fraction` is not above 0 and at most 1.
    """

    def __init__(self, fraction: float = 0.1) -> None:
        super().__init__()
        self.fraction = fraction
        steps_of(fraction, 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called by the trainer."""
        schedule(pl_module, trainer.global_step, steps_of(self.fraction, trainer.estimated_stepping_batches))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by the trainer, after the last step."""
        schedule(pl_module, trainer.global_step, steps_of(self.fraction, trainer.estimated_stepping_batches))

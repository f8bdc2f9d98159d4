"""Ultralytics as a library whose `YOLO(...)` wraps a network."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..base import Library

ENGINE = "ultralytics.engine.model"
TASKS = "ultralytics.nn.tasks"


class Ultralytics(Library):
    """Its wrapper stands for the network inside."""

    name = "ultralytics"
    hooks: ClassVar = {ENGINE: f"{__package__}.guards:guard_engine", TASKS: f"{__package__}.guards:guard_tasks"}

    def network(self, model: nn.Module) -> Any:
        """As `Library.network`; for an exported model it is a file's name."""
        return model.model if any(base.__module__ == ENGINE for base in type(model).__mro__) else None

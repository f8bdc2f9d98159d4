"""Checkpoints converted on disk: plain ones to dynamic ones, the authors' names to ours and back, shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import Checkpoint, load_tensors, open_checkpoint
from .matching import MisfitError, Problem
from .planning import CheckpointPlan, plan_checkpoint
from .whole import WholePlan, load_official_state_dict, official_state_dict
from .writing import OnBytes, carry_out

__all__ = [
    "Checkpoint",
    "CheckpointPlan",
    "MisfitError",
    "OnBytes",
    "Problem",
    "WholePlan",
    "carry_out",
    "convert_checkpoint",
    "load_official_state_dict",
    "load_tensors",
    "official_state_dict",
    "open_checkpoint",
    "plan_checkpoint",
]


def convert_checkpoint(source: str | Path, destination: str | Path, **options: Any) -> CheckpointPlan | WholePlan:
    """Plan and carry out the conversion of a checkpoint; see `plan_checkpoint` and `carry_out`."""
    plan = plan_checkpoint(source, destination, **options)
    carry_out(plan)
    return plan

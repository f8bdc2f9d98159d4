"""How long a call takes on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

RUNS = 10
"""Calls that are timed, after one that compiles."""


def milliseconds(call: Callable[[], Any]) -> float:
    """The shortest of a few runs; what is longer was held up by something else."""
    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in events)

"""Results of benches that can stop and go on: a file of JSON lines, one a training, and what tables say of them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def read(file: Path) -> list[dict[str, Any]]:
    """The lines so far; one that a killed run has cut short does not count."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def spread(values: list[float], *, signed: bool = False) -> str:
    """Mean and standard deviation."""
    shown = f"{mean(values):{'+' if signed else ''}.1f}"
    return f"{shown} ± {stdev(values):.1f}" if len(values) > 1 else shown

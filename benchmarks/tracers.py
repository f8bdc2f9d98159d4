"""Which tracer reaches which model, and whether they see the same sites.

    python -m benchmarks.tracers [--only TEXT] [--limit N] [--seconds S] [--output DIR]

The models of `benchmarks.zoo`, each in a process of its own: a recorded forward, then `torch.fx.symbolic_trace`, the
tracer of timm's feature extraction and `torch.export` through the same matcher. Resumable; `--again` starts anew.
Writes `tracers.jsonl` (a line a model) and `tracers.md` (the table). About an hour on one CPU core.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from datetime import date
from typing import Any

import torch

from . import zoo


def measure(spec: str) -> dict[str, Any]:
    """One row, in this process: for every tracer `same`, `other` (sites that differ) or `refuses`, and its seconds."""
    from fdsurgery import DiscoveryError
    from fdsurgery.discovery import observe
    from fdsurgery.discovery.trace import TRACERS, observe_by

    torch.set_num_threads(1)
    model = zoo.build(spec).eval()
    start = time.perf_counter()
    recorded = observe(model)
    row: dict[str, Any] = {"model": spec, "record": recorded.tracer, "sites": len(recorded.sites)}
    row["seconds"] = {"record": round(time.perf_counter() - start, 2)}
    for tracer in TRACERS:
        start = time.perf_counter()
        try:
            seen = observe_by(tracer, model, recorded.inputs)
        except DiscoveryError as error:
            row[tracer] = "refuses"
            row[f"{tracer}_reason"] = str(error).partition(": ")[2][:200]
        else:
            pairs = zip(recorded.sites, seen.sites, strict=True)
            differ = [a.name for a, b in pairs if replace(a, obstacle=None) != replace(b, obstacle=None)]
            row[tracer] = "other" if differ else "same"
            if differ:
                row[f"{tracer}_reason"] = f"{len(differ)} sites differ, {differ[0]} first"
        row["seconds"][tracer] = round(time.perf_counter() - start, 2)
    return row | {"status": "observed"}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: a summary by source, and the models that tracers see differently."""
    lines = [f"Measured on {date.today().isoformat()} by `python -m benchmarks.tracers`.", ""]
    lines += ["| source | models | recorded on meta | recorded on real tensors | fx | timm | export |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for library in ("timm", "transformers", "torchvision"):
        own = [row for row in rows if row["model"].startswith(library + ":")]
        recorded = Counter(row.get("record") for row in own)
        reached = [sum(row.get(tracer) in ("same", "other") for row in own) for tracer in ("fx", "timm", "export")]
        lines += [f"| {library} | {len(own)} | {recorded['meta']} | {recorded['real']} | "]
        lines[-1] += " | ".join(map(str, reached)) + " |"
    others = [(row, tracer) for row in rows for tracer in ("fx", "timm", "export") if row.get(tracer) == "other"]
    same = sum(row.get(tracer) == "same" for row in rows for tracer in ("fx", "timm", "export"))
    lines += [
        "",
        f"Of {same + len(others)} graphs, {same} show the sites and roles of the recorded forward.",
    ]
    if others:
        lines += ["", "| model | tracer | |", "|---|---|---|"]
        lines += [f"| {row['model']} | {tracer} | {row[f'{tracer}_reason']} |" for row, tracer in others]
    failed = [row for row in rows if row["status"] != "observed"]
    if failed:
        lines += ["", "| model | not observed |", "|---|---|"]
        lines += [f"| {row['model']} | {str(row.get('reason', '')).replace('|', '/')} |" for row in failed]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    zoo.sweep("tracers", measure, table, __doc__ or "")

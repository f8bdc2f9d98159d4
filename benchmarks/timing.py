"""What the benches share: interleaved timing, peak memory, and the facts that a figure is worthless without."""

from __future__ import annotations

import ctypes
import json
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fdconv.cpu import workspace

RESULTS = Path(__file__).parent / "results"
PLOTS = Path(__file__).parent.parent / "docs" / "images"


def turn(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of the second of two calls.

    It finds caches and memory as a loop over this call alone would, not as another call left them.
    """
    call()
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def interleaved(turns: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Fewest milliseconds of what is timed, in turns so that a slow spell of the machine hits all of it.

    Fewest, for whatever else the machine does only adds to them.

    Args:
        turns: each gives the milliseconds of one call.
        seconds: about how long to go on, but for at least three rounds after one to warm up.
    """
    for once in turns.values():
        once()
    taken: dict[str, list[float]] = {name: [] for name in turns}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 3:
        for name, once in turns.items():
            taken[name].append(once())
    return {name: min(times) for name, times in taken.items()}


def turns_of(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, Callable[[], float]]:
    """What `interleaved` takes, for calls in this process."""
    return {name: partial(turn, call, device) for name, call in calls.items()}


def peak_memory(call: Callable[[], Any], device: torch.device) -> float:
    """MiB at the peak of one call; on a CPU of this process in all its life, so that it needs one of its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / 2**20
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if platform.system() == "Linux" else 2**20)


def added_memory(call: Callable[[], Any], device: torch.device) -> float:
    """MiB that one call needs at its peak above what is held before it; NaN where the system does not tell."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        return peak_memory(call, device) - before / 2**20
    workspace.buffer.held.clear()  # they belong to the call
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    except OSError:
        return float("nan")
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1024


def _resident(key: str) -> int:
    """KiB of this process, now or at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def call_of(model: nn.Module, x: Tensor, mode: str) -> Callable[[], Any]:
    """One inference, or one forward and backward pass."""
    if mode == "inference":
        model.eval()

        def infer() -> Any:
            with torch.inference_mode():
                return model(x)

        return infer
    model.train()

    def step() -> Any:
        model.zero_grad()
        output = model(x)
        output = getattr(output, "logits", output)
        output.float().square().mean().backward()

    return step


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and date."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def write(name: str, device: torch.device, rows: list[dict[str, Any]], table: str) -> None:
    """Keep rows as JSON with the environment, and their table as Markdown."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"{name}-{device.type}"
    facts = environment(device)
    content = {"environment": facts, "rows": rows}
    (RESULTS / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    head = f"Measured on {facts['date']}: {facts['device']}, {facts['threads']} threads, torch {facts['torch']}.\n\n"
    (RESULTS / f"{stem}.md").write_text(head + table, encoding="utf-8")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()

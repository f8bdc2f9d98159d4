"""One thread for each worker: many small tensors, and `pytest -n` already uses the cores.

Without a GPU, Triton's kernels run in its interpreter, which must be chosen before Triton is first imported.

Tests that take long are left out of the default run: `long_tests.txt` lists them, and `pytest -m long` runs them. The
list is made anew by `pytest -n 2 -m "not slow" --list-long SECONDS`, from the processor time that each test took.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

LONG = Path(__file__).with_name("long_tests.txt")
_STARTED = pytest.StashKey[float]()
_measured: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--list-long", type=float, metavar="SECONDS", help=f"list tests that take longer in {LONG.name}")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    listed = set(LONG.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.long)


def _processor_seconds() -> float:
    """Of this process and of those that it has started."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[_STARTED] = _processor_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call":
        report.user_properties.append(("seconds", _processor_seconds() - item.stash[_STARTED]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    seconds = dict(report.user_properties).get("seconds")
    if isinstance(seconds, float):
        _measured[report.nodeid] = seconds


def pytest_sessionfinish(session: pytest.Session) -> None:
    limit = session.config.getoption("--list-long")
    if limit is not None and not hasattr(session.config, "workerinput"):
        listed = sorted(nodeid for nodeid, seconds in _measured.items() if seconds > limit)
        LONG.write_text("".join(f"{nodeid}\n" for nodeid in listed), encoding="utf-8")

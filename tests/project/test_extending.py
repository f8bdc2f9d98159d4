"""The pages on adding an operator and a library are followed, word for word."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdsurgery.integrations import LIBRARIES
from fdsurgery.operators import operators, register

DOCS = Path(__file__).parents[2] / "docs"


def code_of(page: str) -> str:
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M))


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    operators()
    monkeypatch.setattr(register, "_operators", dict(register._operators))
    monkeypatch.chdir(tmp_path)
    yield
    LIBRARIES.pop("toynets", None)
    sys.modules.pop("toynets", None)


def test_an_operator() -> None:
    pytest.importorskip("torchvision")
    exec(compile(code_of("add_an_operator.md"), "docs/add_an_operator.md", "exec"), {"__name__": "a_user"})


def test_a_library() -> None:
    exec(compile(code_of("add_a_library.md"), "docs/add_a_library.md", "exec"), {"__name__": "a_user"})

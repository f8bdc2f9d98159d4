"""Every public name has a docstring with an example, the examples run, and the page on the API shows it."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fdconv
import fdsurgery

ROOT = Path(__file__).parents[2]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public() -> Iterator[tuple[str, Any]]:
    """What users call: by the name they know, of modules what these offer, and the methods of a plan."""
    for package in (fdconv, fdsurgery):
        for name in package.__all__:
            found = getattr(package, name)
            if not isinstance(found, ModuleType):
                yield f"{package.__name__}.{name}", found
                continue
            for inner in getattr(found, "__all__", None) or vars(found):
                value = getattr(found, inner)
                if getattr(value, "__module__", "").startswith(found.__name__):
                    yield f"{package.__name__}.{name}.{inner}", value
    for name, value in vars(fdsurgery.Plan).items():
        if not name.startswith("_") and isinstance(value, (staticmethod, type(public))):
            yield f"fdsurgery.Plan.{name}", getattr(fdsurgery.Plan, name)


PUBLIC = dict(public())


def examples() -> dict[str, doctest.DocTest]:
    """The examples of all docstrings, by where they stand."""
    found = {}
    for package in ("fdconv", "fdsurgery"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
                for test in doctest.DocTestFinder().find(module, globs={}):
                    if test.examples:
                        found[test.name] = test
    return found


EXAMPLES = examples()


def test_much_is_public() -> None:
    assert len(PUBLIC) > 50 and len(EXAMPLES) >= len(set(map(id, PUBLIC.values())))
    assert {"fdsurgery.convert", "fdsurgery.Plan.exclude", "fdconv.FDConv2d", "fdsurgery.inspect.band_maps"} <= set(
        PUBLIC
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_has_an_example(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert re.search(r"^Examples:\n    >>> ", text, re.MULTILINE), f"{name} has no section `Examples:`"
    where = f"{PUBLIC[name].__module__}.{PUBLIC[name].__qualname__}"
    assert where in EXAMPLES, f"the example of {name} is not its own"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(EXAMPLES[name], out=said.append)
    assert not said, "".join(said)


def shown(name: str) -> list[Any]:
    """What a line of the page on the API shows: like mkdocstrings, a module rather than a function of its name."""
    for end in range(name.count(".") + 1, 0, -1):
        module, *path = ".".join(name.split(".")[:end]), *name.split(".")[end:]
        with contextlib.suppress(ImportError):
            found: Any = importlib.import_module(module)
            for part in path:
                found = getattr(found, part)
            return list(vars(found).values()) if isinstance(found, ModuleType) else [found]
    raise AssertionError(f"there is no {name}")


def test_what_is_public_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    there = [value for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE) for value in shown(name)]
    methods = {name for name in PUBLIC if name.startswith("fdsurgery.Plan.")}  # shown with their class
    assert not [name for name in PUBLIC.keys() - methods if not any(PUBLIC[name] is value for value in there)]

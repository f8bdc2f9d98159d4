"""The floors of both packages, read from the imports: who may know whom, and what `import fdsurgery` brings along.

All imports are read, with `ast`, those inside functions too; only those under `TYPE_CHECKING` do not count.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fdconv", "fdsurgery")
LAZY = ("timm", "transformers", "torchvision", "peft", "ultralytics", "accelerate", "triton", "rich", "typer")
"""Libraries that are imported where they are used, and not with the library."""
MOST_LINES = 400
MOST_SECONDS = 0.3
"""Processor time of `import fdsurgery` beyond that of `import torch`, where that takes at most `TORCH_SECONDS`."""
TORCH_SECONDS = 1.5

FDCONV = (
    "config precision strides tracing backend import_hook weight_reads",
    "filter_scale constants lazy modulation",
    "onnx_fft low_pass",
    "spectrum",
    "reference",
    "out_of_memory cpu gpu",  # neither of the last two knows the other
    "bands functional per_sample plain_calls weight_property",
    "stored_spectrum",
    "modulated_spectrum",
    "state_dicts",
    "layers",
    "flops inference official",
)
"""The floors of `fdconv`, from the ground up. A module knows what is below it, and nothing beside or above it."""

FDSURGERY = {
    "discovery": (
        "recipe",
        "rewrite",
        "plan",
        "planning",
        "surgery",
        "saving",
        "operators.fdconv",
        "operators.same_padding",
        "operators.dynamic_layer",
    ),
    "operators": ("recipe", "plan", "planning", "surgery", "saving"),
    "recipe": ("plan", "planning", "surgery", "saving", "rewrite"),
    "rewrite": ("recipe", "plan", "planning", "surgery", "saving"),
    "plan": ("planning", "surgery", "saving"),
    "planning": ("surgery", "saving", "checkpoints"),
    "report": ("plan",),
    "saving": ("planning", "surgery"),
    "": ("cli", "demo"),
}
"""What the parts of `fdsurgery` must not know; "" is all of it. What stands on the ground imports nothing of it."""
GROUND = ("errors", "surroundings", "testing")


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages, by its full name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a module, but for those under `TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from statements(node)


def base_of(name: str, node: ast.ImportFrom) -> str:
    """The full name of what the module `name` imports from."""
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])


@cache
def imports(name: str) -> frozenset[tuple[str, str]]:
    """Each import of a module as a module and a name in it; the name is empty where a whole module is imported."""
    found = set()
    for node in statements(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        else:
            base = base_of(name, node)
            named = ((f"{base}.{alias.name}", alias.name) for alias in node.names)
            found |= {(full, "") if full in modules() else (base, part) for full, part in named}
    return frozenset(found)


def packages_of(name: str) -> set[str]:
    return {".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 1)}


@cache
def arrows(name: str) -> frozenset[str]:
    """The modules of ours that run because of a module's imports: those it names, and the packages that they are in."""
    named = {module for module, _ in imports(name) if module in modules()}
    packages = set().union(*map(packages_of, named)) - packages_of(name)  # its own run already
    return frozenset((named | packages) - {name})


def is_in(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def climbing(below: str, *above: str) -> list[str]:
    """Imports, from a module or all of a package, of those that it must not know, which may be parts of it."""
    return [
        f"{name} -> {arrow}"
        for name in modules()
        if is_in(name, below) and not any(is_in(name, part) for part in above)
        for arrow in sorted(arrows(name))
        if any(is_in(arrow, part) for part in above)
    ]


def test_the_imports_are_read() -> None:
    assert {"fdconv", "fdconv.layers", "fdsurgery.cli", "fdsurgery.discovery.observe"} <= modules().keys()
    assert ("fdconv.layers", "FDConv2d") in imports("fdconv")
    assert {"fdconv.spectrum", "fdconv.strides"} <= arrows("fdconv.reference"), "relative"
    assert "fdconv.gpu.conv" in arrows("fdconv.gpu.ops"), "in a function"
    assert {"fdsurgery.discovery", "fdsurgery.discovery.site"} <= arrows("fdsurgery.report"), "the package too"
    assert "fdsurgery.verification" not in arrows("fdsurgery.saving.card"), "for type checkers only"


def test_fdconv_knows_nothing_of_fdsurgery() -> None:
    assert climbing("fdconv", "fdsurgery") == []


def test_there_are_no_circles() -> None:
    """Modules that import none of those left are taken away, and those that none of them imports; a circle stays."""
    left = set(modules())
    while True:
        known = set().union(*map(arrows, left))
        if not (free := {name for name in left if not arrows(name) & left or name not in known}):
            break
        left -= free
    assert {name: sorted(arrows(name) & left) for name in sorted(left)} == {}


def test_every_module_of_fdconv_stands_on_a_floor() -> None:
    placed = " ".join(FDCONV).split()
    assert sorted(placed) == sorted({name.split(".")[1] for name in modules() if name.startswith("fdconv.")})


@pytest.mark.parametrize("floor", range(len(FDCONV)), ids=lambda floor: FDCONV[floor].replace(" ", "-"))
def test_nothing_in_fdconv_looks_up(floor: int) -> None:
    others = " ".join(FDCONV[floor:]).split()
    for part in FDCONV[floor].split():
        assert climbing(f"fdconv.{part}", *(f"fdconv.{other}" for other in others if other != part)) == []


@pytest.mark.parametrize("part", FDSURGERY, ids=lambda part: part or "all")
def test_nothing_in_fdsurgery_looks_up(part: str) -> None:
    below, *above = (f"fdsurgery.{name}".rstrip(".") for name in (part, *FDSURGERY[part]))
    assert {below, *above} <= modules().keys(), "all of these exist"
    assert climbing(below, *above) == []


@pytest.mark.parametrize("name", GROUND)
def test_what_stands_on_the_ground_knows_nothing(name: str) -> None:
    assert {arrow for arrow in arrows(f"fdsurgery.{name}") if is_in(arrow, "fdsurgery")} == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_long(package: str) -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if is_in(name, package) and count > MOST_LINES} == {}


def test_private_names_stay_in_their_module() -> None:
    found = [
        f"{name} imports {part} of {module}"
        for name in modules()
        for module, part in sorted(imports(name))
        if module.split(".")[0] in PACKAGES
        and (part or module.rpartition(".")[2]).startswith("_")
        and not part.startswith("__")
    ]
    assert found == []


def child(code: str, cache: Path) -> str:
    """What a program prints in a process of its own, in which the packages are compiled once and for all."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_other_libraries_are_imported_by_those_who_use_them(tmp_path: Path) -> None:
    found = child("import fdsurgery, sys; print(*{name.split('.')[0] for name in sys.modules})", tmp_path).split()
    assert {"torch", "fdconv", "fdsurgery"} <= set(found)
    assert set(found) & set(LAZY) == set()


def test_import_takes_little(tmp_path: Path) -> None:
    """The best of three runs. A busy machine stretches processor time, and torch's own import tells by what."""
    code = """
from time import process_time
start = process_time()
import torch
between = process_time()
import fdsurgery
print(between - start, process_time() - between)
"""
    child(code, tmp_path)  # compiles
    runs = [tuple(map(float, child(code, tmp_path).split())) for _ in range(3)]
    assert min(ours / max(1, torchs / TORCH_SECONDS) for torchs, ours in runs) < MOST_SECONDS, runs

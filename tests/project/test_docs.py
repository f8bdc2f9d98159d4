"""What the documentation shows is true: its recipes are recipes, and its links lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import yaml

from fdsurgery.recipe import parse_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_are_recipes(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        assert parse_recipe(block, page.name).swap


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = {name for entry in config["nav"] for name in entry.values()}
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def resolves(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[end:])
    return False


SOURCES = {path for package in ("fdconv", "fdsurgery") for path in (ROOT / package).rglob("*.py")}
SOURCES.discard(ROOT / "fdconv" / "gpu" / "ops.py")  # whose names are those of torch.ops


@pytest.mark.parametrize("file", [*PAGES, *sorted(SOURCES)], ids=lambda file: str(file.relative_to(ROOT)))
def test_names_of_ours_exist(file: Path) -> None:
    """In the text of pages, docstrings and messages, which nobody runs: what is moved is renamed there, too."""
    text = file.read_text(encoding="utf-8")
    names = set(re.findall(r"(?<![\w./-])(?:fdsurgery|fdconv)(?:\.[A-Za-z_]\w*)+", text))
    files = {name for name in names if name.endswith((".json", ".yaml", ".py", ".md"))}
    assert not [name for name in names - files if not resolves(name)]

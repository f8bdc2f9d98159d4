"""The library as it is installed: from a wheel, with its recipes, away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

USE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import timm, fdconv, fdsurgery
for package in (fdconv, fdsurgery):
    assert Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
assert {"generic", "resnet", "vit"} <= set(fdsurgery.shipped_recipes())
assert "site-like" in str(fdsurgery.shipped_recipes()["vit"])
plan = fdsurgery.plan(timm.create_model("resnet18"))
assert plan.recipe == "resnet" and len(plan.swaps) == 16
"""


@pytest.mark.long
def test_an_installed_wheel_finds_its_recipes(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"fdsurgery/recipes/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")}
    assert recipes and recipes <= names
    assert {"fdsurgery/py.typed", "fdconv/py.typed", "fdconv/cpu/kernels.cpp"} <= names
    assert all(name.startswith(("fdsurgery/", "fdconv/", "fdsurgery-")) for name in names)

    target = tmp_path / "site-like"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    subprocess.run([sys.executable, "-c", USE, str(target)], check=True, cwd=tmp_path)

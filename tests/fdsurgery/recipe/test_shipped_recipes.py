"""Every shipped recipe does to its models what its file says, and is the one that is picked for them."""

from __future__ import annotations

import pytest
import torch

import fdsurgery
from fdsurgery.recipe import load_recipe, shipped_recipes
from fdsurgery.recipe.rules import Figures
from fdsurgery.saving.source import SourceError, build

BASES = {"ffn", "generic"}
RECIPES = {name: load_recipe(name) for name in shipped_recipes()}
BY_NAME = {name for name, recipe in RECIPES.items() if not recipe.match.root} - BASES
"""Those that no model is recognised by, such as placements of another operator."""
CHECKS = [(name, figures) for name, recipe in RECIPES.items() for figures in recipe.figures]


def planned(spec: str, recipe: str = "auto") -> fdsurgery.Plan:
    """A plan for a model built on meta, or with memory where its forward needs values."""
    try:
        with torch.device("meta"):
            return fdsurgery.plan(build(spec, pretrained=False)[0], recipe)
    except (fdsurgery.DiscoveryError, SourceError, NotImplementedError):  # some initialisations copy values
        return fdsurgery.plan(build(spec, pretrained=False)[0], recipe)


LARGE = ("OneFormer", "Detr", "TableTransformer", "fasterrcnn", "maskrcnn")
"""Parts of the names of models that take long to build and to plan."""


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        pytest.param(
            name,
            figures,
            id=f"{name} {figures.model}",
            marks=pytest.mark.long if any(part in figures.model for part in LARGE) else (),
        )
        for name, figures in CHECKS
    ],
)
def test_figures(name: str, figures: Figures) -> None:
    plan = planned(figures.model, name if name in BY_NAME else "auto")
    assert plan.recipe == name
    multiply_adds = sum(decision.site.multiply_adds for decision in plan.swaps)
    measured = {
        "swaps": len(plan.swaps),
        "parameters_added": plan.parameters_added,
        "multiply_adds": multiply_adds,
    }
    assert Figures(model=figures.model, **measured) == figures
    reasons = {decision.reason for decision in plan.kept}
    assert all(reasons)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.description.endswith(".")
    assert recipe.figures or name in BASES
    assert recipe.match.timm or recipe.match.transformers or recipe.match.torchvision or name in BASES | BY_NAME
    assert (name in BY_NAME) == ("asked for by name" in recipe.description.replace("\n", " "))
    assert all(len(rule.because.split()) >= 4 for rule in recipe.keep), "a reason, not a label"


def test_families_are_covered() -> None:
    assert len(RECIPES) >= 25 + len(BASES)


def test_model_types_exist() -> None:
    import torchvision
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    known = {*CONFIG_MAPPING_NAMES}
    classes = {name for module in (torchvision.models, torchvision.models.detection, torchvision.models.segmentation)
               for name in dir(module)}  # fmt: skip
    claimed: dict[str, str] = {}
    for name, recipe in RECIPES.items():
        for model_type in recipe.match.transformers:
            assert model_type in known, f"{name}: transformers has no model type {model_type!r}"
            assert claimed.setdefault(model_type, name) == name
        assert set(recipe.match.torchvision) <= classes, name

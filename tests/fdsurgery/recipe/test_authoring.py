"""What helps the authors of recipes: drafts, checks against a model, explanations, the schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import CASES
from test_cli import invoke

import fdsurgery
from fdsurgery.recipe import load_recipe, parse_recipe, shipped_recipes
from fdsurgery.recipe.authoring import MODELINE, draft, explain, rule_matches
from fdsurgery.recipe.schema import json_schema

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", CASES)
def test_a_draft_is_a_recipe_for_its_model(name: str) -> None:
    model = CASES[name].build()
    sites = fdsurgery.sites(model)
    recipe = parse_recipe(draft(model, sites))
    plan = fdsurgery.plan(model, recipe)
    kept = {"stem", "shortcut", "head", "linear", "depthwise"}
    assert {decision.site.role for decision in plan.swaps}.isdisjoint(kept)
    assert all(decision.swap or decision.site.obstacle or decision.site.role in kept for decision in plan.decisions)
    assert sum((getattr(recipe.match, library) for library in ("timm", "transformers", "torchvision")), ())


def test_each_rule_says_how_many_sites_it_means_and_decides() -> None:
    recipe = parse_recipe(
        "keep: [{name: 'layer4.*', because: x}]\n"
        "swap: [{where: {kernel_size: 3}}, {where: {role: [spatial, shortcut]}}, "
        "{where: {kernel_size: 5}, optional: true}]"
    )
    plan = fdsurgery.plan(CASES["timm resnet18"].build(), recipe)
    counts = [(means, decides) for _, means, decides in rule_matches(recipe, plan)]
    assert counts == [(5, 5), (16, 12), (19, 2), (0, 0)]


def test_an_explanation_agrees_with_the_plan() -> None:
    for name in ("timm resnet18", "timm ghostnet (no recipe of its own)"):
        plan = fdsurgery.plan(CASES[name].build())
        for decision in plan.decisions:
            deciding = [v.rule.label for v in explain(load_recipe(plan.recipe), decision) if v.decides]
            assert deciding == ([decision.rule] if decision.rule else [])


def test_the_shipped_schema_is_current_and_every_recipe_names_it() -> None:
    shipped = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert shipped == json_schema(), "run: fdsurgery recipes schema > recipes/recipe.schema.json"
    for file in shipped_recipes().values():
        assert file.read_text(encoding="utf-8").startswith(MODELINE + "\n")


def test_the_schema_takes_what_recipes_say_and_no_more() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import yaml

    validator = jsonschema.Draft202012Validator(json_schema())
    for file in shipped_recipes().values():
        assert not list(validator.iter_errors(yaml.safe_load(file.read_text(encoding="utf-8"))))
    for wrong in (
        "swop: []",
        "swap: [{where: {role: ffns}}]",
        "keep: [{name: x}]",
        "swap: [{where: {kernel_size: 3x}}]",
    ):
        assert list(validator.iter_errors(yaml.safe_load(wrong))), wrong


def test_commands_of_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "try it: fdsurgery plan timm:resnet18" in invoke("recipes", "new", "timm:resnet18", "-o", "mine.yaml")
    assert "mine.yaml exists" in invoke("recipes", "new", "timm:resnet18", "-o", "mine.yaml", code=2)
    assert invoke("recipes", "new", "timm:resnet18") == Path("mine.yaml").read_text(encoding="utf-8")
    assert "role spatial" in invoke("recipes", "check", "mine.yaml", "timm:resnet18")
    assert "no site of this model has role spatial" in invoke(
        "recipes", "check", "mine.yaml", "timm:vit_tiny_patch16_224", code=2
    )
    said = invoke("recipes", "explain", "timm:resnet18", "--site", "layer2.0.downsample.0")
    assert "role is shortcut" in said and "yes, and decides" in said and "so it is kept: the paper keeps" in said
    said = invoke("recipes", "explain", "timm:resnet18", "-s", "layer2.0.conv1", "-r", "mine.yaml")
    assert "so it is swapped by mine.yaml:" in said
    assert "did you mean 'layer2.0.conv1'" in invoke(
        "recipes", "explain", "timm:resnet18", "-s", "layer2.0.con1", code=2
    )
    assert json.loads(invoke("recipes", "schema")) == json_schema()

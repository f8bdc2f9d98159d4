"""Recipes: which sites of a family of models to swap, by which settings, and which to keep, and why."""

from .conditions import matches_any
from .library import detect_recipe, load_recipe, parse_recipe, shipped_recipes
from .rules import FineTune, KeepRule, Match, Recipe, SwapRule, check_rules_matched

__all__ = [
    "FineTune",
    "KeepRule",
    "Match",
    "Recipe",
    "SwapRule",
    "check_rules_matched",
    "detect_recipe",
    "load_recipe",
    "matches_any",
    "parse_recipe",
    "shipped_recipes",
]

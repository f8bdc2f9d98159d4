"""Swap the convolutions and FFN linears of a vision model for dynamic ones, without changing what it computes."""

from .checkpoint import load, save
from .discovery import Site, sites
from .errors import (
    CheckpointError,
    DiscoveryError,
    PlanError,
    RecipeError,
    RewriteError,
    SurgeryError,
    UnsupportedModelError,
)
from .planning import Decision, Plan, plan
from .recipe import Recipe, load_recipe, shipped_recipes
from .sources import Source
from .surgery import apply, convert, restore
from .verification import Verification, settle_, verify

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Decision",
    "DiscoveryError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "RewriteError",
    "Site",
    "Source",
    "SurgeryError",
    "UnsupportedModelError",
    "Verification",
    "apply",
    "convert",
    "load",
    "load_recipe",
    "plan",
    "restore",
    "save",
    "settle_",
    "shipped_recipes",
    "sites",
    "verify",
]

"""Swap the convolutions and FFN linears of a vision model for dynamic ones, without changing what it computes."""

import warnings
from typing import Any

from fdconv import NeutralWeightWarning, WeightReadError, strict_weight_reads

from . import inspect, testing
from .converted import ParameterCount, count_parameters, dynamic_layers, print_trainable_parameters
from .discovery import Site, sites
from .errors import (
    CheckpointError,
    DiscoveryError,
    FineTuningError,
    PlanError,
    RecipeError,
    RewriteError,
    SurgeryError,
    UnsupportedModelError,
)
from .finetune import freeze, param_groups
from .inference import compile_for_inference
from .integrations import ModelSource, watch_imports
from .norms import fuse_norms
from .operators import Operator, get_operator, register_operator
from .optimizers import optimizer_after_surgery
from .plan import Decision, Plan
from .planning import plan
from .recipe import Recipe, load_recipe, shipped_recipes
from .saving.folder import load, save
from .saving.pretrained import from_pretrained, save_pretrained
from .schedules import schedule
from .surgery import apply, convert, restore
from .verification import LayerVerification, Verification, verify

__version__ = "0.1.0"

watch_imports()

__all__ = [
    "CheckpointError",
    "Decision",
    "DiscoveryError",
    "FineTuningError",
    "LayerVerification",
    "ModelSource",
    "NeutralWeightWarning",
    "Operator",
    "ParameterCount",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "RewriteError",
    "Site",
    "SurgeryError",
    "UnsupportedModelError",
    "Verification",
    "WeightReadError",
    "apply",
    "compile_for_inference",
    "convert",
    "count_parameters",
    "dynamic_layers",
    "freeze",
    "from_pretrained",
    "fuse_norms",
    "get_operator",
    "inspect",
    "load",
    "load_recipe",
    "optimizer_after_surgery",
    "param_groups",
    "plan",
    "print_trainable_parameters",
    "register_operator",
    "restore",
    "save",
    "save_pretrained",
    "schedule",
    "shipped_recipes",
    "sites",
    "strict_weight_reads",
    "testing",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "Source":
        warnings.warn("fdsurgery.Source is now fdsurgery.ModelSource", DeprecationWarning, stacklevel=2)
        return ModelSource
    if name == "settle_":
        warnings.warn("fdsurgery.settle_ is now fdsurgery.testing.settle_", DeprecationWarning, stacklevel=2)
        return testing.settle_
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Swap the convolutions and FFN linears of a vision model for dynamic ones, without changing what it computes."""

from fdconv import NeutralWeightWarning, WeightReadError, strict_weight_reads

from .adapters import registration as _peft_registration
from .checkpoint import load, save
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
from .finetune import freeze, optimizer_after_surgery, param_groups
from .huggingface import registration as _registration
from .inference import compile_for_inference
from .integrations import ultralytics as _ultralytics
from .norms import fuse_norms
from .planning import Decision, Plan, plan
from .pretrained import from_pretrained, save_pretrained
from .recipe import Recipe, load_recipe, shipped_recipes
from .sources import Source
from .surgery import apply, convert, restore
from .timm_models import registration as _timm_registration
from .verification import LayerVerification, Verification, settle_, verify

__version__ = "0.1.0"

_registration.register()
_timm_registration.register()
_peft_registration.register()
_ultralytics.register()

__all__ = [
    "CheckpointError",
    "Decision",
    "DiscoveryError",
    "FineTuningError",
    "LayerVerification",
    "NeutralWeightWarning",
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
    "WeightReadError",
    "apply",
    "compile_for_inference",
    "convert",
    "freeze",
    "from_pretrained",
    "fuse_norms",
    "load",
    "load_recipe",
    "optimizer_after_surgery",
    "param_groups",
    "plan",
    "restore",
    "save",
    "save_pretrained",
    "settle_",
    "shipped_recipes",
    "sites",
    "strict_weight_reads",
    "verify",
]

"""Discovery: which layers a model has, what part each plays, and what stands in the way of replacing it."""

from .inputs import Inputs
from .observe import Observation, example_inputs, observe, sites
from .site import FFN_ROLES, ROLES, Kind, Layout, Role, Site

__all__ = [
    "FFN_ROLES",
    "ROLES",
    "Inputs",
    "Kind",
    "Layout",
    "Observation",
    "Role",
    "Site",
    "example_inputs",
    "observe",
    "sites",
]

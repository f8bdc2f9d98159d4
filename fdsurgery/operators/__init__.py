"""What may be put in a site's place. One file an operator; `base` has the contract, `register` those that are known."""

from .base import OfficialForm, Operator
from .register import (
    BuildError,
    Made,
    Wanted,
    build_layers,
    get_operator,
    made_layers,
    operator_of,
    operators,
    register_operator,
)

__all__ = [
    "BuildError",
    "Made",
    "OfficialForm",
    "Operator",
    "Wanted",
    "build_layers",
    "get_operator",
    "made_layers",
    "operator_of",
    "operators",
    "register_operator",
]

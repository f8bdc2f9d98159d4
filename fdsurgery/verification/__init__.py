"""The check that conversion changed nothing."""

from .check import verify
from .error import relative_error
from .verdict import LayerVerification, Verification

__all__ = ["LayerVerification", "Verification", "relative_error", "verify"]

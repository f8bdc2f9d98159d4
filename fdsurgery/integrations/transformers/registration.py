"""Hands the quantizer to transformers; see `Library.hooks`."""

from __future__ import annotations

from types import ModuleType


def enter(register: ModuleType) -> None:
    """Enter the quantizer in transformers' register.

    Args:
        register: `transformers.quantizers.auto`.
    """
    if hasattr(register, "register_quantizer"):  # not before 4.49, which cannot be told of new layers
        from . import quantizer  # noqa: F401  enters itself, and imports transformers

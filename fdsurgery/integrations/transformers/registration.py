"""Hands the quantizer to transformers whichever of the two is imported first."""

from __future__ import annotations

from types import ModuleType

from ..import_hook import on_import


def register() -> None:
    """Enter the quantizer in transformers' register, now or as soon as that is imported."""
    on_import("transformers.quantizers.auto", _enter)


def _enter(register: ModuleType) -> None:
    if hasattr(register, "register_quantizer"):  # not before 4.49, which cannot be told of new layers
        from . import quantizer  # noqa: F401  enters itself

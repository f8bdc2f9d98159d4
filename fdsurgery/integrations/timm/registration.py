"""Makes the names known to timm whichever of the two is imported first."""

from __future__ import annotations

import warnings
from types import ModuleType

from ..import_hook import on_import


def register() -> None:
    """Make timm's factory know the names, now or as soon as it is imported."""
    on_import("timm.models._factory", _enter)


def _enter(timm_factory: ModuleType) -> None:
    from . import factory

    missing = factory.install(timm_factory)
    if missing:
        warnings.warn(
            f"fdsurgery: names such as 'resnet50.fdconv' do not work with this timm, whose factory has no "
            f"{' and no '.join(missing)}; call fdsurgery.convert(timm.create_model('resnet50'))",
            stacklevel=2,
        )

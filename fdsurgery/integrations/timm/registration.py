"""Makes the names known to timm; see `Library.hooks`."""

from __future__ import annotations

import warnings
from types import ModuleType

from . import factory


def enter(timm_factory: ModuleType) -> None:
    """Make timm's factory know the names, or warn that it cannot.

    Args:
        timm_factory: `timm.models._factory`.
    """
    missing = factory.install(timm_factory)
    if missing:
        warnings.warn(
            f"fdsurgery: names such as 'resnet50.fdconv' do not work with this timm, whose factory has no "
            f"{' and no '.join(missing)}; call fdsurgery.convert(timm.create_model('resnet50'))",
            stacklevel=2,
        )

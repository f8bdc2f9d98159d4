"""Releases below which a test cannot hold, for a fault or a lack that is not this library's."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def older(package: str, release: str) -> bool:
    """True if an older release of a package is installed than this one; development builds count as their release."""
    return Version(Version(version(package)).base_version) < Version(release)


def since(package: str, release: str, otherwise: str) -> pytest.MarkDecorator:
    """Skips a test on older releases, and says what those do otherwise."""
    return pytest.mark.skipif(older(package, release), reason=f"{package} before {release} {otherwise}")

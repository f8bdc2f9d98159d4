"""Hands the quantizer to transformers whichever of the two is imported first, and imports nothing for it.

Its register has to be imported before something can be entered, and that takes seconds. Whoever loads a model imports
it anyway; so this waits for that moment.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_REGISTER = "transformers.quantizers.auto"


def register() -> None:
    """Enter the quantizer in transformers' register, now or as soon as that is imported."""
    if _REGISTER in sys.modules:
        _enter()
    else:
        sys.meta_path.insert(0, _Finder())


def _enter() -> None:
    if hasattr(sys.modules[_REGISTER], "register_quantizer"):  # not before 4.49, which cannot be told of new layers
        from . import quantizer  # noqa: F401  enters itself


class _Finder(MetaPathFinder):
    """Finds one module, once, by asking the others."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _REGISTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as another loader does, then enters the quantizer."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _enter()

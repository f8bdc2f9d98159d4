"""Does something as soon as another library's module is imported, and imports nothing for it.

What is entered in a library's register needs the register, and importing timm or transformers takes seconds, as does
Triton, which some modules of torch import. Whoever uses it imports it anyway; so this waits for that moment, whichever
of the two libraries comes first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def on_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action` with a module: now if it is imported already, else once, right after its own code has run.

    Args:
        name: fully qualified.
        action: what it raises, the import raises.
    """
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Finds one module, once, by asking the others."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


class _Loader(Loader):
    """Loads as another loader does, then does what was asked for."""

    def __init__(self, loader: Loader, action: Callable[[ModuleType], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action(module)

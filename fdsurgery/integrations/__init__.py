"""Libraries that models come from and go to: one folder a library, and the register of them.

base         what a library answers about its models
file         models of the user's own code
...          each other folder is a library's: `library` has its answers, the other files what needs the library itself

To add a library, write its folder and enter it in `LIBRARIES`. Nothing here imports a library.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Literal

from torch import nn

from fdconv.import_hook import on_import

from ..inputs import Inputs
from .base import Library, ModelSource, SourceError
from .file.library import PythonFile
from .peft.library import Peft
from .timm.library import Timm
from .torchvision.library import Torchvision
from .transformers.library import Transformers
from .ultralytics.library import Ultralytics

__all__ = [
    "LIBRARIES",
    "Library",
    "ModelSource",
    "SourceError",
    "example_inputs",
    "family_of",
    "image_shape",
    "library_of",
    "match_keys",
    "network_of",
    "refusal_of",
    "register_library",
    "watch_imports",
]

LIBRARIES: dict[str, Library] = {
    library.name: library for library in (Timm(), Transformers(), Torchvision(), Ultralytics(), Peft(), PythonFile())
}
"""All libraries by name, in the order in which they are asked; the first that has an answer gives it."""


def register_library(library: Library) -> None:
    """Enter a library of another package, in the place of one of the same name if there is one."""
    LIBRARIES[library.name] = library
    _watch(library)


def watch_imports() -> None:
    """Have each library's hooks called, now or as soon as the library is imported."""
    for library in LIBRARIES.values():
        _watch(library)


def match_keys() -> dict[str, str]:
    """The libraries that `match` of a recipe may name, and what it lists for each."""
    return {name: library.families for name, library in LIBRARIES.items() if library.families}


def library_of(model: nn.Module) -> Library | None:
    """The library that a model's class is of."""
    return next((library for library in LIBRARIES.values() if library.owns(model)), None)


def family_of(model: nn.Module) -> tuple[str, str]:
    """The library that knows a model's family, and what the family is called there; empty for other models."""
    for name in match_keys():
        family = LIBRARIES[name].family(model)
        if family is not None:
            return name, family
    return "", ""


def network_of(model: nn.Module) -> nn.Module:
    """The network inside of a library's wrapper, such as Ultralytics' `YOLO(...)`; any other model itself."""
    found = (library.network(model) for library in LIBRARIES.values())
    return next((network for network in found if network is not None), model)


def refusal_of(model: nn.Module, step: Literal["convert", "save"]) -> str | None:
    """What a library has put into a model that cannot be converted or saved with it, and what to do."""
    for fqn, module in model.named_modules():
        for library in LIBRARIES.values():
            refusal = library.refusal(module, step)
            if refusal is not None:
                return f"{repr(fqn) if fqn else 'the model'} {refusal}"
    return None


def example_inputs(model: nn.Module) -> Iterable[Inputs] | None:
    """What a library says that its model takes; None for models that no library knows."""
    found = (library.example_inputs(model) for library in LIBRARIES.values())
    return next((inputs for inputs in found if inputs is not None), None)


def image_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """`(channels, height, width)` that a model's configuration tells, as far as a library can read it."""
    found = (library.image_shape(model) for library in LIBRARIES.values())
    return next((shape for shape in found if shape is not None), None)


def _watch(library: Library) -> None:
    for module, function in library.hooks.items():
        on_import(module, partial(_call, function))


def _call(function: str, module: ModuleType) -> None:
    pkgutil.resolve_name(function)(module)

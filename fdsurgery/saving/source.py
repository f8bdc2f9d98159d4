"""Models of what a SPEC such as `timm:resnet50` or a saved source names; the register of libraries builds them."""

from __future__ import annotations

from torch import nn

from ..errors import CheckpointError, near_misses
from ..integrations import LIBRARIES, library_of
from ..integrations.base import Library, ModelSource, SourceError


def build(spec: str, *, pretrained: bool) -> tuple[nn.Module, ModelSource]:
    """Build the model a SPEC names.

    Args:
        spec: of one of the forms that `forms` lists, such as `timm:NAME`.
        pretrained: load trained weights (for a file, what its function loads is its own affair).

    Returns:
        The model in eval mode, and the source to save with it.

    Raises:
        SourceError: the SPEC has no known form, names nothing, or what it names cannot be loaded.
    """
    library = next((library for library in LIBRARIES.values() if library.takes(spec)), None)
    if library is None:
        prefix, separator, _ = spec.partition(":")
        prefixes = [form.partition(":")[0] for one in LIBRARIES.values() if one.rebuilds for form in one.forms]
        guess = near_misses(prefix, prefixes) if separator else ""
        raise SourceError(f"{spec!r} names no model; expected {forms()}{guess}")
    model, source = library.build(spec, pretrained=pretrained)
    return model.eval(), source


def forms() -> str:
    """How a SPEC may be written, for messages: `timm:NAME, ... or FILE.py:FUNCTION`."""
    return _listed([form for library in LIBRARIES.values() for form in library.forms])


def library_of_source(source: ModelSource) -> Library:
    """The library whose models a source names. Raises `CheckpointError` if none of that name builds any."""
    library = LIBRARIES.get(source.library)
    if library is None or not library.forms:
        known = [name for name, library in LIBRARIES.items() if library.forms and library.rebuilds]
        raise CheckpointError(f"unknown source library {source.library!r}; expected {_listed(known)}")
    return library


def rebuild(source: ModelSource) -> nn.Module:
    """Build the plain model of a saved source, with weights that mean nothing yet.

    Raises:
        CheckpointError: the source is a file, whose code is not run without being asked for, is unknown, or asks for
            what no file may ask for.
        SourceError: the library is missing or does not know the model.
    """
    return library_of_source(source).rebuild(source)


def infer(model: nn.Module) -> ModelSource | None:
    """The source of a model by its own attributes, such as transformers' config; None if they tell none."""
    library = library_of(model)
    return None if library is None else library.infer(model)


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]])

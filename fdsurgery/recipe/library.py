"""Recipes from files: the shipped ones and the user's, with what they inherit, and which is for a model."""

from __future__ import annotations

import importlib.resources
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..errors import RecipeError, near_misses
from ..integrations import family_of
from .conditions import matches_any
from .rules import Delegate, Recipe
from .schema import RecipeFile, read_file
from .yaml_source import KeyPath, YamlSource, parse_yaml

if TYPE_CHECKING:
    import sys

    if sys.version_info >= (3, 11):
        from importlib.resources.abc import Traversable
    else:
        from importlib.abc import Traversable

FALLBACK = "generic"
"""The recipe for models that no other recipe recognises."""

_SUFFIXES = (".yaml", ".yml")
_MOST_BYTES = 1_000_000


def shipped_recipes() -> dict[str, Traversable]:
    """The recipes that come with the library: their YAML files by name.

    Examples:
        >>> import fdsurgery
        >>> list(fdsurgery.shipped_recipes())
        ['clip', 'condconv_resnet', ...]
    """
    folder = importlib.resources.files("fdsurgery") / "recipes"
    if not folder.is_dir():  # in a checkout they lie beside the package
        folder = importlib.resources.files("fdsurgery") / ".." / "recipes"
    files = {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
    return dict(sorted(files.items()))


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe with all that it extends.

    Args:
        recipe: a shipped recipe's name, or a YAML file.

    Returns:
        The recipe; its own rules come before inherited ones.

    Raises:
        RecipeError: there is no such recipe, or it is broken; the message names file, line, column and key.

    Examples:
        >>> import fdsurgery
        >>> recipe = fdsurgery.load_recipe("resnet")
        >>> [rule.describe() for rule in recipe.swap]
        ['kind conv, role spatial or pointwise, kernel_size 1x1 or 3x3, channels from 17']
    """
    origin = _find(recipe)
    return _resolve(_parse(origin), (origin,))


def parse_recipe(text: str, label: str = "recipe.yaml") -> Recipe:
    """Read a recipe from YAML text. What it extends is looked for among the shipped recipes and beside `label`.

    Args:
        text: the YAML.
        label: what errors call it.

    Raises:
        RecipeError: see `load_recipe`.
    """
    source = parse_yaml(text, label)
    return _resolve((source, read_file(source)), (_Origin(Path(label), label),))


def detect_recipe(model: nn.Module) -> tuple[str, str]:
    """The shipped recipe for a model, and how the model was recognised, in words. `generic` if none is for it."""
    library, name = family_of(model)
    if not library:
        return FALLBACK, f"{type(model).__name__} is of no library that recipes know"
    for recipe, file in shipped_recipes().items():
        match = _parse(_Origin(file, file.name))[1].match
        if matches_any(match[library], name):
            return recipe, f"recognised as {library} {name}"
    return FALLBACK, f"no recipe is for {library} {name}"


@dataclass(frozen=True)
class _Origin:
    """A recipe's file."""

    file: Traversable
    label: str
    """What messages call it: the file's name for shipped recipes, else the path as it was given."""

    @property
    def folder(self) -> Path | None:
        """Where to look for what it extends; None for shipped recipes, which extend shipped ones."""
        return Path(self.label).parent if isinstance(self.file, Path) and str(self.file) == self.label else None

    @property
    def name(self) -> str:
        """The recipe's name: its file's without the suffix."""
        return self.file.name.rpartition(".")[0] or self.file.name

    def is_same(self, other: _Origin) -> bool:
        """True for two ways of naming one file."""
        if isinstance(self.file, Path) and isinstance(other.file, Path):
            return self.file.resolve() == other.file.resolve()
        return self.file == other.file


_Parsed = tuple[YamlSource, RecipeFile]


def _find(recipe: str | Path, folder: Path | None = None) -> _Origin:
    shipped = shipped_recipes()
    if isinstance(recipe, str) and recipe in shipped:
        return _Origin(shipped[recipe], shipped[recipe].name)
    text = str(recipe)
    path = Path(os.path.normpath((folder or Path()) / text))
    if "\0" not in text and (path.is_file() or isinstance(recipe, Path) or text.endswith(_SUFFIXES)):
        if path.is_dir():
            raise RecipeError(f"{path}: a folder; give a YAML file in it")
        if not path.is_file():
            beside = [entry.name for entry in path.parent.glob("*") if entry.suffix in _SUFFIXES]
            raise RecipeError(f"{path}: no such file{near_misses(path.name, beside)}")
        return _Origin(path, str(path))
    raise RecipeError(
        f"no recipe is called {text!r}; expected one of {', '.join(shipped)} or a .yaml file"
        + near_misses(text, shipped)
    )


def _parse(origin: _Origin) -> _Parsed:
    try:
        content = origin.file.read_bytes()
    except OSError as error:
        raise RecipeError(f"{origin.label}: cannot be read: {error.strerror or error}") from None
    if len(content) > _MOST_BYTES:
        raise RecipeError(f"{origin.label}: {len(content):,} bytes; no recipe is that long")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{origin.label}:{line}:1: not UTF-8: byte 0x{content[error.start]:02x}") from None
    source = parse_yaml(text, origin.label)
    return source, read_file(source)


def _resolve(parsed: _Parsed, chain: tuple[_Origin, ...]) -> Recipe:
    """The recipe that ends `chain`, a way from child to parent, with the rules of all that it extends after its own."""
    source, file = parsed
    own = chain[-1]
    keep, swap = list(file.keep_rules(source)), list(file.swap_rules(source))
    delegate = [_located(part, own.folder) for part in file.delegates(source)]
    finetune = file.finetune
    for index, name in enumerate(file.extends):
        place: KeyPath = ("extends", index) if isinstance(source.data["extends"], list) else ("extends",)
        try:
            parent = _find(name, own.folder)
        except RecipeError as error:
            raise source.error(place, str(error)) from None
        if any(parent.is_same(origin) for origin in chain):
            first = next(position for position, origin in enumerate(chain) if parent.is_same(origin))
            circle = " -> ".join(origin.file.name for origin in (*chain[first:], parent))
            raise source.error(place, f"a recipe cannot extend itself: {circle}")
        inherited = _resolve(_parse(parent), (*chain, parent))
        # A recipe that two parents extend gives its rules once.
        keep += [rule for rule in inherited.keep if rule not in keep]
        swap += [rule for rule in inherited.swap if rule not in swap]
        delegate += [part for part in inherited.delegate if part not in delegate]
        finetune = finetune.over(inherited.finetune)
    return Recipe(
        own.name,
        file.description,
        file.match,
        tuple(keep),
        tuple(swap),
        tuple(delegate),
        file.figures,
        finetune,
    )


def _located(part: Delegate, folder: Path | None) -> Delegate:
    """A delegate whose recipe can be loaded from anywhere."""
    if part.recipe == "auto":
        return part
    try:
        origin = _find(part.recipe, folder)
    except RecipeError as error:
        raise RecipeError(f"{part.place}: {error}") from None
    return part if part.recipe in shipped_recipes() else replace(part, recipe=origin.label)

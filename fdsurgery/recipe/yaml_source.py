"""YAML text as plain data in which every key and value knows its line.

Only plain scalars, lists and mappings are read: no tags, no merge keys. What is written by mistake or in bad faith
(duplicate keys, aliases that multiply, anchors that hold themselves) is an error with a line and a column.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import RecipeError

KeyPath = tuple[str | int, ...]
"""Keys and list positions that lead to a value, e.g. `("swap", 0, "where")`."""

_MOST_NODES = 10_000
_MOST_LEVELS = 50
_TAG = "tag:yaml.org,2002:"
_SCALARS = {_TAG + name for name in ("str", "int", "float", "bool", "null")}
# YAML 1.1 reads `2024-01-01` as a date and `=` as a value of its own; to us they are text.
_TEXTS = {_TAG + name for name in ("timestamp", "value")}


@dataclass(frozen=True)
class YamlSource:
    """A YAML document: its data, and where in the file each part of it stands."""

    file: str
    data: Any
    places: dict[KeyPath, tuple[int, int]] = field(default_factory=dict, repr=False)
    """Line and column, from 1, of the key (or of the list entry) at each path."""

    def line(self, path: KeyPath) -> int:
        """Line of the innermost part of `path` that the file has."""
        return self._place(path)[1][0]

    def error(self, path: KeyPath, message: str) -> RecipeError:
        """A `RecipeError` that begins with `file:line:column: keys:`."""
        return RecipeError(f"{self.place_of(path)}: {message}")

    def place_of(self, path: KeyPath) -> str:
        """The innermost part of `path` that the file has, as `file:line:column: keys`."""
        found, (line, column) = self._place(path)
        return f"{self.file}:{line}:{column}" + (f": {key_text(found)}" if found else "")

    def _place(self, path: KeyPath) -> tuple[KeyPath, tuple[int, int]]:
        while path and path not in self.places:
            path = path[:-1]
        return path, self.places.get(path, (1, 1))


def key_text(path: KeyPath) -> str:
    """A path as people write it: `swap[0].where`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def parse_yaml(text: str, file: str) -> YamlSource:
    """Read one YAML document.

    Args:
        text: the document.
        file: what errors call it.

    Raises:
        RecipeError: the text is no YAML, or holds what a recipe has no use for; begins with `file:line:column:`.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.line + 1}:{mark.column + 1}" if mark is not None else "1:1"
        what = error.problem or error.context or "not YAML"
        if isinstance(error, yaml.composer.ComposerError) and "single document" in str(error.context):
            what = "a second document begins here; a recipe is one document"
        raise RecipeError(f"{file}:{where}: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{file}:{line}:1: the character {error.character!r} is not allowed in YAML") from None
    except (RecursionError, ValueError):
        raise RecipeError(f"{file}:1:1: nested too deeply, or not YAML") from None
    source = YamlSource(file, None)
    if node is None:
        raise source.error((), "the file is empty; a recipe needs at least `swap:` or `extends:`")
    reader = _Reader(source)
    return YamlSource(file, reader.value(node, (), []), source.places)


class _Reader:
    def __init__(self, source: YamlSource) -> None:
        self.source = source
        self.nodes = 0
        self.scalars = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, path: KeyPath, above: list[yaml.Node]) -> Any:
        self.source.places.setdefault(path, _place(node))
        self.nodes += 1
        if self.nodes > _MOST_NODES:
            raise self.source.error(path, f"more than {_MOST_NODES} values; do aliases multiply here?")
        if len(above) > _MOST_LEVELS:
            raise self.source.error(path, f"nested more than {_MOST_LEVELS} levels deep")
        if any(node is outer for outer in above):
            raise self.source.error(path, "this anchor holds itself")
        inner = [*above, node]
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.value(entry, (*path, index), inner) for index, entry in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self.mapping(node, path, inner)
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _TEXTS:
                return node.value
            if node.tag in _SCALARS:
                try:
                    return self.scalars.construct_object(node)
                except (ValueError, LookupError, yaml.YAMLError):
                    tag = node.tag.removeprefix(_TAG)
                    raise self.source.error(path, f"{node.value[:40]!r} is no {tag}") from None
        if node.tag == _TAG + "merge":
            raise self.source.error(path, "merge keys (<<) are not read; share rules with `extends`")
        raise self.source.error(path, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed; recipes are plain data")

    def mapping(self, node: yaml.MappingNode, path: KeyPath, above: list[yaml.Node]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        unread = (*path, "?")
        for key_node, value_node in node.value:
            key = self.value(key_node, unread, above)
            self.source.places[unread] = _place(key_node)
            if not isinstance(key, str):
                raise self.source.error(unread, f"keys are text, not {key!r}")
            here = (*path, key)
            if key in data:
                first = self.source.line(here)
                self.source.places[here] = _place(key_node)
                raise self.source.error(here, f"{key!r} is here twice; the first is on line {first}")
            self.source.places[here] = _place(key_node)
            data[key] = self.value(value_node, here, above)
        return data


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1

"""YAML text as plain data in which every key and value knows its line.

Only plain scalars, lists and mappings are read: no tags, no merge keys. What is written by mistake or in bad faith
(duplicate keys, aliases that multiply, anchors that hold themselves) is an error with a line and a column. So is a
scalar that YAML 1.1, YAML 1.2 and the eye of the reader take for different things, such as `010`, `1:30` or `yes`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..errors import RecipeError

KeyPath = tuple[str | int, ...]
"""Keys and list positions that lead to a value, e.g. `("swap", 0, "where")`."""

_MOST_NODES = 10_000
_MOST_LEVELS = 50
_MOST_DIGITS = 100
_TAG = "tag:yaml.org,2002:"
_PLAIN = "a scalar without quotes"
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

_UNDERSCORED = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9_]+)?")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_OTHER_BASE = re.compile(r"[-+]?0([xX][0-9a-fA-F_]+|[oO][0-7_]+|[bB][01_]+)")
_YES_OR_NO = {
    **dict.fromkeys(("yes", "on", "y"), "true"),
    **dict.fromkeys(("no", "off", "n"), "false"),
}


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
        node = yaml.compose(text, Loader=_Composer)
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


class _Composer(yaml.SafeLoader):
    """Marks scalars without quotes as such, where the parent would guess their type by the rules of YAML 1.1."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return super().resolve(kind, value, implicit)


def _plain_value(text: str) -> Any:
    """What is meant by a scalar without quotes. Raises `ValueError`, with what to write, where that is not clear."""
    if text in _WORDS:
        return _WORDS[text]
    quoted = f'"{text}"'
    if _LEADING_ZERO.fullmatch(text):
        sign, digits = text[:1].strip("+0123456789"), text.lstrip("+-0") or "0"
        raise ValueError(
            f"{_short(text)} is octal in YAML 1.1 and decimal in YAML 1.2; write {_short(sign + digits)}, or "
            f"{_short(quoted)} if it is text"
        )
    if _WHOLE.fullmatch(text):
        if len(text) > _MOST_DIGITS:
            raise ValueError(f"{_short(text)} has {len(text)} digits; no number here has more than {_MOST_DIGITS}")
        return int(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if _SEXAGESIMAL.fullmatch(text):
        raise ValueError(f"{_short(text)} is a number of base 60 in YAML 1.1; write {_short(quoted)} if it is text")
    if _OTHER_BASE.fullmatch(text) or _UNDERSCORED.fullmatch(text):
        raise ValueError(
            f"{_short(text)} is a number in one release of YAML and text in another; write it in plain decimal digits, "
            f"or {_short(quoted)} if it is text"
        )
    if text.lower() in _YES_OR_NO:
        raise ValueError(
            f"{text} is a truth value in YAML 1.1 and text in YAML 1.2; write {_YES_OR_NO[text.lower()]}, or {quoted} "
            "if it is text"
        )
    return text


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


class _Reader:
    def __init__(self, source: YamlSource) -> None:
        self.source = source
        self.nodes = 0

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
        if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "str":
            return node.value
        if isinstance(node, yaml.ScalarNode) and node.tag == _PLAIN:
            if node.value == "<<":
                raise self.source.error(path, "merge keys (<<) are not read; share rules with `extends`")
            try:
                return _plain_value(node.value)
            except ValueError as error:
                raise self.source.error(path, str(error)) from None
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

"""Which sites a rule means: the keys of `where`, how each is written, and how a site meets it."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from ..discovery.kinds import KINDS
from ..discovery.site import ROLES, Site
from ..errors import near_misses

_KINDS = tuple(kind.name for kind in KINDS)
_FFN = "ffn"
"""Stands for the roles expand, gate and project."""


def one_of(*words: str) -> BeforeValidator:
    """A word, or a list of words, each one of `words`."""

    def read(value: Any) -> tuple[str, ...]:
        found = tuple(_listed(value))
        for word in found:
            if word not in words:
                raise ValueError(f"{word!r} is none of {', '.join(words)}{near_misses(str(word), words)}")
        return found

    return BeforeValidator(read)


def _read_patterns(value: Any) -> tuple[str, ...]:
    found = tuple(_listed(value))
    for pattern in found:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(
                f"expected a glob such as 'layer4.*', or a regular expression after 're:', not {pattern!r}"
            )
        try:
            _compiled(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return found


def _read_sizes(value: Any) -> tuple[tuple[int, int], ...]:
    return tuple(_read_size(entry) for entry in _listed(value))


def _read_size(value: Any) -> tuple[int, int]:
    if _is_whole(value) and value >= 1:
        return (value, value)
    match = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"expected a number such as 3 (for 3x3) or text such as '1x7', not {value!r}")
    return (int(match[1]), int(match[2]))


def _read_range(value: Any) -> tuple[int | None, int | None]:
    bounds = {"min": value, "max": value} if _is_whole(value) else value
    known = isinstance(bounds, dict) and bounds and bounds.keys() <= {"min", "max"}
    if not known or not all(_is_whole(bound) and bound >= 0 for bound in bounds.values()):
        raise ValueError(f"expected a number, or {{min: 17}}, {{max: 512}} or both, not {value!r}")
    low, high = bounds.get("min"), bounds.get("max")
    if low is not None and high is not None and low > high:
        raise ValueError(f"min {low} is above max {high}")
    return low, high


def _one_or_more(entry: dict[str, Any]) -> WithJsonSchema:
    """What an editor is told of a key that takes a value or a list of them."""
    return WithJsonSchema({"anyOf": [entry, {"type": "array", "items": entry, "minItems": 1}]})


_NUMBER = {"type": "integer", "minimum": 0}
_SIZE = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[1-9][0-9]*x[1-9][0-9]*$"}]}
_BOUNDS = {
    "type": "object",
    "properties": {"min": _NUMBER, "max": _NUMBER},
    "additionalProperties": False,
    "minProperties": 1,
}

Kinds = Annotated[tuple[str, ...], one_of(*_KINDS), _one_or_more({"enum": [*_KINDS]})]
Roles = Annotated[tuple[str, ...], one_of(*ROLES, _FFN), _one_or_more({"enum": [*ROLES, _FFN]})]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_read_patterns), _one_or_more({"type": "string", "minLength": 1})]
Sizes = Annotated[tuple[tuple[int, int], ...], BeforeValidator(_read_sizes), _one_or_more(_SIZE)]
Range = Annotated[
    tuple[int | None, int | None], BeforeValidator(_read_range), WithJsonSchema({"anyOf": [_NUMBER, _BOUNDS]})
]


class Where(BaseModel):
    """A condition on sites: all keys that are given must hold; of a list, any entry.

    Patterns are globs, in which `*` also matches dots, or regular expressions for the whole name after `re:`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True)

    kind: Kinds | None = None
    """`conv` or `linear`."""
    role: Roles | None = None
    """What the data flow shows the layer to be for; `ffn` is short for expand, gate and project."""
    name: Patterns | None = None
    """Pattern for the layer's fully qualified name, or for an alias of it."""
    kernel_size: Sizes | None = None
    """`3` for 3x3, `"1x7"` for height by width. Convolutions only."""
    channels: Range | None = None
    """Both `in_channels` and `out_channels`: a number, or `{min: 17, max: 512}`."""
    in_channels: Range | None = None
    """Input channels, or a linear layer's input features."""
    out_channels: Range | None = None
    """Output channels, or a linear layer's output features."""
    stride: Sizes | None = None
    """As `kernel_size`. Convolutions only."""
    groups: Range | None = None
    """As `channels`. Convolutions only."""
    parent: Patterns | None = None
    """Pattern for the class name of the module that holds the layer, e.g. `Bottleneck`."""
    layer: Patterns | None = None
    """Pattern for the class name of the layer itself, e.g. `Conv2dSame`."""

    def given(self) -> dict[str, Any]:
        """The conditions that are set."""
        return {key: value for key in CONDITIONS if (value := getattr(self, key)) is not None}

    def matches(self, site: Site) -> bool:
        """True if the site meets every condition."""
        return all(CONDITIONS[key](value, site) for key, value in self.given().items())

    def describe(self) -> str:
        """The conditions in words, e.g. `role spatial or pointwise, kernel_size 3x3`."""
        return ", ".join(f"{key} {_words(key, value)}" for key, value in self.given().items())

    def nearest(self, sites: Sequence[Site], most: int = 3) -> str:
        """What comes closest when no site matches, e.g. `'layer1.0.conv2', whose kernel_size is 3x3`."""

        def distance(site: Site) -> tuple[int, float]:
            unlike = 0.0
            if self.name is not None and not _name(self.name, site):
                unlike = 1 - max(difflib.SequenceMatcher(None, name, site.name).ratio() for name in self.name)
            return len(self.misses(site)), unlike

        return "; ".join(
            f"{site.name!r}, whose {' and '.join(f'{key} is {has}' for key, has in self.misses(site).items())}"
            if list(self.misses(site)) != ["name"]
            else repr(site.name)
            for site in sorted(sites, key=distance)[:most]
        )

    def misses(self, site: Site) -> dict[str, str]:
        """The conditions that a site does not meet, and what it has instead."""
        return {key: _has(key, site) for key, value in self.given().items() if not CONDITIONS[key](value, site)}


def matches_any(patterns: Sequence[str], text: str) -> bool:
    """True if one of the globs or `re:` patterns matches all of `text`."""
    return any(_compiled(pattern).fullmatch(text) for pattern in patterns)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))


def _name(patterns: Sequence[str], site: Site) -> bool:
    return any(matches_any(patterns, name) for name in (site.name, *site.aliases))


def _within(bounds: tuple[int | None, int | None], *numbers: int) -> bool:
    low, high = bounds
    return all((low is None or number >= low) and (high is None or number <= high) for number in numbers)


CONDITIONS: dict[str, Callable[[Any, Site], bool]] = {
    "kind": lambda kinds, site: site.kind in kinds,
    "role": lambda roles, site: site.role in roles or (_FFN in roles and site.in_ffn),
    "name": _name,
    "kernel_size": lambda sizes, site: site.convolves and site.kernel_size in sizes,
    "channels": lambda bounds, site: _within(bounds, site.in_channels, site.out_channels),
    "in_channels": lambda bounds, site: _within(bounds, site.in_channels),
    "out_channels": lambda bounds, site: _within(bounds, site.out_channels),
    "stride": lambda sizes, site: site.convolves and site.stride in sizes,
    "groups": lambda bounds, site: site.convolves and _within(bounds, site.groups),
    "parent": lambda patterns, site: matches_any(patterns, site.parent_class),
    "layer": lambda patterns, site: matches_any(patterns, site.layer_class),
}


def _has(key: str, site: Site) -> str:
    """What a site has for the key of a condition."""
    if not site.convolves and key in ("kernel_size", "stride", "groups"):
        return f"none (it is a {site.kind})"
    if key == "channels":
        return f"{site.in_channels} to {site.out_channels}"
    value = getattr(site, {"parent": "parent_class", "layer": "layer_class"}.get(key, key))
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _words(key: str, value: Any) -> str:
    if key in ("kernel_size", "stride"):
        return " or ".join(f"{height}x{width}" for height, width in value)
    if key in ("channels", "in_channels", "out_channels", "groups"):
        low, high = value
        if low == high:
            return str(low)
        return f"from {low}" if high is None else f"up to {high}" if low is None else f"{low} to {high}"
    return " or ".join(value)


def _listed(value: Any) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("the list is empty; leave the key out if it does not matter")
        return value
    return [value]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

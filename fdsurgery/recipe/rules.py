"""A recipe, ready to decide: rules that know where they were written, and whether they mean any site at all.

The entries of a recipe file are checked by the same classes (see `schema`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, RootModel, TypeAdapter, ValidationError

from ..discovery.site import Site
from ..errors import RecipeError, no_such_key
from ..integrations import match_keys
from .conditions import Patterns, Where

R = TypeVar("R", bound="Rule")


class Entry(BaseModel):
    """A part of a recipe file: a mapping with these keys and no others."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, defer_build=True
    )  # deferred: most of what importing this module would take


@dataclass(frozen=True)
class Place:
    """Where in a file something is written."""

    file: str = ""
    line: int = 0
    column: int = 0
    key: str = ""
    """Which entry of the file it is, e.g. `swap[0]`."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.key}"


class Rule(BaseModel):
    """What the entries of `keep` and `swap` share."""

    _place: Place = PrivateAttr(default=Place())

    @property
    def place(self) -> Place:
        """Where the rule is written."""
        return self._place

    @property
    def key(self) -> str:
        """Which entry of its file the rule is, e.g. `swap[0]`."""
        return self._place.key

    @property
    def label(self) -> str:
        """Where the rule is written: `file:line`."""
        return f"{self._place.file}:{self._place.line}"

    def at(self: R, place: Place) -> R:
        """The same rule, written in another place."""
        rule = self.model_copy()
        rule._place = place
        return rule


class KeepRule(Rule, Where):
    """An entry of `keep`: conditions and the reason."""

    because: Annotated[str, Field(min_length=1)]
    """The reason, shown in the plan."""
    optional: bool = False
    """The rule may match no layer."""

    @property
    def where(self) -> Where:
        """Which layers: a keep rule is its own condition."""
        return self


class SwapRule(Rule, Entry):
    """An entry of `swap`."""

    where: Where
    """Which layers."""
    operator: str = "fdconv"
    """What takes their place."""
    settings: dict[str, Any] = Field(default_factory=dict, alias="with")
    """Settings of the operator; the rest are its defaults."""
    anyway: bool = False
    """Swap also where that changes what the model means, such as in a causal decoder; see "What is kept, and why"."""
    optional: bool = False
    """The rule may match no layer."""

    def matches(self, site: Site) -> bool:
        """True if the rule means this site."""
        return self.where.matches(site)

    def describe(self) -> str:
        """The rule's conditions in words."""
        return self.where.describe()


def _library(name: Any) -> Any:
    if name not in match_keys():
        raise ValueError(no_such_key(str(name), match_keys()))
    return name


class Match(RootModel[dict[Annotated[str, BeforeValidator(_library)], Patterns]]):
    """How models of the family are recognised.

    Globs for what a library calls the family, by the library's name: `match["timm"]`, or `match.timm`.
    """

    model_config = ConfigDict(frozen=True)
    root: dict[Annotated[str, BeforeValidator(_library)], Patterns] = Field(default_factory=dict)

    def __getitem__(self, library: str) -> tuple[str, ...]:
        return self.root.get(library, ())

    def __getattr__(self, library: str) -> tuple[str, ...]:
        if library not in match_keys():
            raise AttributeError(f"recipes are matched by {', '.join(match_keys())}, not by {library!r}")
        return self[library]

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        patterns = TypeAdapter(Patterns).json_schema()
        return {
            "additionalProperties": False,
            "description": "How models of the family are recognised.",
            "properties": {name: {**patterns, "description": f"Globs for {of}."} for name, of in match_keys().items()},
            "type": "object",
        }


@dataclass(frozen=True)
class Delegate:
    """Parts of a composite model that another recipe decides, such as a detector's backbone."""

    module: str
    """Pattern for the part's fully qualified name."""
    recipe: str
    """A recipe's name or file, or `auto` to recognise the part."""
    place: str
    """Where it stands: `file:line:column: key`."""


class Figures(Entry):
    """What the recipe does to one model."""

    model: str
    """The model's SPEC, e.g. `timm:resnet50`."""
    swaps: int
    """Layers swapped."""
    parameters_added: int
    """Parameters gained."""
    multiply_adds: int
    """Of the swapped layers while they were plain, for one image of the model's native size."""


class FineTune(Entry):
    """How to train what the recipe converts."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of the learning rate from each layer to the one before it; 1 where no recipe says."""

    def over(self, inherited: FineTune) -> FineTune:
        """What this one says, and where it does not, what another one says."""
        return inherited.model_copy(update=self.to_dict())

    def to_dict(self) -> dict[str, float]:
        """What it says, as plain JSON types."""
        return self.model_dump(exclude_none=True)

    @staticmethod
    def from_dict(data: Any) -> FineTune:
        """Undo `to_dict`. Keys of other versions, which say how to train and not what a model is, are passed over.

        Raises:
            ValueError: it is no mapping, or a value is out of range.
        """
        if not isinstance(data, dict):
            raise ValueError("'finetune' must be a mapping")
        decay = data.get("layer_decay")
        try:
            return FineTune(layer_decay=decay)
        except ValidationError:
            raise ValueError(f"layer_decay must be above 0 and at most 1, not {decay!r}") from None


@dataclass(frozen=True)
class Recipe:
    """Rules for a family of models, inherited ones included. Made by `load_recipe`.

    Examples:
        >>> import fdsurgery
        >>> recipe = fdsurgery.load_recipe("resnet")
        >>> for rule in recipe.keep[:2]:
        ...     print(f"{rule.where.describe()}: {rule.because} ({rule.label})")
        role stem: the paper keeps the stem (resnet.yaml:12)
        name conv1.* or stem.*: part of a stem of several layers (resnet.yaml:13)
    """

    name: str
    description: str = ""
    match: Match = field(default_factory=Match)
    keep: tuple[KeepRule, ...] = ()
    swap: tuple[SwapRule, ...] = ()
    delegate: tuple[Delegate, ...] = ()
    figures: tuple[Figures, ...] = ()
    finetune: FineTune = field(default_factory=FineTune)

    @property
    def rules(self) -> tuple[KeepRule | SwapRule, ...]:
        """All rules, in the order in which a site asks them."""
        return (*self.keep, *self.swap)


def check_rules_matched(recipe: Recipe, sites: Sequence[Site]) -> None:
    """Raise `RecipeError`, with the nearest sites, for a rule that matches none and is not optional."""
    for rule in recipe.rules:
        if rule.optional or any(rule.matches(site) for site in sites):
            continue
        nearest = rule.where.nearest(sites)
        raise RecipeError(
            f"{rule.place}: no site of this model has {rule.where.describe()}; "
            + (f"nearest: {nearest}; " if nearest else "the model has no convolution or linear layer; ")
            + "correct the rule, or give it `optional: true`"
        )

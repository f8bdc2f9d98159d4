"""A recipe, ready to decide: rules that know where they were written, and whether they mean any site at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..discovery.site import Site
from ..errors import RecipeError
from .conditions import Where


@dataclass(frozen=True)
class _Rule:
    where: Where
    file: str
    line: int
    column: int
    key: str
    """Which entry of the file it is, e.g. `swap[0]`."""
    optional: bool
    """True if it may match no site."""

    @property
    def label(self) -> str:
        """Where the rule stands: `file:line`."""
        return f"{self.file}:{self.line}"

    def matches(self, site: Site) -> bool:
        """True if the rule means this site."""
        return self.where.matches(site)


@dataclass(frozen=True)
class KeepRule(_Rule):
    """Sites that stay as they are. Wins over every swap rule."""

    because: str
    """The reason, shown in the plan."""


@dataclass(frozen=True)
class SwapRule(_Rule):
    """Sites to swap, unless a keep rule or an earlier swap rule means them too."""

    operator: str
    """Name of the operator, e.g. `fdconv`."""
    settings: dict[str, Any]
    """What the rule's `with` says."""
    anyway: bool = False
    """True to swap also where that changes what the model means."""

    def describe(self) -> str:
        """The rule's conditions in words."""
        return self.where.describe()


@dataclass(frozen=True)
class Match:
    """Models that a recipe is for, as globs."""

    timm: tuple[str, ...] = ()
    """Architectures, e.g. `convnext*`."""
    transformers: tuple[str, ...] = ()
    """Values of `config.model_type`, e.g. `convnextv2`."""
    torchvision: tuple[str, ...] = ()
    """Model classes, e.g. `ConvNeXt`."""


@dataclass(frozen=True)
class Delegate:
    """Parts of a composite model that another recipe decides, such as a detector's backbone."""

    module: str
    """Pattern for the part's fully qualified name."""
    recipe: str
    """A recipe's name or file, or `auto` to recognise the part."""
    place: str
    """Where it stands: `file:line:column: key`."""


@dataclass(frozen=True)
class Figures:
    """What the recipe does to one model; checked by the tests for the shipped recipes."""

    model: str
    """SPEC of the model."""
    swaps: int
    parameters_added: int
    multiply_adds: int
    """Of the swapped layers while they were plain, for one image of the model's native size."""


@dataclass(frozen=True)
class FineTune:
    """How to train what the recipe converts; see `fdsurgery.param_groups`. None where it does not say."""

    layer_decay: float | None = None
    """Factor of the learning rate from each layer to the one before it."""

    def __post_init__(self) -> None:
        decay = self.layer_decay
        if decay is not None and not (isinstance(decay, (int, float)) and 0 < decay <= 1):
            raise ValueError(f"layer_decay must be above 0 and at most 1, not {decay!r}")

    def over(self, inherited: FineTune) -> FineTune:
        """What this one says, and where it does not, what another one says."""
        return replace(inherited, **self.to_dict())

    def to_dict(self) -> dict[str, float]:
        """What it says, as plain JSON types."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @staticmethod
    def from_dict(data: Any) -> FineTune:
        """Undo `to_dict`. Keys of other versions, which say how to train and not what a model is, are passed over.

        Raises:
            TypeError, ValueError: it is no mapping, or a value is out of range.
        """
        if not isinstance(data, dict):
            raise TypeError("'finetune' must be a mapping")
        return FineTune(data.get("layer_decay"))


@dataclass(frozen=True)
class Recipe:
    """Rules for a family of models, inherited ones included. Made by `load_recipe`."""

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
            f"{rule.file}:{rule.line}:{rule.column}: {rule.key}: no site of this model has {rule.where.describe()}; "
            + (f"nearest: {nearest}; " if nearest else "the model has no convolution or linear layer; ")
            + "correct the rule, or give it `optional: true`"
        )

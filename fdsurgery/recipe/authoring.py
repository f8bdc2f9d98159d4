"""For the authors of recipes: a first draft from what discovery found, and why a rule does or does not mean a site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..discovery.site import Site
from ..integrations import family_of
from .rules import KeepRule, Recipe, SwapRule

if TYPE_CHECKING:
    from ..plan import Decision, Plan

MODELINE = "# yaml-language-server: $schema=recipe.schema.json"
"""Makes editors check and complete a recipe; the schema is what `fdsurgery recipes schema` prints."""

_KEPT = {
    "stem": "it reads the image, and costs the most for the least",
    "shortcut": "it only changes the shape of what it passes on",
    "head": "a new task replaces it",
}
_SWAPPED = {
    "spatial": "convolutions larger than 1x1",
    "pointwise": "1x1 convolutions outside every FFN",
    "depthwise": "one filter a channel: cheap to keep, and the modulation outweighs the weight",
    "ffn": "FFN layers: expand, gate and project",
}


@dataclass(frozen=True)
class Verdict:
    """What one rule says of one site."""

    rule: KeepRule | SwapRule
    misses: dict[str, str]
    """The rule's conditions that the site does not meet, and what it has instead; empty if the rule means it."""
    decides: bool
    """True for the one rule that decided."""


def explain(recipe: Recipe, decision: Decision) -> Iterator[Verdict]:
    """What each rule of a recipe says of a site, in the order in which they are asked, and which one the plan names."""
    open_ = True
    for rule in recipe.rules:
        misses = rule.where.misses(decision.site)
        decides = open_ and not misses and rule.label == decision.rule
        yield Verdict(rule, misses, decides)
        open_ = open_ and not decides


def rule_matches(recipe: Recipe, plan: Plan) -> Iterator[tuple[KeepRule | SwapRule, int, int]]:
    """For each rule: how many sites it means, and how many of them it decides in a plan by this recipe."""
    matched: Counter[int] = Counter()
    decided: Counter[int] = Counter()
    for decision in plan.decisions:
        for position, verdict in enumerate(explain(recipe, decision)):
            matched[position] += not verdict.misses
            decided[position] += verdict.decides
    for position, rule in enumerate(recipe.rules):
        yield rule, matched[position], decided[position]


def draft(model: nn.Module, sites: Sequence[Site]) -> str:
    """A first recipe for a model, as YAML with comments: one rule for each role that its layers have.

    Args:
        model: the model; its library and name become `match`.
        sites: what `fdsurgery.sites` found in it.

    Returns:
        The text of a recipe that plans without an error for this model. Depthwise convolutions are commented out.
    """
    roles: dict[str, list[Site]] = {}
    for site in sites:
        roles.setdefault("ffn" if site.in_ffn else site.role, []).append(site)
    library, name = family_of(model)
    lines = [MODELINE, f"description: A first draft for {name or type(model).__name__}."]
    if library:
        lines += ["", "match:", f'  {library}: ["{name}"]']
    keeps = [role for role in _KEPT if role in roles]
    if keeps:
        lines += ["", "keep:"]
    for role in keeps:
        lines += [f'  - {{role: {role}, because: "{_KEPT[role]}"}}  # {_examples(roles[role])}']
    swaps = [role for role in _SWAPPED if role in roles]
    if swaps:
        lines += ["", "swap:" if any(role != "depthwise" for role in swaps) else "swap: []"]
    for role in swaps:
        free = sum(site.obstacle is None and site.caution is None for site in roles[role])
        stay = f", of which {len(roles[role]) - free} stay for reasons of their own" if free < len(roles[role]) else ""
        lines += [f"  # {_SWAPPED[role]}: {_examples(roles[role])}{stay}"]
        lines += [f"  {'# ' if role == 'depthwise' else ''}- where: {{role: {role}}}"]
    if "linear" in roles:
        lines += ["", f"# Linear layers outside every FFN stay: {_examples(roles['linear'])}"]
    return "\n".join(lines) + "\n"


def _examples(sites: Sequence[Site]) -> str:
    names = ", ".join(site.name for site in sites[:2])
    return f"{len(sites)}, such as {names}" if len(sites) > 2 else names

"""Recipe times sites gives a plan: for every site, swap (by which rule) or keep (why). Nothing is touched here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .discovery.effective import same_padding
from .discovery.kinds import kind_named
from .discovery.observe import Observation, observe
from .discovery.site import Site
from .errors import RecipeError, near_misses
from .integrations import network_of
from .operators import Operator, Wanted, build_layers, get_operator
from .plan import Decision, Plan, plain_twin, resolved
from .recipe import Recipe, SwapRule, check_rules_matched, detect_recipe, load_recipe, matches_any
from .rewrite.check_model import refuse_unsupported
from .surroundings import undisturbed


@undisturbed()
def plan(
    model: nn.Module,
    recipe: str | Path | Recipe = "auto",
    *,
    example_inputs: Any = None,
    operator: str | None = None,
    **settings: Any,
) -> Plan:
    """Decide for every site of a model whether to swap it. The model is not touched.

    Args:
        model: any vision model. It is observed in one forward of a copy, on meta tensors if that works. Of Ultralytics'
            `YOLO(...)`, the network that it holds.
        recipe: `auto` to recognise the family (else `generic`), a shipped recipe's name, a YAML file, or a `Recipe`.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments for one forward; needed
            only where they cannot be told from the model.
        operator: takes the place of the operator of every rule, whose `with` then counts no more, e.g. `odconv`.
        **settings: of the operator; they win over every rule's `with`, e.g. `kernel_num=16`.

    Returns:
        The plan; `print` shows it as a table, `apply` carries it out.

    Raises:
        RecipeError: the recipe is broken, a rule of it matches no site, there is no such operator, or none that
            has such a setting.
        DiscoveryError: the model could not be run; pass `example_inputs`.
        UnsupportedModelError: the model is wrapped, compiled, quantised or scripted.

    Examples:
        >>> import timm, fdsurgery
        >>> plan = fdsurgery.plan(timm.create_model("test_resnet"), kernel_num=16)
        >>> print(plan.summary())
        ResNet: 9 of 16 sites swapped, +65,558 parameters, +31.20 M multiply-adds a sample (+30% of 102.55 M)
        (recipe resnet: recognised as timm test_resnet)
    """
    return plan_and_observation(model, recipe, example_inputs, Overrides(settings, operator))[0]


@dataclass(frozen=True)
class Overrides:
    """What the caller says over the rules of a recipe."""

    settings: dict[str, Any]
    operator: str | None = None
    for_trained: bool = False
    """Trained layers will be loaded, so it does not matter how fresh ones would start."""

    def check(self, operators: Iterable[Operator]) -> None:
        """Raise `RecipeError` for a setting that none of the operators has."""
        asked = list(operators)
        known = {key for operator in asked for key in operator.settings({})}
        for key, value in self.settings.items():
            if key not in known:
                for operator in asked:
                    operator.settings({key: value})

    def settings_for(self, rule: SwapRule) -> tuple[Operator, dict[str, Any]]:
        """The operator that takes the sites of a rule, and its settings, complete."""
        operator = get_operator(self.operator or rule.operator)
        own = rule.settings if operator.name == rule.operator else {}
        known = operator.settings({})
        return operator, operator.settings(
            {**own, **{key: value for key, value in self.settings.items() if key in known}}
        )


def plan_and_observation(
    model: nn.Module,
    recipe: str | Path | Recipe,
    example_inputs: Any,
    overrides: Overrides,
) -> tuple[Plan, Observation]:
    """What `plan` says, and what it saw."""
    model = network_of(model)
    refuse_unsupported(model)
    name, recognised = str(recipe), "named by the caller"
    if recipe == "auto":
        name, recognised = detect_recipe(model)
    if isinstance(recipe, Recipe):
        chosen, name = recipe, recipe.name
    else:
        chosen = load_recipe(name if recipe == "auto" else recipe)
        name = chosen.name
    # Before the model is run: what is wrong should not take a forward to be told.
    asked = [overrides.settings_for(rule)[0] for rule in chosen.swap]
    if not chosen.delegate:
        overrides.check(asked)
    seen = observe(model, example_inputs)
    decisions = _decide_all(model, chosen, seen.sites, overrides)
    overrides.check([*asked, *(get_operator(str(one.operator)) for one in decisions if one.swap)])
    decisions = _with_costs(resolved(decisions), model, seen)
    left_out = dict(seen.left_out)
    made = Plan(
        name, recognised, type(model).__name__, seen.tracer, decisions, left_out, chosen.finetune, example_inputs
    )
    return made, seen


def why_nothing(plan: Plan) -> str:
    """The reasons for which a plan keeps its sites, most frequent first."""
    if not plan.decisions:
        return "the model has neither Conv2d nor Linear layers"
    tally = Counter(decision.reason for decision in plan.kept)
    return "; ".join(f"{count} x {reason}" for reason, count in tally.most_common(5))


def _decide_all(
    model: nn.Module, recipe: Recipe, sites: tuple[Site, ...], overrides: Overrides
) -> tuple[Decision, ...]:
    """A decision for every site: by the recipe's `keep`, then by the recipe of the part it lies in, then by `swap`."""
    delegated: dict[str, Decision] = {}
    for part in recipe.delegate:
        modules = dict(model.named_modules())
        roots = _outermost([name for name in modules if name and matches_any([part.module], name)])
        if not roots:
            raise RecipeError(f"{part.place}: this model has no such part{near_misses(part.module, modules)}")
        for root in roots:
            inside = {_relative(site, root): site for site in sites if site.name.startswith(root + ".")}
            name = detect_recipe(modules[root])[0] if part.recipe == "auto" else part.recipe
            for decision in _decide_all(modules[root], load_recipe(name), tuple(inside), overrides):
                site = inside[decision.site]
                delegated.setdefault(site.name, replace(decision, site=site))
    own = [site for site in sites if site.name not in delegated]
    check_rules_matched(replace(recipe, keep=()), own)
    check_rules_matched(replace(recipe, swap=()), sites)
    return tuple(_decide(site, recipe, overrides, delegated.get(site.name)) for site in sites)


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(other + ".") for other in names)]


def _relative(site: Site, root: str) -> Site:
    """The site as the part at `root` knows it."""
    names = [name.removeprefix(root + ".") for name in (site.name, *site.aliases) if name.startswith(root + ".")]
    return replace(site, name=names[0], aliases=tuple(names[1:]))


def _decide(site: Site, recipe: Recipe, overrides: Overrides, delegated: Decision | None) -> Decision:
    """Keep rules win over swap rules, and the first swap rule that matches wins over later ones."""
    if site.obstacle is not None:
        return Decision(site, site.obstacle)
    for keep in recipe.keep:
        if keep.matches(site):
            return Decision(site, keep.because, rule=keep.label)
    if delegated is not None:
        return delegated
    for swap in recipe.swap:
        if swap.matches(site):
            if site.caution is not None and not swap.anyway:
                return Decision(site, site.caution, rule=swap.label)
            operator, settings = overrides.settings_for(swap)
            refusal = (operator.refusal_of_trained if overrides.for_trained else operator.refusal)(site, settings)
            if refusal is not None:
                return Decision(site, refusal, rule=swap.label)
            told = f"{swap.describe()}; swapped anyway: {site.caution}" if site.caution else swap.describe()
            return Decision(site, told, swap.label, operator.name, settings)
    return Decision(site, "no rule asks for it")


def _with_costs(decisions: tuple[Decision, ...], model: nn.Module, seen: Observation) -> tuple[Decision, ...]:
    """The decisions, with what the swaps add, counted on twins of the new layers without memory."""
    swaps = {decision.site.name: decision for decision in decisions if decision.swap}
    layers = {name: model.get_submodule(name) for name in swaps}
    with torch.device("meta"):
        made = build_layers(
            Wanted(name, plain_twin(one.site, bias=layers[name].bias is not None), str(one.operator), one.settings)
            for name, one in swaps.items()
        )
    counted: set[nn.Parameter] = set()
    costed = {}
    for name, decision in swaps.items():
        own = set(made[name].parameters()) - counted  # what layers share counts once
        counted |= own
        costed[name] = replace(
            decision,
            parameters_added=sum(parameter.numel() for parameter in own) - _count(layers[name]),
            multiply_adds_by_component=_multiply_adds_added(decision, made[name], layers[name], seen),
        )
    return tuple(costed.get(decision.site.name, decision) for decision in decisions)


def _multiply_adds_added(decision: Decision, new: nn.Module, layer: nn.Module, seen: Observation) -> dict[str, int]:
    """By component and for one sample, over the calls of the layer that were seen."""
    site, operator = decision.site, get_operator(str(decision.operator))
    unbatched = kind_named(site.kind).sample_axes
    added: Counter[str] = Counter()
    for shape in filter(None, seen.input_shapes[site.name]):
        # What is a sample to the layer, and has a weight of its own, may be a part of one: a window, or a region.
        rows, sample = (1, shape) if len(shape) == unbatched else (shape[0], shape[1:])
        for component, count in operator.multiply_adds(new, _padded(sample, layer, site)).items():
            added[component] += rows * count
    return {component: count // seen.batch for component, count in added.items()}


def _padded(sample: tuple[int, ...], layer: Any, site: Site) -> tuple[int, ...]:
    """The shape that an input has once it is padded, for layers that begin with that."""
    if not site.pads_same:
        return sample
    channels, height, width = sample
    left, right, top, bottom = same_padding((height, width), layer)
    return channels, height + top + bottom, width + left + right


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""Recipe times sites gives a plan: for every site, swap (by which rule) or keep (why). Nothing is touched here."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from fdconv import FDConv2d, FDLinear, layer_cost

from .discovery.effective import same_padding
from .discovery.observe import Observation, observe
from .discovery.site import Site
from .discovery.trace import TracedBy
from .errors import PlanError, RecipeError, near_misses
from .integrations.ultralytics import network_of
from .operators import get_operator
from .recipe import FineTune, Recipe, check_rules_matched, detect_recipe, load_recipe, matches_any
from .rewrite.supported import refuse_unsupported
from .surroundings import undisturbed

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
"""Version of `Plan.to_dict`."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one site."""

    site: Site
    reason: str
    """Why it is kept, or which layers the rule that swaps it names, in words."""
    rule: str | None = None
    """The rule that decided, as `file:line`; None where no rule did."""
    operator: str | None = None
    """Name of the operator that takes the site; None to keep it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Complete settings of the operator."""
    parameters_added: int = 0
    """Number of parameters the layer gains."""
    multiply_adds_by_component: dict[str, int] = field(default_factory=dict)
    """Multiply-adds that the swap adds for one sample, at the sizes of the model's inputs, over all calls of the
    layer. The components are those of the operator; for fdconv see `fdconv.LayerCost`."""

    @property
    def multiply_adds_added(self) -> int:
        """Multiply-adds that the swap adds for one sample, in all."""
        return sum(self.multiply_adds_by_component.values())

    @property
    def swap(self) -> bool:
        """True if the site is to be swapped."""
        return self.operator is not None


def _as_saved(decision: Decision) -> Decision:
    """A decision that was read, with all the settings that it meant when it was saved."""
    if decision.operator is None:
        return decision
    return replace(decision, settings=get_operator(decision.operator).saved_settings(decision.settings))


@dataclass(frozen=True)
class Plan:
    """The decision for every site of a model. Printable, comparable, and savable as plain JSON types."""

    recipe: str
    """Name of the recipe."""
    recognised: str
    """How the recipe was chosen, in words."""
    model_class: str
    tracer: str
    """How the model was observed: in a forward recorded on `meta` tensors (no compute) or `real` ones, or in the graph
    of the tracer that was asked for."""
    decisions: tuple[Decision, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    """Layers that are no sites, since nothing can take their place (1-D, 3-D and transposed convolutions, ...): how
    many there are of each class."""
    finetune: FineTune = field(default_factory=FineTune)
    """How the recipe has the model trained; the model remembers it once the plan is applied."""
    example_inputs: Any = field(default=None, compare=False, repr=False)
    """The caller's example inputs, used again for the check after surgery; not part of `to_dict`."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, in the model's order."""
        return tuple(decision.site for decision in self.decisions)

    @property
    def swaps(self) -> tuple[Decision, ...]:
        """The decisions to swap."""
        return tuple(decision for decision in self.decisions if decision.swap)

    @property
    def kept(self) -> tuple[Decision, ...]:
        """The decisions to keep."""
        return tuple(decision for decision in self.decisions if not decision.swap)

    @property
    def parameters_added(self) -> int:
        """Number of parameters the model gains."""
        return sum(decision.parameters_added for decision in self.swaps)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of all convolutions and linear layers of the plain model for one sample."""
        return sum(site.multiply_adds for site in self.sites)

    @property
    def multiply_adds_added(self) -> int:
        """Multiply-adds that the swaps add for one sample."""
        return sum(decision.multiply_adds_added for decision in self.swaps)

    def keeping(self, pattern: str, because: str) -> Plan:
        """This plan with the swaps whose name matches a glob kept instead. Raises `PlanError` if none does."""
        kept = [decision.site.name for decision in self.swaps if fnmatchcase(decision.site.name, pattern)]
        if not kept:
            names = [decision.site.name for decision in self.swaps]
            raise PlanError(f"no swap of this plan matches {pattern!r}{near_misses(pattern, names)}")
        return replace(
            self,
            decisions=tuple(
                Decision(decision.site, because) if decision.site.name in kept else decision
                for decision in self.decisions
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {
            "format": FORMAT,
            "recipe": self.recipe,
            "recognised": self.recognised,
            "model_class": self.model_class,
            "tracer": self.tracer,
            "left_out": self.left_out,
            "finetune": self.finetune.to_dict(),
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Plan:
        """Undo `to_dict`. Raises `PlanError` for data that is not a plan of a version this library knows."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"not a plan of format {FORMAT}: found {found!r}")
        known = {entry.name for entry in fields(Plan)} - {"example_inputs"}
        try:
            _check_keys(data, known | {"format"}, "the plan")
            for entry in data.get("decisions", ()):
                _check_keys(entry, {entry.name for entry in fields(Decision)}, "a decision")
                _check_keys(entry.get("site"), {entry.name for entry in fields(Site)}, "a site")
            # As JSON, in which a list may stand for a tuple while all else keeps its type.
            text = json.dumps({name: data[name] for name in known if name in data})
            plan = TypeAdapter(Plan).validate_json(text, strict=True)
            return replace(plan, decisions=tuple(map(_as_saved, plan.decisions)))
        except ValidationError as error:
            fault = error.errors()[0]
            place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in fault["loc"])
            raise PlanError(f"the plan is damaged: {place.removeprefix('.')}: {fault['msg']}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"the plan is damaged: {error}") from None

    def summary(self) -> str:
        """One line: how much is swapped, by which recipe, at what cost."""
        from .report import in_units

        added = f"+{in_units(self.multiply_adds_added)} multiply-adds a sample"
        untold = sorted({str(one.operator) for one in self.swaps if not one.multiply_adds_by_component})
        if untold:
            added = f"multiply-adds not counted for {', '.join(untold)}"
        elif self.multiply_adds:
            added += f" (+{self.multiply_adds_added / self.multiply_adds:.0%} of {in_units(self.multiply_adds)})"
        return (
            f"{self.model_class}: {len(self.swaps)} of {len(self.decisions)} sites swapped, "
            f"+{self.parameters_added:,} parameters, {added} (recipe {self.recipe}: {self.recognised})"
        )

    def rest(self) -> str:
        """One line on the layers that are no sites; empty if there are none."""
        if not self.left_out:
            return ""
        counts = ", ".join(f"{count} x {name}" for name, count in self.left_out.items())
        return f"{counts}: not layers that can be swapped"

    def __rich__(self) -> Table:
        from .report import plan_table

        return plan_table(self)

    def __str__(self) -> str:
        from .report import render

        return render(self)


@undisturbed()
def plan(
    model: nn.Module,
    recipe: str | Path | Recipe = "auto",
    *,
    example_inputs: Any = None,
    tracer: Literal["record"] | TracedBy = "record",
    **overrides: Any,
) -> Plan:
    """Decide for every site of a model whether to swap it. The model is not touched.

    Args:
        model: any vision model. It is observed in one forward of a copy, on meta tensors if that works. Of Ultralytics'
            `YOLO(...)`, the network that it holds.
        recipe: `auto` to recognise the family (else `generic`), a shipped recipe's name, a YAML file, or a `Recipe`.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments for one forward; needed
            only where they cannot be told from the model.
        tracer: what reads the data flow; see `fdsurgery.sites`.
        **overrides: operator settings that win over every rule's `with`, e.g. `kernel_num=16`.

    Returns:
        The plan; `print` shows it as a table, `apply` carries it out.

    Raises:
        RecipeError: the recipe is broken, a rule of it matches no site, or an override is no setting.
        DiscoveryError: the model could not be run; pass `example_inputs`.
        UnsupportedModelError: the model is wrapped, compiled, quantised or scripted.
    """
    return plan_and_observation(model, recipe, example_inputs, tracer, overrides)[0]


def plan_and_observation(
    model: nn.Module,
    recipe: str | Path | Recipe,
    example_inputs: Any,
    tracer: Literal["record"] | TracedBy,
    overrides: dict[str, Any],
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
    for rule in chosen.swap:  # before the model is run: a wrong override should not take a forward to be told
        get_operator(rule.operator).settings({**rule.settings, **overrides})
    seen = observe(model, example_inputs, tracer)
    decisions = _decide_all(model, chosen, seen.sites, overrides)
    decisions = tuple(_with_costs(decision, model, seen) if decision.swap else decision for decision in decisions)
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
    model: nn.Module, recipe: Recipe, sites: tuple[Site, ...], overrides: dict[str, Any]
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


def _decide(site: Site, recipe: Recipe, overrides: dict[str, Any], delegated: Decision | None) -> Decision:
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
            operator = get_operator(swap.operator)
            settings = operator.settings({**swap.settings, **overrides})
            refusal = operator.refusal(site, settings)
            if refusal is not None:
                return Decision(site, refusal, rule=swap.label)
            told = f"{swap.describe()}; swapped anyway: {site.caution}" if site.caution else swap.describe()
            return Decision(site, told, swap.label, swap.operator, settings)
    return Decision(site, "no rule asks for it")


def _with_costs(decision: Decision, model: nn.Module, seen: Observation) -> Decision:
    """The decision to swap, with what it adds, counted on a twin of the new layer without memory."""
    assert decision.operator is not None
    site, layer = decision.site, model.get_submodule(decision.site.name)
    bias = layer.bias is not None
    with torch.device("meta"):
        twin: nn.Module
        if site.kind == "conv":
            twin = nn.Conv2d(site.in_channels, site.out_channels, site.kernel_size, groups=site.groups, bias=bias)
        else:
            twin = nn.Linear(site.in_channels, site.out_channels, bias)
        new = get_operator(decision.operator).replace(twin, decision.settings)
    return replace(
        decision,
        parameters_added=_count(new) - _count(layer),
        multiply_adds_by_component=_multiply_adds_added(new, layer, site, seen),
    )


def _multiply_adds_added(new: nn.Module, layer: nn.Module, site: Site, seen: Observation) -> dict[str, int]:
    """By component and for one sample, over the calls of the layer that were seen."""
    if not isinstance(new, (FDConv2d, FDLinear)):
        return {}
    unbatched = 3 if isinstance(new, FDConv2d) else 1
    added: Counter[str] = Counter()
    for shape in filter(None, seen.input_shapes[site.name]):
        # What is a sample to the layer, and has a weight of its own, may be a part of one: a window, or a region.
        rows, sample = (1, shape) if len(shape) == unbatched else (shape[0], shape[1:])
        for component, count in asdict(layer_cost(new, _padded(sample, layer, site))).items():
            added[component] += rows * count
    del added["convolution"]  # that of the plain layer
    return {component: count // seen.batch for component, count in added.items()}


def _padded(sample: tuple[int, ...], layer: nn.Module, site: Site) -> tuple[int, ...]:
    """The shape that an input has once it is padded, for layers that begin with that."""
    if not site.pads_same or not isinstance(layer, nn.Conv2d):
        return sample
    channels, height, width = sample
    left, right, top, bottom = same_padding((height, width), layer)
    return channels, height + top + bottom, width + left + right


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_keys(data: Any, known: set[str], what: str) -> None:
    if not isinstance(data, dict):
        raise TypeError(f"{what} is a mapping, not a {type(data).__name__}")
    for key in data:
        if key not in known:
            raise TypeError(f"{what} has no {key!r}{near_misses(str(key), known)}")

"""A plan as data: the decision for every site."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from torch import nn

from .discovery.kinds import kind_named
from .discovery.site import Site
from .errors import PlanError, near_misses
from .operators import Wanted, build_layers, get_operator
from .recipe import FineTune
from .report import Row, in_units, render, table

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
"""Version of `Plan.to_dict`."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one site.

    Examples:
        >>> import timm, fdsurgery
        >>> decision = fdsurgery.plan(timm.create_model("test_resnet")).decisions[0]
        >>> decision.site.name, decision.swap, decision.reason, decision.rule
        ('conv1.0', False, 'the paper keeps the stem', 'resnet.yaml:12')
    """

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


def resolved(decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
    """The decisions, with what follows for the settings of an operator's layers from all that it is given."""
    by_operator: dict[str, list[Decision]] = {}
    for decision in decisions:
        if decision.operator is not None:
            by_operator.setdefault(decision.operator, []).append(decision)
    settings: dict[str, dict[str, Any]] = {}
    for name, group in by_operator.items():
        sites = [decision.site for decision in group]
        found = get_operator(name).resolve(sites, [decision.settings for decision in group])
        settings.update(zip((site.name for site in sites), found, strict=True))
    return tuple(replace(one, settings=settings.get(one.site.name, one.settings)) for one in decisions)


def plain_twin(site: Site, *, bias: bool) -> nn.Module:
    """A plain layer of the shape and the geometry of a site's; one that pads by size itself takes a padded input."""
    kind = kind_named(site.kind)
    geometry = {name: getattr(site, name) for name in kind.geometry_names}
    if site.pads_same:
        geometry["padding"] = 0
    layer: nn.Module = kind.make(site.in_channels, site.out_channels, bias=bias, **geometry)
    return layer


def _recounted(before: tuple[Decision, ...], after: tuple[Decision, ...]) -> tuple[Decision, ...]:
    """Decisions after some were changed, with the costs of those whose settings followed from all."""
    changed = {
        new.operator for old, new in zip(before, after, strict=True) if new.swap and old.settings != new.settings
    }
    old_costs = _costs_alone([one for one in before if one.operator in changed])
    new_costs = _costs_alone([one for one in after if one.operator in changed])
    recounted = []
    for one in after:
        if one.operator in changed:
            (old_size, old_counts), (size, counts) = old_costs[one.site.name], new_costs[one.site.name]
            was = one.multiply_adds_by_component
            one = replace(
                one,
                parameters_added=one.parameters_added + size - old_size,
                multiply_adds_by_component={key: was[key] * counts[key] // max(1, old_counts[key]) for key in was},
            )
        recounted.append(one)
    return tuple(recounted)


def _costs_alone(decisions: list[Decision]) -> dict[str, tuple[int, dict[str, int]]]:
    """Parameters of each new layer, those that layers share once, and the multiply-adds of its first call."""
    with torch.device("meta"):
        made = build_layers(
            Wanted(one.site.name, plain_twin(one.site, bias=False), str(one.operator), one.settings)
            for one in decisions
        )
    costs, seen = {}, set[nn.Parameter]()
    for one in decisions:
        layer, shape = made[one.site.name], one.site.input_shape
        own = set(layer.parameters()) - seen
        seen |= own
        counts = {} if shape is None else get_operator(str(one.operator)).multiply_adds(layer, shape[1:])
        costs[one.site.name] = sum(parameter.numel() for parameter in own), counts
    return costs


def _as_saved(decision: Decision) -> Decision:
    """A decision that was read, with all the settings that it meant when it was saved."""
    if decision.operator is None:
        return decision
    return replace(decision, settings=get_operator(decision.operator).saved_settings(decision.settings))


@dataclass(frozen=True)
class Plan:
    """The decision for every site of a model. Printable, comparable, and savable as plain JSON types.

    Examples:
        >>> import timm, fdsurgery
        >>> plan = fdsurgery.plan(timm.create_model("test_resnet"))
        >>> len(plan.sites), len(plan.swaps), len(plan.kept)
        (16, 9, 7)
        >>> plan.parameters_added, plan.multiply_adds, plan.multiply_adds_added
        (72902, 102547200, 31208732)
        >>> print(plan)
                                                                                                   multiply-
        site            kind           shape        decision      rule or reason   parameters       adds
        conv1.0         conv, stem     3→16 3x3 /2  keep          the paper keeps the stem (resnet.yaml:12)
        ...
        layer1.0.conv1  conv, spatial  32→32 3x3    swap: fdconv  resnet.yaml:18       +4,846    +6.09 M
        ...
    """

    recipe: str
    """Name of the recipe."""
    recognised: str
    """How the recipe was chosen, in words."""
    model_class: str
    tracer: str
    """How the model was observed: in a forward recorded on `meta` tensors (no compute) or `real` ones. Plans of version
    0.1 may name another tracer."""
    decisions: tuple[Decision, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    """Layers that are no sites, since nothing can take their place (1-D, 3-D and transposed convolutions, ...): how
    many there are of each class."""
    finetune: Annotated[FineTune, BeforeValidator(FineTune.from_dict)] = field(default_factory=FineTune)
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

    def exclude(self, pattern: str, reason: str) -> Plan:
        """This plan with the swaps whose name matches a glob kept instead. Raises `PlanError` if none does.

        Examples:
            >>> import timm, fdsurgery
            >>> plan = fdsurgery.plan(timm.create_model("test_resnet"))
            >>> shorter = plan.exclude("layer4.*", reason="the last stage stays static")
            >>> len(plan.swaps), len(shorter.swaps)
            (9, 7)
        """
        kept = [decision.site.name for decision in self.swaps if fnmatchcase(decision.site.name, pattern)]
        if not kept:
            names = [decision.site.name for decision in self.swaps]
            raise PlanError(f"no swap of this plan matches {pattern!r}{near_misses(pattern, names)}")
        left = (Decision(one.site, reason) if one.site.name in kept else one for one in self.decisions)
        return replace(self, decisions=_recounted(self.decisions, resolved(tuple(left))))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types.

        Examples:
            >>> import json, timm, fdsurgery
            >>> plan = fdsurgery.plan(timm.create_model("test_resnet"))
            >>> text = json.dumps(plan.to_dict())
            >>> fdsurgery.Plan.from_dict(json.loads(text)) == plan
            True
        """
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
        """Undo `to_dict`. Raises `PlanError` for data that is not a plan of a version this library knows.

        Examples:
            >>> import fdsurgery
            >>> fdsurgery.Plan.from_dict({"format": 7})
            Traceback (most recent call last):
                ...
            fdsurgery.errors.PlanError: not a plan of format 1: found 7
        """
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
            return replace(plan, decisions=resolved(tuple(map(_as_saved, plan.decisions))))
        except ValidationError as error:
            fault = error.errors()[0]
            place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in fault["loc"])
            raise PlanError(f"the plan is damaged: {place.removeprefix('.')}: {fault['msg']}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"the plan is damaged: {error}") from None

    def summary(self) -> str:
        """One line: how much is swapped, by which recipe, at what cost.

        Examples:
            >>> import timm, fdsurgery
            >>> print(fdsurgery.plan(timm.create_model("test_resnet")).summary())
            ResNet: 9 of 16 sites swapped, +72,902 parameters, +31.21 M multiply-adds a sample (+30% of 102.55 M)
            (recipe resnet: recognised as timm test_resnet)
        """
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
        """One line on the layers that are no sites; empty if there are none.

        Examples:
            >>> import torch, fdsurgery
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 4, 2))
            >>> fdsurgery.plan(model, example_inputs=torch.randn(2, 3, 16, 16)).rest()
            '1 x ConvTranspose2d: not layers that can be swapped'
        """
        if not self.left_out:
            return ""
        counts = ", ".join(f"{count} x {name}" for name, count in self.left_out.items())
        return f"{counts}: not layers that can be swapped"

    def __rich__(self) -> Table:
        return table(
            [_row(decision) for decision in self.decisions], "\n".join(filter(None, (self.summary(), self.rest())))
        )

    def __str__(self) -> str:
        return render(self)


def _row(decision: Decision) -> Row:
    if not decision.swap:
        why = decision.reason + (f" ({decision.rule})" if decision.rule else "")
        return Row(decision.site, "keep", why, dim=True)
    anyway = f"swapped anyway: {decision.site.caution}" if decision.site.caution else ""
    return Row(
        decision.site,
        f"swap: {decision.operator}",
        "; ".join(filter(None, (decision.rule, anyway))),
        f"+{decision.parameters_added:,}",
        f"+{in_units(decision.multiply_adds_added)}",
    )


def _check_keys(data: Any, known: set[str], what: str) -> None:
    if not isinstance(data, dict):
        raise TypeError(f"{what} is a mapping, not a {type(data).__name__}")
    for key in data:
        if key not in known:
            raise TypeError(f"{what} has no {key!r}{near_misses(str(key), known)}")

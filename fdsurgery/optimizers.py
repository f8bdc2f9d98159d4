"""Optimizers that are older than the conversion: what they are to hold afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .errors import FineTuningError
from .parameters import Entry, entries_of, joined, undecayed_of

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)


def optimizer_after_surgery(optimizer: OptimizerT, model: nn.Module, before: Mapping[str, nn.Parameter]) -> OptimizerT:
    """Give an optimizer that was made before the conversion the parameters that came with it.

    `convert(model, optimizers=optimizer)` does it in the same call. This is for a model that was converted already:

    Parameters that stayed keep their state (momentum, moments, steps), and so do the biases of swapped layers, which
    are the same numbers in new tensors. Weights that left are taken out with their state. In their place, in their
    group and with its settings, are the spectrum and the modulation that replaced them, without state. What
    `param_groups` does not decay of these, the biases and norms of the modulation, goes to the group of this optimizer
    that differs from the weight's in having no decay, if there is one; an optimizer that decays everything decays them
    too. Groups stay the same in number and order, so schedulers go on. Where a group had the model's order it has it
    afterwards, so the state fits an optimizer that is made in the same way for the converted model.

    Args:
        optimizer: any of `torch.optim` but LBFGS and Muon, or one with `param_groups` and `state` like theirs; changed
            in place. It may hold parameters of other modules, and need not hold all of this model.
        model: the converted model.
        before: its parameters by name, from before the conversion.

    Returns:
        The same object.

    Raises:
        FineTuningError: the optimizer is LBFGS or Muon, or not of this model; `before` is not from before the
            conversion; or the model has other new parameters than those of dynamic layers. Nothing was changed.

    Examples:
        >>> import torch, fdsurgery
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        >>> before = dict(model.named_parameters())
        >>> model = fdsurgery.convert(model)
        >>> optimizer = fdsurgery.optimizer_after_surgery(optimizer, model, before)
        >>> set(optimizer.param_groups[0]["params"]) == set(model.parameters())
        True
    """
    Repair.of(optimizer, model, before).carry_out()
    return optimizer


@dataclass(frozen=True)
class Repair:
    """What an optimizer is to hold after a conversion, worked out before anything in it is changed."""

    optimizer: torch.optim.Optimizer
    groups: list[list[tuple[str, nn.Parameter]]]
    """The parameters of each group, and the names that groups of named parameters give them."""
    gone: frozenset[nn.Parameter]
    state: dict[Any, Any]
    """Of new parameters."""

    @staticmethod
    def of(optimizer: torch.optim.Optimizer, model: nn.Module, before: Mapping[str, nn.Parameter]) -> Repair:
        """Work it out; for the arguments and errors see `optimizer_after_surgery`."""
        _refuse_optimizer(optimizer)
        entries = list(entries_of(model))
        present = {entry.parameter for entry in entries}
        departed = {name: parameter for name, parameter in before.items() if parameter not in present}
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if held.isdisjoint(before.values()) and held.isdisjoint(present):
            raise FineTuningError("the optimizer holds no parameter of this model")
        if not departed:
            raise FineTuningError(
                "no parameter of `before` has left the model: take `before = dict(model.named_parameters())` "
                "before the conversion, and call this after it"
            )
        stayed = set(before.values()) & present
        successors: dict[nn.Parameter, list[Entry]] = {}
        for entry in entries:
            if entry.parameter not in stayed:
                successors.setdefault(departed[_predecessor(entry, departed)], []).append(entry)
        gone = frozenset(departed.values())
        added = [entry.parameter for old in held & gone for entry in successors.get(old, ())]
        state = _initial_state(optimizer, added)
        for old in held & gone:
            earlier = optimizer.state.get(old)
            for entry in successors.get(old, ()):
                if earlier is not None and departed.get(entry.name) is old:  # a bias in a new tensor
                    state[entry.parameter] = earlier
        groups = _renewed_groups(optimizer, gone, successors, undecayed_of(model, entries))
        ranks = {parameter: rank for rank, parameter in enumerate(before.values())}
        order = {entry.parameter: rank for rank, entry in enumerate(entries)}
        for group, renewed in zip(optimizer.param_groups, groups, strict=True):
            if _is_sorted([ranks[parameter] for parameter in group["params"] if parameter in ranks]):
                _sort(renewed, order)
        return Repair(optimizer, groups, gone, state)

    def carry_out(self) -> None:
        """Change the optimizer. Nothing in this can fail."""
        for group, renewed in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["params"][:] = [parameter for _, parameter in renewed]
            if "param_names" in group:
                group["param_names"][:] = [name for name, _ in renewed]
        for old in self.gone:
            self.optimizer.state.pop(old, None)
        self.optimizer.state.update(self.state)


def repairs_of(
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    model: nn.Module,
    before: Mapping[str, nn.Parameter],
) -> list[Repair]:
    """The repair of each of one or more optimizers."""
    listed = optimizers if isinstance(optimizers, Iterable) else [optimizers]
    return [Repair.of(optimizer, model, before) for optimizer in listed]


def _refuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise FineTuningError("LBFGS has one history for all parameters together; make a new one after the conversion")
    if isinstance(optimizer, getattr(torch.optim, "Muon", ())):
        raise FineTuningError("Muon takes matrices only, and a spectrum is none; make a new one after the conversion")


def _renewed_groups(
    optimizer: torch.optim.Optimizer,
    gone: Collection[nn.Parameter],
    successors: Mapping[nn.Parameter, Sequence[Entry]],
    undecayed: Collection[nn.Parameter],
) -> list[list[tuple[str, nn.Parameter]]]:
    """What each group is to hold, with its names: successors where the old parameter was, or at the end of the group
    without decay."""
    groups = optimizer.param_groups
    renewed: list[list[tuple[str, nn.Parameter]]] = [[] for _ in groups]
    elsewhere: list[list[tuple[str, nn.Parameter]]] = [[] for _ in groups]
    for index, group in enumerate(groups):
        twin = _twin_without_decay(groups, index)
        names = group.get("param_names", [""] * len(group["params"]))
        for name, old in zip(names, group["params"], strict=True):
            if old not in gone:
                renewed[index].append((name, old))
            for entry in successors.get(old, ()):
                place = renewed[index]
                if twin is not None and entry.makes_weight and entry.parameter in undecayed:
                    place = elsewhere[twin]
                place.append((entry.name, entry.parameter))
    return [held + more for held, more in zip(renewed, elsewhere, strict=True)]


def _twin_without_decay(groups: Sequence[Mapping[str, Any]], index: int) -> int | None:
    """The first group that has no decay and else the settings of a group that has; None if there is none."""

    def settings(group: Mapping[str, Any]) -> dict[str, Any]:
        own = ("params", "param_names", "weight_decay")  # and texts, which are labels
        return {key: value for key, value in group.items() if key not in own and not isinstance(value, str)}

    if not groups[index].get("weight_decay"):
        return None
    found = (
        other
        for other, group in enumerate(groups)
        if group.get("weight_decay") == 0 and settings(group) == settings(groups[index])
    )
    return next(found, None)


def _is_sorted(ranks: Sequence[int]) -> bool:
    return all(first < second for first, second in itertools.pairwise(ranks))


def _sort(named: list[tuple[str, nn.Parameter]], order: Mapping[nn.Parameter, int]) -> None:
    """Sort the parameters of a model among the places that they have in a list."""
    places = [place for place, (_, parameter) in enumerate(named) if parameter in order]
    ordered = sorted((named[place] for place in places), key=lambda one: order[one[1]])
    for place, one in zip(places, ordered, strict=True):
        named[place] = one


def _predecessor(entry: Entry, departed: Mapping[str, nn.Parameter]) -> str:
    """Name of the parameter that has left and in whose place a new one is."""
    if entry.layer is not None:
        if entry.plain_name in departed:
            return entry.plain_name
        # A layer that computes its weight holds it under other names, e.g. `parametrizations.weight.original0`.
        inside = [name for name in departed if name.startswith(joined(entry.layer, ""))]
        if inside:
            return inside[0]
    raise FineTuningError(
        f"{entry.name!r} is a new parameter, and `before` has none that a dynamic layer replaced there; make other "
        "changes to the model after this call, and give their parameters to optimizer.add_param_group"
    )


def _initial_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> dict[Any, Any]:
    """State of new parameters, for the one optimizer that made it when it was made, in earlier releases of torch."""
    if not isinstance(optimizer, torch.optim.Adagrad) or not parameters:
        return {}
    return dict(torch.optim.Adagrad(parameters, **optimizer.defaults).state)

"""Fine-tuning: parameter groups, what trains and what is frozen, optimizers that are older than the conversion."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fdconv import FDConv2d, FDLinear
from fdconv.bands import BandEdges

from .errors import FineTuningError, UnsupportedModelError, near_misses
from .integrations.ultralytics import network_of
from .operators import operator_of
from .recipe import FineTune
from .wrappers import inner_of

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)

SELECTIONS = ("modulation", "fdconv", "all")
"""Words that `freeze` takes beside patterns."""

_MEMORY = "fdsurgery_finetune"
"""The attribute in which a converted model remembers its recipe's `finetune` section, as plain types."""


@dataclass(frozen=True)
class _Entry:
    """A parameter of a model, and what it is there."""

    name: str
    parameter: nn.Parameter
    layer: str | None = None
    """Name of the dynamic layer that holds it; None outside of all."""
    kind: Literal["modulation", "weight", "bias", "other"] = "other"
    """What it is to a dynamic layer. All but the bias together make what was the weight."""

    @property
    def makes_weight(self) -> bool:
        """True for what stands in the place of a plain layer's weight."""
        return self.layer is not None and self.kind != "bias"

    @property
    def plain_name(self) -> str:
        """The parameter of the plain model in whose place it is: the weight, for whatever makes a weight."""
        return _joined(self.layer, "weight") if self.makes_weight else self.name


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, *, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: with decay and without, and one such pair a layer with `layer_decay`.

    ```python
    optimizer = torch.optim.AdamW(fdsurgery.param_groups(model, lr=1e-4, weight_decay=0.05))
    ```

    They are those of the plain model: what stands in a weight's place, the spectrum and the weights of the modulation,
    has the weight's rate and decay. Decay of the modulation draws it towards neutral, so towards the static layer. Not
    decayed are parameters whose size means something: biases (those of the gates too), norms, scalars, vectors such as
    layer scales, band edges, and what the model's `no_weight_decay()` names.

    Args:
        model: converted or not; before or after it is sharded, compiled or wrapped in DDP.
        lr: learning rate of all parameters; with `layer_decay` of the last layer.
        weight_decay: of everything that is decayed.
        layer_decay: factor of the learning rate from each layer to the one before it, as
            `timm.optim.param_groups_layer_decay` has it, which tells the layers. By default what the `finetune` section
            of the recipe says that the model was converted with, which the model remembers, else none.

    Returns:
        Groups with `name`, `params`, `lr` and `weight_decay`, in the model's order. Each parameter is in one group,
        also where modules share it; parameters that do not train are in none. Rates stand in `lr` itself and there is
        no `lr_scale`, so that schedulers of torch and of timm both keep to them.

    Raises:
        UnsupportedModelError: layer decay for a model that does not tell its layers.
        ValueError: `layer_decay` is not above 0 and at most 1.
    """
    model = network_of(inner_of(model))
    decay = FineTune.from_dict({"layer_decay": layer_decay}).over(remembered(model)).layer_decay
    entries = list(_entries(model))
    depths = {} if decay in (None, 1) else _depth_scales(model, entries, decay)
    layer_of = {scale: index for index, scale in enumerate(sorted(set(depths.values())))}
    undecayed = _undecayed(model, entries)
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if not entry.parameter.requires_grad:
            continue
        depth = depths[entry.plain_name] if depths else 1.0
        decayed = entry.parameter not in undecayed
        name = (f"layer {layer_of[depth]}, " if depths else "") + ("decay" if decayed else "no decay")
        settings = {"lr": lr * depth, "weight_decay": weight_decay if decayed else 0.0}
        groups.setdefault(name, {"name": name, "params": [], **settings})["params"].append(entry.parameter)
    return list(groups.values())


def remember(model: nn.Module, finetune: FineTune) -> None:
    """Note in a model how its recipe has it trained; what was noted before stays where this one does not say."""
    if said := finetune.over(remembered(model)).to_dict():
        setattr(model, _MEMORY, said)


def remembered(model: nn.Module) -> FineTune:
    """What `remember` has noted in a model."""
    return FineTune.from_dict(vars(model).get(_MEMORY, {}))


def forget(model: nn.Module) -> None:
    """Take out what `remember` has noted in a model and in its parts."""
    for module in model.modules():
        vars(module).pop(_MEMORY, None)


def freeze(model: nn.Module, train: str | Sequence[str]) -> list[str]:
    """Choose the parameters that train, and freeze all others. Call it before DDP and before making the optimizer.

    ```python
    fdsurgery.freeze(model, "modulation")  # the authors' `need_grad_list=["KSM", "FBM"]`
    fdsurgery.freeze(model, ["modulation", "fc.*"])  # and a new classifier
    ```

    Only `requires_grad` changes. BatchNorms of frozen parts go on updating their statistics in training mode, as
    everywhere in torch, unless `eval()` is called on them.

    Args:
        model: changed in place.
        train: one or more of `modulation` (`KSM_*` and `FBM` of dynamic layers), `fdconv` (all of dynamic layers),
            `all` (everything, what the model's author holds fixed included), and globs for fully qualified names of
            parameters, in which `*` also matches dots.

    Returns:
        Names of the parameters that train, in the model's order.

    Raises:
        FineTuningError: a word or pattern means no parameter, or there is none. Nothing was changed.
    """
    entries = list(_entries(model))
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    trained: set[nn.Parameter] = set()
    for wanted in [train] if isinstance(train, str) else train:
        meant = {entry.parameter for entry in entries if _is_meant(wanted, entry, names[entry.parameter])}
        if not meant:
            raise FineTuningError(_nothing_meant(wanted, entries))
        trained |= meant
    if not trained:
        raise FineTuningError(f"nothing would train: give one or more of {', '.join(SELECTIONS)} and name patterns")
    for entry in entries:
        entry.parameter.requires_grad_(entry.parameter in trained)
    return [entry.name for entry in entries if entry.parameter in trained]


def optimizer_after_surgery(optimizer: OptimizerT, model: nn.Module, before: Mapping[str, nn.Parameter]) -> OptimizerT:
    """Give an optimizer that was made before the conversion the parameters that came with it.

    `convert(model, optimizers=optimizer)` does it in the same call. This is for a model that was converted already:

    ```python
    before = dict(model.named_parameters())
    fdsurgery.convert(model)
    fdsurgery.optimizer_after_surgery(optimizer, model, before)
    ```

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
        entries = list(_entries(model))
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
        successors: dict[nn.Parameter, list[_Entry]] = {}
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
        groups = _renewed_groups(optimizer, gone, successors, _undecayed(model, entries))
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
    successors: Mapping[nn.Parameter, Sequence[_Entry]],
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


def _entries(model: nn.Module) -> Iterator[_Entry]:
    """The parameters of a model, each once."""
    inside: dict[nn.Parameter, tuple[str, Literal["modulation", "weight", "bias"]]] = {}
    for prefix, layer in model.named_modules():
        if operator_of(layer) is None:
            continue
        known = isinstance(layer, (FDConv2d, FDLinear))
        for parameter in layer.parameters():
            inside[parameter] = (prefix, "modulation" if known else "weight")
        if known:
            inside[layer.dft_weight] = (prefix, "weight")
        if isinstance(bias := layer.bias, nn.Parameter):
            inside[bias] = (prefix, "bias")
    for name, parameter in model.named_parameters():
        yield _Entry(name, parameter, *inside.get(parameter, (None, "other")))


def _undecayed(model: nn.Module, entries: Sequence[_Entry]) -> set[nn.Parameter]:
    """Parameters whose size means something: norms, biases, scalars and vectors, band edges, the model's own list."""
    own = getattr(model, "no_weight_decay", None)
    patterns = own() if callable(own) else ()
    edges = {module.edge for module in model.modules() if isinstance(module, BandEdges)}
    norms = {
        parameter
        for module in model.modules()
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm))  # those of torch that may have more than one axis
        for parameter in module.parameters()
    }
    maps = (nn.Linear, nn.Bilinear, nn.Embedding, nn.modules.conv._ConvNd)
    weights = {module._parameters.get("weight") for module in model.modules() if isinstance(module, maps)}
    weights |= {entry.parameter for entry in entries if entry.makes_weight}
    return {
        entry.parameter
        for entry in entries
        if entry.parameter.dim() <= 1
        or entry.name.rpartition(".")[2] == "bias"
        or entry.parameter in edges | norms
        or (entry.parameter not in weights and _is_vector(entry.parameter))
        or any(fnmatchcase(entry.plain_name, pattern) for pattern in patterns)
    }


def _is_vector(tensor: Tensor) -> bool:
    """True for numbers along one axis, written with others of length 1 as they are multiplied with feature maps."""
    return sum(size > 1 for size in tensor.shape) <= 1


class _PlainTwin:
    """What timm asks a model for to tell its layers, with the parameters that it had when it was plain.

    Some of timm's models tell their layers by names, others by the number of parameters.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model = model
        self.parameters = {
            name: nn.Parameter(torch.empty(0, dtype=torch.float32, device="cpu")) for name in dict.fromkeys(names)
        }

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.parameters.items()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _depth_scales(model: nn.Module, entries: Sequence[_Entry], layer_decay: float) -> dict[str, float]:
    """The factor of the learning rate that timm gives each parameter of the plain model."""
    if not hasattr(model, "group_matcher") and not (getattr(model, "pretrained_cfg", None) or {}).get("classifier"):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not tell its layers; give it a group_matcher as timm's models have, e.g. "
            "model.group_matcher = lambda coarse=False: {'stem': r'^embeddings', 'blocks': r'^layers\\.(\\d+)'}"
        )
    from timm.optim import param_groups_layer_decay

    twin = _PlainTwin(model, [entry.plain_name for entry in entries])
    names = {parameter: name for name, parameter in twin.parameters.items()}
    groups = param_groups_layer_decay(twin, layer_decay=layer_decay)
    return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}


def _is_meant(wanted: str, entry: _Entry, names: Sequence[str]) -> bool:
    """True if a word or pattern of `freeze` means a parameter, which has these names."""
    if wanted == "modulation":
        return entry.kind == "modulation"
    if wanted == "fdconv":
        return entry.layer is not None
    return wanted == "all" or any(fnmatchcase(name, wanted) for name in names)


def _nothing_meant(wanted: str, entries: Sequence[_Entry]) -> str:
    if wanted in SELECTIONS:
        dynamic = any(entry.layer is not None for entry in entries)
        return f"nothing to train as {wanted!r}: " + (
            "the dynamic layers have no modulation, or are of an operator that does not tell which parameters that is; "
            "name these by patterns"
            if dynamic
            else "the model has no dynamic layer; convert it first"
        )
    known = [*SELECTIONS, *(entry.name for entry in entries)]
    return f"no parameter matches {wanted!r}, and it is none of {', '.join(SELECTIONS)}{near_misses(wanted, known)}"


def _predecessor(entry: _Entry, departed: Mapping[str, nn.Parameter]) -> str:
    """Name of the parameter that has left and in whose place a new one is."""
    if entry.layer is not None:
        if entry.plain_name in departed:
            return entry.plain_name
        # A layer that computes its weight holds it under other names, e.g. `parametrizations.weight.original0`.
        inside = [name for name in departed if name.startswith(_joined(entry.layer, ""))]
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


def _joined(prefix: str | None, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name

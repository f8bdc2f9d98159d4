"""Fine-tuning: parameter groups, what trains and what is frozen, optimizers that are older than the conversion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fdconv import FDConv2d, FDLinear
from fdconv.bands import BandEdges

from .errors import FineTuningError, UnsupportedModelError, near_misses
from .operators import operator_of
from .recipe import Recipe, detect_recipe, load_recipe
from .wrappers import inner_of

Part = Literal["spectrum", "modulation", "other"]
OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)

SELECTIONS = ("modulation", "fdconv", "all")
"""Words that `freeze` takes beside patterns."""


@dataclass(frozen=True)
class _Entry:
    """A parameter of a model, and what it is there."""

    name: str
    parameter: nn.Parameter
    layer: str | None = None
    """Name of the dynamic layer that holds it; None outside of all."""
    part: Part = "other"
    makes_weight: bool = False

    @property
    def plain_name(self) -> str:
        """The parameter of the plain model in whose place it is: the weight, for whatever makes a weight."""
        return _joined(self.layer, "weight") if self.makes_weight else self.name


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    *,
    recipe: str | Path | Recipe = "auto",
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer.

    ```python
    optimizer = torch.optim.AdamW(fdsurgery.param_groups(model, lr=1e-4, weight_decay=0.05))
    ```

    The recipe's `finetune` section scales the learning rate of spectra (`dft_weight`) and of modulation (`KSM_*`,
    `FBM`); without one, all parameters have the same. Biases, norms, StarReLU's scalars, band edges and what the
    model's `no_weight_decay()` names are not decayed. Decay of the other modulation draws it towards neutral, so
    towards the static layer.

    What `lr` and `weight_decay` mean for a spectrum, next to the weight that it replaced. The static weight `W`, an
    image of `D1*D2` numbers, is `m*irfft2(dft_weight)` with `m = max(1, min(C_in, C_out)//2)` (`param_ratio` being 1).

    - Decay apart from the gradient (AdamW): exactly that of the weight, which is linear in its spectrum.
    - Decay as part of the gradient (`weight_decay` of SGD and Adam): another objective. By Parseval's theorem,
      `|dft_weight|^2` is `D1*D2/(2*m^2)` times the sum of `|W|^2` and of the energy in the columns of frequency 0 and
      of the highest one for even `D2`: a coefficient of any other column stands for two and counts once. For equally
      many channels in and out, the factor is 2 at 1x1 and 18 at 3x3.
    - Steps of SGD: at the same rate, the weight moves `D1*D2/(2*m^2)` times slower, in those columns twice as slow as
      that.
    - Steps of AdamW are of about `lr` in each number of the spectrum. These are about `sqrt(D1*D2/2)/m` times those of
      the weight: 1.4 times at 1x1 for equally many channels, 2.8 where an FFN widens four times, 4.2 at 3x3. So much
      slower does the weight move, relative to itself.

    Args:
        model: converted or not; before or after it is sharded, compiled or wrapped in DDP.
        lr: learning rate of everything that the recipe does not scale.
        weight_decay: of everything that is decayed.
        recipe: whose `finetune` section counts: `auto` to recognise the family, a shipped recipe's name, a YAML file,
            or a `Recipe`.
        layer_decay: factor of the learning rate from each layer to the one before it, as
            `timm.optim.param_groups_layer_decay` has it, which tells the layers. Those of a dynamic layer have the
            factor of the plain layer, times the recipe's.

    Returns:
        Groups with `name`, `params`, `lr` and `weight_decay`, in the model's order. Each parameter is in one group,
        also where modules share it; parameters that do not train are in none. Rates stand in `lr` itself and there is
        no `lr_scale`, so that schedulers of torch and of timm both keep to them.

    Raises:
        RecipeError: the recipe cannot be read.
        UnsupportedModelError: `layer_decay` for a model that does not tell its layers.
        ValueError: `layer_decay` is not above 0 and at most 1.
    """
    model = inner_of(model)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(detect_recipe(model)[0] if recipe == "auto" else recipe)
    scales: dict[Part, float] = {
        "spectrum": recipe.finetune.spectrum_lr_scale or 1.0,
        "modulation": recipe.finetune.modulation_lr_scale or 1.0,
        "other": 1.0,
    }
    entries = list(_entries(model))
    depths = {} if layer_decay is None else _depth_scales(model, entries, layer_decay)
    layer_of = {scale: index for index, scale in enumerate(sorted(set(depths.values())))}
    undecayed = _undecayed(model, entries)
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if not entry.parameter.requires_grad:
            continue
        depth = depths[entry.plain_name] if depths else 1.0
        decayed = entry.parameter not in undecayed
        name = (f"layer {layer_of[depth]}, " if depths else "") + entry.part + ("" if decayed else ", no decay")
        settings = {"lr": lr * depth * scales[entry.part], "weight_decay": weight_decay if decayed else 0.0}
        groups.setdefault(name, {"name": name, "params": [], **settings})["params"].append(entry.parameter)
    return list(groups.values())


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

    ```python
    before = dict(model.named_parameters())
    fdsurgery.convert(model)
    fdsurgery.optimizer_after_surgery(optimizer, model, before)
    ```

    Parameters that stayed keep their state (momentum, moments, steps), and so do the biases of swapped layers, which
    are the same numbers in new tensors. Weights that left are taken out with their state. In their place, in their
    group and with its settings, are the spectrum and the modulation that replaced them, without state. Groups stay the
    same in number and order, so schedulers go on. For the rates and decays of `param_groups`, make the optimizer anew.

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
    if isinstance(optimizer, torch.optim.LBFGS):
        raise FineTuningError("LBFGS has one history for all parameters together; make a new one after the conversion")
    if isinstance(optimizer, getattr(torch.optim, "Muon", ())):
        raise FineTuningError("Muon takes matrices only, and a spectrum is none; make a new one after the conversion")
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
    gone = set(departed.values())
    added = [entry.parameter for old in held & gone for entry in successors.get(old, ())]
    state = _initial_state(optimizer, added)

    for group in optimizer.param_groups:
        renewed: list[tuple[str, nn.Parameter]] = []
        for name, old in zip(group.get("param_names", [""] * len(group["params"])), group["params"], strict=True):
            if old not in gone:
                renewed.append((name, old))
            renewed += [(entry.name, entry.parameter) for entry in successors.get(old, ())]
        group["params"][:] = [parameter for _, parameter in renewed]
        if "param_names" in group:
            group["param_names"][:] = [name for name, _ in renewed]
    for old in held & gone:
        earlier = optimizer.state.pop(old, None)
        for entry in successors.get(old, ()):
            if earlier is not None and departed.get(entry.name) is old:
                state[entry.parameter] = earlier
    optimizer.state.update(state)
    return optimizer


def _entries(model: nn.Module) -> Iterator[_Entry]:
    """The parameters of a model, each once."""
    inside: dict[nn.Parameter, tuple[str, Part, bool]] = {}
    for prefix, layer in model.named_modules():
        if operator_of(layer) is None:
            continue
        known = isinstance(layer, (FDConv2d, FDLinear))
        for parameter in layer.parameters():
            inside[parameter] = (prefix, "modulation" if known else "other", True)
        if known:
            inside[layer.dft_weight] = (prefix, "spectrum", True)
        if isinstance(bias := layer.bias, nn.Parameter):
            inside[bias] = (prefix, "other", False)
    for name, parameter in model.named_parameters():
        yield _Entry(name, parameter, *inside.get(parameter, (None, "other", False)))


def _undecayed(model: nn.Module, entries: Sequence[_Entry]) -> set[nn.Parameter]:
    """Parameters whose size means something: norms, biases, StarReLU's scalars, band edges, the model's own list."""
    own = getattr(model, "no_weight_decay", None)
    patterns = own() if callable(own) else ()
    edges = {module.edge for module in model.modules() if isinstance(module, BandEdges)}
    norms = {
        parameter
        for module in model.modules()
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm))  # those of torch that may have more than one axis
        for parameter in module.parameters()
    }
    return {
        entry.parameter
        for entry in entries
        if entry.parameter.dim() <= 1
        or entry.name.rpartition(".")[2] == "bias"
        or entry.parameter in edges | norms
        or any(fnmatchcase(entry.plain_name, pattern) for pattern in patterns)
    }


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
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, not {layer_decay!r}")
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
        return entry.part == "modulation"
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

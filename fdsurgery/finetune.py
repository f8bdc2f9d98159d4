"""Fine-tuning: parameter groups, what trains and what is frozen, optimizers that are older than the conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .errors import FineTuningError, UnsupportedModelError, near_misses
from .integrations import network_of
from .operators import operators
from .parameters import Entry, entries_of, undecayed_of
from .recipe import FineTune
from .wrappers import inner_of

SELECTIONS = ("modulation", "dynamic", "all")
"""Words that `freeze` takes beside patterns and names of operators."""

_MEMORY = "fdsurgery_finetune"
"""The attribute in which a converted model remembers its recipe's `finetune` section, as plain types."""


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, *, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: with decay and without, and one such pair a layer with `layer_decay`.

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

    Examples:
        >>> import torch, fdsurgery
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> model = fdsurgery.convert(model)
        >>> groups = fdsurgery.param_groups(model, lr=1e-4, weight_decay=0.05)
        >>> [(group["name"], group["weight_decay"]) for group in groups]
        [('decay', 0.05), ('no decay', 0.0)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    model = network_of(inner_of(model))
    decay = FineTune.from_dict({"layer_decay": layer_decay}).over(remembered(model)).layer_decay
    entries = list(entries_of(model))
    depths = {} if decay in (None, 1) else _depth_scales(model, entries, decay)
    layer_of = {scale: index for index, scale in enumerate(sorted(set(depths.values())))}
    undecayed = undecayed_of(model, entries)
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

    Only `requires_grad` changes. BatchNorms of frozen parts go on updating their statistics in training mode, as
    everywhere in torch, unless `eval()` is called on them.

    Args:
        model: changed in place.
        train: one or more of `modulation` (what changes the weights of dynamic layers by their input), `dynamic` (all
            of dynamic layers), the name of an operator, e.g. `fdconv` (all of its layers), `all` (everything, what the
            model's author holds fixed included), and globs for fully qualified names of parameters, in which `*` also
            matches dots.

    Returns:
        Names of the parameters that train, in the model's order.

    Raises:
        FineTuningError: a word or pattern means no parameter, or there is none. Nothing was changed.

    Examples:
        >>> from torch import nn
        >>> import fdsurgery
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> model = fdsurgery.convert(model)
        >>> names = fdsurgery.freeze(model, ["modulation", "4.*"])  # and a new head
        >>> names[0], names[-1]
        ('2.KSM_Global.fc.weight', '4.bias')
    """
    entries = list(entries_of(model))
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


def _depth_scales(model: nn.Module, entries: Sequence[Entry], layer_decay: float) -> dict[str, float]:
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


def _is_meant(wanted: str, entry: Entry, names: Sequence[str]) -> bool:
    """True if a word or pattern of `freeze` means a parameter, which has these names."""
    if wanted == "modulation":
        return entry.kind == "modulation"
    if wanted == "dynamic":
        return entry.layer is not None
    if wanted in operators():
        return entry.operator == wanted
    return wanted == "all" or any(fnmatchcase(name, wanted) for name in names)


def _nothing_meant(wanted: str, entries: Sequence[Entry]) -> str:
    nothing = f"nothing to train as {wanted!r}: "
    if wanted in (*SELECTIONS, *operators()) and all(entry.layer is None for entry in entries):
        return nothing + "the model has no dynamic layer; convert it first"
    if wanted in SELECTIONS:
        return nothing + (
            "the dynamic layers have no modulation, or are of an operator that does not tell which parameters that is; "
            "name these by patterns"
        )
    if wanted in operators():
        there = sorted({entry.operator for entry in entries if entry.operator is not None})
        return nothing + f"the dynamic layers are of {', '.join(there)}"
    known = [*SELECTIONS, *operators(), *(entry.name for entry in entries)]
    return f"no parameter matches {wanted!r}, and it is none of {', '.join(SELECTIONS)}{near_misses(wanted, known)}"

"""Checkpoints of the authors' code of other operators than FDConv: whole models, in memory.

Their layers are named and scaled otherwise than ours, and one of them has its kernels at the root of the model. So a
model is built and converted, and asked what it would be called there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..converted import dynamic_layers
from ..errors import CheckpointError
from ..integrations.base import ModelSource
from ..operators import Operator, operator_of, operators
from ..plan import Plan
from ..planning import Overrides, plan_and_observation
from ..recipe import Recipe
from ..saving.atomic import whole_file
from ..saving.folder import load, save
from ..saving.source import build
from ..surgery import apply
from .files import Checkpoint, Stored
from .matching import MisfitError, Problem


def official_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that a converted model would have in the authors' code of its operators.

    Args:
        model: with dynamic layers; what else it has keeps its names.

    Raises:
        CheckpointError: the authors' code has no such layers, or the model has none that are dynamic.

    Examples:
        >>> import timm, fdsurgery
        >>> from fdsurgery.checkpoints import official_state_dict
        >>> model = fdsurgery.convert(timm.create_model("test_resnet"), operator="dcd")
        >>> sorted(name for name in official_state_dict(model) if name.startswith("layer1.0.conv1"))[-2:]
        ['layer1.0.conv1.p.weight', 'layer1.0.conv1.q.weight']
    """
    layers = dynamic_layers(model)
    if not layers:
        raise CheckpointError(f"{type(model).__name__} has no dynamic layers, and so no state dict of their authors'")
    state = {name: tensor for name, tensor in model.state_dict().items() if _owner(name, layers) is None}
    for operator, own in _by_operator(layers).items():
        state |= operator.to_official(own)
    return state


def load_official_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict of the authors' code into a converted model.

    Args:
        model: converted with the placement and the settings that the checkpoint was trained with.
        state: of the whole model; a prefix of all names is taken off.

    Raises:
        MisfitError: names or shapes differ; the model is as it was.
    """
    expected = official_state_dict(model)
    state = without_prefix(state, expected)
    if problems := misfits(state, expected):
        raise MisfitError(f"the state dict does not fit {type(model).__name__}", problems)
    layers = dynamic_layers(model)
    own = {name: state[name] for name in model.state_dict() if name in state and _owner(name, layers) is None}
    for operator, its in _by_operator(layers).items():
        own |= operator.from_official(its, state)
    model.load_state_dict(own, strict=False)


def without_prefix(state: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """The same, without what stands before every name (`module.`, `backbone.`)."""
    probe = next(iter(expected))
    prefixes = sorted({name.removesuffix(probe) for name in state if name.endswith(probe)}, key=len)
    best = max(prefixes, key=lambda prefix: sum(prefix + name in state for name in expected), default="")
    return {name.removeprefix(best): value for name, value in state.items() if name.startswith(best)}


def misfits(state: Mapping[str, Any], expected: Mapping[str, Tensor]) -> tuple[Problem, ...]:
    """What does not fit between a state dict, or what a file tells of one, and what is expected."""
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    problems = [Problem("missing", name) for name in missing]
    problems += [Problem("unexpected", name) for name in state if name not in expected]
    for name, tensor in expected.items():
        if name in state and tuple(state[name].shape) != tuple(tensor.shape):
            has, wants = ("x".join(map(str, one.shape)) or "a scalar" for one in (state[name], tensor))
            problems.append(Problem("wrong shape", name, f" is {has} in the checkpoint, {wants} in the model"))
    return tuple(problems)


def _owner(name: str, layers: Mapping[str, nn.Module]) -> str | None:
    """The dynamic layer that a tensor is of."""
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            return name
    return None


def _by_operator(layers: Mapping[str, nn.Module]) -> dict[Operator, dict[str, nn.Module]]:
    found: dict[Operator, dict[str, nn.Module]] = {}
    for fqn, layer in layers.items():
        operator = operator_of(layer)
        assert operator is not None
        found.setdefault(operator, {})[fqn] = layer
    return found


def official_operator(checkpoint: Checkpoint) -> Operator | None:
    """The operator whose authors' code wrote a checkpoint; None where it is plain, ours, or read tensor by tensor."""
    leaves = {operator.leaf for operator in operators().values()}
    if any(name.rpartition(".")[2] in leaves for name in checkpoint.tensors):
        return None
    return next((one for one in operators().values() if one.is_official(checkpoint.tensors)), None)


@dataclass(frozen=True)
class WholePlan:
    """What the conversion of a checkpoint in memory reads, makes and writes."""

    checkpoint: Checkpoint
    destination: Path
    source_form: str
    target_form: str
    model: str
    recipe: str | None
    operator: str
    layers: tuple[str, ...]
    nbytes: int
    """Of all tensors that are written."""
    made: Plan | None
    """How the model is converted; None where it is ours already."""
    source: ModelSource | None

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of the result."""
        if self.target_form == "official":
            return ("temperatures and the like are no part of the authors' checkpoints",)
        return ("what no official checkpoint has, such as a temperature, is taken to be at the end of its schedule",)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {
            "from": str(self.checkpoint.path),
            "to": str(self.destination),
            "source_form": self.source_form,
            "target_form": self.target_form,
            "model": self.model,
            "recipe": self.recipe,
            "operator": self.operator,
            "layers": list(self.layers),
            "bytes": self.nbytes,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        by = "as the checkpoint has them" if self.recipe is None else f"by recipe {self.recipe}"
        return "\n".join(
            [
                f"{self.checkpoint.path}: {len(self.checkpoint.tensors)} tensors, {self.source_form}",
                f"{self.model}: {len(self.layers)} dynamic layers of {self.operator}, {by}",
                f"{self.destination}: {self.nbytes / 1e6:.1f} MB, {self.target_form}",
                *(f"note: {note}" for note in self.notes),
            ]
        )


def plan_reading(
    checkpoint: Checkpoint,
    destination: Path,
    operator: Operator,
    spec: str,
    recipe: str | Path | Recipe,
    settings: dict[str, Any],
) -> WholePlan:
    """Plan to make a folder of ours of a checkpoint of the authors' code.

    Raises:
        MisfitError: the checkpoint does not fit the model as the recipe converts it.
        SurgeryError: the model cannot be built or planned.
    """
    with torch.device("meta"):
        model, source = build(spec, pretrained=False)
    name = None if _is_of(recipe, operator) else operator.name
    chosen, _ = plan_and_observation(model, recipe, None, Overrides(settings, name, for_trained=True))
    expected = official_state_dict(apply(chosen, model))
    stored = without_prefix(checkpoint.tensors, expected)
    if problems := misfits(stored, expected):
        raise MisfitError(
            f"{checkpoint.path}, a checkpoint of {operator.name}, does not fit {spec} as recipe {chosen.recipe} "
            "converts it (another placement is --recipe NAME, other settings are --set KEY=VALUE)",
            problems,
        )
    names = tuple(one.site.name for one in chosen.swaps)
    size = sum(one.nbytes for one in stored.values() if isinstance(one, Stored))
    return WholePlan(
        *(checkpoint, destination, "official", "ours", spec, chosen.recipe, operator.name, names, size),
        *(chosen, source),
    )


def _is_of(recipe: str | Path | Recipe, operator: Operator) -> bool:
    """True if a recipe that is named gives sites to an operator."""
    from ..recipe import load_recipe

    if recipe == "auto":
        return False
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return any(rule.operator == operator.name for rule in chosen.swap)


def plan_writing(checkpoint: Checkpoint, destination: Path) -> WholePlan:
    """Plan to make a checkpoint of the authors' code of a folder of ours.

    Raises:
        CheckpointError: the authors' code has no such layers.
    """
    model = load(checkpoint.path)
    layers = dynamic_layers(model)
    names = sorted({operator.name for operator in _by_operator(layers)})
    size = sum(tensor.numel() * tensor.element_size() for tensor in official_state_dict(model).values())
    return WholePlan(
        *(checkpoint, destination, "ours", "official", type(model).__name__, None, ", ".join(names), tuple(layers)),
        *(size, None, None),
    )


def carry_out_whole(planned: WholePlan) -> None:
    """Convert a checkpoint as planned, all or nothing."""
    if planned.made is None:
        state = official_state_dict(load(planned.checkpoint.path))
        planned.destination.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(planned.destination) as stream:
            if planned.destination.suffix == ".safetensors":
                from safetensors.torch import save as to_bytes

                stream.write(to_bytes({name: one.contiguous() for name, one in state.items()}, {"format": "pt"}))
            else:
                torch.save({name: one.contiguous() for name, one in state.items()}, stream)
        return
    assert planned.source is not None
    model, _ = build(planned.model, pretrained=False)
    model = apply(copy.deepcopy(planned.made), model)
    tensors = {name: planned.checkpoint.read(name) for name in planned.checkpoint.tensors}
    load_official_state_dict(model, tensors)
    save(model.eval(), planned.destination, source=planned.source, plan=planned.made)

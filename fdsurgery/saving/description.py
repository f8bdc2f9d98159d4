"""What the config of a transformers model says of its dynamic layers.

`config.quantization_config` is where transformers looks for somebody who changes a model's layers before its weights
are read. The description stands there, and goes wherever the config goes: `model.save_pretrained`, `Trainer`, the hub.
Without this library transformers only warns of an unknown method, and would load plain layers with random weights. So
`config.fusion_config` holds an entry that it does not know either, and refuses, quoting the entry.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..discovery.kinds import kind_of
from ..errors import CheckpointError, near_misses
from ..finetune import remembered
from ..operators import BuildError, Wanted, build_layers, get_operator, made_layers, operator_of
from ..recipe import FineTune
from ..rewrite.folded import Folded, folded_norms, is_norm

if TYPE_CHECKING:
    from ..plan import Plan

METHOD = "fdsurgery"
FORMAT = 1
NOTICE = "this model has dynamic layers; `pip install fdsurgery`, and `import fdsurgery` before you load it"


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same operator and settings."""

    operator: str
    settings: dict[str, Any]
    shapes: dict[str, list[int]]
    """The shape of each layer's static weight, by the layer's name."""


@dataclass(frozen=True)
class Origin:
    """What is on record of a conversion; None where it is not known."""

    recipe: str | None = None
    """The recipe's name."""
    multiply_adds: int | None = None
    """Of the plain model, for one sample at its own size."""
    multiply_adds_added: int | None = None
    """By the dynamic layers."""

    @staticmethod
    def of(plan: Plan, model: nn.Module) -> Origin:
        """What a plan tells of a model; nothing if the model has other dynamic layers than those of the plan."""
        if not is_plan_of(plan, model):
            return Origin()
        return Origin(plan.recipe, plan.multiply_adds or None, plan.multiply_adds_added or None)


@dataclass(frozen=True)
class Description:
    """The dynamic layers of a model: enough to put them into a plain one, whatever recipe they came from."""

    model_class: str
    """The class in which the layers have these names."""
    base_model_prefix: str
    """The name that classes with a head give the base model; a base model itself has no such part."""
    origin: Origin
    layers: tuple[LayerGroup, ...]
    scaled: Mapping[str, bool] = field(default_factory=dict)
    """Layers with a scale of each filter, into which a norm was folded, and whether they have a bias."""
    folded: tuple[str, ...] = ()
    """The norms that were folded."""
    finetune: FineTune = field(default_factory=FineTune)
    """What the model remembers of how its recipe has it trained."""

    @staticmethod
    def of(model: nn.Module, origin: Origin) -> Description:
        """Describe a transformers model as it is."""
        groups: dict[str, LayerGroup] = {}
        for name, layer in model.named_modules():
            operator = operator_of(layer)
            if operator is not None:
                settings = operator.settings_of(layer)
                key = json.dumps([operator.name, settings], sort_keys=True)
                group = groups.setdefault(key, LayerGroup(operator.name, settings, {}))
                group.shapes[name] = _weight_shape(layer)
        prefix = str(getattr(model, "base_model_prefix", ""))
        scaled = {name: layer.bias is not None for name, layer in model.named_modules() if _is_scaled(layer)}
        folded = tuple(folded_norms(model))
        layers = tuple(groups.values())
        return Description(type(model).__name__, prefix, origin, layers, scaled, folded, remembered(model))

    def to_dict(self) -> dict[str, Any]:
        """The description as plain JSON types, as it stands in the config."""
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            "how_to_load": NOTICE,
            "versions": {"fdsurgery": version("fdsurgery"), "torch": torch.__version__, **_transformers_version()},
            "model_class": self.model_class,
            "base_model_prefix": self.base_model_prefix,
            **asdict(self.origin),
            "layers": [asdict(group) for group in self.layers],
            **({"scaled": dict(self.scaled)} if self.scaled else {}),
            **({"folded": list(self.folded)} if self.folded else {}),
            **({"finetune": finetune} if (finetune := self.finetune.to_dict()) else {}),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Description:
        """Undo `to_dict`.

        Raises:
            CheckpointError: the description is damaged, of an unknown format, or names an unknown operator or setting.
        """
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"quantization_config: expected format {FORMAT}, found {data.get('format')!r}; "
                "a newer fdsurgery may read it"
            )
        try:
            layers = tuple(_group_from_dict(entry) for entry in data["layers"])
            origin = _origin_from_dict(data)
            scaled, folded = _folding_from_dict(data)
            finetune = FineTune.from_dict(data.get("finetune", {}))
            names = data["model_class"], data["base_model_prefix"]
            description = Description(*names, origin, layers, scaled, folded, finetune)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"quantization_config is damaged: {type(error).__name__}: {error}") from None
        if not layers:
            raise CheckpointError("quantization_config is damaged: it names no layers")
        return description

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers of a model that are described, by their names in the description.

        The model may be of another class than the one described, with another head or without one. Then layers outside
        the base model need not be there.

        Raises:
            CheckpointError: the model lacks a layer.
        """
        layers = dict(model.named_modules(remove_duplicate=False))
        found: dict[str, nn.Module] = {}
        for name in (name for group in self.layers for name in group.shapes):
            layer = next((layers[other] for other in self._names_elsewhere(name) if other in layers), None)
            if layer is not None:
                found[name] = layer
            elif type(model).__name__ == self.model_class or name.startswith(f"{self.base_model_prefix}."):
                raise CheckpointError(
                    f"{type(model).__name__} has no layer {name!r}, which was dynamic in the saved {self.model_class}"
                    f"{near_misses(name, layers)}"
                )
        if not found:
            raise CheckpointError(
                f"a {type(model).__name__} has none of the dynamic layers of the saved {self.model_class}"
            )
        return found

    def replacements_for(self, model: nn.Module) -> dict[nn.Module, nn.Module]:
        """A dynamic layer for each plain one that is described, and what stands for each norm that was folded.

        Raises:
            CheckpointError: the model lacks a layer, or has one in its place that cannot be swapped.
        """
        found = self.find(model)
        for name, layer in found.items():
            if kind_of(layer) is None:
                kind = type(layer).__name__
                raise CheckpointError(f"{name!r} is a {kind} in this model, not a layer that can be swapped")
        wanted = {name: group for group in self.layers for name in group.shapes if name in found}
        order = {layer: rank for rank, layer in enumerate(model.modules())}
        try:
            made = build_layers(
                Wanted(name, found[name], wanted[name].operator, wanted[name].settings)
                for name in sorted(found, key=lambda name: order[found[name]])
            )
            for name in made.keys() & self.scaled.keys():
                get_operator(wanted[name].operator).expect_scale(made[name], bias=self.scaled[name])
        except BuildError as error:
            cause = error.__cause__
            said = f"{error.name!r} cannot be made dynamic: {type(cause).__name__}: {cause}"
            raise CheckpointError(said) from cause
        replacements = {found[name]: layer for name, layer in made.items()}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in self.folded:
            norm = next((modules[other] for other in self._names_elsewhere(name) if other in modules), None)
            if norm is not None and is_norm(norm):
                replacements[norm] = Folded(norm)
        return replacements

    def origin_for(self, model: nn.Module) -> Origin:
        """What holds of a model that was built from this; another class with another head costs something else."""
        return self.origin if type(model).__name__ == self.model_class else Origin(self.origin.recipe)

    def unchanged(self, model: nn.Module) -> dict[str, nn.Module]:
        """Of the layers that `find` finds, those with the shape described."""
        shapes = {name: shape for group in self.layers for name, shape in group.shapes.items()}
        return {name: layer for name, layer in self.find(model).items() if _weight_shape(layer) == shapes[name]}

    def _names_elsewhere(self, name: str) -> tuple[str, str, str]:
        """A layer's name in its own class, in the bare base model, and in a class with a head."""
        prefix = f"{self.base_model_prefix}."
        return name, name.removeprefix(prefix), prefix + name


def describe(model: nn.Module, origin: Origin | None = None) -> None:
    """Make the configs of a model tell which of its layers are dynamic; of a model without any, that there are none.

    Args:
        model: any model. Each part of it that is a transformers model with a config of its own describes itself, so
            that it can be loaded alone.
        origin: for the record; by default what was noted before.
    """
    for part in _transformers_models(model):
        noted = origin or _recorded_origin(part.config)
        # What is told of the whole model says nothing of the costs of a part.
        description = Description.of(part, noted if part is model or origin is None else Origin(noted.recipe))
        if description.layers:
            part.config.quantization_config = description.to_dict()
            part.config.fusion_config = {**_fusions(part.config), NOTICE: False}
        elif is_description(_as_dict(part.config)):
            fusions = _fusions(part.config)
            del part.config.quantization_config
            vars(part.config).pop("fusion_config", None)
            if fusions:
                part.config.fusion_config = fusions


def is_plan_of(plan: Plan, model: nn.Module) -> bool:
    """True if a plan's swaps are the dynamic layers that a model has, with their operators and settings."""
    return not _unlike(plan, model)


def check_plan(plan: Plan | None, model: nn.Module) -> None:
    """Raise `CheckpointError`, with the first difference, if a plan to be kept on record is not that of the model."""
    different = [] if plan is None else _unlike(plan, model)
    if different:
        raise CheckpointError(
            f"the plan is not that of this model: {len(different)} dynamic layers differ, {different[0]!r} first; pass "
            "the plan that was applied, or none"
        )


def _unlike(plan: Plan, model: nn.Module) -> list[str]:
    """Layers that are swapped by a plan or dynamic in a model, but not alike in both."""
    has = {name: (one.operator.name, one.operator.settings_of(one.layer)) for name, one in made_layers(model).items()}
    told = {one.site.name: (one.operator, one.settings) for one in plan.swaps}
    return [name for name in {**has, **told} if has.get(name) != told.get(name)]


def is_description(quantization_config: Any) -> bool:
    """True for a config's `quantization_config` that is ours."""
    return isinstance(quantization_config, dict) and quantization_config.get("quant_method") == METHOD


def is_transformers_model(model: nn.Module) -> bool:
    """True for models that transformers can save."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def _transformers_models(model: nn.Module) -> Iterator[Any]:
    """The outermost part for each config."""
    seen: set[int] = set()
    for part in model.modules():
        if is_transformers_model(part) and id(part.config) not in seen:
            seen.add(id(part.config))
            yield part


def _fusions(config: Any) -> dict[str, Any]:
    """The user's entries of `fusion_config`, without ours."""
    given = getattr(config, "fusion_config", None)
    return {name: value for name, value in given.items() if name != NOTICE} if isinstance(given, Mapping) else {}


def _as_dict(config: Any) -> Any:
    given: Any = getattr(config, "quantization_config", None)
    return given.to_dict() if hasattr(given, "to_dict") else given


def _recorded_origin(config: Any) -> Origin:
    given = _as_dict(config)
    return _origin_from_dict(given) if is_description(given) else Origin()


def _origin_from_dict(data: dict[str, Any]) -> Origin:
    origin = Origin(*(data.get(entry.name) for entry in fields(Origin)))
    counts = (origin.multiply_adds, origin.multiply_adds_added)
    if not isinstance(origin.recipe, str | None) or not all(isinstance(count, int | None) for count in counts):
        raise TypeError("recipe is a name, and multiply_adds are numbers")
    return origin


def _folding_from_dict(data: dict[str, Any]) -> tuple[dict[str, bool], tuple[str, ...]]:
    scaled, folded = data.get("scaled", {}), data.get("folded", [])
    if not isinstance(scaled, dict) or not all(isinstance(value, bool) for value in scaled.values()):
        raise TypeError("'scaled' must be true or false by the names of layers")
    if not isinstance(folded, list) or not all(isinstance(name, str) for name in folded):
        raise TypeError("'folded' must be a list of names")
    return scaled, tuple(folded)


def _is_scaled(layer: nn.Module) -> bool:
    operator = operator_of(layer)
    return operator is not None and operator.is_scaled(layer)


def _group_from_dict(data: dict[str, Any]) -> LayerGroup:
    shapes = data["shapes"]
    if not isinstance(shapes, dict) or not all(isinstance(shape, list) for shape in shapes.values()):
        raise TypeError("shapes must be lists by the names of layers")
    if not isinstance(data["operator"], str) or not isinstance(data["settings"], dict):
        raise TypeError("an operator is a name, and its settings are a mapping")
    operator = get_operator(data["operator"])
    return LayerGroup(operator.name, operator.saved_settings(data["settings"]), shapes)


def _weight_shape(layer: nn.Module) -> list[int]:
    weight: Any = layer.weight
    return list(weight.shape)


def _transformers_version() -> dict[str, str]:
    library = sys.modules.get("transformers")
    return {} if library is None else {"transformers": str(library.__version__)}

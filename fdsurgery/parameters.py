"""The parameters of a model, and what each is to a dynamic layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from .operators import made_layers
from .operators.base import ParameterKind


@dataclass(frozen=True)
class Entry:
    """A parameter of a model, and what it is there."""

    name: str
    parameter: nn.Parameter
    layer: str | None = None
    """Name of the dynamic layer that holds it; None outside of all."""
    operator: str | None = None
    """Name of that layer's operator."""
    kind: ParameterKind | Literal["other"] = "other"
    """What it is to a dynamic layer. All but the bias together make what was the weight."""

    @property
    def makes_weight(self) -> bool:
        """True for what stands in the place of a plain layer's weight."""
        return self.layer is not None and self.kind != "bias"

    @property
    def plain_name(self) -> str:
        """The parameter of the plain model in whose place it is: the weight, for whatever makes a weight."""
        return joined(self.layer, "weight") if self.makes_weight else self.name


def entries_of(model: nn.Module) -> Iterator[Entry]:
    """The parameters of a model, each once."""
    inside: dict[nn.Parameter, tuple[str, str, ParameterKind]] = {}
    for prefix, (layer, operator) in made_layers(model).items():
        kinds = operator.parameter_kinds(layer)
        for parameter in layer.parameters():
            inside.setdefault(parameter, (prefix, operator.name, kinds.get(parameter, "weight")))
    for name, parameter in model.named_parameters():
        yield Entry(name, parameter, *inside.get(parameter, (None, None, "other")))


def undecayed_of(model: nn.Module, entries: Sequence[Entry]) -> set[nn.Parameter]:
    """Parameters whose size means something: norms, biases, scalars and vectors, band edges, the model's own list."""
    own = getattr(model, "no_weight_decay", None)
    patterns = own() if callable(own) else ()
    told = {parameter for one in made_layers(model).values() for parameter in one.operator.undecayed(one.layer)}
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
        or entry.parameter in told | norms
        or (entry.parameter not in weights and _is_vector(entry.parameter))
        or any(fnmatchcase(entry.plain_name, pattern) for pattern in patterns)
    }


def _is_vector(tensor: Tensor) -> bool:
    """True for numbers along one axis, written with others of length 1 as they are multiplied with feature maps."""
    return sum(size > 1 for size in tensor.shape) <= 1


def joined(prefix: str | None, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name

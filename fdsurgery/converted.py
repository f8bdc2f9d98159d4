"""What a converted model holds: its dynamic layers, and how many of its parameters train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .integrations import network_of
from .operators import operator_of
from .parameters import entries_of
from .wrappers import plain_modules


def dynamic_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The dynamic layers of a model, of whatever operator.

    Args:
        model: converted or not. It may be compiled, or wrapped in DDP or an average of its weights, and so may its
            parts.

    Returns:
        The layers by the names that they have in the plain model, in its order. A layer that is used in several places
        is there once, by its first name. Empty if the model has none.

    Examples:
        >>> from torch import nn
        >>> import fdsurgery
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> for name, layer in fdsurgery.dynamic_layers(fdsurgery.convert(model)).items():
        ...     print(name, type(layer).__name__)
        2 FDConv2d
    """
    return {name: layer for name, layer in plain_modules(network_of(model)) if operator_of(layer) is not None}


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, each number counted once. Made by `count_parameters`.

    Examples:
        >>> from torch import nn
        >>> import fdsurgery
        >>> fdsurgery.count_parameters(nn.Linear(8, 8))
        ParameterCount(all=72, trainable=72, modulation=0, trainable_modulation=0)
    """

    all: int
    """All parameters."""
    trainable: int
    """Those with `requires_grad`."""
    modulation: int
    """Those by which dynamic layers change their weight or their input from sample to sample."""
    trainable_modulation: int
    """Those of the modulation with `requires_grad`."""

    def __str__(self) -> str:
        share = 100 * self.trainable / self.all if self.all else 0.0
        return (
            f"trainable params: {self.trainable:,} || all params: {self.all:,} || trainable%: {share:.4f} || "
            f"modulation params: {self.modulation:,}, of which {self.trainable_modulation:,} trainable"
        )


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of a model.

    Args:
        model: converted or not, wrapped or not. Parameters that several modules share count once.

    Examples:
        >>> from torch import nn
        >>> import fdsurgery
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> count = fdsurgery.count_parameters(fdsurgery.convert(model))
        >>> count.all, count.modulation
        (3258, 2110)
    """
    entries = list(entries_of(network_of(model)))
    modulation = [entry.parameter for entry in entries if entry.kind == "modulation"]
    return ParameterCount(
        *_numbers([entry.parameter for entry in entries]),
        *_numbers(modulation),
    )


def _numbers(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """How many numbers some parameters hold, and how many of them train."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print in one line how many parameters train, as PEFT's models do, and how many of them are of the modulation.

    Args:
        model: converted or not, wrapped or not; after `freeze`.

    Examples:
        >>> from torch import nn
        >>> import fdsurgery
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> model = fdsurgery.convert(model)
        >>> names = fdsurgery.freeze(model, "modulation")
        >>> fdsurgery.print_trainable_parameters(model)
        trainable params: 2,110 || all params: 3,258 || trainable%: 64.7637 || modulation params: ...
    """
    print(count_parameters(model))

"""Arguments of a forward, and what makes them for a model whose forward nobody has called yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2
"""Samples in a guessed batch. Two: no axis of size 1 is ever the batch, and one token per sample is not one row."""

USUAL_SIZES = (224, 256, 384, 512, 448, 320, 288, 240, 192, 128, 96, 64, 32, 28)
"""Sides of images, the most usual first."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of a forward: `model(*inputs.args, **inputs.kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Inputs:
        """Read what a user passed: a tensor is the only argument, a tuple or list holds positional arguments, and a
        mapping keyword arguments. A model that takes a list of images as one argument is called by `([image, image],)`.
        """
        if isinstance(value, Inputs):
            return value
        if isinstance(value, Mapping):
            return cls(kwargs={str(key): item for key, item in value.items()})
        if isinstance(value, (tuple, list)):
            return cls(tuple(value))
        return cls((value,))

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with every tensor changed."""
        return Inputs(_map(self.args, change), _map(self.kwargs, change))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors with a name for each: the keyword, or the position, and what leads to it inside containers."""
        for position, value in enumerate(self.args):
            yield from _walk(f"input_{position}", value)
        for name, value in self.kwargs.items():
            yield from _walk(name, value)

    def __str__(self) -> str:
        return ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self.tensors()) or "no tensors"


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_map(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def _walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)):
        for position, item in enumerate(value):
            yield from _walk(f"{name}.{position}", item)


class ExampleTensors:
    """Makes tensors on a model's device and in its dtype, and draws no random number of anybody else's."""

    def __init__(self, model: nn.Module) -> None:
        weights = [*model.parameters(), *model.buffers()]
        like = next((weight for weight in weights if weight.is_floating_point()), None)
        self.place: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
        if like is not None:
            self.place = {"device": like.device, "dtype": like.dtype}

    def floats(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1."""
        if self.place["device"].type == "meta":
            return torch.empty(shape, **self.place)
        source = torch.Generator("cpu").manual_seed(0)
        return torch.rand(shape, generator=source, dtype=torch.float32, device="cpu").to(**self.place)

    def image(self, channels: int, height: int, width: int, *before: int) -> Tensor:
        """A batch of images; `before` are the sizes in front of the channels, if they are not `(BATCH,)`."""
        return self.floats(*(before or (BATCH,)), channels, height, width)

    def ones(self, *shape: int) -> Tensor:
        """Whole numbers, all 1: tokens, or a mask that hides nothing."""
        return torch.ones(shape, dtype=torch.long, device=self.place["device"])

    def rows(self, row: Iterable[int], count: int = BATCH) -> Tensor:
        """The same whole numbers for each sample."""
        return torch.tensor([list(row)] * count, dtype=torch.long, device=self.place["device"])


def image_channels(model: nn.Module, shape: tuple[int, ...] | None = None) -> list[int]:
    """Numbers of input channels to try.

    Args:
        model: its own `in_chans` and its first convolution tell.
        shape: `(channels, height, width)`, where the model's library tells it.
    """
    declared = setting(model, ("in_chans",))
    if declared is None and shape is not None:
        declared = shape[0]
    # Images are read by convolutions of two dimensions, whatever kinds of layers can be swapped.
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    first = conv.in_channels if conv is not None else 3
    declared = declared if isinstance(declared, int) else 3
    # A stem that folds pixels into channels has a multiple of the image's channels; anything else is the image's own.
    return distinct([declared, first] if first % declared == 0 else [first, declared])


def image_sizes(model: nn.Module, shape: tuple[int, ...] | None = None) -> list[tuple[int, int]]:
    """`(height, width)` of the images to try.

    Args:
        model: its own `img_size` tells, or that of a part.
        shape: `(channels, height, width)`, where the model's library tells it.
    """
    holders = (getattr(model, "patch_embed", None), model, *model.modules())
    told = [as_size(getattr(holder, name, None)) for holder in holders for name in ("img_size", "image_size")]
    return distinct([*told, None if shape is None else as_size(shape[1:]), *map(as_size, USUAL_SIZES)])


def as_size(value: Any) -> tuple[int, int] | None:
    """`(height, width)` that a configuration gives as a number, a pair or a mapping; None for anything else."""
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value, value]
    if isinstance(value, (tuple, list)) and len(value) == 2:
        height, width = value
        if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
            return height, width
    return None


def setting(holder: Any, names: Iterable[str]) -> Any:
    """The first of these attributes that a configuration, or the vision or backbone part of it, has."""
    parts = ("vision_config", "backbone_config", "encoder", "image_config", "vision_encoder_config")
    for part in (holder, *(getattr(holder, part, None) for part in parts)):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


def distinct(values: Iterable[Any]) -> list[Any]:
    """The values without repetitions, and without None."""
    return list(dict.fromkeys(value for value in values if value is not None))

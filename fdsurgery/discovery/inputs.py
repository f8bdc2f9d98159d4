"""What to call a model with, when nobody says: guesses, best first, each tried until the model's forward runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

BATCH = 2
"""Samples in a guessed batch. Two: no axis of size 1 is ever the batch, and one token per sample is not one row."""

_SIZES = (224, 256, 384, 512, 448, 320, 288, 240, 192, 128, 96, 64, 32, 28)
_TOKENS = 16


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


def guesses(model: nn.Module) -> Iterator[Inputs]:
    """Inputs that the model may take, the most likely first, on its device and in its dtype.

    Sizes and channels come from timm's `pretrained_cfg`, a transformers `config`, the model's own `img_size` and first
    convolution; for unknown models the usual image sizes are tried, and token inputs if the model begins with a linear.
    What `torch.export` wrote tells its own.
    """
    make = _Maker(model)
    if isinstance(model, fx.GraphModule):
        yield from _for_exported(model, make)
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) is not None and hasattr(model, "main_input_name"):
        yield from _for_transformers(model, config, make)
    elif "torchvision.models.detection" in {part.__module__.rpartition(".")[0] for part in type(model).__mro__}:
        for channels, size in product(_channels(model), _sizes(model)):
            yield Inputs(([make.image(channels, size, size)[0]],))
    else:
        first = next((module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))), None)
        if isinstance(first, nn.Linear):
            yield Inputs((make.floats(BATCH, _TOKENS, first.in_features),))
            yield Inputs((make.floats(BATCH, first.in_features),))
            yield Inputs((make.floats(BATCH, 8, 8, first.in_features),))
        for channels, size in product(_channels(model), _sizes(model)):
            yield Inputs((make.image(channels, *_pair(size)),))


class _Maker:
    """Makes tensors on a model's device and in its dtype, from a generator of its own."""

    def __init__(self, model: nn.Module) -> None:
        weights = [*model.parameters(), *model.buffers()]
        like = next((weight for weight in weights if weight.is_floating_point()), None)
        self.place: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
        if like is not None:
            self.place = {"device": like.device, "dtype": like.dtype}

    def floats(self, *shape: int) -> Tensor:
        if self.place["device"].type == "meta":
            return torch.empty(shape, **self.place)
        source = torch.Generator("cpu").manual_seed(0)
        return torch.rand(shape, generator=source, dtype=torch.float32, device="cpu").to(**self.place)

    def image(self, channels: int, height: int, width: int, *before: int) -> Tensor:
        return self.floats(*(before or (BATCH,)), channels, height, width)

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.long, device=self.place["device"])

    def rows(self, row: Iterable[int], count: int = BATCH) -> Tensor:
        return torch.tensor([list(row)] * count, dtype=torch.long, device=self.place["device"])


def _channels(model: nn.Module) -> list[int]:
    """Numbers of input channels to try."""
    declared = _setting(model, ("in_chans",))
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if declared is None and isinstance(config, Mapping) and config.get("input_size"):
        declared = config["input_size"][0]
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    first = conv.in_channels if conv is not None else 3
    declared = declared if isinstance(declared, int) else 3
    # A stem that folds pixels into channels has a multiple of the image's channels; anything else is the image's own.
    return _unique([declared, first] if first % declared == 0 else [first, declared])


def _sizes(model: nn.Module) -> list[Any]:
    """Image sizes to try, as ints or (height, width)."""
    sizes: list[Any] = []
    for holder in (getattr(model, "patch_embed", None), model, *model.modules()):
        for name in ("img_size", "image_size"):
            size = _as_size(getattr(holder, name, None))
            if size is not None:
                sizes.append(size)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        sizes.append(_as_size(config["input_size"][1:]))
    return _unique([*sizes, *_SIZES])


def _as_size(value: Any) -> int | tuple[int, int] | None:
    if isinstance(value, Mapping):
        value = [value.get("height"), value.get("width")]
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(part, int) and part > 0 for part in value)
    ):
        return value[0] if value[0] == value[1] else (value[0], value[1])
    return None


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(value for value in values if value is not None))


def _setting(holder: Any, names: Iterable[str]) -> Any:
    """The first of these attributes that a configuration, or the vision or backbone part of it, has."""
    parts = ("vision_config", "backbone_config", "encoder", "image_config", "vision_encoder_config")
    for part in (holder, *(getattr(holder, part, None) for part in parts)):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


def _for_exported(graph_module: fx.GraphModule, make: _Maker) -> Iterator[Inputs]:
    """Inputs like those that the graph was exported with."""
    like = [node.meta.get("val") for node in graph_module.graph.nodes if node.op == "placeholder"]
    structure = getattr(graph_module, "_in_spec", None)
    if structure is None or not all(isinstance(value, Tensor) for value in like):
        return
    made = [
        make.floats(*map(int, value.shape)).to(value.dtype)
        if value.is_floating_point()
        else make.ones(*map(int, value.shape)).to(value.dtype)
        for value in like
    ]
    args, kwargs = pytree.tree_unflatten(made, structure)
    yield Inputs(args, kwargs)


def _for_transformers(model: nn.Module, config: Any, make: _Maker) -> Iterator[Inputs]:
    takes = inspect.signature(model.forward).parameters
    declared = _setting(config, ("num_channels", "in_channels", "in_chans"))
    channels = _unique([declared if isinstance(declared, int) else None, *_channels(model)])
    own = _as_size(_setting(config, ("image_size", "img_size", "pretrain_image_size", "crop_size")))
    patch = _as_size(_setting(config, ("patch_size", "spatial_patch_size")))
    if "grid_thw" in takes and isinstance(patch, int):  # rows of patches, as in the towers of Qwen-VL and GLM-4V
        frames = _setting(config, ("temporal_patch_size",)) or 1
        rows = make.floats(BATCH * 64, channels[0] * frames * patch * patch)
        yield Inputs((rows,), {"grid_thw": make.rows((1, 8, 8))})
    if "spatial_shapes" in takes and isinstance(patch, int):  # padded patches, as in SigLIP 2
        side = int((_setting(config, ("num_patches",)) or 256) ** 0.5)
        yield Inputs(
            kwargs={
                "pixel_values": make.floats(BATCH, side * side, channels[0] * patch * patch),
                "pixel_attention_mask": make.ones(BATCH, side * side),
                "spatial_shapes": make.rows((side, side)),
            }
            | _companions(model, takes, make)
        )
    frames = _setting(config, ("num_frames", "frames_per_clip"))
    main = str(model.main_input_name)
    name = next((key for key in ("pixel_values", "pixel_values_videos") if key in takes), main)
    if frames is None and name == "pixel_values_videos":
        frames = 2
    for image_channels, size in product(channels, _unique([own, *_SIZES])):
        shape = (image_channels, *_pair(size))
        companions = _companions(model, takes, make)
        companions |= {key: make.image(*shape) for key in ("prompt_pixel_values", "prompt_masks") if key in takes}
        if isinstance(frames, int) and frames > 1:
            yield Inputs(kwargs={name: make.image(*shape, BATCH, frames)} | companions)
            yield Inputs(kwargs={name: make.image(*shape, frames)} | companions)
        yield Inputs(kwargs={name: make.image(*shape)} | companions)


def _companions(model: nn.Module, takes: Mapping[str, Any], make: _Maker) -> dict[str, Any]:
    """What models for images and text want besides the image."""
    words = 8
    made: dict[str, Any] = {}
    if "input_ids" in takes:
        made["input_ids"] = make.ones(BATCH, words)
        if "bbox" in takes:
            made["bbox"] = torch.zeros_like(make.ones(BATCH, words, 4))
    if "task_inputs" in takes:
        made["task_inputs"] = make.ones(BATCH, getattr(model.config, "task_seq_len", 77))
    return made

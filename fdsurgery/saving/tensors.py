"""A model's tensors as a file of safetensors holds them, and back: what is shared once, each tensor in its own type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, first_lines


def tensors_once(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: shared tensors under their first name only, no overlapping memory."""
    names: dict[int, str] = {}
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    try:
        state = model.state_dict(keep_vars=True)
    except RuntimeError as error:  # as of a model that was prepared for inference
        raise CheckpointError(f"the model gives no state dict: {first_lines(error)}") from error
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{name!r} is a {type(tensor).__name__}; only tensors can be saved")
        if tensor.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device and has no values to save; load the weights first")
        if names.setdefault(id(tensor), name) == name:
            storage = tensor.untyped_storage().data_ptr()
            detached = tensor.detach().contiguous()
            tensors[name] = detached.clone() if storage in storages else detached
            storages.add(storage)
    return tensors


def under_every_name(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Undo `tensors_once`: tensors that the model knows under several names under each of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    full = dict(tensors)
    for group in names.values():
        saved = next((tensors[name] for name in group if name in tensors), None)
        if saved is not None:
            full.update(dict.fromkeys(group, saved))
    return full


def match_dtypes(model: nn.Module, tensors: dict[str, Tensor], buffers: dict[str, Any]) -> None:
    """Give each tensor of a model the type in which it was saved."""
    wanted = {name: tensor.dtype for name, tensor in tensors.items()}
    for name, code in buffers.items():
        if isinstance(dtype := getattr(torch, str(code), None), torch.dtype):
            wanted[name] = dtype
    for name, tensor in named_tensors(model):
        dtype = wanted.get(name, tensor.dtype)
        if dtype != tensor.dtype:
            tensor.data = tensor.data.to(dtype)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def unsaved_dtypes(model: nn.Module) -> dict[str, str]:
    """The types of the real buffers that a state dict leaves out, where they are not the usual one."""
    saved = model.state_dict(keep_vars=True)
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point() and buffer.dtype != torch.float32
    }

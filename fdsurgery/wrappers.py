"""What torch wraps around a model or a part of it, seen through: compiled, parallel and averaged modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .errors import CheckpointError
from .integrations import refusal_of


def inner_of(model: nn.Module) -> nn.Module:
    """The module inside of all wrappers; itself where there is none."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()`, with the names of the plain model: wrappers and what they put into names left out."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = inner_of(module)
        if module in seen:
            return
        seen.add(module)
        yield name, module
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from walk(model, "")


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The module inside of all wrappers, and for the time of the body without wrappers of its parts.

    So names are those of the plain model: wrappers put `_orig_mod.` and `module.` into them.

    Raises:
        CheckpointError: the model has a form in which its weights are not whole or not its own.
    """
    inner = inner_of(model)
    _refuse(inner)
    edits: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for module in list(inner.modules()):
            for name, child in list(module._modules.items()):
                if child is not None and inner_of(child) is not child and _inside(module) is None:
                    edits.append((module, name, child))
                    module._modules[name] = inner_of(child)
        yield inner
    finally:
        for module, name, child in edits:
            module._modules[name] = child


def _inside(model: nn.Module) -> nn.Module | None:
    parallel = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, parallel):
        return model.module
    # By name, because importing torch.optim.swa_utils and torch._dynamo takes time.
    names = {base.__name__ for base in type(model).__mro__}
    if "AveragedModel" in names and isinstance(inside := model._modules.get("module"), nn.Module):
        return inside
    return model._modules.get("_orig_mod")


def _refuse(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise CheckpointError("the model is a TorchScript module; save the Python model that it was made from")
    if (refusal := refusal_of(model, "save")) is not None:
        raise CheckpointError(refusal)
    for module in model.modules():
        if any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in type(module).__mro__):
            raise CheckpointError(
                "the model is sharded by FSDP; gather its weights (torch.distributed.checkpoint.state_dict.get_model_"
                "state_dict with full_state_dict=True), load them into the plain converted model, and save that"
            )
    for fqn, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise CheckpointError(f"{fqn!r} is a DTensor; gather the weights and save the plain converted model")

"""Swaps modules in place, by identity: wherever a model holds the old layer, it holds the new one afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from ..discovery.effective import is_plain
from ..discovery.kinds import kind_of
from .fused_paths import choose_paths

Edit = tuple[Any, Any, Any]
"""A container (dict, list or deque), a key of it, and the value the key had before."""

# nn.Module keeps its hooks in these dicts. The new layer shares the very objects, so that handles go on working:
# `handle.remove()` finds its hook through the dict.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_non_full_backward_hook",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@contextmanager
def swapped(
    model: nn.Module,
    replacements: Mapping[nn.Module, nn.Module],
    made: Mapping[nn.Module, Collection[str]] | None = None,
) -> Iterator[None]:
    """Swap modules of `model`; if the body raises, put everything back.

    Args:
        model: changed in place, in every parent's attributes and in plain lists, tuples and dicts that hold modules.
        replacements: new module for each old one; hooks and foreign members of the old one are carried over.
        made: for each old module the names of what it was made with, which ends with it; plain layers need none.
    """
    edits: list[Edit] = []
    try:
        for old, new in replacements.items():
            carry_over(old, new, edits, made[old] if made else ())
        seen: set[int] = set()
        for module in list(model.modules()):
            _replace_in(vars(module), replacements, edits, seen)
        choose_paths(model)
        yield
    except BaseException:
        for container, key, value in reversed(edits):
            container[key] = value
        choose_paths(model)
        raise


def carry_over(old: nn.Module, new: nn.Module, edits: list[Edit], made: Collection[str] = ()) -> None:
    """Give `new` what others have put on `old`: hooks, attributes, members, and the parameter objects that stay.

    Args:
        old: a layer in use.
        new: the one that takes its place.
        edits: what is changed in dicts that both share is appended here.
        made: names of members that `old` was made with and that end with it.
    """
    for name in _HOOKS:
        if name in vars(old):
            held = vars(new)[name] = vars(old)[name]
            if isinstance(held, dict):
                _bind_hooks(held, old, new, edits)
    accelerate_hook = getattr(old, "_hf_hook", None)
    ours = {*vars(new), "forward", "_old_forward", "_hf_hook"}
    for name, value in vars(old).items():
        if name not in ours and name not in made and not isinstance(value, nn.Module):
            vars(new)[name] = value
    _carry_members(old, new, made)
    _carry_bias(old, new)
    if accelerate_hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, accelerate_hook)


def _bind_hooks(hooks: dict[Any, Any], old: nn.Module, new: nn.Module, edits: list[Edit]) -> None:
    """Hooks that know their module know the new one; those of a parametrisation end with it."""
    for key, hook in list(hooks.items()):
        if not isinstance(hook, _WrappedHook):
            continue
        if (getattr(hook, "__module__", None) or "").startswith("torch.nn.utils."):
            edits.append((hooks, key, hook))
            del hooks[key]
        elif hook.with_module and hook.module() is old:
            edits.append((hooks, key, hook))
            hooks[key] = _WrappedHook(hook.hook, new)


def _carry_members(old: nn.Module, new: nn.Module, made: Collection[str]) -> None:
    """Buffers, parameters and children that were put on a layer. What a class computes its weight from ends in it."""
    if kind_of(old) is None:
        return  # a module whose members end with it
    taken = {"weight", "bias", "parametrizations", *new._parameters, *new._buffers, *new._modules}
    registries = ("_buffers", "_parameters", "_modules") if made or is_plain(old) else ("_buffers",)
    for registry in registries:
        for name, value in getattr(old, registry).items():
            if name not in taken and name not in made:
                getattr(new, registry)[name] = value
                if name in old._non_persistent_buffers_set:
                    new._non_persistent_buffers_set.add(name)


def _carry_bias(old: nn.Module, new: nn.Module) -> None:
    """The bias, which a swap does not change, stays the same object: with its hooks, and for its optimizer."""
    bias, copied = old._parameters.get("bias"), new._parameters.get("bias")
    if bias is None or copied is None or bias.is_inference():
        return
    like = (bias.shape, bias.dtype, bias.device) == (copied.shape, copied.dtype, copied.device)
    if like and (bias.is_meta or torch.equal(bias, copied)):
        new._parameters["bias"] = bias


def _replace_in(
    container: dict[Any, Any] | list[Any] | deque[Any],
    replacements: Mapping[nn.Module, nn.Module],
    edits: list[Edit],
    seen: set[int],
) -> None:
    """Swap inside a dict or list, and inside the containers and plain objects that it holds."""
    if id(container) in seen:
        return
    seen.add(id(container))
    for key, value in list(container.items()) if isinstance(container, dict) else list(enumerate(container)):
        renewed = _renewed(value, replacements, edits, seen)
        if renewed is not value:
            edits.append((container, key, value))
            container[key] = renewed


def _renewed(value: Any, replacements: Mapping[nn.Module, nn.Module], edits: list[Edit], seen: set[int]) -> Any:
    """What takes the place of a value: another object for a swapped module or a tuple that holds one, else itself."""
    if isinstance(value, nn.Module):
        return replacements.get(value, value)
    if isinstance(value, tuple):
        entries = [_renewed(entry, replacements, edits, seen) for entry in value]
        if all(new is old for new, old in zip(entries, value, strict=True)):
            return value
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    if isinstance(value, set):
        members = {_renewed(entry, replacements, edits, seen) for entry in value}
        return value if members == value else members
    if isinstance(value, (dict, list, deque)):
        _replace_in(value, replacements, edits, seen)
    elif _is_plain_object(value):
        _replace_in(vars(value), replacements, edits, seen)
    return value


def _is_plain_object(value: Any) -> bool:
    """True for what a model may keep its layers in: a namespace, a dataclass, an object of a class of its own."""
    return hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType, FunctionType, Tensor))

"""Swaps modules in place, by identity: wherever a model holds the old layer, it holds the new one afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .fused_paths import choose_paths

Edit = tuple[Any, Any, Any]
"""A container (dict or list), a key of it, and the value the key had before."""

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
def swapped(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Swap modules of `model`; if the body raises, put everything back.

    Args:
        model: changed in place, in every parent's attributes and in plain lists, tuples and dicts that hold modules.
        replacements: new module for each old one; hooks and foreign attributes of the old one are carried over.
    """
    edits: list[Edit] = []
    try:
        for old, new in replacements.items():
            carry_over(old, new)
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


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks of `old`, and the attributes that other libraries have put on it."""
    for name in _HOOKS:
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    accelerate_hook = getattr(old, "_hf_hook", None)
    ours = {*vars(new), "forward", "_old_forward", "_hf_hook"}
    for name, value in vars(old).items():
        if name not in ours and not isinstance(value, nn.Module):
            vars(new)[name] = value
    if accelerate_hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, accelerate_hook)


def _replace_in(
    container: dict[Any, Any] | list[Any],
    replacements: Mapping[nn.Module, nn.Module],
    edits: list[Edit],
    seen: set[int],
) -> None:
    """Swap inside a dict or list, and inside the lists, tuples and dicts it holds."""
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
    if isinstance(value, (dict, list)):
        _replace_in(value, replacements, edits, seen)
    return value

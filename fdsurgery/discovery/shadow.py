"""A copy of a model to look at, so that looking never changes the model itself.

The copy has the structure and the Python attributes of the model, but no memory of its own for weights: they lie on the
meta device (shapes and no values), or are the model's own, shared. What users hung onto the model (forward hooks,
accelerate's device hooks) does not come along unasked, since it closes over state that is not ours to touch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..surroundings import random_state_kept

_SMALL = 2**16
"""Parameters of up to so many values are copied: the temperatures and scales that some forwards clamp in place."""


def twin_of(model: nn.Module, *, meta: bool, hooks: bool = False) -> tuple[nn.Module, list[Tensor]]:
    """Copy a model for one forward in eval mode.

    Args:
        model: any module; it is only read.
        meta: put every tensor of the copy on the meta device; otherwise large parameters are shared, save those that
            their layer writes to as it runs, and all else is cloned.
        hooks: copy forward hooks too, for a model that does not run without them. They run on copies of what they close
            over, but what is global is not copied.

    Returns:
        The copy, with the module names of the model, and the tensors in it that are neither parameter nor buffer
        (cached position indices and the like).

    Raises:
        Exception: whatever `copy.deepcopy` says when the model cannot be copied at all.
    """
    with torch.no_grad(), _CopyTensors(meta) as copies:
        memo = _memo(model, meta, hooks)
        try:
            twin = copy.deepcopy(model, memo)
        except Exception:
            # An attribute somewhere (a file, a lock, a user's trainer) has no copy; it is shared instead.
            memo = _memo(model, meta, hooks) | _uncopyable(model, meta)
            twin = copy.deepcopy(model, memo)
        for module in twin.modules():
            if "_orig_mod" in module._modules:  # the wrapper that torch.compile makes calls compiled code
                module.__dict__["forward"] = module.get_submodule("_orig_mod").__call__
            elif "forward" in vars(module):
                module.__dict__["forward"] = _rebound(module.__dict__["forward"], memo)
            for hung in _hook_dicts(module):
                hung.update({key: _rebound(hook, memo) for key, hook in hung.items()})
    for module in twin.modules():
        # Not `twin.eval()`: a class may do more than flip a flag there, such as merging weights that we share.
        module.__dict__["training"] = False
        _strip_hooks(module)
    return twin, copies.tensors


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """Give a forward fixed random numbers, and the caller his generators back as they were."""
    with random_state_kept():
        # Not `torch.manual_seed`, which seeds every device there is, also those that nobody has used yet.
        torch.default_generator.manual_seed(0)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)
        yield


def _rebound(function: Any, memo: dict[int, Any]) -> Any:
    """The same function over copies of what it closes over.

    `copy.deepcopy` takes functions for constants. A forward that was replaced by a closure over the old one would run
    the model's own modules, and their batch norms would learn from our input.
    """
    if not isinstance(function, FunctionType):
        return function

    def copied(value: Any) -> Any:
        return _rebound(value, memo) if isinstance(value, FunctionType) else copy.deepcopy(value, memo)

    try:
        cells = tuple(CellType(copied(cell.cell_contents)) for cell in function.__closure__ or ())
        defaults = tuple(map(copied, function.__defaults__ or ()))
    except Exception:  # no copy, or a function that closes over itself
        return function
    rebound = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
    rebound.__kwdefaults__ = function.__kwdefaults__
    return rebound


class _CopyTensors(TorchFunctionMode):
    """Decides, inside `copy.deepcopy`, what becomes of tensors that no module registered."""

    def __init__(self, meta: bool) -> None:
        super().__init__()
        self.meta = meta
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        # `clone` is how an unregistered Parameter copies itself.
        if func is not Tensor.__deepcopy__ and func is not Tensor.clone:
            return func(*args, **(kwargs or {}))
        tensor = args[0]
        twin = _on_meta(tensor) if self.meta else tensor.detach().clone()
        vars(twin)["_original"] = tensor
        self.tensors.append(twin)
        if func is Tensor.__deepcopy__:
            memo = args[1]
            memo[id(tensor)] = twin
        return twin


def original_of(twin: Tensor) -> Tensor:
    """The tensor of the model, neither parameter nor buffer, of which this one is the copy; or the tensor itself."""
    original: Tensor = getattr(twin, "_original", twin)
    return original


def _on_meta(tensor: Tensor) -> Tensor:
    """The same shape, strides and dtype without values."""
    try:
        return torch.empty_like(tensor, device="meta")
    except (RuntimeError, NotImplementedError):  # sparse and quantized layouts have no meta form
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _memo(model: nn.Module, meta: bool, hooks: bool = False) -> dict[int, Any]:
    """What `copy.deepcopy` shall take for the objects it meets, by their ids."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        # `max_norm` makes an embedding shrink its weight in place, in eval mode too.
        writes = getattr(module, "max_norm", None) is not None
        for parameter in module._parameters.values():
            if parameter is not None and (meta or writes or parameter.numel() <= _SMALL):
                values = _on_meta(parameter.detach()) if meta else parameter.detach().clone()
                memo[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
            elif parameter is not None:
                memo.setdefault(id(parameter), parameter)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = _on_meta(buffer) if meta else buffer.detach().clone()
        for hung in _hook_dicts(module):
            memo.update((id(hook), None) for hook in hung.values() if not (hooks or _torch_owns(hook)))
        if "_hf_hook" in vars(module):
            memo[id(module._hf_hook)] = None
    return memo


def _uncopyable(model: nn.Module, meta: bool) -> dict[int, Any]:
    """Memo entries that share every plain attribute that has no copy."""
    shared: dict[int, Any] = {}
    memo = _memo(model, meta)
    memo.update((id(module), module) for module in model.modules())
    for module in model.modules():
        for value in vars(module).values():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                shared[id(value)] = value
    return shared


def _hook_dicts(module: nn.Module) -> list[dict[int, Any]]:
    return [value for key, value in vars(module).items() if key.endswith("_hooks") and isinstance(value, dict)]


def has_hooks(model: nn.Module) -> bool:
    """True if anything but torch itself has hung hooks onto the model."""
    return any(
        not _torch_owns(hook) for module in model.modules() for hung in _hook_dicts(module) for hook in hung.values()
    )


def _torch_owns(hook: Any) -> bool:
    """True for hooks by which torch itself computes weights: weight norm, spectral norm, pruning, lazy modules."""
    return (getattr(hook, "__module__", None) or "").startswith(("torch.nn.utils.", "torch.nn.modules."))


def _strip_hooks(module: nn.Module) -> None:
    for hooks in _hook_dicts(module):
        for key in [key for key, hook in hooks.items() if hook is None]:
            del hooks[key]
    attributes = vars(module)
    # transformers remembers having hung its own hooks; without the mark it hangs them again, on the copy.
    attributes.pop("_output_capturing_hooks_installed", None)
    if "_hf_hook" in attributes:
        del attributes["_hf_hook"]
        attributes.pop("forward", None)
        if "_old_forward" in attributes:
            attributes["forward"] = attributes.pop("_old_forward")

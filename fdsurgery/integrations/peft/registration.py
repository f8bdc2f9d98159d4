"""Makes PEFT put its LoRA layers beside dynamic ones as they must be; see `Library.hooks`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from torch import nn

from ...operators import operator_of


def install(lora_model: ModuleType) -> None:
    """Choose the LoRA layer for dynamic ones ourselves; a second call does nothing.

    Args:
        lora_model: `peft.tuners.lora.model`, whose `dispatch_default` chooses it for all that torch has. Only there is
            it replaced.
    """
    original = lora_model.dispatch_default
    if not hasattr(original, "_before_fdsurgery"):
        wrapped: Any = wraps(original)(_dispatch(original))
        wrapped._before_fdsurgery = original
        lora_model.dispatch_default = wrapped  # type: ignore[attr-defined]


def _dispatch(original: Callable[..., Any]) -> Callable[..., Any]:
    def dispatch_default(target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        # A parameter_name asks for an adapter of one parameter, by a parametrisation, which is nothing of ours.
        if operator_of(target) is None or kwargs.get("parameter_name") is not None:
            return original(target, adapter_name, *args, **kwargs)
        from . import lora

        return lora.beside(target, adapter_name, **kwargs)

    return dispatch_default

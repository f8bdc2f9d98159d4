"""Which backend computes: one choice for the process, others for a block of code."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any, Literal, get_args

import torch

Backend = Literal["auto", "torch", "cpp", "triton"]
"""`torch` computes with PyTorch's own operations, on CPUs chunk by chunk; `cpp` with kernels for CPUs, which this
machine's compiler makes when they are first needed; `triton` with kernels for NVIDIA GPUs; `auto` takes those where
they serve."""

_of_process: Backend = "auto"
_of_block: ContextVar[Backend | None] = ContextVar("_of_block", default=None)


class set_backend:
    """Choose how all layers of this process compute; in a `with` statement, those that its block calls.

    Args:
        backend: its name; or what an earlier call returned, to go back to what there was before it.

    Raises:
        ValueError: there is no such backend.

    Examples:
        >>> import fdconv
        >>> with fdconv.set_backend("torch"):
        ...     fdconv.chosen_backend()
        'torch'
        >>> fdconv.chosen_backend()
        'auto'
    """

    _before: Backend

    def __init__(self, backend: Backend | set_backend) -> None:
        global _of_process
        chosen = backend._before if isinstance(backend, set_backend) else known(backend)
        self._before, _of_process = _of_process, chosen
        self._backend: Backend = chosen
        self._tokens: list[Token[Backend | None]] = []

    def __enter__(self) -> None:
        global _of_process
        if not self._tokens:
            _of_process = self._before
        self._tokens.append(_of_block.set(self._backend))

    def __exit__(self, *_: Any) -> None:
        _of_block.reset(self._tokens.pop())


def chosen_backend() -> Backend:
    """The backend by which layers compute here.

    Examples:
        >>> import fdconv
        >>> fdconv.chosen_backend()
        'auto'
    """
    return _compiled_choice() if torch.compiler.is_compiling() else _choice()


def _choice() -> Backend:
    return _of_block.get() or _of_process


def _compiled_choice() -> Backend:
    return _choice()


if torch.__version__ < "2.14":
    # Older compilers do not look into a ContextVar: there, what is compiled keeps the choice that it was compiled with.
    # This is what torch.compiler.assume_constant_result sets, which would import the compiler.
    _compiled_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def known(backend: Backend) -> Backend:
    """The same. Raises `ValueError` if there is no such backend."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    return backend

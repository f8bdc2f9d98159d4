"""What a saved file may ask of the library that builds its model: names by pattern, arguments by list, plain data only.

A description is data that anybody may have written, and builders take more than the shape of a model: files to
unpickle, repositories to download, code to run. So nothing reaches a builder that is not known to be harmless.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .errors import CheckpointError, near_misses

_MOST_LEVELS = 20
_MOST_VALUES = 100_000
_LONGEST_TEXT = 10_000
_GREATEST = 2**53
"""Above it JSON's numbers are not exact."""
_GREATEST_SIZE = 2**24
"""No size or count of a model in timm or torchvision is above it."""

_NEVER = re.compile(
    r"self|args|kwargs|device|dtype|model|module|backbone|weights?|weights_backbone|pretrained|pretrained_cfg.*|"
    r"pretrained_model_args|.*(checkpoint_path|cache_dir|state_dict|_file|_path|_url|_dir)|file|path|url"
)
"""Arguments that say where weights are, or take what JSON does not have; never from a file, whoever accepts them."""


def plain(value: Any, where: str, greatest: int = _GREATEST) -> Any:
    """The value, if it is plain data of a sensible size.

    Raises:
        CheckpointError: it is something else; `where` says where it stands.
    """
    _check_plain(value, where, greatest, 0, [_MOST_VALUES])
    return value


def arguments_from(arguments: Any, known: Iterable[str], library: str) -> dict[str, Any]:
    """The arguments of a builder, if a file may give them.

    Args:
        arguments: keyword arguments, as the file has them.
        known: names that the library is known to take.
        library: what messages begin with.

    Raises:
        CheckpointError: one of them is not known, names a file or code, or is not plain data of a sensible size.
    """
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{library} arguments are a mapping, not {shown(arguments)}")
    for name, value in arguments.items():
        where = f"{library} argument {shown(name)}"
        if not isinstance(name, str) or _NEVER.fullmatch(name):
            raise CheckpointError(
                f"{where} is never taken from a file: it could make the library read or fetch another"
            )
        if name not in known:
            raise CheckpointError(f"{where} is none that a saved model may give{near_misses(name, known)}")
        plain(value, where, _GREATEST_SIZE)
    return arguments


@lru_cache
def constructor_arguments(*packages: str) -> frozenset[str]:
    """The parameters of the constructors of all models in packages that are imported, but for those never allowed."""
    found: set[str] = set()
    for name, module in list(sys.modules.items()):
        if any(name == package or name.startswith(f"{package}.") for package in packages):
            for member in list(vars(module).values()):
                if inspect.isclass(member) and issubclass(member, nn.Module) and member.__module__ == name:
                    found |= set(inspect.signature(member.__init__).parameters)
    return frozenset(name for name in found if not _NEVER.fullmatch(name))


def shown(value: Any, *, quotes: bool = True) -> str:
    """A value from a file, short enough for a message."""
    text = repr(value) if quotes or not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def no_larger_than(tensors: int, values: int, where: str) -> Iterator[None]:
    """Stop this thread as soon as it builds a model several times larger than the weights that are there for it.

    A few digits of a file may ask for any size.

    Args:
        tensors: that there are weights for.
        values: in them.
        where: what asks for the model, and begins the message.

    Raises:
        CheckpointError: in the body, at the parameter that is too much.
    """
    thread = threading.get_ident()
    left = [4 * tensors + 1000, 4 * values + 10**6]

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        if threading.get_ident() == thread and isinstance(parameter, nn.Parameter):
            left[0] -= 1
            left[1] -= parameter.numel()
            if min(left) < 0:
                raise CheckpointError(f"{where} builds a larger model than its weights are for")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_plain(value: Any, where: str, greatest: int, level: int, left: list[int]) -> None:
    left[0] -= 1
    if level > _MOST_LEVELS or left[0] < 0:
        raise CheckpointError(f"{where}: nested too deeply, or too long")
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int):
        if abs(value) > greatest:
            raise CheckpointError(
                f"{where}: a number of {len(str(value)) if abs(value) < 10**40 else 'over 40'} digits"
            )
    elif isinstance(value, str):
        if len(value) > _LONGEST_TEXT:
            raise CheckpointError(f"{where}: a text of {len(value)} characters")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            _check_plain(entry, f"{where}[{index}]", greatest, level + 1, left)
    elif isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, (str, int)):
                raise CheckpointError(f"{where}: keys are text, not {shown(key)}")
            _check_plain(entry, f"{where}.{shown(key, quotes=False)}", greatest, level + 1, left)
    elif not isinstance(value, float):
        raise CheckpointError(f"{where} is a {type(value).__name__}, which no file can hold; expected plain data")

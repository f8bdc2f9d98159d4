"""What a saved file may ask of the library that builds its model: names by pattern, arguments by list, plain data only.

A description is data that anybody may have written, and builders take more than the shape of a model: files to
unpickle, repositories to download, code to run. So nothing reaches a builder that is not known to be harmless.
"""

from __future__ import annotations

import importlib
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

_TIMM_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)?")
_TIMM_FACTORY = {
    *("num_classes", "in_chans", "img_size", "global_pool", "drop_rate", "drop_path_rate", "output_stride"),
    *("features_only", "out_indices", "output_fmt", "feature_cls", "scriptable", "exportable", "no_jit"),
    *("bn_tf", "bn_momentum", "bn_eps", "use_naflex"),
}
"""Arguments that timm's factory and its builders take before a constructor is called."""
_TORCHVISION_BUILDERS = {"num_classes", "num_keypoints", "aux_loss", "trainable_backbone_layers", "frozen_norms"}
_NEVER = re.compile(
    r"self|args|kwargs|device|dtype|model|module|backbone|weights?|weights_backbone|pretrained|pretrained_cfg.*|"
    r"pretrained_model_args|.*(checkpoint_path|cache_dir|state_dict|_file|_path|_url|_dir)|file|path|url"
)
"""Arguments that say where weights are, or take what JSON does not have; never from a file, whoever accepts them."""

_CONFIG_DROPPED = {
    "auto_map": "it names code",
    "trust_remote_code": "it allows code",
    "custom_pipelines": "it names code",
    "quantization_config": "the layers are described elsewhere",
    "fusion_config": "it patches classes",
    "use_kernels": "kernels are downloaded code",
    "kernel_config": "kernels are downloaded code",
    "_attn_implementation_internal": "it may name code",
    "_experts_implementation_internal": "it may name code",
    "experts_implementation": "it may name code",
}
"""Entries of a transformers config that no saved model needs, and why they are left out."""
_ATTENTION = ("attn_implementation", "_attn_implementation")
_HARMLESS_ATTENTION = ("eager", "sdpa")
"""Of other names transformers may fetch a kernel."""
_FETCHES_KERNELS = {"mra", "rwkv", "yoso", "sam3_video"}
"""Model types whose constructors download compiled code."""


def plain(value: Any, where: str, greatest: int = _GREATEST) -> Any:
    """The value, if it is plain data of a sensible size.

    Raises:
        CheckpointError: it is something else; `where` says where it stands.
    """
    _check_plain(value, where, greatest, 0, [_MOST_VALUES])
    return value


def timm_name(name: Any) -> str:
    """The name, if it is one of timm's registry, with or without a tag: no repository, no folder."""
    if not isinstance(name, str) or not _TIMM_NAME.fullmatch(name):
        raise CheckpointError(
            f"timm:{_shown(name)} is no name of timm's registry, such as 'resnet50' or 'resnet50.a1_in1k'; weights and "
            "configs of elsewhere are not fetched for a file"
        )
    return name


def timm_arguments(arguments: Any, name: str, owner: str = "timm") -> dict[str, Any]:
    """The arguments, if timm's constructors take them and they name no file.

    Args:
        arguments: of `timm.create_model`.
        name: of the model, whose own module is asked too.
        owner: what messages begin with.

    Raises:
        CheckpointError: one of them is not allowed.
    """
    timm = importlib.import_module("timm")
    architecture = name.partition(".")[0]
    own = timm.model_entrypoint(architecture).__module__ if timm.is_model(architecture) else "timm.models"
    return _allowed(arguments, _TIMM_FACTORY | _constructor_arguments("timm.models", own), owner)


def torchvision_arguments(arguments: Any) -> dict[str, Any]:
    """As `timm_arguments`, for torchvision's builders."""
    known = _TORCHVISION_BUILDERS | _constructor_arguments("torchvision.models")
    return _allowed(arguments, known, "torchvision")


def transformers_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """A config without what could make transformers fetch or run something; sub-configs likewise.

    Args:
        config: as `config.to_dict()` gives it, or as it stands in a `config.json`.
        where: what messages call it.

    Raises:
        CheckpointError: it is not plain data, or builds upon a part that must be fetched.
    """
    plain(config, where)
    return _clean(config, where)


def kernels_in(config: Any) -> str | None:
    """The first entry of a config by which transformers would fetch compiled code to compute with."""
    for entry in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        if (found := kernels_in(entry)) is not None:
            return found
    for name, value in config.items() if isinstance(config, dict) else ():
        chosen = name in (*_ATTENTION, "experts_implementation") and value not in (None, *_HARMLESS_ATTENTION)
        if chosen or (name in ("use_kernels", "kernel_config") and value):
            return f"{name}: {_shown(value)}"
    return None


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
                raise CheckpointError(f"{where}: keys are text, not {_shown(key)}")
            _check_plain(entry, f"{where}.{_shown(key, quotes=False)}", greatest, level + 1, left)
    elif not isinstance(value, float):
        raise CheckpointError(f"{where} is a {type(value).__name__}, which no file can hold; expected plain data")


def _allowed(arguments: Any, known: Iterable[str], library: str) -> dict[str, Any]:
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{library} arguments are a mapping, not {_shown(arguments)}")
    for name, value in arguments.items():
        where = f"{library} argument {_shown(name)}"
        if not isinstance(name, str) or _NEVER.fullmatch(name):
            raise CheckpointError(
                f"{where} is never taken from a file: it could make the library read or fetch another"
            )
        if name not in known:
            raise CheckpointError(f"{where} is none that a saved model may give{near_misses(name, known)}")
        plain(value, where, _GREATEST_SIZE)
    return arguments


@lru_cache
def _constructor_arguments(*packages: str) -> frozenset[str]:
    """The parameters of the constructors of all models in packages that are imported."""
    found: set[str] = set()
    for name, module in list(sys.modules.items()):
        if any(name == package or name.startswith(f"{package}.") for package in packages):
            for member in list(vars(module).values()):
                if inspect.isclass(member) and issubclass(member, nn.Module) and member.__module__ == name:
                    found |= set(inspect.signature(member.__init__).parameters)
    return frozenset(name for name in found if not _NEVER.fullmatch(name))


def _clean(value: Any, where: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_clean(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kind = value.get("model_type")
    if kind in _FETCHES_KERNELS:
        raise CheckpointError(f"{where}: models of type {kind!r} download code when they are built")
    cleaned = {}
    for key, entry in value.items():
        here = f"{where}.{_shown(key, quotes=False)}"
        if key in _CONFIG_DROPPED or (key in _ATTENTION and entry not in _HARMLESS_ATTENTION):
            continue
        if key == "use_pretrained_backbone":
            entry = False
        elif key == "backbone" and isinstance(entry, str):
            if kind != "timm_backbone":
                raise CheckpointError(f"{here}: {_shown(entry)} would have to be fetched; give a backbone_config")
            timm_name(entry)
        elif key == "backbone_kwargs" and entry:
            raise CheckpointError(f"{here}: for a backbone that would have to be fetched; give a backbone_config")
        elif kind == "timm_wrapper" and key == "architecture":
            timm_name(entry)
        elif key == "model_args":
            entry = timm_arguments(entry or {}, str(value.get("architecture")), f"{here}: timm")
        cleaned[key] = _clean(entry, here)
    return cleaned


def _shown(value: Any, *, quotes: bool = True) -> str:
    text = repr(value) if quotes or not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."

"""What a saved file may ask of transformers: a config without what would be fetched or run."""

from __future__ import annotations

from typing import Any

from ...allowed import plain, shown
from ...errors import CheckpointError
from ..timm.allowed import timm_arguments, timm_name

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
            return f"{name}: {shown(value)}"
    return None


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
        here = f"{where}.{shown(key, quotes=False)}"
        if key in _CONFIG_DROPPED or (key in _ATTENTION and entry not in _HARMLESS_ATTENTION):
            continue
        if key == "use_pretrained_backbone":
            entry = False
        elif key == "backbone" and isinstance(entry, str):
            if kind != "timm_backbone":
                raise CheckpointError(f"{here}: {shown(entry)} would have to be fetched; give a backbone_config")
            timm_name(entry)
        elif key == "backbone_kwargs" and entry:
            raise CheckpointError(f"{here}: for a backbone that would have to be fetched; give a backbone_config")
        elif kind == "timm_wrapper" and key == "architecture":
            timm_name(entry)
        elif key == "model_args":
            entry = timm_arguments(entry or {}, str(value.get("architecture")), f"{here}: timm")
        cleaned[key] = _clean(entry, here)
    return cleaned

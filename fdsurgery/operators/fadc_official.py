"""Layers of the authors' FADC: their words for settings, and their tensors as ours and back (Linwei-Chen/FADC)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .dynamic_operator import CONV_WORDS, check_config, loaded, plain_conv
from .fadc_layer import FADConv2d
from .freq_select import FreqSelect

_WORDS = ("kernel_decompose", "use_zero_dilation", "padding_mode", "deform_groups", "fs")
_BAND_WORDS = ("k_list", "lowfreq_att", "spatial_group", "lp_type", "act")
_OFF_WORDS = {"use_dct": (False,), "pre_fs": (True,), "lp_type": ("freq",), "act": ("sigmoid",)}
"""What the authors' code can do, and is known here with these values only."""
_PADDINGS = {"repeat": "repeat", "zero": "zeros", "zeros": "zeros", "none": "zeros", None: "zeros"}
"""Ours by the authors' words; their deformable convolution itself pads with zeros where they pad nothing."""


def settings_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings, from what the authors' constructor was given.

    Raises:
        CheckpointError: a word is missing or unknown, or has a value that is not known here.
    """
    needed = ("kernel_decompose", "use_zero_dilation", "padding_mode")
    check_config(config, (*CONV_WORDS, *_WORDS, *_BAND_WORDS, *_OFF_WORDS), needed)
    _check_values(config)
    if config["padding_mode"] not in _PADDINGS:
        raise CheckpointError(f"padding_mode {config['padding_mode']!r} is none of repeat, zero and none")
    settings: dict[str, Any] = {
        "adakern": config["kernel_decompose"] or "none",
        "freqselect": bool(config.get("fs", True)),
        "deform_groups": config.get("deform_groups", 1),
        "dilation_rule": "zero" if config["use_zero_dilation"] else "abs",
        "padding": _PADDINGS[config["padding_mode"]],
    }
    return settings | (_bands(config) if settings["freqselect"] else {})


def band_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """As `settings_of_config`, of their `FrequencySelection` alone."""
    check_config(config, ("operator", "mode", "source", "in_channels", *_BAND_WORDS, *_OFF_WORDS), ("in_channels",))
    _check_values(config)
    return _bands(config)


def plain(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Conv2d:
    """The plain layer in whose place an official one is: it pads as far as the outermost taps reach."""
    conv = plain_conv({key: value for key, value in config.items() if key != "padding"}, state["weight"])
    conv.padding = tuple(apart * (size // 2) for apart, size in zip(conv.dilation, conv.kernel_size, strict=True))
    return conv


def ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state under our names; the weight is half theirs, for our masks are twice theirs."""
    own = {name: tensor for name, tensor in state.items() if name not in ("weight", "dilated_offset")}
    return {**own, "fadc_weight": state["weight"] / 2}


def theirs(layer: FADConv2d | FreqSelect) -> dict[str, Tensor]:
    """The state of a layer under the official names."""
    if isinstance(layer, FreqSelect):
        return layer.state_dict()
    error = _not_official(layer)
    if error is not None:
        raise CheckpointError(f"the authors' code has no such layer: {error}")
    state: dict[str, Tensor] = layer.state_dict()
    state["weight"] = 2 * state.pop("fadc_weight")
    steps = torch.tensor([-1, 0, 1], dtype=state["weight"].dtype, device=state["weight"].device)
    state["dilated_offset"] = torch.cartesian_prod(steps, steps).view(1, 1, 18, 1, 1)
    return state


def freq_select(state: Mapping[str, Tensor], config: Mapping[str, Any], settings: Mapping[str, Any]) -> FreqSelect:
    """Their `FrequencySelection` alone."""
    like = next(iter(state.values())).to("meta")
    bands = settings["bands"], settings["low_band"], settings["map_groups"]
    return loaded(FreqSelect(config["in_channels"], *bands, like), state).train(config.get("mode") == "train")


def _bands(config: Mapping[str, Any]) -> dict[str, Any]:
    if "k_list" not in config:
        raise CheckpointError("the configuration of the layer does not say k_list")
    found = {"bands": list(config["k_list"]), "low_band": config.get("lowfreq_att", False)}
    return {**found, "map_groups": config.get("spatial_group", 1)}


def _check_values(config: Mapping[str, Any]) -> None:
    for word, values in _OFF_WORDS.items():
        if word in config and config[word] not in values:
            raise CheckpointError(f"layers of the authors' code with {word}={config[word]!r} cannot be read")


def _not_official(layer: FADConv2d) -> str | None:
    """Why the authors' code cannot hold a layer, in words; None if it can."""
    if not layer.settings["adadr"]:
        return "its dilation is fixed"
    if layer.settings["norm"] != "batch":
        return f"its norm is {layer.settings['norm']}"
    if layer.kernel_size != (3, 3) or layer.groups != 1:
        return "theirs are 3x3, in one group"
    if layer.dilation[0] != layer.dilation[1] or tuple(layer._pads()) != (layer.dilation[0],) * 4:
        return "theirs pad by the dilation"
    if layer.padding_mode != "zeros" or layer.pads_same:
        return "theirs pad with zeros, or repeat the outermost pixels"
    if layer.settings["dilation_rule"] == "relu" and layer.dilation != (1, 1):
        return "dilation_rule=relu is theirs (use_zero_dilation) at a dilation of 1 only"
    return None

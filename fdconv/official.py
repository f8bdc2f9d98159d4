"""Layers from the state dicts of the authors' public implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .config import FDConfig
from .layers import FDConv2d, FDLinear
from .precision import rescaled
from .spectrum import group_dtype, groups_from_order

# Without padding_mode: the official layer takes it and pads with zeros all the same.
OURS = "spectrum_scale"
"""The tensor that tells an isometric spectrum, which official layers do not have."""

_CONV_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "bias")
_LINEAR_GEOMETRY = ("in_features", "out_features", "bias")


def load_layer(
    state: dict[str, Tensor], config: dict[str, Any], group_index: Tensor | None = None
) -> FDConv2d | FDLinear:
    """Build a layer that computes what an official layer computes.

    Args:
        state: the layer's state dict under the official names, without prefix; any float dtype.
        config: the arguments the official layer was built with, and `kind`: `"FDConv"` or `"FDLinear"`.
        group_index: `(2, n, N/n)`, rows and columns of the coefficients of each frequency group as the run that trained
            the layer ordered them. The official layer does not save its order, and computes it by an unstable sort;
            without it, it is computed here as the public code would.

    Returns:
        The layer in eval mode, on the CPU, with the dtype of the spectrum.

    Raises:
        ValueError: if the config names a setting that has no counterpart here, or the state does not fit it.
    """
    kind = config.get("kind")
    if kind not in ("FDConv", "FDLinear"):
        raise ValueError(f"config['kind'] must be 'FDConv' or 'FDLinear', not {kind!r}")
    if "dft_weight" not in state:
        raise ValueError(f"the state has no 'dft_weight'; its keys are {', '.join(sorted(state)) or 'none'}")
    settings = _settings(config)
    names = _CONV_GEOMETRY if kind == "FDConv" else _LINEAR_GEOMETRY
    geometry = {name: config[name] for name in names if name in config}
    geometry.setdefault("bias", "bias" in state)
    layer_class = FDConv2d if kind == "FDConv" else FDLinear
    layer = layer_class(**geometry, dtype=state["dft_weight"].dtype, config=settings)
    layer.frequency_group.copy_(_groups(layer, group_index))
    try:
        layer.load_state_dict({**state, "frequency_group": layer.frequency_group})  # which puts it into our form
    except RuntimeError as error:
        raise ValueError(f"the state does not fit the config: {error}") from None
    return layer.eval()


def official_state(layer: FDConv2d | FDLinear) -> dict[str, Tensor]:
    """The state dict of the official layer that computes what a layer does: undoes `load_layer`.

    It is that of the layer without what is ours alone (`frequency_group` and `spectrum_scale`), in the paper's scales.

    Raises:
        ValueError: the authors' code has no such layer.
    """
    obstacle = public_obstacle(layer) or public_setting_obstacle(layer)
    if obstacle is not None:
        raise ValueError(f"{type(layer).__name__}{layer._static_shape()} is no official layer: {obstacle}")
    factors = layer.factors_from_paper()
    state = {name: value for name, value in layer.state_dict().items() if name not in ("frequency_group", OURS)}
    for name, factor in factors.items():
        state[name] = rescaled(state[name], 1 / factor)
    return state


def _settings(config: dict[str, Any]) -> FDConfig:
    """The operator's settings from the official arguments, whose defaults differ from the paper's in `kernel_num`."""
    bands = config.get("fbm_cfg", {})
    unsupported = {
        "param_reduction": config.get("param_reduction", 1.0) != 1.0,
        "att_multi": config.get("att_multi", 2.0) != 2.0,
        "ksm_only_kernel_att": config.get("ksm_only_kernel_att", False),
        "spatial_freq_decompose": config.get("spatial_freq_decompose", False),
        "groups": config.get("groups", 1) != 1,
        "kernel_num": config.get("kernel_num", 4) is None,
        "use_fbm_for_stride": config.get("use_fbm_for_stride", False),
        "linear_mode": config.get("linear_mode", False),
        "fbm_cfg.act": bands.get("act", "sigmoid") == "softmax",
        "fbm_cfg.spatial_kernel": bands.get("spatial_kernel", 3) != 3,
        "use_ksm_local": config["kind"] == "FDLinear" and config.get("use_ksm_local", False),
    }
    for name, refused in unsupported.items():
        if refused:
            value = bands.get(name.removeprefix("fbm_cfg.")) if name.startswith("fbm_cfg.") else config.get(name)
            raise ValueError(f"config[{name!r}] = {value!r} has no counterpart here")
    activation = config.get("ksm_global_act", "sigmoid")
    kernel_temperature = config.get("kernel_temp", 1.0)
    temperature = config.get("temp")
    return FDConfig(
        kernel_num=config.get("kernel_num", 4),
        param_ratio=config.get("param_ratio", 1),
        reduction=config.get("reduction", 1 / 16),
        ksm_local=config.get("use_ksm_local", True),
        norm="rms" if config["kind"] == "FDLinear" else "batch",
        global_activation="sigmoid" if activation == "softmax" else activation,
        kernel_activation=activation,
        local_activation=config.get("ksm_local_act", "sigmoid"),
        kernel_temperature=kernel_temperature,
        temperature=kernel_temperature if temperature is None else temperature,
        fbm_kernel_sizes=tuple(config.get("use_fbm_if_k_in", (3,))),
        bands=tuple(bands.get("k_list", (2, 4, 8))),
        band_mask="interpolated",
        band_activation=bands.get("act", "sigmoid"),
        band_lowfreq=bands.get("lowfreq_att", False),
        band_groups=bands.get("spatial_group", 1),
    )


def public_groups(layer: FDConv2d | FDLinear) -> Tensor:
    """The group of every coefficient, `(D1, D2h)`, as the public code numbers them with the installed torch.

    It orders equal radii by an unstable sort and saves no order, so another version may give other groups.
    """
    d1, d2_half = layer.frequency_group.shape
    _, in_channels, _, k_w = layer._kernel_shape()
    with _disable_current_modes():
        place: Any = {"dtype": torch.float32, "device": "cpu"}
        rows, columns = torch.fft.fftfreq(d1, **place), torch.fft.rfftfreq(in_channels * k_w, **place)
        radius = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).norm(dim=-1)
        order = torch.sort(radius.flatten()).indices
        return groups_from_order(order, layer.config.kernel_num).view(d1, d2_half)


def public_obstacle(layer: FDConv2d | FDLinear) -> str | None:
    """Why the public code has no layer of this shape, in words; None if it has."""
    _, in_channels, k_h, k_w = layer._kernel_shape()
    if type(layer) not in (FDConv2d, FDLinear):
        return "it pads by the size of its input, and the public layer does not"
    if layer.filter_scale is not None:
        return "a norm was folded into it, and the public layer has no scale for each filter"
    if layer.groups != 1:
        return f"its convolution has {layer.groups} groups, and the public layer one"
    if k_h != k_w:
        return f"its kernel is {k_h}x{k_w}, and the public one square"
    if in_channels * k_w % 2:
        return f"its weight image is {in_channels * k_w} wide, and the public code takes even widths"
    if isinstance(layer, FDConv2d) and layer.padding_mode != "zeros":
        return f"it pads by {layer.padding_mode!r}, and the public layer with zeros"
    return None


def public_setting_obstacle(layer: FDConv2d | FDLinear) -> str | None:
    """Which setting of a layer the public code has no argument for, in words; None if it has one for each."""
    config, linear = layer.config, isinstance(layer, FDLinear)
    gates = (config.global_activation, config.kernel_activation)
    refused = {
        "ksm_global": not config.ksm_global,
        "norm": layer.KSM_Global is not None and (layer.KSM_Global.norm is None) == linear,
        "kernel_activation": gates not in (("sigmoid", "sigmoid"), ("tanh", "tanh"), ("sigmoid", "softmax")),
        "min_attention_channels": layer.KSM_Global is not None and layer.KSM_Global.fc.weight.shape[0] < 16,
        "band_edges": layer.FBM is not None and config.band_edges != "fixed",
        "band_activation": layer.FBM is not None and config.band_activation == "softmax",
    }
    for name, is_refused in refused.items():
        if is_refused:
            shown = ("batch" if linear else "rms") if name == "norm" else getattr(config, name)
            return f"its {name} is {shown!r}, which the public layer does not have"
    return None


def public_arguments(layer: FDConv2d | FDLinear) -> dict[str, Any]:
    """The arguments of the public layer, other than its defaults, that its tensors do not show."""
    config = layer.config
    activation = "softmax" if config.kernel_activation == "softmax" else config.global_activation
    arguments: dict[str, Any] = {}
    if activation != "sigmoid":
        arguments["ksm_global_act"] = activation
    if config.kernel_temperature != 1:
        arguments["kernel_temp"] = config.kernel_temperature
    if config.temperature != config.kernel_temperature:
        arguments["temp"] = config.temperature
    if layer.KSM_Local is not None and config.local_activation != "sigmoid":
        arguments["ksm_local_act"] = config.local_activation
    if layer.FBM is not None:
        bands: dict[str, Any] = {"k_list": list(config.bands)} if config.bands != (2, 4, 8) else {}
        bands |= {"act": config.band_activation} if config.band_activation != "sigmoid" else {}
        bands |= {"lowfreq_att": True} if config.band_lowfreq else {}
        arguments |= {"fbm_cfg": bands} if bands else {}
    return arguments


def divides_evenly(layer: FDConv2d | FDLinear) -> bool:
    """True if the coefficients of a layer make groups of one size, which the public code demands."""
    return layer.frequency_group.numel() % layer.config.kernel_num == 0


def _groups(layer: FDConv2d | FDLinear, group_index: Tensor | None) -> Tensor:
    """Group of every coefficient, `(D1, D2h)`, as the official layer has it."""
    if group_index is None:
        return public_groups(layer)
    d1, d2_half = layer.frequency_group.shape
    kernel_num = layer.config.kernel_num
    if group_index.shape != (2, kernel_num, d1 * d2_half // kernel_num) or d1 * d2_half % kernel_num:
        raise ValueError(
            f"group_index must have the shape (2, {kernel_num}, {d1 * d2_half / kernel_num:g}), "
            f"not {tuple(group_index.shape)}"
        )
    rows, columns = group_index.long()
    groups = torch.full((d1, d2_half), -1, dtype=torch.int64, device=rows.device)
    numbers = torch.arange(kernel_num, dtype=torch.int64, device=rows.device)
    groups[rows, columns] = numbers[:, None].expand_as(rows)
    if (groups < 0).any():
        raise ValueError("group_index does not name every coefficient once")
    return groups.to(group_dtype(kernel_num))

"""FADC: frequency-adaptive dilated convolution (Chen et al., CVPR 2024, arXiv 2403.05369).

FreqSelect (section 3.4) weighs the frequency bands of the input, AdaKern (section 3.3) the mean of each kernel and the
rest of it, and AdaDR (section 3.2) gives each position a dilation of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv.modulation import ContextBatchNorm, Squeeze, ZeroInit, linear_of, normed
from fdconv.onnx_fft import refuse_old_exporter
from fdconv.out_of_memory import explained
from fdconv.precision import autocast_is_on, fft_dtype, without_autocast
from fdconv.reference import Convolution, WeightShape, convolved_size

from ..discovery.site import Site
from ..errors import CheckpointError, RecipeError
from .adaptive_dilation import by_parts, convolved
from .base import Shaped
from .dynamic_layer import DynamicConv2d
from .dynamic_operator import CONV_WORDS, DynamicOperator, Settings, check_config, loaded, plain_conv
from .freq_select import FreqSelect


def _listed(given: Any) -> Any:
    return list(given) if isinstance(given, tuple) else given


class FADCSettings(Settings):
    """Settings of FADC."""

    adakern: Literal["both", "high", "low", "none"] = "both"
    """Which part of each kernel a sample's gates weigh: its mean over the taps (`low`), the rest (`high`), or `both`,
    each by gates of its own."""
    freqselect: bool = True
    """Weigh the frequency bands of the input, position by position."""
    bands: Annotated[list[Annotated[int, Ge(2)]], MinLen(1), BeforeValidator(_listed)] = Field(default=[2, 4, 8])
    """Low-passes of FreqSelect, ascending: `k` keeps the frequencies up to about `1/(2k)` cycles a pixel."""
    low_band: bool = False
    """Give what the last low-pass leaves a map too."""
    map_groups: Annotated[int, Ge(1)] = 1
    """Groups of input channels whose bands have maps of their own."""
    adadr: bool = True
    """Give each position a dilation of its own, and each tap a mask."""
    deform_groups: Annotated[int, Ge(1)] = 1
    """Groups of input channels that have a dilation and a mask of their own."""
    dilation_rule: Literal["relu", "abs", "zero"] = "relu"
    """The dilation where `o` is predicted and the plain layer has `d`: `d*relu(1 + o)`; `abs` and `zero` are of the
    authors' code, `1 + d*|o|` and `1 + d*(relu(1 + o) - 1)`."""
    padding: Literal["zeros", "repeat"] = "zeros"
    """`zeros` pads as the plain layer does. `repeat`, of the authors' code, repeats the outermost pixels once and has
    zeros beyond, which changes what a pretrained layer computes."""
    norm: Literal["batch", "rms"] = "batch"
    """Norm of AdaKern's bottleneck; `rms` needs no batch."""
    reduction: Annotated[float, Gt(0), Le(1)] = 1 / 16
    """Width of AdaKern's bottleneck, as a share of the input channels."""
    min_channels: Annotated[int, Ge(1)] = 16
    """Least width of AdaKern's bottleneck."""

    @field_validator("bands")
    @classmethod
    def _ascend(cls, bands: list[int]) -> list[int]:
        if bands != sorted(set(bands)):
            raise ValueError("bands must be ascending")
        return bands

    @model_validator(mode="after")
    def _do_something(self) -> FADCSettings:
        if self.adakern == "none" and not self.freqselect and not self.adadr:
            raise ValueError("adakern, freqselect and adadr are all off, which leaves a plain convolution")
        return self


class KernelGates(nn.Module):
    """Gates of input channels and of filters, `(B, C_in)` to `(B, C_in)` and `(B, C_out)`, 1 at the start.

    A depthwise convolution has none for its filters, which would double the others. Official names and shapes.
    """

    def __init__(self, in_channels: int, out_channels: int, depthwise: bool, settings: Any, like: Tensor) -> None:
        super().__init__()
        as_given: Any = {"device": like.device, "dtype": like.dtype}
        width = max(int(in_channels * settings["reduction"]), settings["min_channels"])
        self.fc = Squeeze(width, in_channels, 1, 1, **as_given)
        self.bn = ContextBatchNorm(width, **as_given) if settings["norm"] == "batch" else None
        self.norm = None if settings["norm"] == "batch" else nn.RMSNorm(width, eps=1e-6, **as_given)
        self.channel_fc = ZeroInit(in_channels, width, 1, 1, **as_given)
        self.filter_fc = None if depthwise else ZeroInit(out_channels, width, 1, 1, **as_given)

    def forward(self, context: Tensor) -> list[Tensor]:
        norm = self.bn or self.norm
        assert norm is not None
        hidden = F.relu(normed(norm, linear_of(self.fc, context), self.fc.weight.dtype))
        return [2 * torch.sigmoid(linear_of(head, hidden)) for head in self.heads()]

    def heads(self) -> list[ZeroInit]:
        return [head for head in (self.channel_fc, self.filter_fc) if head is not None]


_GATES = {"both": ("OMNI_ATT1", "OMNI_ATT2"), "high": ("OMNI_ATT",), "low": ("OMNI_ATT",), "none": ()}
"""Names of AdaKern's gates; of two the first are of the low part."""


class FADConv2d(DynamicConv2d):
    """FADC in the place of `nn.Conv2d`.

    `fadc_weight` is the static weight. With AdaDR it is half the authors', whose masks are half of ours.
    """

    stored_name = "fadc_weight"
    fadc_weight: nn.Parameter
    FS: FreqSelect | None
    conv_offset: ZeroInit | None
    conv_mask: ZeroInit | None

    def _build(self, weight: Tensor) -> None:
        settings = self.settings
        error = cannot(self.in_channels, self.kernel_size, self.dilation, settings)
        if error is not None:
            raise ValueError(f"{type(self).__name__}: {error}")
        as_given: Any = {"device": weight.device, "dtype": weight.dtype}
        self.fadc_weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        depthwise = self.groups == self.in_channels == self.out_channels
        for name in _GATES[settings["adakern"]]:
            setattr(self, name, KernelGates(self.in_channels, self.out_channels, depthwise, settings, weight))
        self.conv_offset = self.conv_mask = None
        if settings["adadr"]:
            groups, taps = settings["deform_groups"], self.kernel_size[0] * self.kernel_size[1]
            self.conv_offset = ZeroInit(groups, self.in_channels, 3, 3, **as_given)
            self.conv_mask = ZeroInit(groups * taps, self.in_channels, 3, 3, **as_given)
            assert self.conv_offset.bias is not None
            nn.init.constant_(self.conv_offset.bias, self._neutral_offset())
        self.FS = None
        if settings["freqselect"]:
            bands = settings["bands"], settings["low_band"], settings["map_groups"]
            self.FS = FreqSelect(self.in_channels, *bands, weight)

    def _neutral_offset(self) -> float:
        """The `o` at which the dilation is the plain layer's."""
        return 0.0 if self.settings["dilation_rule"] == "relu" else (self.dilation[0] - 1) / self.dilation[0]

    def _gates(self) -> list[KernelGates]:
        return [getattr(self, name) for name in _GATES[self.settings["adakern"]]]

    # The weights

    def _given(self, context: Tensor) -> list[Tensor]:
        return [gate for gates in self._gates() for gate in gates(context)]

    def _make(self, given: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        weight = shared[0]
        if not given:
            return weight[None]
        weight = weight.to(given[0].dtype)
        which = self.settings["adakern"]
        count = len(given) // len(_GATES[which])
        gates = [self._by_weight(given[at : at + count]) for at in range(0, len(given), count)]
        mean = weight.mean((2, 3), keepdim=True)
        if which == "low":
            return weight + mean * (gates[0] - 1)
        # The mean times its gates and the rest times theirs, so arranged that neutral gates give the weight itself.
        of_mean = gates[0] - gates[1] if which == "both" else 1 - gates[0]
        return weight * gates[-1] + mean * of_mean

    def _by_weight(self, gates: Sequence[Tensor]) -> Tensor:
        """The gates of channels, and of filters if there are any, as factors `(B, C_out, C_in/groups, 1, 1)`."""
        channels = gates[0].unflatten(1, (self.groups, 1, -1))
        if len(gates) == 1:
            factors = channels.expand(-1, -1, self.out_channels // self.groups, -1)
        else:
            factors = channels * gates[1].unflatten(1, (self.groups, -1, 1))
        return factors.flatten(1, 2)[..., None, None]

    def _neutral_weight(self) -> Tensor:
        return self.fadc_weight.clone()

    def _modulation(self) -> list[Tensor]:
        heads = [head for gates in self._gates() for head in gates.heads()]
        heads += [] if self.FS is None else [*self.FS.freq_weight_conv_list]  # type: ignore[list-item]
        heads += [] if self.conv_mask is None else [self.conv_mask]
        found: list[Tensor] = [parameter for head in heads for parameter in head.parameters()]
        if self.conv_offset is not None and self.conv_offset.bias is not None:
            start = torch.full_like(self.conv_offset.bias, self._neutral_offset())
            found += [self.conv_offset.weight, self.conv_offset.bias - start]
        return found

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        self.fadc_weight.copy_(self._checked(weight))

    @torch.no_grad()
    def _multiply(self, scale: Tensor) -> None:
        self.fadc_weight.mul_(self._factors(scale).to(self.fadc_weight.dtype).view(-1, 1, 1, 1))

    # The call

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        if self.settings["padding"] == "zeros":
            return super()._padded(x)
        height, width = self._extent()
        return F.pad(x, (1, 1, 1, 1), mode="replicate"), (height - 1, width - 1)

    def _extent(self) -> tuple[int, int]:
        """How far the outermost taps of the plain layer are from the middle one."""
        height, width = (apart * (size // 2) for apart, size in zip(self.dilation, self.kernel_size, strict=True))
        return height, width

    def _convolved(self, x: Tensor) -> Tensor:
        if self.FS is not None:
            x = self.FS(x)
        context = self._context(x) if self._gates() else None
        x, padding = self._padded(x)
        conv = Convolution(self.stride, padding, self.dilation, self.groups)
        if self.conv_mask is None and context is None:
            return F.conv2d(x, self.fadc_weight, self.bias, *conv)
        if self.conv_mask is None:
            assert context is not None
            return self._computed(context, x, conv)
        refuse_old_exporter()
        with without_autocast(x.device):
            given = [] if context is None else self._given(context)
            reach, mask = self._reach(x, padding)
        y = self._stretched(x, reach, mask, given, conv)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)

    def _reach(self, x: Tensor, padding: Sequence[int]) -> tuple[Tensor, Tensor]:
        """By how much the dilations of rows and columns exceed the plain layer's, `(B, 2, G, H', W')`; and the masks.

        Their convolution is 3x3 whatever the kernel, and its middle lies where that of the plain layer lies.
        """
        offset, mask = self.conv_offset, self.conv_mask
        assert offset is not None and offset.bias is not None and mask is not None and mask.bias is not None
        wide = x.to(fft_dtype(x.dtype))
        weight = torch.cat([offset.weight, mask.weight]).to(wide.dtype)
        bias = torch.cat([offset.bias, mask.bias]).to(wide.dtype)
        own = [its - extent + 1 for its, extent in zip(padding, self._extent(), strict=True)]
        if min(own) < 0:
            wide, own = F.pad(wide, (own[1], own[1], own[0], own[0])), [0, 0]
        found = F.conv2d(wide, weight, bias, self.stride, own)
        groups = self.settings["deform_groups"]
        o, mask_logits = found[:, :groups], found[:, groups:]
        rule = self.settings["dilation_rule"]
        if rule == "relu":
            stretch = F.relu(1 + o) - 1
            reach = torch.stack([apart * stretch for apart in self.dilation], 1)
        else:
            dilation = self.dilation[0]
            beyond = (o.abs() if rule == "abs" else F.relu(1 + o) - 1) * dilation - (dilation - 1)
            reach = torch.stack([beyond, beyond], 1)
        return reach, 2 * torch.sigmoid(mask_logits)

    def _stretched(self, x: Tensor, reach: Tensor, mask: Tensor, given: Sequence[Tensor], conv: Convolution) -> Tensor:
        """Convolve with taps as far out as `reach` says, in the layer's dtype or autocast's."""
        dtype = self.fadc_weight.dtype
        if x.dtype != torch.float64 and autocast_is_on(x.device):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)

        def compute(own: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
            image, reaches, masks, *gates = own
            return convolved(image, reaches, masks, self._make(gates, shared).to(dtype), conv)

        out_channels, in_channels, *kernel = self._kernel_shape()
        shape = WeightShape(out_channels, in_channels, (kernel[0], kernel[1]), self.groups, 1.0, 1.0, "sigmoid")
        held = self.in_channels * kernel[0] * kernel[1] * mask.shape[2] * mask.shape[3]
        with without_autocast(x.device), explained(x, shape):
            return by_parts(compute, [x, reach, mask, *given], self._shared(), held)


def cannot(
    in_channels: int, kernel_size: tuple[int, ...], dilation: tuple[int, ...], settings: Mapping[str, Any]
) -> str | None:
    """Why there is no such layer, in words; None if there is."""
    kernel = "x".join(map(str, kernel_size))
    if tuple(kernel_size) == (1, 1) and settings["adadr"]:
        return "a 1x1 kernel has no taps to move apart; switch adadr off"
    if tuple(kernel_size) == (1, 1) and settings["adakern"] != "none":
        return "a 1x1 kernel is its own mean; set adakern to none"
    if settings["adadr"] and not all(size % 2 for size in kernel_size):
        return f"a {kernel} kernel has no middle tap, from which a dilation could be measured"
    if settings["dilation_rule"] != "relu" and len(set(dilation)) > 1:
        return f"dilation_rule={settings['dilation_rule']} knows one dilation, and its has {dilation}"
    if settings["padding"] == "repeat" and min(kernel_size) == 1:
        return f"padding=repeat repeats all sides, and a {kernel} kernel reads beyond two of them at most"
    for key, used in (("map_groups", "freqselect"), ("deform_groups", "adadr")):
        if settings[used] and in_channels % settings[key]:
            return f"{key}={settings[key]} does not divide its {in_channels} input channels"
    return None


_WORDS = ("kernel_decompose", "use_zero_dilation", "padding_mode", "deform_groups", "fs")
_BAND_WORDS = ("k_list", "lowfreq_att", "spatial_group", "lp_type", "act")
_OFF_WORDS = {"use_dct": (False,), "pre_fs": (True,), "lp_type": ("freq",), "act": ("sigmoid",)}
"""What the authors' code can do, and is known here with these values only."""
_PADDINGS = {"repeat": "repeat", "zero": "zeros", "zeros": "zeros", "none": "zeros", None: "zeros"}
"""Ours by the authors' words; their deformable convolution itself pads with zeros where they pad nothing."""


class FADCOperator(DynamicOperator):
    """Puts frequency-adaptive dilated convolutions in the place of convolutions."""

    name = "fadc"
    title = "[FADC](https://arxiv.org/abs/2403.05369)"
    leaf = "fadc_weight"
    official_leaf = "conv_offset.weight"
    unseen_settings = ("bands", "low_band", "dilation_rule", "padding")
    settings_class = FADCSettings
    conv_layer = FADConv2d

    def refusal_of_trained(self, site: Site, settings: dict[str, Any]) -> str | None:
        if (why := super().refusal(site, settings)) is not None:
            return why
        return cannot(site.in_channels, site.kernel_size, site.dilation, settings)

    def refusal(self, site: Site, settings: dict[str, Any]) -> str | None:
        if (why := self.refusal_of_trained(site, settings)) is not None:
            return why
        if settings["adadr"] and settings["dilation_rule"] == "abs" and site.dilation == (1, 1):
            return "dilation_rule=abs has no gradient where it starts, at a dilation of 1; use relu"
        if settings["padding"] == "repeat":
            extent = tuple(apart * (size // 2) for apart, size in zip(site.dilation, site.kernel_size, strict=True))
            odd = all(size % 2 for size in site.kernel_size)
            alike = odd and site.padding_mode == "replicate" and site.padding == extent == (1, 1) and not site.pads_same
            return None if alike else "padding=repeat would change what it computes; use zeros, which pads as it does"
        return None

    def multiply_adds(self, layer: nn.Module, sample: tuple[int, ...]) -> dict[str, int]:
        assert isinstance(layer, FADConv2d)
        height, width = sample[-2:]
        left, right, top, bottom = layer._pads()
        if layer.pads_same:
            positions = -(-height // layer.stride[0]) * -(-width // layer.stride[1])
        else:
            conv = Convolution(layer.stride, (0, 0), layer.dilation, layer.groups)
            size = convolved_size((height + top + bottom, width + left + right), layer.kernel_size, conv)
            positions = size[0] * size[1]
        found: dict[str, int] = {}
        if layer._gates():
            gates, weights = layer._gates(), layer.fadc_weight.numel()
            linear = [gate.fc.weight.numel() + sum(head.weight.numel() for head in gate.heads()) for gate in gates]
            pairs = weights // (layer.kernel_size[0] * layer.kernel_size[1])  # of a filter and an input channel
            outer = sum(pairs * (len(gate.heads()) - 1) for gate in gates)
            whole = 0 if layer.settings["adakern"] == "low" else weights
            found |= {"attention": sum(linear), "kernels": whole + pairs + outer}
        if layer.FS is not None:
            found |= layer.FS.multiply_adds(height, width)
        if layer.conv_offset is not None and layer.conv_mask is not None:
            taps = layer.kernel_size[0] * layer.kernel_size[1]
            groups = layer.settings["deform_groups"]
            found["dilation"] = (layer.conv_offset.weight.numel() + layer.conv_mask.weight.numel()) * positions
            # Four pixels a tap and channel; their shares, and the mask, are products of the tap alone.
            found["sampling"] = 4 * taps * (layer.in_channels + 2 * groups) * positions
        return found

    def band_maps(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        assert isinstance(layer, FADConv2d)
        return None if layer.FS is None else layer.FS.maps(x)

    def settings_of_tensors(self, plain: nn.Module, tensors: Mapping[str, Shaped], official: bool) -> dict[str, Any]:
        maps = tensors.get("FS.freq_weight_conv_list.0.weight")
        offset = tensors.get("conv_offset.weight")
        found: dict[str, Any] = {"freqselect": maps is not None, "adadr": offset is not None}
        if maps is not None:
            found["map_groups"] = maps.shape[0]
        if offset is not None:
            found["deform_groups"] = offset.shape[0]
        name = next((name for name in ("OMNI_ATT1", "OMNI_ATT") if f"{name}.fc.weight" in tensors), None)
        if name is None:
            return found | {"adakern": "none"}
        width, in_channels, *_ = tensors[f"{name}.fc.weight"].shape
        if name == "OMNI_ATT1":  # of high and low the tensors are alike
            found["adakern"] = "both"
        if width != max(in_channels // 16, 16):
            found |= {"reduction": min(1.0, (width + 0.5) / in_channels), "min_channels": width}
        return found | {"norm": "rms" if f"{name}.norm.weight" in tensors else "batch"}

    # The authors' layers

    def load_official(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        """A layer of the authors' `AdaptiveDilatedConv`, or their `FrequencySelection` alone (`operator: freqselect`).

        The buffer `dilated_offset` holds the same numbers in each of them, and is not needed.
        """
        if config.get("operator") == "freqselect":
            return self._freq_select(state, config)
        check_config(
            config, (*CONV_WORDS, *_WORDS, *_BAND_WORDS, *_OFF_WORDS), ("kernel_decompose", "use_zero_dilation")
        )
        _check_values(config)
        if "padding_mode" not in config:
            raise CheckpointError("the configuration of the layer does not say padding_mode")
        if config["padding_mode"] not in _PADDINGS:
            raise CheckpointError(f"padding_mode {config['padding_mode']!r} is none of repeat, zero and none")
        settings: dict[str, Any] = {
            "adakern": config["kernel_decompose"] or "none",
            "freqselect": bool(config.get("fs", True)),
            "deform_groups": config.get("deform_groups", 1),
            "dilation_rule": "zero" if config["use_zero_dilation"] else "abs",
            "padding": _PADDINGS[config["padding_mode"]],
        }
        if settings["freqselect"]:
            settings |= _band_settings(config)
        geometry = {key: value for key, value in config.items() if key != "padding"}
        plain = plain_conv(geometry, state["weight"])
        plain.padding = tuple(a * (k // 2) for a, k in zip(plain.dilation, plain.kernel_size, strict=True))
        try:
            layer = self.make(plain, self.settings(settings)).train(config.get("mode") == "train")
        except (RecipeError, ValueError) as error:
            raise CheckpointError(str(error)) from None
        return loaded(layer, self.own_state(layer, state))

    def own_state(self, layer: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name: tensor for name, tensor in state.items() if name not in ("weight", "dilated_offset")}
        return {**own, "fadc_weight": state["weight"] / 2}

    def official_state(self, layer: nn.Module) -> dict[str, Tensor]:
        """The tensors of a layer, or of a `FreqSelect`, under the authors' names and at their scale.

        Raises:
            CheckpointError: their code has no such layer.
        """
        if isinstance(layer, FreqSelect):
            return layer.state_dict()
        assert isinstance(layer, FADConv2d)
        error = _not_official(layer)
        if error is not None:
            raise CheckpointError(f"the authors' code has no such layer: {error}")
        state = layer.state_dict()
        state["weight"] = 2 * state.pop("fadc_weight")
        steps = torch.tensor([-1, 0, 1], dtype=state["weight"].dtype, device=state["weight"].device)
        state["dilated_offset"] = torch.cartesian_prod(steps, steps).view(1, 1, 18, 1, 1)
        return state

    def _freq_select(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        known = ("operator", "mode", "source", "in_channels", *_BAND_WORDS, *_OFF_WORDS)
        check_config(config, known, ("in_channels",))
        _check_values(config)
        settings = self.settings(_band_settings(config))
        like = next(iter(state.values())).to("meta")
        try:
            bands = settings["bands"], settings["low_band"], settings["map_groups"]
            module = FreqSelect(config["in_channels"], *bands, like)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        return loaded(module, state).train(config.get("mode") == "train")


def _band_settings(config: Mapping[str, Any]) -> dict[str, Any]:
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

"""ODConv: omni-dimensional dynamic convolution (Li et al., ICLR 2022, arXiv 2209.07947).

The weight of a sample is `f[o] c[i] s[u, v] sum_k a_k W_k[o, i, u, v]`: gates of filters, input channels and kernel
positions, and a softmax over kernels, all of the mean of the input: section 3.2, equation 4. One kernel or several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv.modulation import ContextBatchNorm, Squeeze, ZeroInit, gate, linear_of, normed
from fdconv.per_sample import convolve_made
from fdconv.precision import autocast_is_on
from fdconv.reference import Convolution, convolved_size, per_sample
from fdconv.tracing import is_transformed

from ..errors import CheckpointError
from .base import Shaped
from .dynamic_layer import DynamicConv2d, DynamicLayer, DynamicLinear
from .dynamic_operator import CONV_WORDS, DynamicOperator, Settings, check_config, loaded, plain_conv
from .mixture import RandomHead, anneal_, apart, mean_kernel, mixed, move_


class ODConvSettings(Settings):
    """Settings of ODConv."""

    kernels: Annotated[int, Ge(1)] = 4
    """How many kernels are mixed; 1 leaves the gates only."""
    reduction: Annotated[float, Gt(0), Le(1)] = 1 / 16
    """Width of the attention over `C_in`."""
    min_channels: Annotated[int, Ge(1)] = 16
    """The least width of the attention."""
    norm: Literal["batch", "rms"] = "batch"
    """In the attention: `batch` as the authors have it, or `rms`, which knows nothing of other samples."""


def attention_width(in_channels: int, settings: Mapping[str, Any]) -> int:
    """Width of the attention."""
    return max(int(in_channels * settings["reduction"]), int(settings["min_channels"]))


class OmniAttention(nn.Module):
    """`(B, C_in)` to the gates: `2*sigmoid` of all but the kernels', whose softmax adds up to one.

    Heads of gates are zero at the start, and so the gates 1. That of the kernels is random, for nothing else would tell
    equal kernels apart.

    Args:
        in_channels: `C_in`.
        out_channels: `C_out`.
        positions: `k_h*k_w`; above 1 there is a spatial gate.
        depthwise: there is no filter gate, which would be the channel gate once more.
        settings: of the operator.
        like: has the dtype and the device.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        positions: int,
        *,
        depthwise: bool,
        settings: Mapping[str, Any],
        like: Tensor,
    ) -> None:
        super().__init__()
        kernels, width = settings["kernels"], attention_width(in_channels, settings)
        where: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.fc = Squeeze(width, in_channels, 1, 1, **where)
        self.bn = ContextBatchNorm(width, **where) if settings["norm"] == "batch" else None
        self.norm = nn.RMSNorm(width, eps=1e-6, **where) if settings["norm"] == "rms" else None
        self.channel_fc = ZeroInit(in_channels, width, 1, 1, **where)
        self.filter_fc = None if depthwise else ZeroInit(out_channels, width, 1, 1, **where)
        self.spatial_fc = ZeroInit(positions, width, 1, 1, **where) if positions > 1 else None
        self.kernel_fc = RandomHead(kernels, width, 1, 1, **where) if kernels > 1 else None

    def heads(self) -> dict[str, ZeroInit]:
        """Those that there are, that of the kernels last."""
        every = {
            "channel": self.channel_fc,
            "filter": self.filter_fc,
            "spatial": self.spatial_fc,
            "kernel": self.kernel_fc,
        }
        return {name: head for name, head in every.items() if head is not None}

    def gate_heads(self) -> list[ZeroInit]:
        """Those whose gates are sigmoids."""
        return [head for name, head in self.heads().items() if name != "kernel"]

    def forward(self, context: Tensor, temperature: Tensor) -> dict[str, Tensor]:
        hidden = linear_of(self.fc, context)
        for norm in (self.bn, self.norm):
            hidden = hidden if norm is None else normed(norm, hidden, self.fc.weight.dtype)
        hidden = F.relu(hidden)
        temperature = temperature.to(hidden.dtype)
        logits = {name: linear_of(head, hidden) / temperature for name, head in self.heads().items()}
        return {
            name: torch.softmax(its, 1) if name == "kernel" else gate(its, "sigmoid") for name, its in logits.items()
        }


class _ODConv(DynamicLayer):
    """What both layers share.

    `od_kernels (K, C_out, C_in/groups, k_h, k_w)` all start as the static weight; they are the authors' times `2^m`,
    with `m` sigmoid gates, which here are 1 where theirs are a half. The bias is the static one. The buffer
    `temperature (1,)`, of all gates, starts at 1, which is what training ends with.
    """

    stored_name = "od_kernels"
    od_kernels: nn.Parameter
    temperature: Tensor
    attention: OmniAttention
    groups: int

    def _build(self, weight: Tensor) -> None:
        count = self.settings["kernels"]
        kernel = weight.reshape(self._kernel_shape())
        self.od_kernels = nn.Parameter(kernel.expand(count, *kernel.shape).clone(memory_format=torch.contiguous_format))
        out_channels, _, k_h, k_w = kernel.shape
        self.attention = OmniAttention(
            self._in_channels(),
            out_channels,
            k_h * k_w,
            depthwise=self.groups == self._in_channels() == out_channels,
            settings=self.settings,
            like=weight,
        )
        self.register_buffer("temperature", weight.new_ones(1))

    def _given(self, context: Tensor) -> list[Tensor]:
        return list(self.attention(context, self.temperature).values())

    def _make(self, given: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        return _weights(tuple(self.attention.heads()), self.groups, given, shared)

    def _applied(self, given: Sequence[Tensor], x: Tensor, conv: Convolution | None) -> Tensor:
        gates = dict(zip(self.attention.heads(), given, strict=True))
        on_input = on_output = None
        if self._may_move(x, given[0].dtype):
            channel, filter_ = self._moved(tuple(x.shape), conv)
            on_input = gates.pop("channel") if channel else None
            on_output = gates.pop("filter") if filter_ else None
        if on_input is not None:
            x = x * _along_channels(on_input, x, conv)
        if gates:
            make, dtype = partial(_weights, tuple(gates), self.groups), self._stored().dtype
            y = convolve_made(x, make, list(gates.values()), self._shared(), self._kernel_shape(), conv, dtype)
        else:  # one weight for all samples
            y = per_sample(x, self.od_kernels, conv)
        return y if on_output is None else y * _along_channels(on_output, y, conv)

    def _may_move(self, x: Tensor, dtype: torch.dtype) -> bool:
        """True if gates lose no precision on maps; a tracer is not asked about the sizes of what it traces."""
        if is_transformed() or not x.dtype == dtype == self._stored().dtype:
            return False
        return x.numel() > 0 and (dtype == torch.float64 or not autocast_is_on(x.device))

    def _moved(self, shape: Sequence[int], conv: Convolution | None) -> tuple[bool, bool]:
        """Whether the channel gate goes to the input and the filter gate to the result, being fewer numbers there.

        Args:
            shape: of the input, with its batch axis.
            conv: what the weight is used in.
        """
        out_channels, in_channels, *kernel = self._kernel_shape()
        weights = out_channels * in_channels * prod(kernel)
        inputs, outputs = prod(shape[1:]), _outputs(shape, out_channels, kernel, conv)
        return inputs <= weights, self.attention.filter_fc is not None and outputs <= weights

    def _neutral_weight(self) -> Tensor:
        return mean_kernel(self.od_kernels).reshape(self._static_shape())

    def _modulation(self) -> list[Tensor]:
        heads = [parameter for head in self.attention.gate_heads() for parameter in head.parameters()]
        return [apart(self.od_kernels), *heads]

    def set_weight(self, weight: Tensor) -> None:
        move_(self.od_kernels, self._checked(weight).reshape(self._kernel_shape()))

    @torch.no_grad()
    def _multiply(self, scale: Tensor) -> None:
        self.od_kernels.mul_(self._factors(scale).to(self.od_kernels.dtype).view(-1, 1, 1, 1))

    def _cost_of_gates(self, sample: tuple[int, ...]) -> int:
        """Products of the gates with the weight and the maps, for one sample."""
        raise NotImplementedError

    def _gate_products(self, shape: Sequence[int], conv: Convolution | None) -> int:
        out_channels, in_channels, *kernel = self._kernel_shape()
        weights = out_channels * in_channels * prod(kernel)
        channel, filter_ = self._moved(shape, conv)
        spatial = self.attention.spatial_fc is not None
        both = 0 if channel or not spatial else self._in_channels() * prod(kernel)
        inner = prod(shape[1:]) + weights * spatial if channel else weights
        if self.attention.filter_fc is None:
            return both + inner
        return both + inner + (_outputs(shape, out_channels, kernel, conv) if filter_ else weights)


class ODConv2d(_ODConv, DynamicConv2d):  # type: ignore[misc, override]
    """ODConv in the place of `nn.Conv2d`."""

    def _cost_of_gates(self, sample: tuple[int, ...]) -> int:
        x, padding = self._padded(torch.empty(1, *sample, dtype=torch.float32, device="meta"))
        return self._gate_products(x.shape, Convolution(self.stride, padding, self.dilation, self.groups))


class ODLinear(_ODConv, DynamicLinear):  # type: ignore[misc, override]
    """ODConv in the place of `nn.Linear`, as a 1x1 convolution: the attention looks at the mean over positions."""

    def _cost_of_gates(self, sample: tuple[int, ...]) -> int:
        return self._gate_products((1, *sample), None)


def _weights(names: Sequence[str], groups: int, given: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """Kernels mixed and gated, `(B, C_out, C_in/groups, k_h, k_w)`, by the gates that have these names."""
    gates, (kernels,) = dict(zip(names, given, strict=True)), shared
    dtype, k_h, k_w = given[0].dtype, *kernels.shape[3:]
    mixture = mixed(gates["kernel"], kernels) if "kernel" in gates else kernels.to(dtype)
    weights = mixture.unflatten(1, (groups, -1))  # (B or 1, groups, C_out/groups, C_in/groups, k_h, k_w)
    inner = None
    if "channel" in gates:
        inner = gates["channel"].unflatten(1, (groups, 1, -1, 1, 1))
    if "spatial" in gates:
        spatial = gates["spatial"].unflatten(1, (1, 1, 1, k_h, k_w))
        inner = spatial if inner is None else inner * spatial
    if inner is not None:
        weights = weights * inner
    if "filter" in gates:
        weights = weights * gates["filter"].unflatten(1, (groups, -1, 1, 1, 1))
    return weights.flatten(1, 2)


def _along_channels(factor: Tensor, x: Tensor, conv: Convolution | None) -> Tensor:
    """A factor `(B, C)` so that it broadcasts to `x`."""
    between = (1,) * (x.dim() - 2)
    return factor.view(len(factor), *between, -1) if conv is None else factor.view(*factor.shape, *between)


def _outputs(shape: Sequence[int], out_channels: int, kernel: Sequence[int], conv: Convolution | None) -> int:
    """Numbers that a sample of the result has."""
    positions = shape[1:-1] if conv is None else convolved_size(shape[2:], kernel, conv)
    return out_channels * prod(positions)


_KNOWN = (*CONV_WORDS, "kernel_num", "reduction", "min_channel", "attention_channel", "temperature")


class ODConvOperator(DynamicOperator):
    """Puts kernels that are gated along every dimension, and mixed, in the place of convolutions and linear layers."""

    name = "odconv"
    title = "[ODConv](https://arxiv.org/abs/2209.07947)"
    leaf = "od_kernels"
    official_leaf = "attention.channel_fc.weight"
    settings_class = ODConvSettings
    conv_layer = ODConv2d
    linear_layer = ODLinear

    def multiply_adds(self, layer: nn.Module, sample: tuple[int, ...]) -> dict[str, int]:
        """`heads`, `mixing` of several kernels, and `gates`: each with the weight or with maps, as a call has it."""
        assert isinstance(layer, _ODConv)
        heads: list[Squeeze | ZeroInit] = [layer.attention.fc, *layer.attention.heads().values()]
        mixing = layer.od_kernels.numel() if layer.settings["kernels"] > 1 else 0
        counts = {
            "heads": sum(head.weight.numel() for head in heads),
            "mixing": mixing,
            "gates": layer._cost_of_gates(sample),
        }
        return {component: count for component, count in counts.items() if count}

    def schedule(self, layer: nn.Module, progress: float) -> bool:
        """Set the temperature to `1 + 29*max(0, 1 - progress)`; the authors' schedule ends after ten epochs."""
        assert isinstance(layer, _ODConv)
        anneal_(layer.temperature, progress)
        return True

    def settings_of_tensors(self, plain: nn.Module, tensors: Mapping[str, Shaped], official: bool) -> dict[str, Any]:
        settings: dict[str, Any] = {"kernels": tensors["od_kernels"].shape[0]}
        settings["norm"] = "rms" if "attention.norm.weight" in tensors else "batch"
        squeeze = tensors.get("attention.fc.weight")
        return settings if squeeze is None else settings | self._width_settings(squeeze.shape)

    def _width_settings(self, squeeze: Sequence[int]) -> dict[str, Any]:
        """What gives a squeeze `(width, C_in, ...)` its width, if the defaults do not."""
        width, in_channels = squeeze[:2]
        if width == attention_width(in_channels, self.settings({})):
            return {}
        if width >= in_channels:
            return {"min_channels": width}
        return {"reduction": (width + 0.5) / in_channels, "min_channels": 1}

    def load_official(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        """A layer of the authors' `ODConv2d`: `weight (K, ...)`, `attention.*`.

        The temperature, which is in no state dict, is 1 unless `config` says another.
        """
        check_config(config, _KNOWN)
        plain = plain_conv(config, state["weight"])
        settings: dict[str, Any] = {"kernels": config.get("kernel_num", len(state["weight"]))}
        said = {"reduction": config.get("reduction"), "min_channels": config.get("min_channel")}
        settings |= {key: value for key, value in said.items() if value is not None}
        squeeze = state.get("attention.fc.weight")
        if squeeze is not None and len(squeeze) != attention_width(squeeze.shape[1], self.settings(settings)):
            settings |= self._width_settings(squeeze.shape)
        layer = self.make(plain, self.settings(settings)).train(config.get("mode") == "train")
        assert isinstance(layer, _ODConv)
        temperature = state["weight"].new_full((1,), config.get("temperature", 1))
        return loaded(layer, {**self.own_state(layer, state), "temperature": temperature})

    def own_state(self, layer: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(layer, _ODConv)
        own = {name: tensor for name, tensor in state.items() if name != "weight"}
        return {**own, "od_kernels": state["weight"] / _official_scale(layer)}

    def official_state(self, layer: nn.Module) -> dict[str, Tensor]:
        """The state of a layer under the authors' names, bit for bit; the temperature is no part of it.

        Raises:
            CheckpointError: the authors' layer has no bias, and no norm but BatchNorm.
        """
        assert isinstance(layer, _ODConv)
        if layer.bias is not None or layer.settings["norm"] != "batch":
            what = "bias" if layer.bias is not None else "RMSNorm"
            raise CheckpointError(f"the authors' ODConv2d has no {what}, and this layer has one")
        state = {f"attention.{name}": tensor for name, tensor in layer.attention.state_dict().items()}
        return state | {"weight": layer.od_kernels.detach() * _official_scale(layer)}


def _official_scale(layer: _ODConv) -> int:
    """The authors' kernels over ours: a factor of 2 for each gate that is 1 here and a half there."""
    return 2 ** len(layer.attention.gate_heads())

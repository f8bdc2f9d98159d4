"""DY-Conv: dynamic convolution, attention over convolution kernels (Chen et al., CVPR 2020, arXiv 1912.03458).

The weight of a sample is `sum_k a_k W_k`, its bias `sum_k a_k b_k`, with `a = softmax(fc2(relu(fc1 s)) / T)` of the
mean `s` of the input: section 3, equations 2 and 3. The temperature `T` is annealed while the kernels are young.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv.modulation import Squeeze, linear_of

from .base import Shaped
from .dynamic_layer import DynamicConv2d, DynamicLayer, DynamicLinear
from .dynamic_operator import CONV_WORDS, DynamicOperator, Settings, check_config, loaded, plain_conv
from .mixture import RandomHead, anneal_, apart, full_deltas, mean_kernel, mixed, move_


class DyConvSettings(Settings):
    """Settings of DY-Conv."""

    kernels: Annotated[int, Ge(2)] = 4
    """How many kernels are mixed."""
    ratio: Annotated[float, Gt(0), Le(1)] = 1 / 4
    """Width of the attention's hidden layer over `C_in`: it is `int(ratio*C_in) + 1`, for images as many as kernels."""


def hidden_width(in_channels: int, settings: Mapping[str, Any]) -> int:
    """Width of the attention's hidden layer."""
    return int(settings["kernels"] if in_channels == 3 else int(in_channels * settings["ratio"]) + 1)


class KernelAttention(nn.Module):
    """`(B, C_in)` to the attention over kernels, `(B, K)`, which adds up to one.

    It stays random at the start: nothing would ever tell equal kernels apart if it were the same for all of them.
    """

    def __init__(self, in_channels: int, hidden: int, kernels: int, like: Tensor) -> None:
        super().__init__()
        self.fc1 = Squeeze(hidden, in_channels, 1, 1, device=like.device, dtype=like.dtype)
        self.fc2 = RandomHead(kernels, hidden, 1, 1, device=like.device, dtype=like.dtype)

    def forward(self, context: Tensor, temperature: Tensor) -> Tensor:
        logits = linear_of(self.fc2, F.relu(linear_of(self.fc1, context)))
        return torch.softmax(logits / temperature.to(logits.dtype), 1)


class _DyConv(DynamicLayer):
    """What both layers share.

    `kernels (K, C_out, C_in/groups, k_h, k_w)` all start as the static weight: exact for every attention, and at every
    temperature. `kernel_bias (K-1, C_out)` is what the kernels' biases differ by from `bias`, their mean; that of the
    last makes the sum zero. The buffer `temperature (1,)` starts at 1, which is what training ends with.
    """

    stored_name = "kernels"
    kernels: nn.Parameter
    kernel_bias: nn.Parameter | None
    temperature: Tensor

    def _build(self, weight: Tensor) -> None:
        count, in_channels = self.settings["kernels"], self._in_channels()
        kernel = weight.reshape(self._kernel_shape())
        self.kernels = nn.Parameter(kernel.expand(count, *kernel.shape).clone(memory_format=torch.contiguous_format))
        self.kernel_bias = None if self.bias is None else nn.Parameter(weight.new_zeros(count - 1, len(weight)))
        self.attention = KernelAttention(in_channels, hidden_width(in_channels, self.settings), count, weight)
        self.register_buffer("temperature", weight.new_ones(1))

    def _given(self, context: Tensor) -> list[Tensor]:
        return [self.attention(context, self.temperature)]

    def _make(self, given: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        return mixed(given[0], shared[0])

    def _sample_bias(self, given: Sequence[Tensor]) -> Tensor | None:
        return None if self.kernel_bias is None else mixed(given[0], full_deltas(self.kernel_bias))

    def _neutral_weight(self) -> Tensor:
        return mean_kernel(self.kernels).reshape(self._static_shape())

    def _modulation(self) -> list[Tensor]:
        own = [] if self.kernel_bias is None else [self.kernel_bias]
        return [apart(self.kernels), *own]

    def set_weight(self, weight: Tensor) -> None:
        move_(self.kernels, self._checked(weight).reshape(self._kernel_shape()))

    @torch.no_grad()
    def _multiply(self, scale: Tensor) -> None:
        if self.kernel_bias is not None and self.kernel_bias.any():
            raise ValueError(
                f"{type(self).__name__} mixes its bias with its weight, so its weight cannot be multiplied alone"
            )
        self.kernels.mul_(self._factors(scale).to(self.kernels.dtype).view(-1, 1, 1, 1))


class DyConv2d(_DyConv, DynamicConv2d):  # type: ignore[misc, override]
    """DY-Conv in the place of `nn.Conv2d`."""


class DyLinear(_DyConv, DynamicLinear):  # type: ignore[misc, override]
    """DY-Conv in the place of `nn.Linear`, as a 1x1 convolution: the attention looks at the mean over positions."""


_KNOWN = (*CONV_WORDS, "K", "ratio", "temperature")


class DyConvOperator(DynamicOperator):
    """Puts a mixture of kernels, mixed by a softmax, in the place of convolutions and linear layers."""

    name = "dyconv"
    title = "[DY-Conv](https://arxiv.org/abs/1912.03458)"
    leaf = "kernels"
    settings_class = DyConvSettings
    conv_layer = DyConv2d
    linear_layer = DyLinear

    def multiply_adds(self, layer: nn.Module, sample: tuple[int, ...]) -> dict[str, int]:
        assert isinstance(layer, _DyConv)
        heads = layer.attention.fc1.weight.numel() + layer.attention.fc2.weight.numel()
        return {"heads": heads, "mixing": layer.kernels.numel()}

    def undecayed(self, layer: nn.Module) -> Collection[nn.Parameter]:
        assert isinstance(layer, _DyConv)
        return () if layer.kernel_bias is None else (layer.kernel_bias,)

    def schedule(self, layer: nn.Module, progress: float) -> bool:
        """Set the temperature to `1 + 29*max(0, 1 - progress)`; the paper's schedule ends after ten epochs."""
        assert isinstance(layer, _DyConv)
        anneal_(layer.temperature, progress)
        return True

    def settings_of_tensors(self, plain: nn.Module, tensors: Mapping[str, Shaped], official: bool) -> dict[str, Any]:
        settings = self.settings({}) | {"kernels": tensors["kernels"].shape[0]}
        squeeze = tensors.get("attention.fc1.weight")
        return settings if squeeze is None else settings | _ratio_of(squeeze.shape, settings)

    def load_official(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        """A layer of the public code: `weight (K, ...)`, `bias (K, C_out)`, `attention.fc1.*`, `attention.fc2.*`.

        The temperature, which is in no state dict, is 1 unless `config` says another.
        """
        check_config(config, _KNOWN)
        kernels, plain = state["weight"], plain_conv(config, state["weight"])
        settings = {"kernels": config.get("K", len(kernels))}
        if "ratio" in config:
            settings["ratio"] = config["ratio"]
        elif "attention.fc1.weight" in state:
            settings |= _ratio_of(state["attention.fc1.weight"].shape, self.settings(settings))
        layer = self.make(plain, self.settings(settings)).train(config.get("mode") == "train")
        own = {name: tensor for name, tensor in state.items() if name.startswith("attention.")}
        own |= {"kernels": kernels, "temperature": kernels.new_full((1,), config.get("temperature", 1))}
        if "bias" in state:
            own["bias"] = mean_kernel(state["bias"].double()).to(kernels.dtype)
            own["kernel_bias"] = (state["bias"].double() - own["bias"].double())[:-1].to(kernels.dtype)
        return loaded(layer, own)

    def official_state(self, layer: nn.Module) -> dict[str, Tensor]:
        """The state of a layer under the names of the public code, which has no temperature in it.

        Weights are those of the layer, bit for bit; biases are sums of what the layer has, rounded once.
        """
        assert isinstance(layer, _DyConv)
        state = {f"attention.{name}": tensor for name, tensor in layer.attention.state_dict().items()}
        state["weight"] = layer.kernels.detach()
        if layer.bias is not None and layer.kernel_bias is not None:
            deltas = full_deltas(layer.kernel_bias.detach().double())
            state["bias"] = (layer.bias.detach().double() + deltas).to(layer.bias.dtype)
        return state


def _ratio_of(squeeze: Sequence[int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ratio that gives a hidden layer `(hidden, C_in, ...)`, if the usual one does not."""
    hidden, in_channels = squeeze[:2]
    usual = hidden_width(in_channels, settings) == hidden
    return {} if usual else {"ratio": min(1.0, (hidden - 0.5) / in_channels)}

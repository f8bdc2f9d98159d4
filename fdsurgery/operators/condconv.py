"""CondConv: conditionally parameterized convolutions (Yang et al., NeurIPS 2019, arXiv 1904.04971).

The weight of a sample is `sum_e a_e W_e` over the experts, with `a = sigmoid(R s + r)` of the mean `s` of the input:
section 3, equation 2. Sigmoids do not add up to one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Shaped
from .dynamic_layer import DynamicConv2d, DynamicLayer, DynamicLinear
from .dynamic_operator import CONV_WORDS, DynamicOperator, Settings, check_config, loaded, plain_conv
from .mixture import apart, full_deltas, mean_kernel, mixed, move_


class CondConvSettings(Settings):
    """Settings of CondConv."""

    experts: Annotated[int, Ge(1)] = 8
    """How many kernels are mixed."""


class Routing(nn.Module):
    """The attention of the experts, `(B, C_in)` to `(B, E)`.

    It is no `nn.Linear`, which a model's own initialisation would redraw. Rows come in pairs of opposite sign:
    `sigmoid(-z) = 1 - sigmoid(z)`, so at the start the attention differs from expert to expert and adds up to `E/2`
    for every input. An odd one out is zero.
    """

    def __init__(self, experts: int, in_channels: int, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.new_empty(experts, in_channels))
        self.bias = nn.Parameter(like.new_empty(experts))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw half of the rows as `nn.Linear` does; the biases are zero."""
        half = len(self.weight) // 2
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        if half:
            nn.init.kaiming_uniform_(self.weight[:half], a=math.sqrt(5))
            self.weight[half : 2 * half] = -self.weight[:half]

    def unpaired(self) -> list[Tensor]:
        """All zero while the attention adds up to `E/2` for every input."""
        half = len(self.weight) // 2
        values = (self.weight, self.bias)
        return [part for one in values for part in (one[:half] + one[half : 2 * half], one[2 * half :])]

    def forward(self, context: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(context, self.weight.to(context.dtype), self.bias.to(context.dtype)))


class _CondConv(DynamicLayer):
    """What both layers share.

    `experts (E, C_out, C_in/groups, k_h, k_w)` are `E/2` times the authors', so that each starts as the static weight
    and a step moves the weight as it would move a static one. `expert_bias (E-1, C_out)` is what the experts' biases
    differ by from `bias`, their mean; that of the last makes the sum zero.
    """

    stored_name = "experts"
    experts: nn.Parameter
    expert_bias: nn.Parameter | None

    def _build(self, weight: Tensor) -> None:
        count = self.settings["experts"]
        kernel = weight.reshape(self._kernel_shape())
        self.experts = nn.Parameter(kernel.expand(count, *kernel.shape).clone(memory_format=torch.contiguous_format))
        own_bias = self.bias is not None and count > 1
        self.expert_bias = nn.Parameter(weight.new_zeros(count - 1, len(weight))) if own_bias else None
        self.routing_fn = Routing(count, self._in_channels(), weight)

    def _given(self, context: Tensor) -> list[Tensor]:
        return [self.routing_fn(context) * (2 / self.settings["experts"])]

    def _make(self, given: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        return mixed(given[0], shared[0])

    def _sample_bias(self, given: Sequence[Tensor]) -> Tensor | None:
        if self.bias is None or self.expert_bias is None:
            return None
        (attention,) = given
        own = mixed(attention, full_deltas(self.expert_bias))
        return own + (attention.sum(1, keepdim=True) - 1) * self.bias.to(attention.dtype)

    def _neutral_weight(self) -> Tensor:
        return mean_kernel(self.experts).reshape(self._static_shape())

    def _modulation(self) -> list[Tensor]:
        own = [] if self.expert_bias is None else [self.expert_bias]
        return [apart(self.experts), *self.routing_fn.unpaired(), *own]

    def set_weight(self, weight: Tensor) -> None:
        move_(self.experts, self._checked(weight).reshape(self._kernel_shape()))

    @torch.no_grad()
    def _multiply(self, scale: Tensor) -> None:
        if self.expert_bias is not None:
            raise ValueError(
                f"{type(self).__name__} mixes its bias with its weight, so its weight cannot be multiplied alone"
            )
        self.experts.mul_(self._factors(scale).to(self.experts.dtype).view(-1, 1, 1, 1))


class CondConv2d(_CondConv, DynamicConv2d):  # type: ignore[misc, override]
    """CondConv in the place of `nn.Conv2d`."""


class CondLinear(_CondConv, DynamicLinear):  # type: ignore[misc, override]
    """CondConv in the place of `nn.Linear`: the attention looks at the mean over positions."""


_KNOWN = (*CONV_WORDS, "num_experts")


class CondConvOperator(DynamicOperator):
    """Puts a mixture of experts, mixed by sigmoids, in the place of convolutions and linear layers."""

    name = "condconv"
    title = "[CondConv](https://arxiv.org/abs/1904.04971)"
    leaf = "experts"
    official_leaf = "routing_fn.weight"
    settings_class = CondConvSettings
    conv_layer = CondConv2d
    linear_layer = CondLinear

    def multiply_adds(self, layer: nn.Module, sample: tuple[int, ...]) -> dict[str, int]:
        assert isinstance(layer, _CondConv)
        return {"routing": layer.routing_fn.weight.numel(), "mixing": layer.experts.numel()}

    def undecayed(self, layer: nn.Module) -> Collection[nn.Parameter]:
        assert isinstance(layer, _CondConv)
        return [] if layer.expert_bias is None else [layer.expert_bias]

    def settings_of_tensors(self, plain: nn.Module, tensors: Mapping[str, Shaped], official: bool) -> dict[str, Any]:
        return {"experts": tensors["experts"].shape[0]}

    def load_official(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        """A layer of timm's `CondConv2d` with its routing: `weight (E, w)`, `bias (E, C_out)`, `routing_fn.*`."""
        check_config(config, _KNOWN)
        experts = config.get("num_experts", len(state["weight"]))
        plain = plain_conv(config, state["weight"])
        layer = self.make(plain, {"experts": experts}).train(config.get("mode") == "train")
        return loaded(layer, self.own_state(layer, state))

    def own_state(self, layer: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(layer, _CondConv)
        scale = layer.settings["experts"] / 2
        own = {name: tensor for name, tensor in state.items() if name.startswith("routing_fn.")}
        own["experts"] = (state["weight"] * scale).view(layer.experts.shape)
        if "bias" in state:
            biases = state["bias"].double() * scale
            mean = mean_kernel(biases)
            own["bias"] = mean.to(state["bias"].dtype)
            own["expert_bias"] = (biases - mean)[:-1].to(state["bias"].dtype)
        return own

    def official_state(self, layer: nn.Module) -> dict[str, Tensor]:
        """The state under timm's names. Biases, which are stored by their mean and what they differ by, are rounded."""
        assert isinstance(layer, _CondConv)
        scale = layer.settings["experts"] / 2
        state = {f"routing_fn.{name}": tensor for name, tensor in layer.routing_fn.state_dict().items()}
        state["weight"] = layer.experts.detach().flatten(1) / scale
        if layer.bias is not None and layer.expert_bias is not None:
            state["bias"] = (layer.bias.detach() + full_deltas(layer.expert_bias.detach())) / scale
        return state

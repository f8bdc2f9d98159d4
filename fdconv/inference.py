"""Dynamic layers for inference only: what depends on no input is computed once."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cpu.kernels import reason_missing
from .layers import FrequencyDynamic
from .modulation import Factors, GlobalModulation, StarReLU, gate
from .precision import fft_dtype


@torch.no_grad()
def prepare(layer: FrequencyDynamic) -> None:
    """Prepare a layer for inference, in place; it computes the same to rounding, and can no longer train or be saved.

    The maps of the global branch become two: their norm is part of the first, and all heads are one. On CPUs the
    spectrum and its groups lie as the compiled kernels read them.
    """
    if isinstance(layer.KSM_Global, GlobalModulation):  # what takes its place is called alike, and has no parameters
        layer.KSM_Global = PreparedModulation(layer.KSM_Global)  # type: ignore[assignment]
    if layer.dft_weight.device.type == "cpu" and layer.dft_weight.dtype != torch.float64 and not reason_missing():
        layer.dft_weight = nn.Parameter(_across(layer.dft_weight), requires_grad=False)
        layer.frequency_group = _across(layer.frequency_group[None])[0]


def _across(values: Tensor) -> Tensor:
    """The same values, with the second axis last in memory."""
    return values.transpose(1, 2).contiguous().transpose(1, 2)


class PreparedModulation(nn.Module):
    """What a `GlobalModulation` in evaluation mode computes, in few steps: `(B, C_in)` pooled input to `Factors`.

    Raises:
        RuntimeError: it is asked to train, or to be saved.
    """

    squeeze: Tensor
    squeeze_bias: Tensor | None
    norm: Tensor | None
    heads: Tensor
    heads_bias: Tensor

    def __init__(self, branch: GlobalModulation) -> None:
        super().__init__()
        self.config = branch.config
        dtype = fft_dtype(branch.fc.weight.dtype)
        squeeze, squeeze_bias = branch.fc.weight.flatten(1).to(dtype), None
        self.eps = 0.0 if branch.norm is None else branch.norm.eps
        if isinstance(branch.bn, nn.modules.batchnorm._BatchNorm):
            assert branch.bn.running_mean is not None and branch.bn.running_var is not None
            factor = branch.bn.weight.to(dtype) * (branch.bn.running_var.to(dtype) + branch.bn.eps).rsqrt()
            squeeze_bias = branch.bn.bias.to(dtype) - branch.bn.running_mean.to(dtype) * factor
            squeeze = squeeze * factor[:, None]
        every = {
            "kernel": (branch.kernel_fc, self.config.kernel_temperature),
            "channel": (branch.channel_fc, self.config.temperature),
            "filter": (branch.filter_fc, self.config.temperature),
            "spatial": (branch.spatial_fc, self.config.temperature),
        }
        parts = {name: (head, heat) for name, (head, heat) in every.items() if head is not None}
        self.names = list(parts)
        self.sizes = [len(head.weight) for head, _ in parts.values()]
        heads = torch.cat([head.weight.flatten(1).to(dtype) / heat for head, heat in parts.values()])
        heads_bias = torch.cat([head.bias.to(dtype) / heat for head, heat in parts.values() if head.bias is not None])
        self.squared = isinstance(branch.relu, StarReLU)
        heads = heads * branch.speed
        if isinstance(branch.relu, StarReLU):
            heads_bias = heads_bias + heads.sum(1) * branch.relu.bias.to(dtype)
            heads = heads * branch.relu.scale.to(dtype)
        norm = None if branch.norm is None else branch.norm.weight.to(dtype)
        named = {
            "squeeze": squeeze,
            "squeeze_bias": squeeze_bias,
            "norm": norm,
            "heads": heads,
            "heads_bias": heads_bias,
        }
        for name, values in named.items():
            # `to` may have given the branch's own parameter back, which is no buffer.
            self.register_buffer(name, None if values is None else values.detach(), persistent=False)
        self.register_state_dict_pre_hook(_refuse_to_save)
        super().train(False)

    def neutral_at_zero(self) -> list[Tensor]:
        """What is all zero where the branch is neutral."""
        return [self.heads, self.heads_bias]

    def forward(self, context: Tensor) -> Factors:
        hidden = F.linear(context, self.squeeze, self.squeeze_bias)
        if self.norm is not None:
            hidden = F.rms_norm(hidden, hidden.shape[1:], self.norm, self.eps)
        hidden = F.relu(hidden)
        if self.squared:
            hidden = hidden * hidden
        logits = F.linear(hidden, self.heads, self.heads_bias)
        config = self.config
        if config.kernel_activation == config.global_activation:
            return Factors(
                **dict(zip(self.names, gate(logits, config.global_activation).split(self.sizes, 1), strict=True))
            )
        found = {}
        for name, own in zip(self.names, logits.split(self.sizes, 1), strict=True):
            activation = config.kernel_activation if name == "kernel" else config.global_activation
            found[name] = gate(own, activation)
        return Factors(**found)

    def train(self, mode: bool = True) -> PreparedModulation:
        if mode:
            _refuse("train")
        return super().train(mode)


def _refuse_to_save(*_: Any) -> None:
    _refuse("be saved")


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(f"this model was prepared for inference and cannot {what}: use the model that it was made of")

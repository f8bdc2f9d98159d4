"""Kernel spatial modulation (KSM): attention over the kernel, computed from the pooled input.

The global branch gives one factor per input channel, filter, kernel position and frequency group; the local branch one
factor per weight. All are neutral (the layer equals its static twin) while the heads are zero, where they start.
Parameters carry the official names and shapes. Source: FDConv (arXiv 2503.18783), section 3.3.

The layers here are deliberately no `nn.Linear` or `nn.Conv1d`: a model's `_init_weights` that walks all modules would
redraw those, and with them the neutral start. They compute in their input's precision, float32 or float64, whatever
that of their parameters: squares and sums leave float16's range, and `inf * 0` in a neutral head is NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import FDConfig

SLOW_HEADS = 16
"""Width of the bottleneck from which on its heads' inputs are scaled by its inverse: the more inputs a logit has, the
further a step of Adam moves it."""


class Factors(NamedTuple):
    """What modulates the weights of a batch; None where a layer has no such branch. All neutral at 1, or logit 0."""

    kernel: Tensor | None = None
    """`(B, r*n)`, of the frequency groups."""
    channel: Tensor | None = None
    """`(B, C_in)`."""
    filter: Tensor | None = None
    """`(B, C_out)`."""
    spatial: Tensor | None = None
    """`(B, k_h*k_w)`."""
    context: Tensor | None = None
    """`(B, C_in)`, the normalised input of the local branch."""
    taps: Tensor | None = None
    """`(C_out*k_h*k_w, taps)`, those of the local branch; of the layer, not of a sample."""

    @property
    def every_per_sample(self) -> tuple[Tensor | None, ...]:
        """Those with the sample as first axis, in the order of the fields."""
        return self.kernel, self.channel, self.filter, self.spatial, self.context  # a slice fails in older compilers

    @property
    def per_sample(self) -> tuple[Tensor, ...]:
        """Of these the ones that the branches of this layer have."""
        return tuple(factor for factor in self.every_per_sample if factor is not None)

    @property
    def batch(self) -> int:
        """Number of samples that they are for; 1 where they are for all."""
        return self.per_sample[0].shape[0] if self.per_sample else 1

    def of(self, samples: slice) -> Factors:
        """Those of some of the samples."""
        if samples == slice(0, self.batch):
            return self
        parts = (None if it is None else it[samples] for it in self.every_per_sample)
        kernel, channel, filter_, spatial, context = parts
        return Factors(kernel, channel, filter_, spatial, context, self.taps)


def gate(logits: Tensor, activation: str, temperature: float = 1.0) -> Tensor:
    """A factor that is 1 at logit 0: `2*sigmoid(z/T)`, `1 + tanh(z/T)`, or `n*softmax(z/T)` over the last axis."""
    if temperature != 1.0:
        logits = logits / temperature
    if activation == "sigmoid":
        return 2 * torch.sigmoid(logits)
    if activation == "tanh":
        return 1 + torch.tanh(logits)
    return logits.shape[-1] * torch.softmax(logits, dim=-1)


class ZeroInit(nn.Module):
    """A weight of the given shape and a bias, both zero at the start, applied by whoever owns them."""

    def __init__(self, *shape: int, bias: bool = True, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to zero, the neutral value."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)


class Squeeze(nn.Module):
    """The first map, shared by the heads: `C_in` to the attention width, drawn as the authors do (Kaiming, fan-out)."""

    def __init__(self, *shape: int, bias: bool = False, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew; the bias is zero."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class StarReLU(nn.Module):
    """`scale * relu(x)^2 + bias` with learnable scalars (MetaFormer baselines, arXiv 2210.13452)."""

    def __init__(self, *, device: torch.device | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to `relu(x)^2`."""
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) ** 2 + self.bias


class ContextBatchNorm(nn.BatchNorm1d):
    """BatchNorm of `(B, A)` or `(B, A, positions)`, in the input's precision, that trains on a single value too.

    One value of each channel has no variance, so the running statistics serve, and stay as they are.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if not (self.training and x.numel() > x.shape[1]):
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        self.num_batches_tracked.add_(1)
        # As nn.BatchNorm1d has it, None stands for the mean over all batches (torch.optim.swa_utils.update_bn sets it).
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        y = F.batch_norm(x, mean, var, weight, bias, True, momentum, self.eps)
        if self.running_mean.dtype != x.dtype:  # then a copy was updated
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
        return y


def normed(norm: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A norm of `(B, A)`, in the input's precision.

    Args:
        norm: `ContextBatchNorm`, `nn.RMSNorm`, `nn.LayerNorm`, or what `nn.SyncBatchNorm.convert_sync_batchnorm` put in
            the place of the first.
        x: float32 or float64.
        dtype: of the layer's parameters.
    """
    if isinstance(norm, nn.RMSNorm):
        weight = None if norm.weight is None else norm.weight.to(x.dtype)
        return F.rms_norm(x, x.shape[1:], weight, norm.eps)
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, x.shape[1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    if isinstance(norm, ContextBatchNorm):
        return norm(x)  # type: ignore[no-any-return]
    return norm(x.to(dtype)).to(x.dtype)  # type: ignore[no-any-return]  # which takes one dtype


def linear_of(layer: Squeeze | ZeroInit, x: Tensor) -> Tensor:
    """`F.linear` with a layer's weight, in the input's precision."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.flatten(1).to(x.dtype), bias)


class GlobalModulation(nn.Module):
    """KSM's global branch: `(B, C_in)` pooled input to the `Factors` of this branch.

    Args:
        in_channels: `C_in`.
        out_channels: `C_out`.
        positions: `k_h*k_w`; above 1 there is a spatial head.
        depthwise: a depthwise convolution has no filter head, for it would double the channel head.
        linear: `FDLinear`'s form: RMSNorm, ReLU, weights `(out, in)`; else BatchNorm, StarReLU, `(out, in, 1, 1)`.
        config: the operator's settings.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        positions: int,
        *,
        depthwise: bool,
        linear: bool,
        config: FDConfig,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        width = max(int(in_channels * config.reduction), config.min_attention_channels)
        self.speed = 1.0 if config.spectrum == "paper" else min(1.0, SLOW_HEADS / width)
        groups = config.kernel_num * config.param_ratio
        tail = () if linear else (1, 1)

        def head(out: int) -> ZeroInit:
            return ZeroInit(out, width, *tail, device=device, dtype=dtype)

        self.fc = Squeeze(width, in_channels, *tail, device=device, dtype=dtype)
        use_rms = config.norm == "rms" or (config.norm == "auto" and (linear or config.spectrum == "isometric"))
        self.norm = nn.RMSNorm(width, eps=1e-6, device=device, dtype=dtype) if use_rms else None
        self.bn: nn.Module | None = None if use_rms else ContextBatchNorm(width, device=device, dtype=dtype)
        self.relu = nn.ReLU() if linear else StarReLU(device=device, dtype=dtype)
        self.channel_fc = head(in_channels)
        self.filter_fc = None if depthwise else head(out_channels)
        self.spatial_fc = head(positions) if positions > 1 else None
        self.kernel_fc = head(groups) if groups > 1 else None

    def forward(self, context: Tensor) -> Factors:
        config = self.config
        hidden = linear_of(self.fc, context)
        if self.bn is not None:
            hidden = normed(self.bn, hidden, self.fc.weight.dtype)
        if self.norm is not None:
            hidden = normed(self.norm, hidden, self.fc.weight.dtype)
        hidden = self.relu(hidden)
        if self.speed != 1.0:
            hidden = hidden * self.speed

        def factor(head: ZeroInit | None) -> Tensor | None:
            return None if head is None else gate(linear_of(head, hidden), config.global_activation, config.temperature)

        kernel = None
        if self.kernel_fc is not None:
            kernel = gate(linear_of(self.kernel_fc, hidden), config.kernel_activation, config.kernel_temperature)
        return Factors(kernel, factor(self.channel_fc), factor(self.filter_fc), factor(self.spatial_fc))


class LocalModulation(nn.Module):
    """KSM's local branch: `(B, C_in)` pooled input to the normalised context that its taps slide along.

    Each filter position has a short one-dimensional filter of its own, its taps; what they see of the context gives a
    factor for every weight (see `fdconv.reference.local_gate`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        positions: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels, device=device, dtype=dtype)
        count = round(math.log2(in_channels) / 2 + 0.5) // 2 * 2 + 1
        self.conv = ZeroInit(out_channels * positions, 1, count, bias=False, device=device, dtype=dtype)

    @property
    def taps(self) -> Tensor:
        """What slides along the channels, `(C_out*k_h*k_w, taps)`."""
        return self.conv.weight.squeeze(1)

    def forward(self, context: Tensor) -> Tensor:
        weight, bias = self.norm.weight.to(context.dtype), self.norm.bias.to(context.dtype)
        return F.layer_norm(context, context.shape[1:], weight, bias, self.norm.eps)

"""FDConv2d and FDLinear: drop-in layers whose weight is a function of their input.

Each is its static twin (`nn.Conv2d`, `nn.Linear`) at the start and can become more: the spectrum of its weight is cut
into frequency groups that every sample mixes anew (FDW), the weight is modulated in space (KSM), and 3x3 convolutions
weigh the frequency bands of their input (FBM). Source: FDConv (arXiv 2503.18783).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .bands import BandModulation
from .config import FDConfig
from .modulation import GlobalModulation, LocalModulation
from .plain_calls import CalledAsConv2d, CalledAsLinear, geometry, to_build_on
from .precision import holds_no_values
from .reference import Convolution
from .state_dicts import LoadsStateDicts
from .strides import is_channels_last, memory_format

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PAPER = FDConfig()


class FrequencyDynamic(LoadsStateDicts):
    """What both layers share: a modulated spectrum in place of the weight, and a plain layer to stand for."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias as the static twin does, and make the modulation neutral."""
        spectra = self._spectra()
        weight = torch.empty(self._static_shape(), dtype=spectra.dtype, device=spectra.device)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.set_weight(weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, weight[0].numel()))
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_modulation()

    def _take_over(self, plain: nn.Conv2d | nn.Linear) -> None:
        """Stand for a plain layer: its weight, bias, `requires_grad` and mode. Called on a layer built on meta."""
        if not holds_no_values(plain.weight):
            self.to_empty(device=plain.weight.device)
        self.reset_modulation()
        self.set_weight(plain.weight)
        self.channels_last = is_channels_last(plain.weight)
        self.requires_grad_(plain.weight.requires_grad)
        if self.bias is not None and plain.bias is not None:
            with torch.no_grad():
                self.bias.copy_(plain.bias)
            self.bias.requires_grad_(plain.bias.requires_grad)
        self.train(plain.training)

    def _hand_over(self, plain: nn.Conv2d | nn.Linear) -> None:
        """Give a plain layer, built on meta, the neutral weight, bias, `requires_grad` and mode of this one."""
        plain.to_empty(device=self.dft_weight.device).to(memory_format=memory_format(self.channels_last))
        with torch.no_grad():
            plain.weight.copy_(self._neutral_weight())
            plain.weight.requires_grad_(self.dft_weight.requires_grad)
            if plain.bias is not None and self.bias is not None:
                plain.bias.copy_(self.bias)
                plain.bias.requires_grad_(self.bias.requires_grad)
        plain.train(self.training)

    def extra_repr(self) -> str:
        shared = "" if self.config.param_ratio == 1 else f", param_ratio={self.config.param_ratio}"
        return f"{super().extra_repr()}, kernel_num={self.config.kernel_num}{shared}"


class FDConv2d(FrequencyDynamic, CalledAsConv2d):  # type: ignore[misc, override]  # `weight` is no parameter here
    """Frequency dynamic convolution in place of `nn.Conv2d`: `(B, C_in, H, W)` or `(C_in, H, W)`, any float dtype.

    Args:
        in_channels: as the other positional arguments, what `nn.Conv2d` takes.
        config: settings of the operator; the paper's by default.

    Raises:
        ValueError: for arguments that `nn.Conv2d` refuses, or `config.band_groups` that do not divide `in_channels`.

    Examples:
        >>> import torch
        >>> from fdconv import FDConv2d
        >>> plain = torch.nn.Conv2d(8, 16, 3, padding=1)
        >>> layer = FDConv2d.from_conv(plain)
        >>> x = torch.randn(2, 8, 12, 12)
        >>> torch.allclose(layer(x), plain(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: FDConfig = PAPER,
    ) -> None:
        nn.Module.__init__(self)
        # A twin on meta checks the arguments and holds the geometry in nn.Conv2d's own form.
        self._take_geometry(
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode, "meta"
            )
        )
        self.config = config
        self._add_spectrum(bias, device, dtype)
        k_h, k_w = self.kernel_size
        shape: tuple[int, int, int] = (in_channels, out_channels, k_h * k_w)
        depthwise = groups == in_channels == out_channels
        place: Any = {"config": config, "device": device, "dtype": dtype}
        self.KSM_Global = (
            GlobalModulation(*shape, depthwise=depthwise, linear=False, **place) if config.ksm_global else None
        )
        self.KSM_Local = LocalModulation(*shape, device=place["device"], dtype=dtype) if config.ksm_local else None
        banded = k_h == k_w and k_h in config.fbm_kernel_sizes
        self.FBM = BandModulation(in_channels, **place) if banded else None
        self.reset_parameters()

    def _paper_scale(self) -> float:
        return max(1, min(self.in_channels, self.out_channels) // 2)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, config: FDConfig = PAPER) -> FDConv2d:
        """A layer that computes what `conv` does, with its device, dtype, mode and `requires_grad`."""
        layer = cls(**geometry(conv), device=to_build_on(conv.weight), dtype=conv.weight.dtype, config=config)
        layer._take_over(conv)
        return layer

    def to_conv(self) -> nn.Conv2d:
        """The plain convolution with this layer's neutral weight."""
        conv = self.static_class(**geometry(self), device="meta", dtype=self.dft_weight.dtype)
        self._hand_over(conv)
        return conv

    def _convolved(self, x: Tensor) -> Tensor:
        context = self._context(x)
        if self.FBM is not None:
            x = self.FBM(x)
        x, padding = self._padded(x)
        return self._apply_weights(context, x, Convolution(self.stride, padding, self.dilation, self.groups))


class FDLinear(FrequencyDynamic, CalledAsLinear):  # type: ignore[misc, override]
    """Frequency dynamic linear layer in place of `nn.Linear`: `(B, ..., C_in)` to `(B, ..., C_out)`, any float dtype.

    The first axis is the sample, the axes between are positions and share the sample's weight; `(C_in,)` is one sample.
    There is no local branch and no band modulation, as in the authors' linear layer.

    Args:
        in_features: as the other positional arguments, what `nn.Linear` takes.
        config: settings of the operator; the paper's by default.

    Examples:
        >>> import torch
        >>> from fdconv import FDConfig, FDLinear
        >>> layer = FDLinear(16, 32, config=FDConfig(kernel_num=8))
        >>> layer(torch.randn(2, 49, 16)).shape
        torch.Size([2, 49, 32])
        >>> layer.to_linear()
        Linear(in_features=16, out_features=32, bias=True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: FDConfig = PAPER,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self._add_spectrum(bias, device, dtype)
        place: Any = {"config": config, "device": device, "dtype": dtype}
        self.KSM_Global = (
            GlobalModulation(in_features, out_features, 1, depthwise=False, linear=True, **place)
            if config.ksm_global
            else None
        )
        self.KSM_Local = self.FBM = None
        self.reset_parameters()

    def _paper_scale(self) -> float:
        # alpha is m*r and the neutral attention 1, or 1/r where a softmax shares n among r*n groups.
        ratio = 1 if self.config.kernel_activation == "softmax" else self.config.param_ratio
        return max(1, min(self.in_features, self.out_features) // 2) * ratio

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: FDConfig = PAPER) -> FDLinear:
        """A layer that computes what `linear` does, with its device, dtype, mode and `requires_grad`."""
        weight = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=to_build_on(weight),
            dtype=weight.dtype,
            config=config,
        )
        layer._take_over(linear)
        return layer

    def to_linear(self) -> nn.Linear:
        """The plain linear layer with this layer's neutral weight."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.dft_weight.dtype
        )
        self._hand_over(linear)
        return linear

    def _multiplied(self, x: Tensor) -> Tensor:
        return self._apply_weights(self._context(x), x, None)

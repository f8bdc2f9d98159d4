"""FDConv2d and FDLinear: drop-in layers whose weight is a function of their input.

Each is its static twin (`nn.Conv2d`, `nn.Linear`) at the start and can become more: the spectrum of its weight is cut
into frequency groups that every sample mixes anew (FDW), the weight is modulated in space (KSM), and 3x3 convolutions
weigh the frequency bands of their input (FBM). Source: FDConv (arXiv 2503.18783).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.utils import _pair

from .bands import BandModulation
from .config import FDConfig
from .modulation import GlobalModulation, LocalModulation
from .precision import fft_dtype, holds_no_values
from .reference import Convolution
from .state_dicts import LoadsStateDicts
from .strides import as_conv_result, is_channels_last, memory_format

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


class FDConv2d(FrequencyDynamic, nn.Conv2d):  # type: ignore[misc, override]  # `weight` is no parameter here
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

    static_class: ClassVar[type[nn.Conv2d]] = nn.Conv2d
    """What `to_conv` makes."""

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
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode, "meta"
        )
        for name in (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(twin, name))
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

    def _static_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _paper_scale(self) -> float:
        return max(1, min(self.in_channels, self.out_channels) // 2)

    def _context(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), dtype=fft_dtype(x.dtype))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, config: FDConfig = PAPER) -> FDConv2d:
        """A layer that computes what `conv` does, with its device, dtype, mode and `requires_grad`."""
        layer = cls(**_geometry(conv), device=_to_build_on(conv.weight), dtype=conv.weight.dtype, config=config)
        layer._take_over(conv)
        return layer

    def to_conv(self) -> nn.Conv2d:
        """The plain convolution with this layer's neutral weight."""
        conv = self.static_class(**_geometry(self), device="meta", dtype=self.dft_weight.dtype)
        self._hand_over(conv)
        return conv

    def _pads(self) -> tuple[int, ...]:
        """Left, right, top and bottom."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return tuple(self._reversed_padding_repeated_twice)
        top, left = _pair(self.padding)  # asked at each call, as nn.Conv2d does: dilation is put in by some afterwards
        return left, left, top, top

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input with the padding that a convolution cannot do itself, and the one that it can."""
        left, right, top, bottom = self._pads()
        if self.padding_mode != "zeros":
            return nn.functional.pad(x, (left, right, top, bottom), mode=self.padding_mode), (0, 0)
        if (left, top) == (right, bottom):
            return x, (top, left)
        return nn.functional.pad(x, (left, right, top, bottom)), (0, 0)  # "same" with a kernel of even size

    def _check_input(self, x: Tensor) -> None:
        """Refuse what `nn.Conv2d` refuses, in its words: the modulation reads the input first, and would say others."""
        if x.dim() != 4:
            raise RuntimeError(
                f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(x.shape)}"
            )
        if not torch.jit.is_tracing() and x.shape[1] != self.in_channels:
            raise RuntimeError(
                f"Given groups={self.groups}, weight of size {list(self._static_shape())}, expected input"
                f"{list(x.shape)} to have {self.in_channels} channels, but got {x.shape[1]} channels instead"
            )

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return _called(self, input)
        if input.dim() == 3:  # not self.forward: a subclass that prepares its input has done so by now
            return FDConv2d.forward(self, input.unsqueeze(0)).squeeze(0)
        self._check_input(input)
        x, context = input, self._context(input)
        if self.FBM is not None:
            x = self.FBM(x)
        x, padding = self._padded(x)
        y = self._apply_weights(context, x, Convolution(self.stride, padding, self.dilation, self.groups))
        return as_conv_result(y, input, self.channels_last)


# Of torch's class, whose weight is not to be quantised, for torchao to pass this one over.
class FDLinear(FrequencyDynamic, nn.modules.linear.NonDynamicallyQuantizableLinear):  # type: ignore[misc, override]
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

    groups = 1

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

    def _static_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def _paper_scale(self) -> float:
        # alpha is m*r and the neutral attention 1, or 1/r where a softmax shares n among r*n groups.
        ratio = 1 if self.config.kernel_activation == "softmax" else self.config.param_ratio
        return max(1, min(self.in_features, self.out_features) // 2) * ratio

    def _context(self, x: Tensor) -> Tensor:
        positions = tuple(range(1, x.dim() - 1))
        return x.mean(positions, dtype=fft_dtype(x.dtype)) if positions else x.to(fft_dtype(x.dtype))

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: FDConfig = PAPER) -> FDLinear:
        """A layer that computes what `linear` does, with its device, dtype, mode and `requires_grad`."""
        weight = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=_to_build_on(weight),
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

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return _called(self, input)
        if input.dim() == 1:
            return FDLinear.forward(self, input.unsqueeze(0)).squeeze(0)
        return self._apply_weights(self._context(input), input, None)


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {**{name: getattr(conv, name) for name in names}, "bias": conv.bias is not None}


def _to_build_on(weight: Tensor) -> torch.device:
    """Where to build a layer that is to stand for this weight: on meta, for what is drawn there costs nothing."""
    return weight.device if holds_no_values(weight) else torch.device("meta")


def _called(layer: nn.Module, input: fx.Proxy) -> Any:
    """What `torch.fx` writes for a call of a layer of torch's own: the layer is a leaf of the graph, for any tracer."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})

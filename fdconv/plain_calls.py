"""Layers that are made and called as `nn.Conv2d` and `nn.Linear` are, whatever they compute."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.utils import _pair

from .precision import fft_dtype, holds_no_values
from .strides import as_conv_result


class CalledAsConv2d(nn.Conv2d):
    """A layer with the geometry of `nn.Conv2d`: `(B, C_in, H, W)` or `(C_in, H, W)`, any float dtype."""

    static_class: ClassVar[type[nn.Conv2d]] = nn.Conv2d
    """The plain layer that this one stands for."""
    channels_last: bool

    def _take_geometry(self, conv: nn.Conv2d) -> None:
        """Have the stride, padding, and so on of another one."""
        for name in (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(conv, name))

    def _static_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _context(self, x: Tensor) -> Tensor:
        """The mean over positions, `(B, C_in)`, float32 or float64."""
        return x.mean((2, 3), dtype=fft_dtype(x.dtype))

    def _convolved(self, x: Tensor) -> Tensor:
        """The result for a batch, whatever its memory format."""
        raise NotImplementedError

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
            return called(self, input)
        if input.dim() == 3:  # not self.forward: a subclass that prepares its input has done so by now
            return CalledAsConv2d.forward(self, input.unsqueeze(0)).squeeze(0)
        self._check_input(input)
        return as_conv_result(self._convolved(input), input, self.channels_last)


# Of torch's class, whose weight is not to be quantised, for torchao to pass this one over.
class CalledAsLinear(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """A layer with the shape of `nn.Linear`: `(B, ..., C_in)` to `(B, ..., C_out)`, any float dtype.

    The first axis is the sample, the axes between are positions; `(C_in,)` is one sample.
    """

    groups = 1

    def _static_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def _context(self, x: Tensor) -> Tensor:
        """The mean over positions, `(B, C_in)`, float32 or float64."""
        positions = tuple(range(1, x.dim() - 1))
        return x.mean(positions, dtype=fft_dtype(x.dtype)) if positions else x.to(fft_dtype(x.dtype))

    def _multiplied(self, x: Tensor) -> Tensor:
        """The result for a batch."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return called(self, input)
        if input.dim() == 1:
            return CalledAsLinear.forward(self, input.unsqueeze(0)).squeeze(0)
        return self._multiplied(input)


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments that make an `nn.Conv2d` of the same geometry."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {**{name: getattr(conv, name) for name in names}, "bias": conv.bias is not None}


def to_build_on(weight: Tensor) -> torch.device:
    """Where to build a layer that is to stand for this weight: on meta, for what is drawn there costs nothing."""
    return weight.device if holds_no_values(weight) else torch.device("meta")


def called(layer: nn.Module, input: fx.Proxy) -> Any:
    """What `torch.fx` writes for a call of a layer of torch's own: the layer is a leaf of the graph, for any tracer."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})

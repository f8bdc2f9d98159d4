"""What the layers of the operators share whose weight is mixed or scaled anew for each sample.

A layer stores what its weight is made from. A subclass says how it starts from a static weight (`_build`), what it
computes of each sample's mean (`_given`), and how a weight is made of that (`_make`); all else is here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv.onnx_fft import refuse_old_exporter
from fdconv.per_sample import convolve_made
from fdconv.plain_calls import CalledAsConv2d, CalledAsLinear, geometry
from fdconv.precision import without_autocast
from fdconv.reference import Convolution
from fdconv.strides import is_channels_last, memory_format
from fdconv.weight_property import WithStaticWeight

from ..discovery.effective import same_padding
from .same_padding import SameConv2d


class DynamicLayer(WithStaticWeight):
    """A layer that makes the weight of each sample.

    Args:
        plain: an `nn.Conv2d` or `nn.Linear` to stand for; perhaps on meta.
        settings: of the operator, complete.
        pads_same: True if the input is padded first, as TensorFlow does.
    """

    settings: dict[str, Any]
    bias: nn.Parameter | None
    pads_same: bool
    told_by: ClassVar[str | None] = None
    """The tensor by which a state dict tells such a layer from a plain one; None for the stored one."""

    def __init__(self, plain: Any, settings: dict[str, Any], pads_same: bool = False) -> None:
        nn.Module.__init__(self)
        self.settings = dict(settings)
        self.pads_same = pads_same
        self._take_shape(plain)
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach().clone())
        self.channels_last = is_channels_last(plain.weight)
        self._build(plain.weight.detach())
        self.requires_grad_(plain.weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(plain.bias.requires_grad)
        self.train(plain.training)

    # What a kind of layer says

    def _take_shape(self, plain: Any) -> None:
        """Have the channels and the geometry of a plain layer."""
        raise NotImplementedError

    def _in_channels(self) -> int:
        """`C_in`, of all groups together."""
        raise NotImplementedError

    def _build(self, weight: Tensor) -> None:
        """Make all parameters, and buffers, so that the layer computes what this static weight does.

        Args:
            weight: of the plain layer, which has its bias already; what is made is of its dtype and device.
        """
        raise NotImplementedError

    def _given(self, context: Tensor) -> list[Tensor]:
        """What the weights of a batch are made from: tensors `(B, ...)` in the dtype of `context`.

        Args:
            context: the mean over positions, `(B, C_in)`, float32 or float64.
        """
        raise NotImplementedError

    def _shared(self) -> list[Tensor]:
        """What the weights of all samples are made from."""
        return [self._stored()]

    def _make(self, given: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """The weights `(B, C_out, C_in/groups, k_h, k_w)`, in the dtype of `given`; those of a linear layer are 1x1."""
        raise NotImplementedError

    def _sample_bias(self, given: Sequence[Tensor]) -> Tensor | None:
        """What is added to the bias of each sample, `(B, C_out)`."""
        return None

    def _plain_on_meta(self, bias: bool) -> nn.Module:
        """A plain layer of this shape."""
        raise NotImplementedError

    # What follows

    def _kernel_shape(self) -> tuple[int, int, int, int]:
        """`(C_out, C_in/groups, k_h, k_w)`; a linear layer is a 1x1 convolution."""
        out_channels, in_channels, k_h, k_w = (*self._static_shape(), 1, 1)[:4]
        return out_channels, in_channels, k_h, k_w

    def _computed(self, context: Tensor, x: Tensor, conv: Convolution | None) -> Tensor:
        """The result for inputs that are padded as far as a convolution cannot do it."""
        refuse_old_exporter()
        with without_autocast(context.device):
            given = self._given(context)
            own = self._sample_bias(given)
        y = self._applied(given, x, conv)
        if self.bias is not None:
            own = self.bias[None] if own is None else own + self.bias.to(own.dtype)
        if own is None:
            return y
        positions = (1,) * (y.dim() - 2)  # behind the channels of a convolution, before those of a linear layer
        shape = (own.shape[0], *positions, own.shape[1]) if conv is None else (*own.shape, *positions)
        return y + own.to(y.dtype).view(shape)

    def _applied(self, given: Sequence[Tensor], x: Tensor, conv: Convolution | None) -> Tensor:
        """The result for inputs that are padded as far as a convolution cannot do it, without any bias."""
        return convolve_made(x, self._make, given, self._shared(), self._kernel_shape(), conv, self._stored().dtype)

    def sample_weights(self, x: Tensor) -> Tensor:
        """The weights that the samples of a batch are given, for those who want to look at them.

        Args:
            x: an input of the layer, with its batch axis.

        Returns:
            `(B, C_out, C_in/groups, k_h, k_w)`, float32 or float64.
        """
        context = self._context(x)  # type: ignore[operator]
        with without_autocast(context.device):
            return self._make(self._given(context), self._shared())

    def to_plain(self) -> nn.Module:
        """The plain layer with this layer's neutral weight."""
        stored = self._stored()
        plain = self._plain_on_meta(self.bias is not None)
        plain.to(dtype=stored.dtype).to_empty(device=stored.device).to(memory_format=memory_format(self.channels_last))
        assert isinstance(plain.weight, Tensor)
        with torch.no_grad():
            plain.weight.copy_(self._neutral_weight()).requires_grad_(stored.requires_grad)
            if self.bias is not None:
                assert isinstance(plain.bias, Tensor)
                plain.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        return plain.train(self.training)

    def _checked(self, weight: Tensor) -> Tensor:
        """A static weight that somebody gives, if it has the layer's shape; else `ValueError`."""
        if weight.shape != self._static_shape():
            raise ValueError(f"weight must have the shape {self._static_shape()}, not {tuple(weight.shape)}")
        return weight.detach()

    def _factors(self, scale: Tensor) -> Tensor:
        """The factors of `_multiply`, all known.

        Raises:
            ValueError: one is not, for its filter is zero.
        """
        unknown = scale.isnan()
        if unknown.any() and (scale == 1).any():  # part of a weight was written to, and the rest left as it was
            return scale.masked_fill(unknown, 1)
        if unknown.any():
            raise ValueError(
                f"filter {int(unknown.nonzero()[0])} of {type(self).__name__}{self._static_shape()} is zero at neutral "
                "modulation, so a weight that is multiplied filter by filter does not tell its factor"
            )
        return scale

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Take over a plain layer's state."""
        own = f"{prefix}{self.told_by or self.stored_name}"
        if f"{prefix}weight" in state_dict and own not in state_dict:
            error = self._expect_plain(state_dict, prefix)
            if error is not None:
                rest[-1].append(error)
                return
        elif f"{prefix}bias" in state_dict and own not in state_dict:
            warnings.warn(
                f"the state dict has the bias of the dynamic layer {prefix.rstrip('.') or type(self).__name__!r}, and "
                f"neither its {self.stored_name} nor a plain weight: the layer keeps the weight that it has",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def _expect_plain(self, state_dict: dict[str, Tensor], prefix: str) -> str | None:
        """Put what a fresh layer would have saved in the place of a plain weight; why not, if it cannot be."""
        weight = state_dict[f"{prefix}weight"]
        if (misfit := self._plain_misfit(weight, prefix)) is not None:
            return misfit
        self._tell_what_is_lost(prefix)
        for name, tensor in self._fresh_state(weight.detach()).items():
            state_dict[prefix + name] = tensor
        del state_dict[f"{prefix}weight"]
        return None

    def _fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        """What a fresh layer that stands for this weight would have saved, without its bias."""
        plain: Any = self._plain_on_meta(bias=False)
        plain.weight = nn.Parameter(weight)
        if self.bias is not None:
            plain.bias = nn.Parameter(weight.new_zeros(self._static_shape()[0]))
        with torch.random.fork_rng(devices=[]):
            fresh = self._again(plain)
        return {name: tensor for name, tensor in fresh.state_dict().items() if name != "bias"}

    def _again(self, plain: Any) -> DynamicLayer:
        """A fresh layer of this kind, for another plain one."""
        return type(self)(plain, self.settings, self.pads_same)

    def extra_repr(self) -> str:
        told = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        return f"{super().extra_repr()}, {told}" if told else super().extra_repr()


class DynamicConv2d(DynamicLayer, CalledAsConv2d):  # type: ignore[misc, override]  # `weight` is no parameter here
    """A dynamic layer in the place of `nn.Conv2d`: `(B, C_in, H, W)` or `(C_in, H, W)`, any float dtype."""

    def _take_shape(self, plain: nn.Conv2d) -> None:
        self._take_geometry(plain)

    def _in_channels(self) -> int:
        return self.in_channels

    def _convolved(self, x: Tensor) -> Tensor:
        context = self._context(x)
        x, padding = self._padded(x)
        return self._computed(context, x, Convolution(self.stride, padding, self.dilation, self.groups))

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        if self.pads_same:
            return F.pad(x, same_padding(x.shape[-2:], self)), (0, 0)
        return super()._padded(x)

    def _plain_on_meta(self, bias: bool) -> nn.Conv2d:
        kind = SameConv2d if self.pads_same else nn.Conv2d
        return kind(**{**geometry(self), "bias": bias}, device="meta")


class DynamicLinear(DynamicLayer, CalledAsLinear):  # type: ignore[misc, override]
    """A dynamic layer in the place of `nn.Linear`: `(B, ..., C_in)` to `(B, ..., C_out)`, any float dtype.

    The first axis is the sample, the axes between are positions and share the sample's weight.
    """

    def _take_shape(self, plain: nn.Linear) -> None:
        self.in_features, self.out_features = plain.in_features, plain.out_features

    def _in_channels(self) -> int:
        return self.in_features

    def _multiplied(self, x: Tensor) -> Tensor:
        return self._computed(self._context(x), x, None)

    def _plain_on_meta(self, bias: bool) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias, device="meta")

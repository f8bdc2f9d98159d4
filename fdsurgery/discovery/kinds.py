"""The kinds of layers that can be swapped, one row each. All else asks the table what differs between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Kind = Literal["conv", "linear"]
Shape = Sequence[int]


@dataclass(frozen=True)
class LayerKind:
    """What tells the layers of one kind from those of another.

    A layer's input is `(samples, channels, positions ...)` where positions have axes of their own, and
    `(samples, positions ..., channels)` where they have not.
    """

    name: Kind
    """What recipes and sites call it."""
    plain: type[nn.Module]
    """The layer of torch. Those of derived classes are of the kind, too."""
    axes: int
    """How many axes of positions follow the channels, along which the layer convolves; 0 if the channels are last."""
    in_and_out: tuple[str, str]
    """Attributes of a layer that hold its numbers of input and output channels."""
    geometry_names: tuple[str, ...] = ()
    """Attributes of a layer, and arguments of `plain`, that tell how it goes over positions."""

    @property
    def convolves(self) -> bool:
        """True if an output depends on several positions, or may."""
        return self.axes > 0

    @property
    def sample_axes(self) -> int:
        """How many axes an input has at least, without one for samples."""
        return 1 + self.axes

    # One layer

    def channels(self, layer: Any) -> tuple[int, int]:
        """Numbers of input and output channels, or features."""
        in_name, out_name = self.in_and_out
        return getattr(layer, in_name), getattr(layer, out_name)

    def geometry(self, layer: Any) -> dict[str, Any]:
        """Kernel size, stride, padding and so on, by the names of `plain`'s arguments; empty for products."""
        return {name: getattr(layer, name) for name in self.geometry_names}

    def weight_shape(self, layer: Any) -> tuple[int, ...]:
        """The shape that the layer's weight has by what the layer says of itself."""
        in_channels, out_channels = self.channels(layer)
        if not self.axes:
            return out_channels, in_channels
        return out_channels, in_channels // layer.groups, *layer.kernel_size

    def is_product(self, layer: Any) -> bool:
        """True if the layer multiplies each position with one matrix, and gives as many positions as it takes."""
        return not self.axes or (set(layer.kernel_size) == set(layer.stride) == {1} and layer.groups == 1)

    def is_depthwise(self, layer: Any) -> bool:
        """True if each channel has filters of its own."""
        return self.axes > 0 and layer.groups > 1 and layer.groups == layer.in_channels

    def make(self, in_channels: int, out_channels: int, *, bias: bool, **geometry: Any) -> Any:
        """A plain layer on the meta device. Raises `ValueError` for a geometry that torch does not take."""
        return self.plain(in_channels, out_channels, bias=bias, device="meta", **geometry)

    # Its inputs and outputs

    def position_axes(self, count: int) -> range:
        """The axes of positions in a tensor of `count` axes, samples first."""
        return range(count - self.axes, count) if self.axes else range(1, count - 1)

    def positions(self, shape: Shape) -> int:
        """Number of positions of one sample in an input or output of this shape."""
        return math.prod(shape[-self.axes :] if self.axes else shape[1:-1])

    def sees_one_position(self, shape: Shape, batch: int) -> bool:
        """True for an input of this shape with one position for each of `batch` samples, as after global pooling."""
        return math.prod(shape[-self.axes :]) == 1 if self.axes else math.prod(shape[:-1]) <= batch

    def along_outputs(self, vector: Tensor) -> Tensor:
        """A number for each output channel, `(C_out,)`, in a shape that is broadcast over outputs."""
        return vector.view(-1, *[1] * self.axes)


CONV = LayerKind(
    "conv",
    nn.Conv2d,
    2,
    ("in_channels", "out_channels"),
    ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
)
LINEAR = LayerKind("linear", nn.Linear, 0, ("in_features", "out_features"))

KINDS: tuple[LayerKind, ...] = (CONV, LINEAR)


def kind_of(layer: nn.Module | None) -> LayerKind | None:
    """The kind of a layer; None for any other module."""
    return next((kind for kind in KINDS if isinstance(layer, kind.plain)), None)


def known_kind(layer: nn.Module | None) -> LayerKind:
    """As `kind_of`, of what is known to be a layer."""
    kind = kind_of(layer)
    assert kind is not None, f"a {type(layer).__name__} is no layer that can be swapped"
    return kind


def kind_named(name: Kind) -> LayerKind:
    """The kind that sites and recipes call so."""
    return next(kind for kind in KINDS if kind.name == name)


def convolves(layer: nn.Module | None) -> bool:
    """True for a layer that can be swapped and convolves; False also for what is none."""
    kind = kind_of(layer)
    return kind is not None and kind.convolves

"""What a model offers: one `Site` for every layer that could be swapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .kinds import Kind, kind_named

Layout = Literal["NCHW", "NHWC", "tokens", "rows"]
Role = Literal[
    "stem",  # a convolution that reads the image
    "shortcut",  # the lone convolution on the short side of a residual add
    "head",  # the layer that writes the model's output: no learned layer, norm or activation follows
    "depthwise",  # a convolution with groups == in_channels
    "pointwise",  # any other 1x1 convolution
    "spatial",  # any other convolution
    "expand",  # first layer of an FFN
    "gate",  # second first-layer of a gated FFN (GLU, SwiGLU)
    "project",  # last layer of an FFN
    "linear",  # a linear layer outside every FFN: attention projections, embeddings, ...
]
FFN_ROLES: tuple[Role, ...] = ("expand", "gate", "project")
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Site:
    """A layer that could be swapped, and what one forward of the model showed about it.

    `name` is the fully qualified name as `model.named_modules()` gives it first; `aliases` are the other names
    of the same module object. For a linear layer `kernel_size`, `stride` and `dilation` are `(1, 1)`, `groups` 1,
    and channels are features. `input_shape` is the shape of the first call's input, batch first.

    Examples:
        >>> import timm, fdsurgery
        >>> site = fdsurgery.sites(timm.create_model("test_resnet"))[3]
        >>> site.name, site.role, site.kernel_size, site.input_shape
        ('layer1.0.conv1', 'spatial', (3, 3), (2, 32, 40, 40))
    """

    name: str
    kind: Kind
    role: Role
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding: tuple[int, int] | str = (0, 0)
    padding_mode: str = "zeros"
    pads_same: bool = False
    """True if the layer pads its input by its size first, as TensorFlow does."""
    aliases: tuple[str, ...] = ()
    layer_class: str = ""
    """Class name of the layer itself, e.g. `Conv2d`."""
    parent_class: str = ""
    """Class name of the module that holds it, e.g. `Bottleneck`."""
    ffn: str | None = None
    """Name shared by the layers of one FFN (the fqn of its project layer), or None outside an FFN."""
    layout: Layout | None = None
    """How the input is laid out; None when the layer was never called."""
    input_shape: tuple[int, ...] | None = None
    calls: int = 0
    """Number of times one forward of the model calls the layer."""
    multiply_adds: int = 0
    """Multiply-adds of the plain layer for one sample, over all its calls."""
    obstacle: str | None = None
    """Why no operator can take this layer's place, whatever the recipe says; None if nothing stands in the way."""
    caution: str | None = None
    """Why a dynamic layer here would change what the model means, though not at once what it computes; None if nothing
    is known. Such a layer is kept unless the rule that asks for it says `anyway`."""

    @property
    def convolves(self) -> bool:
        """True for convolutions, which have a kernel, a stride and groups."""
        return kind_named(self.kind).convolves

    @property
    def in_ffn(self) -> bool:
        """True for the expand, gate and project layers of an FFN, be they linears or 1x1 convolutions."""
        return self.role in FFN_ROLES

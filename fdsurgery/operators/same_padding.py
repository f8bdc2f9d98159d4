"""Convolutions that pad as TensorFlow does: by the size of the input, an odd zero at the right and the bottom."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fdconv import FDConv2d

from ..discovery.effective import same_padding


class SameConv2d(nn.Conv2d):
    """A plain convolution that pads its input first; `padding` itself is 0."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, same_padding(input.shape[-2:], self)))


class SameFDConv2d(FDConv2d):
    """`FDConv2d` that pads its input first; `padding` itself is 0."""

    static_class = SameConv2d

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, same_padding(input.shape[-2:], self)))

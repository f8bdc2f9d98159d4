"""The operator's mathematics as pure functions, in differentiable operations of torch for whole batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .modulation import Factors, gate
from .onnx_fft import padded, planes, real_image, writes_onnx
from .spectrum import column_factors, edge_columns, image_to_weight
from .strides import contiguous, is_channels_last


class WeightShape(NamedTuple):
    """What is fixed about the weight of a layer."""

    out_channels: int
    in_channels: int
    """Input channels of one group of the convolution."""
    kernel_size: tuple[int, int]
    groups: int
    scale: float
    """Factor of the spectra at which the neutral weight comes out."""
    edge: float
    """Another one, of their edge columns: see `fdconv.spectrum`."""
    activation: str
    """Gate of the local branch."""

    @property
    def width(self) -> int:
        """`D2`; the half spectrum alone does not tell an odd width from an even one."""
        return self.in_channels * self.kernel_size[1]

    @property
    def numel(self) -> int:
        """Number of weights of one sample."""
        return self.out_channels * self.in_channels * math.prod(self.kernel_size)


class Convolution(NamedTuple):
    """How `conv2d` uses a weight."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def sample_weights(spectra: Tensor, frequency_group: Tensor, factors: Factors, shape: WeightShape) -> Tensor:
    """The weight of every sample: its spectrum scaled group by group, transformed back and modulated in space.

    Args:
        spectra: `(r, D1, D2h, 2)`, float32 or float64.
        frequency_group: `(D1, D2h)`, group of every coefficient.
        factors: of the modulation, in the dtype of the spectra.
        shape: of the weight.

    Returns:
        `(B, C_out, C_in/groups, k_h, k_w)`, with `B = 1` where nothing depends on the sample.
    """
    if writes_onnx():
        image = real_image(_scaled_planes(spectra, frequency_group, factors.kernel, shape), shape.width)
    else:
        scaled = _scaled_spectra(spectra, frequency_group, factors.kernel, shape)
        if not torch.jit.is_tracing() and scaled.shape[0] == 0:  # of which torch takes no transform
            return spectra.new_zeros(0, shape.out_channels, shape.in_channels, *shape.kernel_size)
        image = torch.fft.irfft2(scaled, s=_size(shape))
    # Input channels last: there the factors broadcast along contiguous memory, and a 3x3 kernel's three columns do not.
    weight = image_to_weight(image, shape.kernel_size).movedim(2, -1).contiguous()
    if factors.context is not None:
        weight = weight * local_gate(factors, shape)
    for factor in global_factors(factors, shape):
        weight = weight * factor
    return weight.movedim(-1, 2).contiguous()


def _size(shape: WeightShape) -> tuple[int, int]:
    return shape.out_channels * shape.kernel_size[0], shape.width


def _scaled_spectra(spectra: Tensor, frequency_group: Tensor, kernel: Tensor | None, shape: WeightShape) -> Tensor:
    """The spectra scaled group by group and summed over `r`: `(B, D1, D2h)`, complex."""
    if kernel is None:
        factors = column_factors(shape.width, shape.scale, shape.edge, spectra)
        return torch.view_as_complex(spectra.sum(0, keepdim=True) * factors)
    kernel, entries = edge_entries(kernel.unflatten(1, (spectra.shape[0], -1)) * shape.scale, frequency_group, shape)
    # One entry for the real and one for the imaginary part: a factor broadcast over a last axis of two is slow.
    index = entries.flatten().repeat_interleave(2)
    scaled = spectra * kernel.index_select(2, index).view(*kernel.shape[:2], *spectra.shape[1:])
    return torch.view_as_complex(scaled[:, 0] if spectra.shape[0] == 1 else scaled.sum(1))


def edge_entries(tables: Tensor, frequency_group: Tensor, shape: WeightShape) -> tuple[Tensor, Tensor]:
    """Tables of factors by group, `(..., n)` to `(..., 2*n)` with those of the edge columns behind, and where to look.

    So edges cost no pass over the spectra, which are looked up in any case.

    Returns:
        The tables, and the entry of every coefficient, `(D1, D2h)`, int32: to be taken by `index_select`, which takes
        no uint8 (and indexing would read uint8 as a mask).
    """
    if shape.edge == 1:
        return tables, frequency_group.int()
    behind = edge_columns(shape.width, frequency_group.device).int() * tables.shape[-1]
    return torch.cat([tables, tables * shape.edge], -1), frequency_group + behind  # of which int32 is the wider type


def _scaled_planes(spectra: Tensor, frequency_group: Tensor, kernel: Tensor | None, shape: WeightShape) -> Tensor:
    """As `_scaled_spectra`, but laid out for `real_image`; what depends on no sample is a constant of the graph."""
    laid_out = planes(spectra * column_factors(shape.width, shape.scale, shape.edge, spectra), shape.width)
    if kernel is None:
        return laid_out.sum(0, keepdim=True)
    index = padded(frequency_group.int(), shape.width)
    gain = kernel.unflatten(1, (len(spectra), 1, -1)).index_select(3, index.flatten())
    return (laid_out * gain.unflatten(3, index.shape)).sum(1)


def channel_windows(factors: Factors, shape: WeightShape) -> Tensor:
    """What the taps see of the context: `(B, groups, taps, C_in/groups)`."""
    assert factors.context is not None and factors.taps is not None
    count = factors.taps.shape[1]
    windows = F.pad(factors.context, (count // 2, count // 2)).unfold(1, count, 1)
    return windows.unflatten(1, (shape.groups, -1)).transpose(-1, -2)


def local_gate(factors: Factors, shape: WeightShape) -> Tensor:
    """The factors of the local branch, `(B, C_out, k_h, k_w, C_in/groups)`: taps slide along the channels.

    An output channel of a grouped convolution sees the channels of its group only.
    """
    assert factors.taps is not None
    logits = factors.taps.unflatten(0, (shape.groups, -1)) @ channel_windows(factors, shape)
    return gate(logits, shape.activation).view(-1, shape.out_channels, *shape.kernel_size, shape.in_channels)


def global_factors(factors: Factors, shape: WeightShape) -> list[Tensor]:
    """The factors of the global branch, but for that of the frequency groups, multiplied as far as they stay small.

    Returns:
        Up to two tensors that broadcast to `(B, C_out, k_h, k_w, C_in/groups)`: filter times spatial, and channel.
    """
    found = []
    if factors.filter is not None:
        found.append(factors.filter[:, :, None, None, None])
    if factors.spatial is not None:
        spatial = factors.spatial.view(-1, 1, *shape.kernel_size, 1)
        found = [found[0] * spatial if found else spatial]
    if factors.channel is not None:
        channel = factors.channel.view(-1, shape.groups, 1, 1, 1, shape.in_channels)
        if shape.groups > 1:
            channel = channel.expand(-1, -1, shape.out_channels // shape.groups, -1, -1, -1)
        found.append(channel.flatten(1, 2))
    return found


def output_size(
    padded: Iterable[int], kernel_size: Iterable[int], stride: Iterable[int], dilation: Iterable[int]
) -> tuple[int, ...]:
    """Positions of a convolution along each axis of an input that is padded."""
    geometry = zip(padded, kernel_size, stride, dilation, strict=True)
    return tuple((size - (kernel - 1) * apart - 1) // step + 1 for size, kernel, step, apart in geometry)


def convolved_size(size: Iterable[int], kernel_size: Iterable[int], conv: Convolution) -> tuple[int, ...]:
    """Positions of a convolution along each axis of an input that it pads itself."""
    padded = (length + 2 * padding for length, padding in zip(size, conv.padding, strict=True))
    return output_size(padded, kernel_size, conv.stride, conv.dilation)


def per_sample(x: Tensor, weight: Tensor, conv: Convolution | None) -> Tensor:
    """Convolve with a weight for every sample, or without a `Convolution` multiply: see the two functions below."""
    if conv is None:
        return linear_per_sample(x, weight[..., 0, 0])
    return conv2d_per_sample(x, weight, *conv)


def differentiable_gradients(
    grad: Tensor,
    x: Tensor,
    spectra: Tensor,
    frequency_group: Tensor,
    factors: Factors,
    shape: WeightShape,
    conv: Convolution | None,
    wanted: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients to those of the inputs that are wanted, from that to the result, to be differentiated once more.

    The backward passes of the faster paths call it where somebody asks for second derivatives, which they do not have.
    """
    with torch.enable_grad():
        y = per_sample(x, sample_weights(spectra, frequency_group, factors, shape).to(x.dtype), conv)
    return list(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()))


def per_sample_backward(grad: Tensor, x: Tensor, weight: Tensor, conv: Convolution | None) -> tuple[Tensor, Tensor]:
    """Gradients of `per_sample` to its input and to its weight, from that to its result."""
    if conv is None:
        rows, weight = x.reshape(len(x), -1, x.shape[-1]), weight[..., 0, 0]
        grad = grad.reshape(len(x), -1, grad.shape[-1])
        return (grad @ weight).view(x.shape), (grad.transpose(1, 2) @ rows)[..., None, None]
    batch, kernel = x.shape[0], tuple(weight.shape[3:])
    if kernel == (1, 1) and conv.groups == 1 and tuple(conv.stride) == (1, 1) and tuple(conv.padding) == (0, 0):
        rows, weight, columns = grad.flatten(2), weight[..., 0, 0], x.flatten(2)
        return (weight.transpose(1, 2) @ rows).view(x.shape), (rows @ columns.transpose(1, 2))[..., None, None]
    to_x, to_weight, _ = torch.ops.aten.convolution_backward(
        grad.reshape(1, -1, *grad.shape[2:]),
        x.reshape(1, -1, *x.shape[2:]),
        weight.flatten(0, 1),
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups * batch,
        [True, True, False],
    )
    return to_x.view(x.shape), to_weight.view(weight.shape)


def conv2d_per_sample(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """`F.conv2d` with a weight for every sample, without bias.

    Args:
        x: `(B, C_in, H, W)`.
        weight: `(B, C_out, C_in/groups, k_h, k_w)`, or `(1, ...)` to share one weight.
        stride: as the other arguments, what `F.conv2d` takes.

    Returns:
        `(B, C_out, H', W')`.
    """
    batch = x.shape[0]  # not len(x), which torch.export takes for a constant
    if _shared(weight):
        return F.conv2d(x, weight[0], None, stride, padding, dilation, groups)
    out_channels, _, k_h, k_w = weight.shape[1:]
    if (k_h, k_w) == (1, 1) and padding == (0, 0):
        x = x[:, :, :: stride[0], :: stride[1]]
        size = x.shape[-2:]
        by_group = weight.reshape(weight.shape[0], groups, out_channels // groups, -1)
        if groups == 1 and is_channels_last(x):  # then so is the result, and nothing need be moved
            pixels = x.permute(0, 2, 3, 1).reshape(batch, size[0] * size[1], -1)
            y = pixels @ by_group[:, 0].transpose(1, 2)
            return y.view(batch, *size, out_channels).permute(0, 3, 1, 2)
        y = by_group @ contiguous(x).view(batch, groups, -1, size[0] * size[1])
        return y.reshape(batch, out_channels, *size)
    if open_batch(batch):
        return _conv2d_by_products(x, weight, stride, padding, dilation, groups)
    rows = contiguous(x).view(1, -1, *x.shape[-2:])
    y = F.conv2d(rows, weight.flatten(0, 1), None, stride, padding, dilation, groups * batch)
    return y.view(batch, out_channels, *y.shape[-2:])


def open_batch(batch: Any) -> bool:
    """True where what is traced must hold for other numbers of samples than the one at hand.

    A convolution in groups would fix it. `torch.jit.trace` runs on real tensors, at one number of samples; ONNX keeps
    the number of groups in the file.
    """
    return torch.jit.is_tracing() or (writes_onnx() and not isinstance(batch, int))


def _shared(weight: Tensor) -> bool:
    """True for a weight that all samples share; one that is traced for a single sample may be another's of many."""
    return not torch.jit.is_tracing() and weight.shape[0] == 1


def _conv2d_by_products(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """`conv2d_per_sample` for ONNX, where a file says how many groups a convolution has, and so how many samples."""
    k_h, k_w = weight.shape[3:]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    rows, columns = output_size(x.shape[2:], (k_h, k_w), stride, dilation)
    height, width = (rows - 1) * stride[0] + 1, (columns - 1) * stride[1] + 1
    lines = [x[:, :, top : top + height : stride[0]] for top in range(0, k_h * dilation[0], dilation[0])]
    lefts = range(0, k_w * dilation[1], dilation[1])
    seen = torch.stack([line[..., left : left + width : stride[1]] for line in lines for left in lefts], 1)
    windows = seen.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3).flatten(3)
    kernels = weight.unflatten(1, (groups, -1)).permute(0, 1, 2, 4, 5, 3).flatten(3)
    return (kernels @ windows).flatten(1, 2).unflatten(2, (rows, columns))


def linear_per_sample(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` with a weight for every sample, without bias.

    Args:
        x: `(B, ..., C_in)`.
        weight: `(B, C_out, C_in)`, or `(1, C_out, C_in)` to share one weight.

    Returns:
        `(B, ..., C_out)`.
    """
    if _shared(weight):
        return F.linear(x, weight[0])
    # All positions on one axis, of length 1 for `(B, C_in)`.
    y = contiguous(x).unsqueeze(1).flatten(1, -2) @ weight.transpose(1, 2)
    return y.reshape(*x.shape[:-1], weight.shape[1])

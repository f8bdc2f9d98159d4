"""The textbook FDConv: every formula of the paper as one line of torch, for whole batches. What ours is compared with.

It is not made slow on purpose: no Python loops, no work done twice. It gives the outputs of our layers, whose
parameters it reads.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv import FDConv2d, FDLinear
from fdconv.bands import BandModulation


def make_plain_(model: nn.Module) -> nn.Module:
    """Let every dynamic layer of a model compute by the textbook. Changes the model in place and returns it."""
    for layer in model.modules():
        if isinstance(layer, FDConv2d):
            layer.forward = MethodType(_conv2d, layer)  # type: ignore[method-assign]
        elif isinstance(layer, FDLinear):
            layer.forward = MethodType(_linear, layer)  # type: ignore[method-assign]
    return model


def _conv2d(layer: FDConv2d, x: Tensor) -> Tensor:
    batch, (k_h, k_w), groups = x.shape[0], layer.kernel_size, layer.groups
    weight = _weight(layer, x.mean((2, 3)))
    if layer.FBM is not None:
        x = band_modulated(layer.FBM, x)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), (0, 0)
    y = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        weight.reshape(-1, layer.in_channels // groups, k_h, k_w),
        None,
        layer.stride,
        padding,
        layer.dilation,
        batch * groups,
    )
    y = y.view(batch, layer.out_channels, *y.shape[2:])
    return y if layer.bias is None else y + layer.bias.view(1, -1, 1, 1)


def _linear(layer: FDLinear, x: Tensor) -> Tensor:
    weight = _weight(layer, x.flatten(1, -2).mean(1) if x.dim() > 2 else x)[..., 0, 0]
    y = torch.einsum("b...i,boi->b...o", x, weight)
    return y if layer.bias is None else y + layer.bias


def _weight(layer: FDConv2d | FDLinear, context: Tensor) -> Tensor:
    out_channels, in_channels, k_h, k_w = layer._kernel_shape()
    factors = layer._factors(context)
    assert factors.kernel is not None and factors.channel is not None
    ratio = layer.config.param_ratio
    gain = factors.kernel.view(len(context), ratio, -1)[:, :, layer.frequency_group.long()]
    spectrum = (torch.view_as_complex(layer.dft_weight) * gain).sum(1)
    stored, edge = layer._scale()
    columns = torch.tensor([edge if 2 * v in (0, in_channels * k_w) else 1.0 for v in range(spectrum.shape[-1])])
    spectrum = spectrum * (stored * columns).to(spectrum)
    image = torch.fft.irfft2(spectrum, s=(out_channels * k_h, in_channels * k_w))
    weight = image.view(-1, out_channels, k_h, in_channels, k_w).permute(0, 1, 3, 2, 4)
    if factors.context is not None and factors.taps is not None:
        logits = F.conv1d(factors.context.unsqueeze(1), factors.taps.unsqueeze(1), padding=factors.taps.shape[1] // 2)
        gate = 2 * torch.sigmoid(logits) if layer.config.local_activation == "sigmoid" else 1 + torch.tanh(logits)
        gate = gate.view(len(context), layer.groups, -1, k_h, k_w, layer.groups, in_channels)
        gate = gate.diagonal(dim1=1, dim2=5).movedim(-1, 1).flatten(1, 2)
        weight = weight * gate.permute(0, 1, 4, 2, 3)
    channel = factors.channel.view(-1, layer.groups, 1, in_channels).expand(-1, -1, out_channels // layer.groups, -1)
    weight = weight * channel.flatten(1, 2)[..., None, None]
    if factors.filter is not None:
        weight = weight * factors.filter[:, :, None, None, None]
    if factors.spatial is not None:
        weight = weight * factors.spatial.view(-1, 1, 1, k_h, k_w)
    return weight


def band_modulated(fbm: BandModulation, x: Tensor) -> Tensor:
    """Band modulation by Fourier transforms, a map at a time."""
    spectrum = torch.fft.rfft2(x)
    height, width = x.shape[2:]
    row = torch.fft.fftfreq(height, 1 / height, device=x.device).abs().round()
    column = torch.fft.rfftfreq(width, 1 / width, device=x.device).round()
    y, above = torch.zeros_like(x), x
    for band, conv in zip(fbm.config.bands, fbm.freq_weight_conv_list, strict=False):
        mask = (row <= height // (2 * band))[:, None] & (column <= width // (2 * band))
        below = torch.fft.irfft2(spectrum * mask, s=(height, width))
        groups = fbm.config.band_groups
        maps = 2 * torch.sigmoid(F.conv2d(x, conv.weight, conv.bias, padding=1, groups=groups))  # type: ignore[union-attr, arg-type]
        y = y + (maps.unsqueeze(2) * (above - below).unflatten(1, (groups, -1))).flatten(1, 2)
        above = below
    return y + above

"""The operator's mathematics as pure functions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .modulation import Attention
from .spectrum import image_to_weight, spectra_to_image


def dynamic_weight(
    spectra: Tensor,
    frequency_group: Tensor,
    attention: Attention | None,
    local: Tensor | None,
    *,
    scale: float,
    width: int,
    kernel_size: tuple[int, int],
    groups: int,
) -> Tensor:
    """The weight of every sample: its spectrum scaled group by group, transformed back and modulated in space.

    Args:
        spectra: `(r, D1, D2h, 2)`, float32 or float64.
        frequency_group: `(D1, D2h)`, group of every coefficient.
        attention: factors of the global branch, or None without one.
        local: factors of the local branch, `(B, C_out, k_h*k_w, C_in/groups)`, or None without one.
        scale: factor of the spectra at which the neutral weight comes out.
        width: `D2`.
        kernel_size: `(k_h, k_w)`.
        groups: groups of the convolution.

    Returns:
        `(B, C_out, C_in/groups, k_h, k_w)`, with `B = 1` where nothing depends on the sample.
    """
    channel, filter_, spatial, kernel = attention or (None,) * 4
    gain: Tensor | float = scale
    if kernel is not None:
        kernel = kernel.unflatten(1, (len(spectra), -1)) * scale
        # index_select takes no uint8, and `kernel[..., frequency_group]` would read uint8 as a mask.
        # One entry for the real and one for the imaginary part: a factor broadcast over a last axis of two is slow.
        index = frequency_group.flatten().int().repeat_interleave(2)
        gain = kernel.index_select(2, index).view(*kernel.shape[:2], *spectra.shape[1:])
    weight = image_to_weight(spectra_to_image(spectra, gain, width), kernel_size)
    # Input channels last: there the factors broadcast along contiguous memory, and a 3x3 kernel's three columns do not.
    weight = weight.movedim(2, -1).contiguous()
    _, out_channels, k_h, k_w, in_channels = weight.shape
    if local is not None:
        weight = weight * local.unflatten(2, (k_h, k_w))
    if channel is not None:
        factor = channel.view(-1, groups, 1, 1, 1, in_channels)
        if spatial is not None:
            factor = factor * spatial.view(-1, 1, 1, k_h, k_w, 1)
        weight = (weight.unflatten(1, (groups, -1)) * factor).flatten(1, 2)
    if filter_ is not None:
        weight = weight * filter_.view(-1, out_channels, 1, 1, 1)
    return weight.movedim(-1, 2).contiguous()


def conv2d_per_sample(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """`F.conv2d` with a weight for every sample.

    Args:
        x: `(B, C_in, H, W)`.
        weight: `(B, C_out, C_in/groups, k_h, k_w)`, or `(1, ...)` to share one weight.
        bias: `(C_out,)` or None; the other arguments as in `F.conv2d`.

    Returns:
        `(B, C_out, H', W')`.
    """
    batch = x.shape[0]  # not len(x), which torch.export takes for a constant
    if batch == 0 or weight.shape[0] == 1:
        # The sum is the one weight, or for no sample a zero weight through which gradients flow.
        return F.conv2d(x, weight.sum(0), bias, stride, padding, dilation, groups)
    out_channels, _, k_h, k_w = weight.shape[1:]
    if (k_h, k_w) == (1, 1) and padding in ((0, 0), "valid", "same"):
        x = x[:, :, :: stride[0], :: stride[1]]
        columns = x.reshape(batch, groups, -1, x.shape[-2] * x.shape[-1])
        y = weight.reshape(batch, groups, out_channels // groups, -1) @ columns
        y = y.reshape(batch, out_channels, *x.shape[-2:])
    else:
        y = F.conv2d(
            x.reshape(1, -1, *x.shape[-2:]), weight.flatten(0, 1), None, stride, padding, dilation, groups * batch
        )
        y = y.view(batch, out_channels, *y.shape[-2:])
    return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)


def linear_per_sample(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with a weight for every sample.

    Args:
        x: `(B, ..., C_in)`.
        weight: `(B, C_out, C_in)`, or `(1, C_out, C_in)` to share one weight.
        bias: `(C_out,)` or None.

    Returns:
        `(B, ..., C_out)`.
    """
    if weight.shape[0] == 1:
        return F.linear(x, weight[0], bias)
    # All positions on one axis, of length 1 for `(B, C_in)`; a reshape with -1 fails on an empty batch.
    y = x.unsqueeze(1).flatten(1, -2) @ weight.transpose(1, 2)
    y = y.reshape(*x.shape[:-1], weight.shape[1])
    return y if bias is None else y + bias.to(y.dtype)

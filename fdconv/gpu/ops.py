"""The steps of the operator on GPUs as custom operators of torch, in the namespace `fdconv`.

So `torch.compile` traces through them and exported graphs name them. The kernels behind them are imported when the
first is called: importing Triton takes longer than all else here, and most processes never launch a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import Convolution, convolved_size, per_sample_backward


def scale_spectrum(
    spectra: Tensor, frequency_group: Tensor, kernel: Tensor, scale: float, edge: float, width: int
) -> Tensor:
    """Scale every sample's spectra group by group and sum them: the spectra of the weight images.

    Args:
        spectra: `(r, D1, D2h, 2)`, float32.
        frequency_group: `(D1, D2h)`, uint8 or int32, below `n`.
        kernel: `(B, r*n)`, float32, the factors of the groups.
        scale: factor of everything.
        edge: another one, of the edge columns: see `fdconv.spectrum`.
        width: `D2`.

    Returns:
        `(B, D1, D2h, 2)`, float32: the sum over `i` of `spectra[i] * kernel[b, i*n + group] * scale`, times `edge`.
    """
    return torch.ops.fdconv.scale_spectrum(spectra, frequency_group, kernel, scale, edge, width)


def modulate(
    image: Tensor,
    context: Tensor | None,
    taps: Tensor | None,
    channel: Tensor | None,
    filter_: Tensor | None,
    spatial: Tensor | None,
    *,
    kernel_size: tuple[int, int],
    groups: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Make weight images into weights: modulated, in the convolution's layout and dtype, in one pass.

    Args:
        image: `(B, D1, D2)`, float32, `D1 = C_out*k_h`, `D2 = C_in/groups*k_w`.
        context: `(B, C_in)`, the normalised pooled input, or None without local branch.
        taps: `(C_out*k_h*k_w, taps)`, those of the local branch, or None without it.
        channel: `(B, C_in)`, factor of every input channel, or None.
        filter_: `(B, C_out)`, factor of every output channel, or None.
        spatial: `(B, k_h*k_w)`, factor of every kernel position, or None.
        kernel_size: `(k_h, k_w)`.
        groups: groups of the convolution. Taps slide over the channels of all groups.
        activation: gate of the local branch, "sigmoid" or "tanh".
        dtype: of the weights; everything is computed in float32.

    Returns:
        `(B, C_out, C_in/groups, k_h, k_w)`, contiguous.
    """
    factors = (context, taps, channel, filter_, spatial)
    return torch.ops.fdconv.modulate(image, *factors, *kernel_size, groups, activation, dtype)


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
        x: `(B, C_in, H, W)`, float32, bfloat16 or float16.
        weight: `(B, C_out, C_in/groups, k_h, k_w)`, in the dtype of `x`.
        stride: as the other arguments, what `F.conv2d` takes, but as pairs.

    Returns:
        `(B, C_out, H', W')`, in the dtype of `x`; sums are float32.
    """
    return torch.ops.fdconv.conv2d_per_sample(x, weight, stride, padding, dilation, groups)


def register(name: str, schema: str, function: Any, fake: Any, setup: Any = None, backward: Any = None) -> None:
    """Make a launcher a custom operator, `torch.ops.fdconv.NAME`, which `torch.compile` traces through."""
    operator = torch.library.custom_op(f"fdconv::{name}", function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=setup)


def _scale_spectrum(*given: Any) -> Tensor:
    from .scale import launch

    out = _scale_spectrum_fake(*given)
    if out.numel():
        launch(out, *given)
    return out


def _scale_spectrum_fake(
    spectra: Tensor, frequency_group: Tensor, kernel: Tensor, scale: float, edge: float, width: int
) -> Tensor:
    return spectra.new_empty((kernel.shape[0], *spectra.shape[1:]))


def _scale_spectrum_backward(*given: Any) -> tuple[Tensor, Tensor]:
    from .scale import launch_backward

    return launch_backward(*given)


def _scale_spectrum_backward_fake(
    grad: Tensor, spectra: Tensor, frequency_group: Tensor, kernel: Tensor, scale: float, edge: float, width: int
) -> tuple[Tensor, Tensor]:
    return spectra.new_empty(spectra.shape), kernel.new_empty(kernel.shape)


def _scale_spectrum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.edge, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _scale_spectrum_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    spectra, frequency_group, kernel = ctx.saved_tensors
    grad_spectra, grad_kernel = torch.ops.fdconv.scale_spectrum_backward(
        grad, spectra, frequency_group, kernel, ctx.scale, ctx.edge, ctx.width
    )
    return grad_spectra, None, grad_kernel, None, None, None


_SCALE = "Tensor spectra, Tensor frequency_group, Tensor kernel, float scale, float edge, int width"

register(
    "scale_spectrum",
    f"({_SCALE}) -> Tensor",
    _scale_spectrum,
    _scale_spectrum_fake,
    _scale_spectrum_setup,
    _scale_spectrum_autograd,
)
register(
    "scale_spectrum_backward",
    f"(Tensor grad, {_SCALE}) -> (Tensor, Tensor)",
    _scale_spectrum_backward,
    _scale_spectrum_backward_fake,
)


def _modulate(*given: Any) -> Tensor:
    from .modulate import launch

    out = _modulate_fake(*given)
    if out.numel():
        launch(out, *given[:-1])
    return out


def _modulate_fake(
    image: Tensor,
    context: Tensor | None,
    taps: Tensor | None,
    channel: Tensor | None,
    filter_: Tensor | None,
    spatial: Tensor | None,
    k_h: int,
    k_w: int,
    groups: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    samples, d1, d2 = image.shape
    return torch.empty((samples, d1 // k_h, d2 // k_w, k_h, k_w), dtype=dtype, device=image.device)


def _modulate_backward(*given: Any) -> list[Tensor]:
    """Gradients of `image` and of those of `context, taps, channel, filter_, spatial` that are not None."""
    from .modulate_backward import launch

    return launch(*given)


def _modulate_backward_fake(
    grad: Tensor,
    image: Tensor,
    context: Tensor | None,
    taps: Tensor | None,
    channel: Tensor | None,
    filter_: Tensor | None,
    spatial: Tensor | None,
    k_h: int,
    k_w: int,
    groups: int,
    activation: str,
) -> list[Tensor]:
    inputs = (image, context, taps, channel, filter_, spatial)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs if x is not None]


def _modulate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:10]


def _modulate_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = iter(torch.ops.fdconv.modulate_backward(grad, *tensors, *ctx.settings))
    return (*(None if tensor is None else next(grads) for tensor in tensors), *(None,) * 5)


_MODULATE = (
    "Tensor image, Tensor? context, Tensor? taps, Tensor? channel, Tensor? filter_, Tensor? spatial, "
    "int k_h, int k_w, int groups, str activation"
)
"""What both custom operators take, in the language of their schemas."""

register(
    "modulate",
    f"({_MODULATE}, ScalarType dtype) -> Tensor",
    _modulate,
    _modulate_fake,
    _modulate_setup,
    _modulate_autograd,
)
register("modulate_backward", f"(Tensor grad, {_MODULATE}) -> Tensor[]", _modulate_backward, _modulate_backward_fake)


def _conv(*given: Any) -> Tensor:
    from .conv import launch

    out = _conv_fake(*given)
    if out.numel():
        launch(out, *given)
    return out


def _conv_fake(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    conv = Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)
    sides = convolved_size(x.shape[2:], weight.shape[3:], conv)
    return torch.empty((x.shape[0], weight.shape[1], *sides), dtype=x.dtype, device=x.device)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)


def _conv_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.settings
    if x.shape[0] == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), None, None, None, None
    conv = Convolution(tuple(stride), tuple(padding), tuple(dilation), groups)
    return (*per_sample_backward(grad, x, weight, conv), *(None,) * 4)


_CONV = "Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups"

register("conv2d_per_sample", f"({_CONV}) -> Tensor", _conv, _conv_fake, _conv_setup, _conv_autograd)

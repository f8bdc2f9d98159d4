"""Convolutions whose taps reach further at one position than at another: sampling between pixels, then products.

Every step is a differentiable operation of torch, of any dtype and device, so that it is traced, exported and
differentiated twice as it stands. `torchvision.ops.deform_conv2d` computes the same; its backward pass on a CPU takes
six times as long, it has neither bfloat16 nor second derivatives, and in half precision positions would be too coarse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fdconv.constants import constant
from fdconv.precision import without_autocast
from fdconv.reference import Convolution
from fdconv.strides import owned
from fdconv.tracing import is_transformed, wants_operations

CHUNK = 2**22
"""Sampled numbers that are held at a time on a CPU, unless a single sample has more: memory that is used again."""
CHUNK_ON_DEVICE = 2**27
"""As `CHUNK`, where many numbers at a time are faster."""


def grid(positions: int, taps: int, stride: int, padding: int, dilation: int, device: torch.device) -> Tensor:
    """Along one axis, where the taps of a plain convolution lie in its input: `(positions, taps)`, whole numbers."""
    start = torch.arange(positions, dtype=torch.int64, device=device) * stride - padding
    return start[:, None] + torch.arange(taps, dtype=torch.int64, device=device) * dilation


def between(at: Tensor, moved: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The two pixels that a tap lies between, along one axis, and their shares; pixels beyond the map have none.

    Args:
        at: where the tap of the plain convolution lies, whole numbers.
        moved: by how much it is moved from there.
        size: of the axis.
    """
    steps = moved.detach().floor()
    share = moved - steps  # of the distance alone: at a large map a position's own digits would be lost
    first = (at + steps).clamp(-2, size).to(torch.int64)  # far out is far out, and whole numbers have an end
    found = []
    for pixel, weight in ((first, 1 - share), (first + 1, share)):
        inside = (pixel >= 0) & (pixel < size)
        found.append((pixel.clamp(0, size - 1), torch.where(inside, weight, 0)))
    return found


def sampled(x: Tensor, reach: Tensor, mask: Tensor, kernel: tuple[int, int], conv: Convolution) -> Tensor:
    """What the taps of every position see, bilinear between pixels and zero beyond the map.

    Args:
        x: `(B, C_in, H, W)`.
        reach: by how much the dilation exceeds that of `conv`, for rows and for columns, `(B, 2, G, H', W')`, float32
            or float64. Each of the `G` groups of channels has its own.
        mask: by how much each tap is multiplied, `(B, G*k_h*k_w, H', W')`.
        kernel: `(k_h, k_w)`, odd.
        conv: the plain convolution, whose padding is zeros.

    Returns:
        `(B, H'*W', k_h*k_w, C_in)`, in the dtype of `x`.
    """
    batch, channels, height, width = x.shape
    groups, rows, columns = reach.shape[2:]
    shares = mask.reshape(batch, groups, *kernel, rows, columns).permute(0, 4, 5, 2, 3, 1)
    lines = []
    for way, (positions, size) in enumerate(((rows, height), (columns, width))):
        geometry = (kernel[way], conv.stride[way], conv.padding[way], conv.dilation[way])
        at = constant(grid, positions, *geometry, x.device, of_input=True)
        middle = torch.arange(kernel[way], dtype=torch.int64, device=x.device) - kernel[way] // 2
        extent = (1, rows, 1, kernel[0], 1, 1) if way == 0 else (1, 1, columns, 1, kernel[1], 1)
        moved = reach[:, way].permute(0, 2, 3, 1)[:, :, :, None, None] * middle.view(1, 1, 1, *extent[3:])
        lines.append(between(at.view(extent), moved, size))
    # Pixels as rows of their channels, which lie together in memory.
    pixels = x.permute(0, 2, 3, 1).reshape(batch * height * width * groups, channels // groups)
    sample = torch.arange(batch, dtype=torch.int64, device=x.device).view(-1, 1, 1, 1, 1, 1) * (height * width)
    group = torch.arange(groups, dtype=torch.int64, device=x.device)
    seen: Tensor | None = None
    for row, its_share in lines[0]:
        for column, share in lines[1]:
            index = (sample + row * width + column) * groups + group
            part = pixels.index_select(0, index.reshape(-1))
            weight = (its_share * share * shares).reshape(-1, 1)
            seen = part * weight if seen is None else torch.addcmul(seen, part.to(seen.dtype), weight)
    assert seen is not None
    return seen.to(x.dtype).reshape(batch, rows * columns, kernel[0] * kernel[1], channels)


def convolved(x: Tensor, reach: Tensor, mask: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    """Convolve each sample with its weight, `(B, C_out, C_in/groups, k_h, k_w)`, or all with one; else as `sampled`.

    Returns:
        `(B, C_out, H', W')`.
    """
    batch, size = x.shape[0], reach.shape[3:]
    given, out_channels, in_channels, *kernel = weight.shape
    seen = sampled(x, reach, mask, (kernel[0], kernel[1]), conv)
    taps, groups = kernel[0] * kernel[1], conv.groups
    if groups == 1:
        flat = weight.permute(0, 1, 3, 4, 2).reshape(given, out_channels, taps * in_channels)
        y = flat @ seen.view(batch, size[0] * size[1], taps * in_channels).transpose(1, 2)
    else:
        own = seen.view(batch, size[0] * size[1], taps, groups, in_channels).permute(0, 3, 4, 2, 1)
        flat = weight.reshape(given, groups, out_channels // groups, in_channels * taps)
        y = flat @ own.reshape(batch, groups, in_channels * taps, size[0] * size[1])
    return y.reshape(batch, out_channels, *size)


Compute = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def by_parts(compute: Compute, own: Sequence[Tensor], shared: Sequence[Tensor], size: int) -> Tensor:
    """`compute(own, shared)`, for a few samples at a time, whatever it holds meanwhile being forgotten.

    The backward pass computes each part once more.

    Args:
        compute: differentiable, for any number of samples.
        own: tensors `(B, ...)`; at least one.
        shared: tensors that all samples have in common.
        size: how many numbers are held for one sample.
    """
    batch = own[0].shape[0]
    if is_transformed() or batch == 0:
        return compute(own, shared)
    step = max(1, (CHUNK if own[0].device.type == "cpu" else CHUNK_ON_DEVICE) // size)
    if torch.is_grad_enabled():
        result: Tensor = _ByParts.apply(compute, step, len(own), *own, *shared)  # type: ignore[no-untyped-call]
        return result
    return _forward(compute, step, own, shared)


def _forward(compute: Compute, step: int, own: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    parts = [compute([one[at : at + step] for one in own], shared) for at in range(0, len(own[0]), step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _ByParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, step: int, count: int, *tensors: Tensor) -> Tensor:
        ctx.how = compute, step, count
        ctx.save_for_backward(*tensors)
        return owned(_forward(compute, step, tensors[:count], tensors[count:]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        compute, step, count = ctx.how
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        with without_autocast(grad.device):
            if wants_operations(grad):  # to be differentiated once more
                return (None, None, None, *_gradients(compute, count, tensors, wanted, grad))
            found: list[Tensor | None] = [None] * len(tensors)
            pieces: list[list[Tensor]] = [[] for _ in range(count)]
            for at in range(0, len(tensors[0]), step):
                part = slice(at, at + step)
                leaves = [
                    (one[part] if place < count else one).detach().requires_grad_(want)
                    for place, (one, want) in enumerate(zip(tensors, wanted, strict=True))
                ]
                for place, gradient in enumerate(_gradients(compute, count, leaves, wanted, grad[part])):
                    if gradient is None:
                        continue
                    if place < count:
                        pieces[place].append(gradient)
                    else:
                        so_far = found[place]
                        found[place] = gradient if so_far is None else so_far + gradient
            found[:count] = [torch.cat(piece) if piece else None for piece in pieces]
        return (None, None, None, *found)


def _gradients(
    compute: Compute, count: int, tensors: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        y = compute(tensors[:count], tensors[count:])
    leaves = [one for one, want in zip(tensors, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(y, leaves, grad, create_graph=create, allow_unused=True))
    return [next(found) if want else None for want in wanted]

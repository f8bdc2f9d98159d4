"""The convolution of each sample with its own weight as one implicit matrix product on GPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .blocks import number_of_blocks, power_of_2
from .common import ABOUT, is_interpreted, jit
from .tuning import Candidate, tuned

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = tl = None


def _fit_conv(candidate: Candidate, arguments: dict[str, Any]) -> Candidate:
    """Blocks no larger than the product, but never below 16, where there is no matrix unit to feed.

    A product of float32 has no such unit, and is unrolled along K: blocks as deep and as wide as for 16 bits would not
    fit into the registers. Nor are more warps started than have 32 sums or 16 inputs for each thread.
    """
    widest, deepest = (64, 16) if arguments["x"].element_size() == 4 else (128, 64)
    sizes = {
        "M": arguments["filters_group"],
        "N": min(arguments["out_height"] * arguments["out_width"], widest),
        "K": min(arguments["channels_group"] * arguments["K_H"] * arguments["K_W"], deepest),
    }
    m, n, k = (min(candidate[name], max(16, power_of_2(size))) for name, size in sizes.items())
    warps = max(4, m * n // 1024, n * k // 512)
    return candidate | {"M": m, "N": n, "K": k, "num_warps": min(candidate["num_warps"], warps)}


@tuned(
    # The inputs' indices cost more than the product, so the more filters share them the better, if there are so many.
    [
        {"M": 128, "N": 64, "K": 32, "num_warps": 8, "num_stages": 3},
        {"M": 64, "N": 64, "K": 32, "num_warps": 4, "num_stages": 3},
        {"M": 64, "N": 64, "K": 64, "num_warps": 8, "num_stages": 3},
        {"M": 128, "N": 128, "K": 32, "num_warps": 8, "num_stages": 2},
        {"M": 64, "N": 32, "K": 32, "num_warps": 4, "num_stages": 4},
    ],
    _fit_conv,
    ["channels_group", "filters_group", "K_H", "K_W", *ABOUT],
)
@partial(jit, do_not_specialize=ABOUT)
def _conv_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    channels_group,
    height,
    width,
    filters_group,
    out_height,
    out_width,
    about_samples,
    about_pixels,
    K_H: tl.constexpr,
    K_W: tl.constexpr,
    S_H: tl.constexpr,
    S_W: tl.constexpr,
    P_H: tl.constexpr,
    P_W: tl.constexpr,
    D_H: tl.constexpr,
    D_W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    BEYOND: tl.constexpr = 1 << 29
    # One matrix product for every sample and group: filters times (channel, position), by that times output pixels.
    pixels = out_height * out_width
    depth = channels_group * (K_H * K_W)
    down = (filters_group + M - 1) // M
    across = (pixels + N - 1) // N
    program = tl.program_id(0)
    part = (program // down // across).to(tl.int64)
    m = (program % down * M + tl.arange(0, M))[:, None]
    n = (program // down % across * N + tl.arange(0, N))[None, :]
    x += part * channels_group * height * width
    weight += part * filters_group * depth
    out += part * filters_group * pixels
    # Indices cost more than the product, so what depends on rows or columns alone is computed for these alone.
    # Unsigned, division is cheaper, and one comparison covers both borders. What is no channel is put `BEYOND` them.
    # A column that is no pixel may read some inside them, and is not stored.
    top = n // out_width * S_H - P_H
    left = n % out_width * S_W - P_W
    x += top * width + left
    weight += m * depth
    total = tl.full([M, N], 0.0, tl.float32)
    for start in range(0, depth, K):
        k = start + tl.arange(0, K)
        a = tl.load(weight + k[None, :], mask=(m < filters_group) & (k < depth)[None, :], other=0.0)
        k = k[:, None].to(tl.uint32)
        row = k // K_W
        channel = (row // K_H).to(tl.int32)
        h = (row % K_H).to(tl.int32) * D_H
        w = (k % K_W).to(tl.int32) * D_W
        at = (channel * height + h) * width + w
        h = tl.where(k < depth, h, BEYOND)
        inside = ((top + h).to(tl.uint32) < height) & ((left + w).to(tl.uint32) < width)
        b = tl.load(x + at, mask=inside, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out + m * pixels + n, total.to(out.dtype.element_ty), mask=(m < filters_group) & (n < pixels))


def launch(
    out: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> None:
    """Fill `out`; all as for `fdconv.gpu.ops.conv2d_per_sample`."""
    samples, channels_out, out_height, out_width = out.shape
    if is_interpreted():  # its matrix product takes bfloat16 for integers
        x, weight = x.float(), weight.float()
    filters_group, pixels = channels_out // groups, out_height * out_width

    def grid(sizes: dict[str, Any]) -> tuple[int]:
        return (samples * groups * number_of_blocks(filters_group, sizes["M"]) * number_of_blocks(pixels, sizes["N"]),)

    with torch.cuda.device_of(x):
        _conv_kernel[grid](
            x.contiguous(),
            weight.contiguous(),
            out,
            weight.shape[2],
            *x.shape[2:],
            filters_group,
            out_height,
            out_width,
            power_of_2(samples),
            power_of_2(pixels),
            K_H=weight.shape[3],
            K_W=weight.shape[4],
            S_H=stride[0],
            S_W=stride[1],
            P_H=padding[0],
            P_W=padding[1],
            D_H=dilation[0],
            D_W=dilation[1],
        )

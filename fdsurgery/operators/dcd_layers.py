"""The layers of DCD, dynamic convolution by matrix decomposition (Li et al., ICLR 2021, arXiv 2103.08756).

`W(x) = Lambda(x) W + P Phi(x) Q^T`, section 4: the static weight with a factor for each filter, and a residual of few
channels that a matrix of each sample mixes. With the authors' two norms in the residual a layer computes

    z = bn1(Q x),  z' = bn2(Phi z) + z,  y = scale * conv(x) + P z'

where `Q` and `P` are 1x1, so that the residual reads the centre tap of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv.modulation import ContextBatchNorm, Squeeze, ZeroInit, linear_of, normed
from fdconv.onnx_fft import refuse_old_exporter
from fdconv.precision import fft_dtype, without_autocast

from .dynamic_layer import DynamicConv2d, DynamicLayer, DynamicLinear

CLASSIFIER_WIDTH = 32
"""Of the residual and of the gates of a linear layer, whatever its channels."""
LEAST_WIDTH = 4
"""Of the gates. The authors' bottleneck form has no such limit: with less than 16 input channels nothing is left."""


def widths(settings: dict[str, Any], in_channels: int, out_channels: int, linear: bool) -> tuple[int, int, int]:
    """What the settings leave open, by the authors' rules.

    Returns:
        the side of the map that the gates see, the channels of the residual, and the width of the gates.
    """
    pool, dim, squeeze = settings["pool"], settings["dim"], settings["squeeze"]
    if linear:
        return 1, dim or CLASSIFIER_WIDTH, squeeze or CLASSIFIER_WIDTH
    if settings["variant"] == "mobilenet":
        expands = in_channels < out_channels
        pool = pool or (2 if expands else 1)
        seen = in_channels * pool**2
        dim = dim or _mobile_dim(seen, out_channels, 8 if expands else 2)
        return pool, dim, squeeze or max(max(seen, dim**2) // 8, LEAST_WIDTH)
    pool = pool or (2 if settings["variant"] == "basic" else 1)
    seen = in_channels * pool**2
    dim = dim or math.isqrt(seen)
    return pool, dim, squeeze or max(max(seen, dim**2) // 16, LEAST_WIDTH)


def _mobile_dim(seen: int, out_channels: int, reduction: int) -> int:
    while (dim := min(seen // reduction, out_channels // reduction)) ** 2 > 2 * seen:
        reduction *= 2
    return max(dim, 4)


def misfit(conv: Any, pads_same: bool) -> str | None:
    """Why a residual of 1x1 has not the positions of a convolution, or reads others; None if it reads the centre tap.

    What is padded is then never read by the residual, so any `padding_mode` will do.

    Args:
        conv: anything with `kernel_size`, `stride`, `padding` and `dilation`.
        pads_same: True if the input is padded first, as TensorFlow does.
    """
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    if any(k % 2 == 0 for k in kernel):
        return "its kernel has no centre tap, which the residual reads"
    if pads_same:
        shifted = any(k > 1 and s > 1 for k, s in zip(kernel, stride, strict=True))
        return (
            "it pads by the size of its input, so its centre tap is not where the residual reads" if shifted else None
        )
    if conv.padding == "same":
        return None
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    if all(2 * p == d * (k - 1) for p, d, k in zip(padding, dilation, kernel, strict=True)):
        return None
    return f"its padding is {conv.padding}, and the residual needs dilation * (kernel_size - 1) / 2"


class Map(Squeeze):
    """A matrix without a bias, drawn as `nn.Linear` and `nn.Conv2d` draw theirs, applied by whoever owns it."""

    def reset_parameters(self) -> None:
        """Draw the matrix anew."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


def twice_hard_sigmoid(z: Tensor) -> Tensor:
    """`min(max(z + 3, 0), 6) / 3`, 1 at zero."""
    return F.relu6(z + 3) / 3


class WidthGate(nn.Module):
    """The gates' width, gated by itself (squeeze and excitation); named as the authors name it."""

    def __init__(self, width: int, **place: Any) -> None:
        super().__init__()
        self.fc = nn.ModuleList([Map(width, width, **place)])

    def forward(self, u: Tensor) -> Tensor:
        (layer,) = self.fc
        assert isinstance(layer, Map)
        return u * twice_hard_sigmoid(linear_of(layer, u))


class DCDLayer(DynamicLayer):
    """What both layers share.

    Neutral while `P` and the scale's head are zero, bit for bit. As with LoRA these two learn first, and what is before
    them from the second step on.

    In evaluation the norms are affine, and the residual can be made a part of the weight of each sample, with a bias of
    each sample. That is done where it takes fewer products: on maps that are large for their channels.
    """

    stored_name = "dcd_weight"
    dcd_weight: nn.Parameter
    groups: int
    q_name = "q"
    p_name = "p"

    def _build(self, weight: Tensor) -> None:
        out_channels, in_channels = len(weight), self._in_channels()
        is_linear = weight.dim() == 2
        self.pool, dim, width = widths(self.settings, in_channels, out_channels, is_linear)
        place: Any = {"device": weight.device, "dtype": weight.dtype}
        kernel = () if is_linear else (1, 1)
        self.dcd_weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        self.add_module(self.q_name, Map(dim, in_channels, *kernel, **place))
        self.add_module(self.p_name, ZeroInit(out_channels, dim, *kernel, bias=False, **place))
        self.bn1 = ContextBatchNorm(dim, **place)
        self.bn2 = ContextBatchNorm(dim, **place)
        self.fc = nn.ModuleList([Map(width, in_channels * self.pool**2, **place), WidthGate(width, **place)])
        self.fc_phi = Map(dim**2, width, **place)
        self.fc_scale = ZeroInit(out_channels, width, bias=False, **place)

    @property
    def _q(self) -> nn.Parameter:
        return self._modules[self.q_name].weight  # type: ignore[return-value, union-attr]

    @property
    def _p(self) -> nn.Parameter:
        return self._modules[self.p_name].weight  # type: ignore[return-value, union-attr]

    def _neutral_weight(self) -> Tensor:
        return self.dcd_weight

    def _modulation(self) -> list[Tensor]:
        return [self._p, self.fc_scale.weight]

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        self.dcd_weight.copy_(self._checked(weight))

    @torch.no_grad()
    def _multiply(self, scale: Tensor) -> None:
        factors = self._factors(scale).to(self.dcd_weight.dtype)
        for one in (self.dcd_weight, self._p):
            one.mul_(factors.view(-1, *(1,) * (one.dim() - 1)))

    # Gates

    def _gates(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The factor of each filter `(B, C_out)` and the matrix `(B, d, d)` that mixes the residual's channels."""
        squeeze, gate = self.fc
        assert isinstance(squeeze, Map)
        u = gate(linear_of(squeeze, context))
        dim = len(self._q)
        return twice_hard_sigmoid(linear_of(self.fc_scale, u)), linear_of(self.fc_phi, u).unflatten(1, (dim, dim))

    # Position by position

    def _added(self, z: Tensor, phi: Tensor) -> Tensor:
        """`z'` of `Q x`, `(B, d, positions)`."""
        dtype = self.dcd_weight.dtype
        z = normed(self.bn1, z, dtype)
        return normed(self.bn2, phi @ z, dtype) + z

    # In the weight

    def products(self, positions: int, *, folded: bool) -> dict[str, int]:
        """What is multiplied for one sample beyond the plain layer, by component.

        Args:
            positions: of the result.
            folded: True if the residual is made a part of the sample's weight, False if each position computes it.
        """
        out_channels, in_channels, dim = len(self.dcd_weight), self._in_channels(), len(self._q)
        width, seen = self.fc[0].weight.shape  # type: ignore[union-attr, misc]
        heads = width * (seen + width + 1 + dim**2 + out_channels)
        if folded:
            mixed = min(in_channels, out_channels) * dim**2
            residual = mixed + out_channels * dim * (in_channels + 1) + dim * (in_channels + 2 * dim)
            return {"heads": heads, "residual": residual, "scale": self.dcd_weight.numel()}
        residual = dim * (in_channels + dim + out_channels)
        return {"heads": heads, "residual": positions * residual, "scale": positions * out_channels}

    def is_cheaper_folded(self, positions: int) -> bool:
        """True if a weight of each sample takes fewer products than a residual at each position."""
        if self.groups > 1:  # the residual reads all channels: in a grouped weight there is no room for that
            return False
        one, other = (sum(self.products(positions, folded=folded).values()) for folded in (True, False))
        return one < other

    def _folds(self, positions: int) -> bool:
        """True where the residual is made a part of the weight of each sample."""
        if self.groups > 1 or self.training or self.bn1.training or self.bn2.training:
            return False
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            return True  # in a graph that is to serve inputs of any size
        return self.is_cheaper_folded(positions)

    def _given(self, context: Tensor) -> list[Tensor]:
        scale, phi = self._gates(context)
        gain, _ = _affine(self.bn2, context.dtype)
        return [scale, gain[:, None] * phi + torch.eye(len(gain), dtype=phi.dtype, device=phi.device)]

    def _shared(self) -> list[Tensor]:
        exact = fft_dtype(self.dcd_weight.dtype)
        gain, _ = _affine(self.bn1, exact)
        q, p = (one.flatten(1).to(exact) for one in (self._q, self._p))
        return [self.dcd_weight, p, gain[:, None] * q]

    def _make(self, given: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        scale, mixing = given
        weight, p, q = (one.to(scale.dtype) for one in shared)
        added = p @ mixing @ q if len(p) <= q.shape[1] else p @ (mixing @ q)
        kernel = self._kernel_shape()
        weight = dense(weight.reshape(kernel), self.groups)
        top, left = kernel[2] // 2, kernel[3] // 2
        added = F.pad(added[..., None, None], (left, left, top, top)) if top or left else added[..., None, None]
        return torch.addcmul(added, scale[..., None, None, None], weight)

    def _sample_bias(self, given: Sequence[Tensor]) -> Tensor:
        _, mixing = given
        (_, first), (_, second) = (_affine(norm, mixing.dtype) for norm in (self.bn1, self.bn2))
        return F.linear(mixing @ first + second, self._p.flatten(1).to(mixing.dtype))


class DCDConv2d(DCDLayer, DynamicConv2d):  # type: ignore[misc, override]
    """DCD in the place of `nn.Conv2d`. A bias is not part of the authors' layer, and is added as it is."""

    def _context(self, x: Tensor) -> Tensor:
        """The means that the gates see, `(B, C_in*pool*pool)`: channel, row, column."""
        return super()._context(x) if self.pool == 1 else pooled(x, self.pool).flatten(1)

    def _convolved(self, x: Tensor) -> Tensor:
        reason = misfit(self, self.pads_same)  # asked at each call, for some change the dilation afterwards
        if reason is not None:
            raise RuntimeError(f"{type(self).__name__} cannot convolve: {reason}")
        if self._folds(_product([-(-size // step) for size, step in zip(x.shape[2:], self.stride, strict=True)])):
            return super()._convolved(x)
        refuse_old_exporter()
        context = self._context(x)
        padded, padding = self._padded(x)
        y = F.conv2d(padded, self.dcd_weight, None, self.stride, padding, self.dilation, self.groups)
        z = F.conv2d(x, self._q, None, self.stride)
        with without_autocast(x.device):
            scale, phi = self._gates(context)
            added = self._added(z.flatten(2).to(context.dtype), phi).to(y.dtype).reshape(z.shape)
        return torch.addcmul(F.conv2d(added, self._p, self.bias), scale.to(y.dtype)[..., None, None], y)


class DCDLinear(DCDLayer, DynamicLinear):  # type: ignore[misc, override]
    """DCD in the place of `nn.Linear`, the authors' classifier: the factor of a filter is its bias's, too.

    Their layer takes `(B, C_in)`, one position. Of several, the gates see the mean, and the norms see all.
    """

    q_name = "cls_q"
    p_name = "cls_p"

    def _multiplied(self, x: Tensor) -> Tensor:
        if self._folds(_product(x.shape[1:-1])):
            return super()._multiplied(x)
        refuse_old_exporter()
        context = self._context(x)
        y = F.linear(x, self.dcd_weight, self.bias)
        z = F.linear(x, self._q)
        with without_autocast(x.device):
            scale, phi = self._gates(context)
            rows = z.unsqueeze(1) if z.dim() == 2 else z.flatten(1, -2)
            added = self._added(rows.transpose(1, 2).to(context.dtype), phi).transpose(1, 2)
            added = added.reshape(z.shape).to(y.dtype)
        factor = scale.to(y.dtype).view(y.shape[0], *(1,) * (y.dim() - 2), y.shape[-1])
        return torch.addcmul(F.linear(added, self._p), factor, y)

    def _sample_bias(self, given: Sequence[Tensor]) -> Tensor:
        own = super()._sample_bias(given)
        return own if self.bias is None else own + (given[0] - 1) * self.bias.to(own.dtype)

    def _multiply(self, scale: Tensor) -> None:
        if self.bias is not None:
            raise ValueError(
                f"{type(self).__name__} gives its bias the factors of its filters, so its weight cannot be multiplied "
                "alone"
            )
        super()._multiply(scale)


def _product(sizes: Sequence[int]) -> int:
    """`math.prod`, also of the symbols that a compiler has in the place of sizes."""
    product = 1
    for size in sizes:
        product = product * size
    return product


def pooled(x: Tensor, side: int) -> Tensor:
    """Adaptive means `(B, C, side, side)`, float32 or float64: without a copy of an input of lower precision."""
    height, width = x.shape[2:]

    def parts(length: int) -> list[slice]:
        return [slice(at * length // side, -(-(at + 1) * length // side)) for at in range(side)]

    dtype = fft_dtype(x.dtype)
    means = [x[:, :, rows, columns].mean((2, 3), dtype=dtype) for rows in parts(height) for columns in parts(width)]
    return torch.stack(means, 2).unflatten(2, (side, side))


def dense(weight: Tensor, groups: int) -> Tensor:
    """The weight `(C_out, C_in, k_h, k_w)` of one group that does what a grouped one does."""
    if groups == 1:
        return weight
    own = weight.unflatten(0, (groups, -1))
    where = torch.eye(groups, dtype=weight.dtype, device=weight.device)[:, None, :, None, None, None]
    return (where * own[:, :, None]).flatten(2, 3).flatten(0, 1)


def _affine(norm: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gain and shift by the running statistics of a norm."""
    mean, var, weight, bias = (
        getattr(norm, name).to(dtype) for name in ("running_mean", "running_var", "weight", "bias")
    )
    gain = weight * torch.rsqrt(var + norm.eps)
    return gain, bias - mean * gain

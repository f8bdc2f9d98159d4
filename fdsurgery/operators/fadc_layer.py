"""The layer of FADC: FreqSelect, AdaKern and AdaDR, each of which may be off (arXiv 2403.05369)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv.modulation import ZeroInit
from fdconv.onnx_fft import refuse_old_exporter
from fdconv.out_of_memory import explained
from fdconv.precision import autocast_is_on, fft_dtype, without_autocast
from fdconv.reference import Convolution, WeightShape

from .adaptive_dilation import by_parts, convolved
from .dynamic_layer import DynamicConv2d
from .freq_select import FreqSelect
from .odconv import OmniAttention

_GATES = {"both": ("OMNI_ATT1", "OMNI_ATT2"), "high": ("OMNI_ATT",), "low": ("OMNI_ATT",), "none": ()}
"""Names of AdaKern's gates; of two the first are of the low part."""


class FADConv2d(DynamicConv2d):
    """FADC in the place of `nn.Conv2d`.

    `fadc_weight` is the static weight. With AdaDR it is half the authors', whose masks are half of ours.
    """

    stored_name = "fadc_weight"
    fadc_weight: nn.Parameter
    FS: FreqSelect | None
    conv_offset: ZeroInit | None
    conv_mask: ZeroInit | None

    def _build(self, weight: Tensor) -> None:
        settings = self.settings
        error = cannot(self.in_channels, self.kernel_size, self.dilation, settings)
        if error is not None:
            raise ValueError(f"{type(self).__name__}: {error}")
        as_given: Any = {"device": weight.device, "dtype": weight.dtype}
        self.fadc_weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        depthwise = self.groups == self.in_channels == self.out_channels
        for name in _GATES[settings["adakern"]]:
            its = {"kernels": 1, **settings}
            gates = OmniAttention(
                self.in_channels, self.out_channels, 1, depthwise=depthwise, settings=its, like=weight
            )
            setattr(self, name, gates)
        self.conv_offset = self.conv_mask = None
        if settings["adadr"]:
            groups, taps = settings["deform_groups"], self.kernel_size[0] * self.kernel_size[1]
            self.conv_offset = ZeroInit(groups, self.in_channels, 3, 3, **as_given)
            self.conv_mask = ZeroInit(groups * taps, self.in_channels, 3, 3, **as_given)
            assert self.conv_offset.bias is not None
            nn.init.constant_(self.conv_offset.bias, self._neutral_offset())
        self.FS = None
        if settings["freqselect"]:
            bands = settings["bands"], settings["low_band"], settings["map_groups"]
            self.FS = FreqSelect(self.in_channels, *bands, weight)

    def _neutral_offset(self) -> float:
        """The `o` at which the dilation is the plain layer's."""
        return 0.0 if self.settings["dilation_rule"] == "relu" else (self.dilation[0] - 1) / self.dilation[0]

    def _gates(self) -> list[OmniAttention]:
        return [getattr(self, name) for name in _GATES[self.settings["adakern"]]]

    # The weights

    def _given(self, context: Tensor) -> list[Tensor]:
        cold = context.new_ones(())
        return [gate for gates in self._gates() for gate in gates(context, cold).values()]

    def _make(self, given: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        weight = shared[0]
        if not given:
            return weight[None]
        weight = weight.to(given[0].dtype)
        which = self.settings["adakern"]
        count = len(given) // len(_GATES[which])
        gates = [self._by_weight(given[at : at + count]) for at in range(0, len(given), count)]
        mean = weight.mean((2, 3), keepdim=True)
        if which == "low":
            return weight + mean * (gates[0] - 1)
        # The mean times its gates and the rest times theirs, so arranged that neutral gates give the weight itself.
        of_mean = gates[0] - gates[1] if which == "both" else 1 - gates[0]
        return weight * gates[-1] + mean * of_mean

    def _by_weight(self, gates: Sequence[Tensor]) -> Tensor:
        """The gates of channels, and of filters if there are any, as factors `(B, C_out, C_in/groups, 1, 1)`."""
        channels = gates[0].unflatten(1, (self.groups, 1, -1))
        if len(gates) == 1:
            factors = channels.expand(-1, -1, self.out_channels // self.groups, -1)
        else:
            factors = channels * gates[1].unflatten(1, (self.groups, -1, 1))
        return factors.flatten(1, 2)[..., None, None]

    def _neutral_weight(self) -> Tensor:
        return self.fadc_weight.clone()

    def _modulation(self) -> list[Tensor]:
        heads = [head for gates in self._gates() for head in gates.gate_heads()]
        heads += [] if self.FS is None else [*self.FS.freq_weight_conv_list]  # type: ignore[list-item]
        heads += [] if self.conv_mask is None else [self.conv_mask]
        found: list[Tensor] = [parameter for head in heads for parameter in head.parameters()]
        if self.conv_offset is not None and self.conv_offset.bias is not None:
            start = torch.full_like(self.conv_offset.bias, self._neutral_offset())
            found += [self.conv_offset.weight, self.conv_offset.bias - start]
        return found

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        self.fadc_weight.copy_(self._checked(weight))

    @torch.no_grad()
    def _multiply(self, scale: Tensor) -> None:
        self.fadc_weight.mul_(self._factors(scale).to(self.fadc_weight.dtype).view(-1, 1, 1, 1))

    # The call

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        if self.settings["padding"] == "zeros":
            return super()._padded(x)
        height, width = self._extent()
        return F.pad(x, (1, 1, 1, 1), mode="replicate"), (height - 1, width - 1)

    def _extent(self) -> tuple[int, int]:
        """How far the outermost taps of the plain layer are from the middle one."""
        height, width = (apart * (size // 2) for apart, size in zip(self.dilation, self.kernel_size, strict=True))
        return height, width

    def _convolved(self, x: Tensor) -> Tensor:
        if self.FS is not None:
            x = self.FS(x)
        context = self._context(x) if self._gates() else None
        x, padding = self._padded(x)
        conv = Convolution(self.stride, padding, self.dilation, self.groups)
        if self.conv_mask is None and context is None:
            return F.conv2d(x, self.fadc_weight, self.bias, *conv)
        if self.conv_mask is None:
            assert context is not None
            return self._computed(context, x, conv)
        refuse_old_exporter()
        with without_autocast(x.device):
            given = [] if context is None else self._given(context)
            reach, mask = self._reach(x, padding)
        y = self._stretched(x, reach, mask, given, conv)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, 1, 1)

    def _reach(self, x: Tensor, padding: Sequence[int]) -> tuple[Tensor, Tensor]:
        """By how much the dilations of rows and columns exceed the plain layer's, `(B, 2, G, H', W')`; and the masks.

        Their convolution is 3x3 whatever the kernel, and its middle lies where that of the plain layer lies.
        """
        offset, mask = self.conv_offset, self.conv_mask
        assert offset is not None and offset.bias is not None and mask is not None and mask.bias is not None
        wide = x.to(fft_dtype(x.dtype))
        weight = torch.cat([offset.weight, mask.weight]).to(wide.dtype)
        bias = torch.cat([offset.bias, mask.bias]).to(wide.dtype)
        own = [its - extent + 1 for its, extent in zip(padding, self._extent(), strict=True)]
        if min(own) < 0:
            wide, own = F.pad(wide, (own[1], own[1], own[0], own[0])), [0, 0]
        found = F.conv2d(wide, weight, bias, self.stride, own)
        groups = self.settings["deform_groups"]
        o, mask_logits = found[:, :groups], found[:, groups:]
        rule = self.settings["dilation_rule"]
        if rule == "relu":
            stretch = F.relu(1 + o) - 1
            reach = torch.stack([apart * stretch for apart in self.dilation], 1)
        else:
            dilation = self.dilation[0]
            beyond = (o.abs() if rule == "abs" else F.relu(1 + o) - 1) * dilation - (dilation - 1)
            reach = torch.stack([beyond, beyond], 1)
        return reach, 2 * torch.sigmoid(mask_logits)

    def _stretched(self, x: Tensor, reach: Tensor, mask: Tensor, given: Sequence[Tensor], conv: Convolution) -> Tensor:
        """Convolve with taps as far out as `reach` says, in the layer's dtype or autocast's."""
        dtype = self.fadc_weight.dtype
        if x.dtype != torch.float64 and autocast_is_on(x.device):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)

        def compute(own: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
            image, reaches, masks, *gates = own
            return convolved(image, reaches, masks, self._make(gates, shared).to(dtype), conv)

        out_channels, in_channels, *kernel = self._kernel_shape()
        shape = WeightShape(out_channels, in_channels, (kernel[0], kernel[1]), self.groups, 1.0, 1.0, "sigmoid")
        held = self.in_channels * kernel[0] * kernel[1] * mask.shape[2] * mask.shape[3]
        with without_autocast(x.device), explained(x, shape):
            return by_parts(compute, [x, reach, mask, *given], self._shared(), held)


def cannot(
    in_channels: int, kernel_size: tuple[int, ...], dilation: tuple[int, ...], settings: Mapping[str, Any]
) -> str | None:
    """Why there is no such layer, in words; None if there is."""
    kernel = "x".join(map(str, kernel_size))
    if tuple(kernel_size) == (1, 1) and settings["adadr"]:
        return "a 1x1 kernel has no taps to move apart; switch adadr off"
    if tuple(kernel_size) == (1, 1) and settings["adakern"] != "none":
        return "a 1x1 kernel is its own mean; set adakern to none"
    if settings["adadr"] and not all(size % 2 for size in kernel_size):
        return f"a {kernel} kernel has no middle tap, from which a dilation could be measured"
    if settings["dilation_rule"] != "relu" and len(set(dilation)) > 1:
        return f"dilation_rule={settings['dilation_rule']} knows one dilation, and its has {dilation}"
    if settings["padding"] == "repeat" and min(kernel_size) == 1:
        return f"padding=repeat repeats all sides, and a {kernel} kernel reads beyond two of them at most"
    for key, used in (("map_groups", "freqselect"), ("deform_groups", "adadr")):
        if settings[used] and in_channels % settings[key]:
            return f"{key}={settings[key]} does not divide its {in_channels} input channels"
    return None

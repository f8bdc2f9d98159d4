"""What a dynamic layer stores in place of its weight: a spectrum with its groups, and a scale of each filter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .config import FDConfig
from .filter_scale import common_factor
from .precision import exact_dtype, fft_dtype, holds_no_values, without_autocast
from .spectrum import (
    EDGE,
    column_factors,
    group_dtype,
    image_to_spectra,
    image_to_weight,
    isometric_scale,
    mended_groups,
    spectra_to_image,
    weight_to_image,
)
from .strides import memory_format
from .tracing import is_transformed
from .weight_property import WithStaticWeight


class StoredSpectrum(WithStaticWeight):
    """A spectrum in place of the weight, and the static weight that comes out of it.

    State (official names): `dft_weight (r, D1, D2h, 2)`, the spectrum; `frequency_group (D1, D2h)`, the group of each
    coefficient, saved so that a checkpoint means the same everywhere; `bias`.
    Of our own: `spectrum_scale (1,)`, the factor at which the weight comes out of an isometric spectrum, by which a
    state dict tells it from the paper's, which has none; `filter_scale (C_out,)`, a constant factor of each filter,
    where a norm was folded in; else None.
    """

    config: FDConfig
    groups: int
    dft_weight: nn.Parameter
    frequency_group: Tensor
    bias: nn.Parameter | None
    spectrum_scale: Tensor | None
    filter_scale: Tensor | None
    _groups_seen: tuple[int, int] = (0, 0)
    """Which tensor, and which version of it, was last found to hold whole groups."""
    stored_name = "dft_weight"

    def _paper_scale(self) -> float:
        """Factor of the paper's spectra at which the static weight comes out (`alpha` times the neutral attention)."""
        raise NotImplementedError

    def _scale(self) -> tuple[float, float]:
        """Factor of the stored spectra at which the static weight comes out, and another one of their edge columns."""
        if self.config.spectrum == "paper":
            return self._paper_scale(), 1.0
        out_channels, in_channels, k_h, k_w = self._kernel_shape()
        return isometric_scale(out_channels * k_h, in_channels * k_w, self.config.param_ratio), EDGE

    def _kernel_shape(self) -> tuple[int, int, int, int]:
        """`(C_out, C_in/groups, k_h, k_w)`; a linear layer is a 1x1 convolution."""
        out_channels, in_channels, k_h, k_w = (*self._static_shape(), 1, 1)[:4]
        return out_channels, in_channels, k_h, k_w

    def _add_spectrum(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        out_channels, in_channels, k_h, k_w = self._kernel_shape()
        half_spectrum = (out_channels * k_h, in_channels * k_w // 2 + 1)
        spectra = torch.empty(self.config.param_ratio, *half_spectrum, 2, device=device, dtype=dtype)
        self.dft_weight = nn.Parameter(spectra)
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        groups = torch.empty(half_spectrum, dtype=group_dtype(self.config.kernel_num), device=device)
        self.register_buffer("frequency_group", groups)
        isometric = self.config.spectrum == "isometric"
        self.register_buffer("spectrum_scale", torch.empty(1, device=device, dtype=dtype) if isometric else None)
        self.register_buffer("filter_scale", None)
        self._groups_seen = (0, 0)

    @torch.no_grad()
    def _mend_groups(self) -> bool:
        """Undo what averaging does to whole numbers; False where the groups are not whole and cannot be mended."""
        held = self.frequency_group
        if is_transformed() or holds_no_values(held) or held.is_inference():
            return True
        if self._groups_seen == (id(held), held._version):
            return True
        out_channels, in_channels, k_h, k_w = self._kernel_shape()
        d1, d2 = out_channels * k_h, in_channels * k_w
        mended = mended_groups(held, d1, d2, self.config.kernel_num) if held.shape == (d1, d2 // 2 + 1) else held
        if mended is None:
            return False
        if mended is not held:
            held.copy_(mended)
        self._groups_seen = (id(held), held._version)
        return True

    def _save_to_state_dict(self, *args: Any) -> None:
        self._mend_groups()  # those who average write into the state dict of a copy
        super()._save_to_state_dict(*args)

    def _spectra(self) -> Tensor:
        return self.dft_weight.to(fft_dtype(self.dft_weight.dtype))

    def _neutral_weight(self) -> Tensor:
        _, in_channels, k_h, k_w = self._kernel_shape()
        with without_autocast(self.dft_weight.device):
            image = spectra_to_image(self._spectra(), *self._scale(), in_channels * k_w)
            weight = image_to_weight(image, (k_h, k_w))
            if self.filter_scale is not None:
                weight = weight * self.filter_scale.to(weight.dtype).view(-1, 1, 1, 1)
            weight = weight.reshape(self._static_shape()).to(self.dft_weight.dtype)
            return weight.contiguous(memory_format=memory_format(self.channels_last))

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Make the layer stand for another static weight, of its twin's shape; the modulation stays as it is.

        Raises:
            ValueError: the weight has another shape, or the dtype of the layer cannot hold its spectrum.
        """
        if weight.shape != self._static_shape():
            raise ValueError(f"weight must have the shape {self._static_shape()}, not {tuple(weight.shape)}")
        self.dft_weight.copy_(self._spectra_of(weight, self.dft_weight.dtype))
        self.filter_scale = None

    def _spectra_of(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The spectra `(r, D1, D2h, 2)` to store for a static weight."""
        # The transform runs once, so it can afford the precision that leaves the stored spectrum correctly rounded.
        exact = weight.detach().to(exact_dtype(weight.device))
        image = weight_to_image(exact.reshape(self._kernel_shape()))
        spectra = image_to_spectra(image, self.config.param_ratio)
        spectra = spectra / column_factors(image.shape[1], *self._scale(), spectra)
        kept = spectra.to(dtype)
        if not holds_no_values(kept) and not kept.isfinite().all() and weight.isfinite().all():
            raise ValueError(
                f"the spectrum of this weight reaches {float(spectra.abs().max()):.3g}, and {dtype} holds numbers up "
                f"to {torch.finfo(dtype).max:.3g}; keep the layer in float32 or bfloat16"
            )
        return kept

    @torch.no_grad()
    def _multiply(self, scale: Tensor) -> None:
        """Multiply the weight, static and dynamic, by a factor of each filter; NaN is one that is not known."""
        if self.filter_scale is not None:  # of a filter that is zero whatever the sample, any factor is right
            scale = scale.masked_fill(scale.isnan() & (self.filter_scale == 0), 1)
        common = common_factor(scale, self.dft_weight.dtype)
        if common is not None:
            self.dft_weight.copy_(self._finite("spectrum", self.dft_weight.to(scale.dtype) * common))
            return
        unknown = scale.isnan()
        if unknown.any() and (scale == 1).any():  # part of a weight was written to, and the rest left as it was
            scale, unknown = scale.masked_fill(unknown, 1), torch.zeros_like(unknown)
        if unknown.any():
            raise ValueError(
                f"filter {int(unknown.nonzero()[0])} of {type(self).__name__}{self._static_shape()} is zero at neutral "
                "modulation, so a weight that is multiplied filter by filter does not tell its factor. Norms are "
                "folded by fdsurgery.fuse_norms(model); layer.scale_filters(scale, shift) takes the factors themselves"
            )
        self._scale_weight(scale)

    @torch.no_grad()
    def scale_filters(self, scale: Tensor, shift: Tensor | None = None) -> None:
        """Multiply what each filter gives by a constant and add another: `y` becomes `scale * y + shift`.

        That is exact whatever the modulation, for it commutes with all that the layer does. The spectrum stays as it
        is; the scale is kept beside it as `filter_scale`, and multiplies one that is there. The bias becomes a new
        parameter, or a first one.

        Args:
            scale: `(C_out,)`.
            shift: `(C_out,)`; None for zero.

        Raises:
            ValueError: a shape is another one, or a value would not be finite in the layer's dtype. Then nothing has
                changed.
        """
        exact = exact_dtype(self.dft_weight.device)
        bias = None if self.bias is None else self._per_filter("scale", scale).to(exact) * self.bias.to(exact)
        if shift is not None:
            shift = self._per_filter("shift", shift).to(exact)
            bias = shift if bias is None else bias + shift
        bias = None if bias is None else self._finite("bias", bias)
        self._scale_weight(scale)
        if bias is not None:
            learns = (self.dft_weight if self.bias is None else self.bias).requires_grad
            self.bias = nn.Parameter(bias, learns)

    @torch.no_grad()
    def _scale_weight(self, scale: Tensor) -> None:
        """As `scale_filters`, but for the bias, which stays as it is."""
        exact = exact_dtype(self.dft_weight.device)
        scale = self._per_filter("scale", scale).to(exact)
        if self.filter_scale is not None:
            scale = scale * self.filter_scale.to(exact)
        self.filter_scale = self._finite("scale", scale)

    def _per_filter(self, name: str, values: Tensor) -> Tensor:
        out_channels = self._kernel_shape()[0]
        if values.shape != (out_channels,):
            raise ValueError(
                f"{name} must have the shape ({out_channels},), one for each filter, not {tuple(values.shape)}"
            )
        return values.detach().to(self.dft_weight.device)

    def _finite(self, name: str, values: Tensor) -> Tensor:
        """Values in the layer's dtype."""
        kept = values.to(self.dft_weight.dtype)
        if not kept.is_meta and not bool(kept.isfinite().all()):
            raise ValueError(f"a {name} of {values.abs().max():.3g} is not finite in the layer's {kept.dtype}")
        return kept

    def expect_scale(self, *, bias: bool) -> None:
        """Make room for a scale, and perhaps for a first bias, whose values will be read."""
        out_channels = self._kernel_shape()[0]
        if self.filter_scale is None:
            self.filter_scale = self.dft_weight.new_ones(out_channels)
        if bias and self.bias is None:
            self.bias = nn.Parameter(self.dft_weight.new_zeros(out_channels), self.dft_weight.requires_grad)

"""The modulation of a stored spectrum: branches that give each sample a weight of its own, and computing with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .bands import BandModulation
from .functional import frequency_dynamic
from .modulation import Factors, GlobalModulation, LocalModulation, ZeroInit
from .onnx_fft import refuse_old_exporter
from .precision import holds_no_values, without_autocast
from .reference import Convolution, WeightShape, sample_weights
from .spectrum import frequency_groups, image_to_weight, spectra_to_image
from .stored_spectrum import StoredSpectrum
from .tracing import is_transformed


class ModulatedSpectrum(StoredSpectrum):
    """A stored spectrum, and the branches that modulate it: `KSM_Global`, `KSM_Local` and `FBM` (official names)."""

    KSM_Global: GlobalModulation | None
    KSM_Local: LocalModulation | None
    FBM: BandModulation | None

    def _is_prepared(self) -> bool:
        """True for a layer whose global branch was prepared for inference: see `fdconv.inference`."""
        return self.KSM_Global is not None and not isinstance(self.KSM_Global, GlobalModulation)

    def _modulation(self) -> list[Tensor]:
        """Tensors that are all zero where the modulation is neutral."""
        branch: Any = self.KSM_Global
        if self._is_prepared():
            found = branch.neutral_at_zero()
        else:
            found = [] if branch is None else _heads(branch)
        local = [] if self.KSM_Local is None else [self.KSM_Local.conv.weight]
        return found + local + ([] if self.FBM is None else _heads(self.FBM.freq_weight_conv_list))

    def _check_groups(self) -> None:
        """Look at the groups when they are first used, and in evaluation mode whenever somebody wrote into them.

        In training that would cost: `DistributedDataParallel` writes into all buffers at each call.

        Raises:
            RuntimeError: they are not whole, and cannot be mended.
        """
        held = self.frequency_group
        if is_transformed() or self._is_prepared() or held.is_inference():
            return
        tensor, version = self._groups_seen
        if (tensor != id(held) or (not self.training and version != held._version)) and not self._mend_groups():
            raise RuntimeError(
                f"frequency_group of {type(self).__name__}{self._static_shape()} does not hold the groups of its "
                "coefficients: it was never filled (to_empty), or is an average of several. It is the same in all "
                "copies of a layer: load it from one (load_state_dict), and average no buffers of whole numbers"
            )

    @torch.no_grad()
    def reset_modulation(self) -> None:
        """Fix the frequency groups and make the modulation neutral; the static weight stays as it is."""
        out_channels, in_channels, k_h, k_w = self._kernel_shape()
        if not holds_no_values(self.frequency_group):  # there is nothing to fill, and the sort is what takes time
            self.frequency_group.copy_(frequency_groups(out_channels * k_h, in_channels * k_w, self.config.kernel_num))
        if self.spectrum_scale is not None:
            self.spectrum_scale.fill_(self._scale()[0])
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()

    def sample_weights(self, x: Tensor) -> Tensor:
        """The weights that the samples of a batch are given, for those who want to look at them.

        Args:
            x: an input of the layer, with its batch axis.

        Returns:
            `(B, C_out, C_in/groups, k_h, k_w)`, float32 or float64; `B` is 1 where the weight depends on no sample.
        """
        context = self._context(x)
        with without_autocast(context.device):
            return sample_weights(self._spectra(), self.frequency_group, self._factors(context), self._weight_shape())

    @torch.no_grad()
    def group_kernels(self) -> Tensor:
        """What each group of frequencies gives to the static weight, which is their sum.

        Returns:
            `(n, C_out, C_in/groups, k_h, k_w)`, float32 or float64; of several spectra, their sum.
        """
        shape = self._kernel_shape()
        own = [self._spectra() * (self.frequency_group == group)[:, :, None] for group in range(self.config.kernel_num)]
        images = [spectra_to_image(one, *self._scale(), shape[1] * shape[3]) for one in own]
        return torch.stack([image_to_weight(image, shape[2:]).view(shape) for image in images])

    if TYPE_CHECKING:  # given by `fdconv.plain_calls`

        def _context(self, x: Tensor) -> Tensor:
            """The mean over positions, `(B, C_in)`, in FFT precision."""

    def _weight_shape(self) -> WeightShape:
        out_channels, in_channels, k_h, k_w = self._kernel_shape()
        activation = self.config.local_activation
        return WeightShape(out_channels, in_channels, (k_h, k_w), self.groups, *self._scale(), activation)

    def _factors(self, context: Tensor) -> Factors:
        modulated = self.KSM_Global is not None or self.KSM_Local is not None
        found = Factors() if self.KSM_Global is None else self.KSM_Global(context)
        filter_, seen, taps = found.filter, None, None
        if self.KSM_Local is not None:
            seen, taps = self.KSM_Local(context), self.KSM_Local.taps.to(context.dtype)
        if self.filter_scale is not None:
            scale = self.filter_scale.to(context.dtype).expand(context.shape[0] if modulated else 1, -1)
            filter_ = scale if filter_ is None else filter_ * scale
        # Not `_replace`, into which the compiler of torch 2.7 does not look.
        return Factors(found.kernel, found.channel, filter_, found.spatial, seen, taps)

    def _apply_weights(self, context: Tensor, x: Tensor, conv: Convolution | None) -> Tensor:
        """Convolve with the weights that the context gives each sample, or multiply without a `Convolution`."""
        refuse_old_exporter()
        self._check_groups()
        with without_autocast(context.device):
            spectra, factors = self._spectra(), self._factors(context)
        y = frequency_dynamic(
            x, spectra, self.frequency_group, factors, self._weight_shape(), conv, self.dft_weight.dtype
        )
        if self.bias is None:
            return y
        bias = self.bias.to(y.dtype)
        return y + (bias if conv is None else bias.view(-1, 1, 1))


def _heads(module: nn.Module) -> list[Tensor]:
    return [parameter for head in module.modules() if isinstance(head, ZeroInit) for parameter in head.parameters()]

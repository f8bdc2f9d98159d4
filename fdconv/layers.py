"""FDConv2d and FDLinear: drop-in layers whose weight is a function of their input.

Each is its static twin (`nn.Conv2d`, `nn.Linear`) at the start and can become more: the spectrum of its weight is cut
into frequency groups that every sample mixes anew (FDW), the weight is modulated in space (KSM), and 3x3 convolutions
weigh the frequency bands of their input (FBM). Source: FDConv (arXiv 2503.18783).
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch._prims_common import make_channels_last_2d_strides_for, make_contiguous_strides_for
from torch.nn.modules.utils import _pair

from .bands import BandModulation
from .config import FDConfig
from .cpu.workspace import is_transformed
from .filter_scale import common_factor, filter_multiple
from .functional import frequency_dynamic
from .lazy import LazyTensor, read_when_run
from .modulation import Factors, GlobalModulation, LocalModulation, ZeroInit
from .precision import exact_dtype, fft_dtype, holds_no_values, rescaled, without_autocast
from .reference import Convolution, WeightShape, sample_weights
from .spectrum import (
    EDGE,
    column_factors,
    frequency_groups,
    group_dtype,
    image_to_spectra,
    image_to_weight,
    isometric_scale,
    mended_groups,
    spectra_to_image,
    weight_to_image,
)
from .strides import as_conv_result, is_channels_last
from .weight_reads import refuse_where_lost

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PAPER = FDConfig()


class FrequencyDynamic(nn.Module):
    """What both layers share: a spectrum in place of the weight, and the modulation of it.

    State (official names): `dft_weight (r, D1, D2h, 2)`, the spectrum; `frequency_group (D1, D2h)`, the group of each
    coefficient, saved so that a checkpoint means the same everywhere; `bias`; `KSM_Global`, `KSM_Local`, `FBM`.
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
    KSM_Global: GlobalModulation | None
    KSM_Local: LocalModulation | None
    FBM: BandModulation | None
    _groups_seen: tuple[int, int] = (0, 0)
    """Which tensor, and which version of it, was last found to hold whole groups."""
    channels_last: bool = False
    """True if the static twin's weight would be channels-last in memory, as `model.to(memory_format=...)` makes it. The
    layer's own parameters stay in rows, where transforms want them, but its results follow."""

    def _static_shape(self) -> tuple[int, ...]:
        """Shape of the static twin's weight."""
        raise NotImplementedError

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

    @property
    def weight(self) -> Tensor:
        """The static weight this layer stands for: the dynamic weight at neutral modulation, in its twin's shape.

        A differentiable function of the spectrum, not a parameter; computed only if its values are used. Computing with
        it leaves the modulation out, of which a warning tells (see `fdconv.strict_weight_reads`). What is assigned to
        it, or written into it without gradients, goes into the spectrum; `requires_grad` is that of the spectrum.
        """
        if torch.compiler.is_compiling():  # what is not used, the compiler drops
            return read_when_run(self._neutral_weight(), self._modulation(), type(self).__name__)
        shape = self._static_shape()
        strides_for = make_channels_last_2d_strides_for if self.channels_last else make_contiguous_strides_for
        return LazyTensor(self, shape, strides_for(shape), self.dft_weight.requires_grad)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif not (isinstance(value, LazyTensor) and value.stands_for(self)):  # else it is the end of `weight *= 2`
            refuse_where_lost(self)
            self.adopt_weight(value)
            if isinstance(value, nn.Parameter):
                self.dft_weight.requires_grad_(value.requires_grad)

    def __prepare_scriptable__(self) -> Any:
        """Asked by `torch.jit.script` of each module, which has no words for what a dynamic layer does."""
        raise RuntimeError(
            f"torch.jit.script cannot take {type(self).__name__}, a dynamic layer: use torch.jit.trace(model, inputs), "
            "torch.export.export or torch.compile"
        )

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise AttributeError(_no_parameter("deleted"))
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`; refuses parameters that would take the part of the weight (`weight_orig`, `weight_g`)."""
        if name.partition("_")[0] == "weight":
            raise RuntimeError(_no_parameter(f"replaced by {name!r}"))
        super().register_parameter(name, param)

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

    def is_neutral(self) -> bool:
        """True if the layer computes what its static weight does: every gate is 1 for any input.

        Tensors without values (on meta, or fake) count as neutral.
        """
        return all(holds_no_values(tensor) or not tensor.any() for tensor in self._modulation())

    def _stored(self) -> Tensor:
        return self.dft_weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What a conversion does to the memory format shows on a tensor of the static weight's kind.
        probe = self.dft_weight.new_empty(2, 2, 2, 2).to(memory_format=_format(self.channels_last))
        self.channels_last = len(self._static_shape()) == 4 and is_channels_last(fn(probe))
        return super()._apply(lambda tensor: _in_rows(fn(tensor)), recurse)

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
            return weight.contiguous(memory_format=_format(self.channels_last))

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

    def adopt_weight(self, weight: Tensor) -> None:
        """What `layer.weight = weight` does: stand for another static weight, of the layer's own dtype.

        Raises:
            TypeError: it is no plain tensor, or of another dtype.
            ValueError: it has another shape.
        """
        if not isinstance(weight, Tensor):
            raise TypeError(_no_parameter(f"replaced by a {type(weight).__name__}"))
        if isinstance(weight, LazyTensor):
            weight = weight.to_be_assigned(self)
        plain = weight.detach()
        if type(plain.data) is not Tensor:
            raise TypeError(
                f"a {type(plain.data).__name__} cannot be the weight of a dynamic layer, which is computed from a "
                "spectrum: quantise or shard other layers, or keep this one plain by a recipe"
            )
        if plain.dtype != self.dft_weight.dtype:
            raise TypeError(
                f"a weight of {plain.dtype} cannot be assigned to a layer of {self.dft_weight.dtype}; convert the "
                f"layer, layer.to({plain.dtype})"
            )
        scale = None if self.is_neutral() else filter_multiple(plain, self._neutral_weight())
        if scale is None:
            self.set_weight(plain)
        else:
            self._multiply(scale)
        self.channels_last = is_channels_last(plain)

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

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Take over a plain layer's state; have a scale, and the bias it came with, if the layer that was saved had."""
        if f"{prefix}weight" in state_dict and f"{prefix}dft_weight" not in state_dict:
            error = self._expect_plain(state_dict, prefix)
            if error is not None:
                rest[-1].append(error)
                return
        if f"{prefix}dft_weight" in state_dict:
            error = self._expect_stored(state_dict, prefix)
            if error is not None:
                rest[-1].append(error)
                return
            if f"{prefix}filter_scale" in state_dict:
                self.expect_scale(bias=f"{prefix}bias" in state_dict)
            else:
                self.filter_scale = None
        elif (
            f"{prefix}bias" in state_dict
        ):  # as left by code that keeps the keys of a plain checkpoint that a model has
            warnings.warn(
                f"the state dict has the bias of the dynamic layer {prefix.rstrip('.') or type(self).__name__!r}, and "
                "neither its dft_weight nor a plain weight: the layer keeps the weight that it has. Leave the weights "
                "of a plain checkpoint in, for dynamic layers take them over",
                stacklevel=2,
            )
        groups = state_dict.get(f"{prefix}frequency_group")
        if isinstance(groups, Tensor) and groups.is_floating_point():  # an average of several, that of one number
            state_dict[f"{prefix}frequency_group"] = groups.round().to(self.frequency_group.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def factors_from_paper(self) -> dict[str, Tensor]:
        """What to multiply the paper's numbers by to have those that this layer stores, where they differ.

        Returns:
            By the name within the layer, factors in float64 that broadcast to the tensor.
        """
        if self.config.spectrum == "paper":
            return {}
        _, in_channels, _, k_w = self._kernel_shape()
        one = torch.ones((), dtype=torch.float64, device="cpu")
        found = {"dft_weight": self._paper_scale() / column_factors(in_channels * k_w, *self._scale(), one)}
        branches = {"KSM_Global": self.KSM_Global, "FBM": self.FBM}
        for part, branch in branches.items():
            for name, head in () if branch is None else branch.named_modules():
                if branch is not None and isinstance(head, ZeroInit) and not name.startswith("edges"):
                    found[f"{part}.{name}.weight"] = one / branch.speed
        return found

    @torch.no_grad()
    def _expect_stored(self, state_dict: dict[str, Tensor], prefix: str) -> str | None:
        """Put a state that is stored otherwise, isometrically or as in the paper, into this layer's form; why not.

        What the authors' code and version 0.1 saved has the paper's form, and no `spectrum_scale`.
        """
        for mine, other in (("norm", "bn"), ("bn", "norm")):
            branch = f"{prefix}KSM_Global."
            if getattr(self.KSM_Global, mine, None) is not None and f"{branch}{other}.weight" in state_dict:
                theirs = "batch" if other == "bn" else "rms"
                return (
                    f"{branch}{other}: the checkpoint's modulation has another norm than this layer: convert the model "
                    f"with norm: {theirs}, by a recipe's `with` or convert(model, norm={theirs!r}), or load the "
                    "checkpoint's own folder, which says so (fdsurgery.load)."
                )
        saved = f"{prefix}spectrum_scale" in state_dict
        if saved == (self.spectrum_scale is not None) or self._is_prepared():
            return None
        if self.config.spectrum == "paper":
            return (
                f"{prefix}spectrum_scale: the checkpoint's spectrum is stored isometrically, and this layer's as in "
                "the paper: convert the model with spectrum: isometric, the default."
            )
        for name, factor in self.factors_from_paper().items():
            if (held := state_dict.get(prefix + name)) is not None and not held.is_meta:
                state_dict[prefix + name] = rescaled(held, factor)
        assert self.spectrum_scale is not None
        state_dict[f"{prefix}spectrum_scale"] = torch.full_like(self.spectrum_scale, self._scale()[0])
        return None

    @torch.no_grad()
    def _expect_plain(self, state_dict: dict[str, Tensor], prefix: str) -> str | None:
        """Put what a neutral layer would have saved in the place of a plain weight; why not, if it cannot be."""
        weight, shape = state_dict[f"{prefix}weight"], self._static_shape()
        if tuple(weight.shape) != shape:
            return (
                f"size mismatch for {prefix}weight: the checkpoint has a static weight {tuple(weight.shape)}, and the "
                f"dynamic layer stands for one of {shape}."
            )
        if self._is_prepared():
            return f"{prefix}weight: this model was prepared for inference and cannot be loaded into."
        if self.dft_weight.is_meta and not weight.is_meta:  # as with assign=True
            with torch.random.fork_rng(devices=[]):
                self.to_empty(device=weight.device)
                self.reset_modulation()
        if not self.is_neutral():
            warnings.warn(
                f"a plain checkpoint was loaded into the dynamic layer {prefix.rstrip('.') or type(self).__name__!r}: "
                "it computes what the checkpoint's layer does, and what its modulation had learned is gone",
                stacklevel=2,
            )
        heads = {id(tensor) for tensor in self._modulation()}
        own = {name for name in ("dft_weight", "bias", "filter_scale") if name in self._parameters | self._buffers}
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name not in own:
                state_dict[prefix + name] = torch.zeros_like(tensor) if id(tensor) in heads else tensor.detach()
        state_dict[f"{prefix}dft_weight"] = self._spectra_of(state_dict.pop(f"{prefix}weight"), weight.dtype)
        return None

    def expect_scale(self, *, bias: bool) -> None:
        """Make room for a scale, and perhaps for a first bias, whose values will be read."""
        out_channels = self._kernel_shape()[0]
        if self.filter_scale is None:
            self.filter_scale = self.dft_weight.new_ones(out_channels)
        if bias and self.bias is None:
            self.bias = nn.Parameter(self.dft_weight.new_zeros(out_channels), self.dft_weight.requires_grad)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias as the static twin does, and make the modulation neutral."""
        spectra = self._spectra()
        weight = torch.empty(self._static_shape(), dtype=spectra.dtype, device=spectra.device)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.set_weight(weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, weight[0].numel()))
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_modulation()

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

    def _take_over(self, plain: nn.Conv2d | nn.Linear) -> None:
        """Stand for a plain layer: its weight, bias, `requires_grad` and mode. Called on a layer built on meta."""
        if not holds_no_values(plain.weight):
            self.to_empty(device=plain.weight.device)
        self.reset_modulation()
        self.set_weight(plain.weight)
        self.channels_last = is_channels_last(plain.weight)
        self.requires_grad_(plain.weight.requires_grad)
        if self.bias is not None and plain.bias is not None:
            with torch.no_grad():
                self.bias.copy_(plain.bias)
            self.bias.requires_grad_(plain.bias.requires_grad)
        self.train(plain.training)

    def _hand_over(self, plain: nn.Conv2d | nn.Linear) -> None:
        """Give a plain layer, built on meta, the neutral weight, bias, `requires_grad` and mode of this one."""
        plain.to_empty(device=self.dft_weight.device).to(memory_format=_format(self.channels_last))
        with torch.no_grad():
            plain.weight.copy_(self._neutral_weight())
            plain.weight.requires_grad_(self.dft_weight.requires_grad)
            if plain.bias is not None and self.bias is not None:
                plain.bias.copy_(self.bias)
                plain.bias.requires_grad_(self.bias.requires_grad)
        plain.train(self.training)

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

    def _context(self, x: Tensor) -> Tensor:
        """The mean over positions, `(B, C_in)`, in FFT precision."""
        raise NotImplementedError

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
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                "torch.onnx.export(..., dynamo=False) cannot export dynamic layers, for its operators do not suffice: "
                "use torch.onnx.export(model, args, file, dynamo=True, dynamic_shapes=({0: 'batch'},))"
            )
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

    def extra_repr(self) -> str:
        shared = "" if self.config.param_ratio == 1 else f", param_ratio={self.config.param_ratio}"
        return f"{super().extra_repr()}, kernel_num={self.config.kernel_num}{shared}"


class FDConv2d(FrequencyDynamic, nn.Conv2d):  # type: ignore[misc, override]  # `weight` is no parameter here
    """Frequency dynamic convolution in place of `nn.Conv2d`: `(B, C_in, H, W)` or `(C_in, H, W)`, any float dtype.

    Args:
        in_channels: as the other positional arguments, what `nn.Conv2d` takes.
        config: settings of the operator; the paper's by default.

    Raises:
        ValueError: for arguments that `nn.Conv2d` refuses, or `config.band_groups` that do not divide `in_channels`.
    """

    static_class: ClassVar[type[nn.Conv2d]] = nn.Conv2d
    """What `to_conv` makes."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: FDConfig = PAPER,
    ) -> None:
        nn.Module.__init__(self)
        # A twin on meta checks the arguments and holds the geometry in nn.Conv2d's own form.
        twin = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode, "meta"
        )
        for name in (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(twin, name))
        self.config = config
        self._add_spectrum(bias, device, dtype)
        k_h, k_w = self.kernel_size
        shape: tuple[int, int, int] = (in_channels, out_channels, k_h * k_w)
        depthwise = groups == in_channels == out_channels
        place: Any = {"config": config, "device": device, "dtype": dtype}
        self.KSM_Global = (
            GlobalModulation(*shape, depthwise=depthwise, linear=False, **place) if config.ksm_global else None
        )
        self.KSM_Local = LocalModulation(*shape, device=place["device"], dtype=dtype) if config.ksm_local else None
        banded = k_h == k_w and k_h in config.fbm_kernel_sizes
        self.FBM = BandModulation(in_channels, **place) if banded else None
        self.reset_parameters()

    def _static_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _paper_scale(self) -> float:
        return max(1, min(self.in_channels, self.out_channels) // 2)

    def _context(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), dtype=fft_dtype(x.dtype))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, config: FDConfig = PAPER) -> FDConv2d:
        """A layer that computes what `conv` does, with its device, dtype, mode and `requires_grad`."""
        layer = cls(**_geometry(conv), device=_to_build_on(conv.weight), dtype=conv.weight.dtype, config=config)
        layer._take_over(conv)
        return layer

    def to_conv(self) -> nn.Conv2d:
        """The plain convolution with this layer's neutral weight."""
        conv = self.static_class(**_geometry(self), device="meta", dtype=self.dft_weight.dtype)
        self._hand_over(conv)
        return conv

    def _pads(self) -> tuple[int, ...]:
        """Left, right, top and bottom."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return tuple(self._reversed_padding_repeated_twice)
        top, left = _pair(self.padding)  # asked at each call, as nn.Conv2d does: dilation is put in by some afterwards
        return left, left, top, top

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input with the padding that a convolution cannot do itself, and the one that it can."""
        left, right, top, bottom = self._pads()
        if self.padding_mode != "zeros":
            return nn.functional.pad(x, (left, right, top, bottom), mode=self.padding_mode), (0, 0)
        if (left, top) == (right, bottom):
            return x, (top, left)
        return nn.functional.pad(x, (left, right, top, bottom)), (0, 0)  # "same" with a kernel of even size

    def _check_input(self, x: Tensor) -> None:
        """Refuse what `nn.Conv2d` refuses, in its words: the modulation reads the input first, and would say others."""
        if x.dim() != 4:
            raise RuntimeError(
                f"Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: {list(x.shape)}"
            )
        if not torch.jit.is_tracing() and x.shape[1] != self.in_channels:
            raise RuntimeError(
                f"Given groups={self.groups}, weight of size {list(self._static_shape())}, expected input"
                f"{list(x.shape)} to have {self.in_channels} channels, but got {x.shape[1]} channels instead"
            )

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return _called(self, input)
        if input.dim() == 3:  # not self.forward: a subclass that prepares its input has done so by now
            return FDConv2d.forward(self, input.unsqueeze(0)).squeeze(0)
        self._check_input(input)
        x, context = input, self._context(input)
        if self.FBM is not None:
            x = self.FBM(x)
        x, padding = self._padded(x)
        y = self._apply_weights(context, x, Convolution(self.stride, padding, self.dilation, self.groups))
        return as_conv_result(y, input, self.channels_last)


# Of torch's class, whose weight is not to be quantised, for torchao to pass this one over.
class FDLinear(FrequencyDynamic, nn.modules.linear.NonDynamicallyQuantizableLinear):  # type: ignore[misc, override]
    """Frequency dynamic linear layer in place of `nn.Linear`: `(B, ..., C_in)` to `(B, ..., C_out)`, any float dtype.

    The first axis is the sample, the axes between are positions and share the sample's weight; `(C_in,)` is one sample.
    There is no local branch and no band modulation, as in the authors' linear layer.

    Args:
        in_features: as the other positional arguments, what `nn.Linear` takes.
        config: settings of the operator; the paper's by default.
    """

    groups = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: FDConfig = PAPER,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self._add_spectrum(bias, device, dtype)
        place: Any = {"config": config, "device": device, "dtype": dtype}
        self.KSM_Global = (
            GlobalModulation(in_features, out_features, 1, depthwise=False, linear=True, **place)
            if config.ksm_global
            else None
        )
        self.KSM_Local = self.FBM = None
        self.reset_parameters()

    def _static_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def _paper_scale(self) -> float:
        # alpha is m*r and the neutral attention 1, or 1/r where a softmax shares n among r*n groups.
        ratio = 1 if self.config.kernel_activation == "softmax" else self.config.param_ratio
        return max(1, min(self.in_features, self.out_features) // 2) * ratio

    def _context(self, x: Tensor) -> Tensor:
        positions = tuple(range(1, x.dim() - 1))
        return x.mean(positions, dtype=fft_dtype(x.dtype)) if positions else x.to(fft_dtype(x.dtype))

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: FDConfig = PAPER) -> FDLinear:
        """A layer that computes what `linear` does, with its device, dtype, mode and `requires_grad`."""
        weight = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device=_to_build_on(weight),
            dtype=weight.dtype,
            config=config,
        )
        layer._take_over(linear)
        return layer

    def to_linear(self) -> nn.Linear:
        """The plain linear layer with this layer's neutral weight."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.dft_weight.dtype
        )
        self._hand_over(linear)
        return linear

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):
            return _called(self, input)
        if input.dim() == 1:
            return FDLinear.forward(self, input.unsqueeze(0)).squeeze(0)
        return self._apply_weights(self._context(input), input, None)


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {**{name: getattr(conv, name) for name in names}, "bias": conv.bias is not None}


def _to_build_on(weight: Tensor) -> torch.device:
    """Where to build a layer that is to stand for this weight: on meta, for what is drawn there costs nothing."""
    return weight.device if holds_no_values(weight) else torch.device("meta")


def _called(layer: nn.Module, input: fx.Proxy) -> Any:
    """What `torch.fx` writes for a call of a layer of torch's own: the layer is a leaf of the graph, for any tracer."""
    tracer: Any = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), {})


def _no_parameter(done: str) -> str:
    return (
        f"the weight of a dynamic layer is computed from its dft_weight, and cannot be {done}: call "
        "layer.set_weight(tensor), or put the plain layer back first (to_conv, to_linear, fdsurgery.restore)"
    )


def _heads(module: nn.Module) -> list[Tensor]:
    return [parameter for head in module.modules() if isinstance(head, ZeroInit) for parameter in head.parameters()]


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _in_rows(tensor: Tensor) -> Tensor:
    """A parameter as it lies at the start, whatever memory format the model was moved to."""
    in_rows = tensor.layout != torch.strided or tensor.stride() == make_contiguous_strides_for(tensor.shape)
    return tensor if in_rows else torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)

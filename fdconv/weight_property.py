"""`weight` of a dynamic layer: no parameter, but read, assigned and written to as a plain layer's is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import make_channels_last_2d_strides_for, make_contiguous_strides_for

from .filter_scale import common_factor, filter_multiple
from .lazy import LazyTensor, read_when_run
from .modulated_spectrum import ModulatedSpectrum
from .strides import is_channels_last
from .weight_reads import refuse_where_lost


class WithStaticWeight(ModulatedSpectrum):
    """A modulated spectrum that gives the static weight it stands for, and takes over what is assigned to it."""

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


def _no_parameter(done: str) -> str:
    return (
        f"the weight of a dynamic layer is computed from its dft_weight, and cannot be {done}: call "
        "layer.set_weight(tensor), or put the plain layer back first (to_conv, to_linear, fdsurgery.restore)"
    )

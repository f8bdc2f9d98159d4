"""`weight` of a dynamic layer: no parameter, but read, assigned and written to as a plain layer's is."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._prims_common import make_channels_last_2d_strides_for, make_contiguous_strides_for

from .filter_scale import filter_multiple
from .lazy import LazyTensor, read_when_run
from .precision import holds_no_values
from .strides import is_channels_last, memory_format
from .weight_reads import refuse_where_lost


class WithStaticWeight(nn.Module):
    """A dynamic layer that gives the static weight it stands for, and takes over what is assigned to it."""

    stored_name: str
    """Name of the parameter that the weight is computed from, whose dtype, device and `requires_grad` it has."""
    channels_last: bool = False
    """True if the static twin's weight would be channels-last in memory, as `model.to(memory_format=...)` makes it. The
    layer's own parameters stay in rows, but its results follow."""

    def _stored(self) -> nn.Parameter:
        """The parameter that the weight is computed from."""
        return self._parameters[self.stored_name]  # type: ignore[return-value]

    if TYPE_CHECKING:  # given by `fdconv.plain_calls`, which comes later in the order of resolution

        def _static_shape(self) -> tuple[int, ...]:
            """Shape of the static twin's weight."""

    def _neutral_weight(self) -> Tensor:
        """The static weight, computed."""
        raise NotImplementedError

    def _modulation(self) -> list[Tensor]:
        """Tensors that are all zero where the modulation is neutral."""
        raise NotImplementedError

    def set_weight(self, weight: Tensor) -> None:
        """Make the layer stand for another static weight, of its twin's shape; the modulation stays as it is.

        Raises:
            ValueError: the weight has another shape, or values that the layer cannot hold.
        """
        raise NotImplementedError

    def _multiply(self, scale: Tensor) -> None:
        """Multiply the weight, static and dynamic, by a factor of each filter; NaN is one that is not known."""
        raise NotImplementedError

    def is_neutral(self) -> bool:
        """True if the layer computes what its static weight does: every gate is 1 for any input.

        Tensors without values (on meta, or fake) count as neutral.
        """
        return all(holds_no_values(tensor) or not tensor.any() for tensor in self._modulation())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What a conversion does to the memory format shows on a tensor of the static weight's kind.
        probe = self._stored().new_empty(2, 2, 2, 2).to(memory_format=memory_format(self.channels_last))
        self.channels_last = len(self._static_shape()) == 4 and is_channels_last(fn(probe))
        return super()._apply(lambda tensor: _with_four_axes(fn, tensor), recurse)

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
        return LazyTensor(self, shape, strides_for(shape), self._stored().requires_grad)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif not (isinstance(value, LazyTensor) and value.stands_for(self)):  # else it is the end of `weight *= 2`
            refuse_where_lost(self)
            self.adopt_weight(value)
            if isinstance(value, nn.Parameter):
                self._stored().requires_grad_(value.requires_grad)

    def _plain_misfit(self, weight: Tensor, prefix: str) -> str | None:
        """Why the weight of a plain layer's state dict cannot be this layer's, in words; None if it can."""
        shape = self._static_shape()
        if tuple(weight.shape) == shape:
            return None
        return (
            f"size mismatch for {prefix}weight: the checkpoint has a static weight {tuple(weight.shape)}, and the "
            f"dynamic layer stands for one of {shape}."
        )

    def _tell_what_is_lost(self, prefix: str) -> None:
        """Warn where a plain layer's state takes the place of what the modulation had learned."""
        if not self.is_neutral():
            warnings.warn(
                f"a plain checkpoint was loaded into the dynamic layer {prefix.rstrip('.') or type(self).__name__!r}: "
                "it computes what the checkpoint's layer does, and what its modulation had learned is gone",
                stacklevel=3,
            )

    def __prepare_scriptable__(self) -> Any:
        """Asked by `torch.jit.script` of each module, which has no words for what a dynamic layer does."""
        raise RuntimeError(
            f"torch.jit.script cannot take {type(self).__name__}, a dynamic layer: use torch.jit.trace(model, inputs), "
            "torch.export.export or torch.compile"
        )

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            raise AttributeError(_no_parameter(self, "deleted"))
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`; refuses parameters that would take the part of the weight (`weight_orig`, `weight_g`)."""
        if name.partition("_")[0] == "weight":
            raise RuntimeError(_no_parameter(self, f"replaced by {name!r}"))
        super().register_parameter(name, param)

    def adopt_weight(self, weight: Tensor) -> None:
        """What `layer.weight = weight` does: stand for another static weight, of the layer's own dtype.

        Raises:
            TypeError: it is no plain tensor, or of another dtype.
            ValueError: it has another shape.
        """
        if not isinstance(weight, Tensor):
            raise TypeError(_no_parameter(self, f"replaced by a {type(weight).__name__}"))
        if isinstance(weight, LazyTensor):
            weight = weight.to_be_assigned(self)
        plain = weight.detach()
        if type(plain.data) is not Tensor:
            raise TypeError(
                f"a {type(plain.data).__name__} cannot be the weight of a dynamic layer, which is computed from other "
                "parameters: quantise or shard other layers, or keep this one plain by a recipe"
            )
        if plain.dtype != self._stored().dtype:
            raise TypeError(
                f"a weight of {plain.dtype} cannot be assigned to a layer of {self._stored().dtype}; convert the "
                f"layer, layer.to({plain.dtype})"
            )
        scale = None if self.is_neutral() else filter_multiple(plain, self._neutral_weight())
        if scale is None:
            self.set_weight(plain)
        else:
            self._multiply(scale)
        self.channels_last = is_channels_last(plain)


def in_rows(tensor: Tensor) -> Tensor:
    """A parameter as it lies at the start, whatever memory format the model was moved to."""
    as_it_lay = tensor.layout != torch.strided or tensor.stride() == make_contiguous_strides_for(tensor.shape)
    return tensor if as_it_lay else torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)


def _with_four_axes(fn: Any, tensor: Tensor) -> Tensor:
    """What a conversion makes of a tensor, which lies in rows; it may be to a memory format that has four axes."""
    if tensor.dim() <= 4:
        return in_rows(fn(tensor))
    return in_rows(fn(tensor.flatten(0, tensor.dim() - 4))).view(tensor.shape)


def _no_parameter(layer: WithStaticWeight, done: str) -> str:
    return (
        f"the weight of a dynamic layer is computed from its {layer.stored_name}, and cannot be {done}: call "
        "layer.set_weight(tensor), or put the plain layer back first (to_conv, to_linear, fdsurgery.restore)"
    )

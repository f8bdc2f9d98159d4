"""The tensor behind a dynamic layer's `weight`: metadata now, values when they are used, and what is written is kept.

Nothing of a layer *is* its static weight, which is computed from the spectrum at neutral modulation. So whoever
computes with `layer.weight` leaves the modulation out. That is told: by a warning for each place that reads, by an
error within `strict_weight_reads`, and by an error in places whose result would replace the layer. What is written into
the weight goes into the spectrum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import get_default_nowrap_functions
from torch.utils._pytree import tree_map_only

from .weight_reads import NeutralWeightWarning, Owner, WeightReadError, is_strict, reader, refuse_optimizer, short, tell


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


def _setter(name: str) -> Any:
    return getattr(Tensor, name).__set__


def _named(holder: Any, names: str) -> Iterator[Any]:
    """Those of the named functions that this version of torch has."""
    return (getattr(holder, name) for name in names.split() if hasattr(holder, name))


_METADATA: set[Any] = {
    *get_default_nowrap_functions(),
    *(
        attribute.__get__
        for attribute in _named(
            Tensor,
            "shape dtype device layout ndim is_meta is_cuda is_cpu is_sparse is_quantized itemsize nbytes "
            "requires_grad is_leaf names is_mps is_nested is_sparse_csr is_xla is_mkldnn",
        )
    ),
    *_named(
        Tensor,
        "size dim numel element_size is_floating_point is_complex is_signed is_conj get_device __len__ stride "
        "is_contiguous ndimension nelement storage_offset dim_order is_inference has_names __hash__",
    ),
} - {_getter("grad"), _getter("_base"), _getter("_grad")}

_SAME_IN_TORCH = (
    "reshape flatten unflatten ravel t transpose permute movedim moveaxis swapaxes swapdims squeeze unsqueeze select "
    "narrow diagonal detach adjoint chunk split tensor_split hsplit vsplit dsplit unbind unflatten as_strided positive"
)
_VIEWS = {
    *_named(torch, _SAME_IN_TORCH),
    *_named(
        Tensor,
        _SAME_IN_TORCH
        + " view unfold view_as reshape_as expand expand_as contiguous split_with_sizes __getitem__ float "
        "double half bfloat16 to cpu type type_as",
    ),
    *map(_getter, ("data", "T", "mT", "H", "mH")),
}
"""What may give another look, or several, at the same memory, into which somebody may write."""

_CONVERSIONS = {*_named(Tensor, "float double half bfloat16 to cpu type type_as")}
_IS_LEAF = _getter("is_leaf")

_OPERATORS = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()}
_STRUCTURAL = set(
    "resize_ resize_as_ set_ t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_ as_strided_ rename_ detach_".split()
)
_HARMLESS = {"requires_grad_", "share_memory_"}
_OVERWRITES = set(
    "copy_ zero_ fill_ normal_ uniform_ exponential_ geometric_ log_normal_ cauchy_ random_ bernoulli_ mul_ div_ "
    "multiply_ divide_ neg_ __imul__ __itruediv__".split()
)
"""Writes whose meaning does not depend on what the static weight was, or that scale it and with it all weights."""

_HOOKS = {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad}
_MEMORY = {
    Tensor.data_ptr,
    Tensor.untyped_storage,
    Tensor.storage,
    Tensor.__dlpack__,
    _getter("__cuda_array_interface__"),
}


class LazyTensor(torch.Tensor):
    """Stands for a layer's static weight, or a view of it, which is computed at each use of its values.

    Code that only asks for the metadata of a layer's weight (`layer.weight.dtype`, as many models do in every forward)
    costs nothing. What is written into it, or into a view of it, goes to the layer.
    """

    _owner: Owner
    _steps: tuple[Callable[[Tensor], Tensor], ...]
    """What makes the view of the weight."""

    @staticmethod
    def __new__(
        cls,
        owner: Owner,
        shape: Sequence[int],
        strides: Sequence[int],
        requires_grad: bool,
        steps: tuple[Callable[[Tensor], Tensor], ...] = (),
    ) -> LazyTensor:
        stored = owner._stored()
        lazy = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=strides, dtype=stored.dtype, device=stored.device, requires_grad=requires_grad
        )
        lazy._owner, lazy._steps = owner, steps
        return lazy

    @property
    def _is_hf_initialized(self) -> bool:
        """Told by transformers, so that it does not draw again what it has read."""
        return getattr(self._owner._stored(), "_is_hf_initialized", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        self._owner._stored()._is_hf_initialized = value  # type: ignore[attr-defined]

    def _values(self) -> Tensor:
        tell(self._owner)
        return self._of(self._owner._neutral_weight())

    def _of(self, weight: Tensor) -> Tensor:
        for step in self._steps:
            weight = step(weight)
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA and func != _IS_LEAF:
            return super().__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        if isinstance(target, LazyTensor):
            if func in (Tensor.requires_grad_, _setter("requires_grad")):
                return target._set_requires_grad(*args[1:], **kwargs)
            if func == _setter("data"):
                return target._assign(args[1])
            if func in (_getter("grad"), _setter("grad")):
                return target._gradient(*args[1:])
            if func in _HOOKS:
                raise RuntimeError(
                    f"{name}: the weight of {short(target._owner)} is computed, and has no gradient of its own; hang "
                    f"the hook onto the layer's {target._owner.stored_name}"
                )
            if func in _MEMORY:
                raise RuntimeError(
                    f"the weight of {short(target._owner)} is computed, and has no memory of its own; "
                    "layer.weight.detach().clone() has"
                )
            if func is Tensor.__iter__:
                return iter(target.unbind())
            if func == _IS_LEAF:
                refuse_optimizer(target._owner)
                return super().__torch_function__(func, types, args, kwargs)
            if func in _VIEWS and (view := target._view(func, args, kwargs)) is not None:
                return view
        if _writes(name) and name not in _HARMLESS:
            targets = [target] if isinstance(target, Tensor) else list(target or ())
            for one in targets:
                if isinstance(one, LazyTensor):
                    one._check_writable(func, name)
            if len(targets) == 1 and isinstance(targets[0], LazyTensor):
                return targets[0]._write(func, name, args, kwargs)
            if any(isinstance(one, LazyTensor) for one in targets):
                return _write_all(func, name, targets, args, kwargs)
        if isinstance(kwargs.get("out"), LazyTensor):
            raise RuntimeError("out= cannot be the weight of a dynamic layer; call layer.set_weight with the result")
        args, kwargs = _computed((args, kwargs))
        result = func(*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__):
            result.flags.writeable = False  # what is written there would be lost
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only from code that goes past __torch_function__, such as C++ extensions.
        if func._schema.is_mutable and args and isinstance(args[0], LazyTensor):
            raise RuntimeError(f"{func}: the weight of a dynamic layer is computed; call layer.set_weight")
        args, kwargs = tree_map_only(LazyTensor, lambda lazy: lazy._values().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def stands_for(self, owner: Owner) -> bool:
        """True for the whole weight of this layer, none of its views."""
        return self._owner is owner and not self._steps

    def _set_requires_grad(self, flag: bool = True, **kwargs: bool) -> LazyTensor:
        if not self._steps:  # a view or a detached weight is a tensor of its own in this
            self._owner._stored().requires_grad_(kwargs.get("requires_grad", flag))
        return self

    def _gradient(self, *assigned: Tensor | None) -> None:
        stored = self._owner._stored()
        if assigned and assigned[0] is not None:
            raise RuntimeError(
                f"the weight of a dynamic layer is computed: its gradient is that of {self._owner.stored_name}"
            )
        if assigned:
            stored.grad = None
        elif stored.grad is not None:
            frame = reader()
            warnings.warn_explicit(
                f"the weight of {short(self._owner)} is computed, and has no gradient of its own; see "
                f"{self._owner.stored_name}.grad",
                NeutralWeightWarning,
                frame.f_code.co_filename,
                frame.f_lineno,
                registry=frame.f_globals.setdefault("__warningregistry__", {}),
            )

    def _assign(self, value: Tensor) -> None:
        if self._steps:
            raise RuntimeError("the data of a view of a dynamic layer's weight cannot be exchanged; assign to weight")
        tell(self._owner, computing=False)
        if isinstance(value, LazyTensor) and value._owner is not self._owner:
            value = value._values()
        self._owner.adopt_weight(value)

    def to_be_assigned(self, owner: Owner) -> Tensor:
        """The values, for a layer that is to stand for them.

        Raises:
            TypeError: this is the weight of another layer itself, which assigning would tie to this one.
        """
        if self._owner is owner:  # then it is what it was, or what was written into it
            return self._of(owner._neutral_weight())
        if not self._steps:
            raise TypeError(
                "the weight of a dynamic layer cannot be tied to that of another one, for it is computed; assign a "
                "copy of its values: nn.Parameter(other.weight.detach().clone())"
            )
        return self._values()

    def _view(self, func: Any, args: Any, kwargs: Any) -> LazyTensor | tuple[LazyTensor, ...] | None:
        """The view that a function gives, or views, not computed yet; None where it gives none."""
        like = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        rest = args[1:]

        def called(weight: Tensor) -> Any:
            return func(weight, *rest, **kwargs) if args else func(**{**kwargs, "input": weight})

        if (
            func in _CONVERSIONS
        ):  # on meta they would tell nothing: what stays on its device and of its dtype is the same
            given = torch.empty(0, dtype=self.dtype, device=self.device)
            return self if called(given) is given else None
        try:
            view = called(like)
        except Exception:  # then the function itself tells what is wrong, on values
            return None
        if view is like:
            return self
        detached = func in (Tensor.detach, torch.detach, _getter("data"))
        requires_grad = self.requires_grad and not detached

        def lazy(one: Any, step: Callable[[Tensor], Tensor]) -> LazyTensor | None:
            if not isinstance(one, Tensor) or not (one._is_view() or detached):
                return None
            return LazyTensor(self._owner, one.shape, one.stride(), requires_grad, (*self._steps, step))

        if not isinstance(view, (tuple, list)):
            return lazy(view, called)
        several = [lazy(one, partial(_one_of, called, index)) for index, one in enumerate(view)]
        found = tuple(one for one in several if one is not None)
        return found if len(found) == len(view) else None

    def _check_writable(self, func: Any, name: str) -> None:
        if name in _STRUCTURAL:
            raise RuntimeError(f"{name}: the shape of a dynamic layer's weight cannot be changed")
        initialises = getattr(func, "__module__", None) == "torch.nn.init"  # which turns gradients off
        if torch.is_grad_enabled() and self.requires_grad and not initialises:
            raise RuntimeError(
                f"{name}: the weight of a dynamic layer that requires grad is changed in place; do so within "
                "torch.no_grad(), as with a leaf variable"
            )
        tell(self._owner, computing=name not in _OVERWRITES and not initialises)

    @torch.no_grad()
    def _write(self, func: Any, name: str, args: Any, kwargs: Any) -> LazyTensor:
        whole = self._owner._neutral_weight().detach().clone()
        part = self._of(whole)
        given = tree_map_only(LazyTensor, lambda lazy: part if lazy is self else lazy._values(), (args, kwargs))
        func(*given[0], **given[1])
        self._owner.adopt_weight(whole)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._values().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._values().detach().__reduce_ex__(protocol)


def _one_of(several: Callable[[Tensor], Sequence[Tensor]], index: int, weight: Tensor) -> Tensor:
    return several(weight)[index]


def _computed(given: Any) -> Any:
    return tree_map_only(LazyTensor, lambda lazy: lazy._values(), given)


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or name in _OPERATORS


@torch.no_grad()
def _write_all(func: Any, name: str, targets: list[Any], args: Any, kwargs: Any) -> None:
    """Functions that write into a list of tensors, such as `torch._foreach_mul_`."""
    lazies = [one for one in targets if isinstance(one, LazyTensor)]
    wholes = {id(one): one._owner._neutral_weight().detach().clone() for one in lazies}
    parts = [one._of(wholes[id(one)]) if isinstance(one, LazyTensor) else one for one in targets]
    rest, kwargs = _computed((args[1:], kwargs))
    func(parts, *rest, **kwargs)
    for one in lazies:
        one._owner.adopt_weight(wholes[id(one)])


@torch.library.custom_op("fdconv::read_when_run", mutates_args=())
def _read_when_run(weight: Tensor, modulation: list[Tensor], layer: str) -> Tensor:
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()  # where no value can be looked at
    if not capturing and any(bool(tensor.any()) for tensor in modulation):
        message = (
            f"compiled code computes with the weight of a dynamic layer, {layer}({', '.join(map(str, weight.shape))}), "
            "which is its static weight: the layer's modulation, which is not neutral, is left out"
        )
        if is_strict():
            raise WeightReadError(message)
        warnings.warn(message, NeutralWeightWarning, stacklevel=2)
    return weight.clone()


@_read_when_run.register_fake
def _(weight: Tensor, modulation: list[Tensor], layer: str) -> Tensor:
    return torch.empty_like(weight)


def _read_when_run_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, [None] * ctx.count, None


def _read_when_run_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count = len(inputs[1])


_read_when_run.register_autograd(_read_when_run_backward, setup_context=_read_when_run_setup)


def read_when_run(weight: Tensor, modulation: list[Tensor], layer: str) -> Tensor:
    """The weight in a graph that is being traced: what the compiled code does with its values is told when it runs.

    Args:
        weight: the static weight of a layer.
        modulation: tensors that are all zero where the layer's modulation is neutral.
        layer: what to call the layer.
    """
    result: Tensor = _read_when_run(weight, modulation, layer)
    return result

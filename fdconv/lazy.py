"""A tensor whose values are computed when somebody needs them, and whose shape, dtype and device are known before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_METADATA: set[Any] = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__,  # type: ignore[attr-defined]
    Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    Tensor.is_quantized.__get__,  # type: ignore[attr-defined]
    Tensor.itemsize.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.get_device,
    Tensor.__len__,
}

_ASSIGNMENT = Tensor.data.__set__  # type: ignore[attr-defined]
"""`weight.data = x`, and the end of `weight.data += x`: with it, merged adapters would vanish without a word."""


class LazyTensor(torch.Tensor):
    """Stands for `compute()`, which runs at the first use of its values and again at every later one.

    Code that only asks for the metadata of a layer's weight (`layer.weight.dtype`, as many models do in every forward)
    costs nothing. Writing into it (`nn.init.normal_(layer.weight)`) changes a temporary and does no harm; assigning to
    its `data` raises.
    """

    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], shape: torch.Size, like: Tensor) -> LazyTensor:
        lazy = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        lazy._compute = compute
        return lazy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func == _ASSIGNMENT:
            raise RuntimeError(
                "the weight of a dynamic layer is computed from its spectrum: what is assigned would be lost; "
                "call the layer's set_weight"
            )
        args, kwargs = tree_map_only(LazyTensor, lambda lazy: lazy._compute(), (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached only from code that goes past __torch_function__, such as C++ extensions.
        args, kwargs = tree_map_only(LazyTensor, lambda lazy: lazy._compute().detach(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._compute().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._compute().detach().__reduce_ex__(protocol)

"""Who may read the neutral weight of a dynamic layer, who is told, and who is refused."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn, Protocol

from torch import Tensor


class Owner(Protocol):
    """A layer whose weight is computed."""

    @property
    def stored_name(self) -> str:
        """Name of the parameter that the weight is computed from."""

    def is_neutral(self) -> bool:
        """True if the layer computes what its static weight does."""

    def adopt_weight(self, weight: Tensor) -> None:
        """Stand for another static weight."""

    def _neutral_weight(self) -> Tensor: ...

    def _static_shape(self) -> tuple[int, ...]: ...

    def _stored(self) -> Tensor:
        """The parameter that the weight is computed from."""


class NeutralWeightWarning(UserWarning):
    """The static weight of a dynamic layer was computed with, though the layer's modulation is not neutral.

    Examples:
        >>> import torch, warnings
        >>> from fdconv import FDLinear
        >>> layer = FDLinear(8, 8)
        >>> _ = torch.nn.init.ones_(layer.KSM_Global.filter_fc.bias)  # as training does
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     y = layer.weight @ torch.ones(8)
        >>> caught[0].category.__name__
        'NeutralWeightWarning'
    """


class WeightReadError(RuntimeError):
    """The static weight of a dynamic layer was about to be computed with where that would give wrong results.

    Examples:
        >>> import torch
        >>> from fdconv import FDLinear
        >>> torch.optim.SGD([FDLinear(8, 8).weight], lr=0.1)
        Traceback (most recent call last):
            ...
        fdconv.weight_reads.WeightReadError: the weight of a dynamic layer, FDLinear(8, 8), is computed, and ...
    """


_strict = 0


@contextmanager
def strict_weight_reads() -> Iterator[None]:
    """Within this context, code that computes with the `weight` of a dynamic layer raises instead of warning.

    `weight` is the layer's static weight, without its modulation. Metadata (`weight.shape`, `weight.dtype`) may be
    read, and so may the weight of layers whose modulation is neutral.

    Raises:
        WeightReadError: from the code that reads, with the place and the remedy.

    Examples:
        >>> import torch
        >>> from fdconv import FDLinear, strict_weight_reads
        >>> layer = FDLinear(8, 8)
        >>> _ = torch.nn.init.ones_(layer.KSM_Global.filter_fc.bias)  # as training does
        >>> with strict_weight_reads():
        ...     layer.weight @ torch.ones(8)
        Traceback (most recent call last):
            ...
        fdconv.weight_reads.WeightReadError: ... computes with the weight of a dynamic layer, FDLinear(8, 8), ...
    """
    global _strict
    _strict += 1
    try:
        yield
    finally:
        _strict -= 1


def is_strict() -> bool:
    """True within `strict_weight_reads`."""
    return _strict > 0


class _Refused(NamedTuple):
    """Code that may not read the weight at all, for what it makes of it would take the layer's place or be lost."""

    file: str
    """End of the file's path, with forward slashes; empty for any file."""
    function: str
    """Regular expression for the whole name of a function that is running."""
    remedy: str


_REFUSED = (
    _Refused(
        "torch/nn/utils/prune.py",
        ".*",
        "pruning masks a weight, and this one is computed for each sample; prune other layers, or keep this one plain "
        "by a recipe",
    ),
    *(
        _Refused(
            f"torch/nn/utils/{name}.py",
            ".*",
            "this normalises a weight before each call, and this one is computed for each sample; keep the layer plain "
            "by a recipe",
        )
        for name in ("weight_norm", "spectral_norm", "parametrize", "parametrizations")
    ),
    _Refused(
        "torch/nn/utils/_named_member_accessor.py",
        ".*",
        "functional_call puts a tensor there for one call, and a static weight would stay; give it the layer's "
        "own parameters, or put the plain layer back first (fdsurgery.restore)",
    ),
    _Refused(
        "torch/utils/mkldnn.py",
        ".*",
        "it would put a plain layer in this one's place, without its modulation. Models with dynamic layers run on "
        "CPUs as they are; see fdsurgery.compile_for_inference",
    ),
)


_FOLDS = _Refused(
    "",
    "(.*_)?fuse(_.*)?|.*(reparam|deploy|get_equivalent|get_kernel_bias).*|"
    ".*((merge|absorb|fold|fuse)_(\\w+_)?(bn|batch|norm)|bn_(merg|absorb|fold|fus)).*",
    "it would put a plain layer in this one's place, without its modulation. Norms behind dynamic layers are folded by "
    "fdsurgery.fuse_norms(model); models that reparameterise are to do so before they are converted",
)
"""Code that folds norms or merges branches, which is recognised by the name of the function that reads."""


_QUIET = (
    ("torch/nn/init.py", ".*"),  # which reads what it is about to overwrite
    ("torch/nn/utils/fusion.py", "fuse_(conv|linear)_bn_weights"),  # whose result is assigned: a scale of each filter
    ("torch/nn/utils/memory_format.py", "convert_conv.*"),  # whose result is assigned: the same values
)
"""Code that may read the weight whatever the modulation."""


_PLUMBING = (
    "torch/overrides.py",
    "torch/_tensor.py",
    "torch/_tensor_str.py",
    "torch/functional.py",
    "torch/nn/functional.py",
    "torch/utils/_contextlib.py",
    "torch/utils/_device.py",
    "torch/utils/_pytree.py",
)
"""Files of torch that stand between a reader and the tensor."""


_HERE = str(Path(__file__).parent)


def _path(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace("\\", "/")


def reader() -> FrameType:
    """The code that reads, outside of this package and of what torch puts between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_code.co_filename.startswith(_HERE) or _path(frame).endswith(_PLUMBING)):
        frame = frame.f_back
    return frame


def _refusal(frame: FrameType | None) -> tuple[FrameType, _Refused] | None:
    """Where, among the functions that are running, the weight may not be read, and why."""
    if frame is not None and re.fullmatch(_FOLDS.function, frame.f_code.co_name):
        return frame, _FOLDS
    return _listed(frame)


def _listed(frame: FrameType | None) -> tuple[FrameType, _Refused] | None:
    while frame is not None:
        for place in _REFUSED:
            if _path(frame).endswith(place.file) and re.fullmatch(place.function, frame.f_code.co_name):
                return frame, place
        frame = frame.f_back
    return None


def _refuse(owner: Owner, where: FrameType, place: _Refused) -> NoReturn:
    raise WeightReadError(
        f"the weight of a dynamic layer, {short(owner)}, cannot be used by {where.f_code.co_name} ({_place(where)}): "
        f"{place.remedy}"
    )


def refuse_where_lost(owner: Owner) -> None:
    """Raise `WeightReadError` where the code that assigns a weight means something else by it."""
    listed = _listed(reader())
    if listed is not None:
        _refuse(owner, *listed)


def refuse_optimizer(owner: Owner) -> None:
    """Raise where an optimizer is given the weight, whose gradient would never come."""
    frame = reader()
    if _path(frame).endswith("torch/optim/optimizer.py"):
        raise WeightReadError(
            f"the weight of a dynamic layer, {short(owner)}, is computed, and an optimizer cannot train it: give the "
            f"optimizer layer.{owner.stored_name} and the other parameters of the layer, or model.parameters()"
        )


def tell(owner: Owner, computing: bool = True) -> None:
    """Refuse a read, or warn of it, where that is due."""
    frame = reader()
    quiet = any(_path(frame).endswith(file) and re.fullmatch(name, frame.f_code.co_name) for file, name in _QUIET)
    refused = None if quiet else _refusal(frame)
    if refused is not None:
        _refuse(owner, *refused)
    if not computing or quiet or owner.is_neutral():
        return
    message = (
        f"{_place(frame)} computes with the weight of a dynamic layer, {short(owner)}, which is its static weight: "
        "the layer's modulation, which is not neutral, is left out. Call the layer, or layer.sample_weights(x) for the "
        "weights that samples are given"
    )
    if is_strict():
        raise WeightReadError(message)
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__")
    warnings.warn_explicit(message, NeutralWeightWarning, frame.f_code.co_filename, frame.f_lineno, module, registry)


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def short(owner: Owner) -> str:
    """Class and shape of a layer."""
    return f"{type(owner).__name__}({', '.join(map(str, owner._static_shape()))})"

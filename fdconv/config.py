"""Every knob of the operator, once, with the paper's defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from typing import Any, Literal

Gate = Literal["sigmoid", "tanh"]
KernelGate = Literal["sigmoid", "tanh", "softmax"]


@dataclass(frozen=True)
class FDConfig:
    """Settings of `FDConv2d` and `FDLinear` (FDConv, CVPR 2025, arXiv 2503.18783; the defaults are the paper's).

    Raises `ValueError`, naming the field, for a value outside its range.

    Examples:
        >>> from fdconv import FDConfig
        >>> FDConfig(kernel_num=16).to_dict()["kernel_num"]
        16
        >>> FDConfig(kernel_num=0)
        Traceback (most recent call last):
            ...
        ValueError: FDConfig.kernel_num must be a whole number from 1, not 0
    """

    kernel_num: int = 64
    """Number `n` of disjoint frequency groups of the weight spectrum (section 3.2)."""
    param_ratio: int = 1
    """Number `r` of spectra that share the groups; each has its own kernel attention."""
    spectrum: Literal["isometric", "paper"] = "isometric"
    """How the layer's numbers are stored, which decides how fast an optimizer moves what they stand for. `isometric`:
    the weight learns exactly as a plain layer's does, and every gate at one speed whatever the width. `paper`: the
    scales of the authors' code and of version 0.1."""

    ksm_global: bool = True
    """Channel, filter, spatial and kernel attention from the pooled input (KSM, global branch, section 3.3)."""
    ksm_local: bool = True
    """A gate for every single weight from the pooled input (KSM, local branch). Convolutions only, as in the authors'
    linear layer."""
    reduction: float = 1 / 16
    """Width of the attention bottleneck, as a share of `in_channels`."""
    min_attention_channels: int = 16
    """Least width of the attention bottleneck."""
    norm: Literal["auto", "batch", "rms"] = "auto"
    """Norm of the bottleneck. `rms` needs no batch. `batch` is the paper's for convolutions; over few samples it is
    mostly noise, so it wants 32 and more of them. `auto`: `rms`, but with the `paper`'s spectrum as the paper has it,
    BatchNorm for convolutions and RMSNorm for linear layers."""
    global_activation: Gate = "sigmoid"
    """Gate of the channel, filter and spatial heads: `2*sigmoid(z/T)` or `1+tanh(z/T)`."""
    kernel_activation: KernelGate = "sigmoid"
    """Gate of the kernel head; `softmax` runs over all groups."""
    local_activation: Gate = "sigmoid"
    """Gate of the local branch."""
    temperature: float = 1.0
    """`T` of the channel, filter and spatial heads."""
    kernel_temperature: float = 1.0
    """`T` of the kernel head."""

    fbm_kernel_sizes: tuple[int, ...] = (3,)
    """Square kernel sizes whose convolutions get frequency band modulation (FBM, section 3.4); `()` switches it off."""
    bands: tuple[int, ...] = (2, 4, 8)
    """Low-pass bands, ascending: band `k` keeps the frequencies up to `1/(2k)` cycles a pixel on both axes."""
    band_mask: Literal["exact", "interpolated"] = "exact"
    """`exact` cuts at the frequency itself; `interpolated` stretches a 64x64 mask, as official checkpoints expect."""
    band_activation: KernelGate = "sigmoid"
    """Gate of the band maps; `softmax` runs over the maps."""
    band_lowfreq: bool = False
    """Give the lowest band a map too."""
    band_groups: int = 1
    """Number of channel groups that have maps of their own."""
    band_edges: Literal["fixed", "learned", "dynamic"] = "fixed"
    """`learned` makes the bands' edges parameters, `dynamic` scales them for each sample from its pooled input as well;
    edges that move are soft. Not in the paper, which leaves it open."""
    band_softness: float = 1 / 32
    """Width of a soft edge, in cycles a pixel: a frequency that far below the edge is kept to 73 %."""

    def __post_init__(self) -> None:
        for field in ("kernel_num", "param_ratio", "min_attention_channels", "band_groups"):
            value = getattr(self, field)
            _require(_is_whole(value) and value >= 1, field, "a whole number from 1", value)
            _require(value <= 32767, field, "at most 32767", value)
        for field in ("reduction", "temperature", "kernel_temperature", "band_softness"):
            value = getattr(self, field)
            _require(
                (_is_whole(value) or isinstance(value, float)) and 0 < value < inf, field, "a number above 0", value
            )
        for field in ("ksm_global", "ksm_local", "band_lowfreq"):
            _require(isinstance(getattr(self, field), bool), field, "true or false", getattr(self, field))
        for field in ("fbm_kernel_sizes", "bands"):
            values = getattr(self, field)
            listed = isinstance(values, (list, tuple)) and all(_is_whole(value) and value >= 1 for value in values)
            _require(listed, field, "a list of whole numbers from 1", values)
            object.__setattr__(self, field, tuple(values))
        ascending = bool(self.bands) and list(self.bands) == sorted(set(self.bands))
        _require(ascending, "bands", "one or more ascending numbers", self.bands)
        for field, allowed in _CHOICES.items():
            _require(getattr(self, field) in allowed, field, "one of " + ", ".join(allowed), getattr(self, field))
        hard = self.band_edges == "fixed"
        _require(hard or self.band_mask == "exact", "band_mask", "exact where band_edges move", self.band_mask)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types; `FDConfig(**config.to_dict())` gives an equal config."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


_CHOICES: dict[str, tuple[str, ...]] = {
    "spectrum": ("isometric", "paper"),
    "norm": ("auto", "batch", "rms"),
    "global_activation": ("sigmoid", "tanh"),
    "kernel_activation": ("sigmoid", "tanh", "softmax"),
    "local_activation": ("sigmoid", "tanh"),
    "band_mask": ("exact", "interpolated"),
    "band_activation": ("sigmoid", "tanh", "softmax"),
    "band_edges": ("fixed", "learned", "dynamic"),
}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(holds: bool, field: str, expected: str, value: object) -> None:
    if not holds:
        raise ValueError(f"FDConfig.{field} must be {expected}, not {value!r}")

"""FADC: frequency-adaptive dilated convolution (Chen et al., CVPR 2024, arXiv 2403.05369).

FreqSelect (section 3.4) weighs the frequency bands of the input, AdaKern (section 3.3) the mean of each kernel and the
rest of it, and AdaDR (section 3.2) gives each position a dilation of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import Tensor, nn

from fdconv.reference import Convolution, convolved_size

from ..discovery.site import Site
from ..errors import CheckpointError, RecipeError
from . import fadc_official
from .base import Shaped
from .dynamic_operator import DynamicOperator, Settings, loaded
from .fadc_layer import FADConv2d, cannot
from .freq_select import FreqSelect


def _listed(given: Any) -> Any:
    return list(given) if isinstance(given, tuple) else given


class FADCSettings(Settings):
    """Settings of FADC."""

    adakern: Literal["both", "high", "low", "none"] = "both"
    """Which part of each kernel a sample's gates weigh: its mean over the taps (`low`), the rest (`high`), or `both`,
    each by gates of its own."""
    freqselect: bool = True
    """Weigh the frequency bands of the input, position by position."""
    bands: Annotated[list[Annotated[int, Ge(2)]], MinLen(1), BeforeValidator(_listed)] = Field(default=[2, 4, 8])
    """Low-passes of FreqSelect, ascending: `k` keeps the frequencies up to about `1/(2k)` cycles a pixel."""
    low_band: bool = False
    """Give what the last low-pass leaves a map too."""
    map_groups: Annotated[int, Ge(1)] = 1
    """Groups of input channels whose bands have maps of their own."""
    adadr: bool = True
    """Give each position a dilation of its own, and each tap a mask."""
    deform_groups: Annotated[int, Ge(1)] = 1
    """Groups of input channels that have a dilation and a mask of their own."""
    dilation_rule: Literal["relu", "abs", "zero"] = "relu"
    """The dilation where `o` is predicted and the plain layer has `d`: `d*relu(1 + o)`; `abs` and `zero` are of the
    authors' code, `1 + d*|o|` and `1 + d*(relu(1 + o) - 1)`."""
    padding: Literal["zeros", "repeat"] = "zeros"
    """`zeros` pads as the plain layer does. `repeat`, of the authors' code, repeats the outermost pixels once and has
    zeros beyond, which changes what a pretrained layer computes."""
    norm: Literal["batch", "rms"] = "batch"
    """Norm of AdaKern's bottleneck; `rms` needs no batch."""
    reduction: Annotated[float, Gt(0), Le(1)] = 1 / 16
    """Width of AdaKern's bottleneck, as a share of the input channels."""
    min_channels: Annotated[int, Ge(1)] = 16
    """Least width of AdaKern's bottleneck."""

    @field_validator("bands")
    @classmethod
    def _ascend(cls, bands: list[int]) -> list[int]:
        if bands != sorted(set(bands)):
            raise ValueError("bands must be ascending")
        return bands

    @model_validator(mode="after")
    def _do_something(self) -> FADCSettings:
        if self.adakern == "none" and not self.freqselect and not self.adadr:
            raise ValueError("adakern, freqselect and adadr are all off, which leaves a plain convolution")
        return self


class FADCOperator(DynamicOperator):
    """Puts frequency-adaptive dilated convolutions in the place of convolutions."""

    name = "fadc"
    title = "[FADC](https://arxiv.org/abs/2403.05369)"
    leaf = "fadc_weight"
    official_leaf = "conv_offset.weight"
    unseen_settings = ("bands", "low_band", "dilation_rule", "padding")
    settings_class = FADCSettings
    conv_layer = FADConv2d

    def refusal_of_trained(self, site: Site, settings: dict[str, Any]) -> str | None:
        if (why := super().refusal(site, settings)) is not None:
            return why
        return cannot(site.in_channels, site.kernel_size, site.dilation, settings)

    def refusal(self, site: Site, settings: dict[str, Any]) -> str | None:
        if (why := self.refusal_of_trained(site, settings)) is not None:
            return why
        if settings["adadr"] and settings["dilation_rule"] == "abs" and site.dilation == (1, 1):
            return "dilation_rule=abs has no gradient where it starts, at a dilation of 1; use relu"
        if settings["padding"] == "repeat":
            extent = tuple(apart * (size // 2) for apart, size in zip(site.dilation, site.kernel_size, strict=True))
            odd = all(size % 2 for size in site.kernel_size)
            alike = odd and site.padding_mode == "replicate" and site.padding == extent == (1, 1) and not site.pads_same
            return None if alike else "padding=repeat would change what it computes; use zeros, which pads as it does"
        return None

    def multiply_adds(self, layer: nn.Module, sample: tuple[int, ...]) -> dict[str, int]:
        assert isinstance(layer, FADConv2d)
        height, width = sample[-2:]
        left, right, top, bottom = layer._pads()
        if layer.pads_same:
            positions = -(-height // layer.stride[0]) * -(-width // layer.stride[1])
        else:
            conv = Convolution(layer.stride, (0, 0), layer.dilation, layer.groups)
            size = convolved_size((height + top + bottom, width + left + right), layer.kernel_size, conv)
            positions = size[0] * size[1]
        found: dict[str, int] = {}
        if layer._gates():
            gates, weights = layer._gates(), layer.fadc_weight.numel()
            linear = [gate.fc.weight.numel() + sum(head.weight.numel() for head in gate.gate_heads()) for gate in gates]
            pairs = weights // (layer.kernel_size[0] * layer.kernel_size[1])  # of a filter and an input channel
            outer = sum(pairs * (len(gate.gate_heads()) - 1) for gate in gates)
            whole = 0 if layer.settings["adakern"] == "low" else weights
            found |= {"attention": sum(linear), "kernels": whole + pairs + outer}
        if layer.FS is not None:
            found |= layer.FS.multiply_adds(height, width)
        if layer.conv_offset is not None and layer.conv_mask is not None:
            taps = layer.kernel_size[0] * layer.kernel_size[1]
            groups = layer.settings["deform_groups"]
            found["dilation"] = (layer.conv_offset.weight.numel() + layer.conv_mask.weight.numel()) * positions
            # Four pixels a tap and channel; their shares, and the mask, are products of the tap alone.
            found["sampling"] = 4 * taps * (layer.in_channels + 2 * groups) * positions
        return found

    def band_maps(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        assert isinstance(layer, FADConv2d)
        return None if layer.FS is None else layer.FS.maps(x)

    def settings_of_tensors(self, plain: nn.Module, tensors: Mapping[str, Shaped], official: bool) -> dict[str, Any]:
        maps = tensors.get("FS.freq_weight_conv_list.0.weight")
        offset = tensors.get("conv_offset.weight")
        found: dict[str, Any] = {"freqselect": maps is not None, "adadr": offset is not None}
        if maps is not None:
            found["map_groups"] = maps.shape[0]
        if offset is not None:
            found["deform_groups"] = offset.shape[0]
        name = next((name for name in ("OMNI_ATT1", "OMNI_ATT") if f"{name}.fc.weight" in tensors), None)
        if name is None:
            return found | {"adakern": "none"}
        width, in_channels, *_ = tensors[f"{name}.fc.weight"].shape
        if name == "OMNI_ATT1":  # of high and low the tensors are alike
            found["adakern"] = "both"
        if width != max(in_channels // 16, 16):
            found |= {"reduction": min(1.0, (width + 0.5) / in_channels), "min_channels": width}
        return found | {"norm": "rms" if f"{name}.norm.weight" in tensors else "batch"}

    # The authors' layers

    def load_official(self, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
        """A layer of the authors' `AdaptiveDilatedConv`, or their `FrequencySelection` alone (`operator: freqselect`).

        The buffer `dilated_offset` holds the same numbers in each of them, and is not needed.
        """
        try:
            if config.get("operator") == "freqselect":
                return fadc_official.freq_select(state, config, self.settings(fadc_official.band_settings(config)))
            settings = self.settings(fadc_official.settings_of_config(config))
            layer = self.make(fadc_official.plain(state, config), settings)
        except (RecipeError, ValueError) as error:
            raise CheckpointError(str(error)) from None
        return loaded(layer.train(config.get("mode") == "train"), self.own_state(layer, state))

    def own_state(self, layer: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return fadc_official.ours(state)

    def official_state(self, layer: nn.Module) -> dict[str, Tensor]:
        """The tensors of a layer, or of a `FreqSelect`, under the authors' names and at their scale.

        Raises:
            CheckpointError: their code has no such layer.
        """
        assert isinstance(layer, (FADConv2d, FreqSelect))
        return fadc_official.theirs(layer)

"""Frequency Dynamic Convolution as an operator."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fdconv import FDConfig, FDConv2d, FDLinear, layer_cost
from fdconv.bands import BandEdges
from fdconv.inference import prepare
from fdconv.modulation import gate
from fdconv.official import OURS

from ..discovery.site import Site
from ..errors import RecipeError, near_misses
from .base import Operator, ParameterKind, Shaped
from .fdconv_official import MODULATION, FDConvOfficialForm
from .same_padding import SameFDConv2d
from .standing_in import stand_back, stand_in


class FDConvOperator(Operator):
    """Puts `FDConv2d` in the place of convolutions and `FDLinear` in the place of linear layers."""

    name = "fdconv"
    title = "[Frequency Dynamic Convolutions](https://arxiv.org/abs/2503.18783)"
    folds_norms = True
    leaf = "dft_weight"
    unseen_settings = (
        "temperature",
        "kernel_temperature",
        "global_activation",
        "kernel_activation",
        "band_activation",
        "bands",
    )
    official = FDConvOfficialForm()

    def settings(self, values: dict[str, Any]) -> dict[str, Any]:
        known = [field.name for field in fields(FDConfig)]
        for key in values:
            if key not in known:
                raise RecipeError(
                    f"{key!r} is no setting of fdconv; known: {', '.join(known)}{near_misses(key, known)}"
                )
        try:
            return FDConfig(**values).to_dict()
        except (TypeError, ValueError) as error:
            raise RecipeError(str(error)) from None

    def saved_settings(self, values: dict[str, Any]) -> dict[str, Any]:
        return self.settings({"spectrum": "paper", **values})  # version 0.1 knew no other, and did not say so

    def refusal(self, site: Site, settings: dict[str, Any]) -> str | None:
        config = FDConfig(**settings)
        banded = site.kind == "conv" and site.kernel_size[0] == site.kernel_size[1] in config.fbm_kernel_sizes
        if banded and site.in_channels % config.band_groups:
            return f"band_groups={config.band_groups} does not divide its {site.in_channels} input channels"
        return None

    def multiply_adds(self, layer: nn.Module, sample: tuple[int, ...]) -> dict[str, int]:
        assert isinstance(layer, (FDConv2d, FDLinear))
        counted = asdict(layer_cost(layer, sample))
        del counted["convolution"]  # that of the plain layer
        return counted

    def replace(self, layer: nn.Module, settings: dict[str, Any]) -> nn.Module:
        config = FDConfig(**settings)

        def make(plain: nn.Conv2d | nn.Linear, pads_same: bool) -> FDConv2d | FDLinear:
            if isinstance(plain, nn.Linear):
                return FDLinear.from_linear(plain, config)
            return (SameFDConv2d if pads_same else FDConv2d).from_conv(plain, config)

        return stand_in(layer, make)

    def owns(self, layer: nn.Module) -> bool:
        return isinstance(layer, (FDConv2d, FDLinear))

    def settings_of(self, layer: nn.Module) -> dict[str, Any]:
        assert isinstance(layer, (FDConv2d, FDLinear))
        return layer.config.to_dict()

    def restore(self, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, (FDConv2d, FDLinear))
        return stand_back(layer, layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear())

    def parameter_kinds(self, layer: nn.Module) -> dict[nn.Parameter, ParameterKind]:
        assert isinstance(layer, (FDConv2d, FDLinear))
        kinds: dict[nn.Parameter, ParameterKind] = dict.fromkeys(layer.parameters(), "modulation")
        kinds[layer.dft_weight] = "weight"
        return kinds | super().parameter_kinds(layer)

    def undecayed(self, layer: nn.Module) -> Collection[nn.Parameter]:
        return [module.edge for module in layer.modules() if isinstance(module, BandEdges)]

    def prepare(self, layer: nn.Module) -> None:
        assert isinstance(layer, (FDConv2d, FDLinear))
        prepare(layer)

    def is_prepared(self, layer: nn.Module) -> bool:
        assert isinstance(layer, (FDConv2d, FDLinear))
        return layer._is_prepared()

    def scale_filters(self, layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
        assert isinstance(layer, (FDConv2d, FDLinear))
        layer.scale_filters(scale, shift)

    def is_scaled(self, layer: nn.Module) -> bool:
        assert isinstance(layer, (FDConv2d, FDLinear))
        return layer.filter_scale is not None

    def expect_scale(self, layer: nn.Module, *, bias: bool) -> None:
        assert isinstance(layer, (FDConv2d, FDLinear))
        layer.expect_scale(bias=bias)

    def band_maps(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        if not isinstance(layer, FDConv2d) or layer.FBM is None:
            return None
        groups = layer.config.band_groups
        logits = F.conv2d(x, *layer.FBM.logits_of(), padding=1, groups=groups).unflatten(1, (groups, -1))
        return gate(logits.movedim(2, -1), layer.config.band_activation).movedim(-1, 2)

    def kernels(self, layer: nn.Module) -> Tensor | None:
        assert isinstance(layer, (FDConv2d, FDLinear))
        return layer.group_kernels()

    def settings_of_tensors(self, plain: nn.Module, tensors: Mapping[str, Shaped], official: bool) -> dict[str, Any]:
        settings: dict[str, Any] = {"band_mask": "interpolated"} if official else {}
        # Official layers are put into our form as they are read; what version 0.1 saved stays in theirs.
        settings["spectrum"] = "isometric" if official else _stored_spectrum(tensors)
        if not any(leaf.startswith(MODULATION) for leaf in tensors):
            return settings
        in_channels = int(plain.in_channels if isinstance(plain, nn.Conv2d) else plain.in_features)  # type: ignore[arg-type]
        spectra, squeeze = tensors["dft_weight"].shape, tensors.get("KSM_Global.fc.weight")
        ratio = spectra[0] if spectra else 1
        settings |= {"param_ratio": ratio, "ksm_global": squeeze is not None}
        if squeeze is not None and squeeze.shape:
            heads = tensors.get("KSM_Global.kernel_fc.weight")
            settings["kernel_num"] = max(1, heads.shape[0] // max(1, ratio)) if heads and heads.shape else 1
            width = squeeze.shape[0]
            if width != max(in_channels // 16, 16):
                settings |= {"reduction": (width + 0.5) / in_channels, "min_attention_channels": 1}
            normed = "rms" if "KSM_Global.norm.weight" in tensors else "batch"
            usual = "rms" if settings["spectrum"] == "isometric" or isinstance(plain, nn.Linear) else "batch"
            settings["norm"] = "auto" if normed == usual else normed
        if isinstance(plain, nn.Conv2d):
            settings["ksm_local"] = "KSM_Local.conv.weight" in tensors
            maps = [one for leaf, one in tensors.items() if leaf.startswith("FBM.") and leaf.endswith(".weight")]
            settings["fbm_kernel_sizes"] = [plain.kernel_size[0]] if maps else []
            if "FBM.edges.edge" in tensors:
                settings["band_edges"] = "dynamic" if "FBM.edges.scale.weight" in tensors else "learned"
            if len(maps) == 4:
                settings["band_lowfreq"] = True
            if maps and maps[0].shape:
                settings["band_groups"] = maps[0].shape[0]
        return settings

    def check_tensors(self, settings: dict[str, Any], tensors: Mapping[str, Shaped]) -> str | None:
        if settings["spectrum"] == (stored := _stored_spectrum(tensors)):
            return None
        return (
            f"is stored with spectrum: {stored}, and the settings say {settings['spectrum']!r}, which does not change "
            "what is stored"
        )


def _stored_spectrum(tensors: Collection[str]) -> str:
    """How a layer of ours has its spectrum, by its tensors."""
    return "isometric" if OURS in tensors else "paper"

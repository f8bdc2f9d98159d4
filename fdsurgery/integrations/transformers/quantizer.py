"""What transformers calls between building a model and reading its weights.

Imports transformers, and so is imported only after it; see `registration`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...errors import CheckpointError
from ...finetune import remember
from ...operators import made_layers
from ...rewrite.folded import Folded
from ...rewrite.tree import swapped
from ...saving.description import METHOD, NOTICE, Description, describe


@register_quantization_config(METHOD)
class DynamicLayersConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `Description` in the form that transformers asks for."""

    def __init__(self, **entries: Any) -> None:
        self.quant_method = METHOD
        self.description = Description.from_dict(entries)

    def to_dict(self) -> dict[str, Any]:
        """The description, as it stands in config.json."""
        return self.description.to_dict()


@register_quantizer(METHOD)
class DynamicLayersQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the dynamic layers in while the model has no memory yet; nothing is quantised."""

    quantization_config: DynamicLayersConfig

    def __init__(self, quantization_config: DynamicLayersConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise CheckpointError(
                "a plain model does not become dynamic on loading; load it, then fdsurgery.convert it"
            )
        _allow_notice()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        with swapped(model, self.quantization_config.description.replacements_for(model)):
            pass
        self._repairs = _repairs(model)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def get_weight_conversions(self) -> list[WeightRenaming]:
        """What transformers is to do to the saved names after its own renamings."""
        return self._repairs

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        description = self.quantization_config.description
        self._check_shapes(model)
        _check_read(model, description)
        for module in model.modules():
            if isinstance(module, Folded):
                module.reset_statistics()  # transformers makes room for what is not saved, and leaves it as it finds it
        _forget_quantization(model)
        remember(model, description.finetune)
        describe(model, description.origin_for(model))
        return model

    def _check_shapes(self, model: nn.Module) -> None:
        """transformers before 5.23 puts tensors of any shape into a model that has a quantizer."""
        for name, tensor in model.state_dict().items():
            expected = self._shapes.get(name, tensor.shape)
            if tensor.shape != expected:
                raise CheckpointError(
                    f"the weights hold {name!r} in the shape {tuple(tensor.shape)}, and the model has it in "
                    f"{tuple(expected)}; to start it afresh takes ignore_mismatched_sizes=True and transformers 5.23"
                )

    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes."""
        return True


def _allow_notice() -> None:
    """Make the entry of `fusion_config` known, by which transformers without this library refuses the model."""
    try:
        from transformers.fusion_mapping import _FUSION_REGISTRY
    except ImportError:  # a version that has no fusions and does not read the entry
        return
    _FUSION_REGISTRY[NOTICE] = None  # never looked at, because the entry is switched off


def _repairs(model: nn.Module) -> list[WeightRenaming]:
    """Renamings that undo what transformers does to names inside dynamic layers.

    Its renamings turn the names of old checkpoints into those of today, and some are so short (`norm.`) that they meet
    names of ours.
    """
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    repairs: dict[str, str] = {}
    for name, (layer, _) in made_layers(model).items():
        for inner in layer.state_dict():
            renamed = f"{name}.{inner}"
            for renaming in renamings:
                renamed, _ = renaming.rename_source_key(renamed)
            start = renamed.rfind(inner.partition(".")[0])
            if start >= 0 and renamed[start:] != inner:
                repairs[renamed[start:]] = inner
    return [WeightRenaming(wrong, right) for wrong, right in repairs.items()]


def _check_read(model: nn.Module, description: Description) -> None:
    """See that every dynamic layer has its weights; those that have a new shape start afresh, as plain ones do.

    transformers marks each tensor that it has read, and leaves memory as it finds it in layers that it does not know.
    """
    unread = {one.layer for one in made_layers(model).values() if not all(map(_was_read, _tensors(one.layer)))}
    if any(tensor.is_meta for layer in unread for tensor in _tensors(layer)):
        raise CheckpointError("dynamic layers cannot be offloaded; pass a device_map that leaves them on a device")
    missing = [name for name, layer in description.unchanged(model).items() if layer in unread]
    if missing:
        raise CheckpointError(
            f"the weights lack {len(missing)} of the dynamic layers that the config describes, or parts of them, "
            f"{missing[0]!r} first"
        )
    for layer in unread:
        layer.reset_parameters()  # type: ignore[operator]


def _tensors(layer: nn.Module) -> list[Any]:
    return list(layer.state_dict(keep_vars=True).values())


def _was_read(tensor: Any) -> bool:
    return getattr(tensor, "_is_hf_initialized", False)


def _forget_quantization(model: nn.Module) -> None:
    """Remove the marks of a quantised model, for which `half`, `Trainer` and others refuse one."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if hasattr(config, "_is_quantized"):
            del config._is_quantized

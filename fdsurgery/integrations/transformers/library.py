"""transformers as a library of model classes and of folders and repositories."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from ...errors import CheckpointError, near_misses
from ...inputs import Inputs
from ..base import Library, ModelSource, SourceError, loading
from .allowed import transformers_config
from .inputs import inputs_of


class Transformers(Library):
    """Its models tell by their config what they are and what they take."""

    name = "transformers"
    requirement = "fdsurgery[hf]"
    forms = ("hf:REPO_OR_FOLDER", "transformers:CLASS")
    families = "`config.model_type`, e.g. `convnextv2`"
    hooks: ClassVar = {"transformers.quantizers.auto": f"{__package__}.registration:enter"}

    def build(self, spec: str, *, pretrained: bool) -> tuple[nn.Module, ModelSource]:
        """As `Library.build`; a class has its default config."""
        prefix, _, name = spec.partition(":")
        model = self._of_folder(name, pretrained) if prefix == "hf" else self._of_class(name, pretrained)
        source = self.infer(model)
        assert source is not None  # it has a config
        return model, source

    def rebuild(self, source: ModelSource) -> nn.Module:
        transformers = self.module()
        model_class: Any = getattr(transformers, source.name, None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise CheckpointError(f"transformers {transformers.__version__} has no model class {source.name!r}")
        config_class: Any = getattr(model_class, "config_class", None)
        if config_class is None:
            raise CheckpointError(f"transformers' {source.name} has no config of its own, and cannot be built")
        config = transformers_config({**source.arguments, "model_type": config_class.model_type}, source.name)

        def make() -> nn.Module:
            return model_class(config_class.from_dict(config))

        return loading(f"transformers:{source.name}", make, downloads=False)

    def infer(self, model: nn.Module) -> ModelSource | None:
        config: Any = getattr(model, "config", None)
        if config is None:
            return None
        return ModelSource(self.name, type(model).__name__, transformers_config(config.to_dict(), "the model's config"))

    def arguments_in_words(self, source: ModelSource) -> str:
        return "its config"

    def family(self, model: nn.Module) -> str | None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        return model_type if isinstance(model_type, str) and model_type else None

    def example_inputs(self, model: nn.Module) -> Iterable[Inputs] | None:
        has_config = getattr(getattr(model, "config", None), "model_type", None) is not None
        return inputs_of(model) if has_config and hasattr(model, "main_input_name") else None

    def saved_names(self, model: nn.Module, names: Iterable[str]) -> dict[str, str]:
        """As `Library.saved_names`; in 40 families they are not what the model calls its tensors itself."""
        same = {name: name for name in names}
        try:
            from transformers.core_model_loading import revert_weight_conversion

            state = model.state_dict(keep_vars=True)
            renamed = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(state)).items()}
            return {name: renamed.get(id(state[name]), name) for name in same}
        except (ImportError, AttributeError, TypeError):  # it is not public, and releases may move it
            return same

    def _of_folder(self, name: str, pretrained: bool) -> nn.Module:
        transformers = self.module()
        spec = f"hf:{name}"
        config = loading(spec, lambda: transformers.AutoConfig.from_pretrained(name), downloads=True)
        architectures = getattr(config, "architectures", None) or []
        model_class = getattr(transformers, architectures[0], None) if architectures else transformers.AutoModel
        if model_class is None:
            raise SourceError(
                f"{spec}: transformers {transformers.__version__} has no model class {architectures[0]!r}"
            )
        if pretrained:
            return loading(spec, lambda: model_class.from_pretrained(name), downloads=True)
        return model_class(config) if architectures else model_class.from_config(config)

    def _of_class(self, name: str, pretrained: bool) -> nn.Module:
        transformers = self.module()
        spec = f"transformers:{name}"
        if pretrained:
            raise SourceError(
                f"{spec} has no trained weights; name a repository or folder as hf:..., or --no-pretrained"
            )
        model_class: Any = getattr(transformers, name, None)
        if not hasattr(model_class, "config_class"):
            known = {
                entry
                for entry in dir(transformers)
                if entry.endswith(("Model", "Classification", "Segmentation")) and not entry.startswith("Auto")
            }
            raise SourceError(f"transformers has no model class {name!r}{near_misses(name, known)}")
        return loading(spec, lambda: model_class(model_class.config_class()), downloads=True)

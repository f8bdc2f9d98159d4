"""torchvision as a library of builders by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from torch import nn

from ...allowed import arguments_from, constructor_arguments
from ...errors import near_misses
from ...inputs import ExampleTensors, Inputs, image_channels, image_sizes
from ..base import Library, ModelSource, SourceError, loading

_BUILDERS = {"num_classes", "num_keypoints", "aux_loss", "trainable_backbone_layers", "frozen_norms"}
"""Arguments that builders take before a constructor is called."""


class Torchvision(Library):
    """Its detectors take lists of images; a family is the class of its models."""

    name = "torchvision"
    requirement = "fdsurgery[torchvision]"
    forms = ("torchvision:NAME",)
    families = "model classes, e.g. `ConvNeXt`"

    def build(self, spec: str, *, pretrained: bool) -> tuple[nn.Module, ModelSource]:
        name = spec.partition(":")[2]
        model = self._create(name, pretrained)
        frozen_norm = self.module().ops.FrozenBatchNorm2d
        epsilons = {module.eps for module in model.modules() if isinstance(module, frozen_norm)}
        return model, ModelSource(self.name, name, {"frozen_norms": epsilons.pop()} if epsilons else {})

    def rebuild(self, source: ModelSource) -> nn.Module:
        self.module()
        known = _BUILDERS | constructor_arguments("torchvision.models")
        return self._create(source.name, False, **arguments_from(source.arguments, known, self.name))

    def family(self, model: nn.Module) -> str | None:
        classes = (part for part in type(model).__mro__ if part.__module__.startswith("torchvision.models."))
        return next((part.__name__ for part in classes), None)

    def example_inputs(self, model: nn.Module) -> Iterable[Inputs] | None:
        packages = {part.__module__.rpartition(".")[0] for part in type(model).__mro__}
        return _lists_of_images(model) if "torchvision.models.detection" in packages else None

    def _create(self, name: str, pretrained: bool, frozen_norms: float | None = None, **arguments: Any) -> nn.Module:
        """A model by its name.

        Args:
            name: of the builder.
            pretrained: with torchvision's weights. Detectors then have norms that do not learn, and else BatchNorms.
            frozen_norms: without weights, too, give the backbone norms that do not learn, of this epsilon.
            **arguments: of the builder.
        """
        models = self.module().models
        known = models.list_models()
        if name not in known:
            raise SourceError(f"torchvision has no model {name!r}{near_misses(name, known)}")
        # Detection and segmentation builders load a pretrained backbone unless told not to.
        backbone = "weights_backbone" in models.get_model_builder(name).__annotations__
        weights = {"weights": "DEFAULT" if pretrained else None, **({"weights_backbone": None} if backbone else {})}

        def make() -> nn.Module:
            model = models.get_model(name, **weights, **arguments)
            if frozen_norms is not None:
                self._freeze_norms(model.backbone.body, float(frozen_norms))
            return model

        return loading(f"torchvision:{name}", make, downloads=pretrained)

    def _freeze_norms(self, module: nn.Module, eps: float) -> None:
        frozen_norm = self.module().ops.FrozenBatchNorm2d
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, frozen_norm(child.num_features, eps))
            else:
                self._freeze_norms(child, eps)


def _lists_of_images(model: nn.Module) -> Iterator[Inputs]:
    make = ExampleTensors(model)
    for channels, size in product(image_channels(model), image_sizes(model)):
        yield Inputs(([make.image(channels, *size)[0]],))

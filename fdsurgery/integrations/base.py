"""What a library answers about its models: the contract of each folder here, and what its answers are made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from ..allowed import plain
from ..errors import CheckpointError, SurgeryError
from ..inputs import Inputs


class SourceError(SurgeryError):
    """A model cannot be built from what was given."""


@dataclass(frozen=True)
class ModelSource:
    """Enough to build the plain model again, without its weights.

    Examples:
        >>> import fdsurgery
        >>> source = fdsurgery.ModelSource("timm", "resnet18", {"num_classes": 10})
        >>> fdsurgery.ModelSource.from_dict(source.to_dict()) == source
        True
    """

    library: str
    """Its name in the register of libraries, such as `timm`, `transformers`, `torchvision` or `file`."""
    name: str
    """Architecture, model class, builder, or `FILE.py:FUNCTION`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the builder; for transformers, the model's config."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `ModelSource.from_dict` undoes it."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Any) -> ModelSource:
        """Undo `to_dict`. Raises `CheckpointError` for data that is no source; `rebuild` looks at what it asks for."""
        if not isinstance(data, dict) or not data.keys() <= {"library", "name", "arguments"}:
            raise CheckpointError("a source is a mapping of library, name and arguments")
        source = ModelSource(data.get("library", ""), data.get("name", ""), data.get("arguments", {}))
        if not (isinstance(source.library, str) and isinstance(source.name, str) and source.library and source.name):
            raise CheckpointError("a source has a library and a name, both text")
        if not isinstance(source.arguments, dict):
            raise CheckpointError(f"a source's arguments are a mapping, not a {type(source.arguments).__name__}")
        plain(source.arguments, "arguments of the source")
        return source


class Library:
    """What one library answers about its models.

    Each answer has a default: that of a library that has nothing to say. An instance holds no state, and importing its
    module imports nothing of the library itself; `module` does.
    """

    name: ClassVar[str]
    """Its top-level module. Recipes' `match` and a `ModelSource` name the library by it."""
    requirement: ClassVar[str] = ""
    """What `pip install` takes to install it, such as `fdsurgery[timm]`; the library's name where this is empty."""
    forms: ClassVar[tuple[str, ...]] = ()
    """How a SPEC names a model of it, such as `timm:NAME`. What stands before the colon is the SPEC's prefix."""
    families: ClassVar[str] = ""
    """What `match` lists for this library in a recipe, such as ``timm architectures, e.g. `convnext*` ``; empty where
    `family` knows none."""
    rebuilds: ClassVar[bool] = True
    """Whether `rebuild` can build a model; not where a source names the user's own code."""
    hooks: ClassVar[Mapping[str, str]] = {}
    """What to call once a module of the library has been imported: `PACKAGE.MODULE:FUNCTION` by the module's name. The
    function is imported only then, and is given the module."""

    # Names of models, and models of names

    def takes(self, spec: str) -> bool:
        """True if a SPEC names a model of this library."""
        prefix, _, name = spec.partition(":")
        return bool(name) and any(form.partition(":")[0] == prefix for form in self.forms)

    def build(self, spec: str, *, pretrained: bool) -> tuple[nn.Module, ModelSource]:
        """Build the model that a SPEC names, one that `takes` takes.

        Args:
            spec: as the user wrote it.
            pretrained: load trained weights.

        Returns:
            The model, and the source to save with it.

        Raises:
            SourceError: the library is not installed, or it has no such model, or that cannot be loaded.
        """
        raise SourceError(f"{spec}: {self.name} builds no models")

    def rebuild(self, source: ModelSource) -> nn.Module:
        """Build the plain model of a saved source, with weights that mean nothing yet.

        The source may come from anybody: only names and arguments that can do no harm may reach the library.

        Raises:
            CheckpointError: the source asks for what no file may ask for.
            SourceError: the library is not installed or does not know the model.
        """
        raise CheckpointError(f"{self.name} builds no models, and so none of {source.name}")

    def infer(self, model: nn.Module) -> ModelSource | None:
        """The source of a model that `owns` owns, where its own attributes tell it."""
        return None

    def load_source(self, source: ModelSource) -> None:
        """Import what `rebuild` takes the model from.

        Raises:
            SourceError: the library is not installed.
        """
        getattr(self.module(), source.name, None)  # transformers imports the file of a class only now

    def load_line(self, folder: str, source: ModelSource) -> str:
        """The code that loads a converted model of this source from the folder in which it was saved."""
        return f"fdsurgery.load({folder!r})"

    def arguments_in_words(self, source: ModelSource) -> str:
        """A source's arguments, for messages."""
        return str(source.arguments or "no arguments")

    # What a model is

    def owns(self, model: nn.Module) -> bool:
        """True if the model's class is one of the library's own."""
        return type(model).__module__.partition(".")[0] == self.name

    def family(self, model: nn.Module) -> str | None:
        """What the library calls the model's family, which the `match` of recipes names; None if it is none of its."""
        return None

    def network(self, model: nn.Module) -> nn.Module | None:
        """The network inside of a wrapper that the library makes, such as `YOLO(...)`; None for any other model."""
        return None

    def refusal(self, module: nn.Module, step: Literal["convert", "save"]) -> str | None:
        """Why a model with this part in it cannot be converted or saved, and what to do: words to follow its name."""
        return None

    # What a model takes

    def example_inputs(self, model: nn.Module) -> Iterable[Inputs] | None:
        """Inputs for one forward of a model, the most likely first; each is tried until the forward runs.

        Returns:
            None for models of which the library knows nothing that a general guess would not.
        """
        return None

    def image_shape(self, model: nn.Module) -> tuple[int, int, int] | None:
        """`(channels, height, width)` that the model's own configuration tells; None where it tells none."""
        return None

    # Checkpoints of its models

    def specs_of(self, is_meant: Callable[[str], bool]) -> list[str]:
        """SPECs of all models of some families, for a checkpoint that does not say of which it is.

        Args:
            is_meant: whether a family, as `family` tells it, is one of them.

        Returns:
            The likeliest first; empty where the library cannot list its models by family.

        Raises:
            SourceError: the library is not installed.
        """
        return []

    def saved_names(self, model: nn.Module, names: Iterable[str]) -> dict[str, str]:
        """What tensors of the model's state dict are called on disk, where the library renames them."""
        return {name: name for name in names}

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the layers that `model.reset_classifier(n)` makes anew for another number of classes."""
        return ()

    # The library itself

    def module(self) -> Any:
        """The library, imported.

        Raises:
            SourceError: it is not installed.
        """
        try:
            return importlib.import_module(self.name)
        except ImportError as error:
            requirement = self.requirement or self.name
            raise SourceError(f"{self.name} is not installed ({error}); pip install '{requirement}'") from None


def loading(spec: str, make: Callable[[], Any], *, downloads: bool) -> Any:
    """What `make` builds or downloads; what goes wrong is told in one line.

    Args:
        spec: what messages call it.
        make: does it.
        downloads: whether random weights would do, and so are advised.

    Raises:
        SourceError: it could not be done.
    """
    try:
        return make()
    except SurgeryError:
        raise
    except Exception as error:
        advice = "; for random weights use --no-pretrained" if downloads else ""
        lines = str(error).strip().splitlines() or [""]
        raise SourceError(f"{spec} could not be loaded: {type(error).__name__}: {lines[0]}{advice}") from error

"""`FILE.py:FUNCTION` as a library whose models the user's own code builds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

from ...errors import CheckpointError, near_misses
from ..base import Library, ModelSource, SourceError


class PythonFile(Library):
    """A function without arguments in a Python file. It is called for a SPEC, and never for what a file says."""

    name = "file"
    forms = ("FILE.py:FUNCTION",)
    rebuilds = False

    def takes(self, spec: str) -> bool:
        return ".py:" in spec

    def build(self, spec: str, *, pretrained: bool) -> tuple[nn.Module, ModelSource]:
        """As `Library.build`; what the function loads is its own affair."""
        path_text, _, function_name = spec.rpartition(":")
        path = Path(path_text)
        if not path.is_file():
            raise SourceError(f"{path}: no such file")
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        try:
            module_spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # scripts may exit
            raise SourceError(f"{path}: {type(error).__name__}: {error}") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise SourceError(f"{path} has no function {function_name!r}{near_misses(function_name, functions)}")
        try:
            model = function()
        except (Exception, SystemExit) as error:
            raise SourceError(f"{spec}: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise SourceError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module")
        return model, ModelSource(self.name, f"{path.name}:{function_name}")

    def rebuild(self, source: ModelSource) -> nn.Module:
        raise CheckpointError(
            f"the model was built by {source.name}, and code is not run on loading; "
            "build the plain model yourself and pass it: fdsurgery.load(folder, model=...)"
        )

    def load_source(self, source: ModelSource) -> None:
        pass

    def load_line(self, folder: str, source: ModelSource) -> str:
        file, _, function = source.name.rpartition(":")
        return f"fdsurgery.load({folder!r}, model={function}()), {function} being that of {file}"

    def owns(self, model: nn.Module) -> bool:
        return False

"""What a saved file may ask of timm: a name of its registry, and arguments of its constructors."""

from __future__ import annotations

import importlib
import re
from typing import Any

from ...allowed import arguments_from, constructor_arguments, shown
from ...errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_-]+)?")
_FACTORY = {
    *("num_classes", "in_chans", "img_size", "global_pool", "drop_rate", "drop_path_rate", "output_stride"),
    *("features_only", "out_indices", "output_fmt", "feature_cls", "scriptable", "exportable", "no_jit"),
    *("bn_tf", "bn_momentum", "bn_eps", "use_naflex"),
}
"""Arguments that timm's factory and its builders take before a constructor is called."""


def timm_name(name: Any) -> str:
    """The name, if it is one of timm's registry, with or without a tag: no repository, no folder."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(
            f"timm:{shown(name)} is no name of timm's registry, such as 'resnet50' or 'resnet50.a1_in1k'; weights and "
            "configs of elsewhere are not fetched for a file"
        )
    return name


def timm_arguments(arguments: Any, name: str, owner: str = "timm") -> dict[str, Any]:
    """The arguments, if timm's constructors take them and they name no file.

    Args:
        arguments: of `timm.create_model`.
        name: of the model, whose own module is asked too.
        owner: what messages begin with.

    Raises:
        CheckpointError: one of them is not allowed.
    """
    timm = importlib.import_module("timm")
    architecture = name.partition(".")[0]
    own = timm.model_entrypoint(architecture).__module__ if timm.is_model(architecture) else "timm.models"
    return arguments_from(arguments, _FACTORY | constructor_arguments("timm.models", own), owner)

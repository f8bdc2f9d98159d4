"""What `NAME.fdconv` means to timm's factory.

timm takes all after the first dot of a name for a tag of pretrained weights, and gives the tag up where a
`pretrained_cfg` is passed. So the suffix is moved to the architecture before that: `resnet50.a1_in1k.fdconv` is the
architecture `resnet50.fdconv` with the tag `a1_in1k`. Nothing is entered in timm's registry, as every name of it has a
converted one; four functions are wrapped, only where the factory calls them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ... import surgery
from ...planning import plan
from . import SUFFIX, weights

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def install(timm_factory: ModuleType) -> list[str]:
    """Make the factory know the names; a second call does nothing.

    Args:
        timm_factory: `timm.models._factory`.

    Returns:
        What it lacks for that. Then nothing was changed.
    """
    missing = [name for name in _NEEDED if not hasattr(timm_factory, name)]
    for name, wrapper in {**_NEEDED, **_OPTIONAL}.items() if not missing else ():
        original = getattr(timm_factory, name, None)
        if original is not None and not hasattr(original, "_before_fdsurgery"):
            wrapped: Any = wraps(original)(wrapper(original))
            wrapped._before_fdsurgery = original
            setattr(timm_factory, name, wrapped)
    return missing


def build(
    name: str, entrypoint: Callable[..., nn.Module], *, pretrained: bool = False, recipe: str = "auto", **arguments: Any
) -> nn.Module:
    """Build a converted model: what timm calls as the entry point of `NAME.fdconv`.

    Args:
        name: the plain architecture.
        entrypoint: what builds it.
        pretrained: load weights: those of the plain model before its conversion, or of a converted one after it.
        recipe: as for `fdsurgery.convert`; with timm's scripts, `--model-kwargs recipe=my_recipe.yaml`.
        **arguments: those of the entry point.

    Returns:
        The model. Its `load_state_dict` also takes checkpoints of the plain model.

    Raises:
        SurgeryError: the model cannot be converted, or the weights are of a model converted otherwise.
    """
    folder = weights.saved_folder(arguments)
    tensors = weights.converted_tensors(arguments) if pretrained else None
    model = entrypoint(pretrained=pretrained and tensors is None, **arguments)
    if folder is not None:
        weights.put_in_layers(model, folder)
    else:
        decided = plan(model, recipe)
        recipe = decided.recipe if recipe == "auto" else recipe
        surgery.apply(decided, model)
    if pretrained and tensors is None:  # of an operator whose tensors only its layers tell
        tensors = weights.converted_tensors(arguments, model)
    # timm's push_to_hf_hub writes it down; a timm that does not know us refuses to build a model with it.
    noted: Any = getattr(model, "_model_args", {})
    model._model_args = {**noted, "recipe": recipe}  # type: ignore[assignment]
    config: Any = model.pretrained_cfg
    model.register_load_state_dict_pre_hook(weights.PlainCheckpoints.of(name, config, arguments))
    config["architecture"] += SUFFIX
    if tensors is not None:
        weights.load_converted(model, tensors, arguments)
    return model


def _split_name(original: Callable[..., Any]) -> Callable[..., Any]:
    def split_model_name_tag(model_name: str, *args: Any, **kwargs: Any) -> tuple[str, str]:
        if not model_name.endswith(SUFFIX):
            return original(model_name, *args, **kwargs)
        architecture, tag = original(model_name.removesuffix(SUFFIX), *args, **kwargs)
        return architecture + SUFFIX, tag

    return split_model_name_tag


def _find_entrypoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def model_entrypoint(model_name: str, *args: Any, **kwargs: Any) -> Callable[..., nn.Module]:
        plain = model_name.removesuffix(SUFFIX)
        entrypoint = _noting(original(plain, *args, **kwargs))
        return entrypoint if plain == model_name else partial(build, plain, entrypoint)

    return model_entrypoint


def _noting(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The entry point, whose models remember what they were built with, as those of later releases of timm do."""

    @wraps(entrypoint)
    def build_and_note(**arguments: Any) -> nn.Module:
        model = entrypoint(**arguments)
        if isinstance(model, nn.Module):
            noted = {name: value for name, value in arguments.items() if name not in weights.NOT_THE_MODEL}
            model._model_args = {name: value for name, value in noted.items() if _is_constant(value)}  # type: ignore[assignment]
        return model

    return build_and_note


def _is_constant(value: Any) -> bool:
    """True for plain data and for classes, which a copy or a pickle of the model can hold too."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_constant, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_constant(entry) for key, entry in value.items())
    return value is None or isinstance(value, (bool, int, float, str, type))


def _resolve_config(original: Callable[..., Any]) -> Callable[..., Any]:
    def resolve_pretrained_cfg(variant: str, *args: Any, **kwargs: Any) -> Any:
        return original(variant.removesuffix(SUFFIX), *args, **kwargs)

    return resolve_pretrained_cfg


def _read_folder(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model_config_from_path(model_path: str | Path) -> Any:
        return weights.folder_config(Path(model_path)) or original(model_path)

    return load_model_config_from_path


_NEEDED: dict[str, Wrapper] = {"split_model_name_tag": _split_name, "model_entrypoint": _find_entrypoint}
_OPTIONAL: dict[str, Wrapper] = {"resolve_pretrained_cfg": _resolve_config, "load_model_config_from_path": _read_folder}
"""Those that only later releases of timm have."""

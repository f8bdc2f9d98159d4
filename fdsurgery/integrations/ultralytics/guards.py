"""What Ultralytics does with the network of a `YOLO(...)`, guarded where dynamic layers would be lost.

Its trainer builds another network from a YAML file. Whatever that file does not say is lost on the way: dynamic layers
are. What has the same name and shape is copied to the new network, the rest left out without a word. So training a
converted model is refused, as is every copying of weights between a network with dynamic layers and one without.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from torch import nn

from ...errors import UnsupportedModelError
from ...operators import made_layers


def guard_engine(engine: ModuleType) -> None:
    """Make `train` and `tune` of `YOLO(...)` refuse a converted network. A second call does nothing.

    Args:
        engine: `ultralytics.engine.model`.
    """
    for name in ("train", "tune"):
        _wrap(engine, "Model", name, _refusing_to_rebuild)


def guard_tasks(tasks: ModuleType) -> None:
    """Make `load` of a network refuse weights of which the dynamic layers would be lost, or would lose theirs.

    Args:
        tasks: `ultralytics.nn.tasks`.
    """
    _wrap(tasks, "BaseModel", "load", _refusing_to_drop)


def _wrap(module: ModuleType, class_name: str, name: str, wrapper: Callable[[Any], Any]) -> None:
    owner = getattr(module, class_name, None)
    original = vars(owner).get(name) if owner is not None else None
    if original is None:
        warnings.warn(
            f"fdsurgery: {module.__name__} has no {class_name}.{name} in this release of ultralytics, which may drop "
            "dynamic layers in training; train a converted network in a loop of your own",
            stacklevel=2,
        )
    elif not hasattr(original, "_before_fdsurgery"):
        wrapped: Any = wraps(original)(wrapper(original))
        wrapped._before_fdsurgery = original
        setattr(owner, name, wrapped)


def _refusing_to_rebuild(original: Callable[..., Any]) -> Callable[..., Any]:
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        count = len(_dynamic(self.model))
        if count:
            raise UnsupportedModelError(
                f"ultralytics' trainer builds a plain network from the model's YAML, and this one's {count} dynamic "
                "layers would be lost. Train yolo.model in a loop of your own (it is a torch.nn.Module, and "
                "yolo.model(batch) gives the loss), or train first and convert afterwards; "
                "fdsurgery.restore(yolo.model) puts plain layers back"
            )
        return original(self, *args, **kwargs)

    return train


def _refusing_to_drop(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        given = (weights.get("ema") or weights.get("model")) if isinstance(weights, dict) else weights
        here, there = _dynamic(self), _dynamic(given)
        if here != there:
            name = min(here ^ there)
            kinds = ("dynamic", "plain") if name in here else ("plain", "dynamic")
            raise UnsupportedModelError(
                f"{len(here ^ there)} layers are dynamic in only one of the two networks, {name!r} first "
                f"({kinds[0]} here, {kinds[1]} in the weights), and ultralytics' load would leave them out without a "
                "word. Load plain weights before the conversion; for those of a converted network call load_state_dict "
                "on a network that is converted alike"
            )
        return original(self, weights, *args, **kwargs)

    return load


def _dynamic(model: Any) -> set[str]:
    """Names of the dynamic layers; none for what is no module, such as the path of an exported model."""
    if not isinstance(model, nn.Module):
        return set()
    return set(made_layers(model))

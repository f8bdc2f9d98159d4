"""Everything this library raises on purpose; all are `ValueError`s too, for callers who know nothing of us."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 5000
"""Characters of a message. Only what a damaged file holds makes one that long."""


class SurgeryError(ValueError):
    """Base of all errors raised on purpose. The message says what was wrong, where, and what would be right.

    Examples:
        >>> import fdsurgery
        >>> try:
        ...     fdsurgery.load("nowhere")
        ... except fdsurgery.SurgeryError as error:
        ...     print(error)
        nowhere is no saved converted model: it has no fdsurgery.json
    """

    def __init__(self, message: str = "") -> None:
        # A message quotes what a file holds, and half a surrogate pair of it could not even be printed.
        text = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 100]} ... {text[-90:]}")


class RecipeError(SurgeryError):
    """A recipe cannot be read, or a rule of it cannot be meant for this model.

    Examples:
        >>> import fdsurgery
        >>> fdsurgery.load_recipe("resnets")
        Traceback (most recent call last):
            ...
        fdsurgery.errors.RecipeError: no recipe is called 'resnets'; expected one of ...; did you mean 'resnet', ...?
    """


class DiscoveryError(SurgeryError):
    """The model could not be observed: no example input is known for it, or its forward failed.

    Examples:
        >>> import torch, fdsurgery
        >>> fdsurgery.sites(torch.nn.Conv2d(3, 8, 3), torch.randn(1, 4, 8, 8))
        Traceback (most recent call last):
            ...
        fdsurgery.errors.DiscoveryError: Conv2d could not be observed: its forward failed with input_0: ...
    """


class PlanError(SurgeryError):
    """A plan does not fit the model, or would swap nothing.

    Examples:
        >>> import torch, fdsurgery
        >>> fdsurgery.convert(torch.nn.Conv2d(3, 8, 3))
        Traceback (most recent call last):
            ...
        fdsurgery.errors.PlanError: the plan for Conv2d swaps nothing: 1 x it is the whole model; ...
    """


class UnsupportedModelError(SurgeryError):
    """The model is wrapped, compiled, quantised or scripted, and must be converted before that step.

    Examples:
        >>> import torch, fdsurgery
        >>> fdsurgery.convert(torch.nn.DataParallel(torch.nn.Conv2d(3, 8, 3)))
        Traceback (most recent call last):
            ...
        fdsurgery.errors.UnsupportedModelError: the model is wrapped in DataParallel; convert model.module first, ...
    """


class RewriteError(SurgeryError):
    """The swap failed; the model was put back as it was.

    Examples:
        >>> import torch, fdsurgery
        >>> from torch import nn
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)])
        ...     def forward(self, x):
        ...         for layer in self.layers:
        ...             x = layer(x) if type(layer) is nn.Conv2d else x  # by which a dynamic layer is passed over
        ...         return x
        >>> fdsurgery.convert(Net(), example_inputs=torch.randn(1, 3, 8, 8))
        Traceback (most recent call last):
            ...
        fdsurgery.errors.RewriteError: after the swap 'layers.1' is never called, and was 1 times before: ...
    """


class FineTuningError(SurgeryError):
    """No parameter is what was asked for, or an optimizer does not fit the model.

    Examples:
        >>> import torch, fdsurgery
        >>> fdsurgery.freeze(torch.nn.Linear(8, 8), "modulation")
        Traceback (most recent call last):
            ...
        fdsurgery.errors.FineTuningError: nothing to train as 'modulation': the model has no dynamic layer; ...
    """


class CheckpointError(SurgeryError):
    """A saved model cannot be written or read.

    Examples:
        >>> import fdsurgery
        >>> fdsurgery.load("nowhere")
        Traceback (most recent call last):
            ...
        fdsurgery.errors.CheckpointError: nowhere is no saved converted model: it has no fdsurgery.json
    """


def near_misses(word: str, known: Iterable[str], most: int = 3) -> str:
    """`"; did you mean 'a', 'b'?"` for the entries of `known` most like `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)
    if not close:
        return ""
    return "; did you mean " + ", ".join(repr(entry) for entry in close) + "?"


def no_such_key(key: str, known: Iterable[str]) -> str:
    """What to say of a key that is none of `known`."""
    names = list(known)
    return f"no such key; known: {', '.join(names)}{near_misses(key, names)}"


def first_lines(error: BaseException) -> str:
    """The first three lines of what an error says, as one; its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__

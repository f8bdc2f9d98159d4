"""Everything this library raises on purpose; all are `ValueError`s too, for callers who know nothing of us."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 5000
"""Characters of a message. Only what a damaged file holds makes one that long."""


class SurgeryError(ValueError):
    """Base of all errors raised on purpose. The message says what was wrong, where, and what would be right."""

    def __init__(self, message: str = "") -> None:
        # A message quotes what a file holds, and half a surrogate pair of it could not even be printed.
        text = message.encode("utf-8", "backslashreplace").decode()
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 100]} ... {text[-90:]}")


class RecipeError(SurgeryError):
    """A recipe cannot be read, or a rule of it cannot be meant for this model."""


class DiscoveryError(SurgeryError):
    """The model could not be observed: no example input is known for it, or its forward failed."""


class PlanError(SurgeryError):
    """A plan does not fit the model, or would swap nothing."""


class UnsupportedModelError(SurgeryError):
    """The model is wrapped, compiled, quantised or scripted, and must be converted before that step."""


class RewriteError(SurgeryError):
    """The swap failed; the model was put back as it was."""


class FineTuningError(SurgeryError):
    """No parameter is what was asked for, or an optimizer does not fit the model."""


class CheckpointError(SurgeryError):
    """A saved model cannot be written or read."""


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

"""What the check of a conversion measured: of the outputs, of each swapped layer, and the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerVerification:
    """What `verify` measured of one swapped layer.

    Examples:
        >>> import copy, torch, fdsurgery
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> before = copy.deepcopy(model)
        >>> checked = fdsurgery.verify(before, fdsurgery.convert(model), torch.randn(2, 3, 16, 16))
        >>> [(layer.fqn, layer.calls, layer.reaches_output) for layer in checked.layers]
        [('2', 1, True)]
    """

    fqn: str
    relative_error: float | None
    """Largest 2-norm of a difference from the layer that it replaced, over the 2-norm of that one's output, among all
    calls. Infinite if the shapes differ or a value is not finite; None if it could not be compared by itself."""
    tolerance: float
    calls: int
    """Number of calls in one forward of the model."""
    influence: float
    """Estimated relative change of the model's outputs if this layer's output were noise of its own size."""
    reaches_output: bool
    """True if the outputs would show a layer that is altogether wrong: if its influence exceeds the tolerance."""
    unseen: str | None = None
    """Why neither its own output nor the model's would show a difference, in words; None if one of them would."""

    @property
    def ok(self) -> bool:
        """True if a difference would have been seen, and its own error, where it was measured, is in the tolerance."""
        return self.unseen is None and (self.relative_error is None or self.relative_error <= self.tolerance)


@dataclass(frozen=True)
class Verification:
    """What `verify` measured; `print` shows the verdict with its evidence.

    Examples:
        >>> import copy, torch, fdsurgery
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> before = copy.deepcopy(model)
        >>> checked = fdsurgery.verify(before, fdsurgery.convert(model), torch.randn(2, 3, 16, 16))
        >>> checked.ok, checked.relative_error < checked.tolerance, checked.worst.fqn
        (True, True, '2')
    """

    relative_error: float
    """Of the outputs: largest 2-norm of a difference over the 2-norm of the output before; infinite if the shapes
    differ."""
    tolerance: float
    outputs: int
    """Number of floating-point tensors compared."""
    layers: tuple[LayerVerification, ...] = ()
    """Every swapped layer, in the model's order."""

    @property
    def changed(self) -> bool:
        """True if the outputs, or a layer that could be compared, differ beyond the tolerance."""
        whole = self.outputs > 0 and not self.relative_error <= self.tolerance
        return whole or any(not layer.ok for layer in self._compared)

    @property
    def ok(self) -> bool:
        """True if the outputs were compared, a difference in any swapped layer would have been seen, and none was."""
        return self.relative_error <= self.tolerance and all(layer.ok for layer in self.layers)

    @property
    def worst(self) -> LayerVerification | None:
        """The layer with the largest error in terms of its tolerance; None if none could be compared."""
        return max(self._compared, key=lambda layer: (layer.relative_error or 0) / layer.tolerance, default=None)

    @property
    def verdict(self) -> str:
        """What was found, in one line: of the outputs, of the layers, and what could not be checked."""
        parts = [self._of_outputs(), self._of_layers(), self._of_others()]
        if any(not layer.ok for layer in self._compared):
            parts[:2] = reversed(parts[:2])
        return "; ".join(filter(None, parts))

    def to_dict(self) -> dict[str, Any]:
        """The measurement as plain JSON types, with the worst layer in place of all; None for an infinite error."""
        worst = self.worst
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "relative_error": _finite(self.relative_error),
            "tolerance": self.tolerance,
            "layers": len(self.layers),
            "layers_compared": len(self._compared),
            "layers_without_influence": sum(not layer.reaches_output for layer in self.layers),
            "worst_layer": worst and {"fqn": worst.fqn, "relative_error": _finite(worst.relative_error)},
        }

    def __str__(self) -> str:
        return self.verdict

    @property
    def _compared(self) -> list[LayerVerification]:
        return [layer for layer in self.layers if layer.relative_error is not None]

    def _of_outputs(self) -> str:
        if not self.outputs:
            return "nothing to compare: the model returned no floating-point tensor for these inputs"
        measured = f"relative error {self.relative_error:.1e} over {self.outputs} tensor(s)"
        if not self.relative_error <= self.tolerance:
            return f"outputs CHANGED: {measured}, tolerance {self.tolerance:.0e}"
        mute = sum(not layer.reaches_output for layer in self.layers)
        if mute:
            proof = "nothing" if mute == len(self.layers) else "nothing of these"
            return (
                f"outputs agree ({measured}), but {mute} of {len(self.layers)} swapped layers do not influence the "
                f"outputs: comparing the outputs proves {proof}; compared layer by layer instead"
            )
        return f"outputs unchanged: {measured}, tolerance {self.tolerance:.0e}"

    def _of_layers(self) -> str:
        worst = self.worst
        if worst is None:
            return ""
        differ = sum(not layer.ok for layer in self._compared)
        found = f"{len(self._compared)} of {len(self.layers)} agree layer by layer, each on its own input"
        if differ:
            found = f"layers CHANGED: {differ} of {len(self.layers)} differ, each on its own input"
        return (
            f"{found}: largest relative error {worst.relative_error:.1e} in {worst.fqn!r}, "
            f"tolerance {worst.tolerance:.0e}"
        )

    def _of_others(self) -> str:
        unseen = [layer for layer in self.layers if layer.unseen is not None]
        seen = len(self.layers) - len(self._compared) - len(unseen)
        parts = [f"{seen} of {len(self.layers)} swapped layers compared by the outputs alone"] if seen else []
        if unseen:
            first = f"{unseen[0].fqn!r}: {unseen[0].unseen}"
            parts.append(f"NOT CHECKED: {len(unseen)} of {len(self.layers)} swapped layers, {first}")
        return "; ".join(parts)


def _finite(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None

"""The check that conversion changed nothing: layer by layer on the inputs that each really gets, and as a whole.

Agreement of the outputs alone may be worth nothing. Fresh networks end their blocks in norms of zero or layer scales
of 1e-6, and behind these any layer may be wrong. So every swapped layer is compared with the one that it replaced, on
the very same input, and it is measured whether the outputs would show a difference at all.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .discovery import Inputs
from .errors import SurgeryError
from .inference import Replayed, without_graphs
from .operators import operator_of
from .rewrite.graph import modules_from_calls
from .wrappers import inner_of

TOLERANCE = 1e-5
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Where numbers have fewer digits: about four units of the last place."""


@dataclass(frozen=True)
class LayerVerification:
    """What `verify` measured of one swapped layer."""

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
    """What `verify` measured; `print` shows the verdict with its evidence."""

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


def verify(
    model_before: nn.Module, model_after: nn.Module, inputs: Any, tolerance: float | None = None
) -> Verification:
    """Compare two models in eval mode on the same inputs: every swapped layer by itself, and every output.

    ```python
    before = copy.deepcopy(model)
    fdsurgery.convert(model)
    checked = fdsurgery.verify(before, model, images)
    assert checked.ok, checked
    ```

    In one forward of the converted model, the output of each dynamic layer is compared with that of the layer of the
    same name in `model_before`, given the very same input. Then it is measured how much each layer's output means for
    the model's: by a gradient, and for layers that seem to have no influence, with noise in place of their output.

    Args:
        model_before: a copy of the model from before the conversion (`copy.deepcopy(model)`). It may have dynamic
            layers too: those layers are compared that are dynamic in either model.
        model_after: the converted model. If it is wrapped, compiled or prepared for inference, its layers are compared
            in a forward of their own.
        inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        tolerance: largest relative error that passes; by default 1e-5, in float16 4e-3 and in bfloat16 3e-2; in these
            `sqrt(layers) / 4` times that for the outputs of more than 16 layers.

    Returns:
        The measurement; its `ok` is the verdict, which is no where something could not be compared. Modes and random
        state are as before.
    """
    arguments = Inputs.of(inputs)
    before, after = inner_of(model_before), inner_of(model_after)
    with evaluating(model_before), evaluating(model_after):
        expected = _outputs(model_before, arguments)
        comparisons = _comparisons(before, after)
        with _layer_by_layer(after), _hooked(comparisons, _compare):
            outputs = _outputs(after, arguments)
        if after is not model_after or _skips_hooks(after):
            outputs = _outputs(model_after, arguments)
        allowed = [tolerance or one.tolerance for one in comparisons]
        limit = max([TOLERANCE, *allowed, *map(_tolerance, expected), *map(_tolerance, outputs)])
        if limit > TOLERANCE:  # roundings add up, as the root of their number: four units are those of 16 layers
            limit *= max(1.0, len(comparisons) ** 0.5 / 4)
        limit = tolerance or limit
        with _layer_by_layer(after):
            influences = _influences(after, arguments, comparisons, limit)
    layers = tuple(
        one.measured(allows, influence, influence > limit)
        for one, allows, influence in zip(comparisons, allowed, influences, strict=True)
    )
    return Verification(_largest_error(outputs, expected), limit, len(expected), layers)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||` in float64; infinite where the shapes differ or a value is not finite."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.detach().to("cpu", torch.float64)
    difference = (actual.detach().to("cpu", torch.float64) - expected).norm()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / expected.norm().clamp_min(torch.finfo(torch.float64).tiny)) if difference else 0.0


@torch.no_grad()
def _outputs(model: nn.Module, arguments: Inputs) -> list[Tensor]:
    return _run(model, arguments)


def _run(model: nn.Module, arguments: Inputs) -> list[Tensor]:
    """The floating-point tensors that a model returns."""
    own = arguments.map(torch.clone)  # some models change their inputs in place
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some models draw at random even in eval mode
        outputs = model(*own.args, **own.kwargs)
    tensors = [leaf for leaf in _leaves(outputs) if isinstance(leaf, Tensor)]
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    return [tensor for tensor in real if tensor.is_floating_point()]


def _leaves(outputs: Any) -> Iterator[Any]:
    """What is in nested containers and dataclasses."""
    for leaf in pytree.tree_leaves(outputs):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from _leaves(getattr(leaf, field.name))
        else:
            yield leaf


def _largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if not expected or len(actual) != len(expected):
        return float("inf")
    return max(map(_error_of_outputs, actual, expected))


def _error_of_outputs(actual: Tensor, expected: Tensor) -> float:
    """As `relative_error`, of the values that are finite in either: hidden logits of -inf in both are no difference."""
    if actual.shape == expected.shape and actual.layout == expected.layout == torch.strided:
        same = ((actual == expected) | (actual.isnan() & expected.isnan())) & ~expected.isfinite()
        if bool(same.any()) and not bool(same.all()):
            actual, expected = actual.masked_fill(same, 0), expected.masked_fill(same, 0)
    return relative_error(actual, expected)


def _finite(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None


def _tolerance(tensor: Tensor) -> float:
    return TOLERANCES.get(tensor.dtype, TOLERANCE)


# Layer by layer


@dataclass
class _Comparison:
    """A layer of one model next to the layer of that name in another, over the calls of one forward."""

    fqn: str
    layer: nn.Module
    twin: nn.Module | None
    """None if there is none, or none that should give the same."""
    calls: int = 0
    error: float = 0.0
    signal: float = 0.0
    """How far an output shows the weight, in the call that shows most: 0 for none, 1 for all of it."""
    tolerance: float = TOLERANCE

    def measured(self, tolerance: float, influence: float, reaches_output: bool) -> LayerVerification:
        unseen = None
        if not self.calls:
            unseen = "these inputs never lead to a call of it"
        elif self.twin is None and not reaches_output:
            unseen = "the model before has no layer of this name that should give the same"
        elif self.twin is not None and self.signal <= tolerance:
            unseen = "it gets nothing but zeros, or so little that only its bias shows"
        error = None if unseen or self.twin is None else self.error
        return LayerVerification(self.fqn, error, tolerance, self.calls, influence, reaches_output, unseen)


def _comparisons(before: nn.Module, after: nn.Module) -> list[_Comparison]:
    """The layers that are dynamic in either model."""
    twins = {
        fqn.replace("_orig_mod.", ""): layer
        for fqn, layer in _with_layers(before).named_modules(remove_duplicate=False)
    }
    found = []
    for fqn, layer in after.named_modules():
        fqn = fqn.replace("_orig_mod.", "")
        twin = twins.get(fqn)
        if any(one is not None and operator_of(one) is not None for one in (layer, twin)):
            # With a norm folded into it, a layer gives what the norm gave.
            folded = [getattr(one, "filter_scale", None) is not None for one in (layer, twin)]
            found.append(_Comparison(fqn, layer, twin if folded[0] == folded[1] else None))
    return found


def _skips_hooks(model: nn.Module) -> bool:
    """True for what was compiled or recorded before, and would not call hooks that are new."""
    parts = list(model.modules())
    return isinstance(model.forward, Replayed) or any(
        part._compiled_call_impl is not None or "_orig_mod" in part._modules for part in parts
    )


@contextmanager
def _layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Nothing runs compiled or recorded, so that hooks see every layer."""
    compiled = "torch._dynamo" in sys.modules
    with without_graphs(model), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield


def _with_layers(model: nn.Module) -> nn.Module:
    """The model; of a graph whose layers are functional calls, a copy in which they are layers."""
    if not isinstance(model, fx.GraphModule):
        return model
    try:
        return modules_from_calls(copy.deepcopy(model))
    except SurgeryError:
        return model


Hook = Callable[[_Comparison, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]


@contextmanager
def _hooked(comparisons: Sequence[_Comparison], hook: Hook) -> Iterator[None]:
    """See, and perhaps replace, what each layer gives, before hooks of others do."""

    def bound(one: _Comparison) -> Callable[..., Tensor | None]:
        return lambda _, args, kwargs, output: hook(one, args, kwargs, output)

    handles = [one.layer.register_forward_hook(bound(one), prepend=True, with_kwargs=True) for one in comparisons]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _compare(one: _Comparison, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
    one.calls += 1
    if one.twin is None:
        return
    try:
        expected = one.twin.forward(*args, **kwargs)  # its hooks would change the input, or the output, once more
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # of shapes or dtypes that it does not take
        one.error = one.signal = float("inf")
        return
    one.tolerance = max(one.tolerance, _tolerance(output), _tolerance(expected))
    one.error = max(one.error, relative_error(output, expected))
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if any(bool(value.any()) for value in given):
        one.signal = max(one.signal, _signal(one.twin, expected))


def _signal(layer: nn.Module, output: Tensor) -> float:
    """The share of an output that is not bias. All of it if there is nothing else: a weight of zeros gives that."""
    bias: Any = getattr(layer, "bias", None)
    if bias is None or not output.numel():
        return 1.0
    return (
        relative_error((bias.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else bias).expand_as(output), output) or 1.0
    )


# What a layer means for the outputs


def _influences(
    model: nn.Module, arguments: Inputs, comparisons: Sequence[_Comparison], tolerance: float
) -> list[float]:
    """The relative change of the outputs that noise in place of each layer's output makes, or would make.

    A gradient tells of all layers at once. But it may be zero, or none, where noise has an influence: behind a ReLU, in
    a forward without gradients. So layers without one are tried, first all together.
    """
    found = _by_gradient(model, arguments, comparisons)
    doubtful = [index for index, influence in enumerate(found) if not influence > tolerance]
    if doubtful:
        usual = _outputs(model, arguments)
        together = _with_noise(model, arguments, [comparisons[index] for index in doubtful], usual)
        alone = together > tolerance and len(doubtful) > 1
        for index in doubtful:
            found[index] = _with_noise(model, arguments, [comparisons[index]], usual) if alone else together
    return found


def _with_noise(
    model: nn.Module, arguments: Inputs, comparisons: Sequence[_Comparison], usual: Sequence[Tensor]
) -> float:
    generator = torch.Generator().manual_seed(0)

    def replace(_one: Any, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32, device="cpu")
        return (noise.to(output.device) * _size(output)).to(output.dtype)

    with _hooked(comparisons, replace):
        return _largest_error(_outputs(model, arguments), usual)


def _by_gradient(model: nn.Module, arguments: Inputs, comparisons: Sequence[_Comparison]) -> list[float]:
    """By the gradient of random projections of the outputs, each in units of its norm.

    For a projection on Gaussian noise, the norm of the gradient is that of the Jacobian in expectation; so times the
    size of an output's entries it is the change that independent noise of this size makes.
    """
    added: dict[str, list[tuple[Tensor, float]]] = {one.fqn: [] for one in comparisons}

    def add_zero(one: _Comparison, _args: Any, _kwargs: Any, output: Tensor) -> Tensor:
        zero = torch.zeros_like(output, requires_grad=True)
        added[one.fqn].append((zero, _size(output)))
        return output + zero

    try:
        with torch.inference_mode(False), torch.enable_grad(), _hooked(comparisons, add_zero):
            outputs = _run(model, arguments)
            projected = sum(_projected(output) for output in outputs)
            zeros = [zero for calls in added.values() for zero, _ in calls]
            gradients = iter(torch.autograd.grad(projected, zeros, allow_unused=True))  # type: ignore[arg-type]
    except Exception:  # no gradient, or no memory for it; noise needs neither
        return [0.0] * len(comparisons)
    return [
        sum(
            (
                _size(gradient) ** 2 * gradient.numel() * size**2
                for _, size in calls
                if (gradient := next(gradients)) is not None
            ),
            0.0,
        )
        ** 0.5
        for calls in added.values()
    ]


def _projected(output: Tensor) -> Tensor:
    noise = torch.randn(
        output.shape, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    ).to(output.device)
    exact = output.to(torch.promote_types(output.dtype, torch.float32))
    return (exact * noise).sum() / exact.detach().norm().clamp_min(torch.finfo(torch.float32).tiny)


def _size(tensor: Tensor) -> float:
    """Root of the mean square of the entries."""
    return float(tensor.detach().float().norm()) / max(tensor.numel(), 1) ** 0.5


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module is back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

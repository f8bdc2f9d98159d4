"""Positions and samples that a model keeps apart, seen by running it with a part of its input changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .flow import Flow, Node
from .hints import FEWEST_POSITIONS
from .inputs import Inputs
from .kinds import known_kind
from .record import tensors_in
from .shadow import same_random_numbers, twin_of

Side = Literal["after", "before", "both", "near"]


@dataclass(frozen=True)
class _Point:
    """Where the model is watched: the input of a layer's call, or a tensor of the model's result."""

    node: Node
    is_output: bool = False


@dataclass(frozen=True)
class _Sides:
    """Where changes lie, seen from the positions that were changed."""

    anywhere: Side
    within: Side
    """The same within one entry of the first axis, over which a mean is taken; frames of a video may have one each."""


@dataclass(frozen=True)
class _Place:
    """A stretch of one axis of one of the model's inputs."""

    start: int
    width: int
    length: int
    other: int
    """Length of the other side of an image, if `axis` is that of its rows; otherwise 0."""


def kept_apart(model: nn.Module, flow: Flow, inputs: Inputs, names: Iterable[str], hooks: bool) -> dict[str, str]:
    """For layers whose input holds positions or samples that the model keeps apart, the reason in words.

    Args:
        model: the model whose forward `flow` shows, with real weights; a copy of it runs.
        flow: one forward.
        inputs: what it was called with, with values.
        names: the layers to judge.
        hooks: as for `fdsurgery.discovery.record.record`.

    Raises:
        Exception: whatever the model's forward raises.
    """
    twin, _ = twin_of(model, meta=False, hooks=hooks)
    with torch.no_grad(), same_random_numbers():
        _fill_zeros(twin)
    watch = _Watch(twin, flow, inputs)
    names = list(names)
    found: dict[str, str] = {}
    for path, tensor in inputs.tensors():
        for axis in range(1, tensor.dim()):
            if tensor.shape[axis] >= FEWEST_POSITIONS and _can_change(tensor):
                sides = _sides(watch, path, tensor, axis)
                for name in _one_sided(flow, sides, names):
                    later, earlier = ("later", "earlier") if "after" in _directions(sides) else ("earlier", "later")
                    found.setdefault(
                        name,
                        f"{later} positions (axis {axis} of {path!r}) do not reach {earlier} ones in this model: its "
                        "weight is made from the mean over all positions, and would let them",
                    )
    for name in _mixing_samples(watch, flow, names):
        found.setdefault(
            name,
            "its input holds several samples in one entry of the first axis, which this model keeps apart: they would "
            "be given one weight, made from all of them",
        )
    return found


def _fill_zeros(twin: nn.Module) -> None:
    """Weights that begin at zero let nothing through. The copy gets others; some that it has are shared."""
    for module in twin.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and key != "bias" and parameter.is_floating_point() and not parameter.any():
                module._parameters[key] = nn.Parameter(0.1 * torch.randn_like(parameter), False)


def _can_change(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or (tensor.dtype in (torch.long, torch.int) and tensor.dim() == 2)


def _changed(tensor: Tensor, axis: int, start: int, width: int) -> Tensor:
    tensor = tensor.clone()
    part = tensor.narrow(axis, start, width)
    if tensor.is_floating_point():
        source = torch.Generator("cpu").manual_seed(start)
        noise = torch.randn(part.shape, generator=source, dtype=torch.float32, device="cpu")
        part.add_(noise.to(part) * (tensor.std() + 0.1))
    else:  # another token, and one that there is
        part.copy_(torch.where(part > 0, part - 1, part + 1))
    return tensor


class _Watch:
    """Runs the copy with changed inputs, and tells what changed at every point."""

    def __init__(self, twin: nn.Module, flow: Flow, inputs: Inputs) -> None:
        self.twin, self.flow, self.inputs = twin, flow, inputs
        # Sums of a Fourier transform all differ a little.
        self.tolerance = 1e-5 if any("fft" in op for op in flow.op.values()) else 0.0
        self.base = self._run(inputs)

    def changes(self, path: str, changed: Tensor) -> dict[_Point, Tensor]:
        """Where values differ if the tensor at `path` is another one, bool, in the shape of what is at the point."""
        return self.changes_of({path: changed})

    def changes_of(self, changed: dict[str, Tensor]) -> dict[_Point, Tensor]:
        by_id = {id(tensor): changed[path] for path, tensor in self.inputs.tensors() if path in changed}
        seen = self._run(self.inputs.map(lambda tensor: by_id.get(id(tensor), tensor)))
        pairs = ((point, was, seen[point]) for point, was in self.base.items() if point in seen)
        return {point: self._differ(was, now) for point, was, now in pairs if was.shape == now.shape and was.numel()}

    def _differ(self, was: Tensor, now: Tensor) -> Tensor:
        if self.tolerance and was.is_floating_point():
            return (now - was).abs() > self.tolerance * was.abs().amax()
        return (was != now) & ~(was.isnan() & now.isnan())

    @torch.no_grad()
    def _run(self, inputs: Inputs) -> dict[_Point, Tensor]:
        taken: dict[str, list[Tensor]] = {}
        hung = []
        for name in self.flow.calls:

            def take(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                given = args[0] if args else kwargs["input"]
                taken.setdefault(name, []).append(given.detach().clone())

            hung.append(self.twin.get_submodule(name).register_forward_pre_hook(take, with_kwargs=True))
        try:
            with same_random_numbers():
                # Some models write to what they are given.
                result = list(tensors_in(self.twin(*(given := inputs.map(Tensor.clone)).args, **given.kwargs)))
        finally:
            for handle in hung:
                handle.remove()
        seen: dict[_Point, Tensor] = {}
        for name, tensors in taken.items():
            calls = self.flow.calls[name]
            if len(calls) == len(tensors):
                seen.update(zip(map(_Point, calls), tensors, strict=True))
        outputs: Any = self.flow.nodes[-1].args[0]
        if len(outputs) == len(result):
            seen.update((_Point(node, True), tensor) for node, tensor in zip(outputs, result, strict=True))
        return seen


def _sides(watch: _Watch, path: str, tensor: Tensor, axis: int) -> dict[_Point, _Sides]:
    """On which side of the positions that are changed the changes lie, by two places of one axis.

    Points where nothing changes, or that have no positions, are left out.
    """
    length, width = tensor.shape[axis], max(1, tensor.shape[axis] // 16)
    other = tensor.shape[-1] if tensor.dim() >= 4 and axis == tensor.dim() - 2 else 0
    each: list[dict[_Point, _Sides]] = []
    for start in (length // 3, length - length // 3 - width):
        place = _Place(start, width, length, other)
        changes = watch.changes(path, _changed(tensor, axis, start, width))
        told = ((point, _side(watch.flow, point, changed, place)) for point, changed in changes.items())
        each.append({point: sides for point, sides in told if sides is not None})
    first, second = each
    return {
        point: _Sides(_agreed(sides.anywhere, second[point].anywhere), _agreed(sides.within, second[point].within))
        for point, sides in first.items()
        if point in second
    }


def _agreed(first: Side, second: Side) -> Side:
    if first == second:
        return first
    return "both" if "both" in (first, second) else "near"


def _side(flow: Flow, point: _Point, changed: Tensor, place: _Place) -> _Sides | None:
    if not changed.any():
        return None
    within = [_side_along(line, place, changed.dim() == 3) for line in _lines(flow, point, changed, place)]
    parts = changed.shape[0] // flow.batch  # of one sample, each with a weight of its own
    anywhere = list(within)
    if parts > 1 and parts * flow.batch == changed.shape[0]:
        anywhere.append(_side_along(changed.reshape(flow.batch, parts, -1).any(2).any(0), place, False))
    return _Sides(_telling(anywhere), _telling(within)) if anywhere else None


def _telling(sides: list[Side]) -> Side:
    """Of the axes that may hold the positions, the one that tells most: along the others, all changes."""
    order: tuple[Side, ...] = ("after", "before", "near", "both")
    return min(sides, key=order.index, default="both")


def _lines(flow: Flow, point: _Point, changed: Tensor, place: _Place) -> Iterator[Tensor]:
    """Whether anything changes, along each axis that may hold positions."""
    axes: Iterable[int]
    if point.is_output:
        axes = [axis for axis in range(1, changed.dim()) if changed.dim() > 2 and changed.shape[axis] == place.length]
    else:
        axes = known_kind(flow.layer(point.node)).position_axes(changed.dim())
    for axis in axes:
        if changed.shape[axis] > 1:
            yield changed.movedim(axis, 0).flatten(1).any(1)


def _side_along(changed: Tensor, place: _Place, flattened: bool) -> Side:
    length, scale = len(changed), len(changed) / place.length
    row = math.sqrt(length * place.other / place.length) if flattened and place.other else 0.0
    slack = math.ceil(row + 1) if row else 0
    hit = changed.nonzero()
    before = math.floor(place.start * scale) - int(hit[0])
    after = int(hit[-1]) - (math.ceil((place.start + place.width) * scale) - 1)
    reach = max(2, 2 * scale, 2 * slack)
    if before <= slack and after >= reach:
        return "after"
    if after <= slack and before >= reach:
        return "before"
    return "both" if min(before, after) > slack else "near"


def _directions(sides: dict[_Point, _Sides]) -> set[Side]:
    return {side.anywhere for side in sides.values()} & {"after", "before"}


def _one_sided(flow: Flow, sides: dict[_Point, _Sides], names: Iterable[str]) -> Iterator[str]:
    """Layers that a one-sided point lies before or behind, with none behind them where both sides have met."""
    if len(_directions(sides)) != 1:  # none, or one for each direction
        return
    one_sided = {point for point, side in sides.items() if side.anywhere in ("after", "before")}
    for name in names:
        points = [_Point(call) for call in flow.calls.get(name, ())]
        if not points or any(point not in sides or sides[point].within == "both" for point in points):
            continue
        own = {point.node for point in points}
        below = set().union(*map(_behind, own))
        behind = {point for point in sides if point.node in below or (point.is_output and point.node in own)}
        if any(sides[point].anywhere == "both" for point in behind):
            continue
        if one_sided & {*points, *behind} or any(own & _behind(point.node) for point in one_sided):
            yield name


def _behind(node: Node) -> set[Node]:
    seen, queue = set(), list(node.users)
    while queue:
        at = queue.pop()
        if at not in seen:
            seen.add(at)
            queue.extend(at.users)
    return seen


def _mixing_samples(watch: _Watch, flow: Flow, names: Iterable[str]) -> list[str]:
    """Layers whose input has two samples in one entry of its first axis, in a model whose results do not mix them."""
    batched = {
        path: tensor
        for path, tensor in watch.inputs.tensors()
        if tensor.dim() and tensor.shape[0] == flow.batch and _can_change(tensor)
    }
    if flow.batch < 2 or not batched:
        return []
    first, second = (
        watch.changes_of({path: _changed(tensor, 0, sample, 1) for path, tensor in batched.items()})
        for sample in (0, 1)
    )
    mixed = {
        point
        for point in first.keys() & second.keys()
        if first[point].dim() and bool((first[point].flatten(1).any(1) & second[point].flatten(1).any(1)).any())
    }
    if any(point.is_output for point in mixed):
        return []
    return [name for name in names if any(_Point(call) in mixed for call in flow.calls.get(name, ()))]

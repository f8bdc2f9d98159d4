"""Positions and samples that must not see each other, found by trying: change a part of the input, see what changes.

The graph of a forward shows masks (`fdsurgery.discovery.positions`), but not what a loop, a crop, a mask made from
features or compiled code do to positions. Where it holds any of these, the model is run on real tensors, with some
positions of its input changed: if, all over the model, what changes lies on one side of them, the model keeps later
positions from earlier ones, and a mean over all positions would undo it.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .flow import Flow, Node, layer_input, shape_of
from .inputs import Inputs
from .ops import ACTIVATION, ELEMENTWISE, JOIN, LAYOUT, NORM
from .positions import takes_shape
from .record import record, tensors_in
from .shadow import same_random_numbers, twin_of
from .site import Site

MOST_MULTIPLY_ADDS = 5 * 10**10
"""Of the layers in one forward of the example inputs: some seconds on one CPU core, and a probe runs up to ten."""

_FEWEST_POSITIONS = 6  # so that two places have two positions on either side

Side = Literal["after", "before", "both", "near"]


def probe(model: nn.Module, flow: Flow, inputs: Inputs, sites: Sequence[Site], hooks: bool = False) -> dict[str, str]:
    """For sites of which nothing is said so far, a caution found by trying, where there is reason to try.

    A probe that fails says nothing: the forward that failed is one of ours, which the model need not take.

    Args:
        model: the model whose forward `flow` shows.
        flow: one forward.
        inputs: what it was called with.
        sites: what is known of its layers.
        hooks: run copies of the hooks that hang on the model, as for `fdsurgery.discovery.record.record`.
    """
    open_sites = [site for site in sites if site.obstacle is None and site.caution is None]
    names = [site.name for site in open_sites if site.calls]
    found: dict[str, str] = {}
    if any(_may_be_packed(flow, site) for site in open_sites):
        with contextlib.suppress(Exception):
            found |= {
                name: told for name, told in packed_when_doubled(model, flow, inputs, hooks).items() if name in names
            }
    size = flow.batch * sum(site.multiply_adds for site in sites)
    tensors = [*model.parameters(), *model.buffers(), *(tensor for _, tensor in inputs.tensors())]
    runs = size <= MOST_MULTIPLY_ADDS and not any(tensor.is_meta for tensor in tensors)
    if names and runs and hint(flow, masks_read=any(site.caution for site in sites)):
        with contextlib.suppress(Exception):
            found = kept_apart(model, flow, inputs, names, hooks) | found
    return {name: reason for name, reason in found.items() if name in names}


def _may_be_packed(flow: Flow, site: Site) -> bool:
    """One sample alone does not show it, nor do entries of which each sample has no whole number."""
    return site.calls > 0 and (flow.batch == 1 or (site.input_shape or (0,))[0] % flow.batch > 0)


def packed_when_doubled(model: nn.Module, flow: Flow, inputs: Inputs, hooks: bool) -> dict[str, str]:
    """Layers whose input grows with the batch, but not in its first axis, with the reason in words.

    One sample alone does not show that samples are packed together: the model is recorded once more, on meta tensors,
    with twice as many.

    Args:
        model: the model whose forward `flow` shows.
        flow: one forward.
        inputs: what it was called with; every tensor with a first axis of `flow.batch` is doubled along it.
        hooks: as for `fdsurgery.discovery.record.record`.
    """

    def doubled(tensor: Tensor) -> Tensor:
        tensor = tensor.to("meta")
        return torch.cat([tensor, tensor]) if tensor.dim() and tensor.shape[0] == flow.batch else tensor

    twice = Flow(record(model, inputs.map(doubled), meta=True, hooks=hooks), flow.layers)
    found: dict[str, str] = {}
    for name, calls in flow.calls.items():
        pairs = zip(calls, twice.calls.get(name, ()), strict=False)
        if len(calls) == len(twice.calls.get(name, ())) and any(_grows_elsewhere(*pair) for pair in pairs):
            shape = shape_of(layer_input(calls[0]))
            found[name] = (
                f"the first axis of its input {shape} stays as it is when the batch is doubled: samples packed "
                "together would be given one weight, made from all of them"
            )
    return found


def _grows_elsewhere(call: Node, twice: Node) -> bool:
    before, after = (shape_of(layer_input(node)) or () for node in (call, twice))
    return len(before) > 1 and before[:1] == after[:1] and math.prod(after) > math.prod(before)


def hint(flow: Flow, masks_read: bool = False) -> str | None:
    """What in the graph may keep positions apart without a mask that could be read; None if there is no such thing.

    Args:
        flow: one forward.
        masks_read: True where masks were read and had to do with positions kept apart: then they explain what is
            triangular in the graph.
    """
    written: Counter[tuple[Any, Any]] = Counter()
    selections = Counter(node.all_input_nodes[0] for node in flow.nodes if _is_crop(flow, node))
    for node in flow.nodes:
        op = flow.op[node]
        if not masks_read and _is_triangular(op, shape_of(node)):
            return "a triangular matrix"
        if node.meta.get("unwatched") and (shape_of(node) or ())[:1] == (flow.batch,):
            return "code that cannot be watched"
        if node not in flow.from_input:
            continue
        if op == "unseen_operation" or _is_custom(node):
            return "code that cannot be watched"
        if op in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            return "a recurrent layer"
        if op in ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp") and node in flow.after_learned:
            return "a running sum"
        if op == "setitem":
            key = node.meta.get("fqn"), shape_of(node)
            written[key] += 1
            if written[key] >= _FEWEST_POSITIONS:
                return "a tensor written to part by part"
        if op in JOIN and (_joins_steps(flow, node, selections) or _shifts(flow, node)):
            return "parts joined along positions"
        if _crops_convolution(flow, node):
            return "a convolution cropped on one side"
        if op in ("pad", "constant_pad_nd") and _pads_one_side(flow, node):
            return "padding on one side"
        if any(mask in flow.after_learned and mask in flow.from_input for mask in _masks(op, node)):
            return "a mask made from features"
    return None


def _is_triangular(op: str, shape: tuple[int, ...] | None) -> bool:
    """Triangles of a matrix, or indices compared with one another."""
    if op in ("lt", "le", "gt", "ge"):
        return shape is not None and len(shape) == 2 and shape[0] == shape[1] >= _FEWEST_POSITIONS
    return op in ("tril", "triu")


def _is_custom(node: Node) -> bool:
    """An operation that an extension registered with torch."""
    target: Any = node.target
    named = getattr(target, "_qualified_op_name", None) or getattr(target, "_schema", None)
    if named is None and hasattr(target, "overloadpacket"):
        named = target.overloadpacket
    name = getattr(named, "name", None) or named
    return isinstance(name, str) and "::" in name and name.split("::")[0] not in ("aten", "prims", "torchvision")


def _joins_steps(flow: Flow, node: Node, selections: Counter[Node]) -> bool:
    """Parts of one tensor, as many as there may be positions, laid side by side again."""
    parts = [part for part in node.all_input_nodes if part in flow.from_input]
    if len(parts) < _FEWEST_POSITIONS or len({shape_of(part) for part in parts}) > 1:
        return False
    if not any(selections[source] >= _FEWEST_POSITIONS for source in flow.backward(node, lambda _: True)):
        return False
    return flow.op[node] == "stack" or bool(_grown(shape_of(parts[0]), shape_of(node)))


def _shifts(flow: Flow, node: Node) -> bool:
    """Positions moved on by some: the front filled up, the end cut off."""
    parts = [part for part in node.all_input_nodes if part in flow.from_input and not takes_shape(flow, part)]
    if len(parts) != 1 or len(node.all_input_nodes) < 2 or not _is_crop(flow, parts[0]):
        return False
    return bool(grown := _grown(shape_of(parts[0]), shape_of(node))) and set(grown) <= set(_cropped(parts[0]))


def _grown(part: tuple[int, ...] | None, whole: tuple[int, ...] | None) -> list[int]:
    """Axes, of those that may be positions, along which the whole is longer than a part."""
    part, whole = part or (), whole or ()
    if len(part) != len(whole):
        return []
    first = 1 if len(whole) == 3 else 2
    return [axis for axis in range(first, len(whole)) if whole[axis] > part[axis]]


def _is_crop(flow: Flow, node: Node) -> bool:
    return flow.op[node] in ("getitem", "narrow", "select", "slice") and bool(node.all_input_nodes)


def _cropped(node: Node) -> list[int]:
    whole, part = shape_of(node.all_input_nodes[0]) or (), shape_of(node) or ()
    return [axis for axis in range(len(part)) if part[axis] < whole[axis]] if len(whole) == len(part) else []


def _crops_convolution(flow: Flow, node: Node) -> bool:
    if not _is_crop(flow, node) or _is_centred(node):
        return False
    if flow.op[node.all_input_nodes[0]].endswith("irfft"):
        return True
    if not any(axis >= 2 for axis in _cropped(node)):
        return False
    passed = LAYOUT | NORM | ACTIVATION | ELEMENTWISE
    walk = flow.backward(node, lambda at: at is node or flow.op[at] in passed, 40)
    return any(_is_convolution(flow, at) or flow.op[at].endswith("irfft") for at in walk)


def _is_centred(node: Node) -> bool:
    """As much is cut off in front as at the end."""
    index = node.args[1] if len(node.args) > 1 else None
    index = index if isinstance(index, tuple) else (index,)
    shape = shape_of(node.all_input_nodes[0]) or ()
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (len(shape) - len(index) + 1), *index[at + 1 :])
    try:
        spans = [part.indices(size) for part, size in zip(index, shape, strict=False)]
    except (AttributeError, TypeError):
        return False
    return all(start == size - stop or step != 1 for (start, stop, step), size in zip(spans, shape, strict=False))


def _is_convolution(flow: Flow, node: Node) -> bool:
    return isinstance(flow.layer(node), nn.Conv2d) or flow.op[node] in ("conv1d", "conv2d", "conv3d", "convolution")


def _pads_one_side(flow: Flow, node: Node) -> bool:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad", ())
    pads = [value for value in given if isinstance(value, int)] if isinstance(given, (tuple, list)) else []
    sides = list(zip(pads[::2], pads[1::2], strict=False))
    if len(shape_of(node) or ()) == 3 and any(left * right < 0 for left, right in sides):
        return True  # tokens, moved on by some: what is cut off at one end is put on at the other
    reader: Node | None = node
    while reader is not None and (reader is node or flow.op[reader] in LAYOUT):
        reader = next(iter(reader.users), None)
    one_sided = any(abs(left - right) > 1 for left, right in sides)
    return one_sided and reader is not None and _is_convolution(flow, reader)


def _masks(op: str, node: Node) -> Iterator[Node]:
    place = {"where": (0, "condition"), "masked_fill": (1, "mask"), "scaled_dot_product_attention": (3, "attn_mask")}
    if op in place:
        at, key = place[op]
        mask = node.args[at] if len(node.args) > at else node.kwargs.get(key)
        if isinstance(mask, Node) and len(set((shape_of(mask) or (0, 1))[-2:])) == 1:  # square: of self-attention
            yield mask


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
            if tensor.shape[axis] >= _FEWEST_POSITIONS and _can_change(tensor):
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
    elif isinstance(flow.layer(point.node), nn.Conv2d):
        axes = range(changed.dim() - 2, changed.dim())
    else:
        axes = range(1, changed.dim() - 1)
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

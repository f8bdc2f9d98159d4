"""Inference with a converted model: layers that are prepared once, and on NVIDIA GPUs graphs that are replayed."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import DiscoveryError, UnsupportedModelError
from .norms import fuse_norms
from .operators import made_layers
from .rewrite.check_model import refuse_unsupported

GRAPHS = 8
"""Graphs that a model keeps: one for each combination of input shapes. What comes after runs without one."""

WARM_UP = 3
"""Calls before a graph is recorded, in which libraries and kernels choose and load what they use."""

Run = Callable[[], Any]
Capture = Callable[[Run], tuple[Callable[[], None], Any]]
"""Records what a call does: what does it again, and the result, which is then written anew."""


def compile_for_inference(model: nn.Module, *, example_inputs: Any = None) -> nn.Module:
    """A copy of a converted model that only infers, and does so faster.

    What depends on no input is computed once: batch norms are folded into the dynamic layers before them, as by
    `fuse_norms`, the norms and heads of the global branch become two maps, and on CPUs spectra lie as the compiled
    kernels read them. On an NVIDIA GPU each new combination of input shapes is recorded
    as a CUDA graph, up to eight, and replayed from then on. Outputs agree with the model's in evaluation mode to
    rounding. They carry no gradient.

    Args:
        model: converted, on the device that it will run on; it stays as it is. Parameters and buffers are shared with
            the copy but for those that are prepared. Once the model has been trained further, make a new copy.
        example_inputs: as for `fuse_norms`. Without them, a model of which they cannot be told keeps its norms.

    Returns:
        A model of the same class, in evaluation mode. It refuses `train()` and `state_dict()`.

    Raises:
        UnsupportedModelError: the model has no dynamic layers, is prepared already, or is wrapped, compiled, quantised
            or scripted.
        DiscoveryError: the model does not run with `example_inputs`.

    Examples:
        >>> import torch, fdsurgery
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> model = fdsurgery.convert(model).eval()
        >>> fast = fdsurgery.compile_for_inference(model)
        >>> images = torch.randn(2, 3, 16, 16)
        >>> torch.allclose(fast(images), model(images), atol=1e-5)
        True
    """
    refuse_unsupported(model)
    if not made_layers(model):
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no dynamic layers to prepare: convert it first, fdsurgery.convert(model)"
        )
    if isinstance(model.forward, Replayed):
        raise UnsupportedModelError("this model was prepared for inference already")
    shared = [*model.parameters(), *model.buffers()]
    fast = copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()
    dynamic = made_layers(fast).values()
    try:
        if any(operator.folds_norms for _, operator in dynamic):
            fuse_norms(fast, example_inputs=example_inputs)
    except DiscoveryError:
        if example_inputs is not None:
            raise
        warnings.warn("norms are not folded: pass example_inputs=, which cannot be told from this model", stacklevel=2)
    for layer, operator in dynamic:
        operator.prepare(layer)
    devices = {tensor.device for tensor in shared}
    capture = _capture if len(devices) == 1 and next(iter(devices)).type == "cuda" else None
    # On the instance: hooks and the class stay.
    fast.forward = Replayed(fast.forward, capture)  # type: ignore[method-assign]
    return fast


@dataclass(frozen=True)
class _Graph:
    """A call that was recorded."""

    inputs: list[Tensor]
    """Where it reads what it is given."""
    replay: Callable[[], None]
    outputs: Any
    """What each replay writes to."""

    def __call__(self, given: list[Tensor]) -> Any:
        for place, tensor in zip(self.inputs, given, strict=True):
            place.copy_(tensor)
        self.replay()
        # The next replay writes to the same memory.
        return pytree.tree_map_only(Tensor, torch.clone, self.outputs)


class Replayed:
    """A forward without gradients whose calls are recorded, and replayed when the same shapes come again.

    Args:
        forward: what is called.
        capture: how to record a call; None to record none.
    """

    def __init__(self, forward: Callable[..., Any], capture: Capture | None) -> None:
        functools.update_wrapper(self, forward)
        self.forward = forward
        self.capture = capture
        self.graphs: dict[Any, _Graph | None] = {}
        """By what is the same for all calls that one graph serves; None for what cannot be recorded."""

    @property
    def __code__(self) -> Any:
        """That of the forward: `torch.export` names its inputs by it, and notes where it stands."""
        return self.forward.__code__

    def __getstate__(self) -> dict[str, Any]:
        # A graph reads and writes the memory of the model that it was recorded for; copies record their own.
        return {**vars(self), "graphs": {}}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.capture is None or torch.compiler.is_compiling():
            return self.forward(*args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = _key(leaves, structure)
        if key is None or not tensors:
            return self.forward(*args, **kwargs)
        if key not in self.graphs and len(self.graphs) < GRAPHS:
            self.graphs[key] = self._recorded(leaves, structure)
        graph = self.graphs.get(key)
        return self.forward(*args, **kwargs) if graph is None else graph(tensors)

    def _recorded(self, leaves: list[Any], structure: pytree.TreeSpec) -> _Graph | None:
        assert self.capture is not None
        with torch.inference_mode(False):  # or they could not be written to outside of it
            own = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(own, structure)
        caches = torch.is_autocast_cache_enabled()
        # What autocast casts and caches is freed when its region ends, and a graph would go on reading it.
        torch.set_autocast_cache_enabled(False)
        try:
            replay, outputs = self.capture(lambda: self.forward(*args, **kwargs))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
        else:
            hidden = [leaf for leaf in pytree.tree_leaves(outputs) if not isinstance(leaf, (Tensor, *_PLAIN))]
            if not hidden:
                return _Graph([leaf for leaf in own if isinstance(leaf, Tensor)], replay, outputs)
            reason = f"its result holds a {type(hidden[0]).__name__}"
        finally:
            torch.set_autocast_cache_enabled(caches)
        warnings.warn(f"this model runs without CUDA graphs: a call cannot be recorded: {reason}", stacklevel=3)
        return None


@contextmanager
def without_graphs(model: nn.Module) -> Iterator[None]:
    """Calls of a prepared model run layer by layer, so that hooks see them; no graph is recorded or replayed."""
    replayed = model.forward
    if not isinstance(replayed, Replayed):
        yield
        return
    capture, replayed.capture = replayed.capture, None
    try:
        yield
    finally:
        replayed.capture = capture


_PLAIN = (type(None), bool, int, float, str, torch.dtype)


def _key(leaves: list[Any], structure: pytree.TreeSpec) -> Any:
    """What calls must share to share a graph; None for calls that have none."""
    facts: list[Any] = [str(structure), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            facts.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        elif isinstance(leaf, _PLAIN):
            facts.append((type(leaf), leaf))
        else:
            return None
    return tuple(facts)


def _capture(run: Run) -> tuple[Callable[[], None], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs

"""Block sizes chosen by measurement: Triton's own tuner, with a short warm-up, kept from measuring where it must not.

A kernel has a few candidates, the best guess first. The first launch of a key measures those that fit, and the fastest
serves all later launches of that key, in this process and, from Triton 3.4 on from Triton's cache on disk in others.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .timing import milliseconds

try:
    import triton
except ImportError:
    triton = None

Candidate = dict[str, int]
"""Block sizes, `num_warps`, and `num_stages` where it matters."""

_LOCK = threading.Lock()  # the tuner keeps the arguments of the launch at hand in itself


class CannotMeasure(Exception):
    """Nothing can be measured now: a CUDA graph records launches, which then do not run."""


def _bench(call: Callable[[], Any], quantiles: Any) -> list[float]:
    if torch.cuda.is_current_stream_capturing():
        raise CannotMeasure
    return [milliseconds(call)]


def _config(candidate: Candidate) -> Any:
    options = {name: candidate[name] for name in ("num_warps", "num_stages") if name in candidate}
    return triton.Config({name: size for name, size in candidate.items() if name not in options}, **options)


class Tuned:
    """A kernel that is launched like any other, `tuned[grid](...)`, without its block sizes.

    In Triton's interpreter and where PyTorch is told to be deterministic, the first candidate serves: others may add up
    in another order, and which is the fastest may change from run to run. While a CUDA graph is recorded it serves too,
    unless a choice was made before.

    Args:
        kernel: from `triton.jit`.
        candidates: the best guess first.
        fit: makes a candidate fit the arguments of a launch, which it is given by name: block sizes by the names that
            the kernel has for them.
        key: names of the arguments that, with the dtypes of all tensors, decide whether an earlier choice serves.
    """

    def __init__(
        self,
        kernel: Any,
        candidates: list[Candidate],
        fit: Callable[[Candidate, dict[str, Any]], Candidate],
        key: list[str],
    ) -> None:
        self.kernel, self.candidates, self.fit = kernel, candidates, fit
        self.interpreted = not isinstance(kernel, triton.JITFunction)
        on_disk = {"cache_results": not self.interpreted}  # from Triton 3.4 on
        self.tuner = triton.autotune(
            [_config(candidate) for candidate in candidates],
            key,
            prune_configs_by={"early_config_prune": self._configs},
            do_bench=_bench,
            **(on_disk if "cache_results" in inspect.signature(triton.autotune).parameters else {}),
        )(kernel)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self._launch, grid)

    def fitting(self, arguments: dict[str, Any]) -> list[Candidate]:
        """The candidates made to fit, each once."""
        fitted = [self.fit(candidate, arguments) for candidate in self.candidates]
        return [candidate for i, candidate in enumerate(fitted) if candidate not in fitted[:i]]

    def _configs(self, _: Any, arguments: dict[str, Any], **rest: Any) -> list[Any]:
        return [_config(candidate) for candidate in self.fitting({**arguments, **rest})]

    def _launch(self, grid: Any, *args: Any, **rest: Any) -> None:
        if not self.interpreted and not torch.are_deterministic_algorithms_enabled():
            with _LOCK:
                try:
                    self.tuner[grid](*args, **rest)
                    return
                except CannotMeasure:
                    self.tuner.nargs = None  # or the tensors would live until the next launch
        arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | rest
        self.kernel[grid](*args, **rest, **self.fit(self.candidates[0], arguments))


def tuned(
    candidates: list[Candidate], fit: Callable[[Candidate, dict[str, Any]], Candidate], key: list[str]
) -> Callable[[Any], Any]:
    """Decorate a kernel to be a `Tuned` one; without Triton it stays as it is."""
    return lambda kernel: kernel if triton is None else Tuned(kernel, candidates, fit, key)

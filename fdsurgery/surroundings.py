"""What stands around a call of ours: the modes that the caller has set, and the random state that others draw from."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give the caller back the state of every generator as it was: torch's on CPU and GPUs, numpy's and Python's.

    Nothing is seeded, so what is drawn inside still depends on the seed that the caller has set.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run our own code so that neither the caller's inference mode nor our random numbers leave a trace.

    A parameter made in inference mode can never be trained; inside, tensors are ordinary ones again.
    """
    learns = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(learns), random_state_kept():
        yield

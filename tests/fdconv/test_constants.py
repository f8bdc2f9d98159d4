"""What follows from sizes alone is made once, and never in the midst of something else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fdconv.constants import constant

CALLS: list[int] = []


def ramp(size: int) -> Tensor:
    CALLS.append(size)
    return torch.arange(size, device="cpu")


def test_made_once() -> None:
    CALLS.clear()
    assert constant(ramp, 1003) is constant(ramp, 1003, of_input=True) and CALLS == [1003]
    constant(ramp, 1004)
    assert CALLS == [1003, 1004]


def test_made_in_inference_mode_it_still_trains() -> None:
    with torch.inference_mode():
        made = constant(ramp, 1005), constant(ramp, 1006, of_input=True)
    assert not any(one.is_inference() for one in made)


def test_a_trace_holds_constants_but_makes_what_depends_on_its_input() -> None:
    with FakeTensorMode():
        fixed, traced = constant(ramp, 1007), constant(ramp, 1007, of_input=True)
    assert type(fixed) is Tensor and isinstance(traced, FakeTensor)
    assert constant(ramp, 1007, of_input=True) is fixed, "what belongs to a trace does not outlive it"

"""The ways to convolve per sample agree, and the one that a measurement found fastest serves."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from fdconv.gpu import autotune, common, dispatch
from fdconv.gpu.autotune import Fastest
from fdconv.reference import Convolution

GEOMETRIES = {
    "3x3": ((3, 3), Convolution((1, 1), (1, 1), (1, 1), 1)),
    "strided": ((3, 3), Convolution((2, 1), (1, 0), (1, 1), 1)),
    "dilated, uneven": ((2, 5), Convolution((1, 2), (2, 1), (3, 1), 1)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("way", dispatch._fastest.ways, ids=lambda way: way.__name__)
def test_the_ways_agree(way: Any, name: str) -> None:
    kernel_size, conv = GEOMETRIES[name]
    fused = way is dispatch._as_one_product
    if fused and not common.available(torch.device("cpu")):
        pytest.skip("Triton is not at hand")
    torch.manual_seed(0)
    dtype = torch.float32 if fused else torch.float64
    x = torch.randn(3, 5, 9, 11, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 7, 5, *kernel_size, dtype=dtype, requires_grad=True)
    found = way(x, weight, conv)
    one_by_one = [torch.nn.functional.conv2d(x[i].double(), weight[i].double(), None, *conv[:3]) for i in range(len(x))]
    expected = torch.stack(one_by_one)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if fused else {}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    slope = torch.randn_like(expected)
    for ours, exact in zip(
        torch.autograd.grad(found, (x, weight), slope.to(dtype)),
        torch.autograd.grad(expected, (x, weight), slope),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, **tolerance)


def test_calls_of_one_kind_are_those_of_about_one_size() -> None:
    conv = GEOMETRIES["3x3"][1]

    def kind(batch: int, size: int, channels: int = 5, dtype: torch.dtype = torch.float32) -> Any:
        x = torch.empty(batch, channels, size, size, dtype=dtype)
        return dispatch._kind(x, torch.empty(batch, 7, channels, 3, 3, dtype=dtype), conv)

    assert kind(3, 28) == kind(4, 30)
    assert len({kind(4, 28), kind(5, 28), kind(4, 56), kind(4, 28, 6), kind(4, 28, 5, torch.bfloat16)}) == 5


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured. A way is as slow as its name is long; a graph is being recorded for negative numbers."""
    names: list[str] = []

    def milliseconds(call: Any) -> float:
        assert not torch.is_grad_enabled()
        names.append(call().name)
        return len(names[-1])

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return names


class Way:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, x: float) -> Any:
        if self.name == "too large":
            raise torch.OutOfMemoryError("no")
        return self


def fastest(*names: str) -> Any:
    return Fastest([Way(name) for name in names], key=lambda x: x > 0)  # type: ignore[list-item]


def test_the_fastest_serves_and_is_measured_once_a_key(measured: list[str]) -> None:
    choice = fastest("long", "too large", "a", "bb")
    assert choice(1.0).name == "a"
    assert choice(2.0).name == "a"
    assert measured == ["long", "a", "bb"]
    assert choice(-1.0).name == "a"
    assert len(measured) == 6


def test_threads_measure_once(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    choice = fastest("long", "a")
    milliseconds, everybody = autotune.milliseconds, threading.Barrier(3)

    def slowly(call: Any) -> float:
        time.sleep(0.05)
        return milliseconds(call)

    monkeypatch.setattr(autotune, "milliseconds", slowly)

    def work() -> None:
        everybody.wait()
        choice(1.0)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measured == ["long", "a"]


def test_nothing_is_measured_where_it_must_not(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    choice = fastest("long", "a")
    with monkeypatch.context() as recording:
        recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choice(1.0).name == "long"
    torch.use_deterministic_algorithms(True)
    try:
        assert choice(1.0).name == "long"
    finally:
        torch.use_deterministic_algorithms(False)
    with monkeypatch.context() as tracing:
        tracing.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choice(1.0).name == "long"
    assert not measured
    assert choice(1.0).name == "a"
    with monkeypatch.context() as recording:
        recording.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choice(2.0).name == "a", "an earlier choice serves"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_choice_on_a_gpu() -> None:
    conv = GEOMETRIES["3x3"][1]
    x, weight = torch.randn(4, 16, 14, 14, device="cuda"), torch.randn(4, 32, 16, 3, 3, device="cuda")
    found: Tensor = dispatch.convolve(x, weight, conv)
    torch.testing.assert_close(found, dispatch._as_groups(x, weight, conv), rtol=1e-3, atol=1e-3)
    assert dispatch._kind(x, weight, conv) in dispatch._fastest.chosen

"""Every way to compute the operator gives the same output and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from test_sample_loop import CASES, randomised, results

import fdconv
from fdconv import FDConfig, FDConv2d
from fdconv.cpu import sample_loop
from fdconv.gpu import common

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    fdconv.set_backend("auto")


@pytest.mark.parametrize("name", CASES)
def test_fused_kernels_agree_with_torch(name: str) -> None:
    if not common.available(DEVICE):
        pytest.skip("Triton is not at hand")
    build, shape = CASES[name]
    layer, x = randomised(build()), torch.randn(shape)
    expected = results(copy.deepcopy(layer).double(), x.double())
    fdconv.set_backend("triton")
    for key, found in results(layer.to(DEVICE), x.to(DEVICE)).items():
        error = (found.cpu().double() - expected[key]).norm() / expected[key].norm().clamp(min=1)
        assert error < 2e-5, f"{key}: {error:.1e}"


def test_second_derivatives_of_fused_kernels_are_those_of_torch() -> None:
    if not common.available(DEVICE):
        pytest.skip("Triton is not at hand")
    build, shape = CASES["3x3"]
    layer, x = randomised(build()).to(DEVICE).eval(), torch.randn(shape, device=DEVICE, requires_grad=True)
    seconds = []
    for backend in ("triton", "torch"):
        fdconv.set_backend(backend)  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(slope.square().sum(), [x, layer.dft_weight]))
    for found, expected in zip(*seconds, strict=True):
        assert (found - expected).norm() / expected.norm() < 1e-4


def test_torch_without_the_loop_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_loop, "serves", lambda *_: False)
    layer, x = FDConv2d(64, 64, 3, padding=1, config=FDConfig(fbm_kernel_sizes=())), torch.randn(8, 64, 4, 4)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert sum(kept.values()) < 3 * 64 * 64 * 9, "the spectrum and its groups, not the weights of eight samples"


def test_function_transforms_work() -> None:
    build, shape = CASES["3x3"]
    layer, x = randomised(build().double()).eval(), torch.randn(shape, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        y: torch.Tensor = torch.func.functional_call(layer, values, (x,))
        return y.square().sum()

    found = torch.func.grad(loss)(parameters)
    layer(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)


def test_an_unknown_backend_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match="must be one of auto, torch, cpp, triton, not 'cuda'"):
        fdconv.set_backend("cuda")  # type: ignore[arg-type]


def test_triton_says_what_it_cannot_serve() -> None:
    layer = FDConv2d(4, 4, 3).double()
    fdconv.set_backend("triton")
    with pytest.raises(ValueError, match=r"triton does not serve a torch.float64 layer on cpu"):
        layer(torch.randn(1, 4, 5, 5, dtype=torch.float64))


def test_what_an_earlier_call_returned_puts_back_what_there_was() -> None:
    first = fdconv.set_backend("torch")
    second = fdconv.set_backend("cpp")
    fdconv.set_backend(second)
    assert fdconv.chosen_backend() == "torch"
    fdconv.set_backend(first)
    assert fdconv.chosen_backend() == "auto"

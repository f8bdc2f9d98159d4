"""The loop over chunks of samples computes what whole batches of weights do, forward and backward."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdconv import FDConfig, FDConv2d, FDLinear
from fdconv.cpu import sample_loop, workspace

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "3x3": (lambda: FDConv2d(24, 40, 3, padding=1, config=FDConfig(kernel_num=7)), (5, 24, 9, 11)),
    "strided, grouped": (lambda: FDConv2d(24, 40, 3, 2, 1, groups=4), (5, 24, 9, 11)),
    "depthwise": (lambda: FDConv2d(6, 6, (3, 5), padding=(1, 2), groups=6), (3, 6, 9, 11)),
    "1x1, two spectra, tanh": (
        lambda: FDConv2d(24, 40, 1, config=FDConfig(kernel_num=7, param_ratio=2, local_activation="tanh")),
        (5, 24, 5, 3),
    ),
    "1x1, strided": (lambda: FDConv2d(5, 7, 1, 2), (3, 5, 7, 6)),
    "even kernel, no global branch": (
        lambda: FDConv2d(6, 9, (3, 2), padding=1, config=FDConfig(ksm_global=False)),
        (3, 6, 9, 11),
    ),
    "no local branch": (lambda: FDConv2d(6, 9, 3, dilation=2, config=FDConfig(ksm_local=False)), (3, 6, 9, 11)),
    "no groups of frequencies": (lambda: FDConv2d(6, 9, 3, config=FDConfig(kernel_num=1)), (3, 6, 5, 5)),
    "neither branch": (
        lambda: FDConv2d(6, 9, 3, config=FDConfig(ksm_global=False, ksm_local=False)),
        (3, 6, 5, 5),
    ),
    "one channel": (lambda: FDConv2d(1, 1, 3, padding=1), (2, 1, 4, 4)),
    "linear": (lambda: FDLinear(24, 33), (5, 7, 24)),
    "linear, many positions": (lambda: FDLinear(13, 5, bias=False), (3, 4, 2, 13)),
    "linear, rows": (lambda: FDLinear(13, 5), (4, 13)),
}


def randomised(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}  # type: ignore[dict-item]


@pytest.mark.parametrize(("chunk", "block"), [(2**19, 2**20), (1, 2**20), (1, 1), (700, 64), (2**19, 100)])
@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_whole_batches(name: str, chunk: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = CASES[name]
    layer = randomised(build().double())
    x = torch.randn(shape, dtype=torch.float64)
    monkeypatch.setattr(sample_loop, "CHUNK", chunk)
    monkeypatch.setattr(workspace, "BLOCK", block)
    for buffer in workspace.buffer.held.values():
        buffer.fill_(torch.nan)  # nothing is read that was not written
    looped = results(layer, x)
    monkeypatch.setattr(sample_loop, "serves", lambda *_: False)
    for key, expected in results(layer, x).items():
        torch.testing.assert_close(looped[key], expected, rtol=1e-10, atol=1e-12, msg=lambda text, key=key: key + text)


def test_it_is_what_serves_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("not through the loop")

    monkeypatch.setattr("fdconv.functional.sample_weights", fail)
    for name, (build, shape) in CASES.items():
        if name == "neither branch":  # one weight for all samples
            with pytest.raises(AssertionError, match="through the loop"):
                build()(torch.randn(shape))
        else:
            build()(torch.randn(shape))


def test_gradients_by_differences_and_second_derivatives() -> None:
    layer = randomised(FDConv2d(3, 4, 3, padding=1, config=FDConfig(kernel_num=5)).double())
    layer.eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    parameters = list(layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_near(dtype: torch.dtype) -> None:
    build, shape = CASES["3x3"]
    layer, x = randomised(build()), torch.randn(shape)
    expected = results(layer.double(), x.double())
    found = results(layer.to(dtype), x.to(dtype))
    for key, value in expected.items():
        assert found[key].dtype == dtype
        error = (found[key].double() - value).norm() / value.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype], key


def test_autocast_convolves_in_its_dtype() -> None:
    build, shape = CASES["3x3"]
    layer, x = randomised(build()), torch.randn(shape)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() / expected.norm() < 0.03


def test_frozen_parameters_and_inputs_get_no_gradient() -> None:
    build, shape = CASES["3x3"]
    layer = build()
    layer.requires_grad_(False)
    layer.KSM_Local.conv.weight.requires_grad_(True)
    x = torch.randn(shape)
    layer(x).sum().backward()
    assert [name for name, parameter in layer.named_parameters() if parameter.grad is not None] == [
        "KSM_Local.conv.weight"
    ]
    assert x.grad is None


def test_buffers_serve_after_inference_mode_and_in_threads() -> None:
    build, shape = CASES["3x3"]
    layer, x = randomised(build()), torch.randn(shape)
    workspace.buffer.held.clear()
    with torch.inference_mode():
        layer(x)
    expected = results(layer, x)["y"]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                # Not to the bit: in a thread of its own PyTorch's first sum is split over other numbers of threads.
                if not torch.allclose(layer.eval()(x), in_eval, rtol=1e-5, atol=1e-5 * float(in_eval.abs().max())):
                    wrong.append(number)

    assert expected.isfinite().all()
    in_eval = layer.eval()(x).detach()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_the_backward_pass_keeps_is_small() -> None:
    layer, x = FDConv2d(64, 64, 3, padding=1, config=FDConfig(fbm_kernel_sizes=())), torch.randn(8, 64, 4, 4)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    weights = 64 * 64 * 9
    assert sum(kept.values()) < 3 * weights, "the spectrum and its groups, not the weights of eight samples"

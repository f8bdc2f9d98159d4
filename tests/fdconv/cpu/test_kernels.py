"""The compiled kernels for CPUs: what they compute, how they are compiled, and what is done where they cannot be."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_sample_loop import CASES, randomised, results
from torch import Tensor

import fdconv
from fdconv import FDConfig, FDConv2d
from fdconv.cpu import kernels, sample_loop, workspace


def without_compiler() -> str | None:
    """Why there is nothing to compile with. Kernels that do not compile are no reason to skip their tests."""
    if sys.platform == "darwin":  # whose compiler comes without OpenMP
        return kernels.reason_missing()
    try:
        kernels._compiler()
    except kernels.CannotCompile as error:
        return str(error)
    return None


needs_kernels = pytest.mark.skipif(without_compiler() is not None, reason=f"no kernels: {without_compiler()}")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    fdconv.set_backend("auto")
    torch.set_num_threads(threads)


MORE_CASES = {
    **CASES,
    "wider than a block": (lambda: FDConv2d(131, 35, (3, 3), padding=1), (5, 131, 5, 4)),
    "wide 1x1": (lambda: FDConv2d(257, 66, 1, config=FDConfig(kernel_num=300)), (3, 257, 3, 3)),
    "two spectra, grouped, 5x5": (
        lambda: FDConv2d(12, 70, 5, padding=2, groups=2, config=FDConfig(kernel_num=9, param_ratio=2)),
        (2, 12, 6, 7),
    ),
    "only frequency groups and filters": (lambda: FDConv2d(9, 4, 3, config=FDConfig(ksm_local=False)), (2, 9, 6, 5)),
}


@needs_kernels
def test_they_compile() -> None:
    assert kernels.reason_missing() is None


@needs_kernels
@pytest.mark.parametrize("chunk", [2**19, 1, 3000])
@pytest.mark.parametrize("name", MORE_CASES)
def test_they_agree_with_float64(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = MORE_CASES[name]
    layer, x = randomised(build()), torch.randn(shape)
    expected = results(copy.deepcopy(layer).double(), x.double())
    monkeypatch.setattr(sample_loop, "CHUNK", chunk)
    results(layer, x)
    for buffer in workspace.buffer.held.values():
        buffer.fill_(torch.nan)  # nothing is read that was not written
    fdconv.set_backend("cpp")
    for key, found in results(layer, x).items():
        error = (found.double() - expected[key]).norm() / expected[key].norm().clamp(min=1)
        assert error < 2e-5, f"{key}: {error:.1e}"


@needs_kernels
def test_they_are_what_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    modulate = kernels.modulate
    monkeypatch.setattr(kernels, "modulate", lambda *given: (calls.append(1), modulate(*given)))
    build, shape = CASES["3x3"]
    layer, x = build(), torch.randn(shape)
    for backend, expected in (("auto", True), ("cpp", True), ("torch", False)):
        fdconv.set_backend(backend)
        calls.clear()
        layer(x)
        assert bool(calls) == expected, backend
    calls.clear()
    fdconv.set_backend("auto")
    layer.double()(x.double())
    assert not calls, "there are no kernels for float64"


@needs_kernels
@pytest.mark.parametrize("name", ["3x3", "two spectra, grouped, 5x5", "wide 1x1", "depthwise"])
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    build, shape = MORE_CASES[name]
    layer, x = randomised(build()), torch.randn(shape)
    parts = [torch.empty(3, 5, 7, 2).normal_(), torch.empty(1, 100, 9, 2).normal_()]
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        scaled = _kernels_alone(layer, x)
        turned = []
        for part in parts:
            out = torch.full((part.shape[0], part.shape[2], part.shape[1], 2), torch.nan)
            kernels.transpose(part, out)
            assert torch.equal(out, part.transpose(1, 2))
            turned.append(out)
        found.append([*scaled, *turned])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def _kernels_alone(layer: FDConv2d, x: Tensor) -> list[Tensor]:
    """What the kernels give for a layer, without the library's convolutions, which differ from thread to thread."""
    torch.manual_seed(1)
    ratio, rows, columns, _ = layer.dft_weight.shape
    out_channels, in_channels, k_h, k_w = layer._kernel_shape()
    samples, positions = len(x), k_h * k_w
    spectra = layer.dft_weight.detach()
    tables = torch.rand(samples, ratio, layer.config.kernel_num)
    across = torch.empty(samples, columns, rows, 2)
    edges = kernels.Edges.of(layer._weight_shape(), turned=False)
    kernels.scale(spectra, layer.frequency_group, tables, edges, across)
    to_spectra = torch.zeros_like(spectra)
    to_tables = kernels.scale_backward(across, spectra, layer.frequency_group, tables, to_spectra)
    taps = layer.KSM_Local.taps.detach()
    every = layer.groups * in_channels
    modulation = kernels.Modulation.of(
        layer._weight_shape(),
        torch.nn.functional.pad(torch.randn(samples, every), (taps.shape[1] // 2,) * 2),
        taps.T.contiguous(),
        torch.rand(samples, out_channels, positions),
        torch.rand(samples, every),
    )
    image = torch.randn(samples, out_channels * k_h, in_channels * k_w)
    weights = torch.empty(samples, out_channels, in_channels, k_h, k_w)
    kernels.modulate(modulation, image, weights)
    to_image = torch.empty_like(image)
    rest = kernels.modulate_backward(modulation, weights, image, to_image)
    return [across, to_spectra, to_tables, weights, to_image, *(it for it in rest if it is not None)]


@needs_kernels
def test_the_gate_at_large_logits_and_nan() -> None:
    logits = torch.tensor(
        [0.0, -0.0, 1e-8, 3.3, -3.3, 20, -20, 87.5, -87.5, 1e4, -1e4, torch.inf, -torch.inf, torch.nan]
    )
    every = torch.cat([logits, torch.linspace(-90, 90, 20011)])
    shape = FDConv2d(len(every), 1, 1)._weight_shape()
    modulation = kernels.Modulation.of(
        shape, every[None], torch.ones(1, 1), torch.ones(1, 1, 1), torch.ones(1, len(every))
    )
    out = torch.empty(1, 1, len(every), 1, 1)
    kernels.modulate(modulation, torch.ones(1, 1, len(every)), out)
    expected = torch.sigmoid(every.double())
    torch.testing.assert_close(out.flatten().double(), expected, rtol=1e-6, atol=1e-37, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 0, 1, 2)])
@pytest.mark.parametrize("name", ["3x3", "two spectra, grouped, 5x5", "one channel"])
def test_spectra_and_groups_may_lie_in_any_order(name: str, order: tuple[int, ...]) -> None:
    build, shape = MORE_CASES[name]
    layer, x = randomised(build()), torch.randn(shape)
    expected = results(layer, x)
    back = [order.index(axis) for axis in range(4)]
    layer.dft_weight.data = layer.dft_weight.data.permute(order).contiguous().permute(back)
    layer.frequency_group = layer.frequency_group.T.contiguous().T
    for key, found in results(layer, x).items():
        torch.testing.assert_close(found, expected[key], msg=lambda text, key=key: key + text)


@needs_kernels
@pytest.mark.parametrize(("kernel_num", "number"), [(7, 7), (7, 255), (300, 300), (300, -1), (300, 2**31 - 1)])
def test_groups_that_do_not_exist_are_told(kernel_num: int, number: int) -> None:
    layer = FDConv2d(9, 12, 3, config=FDConfig(kernel_num=kernel_num))
    layer(torch.randn(1, 9, 4, 4))
    layer.frequency_group[11, 5] = number
    with pytest.raises(IndexError, match=rf"in group {number % 2**32}, but there are only {kernel_num} groups"):
        layer(torch.randn(1, 9, 4, 4))


# Compiling

USE = """
import torch, fdconv
from fdconv.cpu import kernels
layer, x = fdconv.FDConv2d(8, 8, 3), torch.randn(2, 8, 6, 6)
layer(x).sum().backward()
print(kernels.reason_missing())
fdconv.set_backend("cpp")
try:
    layer(x)
except ValueError as error:
    print(error)
"""


def start(**environment: str) -> subprocess.Popen[str]:
    place = {**os.environ, "PYTHONPATH": str(Path(fdconv.__file__).parents[1]), **environment}
    return subprocess.Popen([sys.executable, "-c", USE], env=place, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return text


@needs_kernels
def test_processes_that_compile_at_once_share_one_library(tmp_path: Path) -> None:
    processes = [start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]
    assert [said(process) for process in processes] == ["None\n"] * 3
    assert len(list((tmp_path / "fdconv").iterdir())) == 1


@needs_kernels
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert said(start(XDG_CACHE_HOME=str(tmp_path / "file"))) == "None\n"


@needs_kernels
def test_a_broken_library_in_the_cache_is_told(tmp_path: Path) -> None:
    said(start(XDG_CACHE_HOME=str(tmp_path)))
    (library,) = (tmp_path / "fdconv").iterdir()
    library.write_bytes(b"")
    assert "the compiled kernels cannot be loaded" in said(start(XDG_CACHE_HOME=str(tmp_path)))


@pytest.mark.skipif(os.name != "posix", reason="there is nothing to compile with")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "there is no C++ compiler no-such-compiler on this machine"), ("false", "false failed")],
)
def test_without_a_compiler_torch_takes_the_steps(compiler: str, reason: str, tmp_path: Path) -> None:
    text = said(start(XDG_CACHE_HOME=str(tmp_path), CXX=compiler))
    assert reason in text
    assert "the backend cpp does not serve here" in text

"""Band modulation: the matrix products against Fourier transforms, and the loop over blocks against whole maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdconv import FDConfig, bands, low_pass
from fdconv.bands import BandModulation
from fdconv.cpu import band_loop, workspace

CONFIGS: dict[str, FDConfig] = {
    "paper": FDConfig(),
    "lowest band has a map": FDConfig(band_lowfreq=True),
    "softmax over the maps": FDConfig(band_activation="softmax", band_lowfreq=True, bands=(2, 3)),
    "tanh, groups of maps": FDConfig(band_activation="tanh", band_groups=3),
    "all frequencies, then few": FDConfig(bands=(1, 6)),
    "one band": FDConfig(bands=(5,)),
    "interpolated": FDConfig(band_mask="interpolated"),
    "interpolated, groups of maps": FDConfig(band_mask="interpolated", band_groups=2, band_activation="softmax"),
}
SIZES = [(8, 8), (7, 13), (1, 9), (6, 1), (1, 1), (16, 18), (17, 23)]


def modulation(config: FDConfig, channels: int = 6) -> BandModulation:
    torch.manual_seed(0)
    made = BandModulation(channels, config, dtype=torch.float64)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def results(layer: BandModulation, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}  # type: ignore[dict-item]


@pytest.mark.parametrize("flat", [0, band_loop.FLAT, 10**6])
@pytest.mark.parametrize("block", [1, 300, 2**19])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loop_agrees_with_whole_maps(name: str, block: int, flat: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "BLOCK", block)
    monkeypatch.setattr(band_loop, "FLAT", flat)
    layer = modulation(CONFIGS[name])
    for size in SIZES:
        x = torch.randn(3, 6, *size, dtype=torch.float64)
        for buffer in workspace.buffer.held.values():
            buffer.fill_(torch.nan)  # nothing is read that was not written
        looped = results(layer, x)
        with monkeypatch.context() as patch:
            patch.setattr(bands, "is_plain", lambda _: False)
            for key, expected in results(layer, x).items():
                torch.testing.assert_close(looped[key], expected, rtol=1e-10, atol=1e-11, msg=f"{key} at {size}")


def test_the_loop_is_what_serves_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("not through the loop")

    monkeypatch.setattr(bands, "modulated", fail)
    BandModulation(4, FDConfig())(torch.randn(2, 4, 8, 8, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neutral_maps_change_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 9, 20, dtype=dtype)
    for config in CONFIGS.values():
        if config.band_activation != "softmax":  # a softmax rounds
            assert torch.equal(BandModulation(6, config)(x), x)


def test_any_memory_layout_is_taken() -> None:
    layer = modulation(CONFIGS["tanh, groups of maps"])
    x = torch.randn(2, 6, 9, 20, dtype=torch.float64)
    expected = results(layer, x)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert not other.is_contiguous()
        for key, value in results(layer, other).items():
            torch.testing.assert_close(value, expected[key], msg=key)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 17), (31, 2), (64, 48)])
def test_low_passes_are_those_of_a_fourier_transform(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    spectrum = torch.fft.fft2(x)
    rows, columns = torch.fft.fftfreq(height).abs()[:, None], torch.fft.fftfreq(width).abs()
    config = FDConfig(bands=(2, 3, 8))
    split = band_loop._split(x, config)
    looped = [passed.clone() for passed in split.passes(x)]
    for k, passed, again in zip(config.bands, low_pass.low_passes(x, config.bands), looped, strict=True):
        mask = (rows <= 0.5 / k + 1e-7) & (columns <= 0.5 / k + 1e-7)
        expected = torch.fft.ifft2(spectrum * mask).real
        torch.testing.assert_close(passed, expected)
        torch.testing.assert_close(again, expected)


def test_the_flat_basis_is_orthonormal_and_nested() -> None:
    basis, kept = low_pass.flat_basis(10, 7, (2, 3, 9), torch.device("cpu"), torch.float64)
    torch.testing.assert_close(basis.T @ basis, torch.eye(kept[0], dtype=torch.float64))
    assert kept == [5 * 3, 3 * 3, 1 * 1]
    assert basis.shape == (70, 15)
    torch.testing.assert_close(basis[:, :1], torch.full((70, 1), 70**-0.5, dtype=torch.float64))


def test_the_maps_are_a_convolution() -> None:
    x, weight, bias = torch.randn(3, 8, 5, 9), torch.randn(6, 4, 3, 3), torch.randn(6)
    expected = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=2)
    torch.testing.assert_close(band_loop._logits(x, weight, bias, 2), expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_soft_low_passes_are_those_of_a_fourier_transform(dynamic: bool) -> None:
    x = torch.randn(3, 2, 9, 14, dtype=torch.float64)
    edges = torch.rand(3 if dynamic else 1, 2, dtype=torch.float64) / 2
    rows, columns = torch.fft.fftfreq(9, dtype=torch.float64).abs(), torch.fft.fftfreq(14, dtype=torch.float64).abs()
    for band, passed in enumerate(low_pass.soft_low_passes(x, edges, 0.03)):
        edge = edges[:, band, None, None, None]
        mask = torch.sigmoid((edge - rows[:, None]) / 0.03) * torch.sigmoid((edge - columns) / 0.03)
        torch.testing.assert_close(passed, torch.fft.ifft2(torch.fft.fft2(x) * mask).real)


def test_edges_without_softness_are_the_fixed_ones() -> None:
    x = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    edges = torch.tensor([[0.5 / k for k in (2, 4, 8)]], dtype=torch.float64)  # no frequency of 11 or 13 lies on one
    for soft, hard in zip(low_pass.soft_low_passes(x, edges, 1e-5), low_pass.low_passes(x, (2, 4, 8)), strict=True):
        torch.testing.assert_close(soft, hard)


@pytest.mark.parametrize("edges", ["learned", "dynamic"])
def test_gradients_reach_the_edges(edges: Any) -> None:
    config = FDConfig(bands=(2, 4), band_edges=edges, band_groups=2)
    layer = BandModulation(4, config, dtype=torch.float64)
    x = torch.randn(3, 4, 6, 7, dtype=torch.float64)
    assert torch.equal(layer(x), x)  # neutral at the start, wherever the edges are
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = [name for name, _ in layer.named_parameters()]
    assert [name for name in names if "edges" in name]

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [parameter.detach().requires_grad_() for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(output, (x.requires_grad_(), *values))
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().min() > 0 for parameter in layer.edges.parameters())  # type: ignore[union-attr]


def test_edges_move_only_where_masks_are_exact() -> None:
    with pytest.raises(ValueError, match="band_mask must be exact where band_edges move, not 'interpolated'"):
        FDConfig(band_edges="learned", band_mask="interpolated")


def test_second_derivatives() -> None:
    layer = modulation(FDConfig(bands=(2, 4)), channels=2)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own() -> None:
    layer = modulation(FDConfig())
    x = torch.randn(2, 6, 13, 14, dtype=torch.float64)
    expected = results(layer, x)
    layer.requires_grad_(False)
    found = results(layer, x)
    torch.testing.assert_close(found["x"], expected["x"])
    assert all(parameter.grad is None for parameter in layer.parameters())
    layer.requires_grad_(True)
    layer.zero_grad()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_cached_bases_serve_gradients_after_inference_mode() -> None:
    layer, x = modulation(FDConfig()), torch.randn(1, 6, 21, 22, dtype=torch.float64)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x.clone().requires_grad_())
    y.sum().backward()
    torch.testing.assert_close(y.detach(), expected.clone())

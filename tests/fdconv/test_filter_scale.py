"""A constant scale of each filter, as folding a norm gives: exact with any modulation, on every path."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fdconv import FDConfig, FDConv2d, FDLinear
from fdconv.backend import set_backend
from fdconv.filter_scale import common_factor, filter_multiple
from fdconv.inference import prepare
from fdconv.official import public_obstacle

STATIC = FDConfig(ksm_global=False, ksm_local=False, fbm_kernel_sizes=())
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: FDConv2d(12, 20, 3, padding=1), (3, 12, 9, 7)),
    "conv without bias": (lambda: FDConv2d(12, 20, 3, padding=1, stride=2, bias=False), (3, 12, 9, 7)),
    "depthwise": (lambda: FDConv2d(12, 12, 3, padding=1, groups=12, bias=False), (3, 12, 9, 7)),
    "grouped": (lambda: FDConv2d(12, 20, 3, groups=4), (3, 12, 9, 7)),
    "large map": (lambda: FDConv2d(4, 4, 1), (2, 4, 40, 40)),
    "one group": (lambda: FDConv2d(12, 20, 3, config=FDConfig(kernel_num=1)), (3, 12, 9, 7)),
    "local branch only": (lambda: FDConv2d(12, 20, 3, config=FDConfig(ksm_global=False)), (3, 12, 9, 7)),
    "no modulation": (lambda: FDConv2d(12, 20, 3, bias=False, config=STATIC), (3, 12, 9, 7)),
    "linear": (lambda: FDLinear(12, 20), (3, 5, 12)),
    "linear without modulation": (lambda: FDLinear(12, 20, config=STATIC), (3, 5, 12)),
    "one sample": (lambda: FDLinear(12, 20, bias=False), (12,)),
}


def modulated(kind: str, dtype: torch.dtype = torch.float64) -> tuple[FDConv2d | FDLinear, torch.Tensor]:
    build, shape = LAYERS[kind]
    torch.manual_seed(4)
    layer = build()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("KSM", "FBM")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer.to(dtype).eval(), torch.randn(shape, dtype=dtype)  # type: ignore[return-value]


def affine(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    shape = (-1, 1, 1) if isinstance(layer, FDConv2d) else (-1,)
    return y * scale.view(shape) + shift.view(shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_an_affine_map_behind(kind: str, dtype: torch.dtype) -> None:
    layer, x = modulated(kind, dtype)
    plain = copy.deepcopy(layer)
    channels = layer.weight.shape[0]
    scale, shift = torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)
    layer.scale_filters(scale, shift)
    layer.scale_filters(scale)  # which comes on top of it, and multiplies the bias too
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    expected = affine(affine(plain(x), scale, shift, layer), scale, torch.zeros_like(shift), layer)
    expected_slopes = torch.autograd.grad(expected.square().sum(), plain.dft_weight)[0]
    for backend in ("auto", "torch"):
        with set_backend(backend):  # type: ignore[arg-type]
            found = layer(x)
            slopes = torch.autograd.grad(found.square().sum(), layer.dft_weight)[0]
        assert (found - expected).norm() < tolerance * expected.norm()
        assert (slopes - expected_slopes).norm() < 3 * tolerance * expected_slopes.norm()
    prepare(layer)
    assert (layer(x) - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_neutral_weight_and_the_plain_layer_have_it(kind: str) -> None:
    layer, x = modulated(kind)
    layer.reset_modulation()
    weight = layer.weight.clone()
    scale, shift = torch.rand(len(weight)).double() + 0.5, torch.randn(len(weight)).double()
    layer.scale_filters(scale, shift)
    torch.testing.assert_close(layer.weight.clone(), weight * scale.view(-1, *[1] * (weight.dim() - 1)))
    plain = layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear()
    torch.testing.assert_close(plain(x), layer(x))
    layer.set_weight(weight)
    assert layer.filter_scale is None
    torch.testing.assert_close(layer.weight.clone(), weight)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["conv", "conv without bias", "linear"])
def test_a_state_dict_brings_its_scale_along_and_takes_it_away(kind: str, assign: bool) -> None:
    layer, x = modulated(kind)
    fresh = copy.deepcopy(layer)
    before = copy.deepcopy(layer.state_dict())
    assert "filter_scale" not in before
    layer.scale_filters(torch.rand(20).double(), torch.randn(20).double())
    fresh.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(fresh(x), layer(x))
    if "bias" in before:  # or one is missing, which strict loading tells
        fresh.load_state_dict(before, assign=assign)
        assert fresh.filter_scale is None
        assert list(fresh.state_dict()) == list(before)


@pytest.mark.filterwarnings("ignore::fdconv.NeutralWeightWarning")
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_an_assigned_multiple_comes_on_top_of_a_scale(kind: str, factor: float) -> None:
    layer, x = modulated(kind)
    layer.scale_filters(torch.rand(20).double() + 0.5)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    expected = factor * layer(x)
    layer.weight = nn.Parameter(layer.weight.detach().clone() * factor)
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_a_weight_that_was_written_to_may_be_put_back() -> None:
    layer, x = modulated("conv without bias")
    expected = 2 * layer(x)
    values = layer.weight.data
    rows = values.reshape(20, -1)
    rows.mul_(2)
    layer.weight.data = rows.reshape(values.shape)
    torch.testing.assert_close(layer(x), expected)


def test_on_meta_and_after_it() -> None:
    with torch.device("meta"):
        layer = FDConv2d(4, 8, 3, bias=False)
    layer.scale_filters(torch.rand(8, device="meta"), torch.rand(8, device="meta"))
    assert layer.filter_scale is not None and layer.filter_scale.is_meta and layer.bias is not None


def test_what_does_not_fit_changes_nothing() -> None:
    layer = FDConv2d(4, 8, 3).half()
    before = copy.deepcopy(layer.state_dict())
    for arguments, message in (
        ((torch.ones(7),), r"scale must have the shape \(8,\), one for each filter, not \(7,\)"),
        ((torch.ones(8), torch.ones(8, 1)), r"shift must have the shape \(8,\), one for each filter, not \(8, 1\)"),
        ((torch.full((8,), 1e6), torch.ones(8)), r"is not finite in the layer's torch.float16"),
        ((torch.ones(8), torch.full((8,), 1e6)), r"a bias of 1e\+06 is not finite in the layer's torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.scale_filters(*arguments)
        assert list(layer.state_dict()) == list(before)
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_the_public_code_has_no_such_scale() -> None:
    layer = FDConv2d(4, 8, 3)
    assert public_obstacle(layer) is None
    layer.scale_filters(torch.ones(8))
    assert public_obstacle(layer) == "a norm was folded into it, and the public layer has no scale for each filter"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_multiples_of_filters_are_recognised(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    old = torch.randn(16, 4, 3, 3).to(dtype)
    scale = torch.randn(16).to(dtype)
    scale[3] = 0
    found = filter_multiple(old * scale[:, None, None, None], old)
    assert found is not None
    torch.testing.assert_close(found, scale.double(), rtol=torch.finfo(dtype).eps, atol=1e-12)
    in_float64 = (old.double() * scale.double()[:, None, None, None] * 0.3).to(dtype)
    found = filter_multiple(in_float64, old)
    assert found is not None
    torch.testing.assert_close(found, scale.double() * 0.3, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_anything_else_is_no_multiple(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    old = torch.randn(16, 4, 3, 3).to(dtype)
    trained = (old.double() + 16 * torch.finfo(dtype).eps * torch.randn(old.shape)).to(dtype)
    by_channel = old * torch.rand(4)[:, None, None].to(dtype)
    one_filter, zeros, infinite = old.clone(), old.clone(), old.clone()
    one_filter[5] += torch.randn_like(one_filter[5])
    infinite[0, 0, 0, 0] = torch.inf
    zeros[2] = 0
    for new in (trained, by_channel, one_filter, infinite, old.flatten(1), torch.randn_like(old)):
        assert filter_multiple(new, old) is None
    assert filter_multiple(old, zeros) is None
    assert filter_multiple(old, old.to(torch.float64 if dtype != torch.float64 else torch.float32)) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_filter_of_zeros_tells_no_factor(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    old = torch.randn(16, 4, 3, 3).to(dtype)
    old[2] = 0
    old[3] = torch.finfo(dtype).tiny / 64
    scale = torch.rand(16).to(dtype) + 0.5
    found = filter_multiple(old * scale[:, None, None, None], old)
    assert found is not None and found.isnan().nonzero().flatten().tolist() == [2, 3]
    assert common_factor(found, dtype) is None
    same = filter_multiple(old * 3, old)
    assert same is not None and common_factor(same, dtype) == pytest.approx(3, rel=torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore::fdconv.NeutralWeightWarning")
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("factor", [0.97, -2.0, 0.0])
@torch.no_grad()
def test_a_weight_times_a_number_needs_no_scale(factor: float, ratio: int) -> None:
    """As decay by hand, of which a training run does many: the spectrum is multiplied, and its parts stay apart."""
    torch.manual_seed(0)
    layer = FDConv2d(4, 20, 3, bias=False, config=FDConfig(kernel_num=5, param_ratio=ratio))
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 4, 7, 7)
    expected = factor * layer(x)
    layer.weight.data.mul_(factor)
    torch.testing.assert_close(layer(x), expected)
    assert layer.filter_scale is None


@torch.no_grad()
def test_norms_are_folded_one_after_another_through_filters_that_they_silence() -> None:
    layer, x = modulated("conv")
    norm = nn.BatchNorm2d(20, dtype=torch.float64).eval()
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.normal_(norm.bias)
    norm.weight[5] = 0
    expected = norm(norm(layer(x)))
    fold = torch.nn.utils.fuse_conv_bn_eval
    torch.testing.assert_close(fold(fold(layer.eval(), norm), norm)(x), expected)


@pytest.mark.filterwarnings("ignore::fdconv.NeutralWeightWarning")
@torch.no_grad()
def test_a_factor_that_a_weight_does_not_tell_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = modulated("conv without bias")
    neutral = layer.weight.detach().clone()
    neutral[7] = 0  # as in the numbers of float16, and in those that a transform happens to hit
    monkeypatch.setattr(layer, "_neutral_weight", lambda: neutral)
    before = layer(x)
    with pytest.raises(ValueError, match=r"filter 7 of FDConv2d\(20, .*fuse_norms\(model\); layer.scale_filters"):
        layer.weight = nn.Parameter(neutral * torch.rand(20, 1, 1, 1, dtype=torch.float64))
    assert torch.equal(layer(x), before)
    silenced = neutral.clone()
    silenced[3] = 0
    layer.weight = nn.Parameter(silenced)  # the others are as they were, and so is the seventh
    assert not layer(x)[:, 3].any()
    torch.testing.assert_close(layer(x)[:, 4:], before[:, 4:])

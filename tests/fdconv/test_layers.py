"""What a layer must be besides right: differentiable, finite, saveable, movable, taken for the layer it replaced."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import TOLERANCES, assert_close, fdconv2d_reference, fdlinear_reference, randomise_, relative_error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from fdconv import FDConfig, FDConv2d, FDLinear
from fdconv.low_pass import interpolated_masks
from fdconv.spectrum import frequency_groups

SMALL = FDConfig(kernel_num=5, min_attention_channels=3, bands=(2, 4))
Layer = FDConv2d | FDLinear


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def make(kind: str, config: FDConfig = SMALL, **options: Any) -> tuple[Layer, Tensor]:
    """A layer of either kind, every parameter drawn at random, in eval mode, and an input for it."""
    layer: Layer
    if kind == "conv":
        layer, x = FDConv2d(6, 4, 3, padding=1, groups=2, config=config, **options), torch.randn(3, 6, 8, 7)
    else:
        layer, x = FDLinear(6, 5, config=config, **options), torch.randn(3, 4, 6)
    randomise_(layer, seed=1).eval()
    return layer, x.to(layer.dft_weight.dtype)


def reference(layer: Layer, x: Tensor, config: FDConfig = SMALL) -> Any:
    if isinstance(layer, FDLinear):
        return fdlinear_reference(layer.state_dict(), config, x)
    geometry = {"in_channels": 6, "out_channels": 4, "kernel_size": 3, "padding": 1, "groups": 2}
    return fdconv2d_reference(layer.state_dict(), config, geometry, x)


both = pytest.mark.parametrize("kind", ["conv", "linear"])


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("kernel_num", value) for value in (0, -1, 1.0, True, "64", 40000)),
        *(("param_ratio", value) for value in (0, 1.5)),
        ("min_attention_channels", 0),
        ("band_groups", 0),
        *(("reduction", value) for value in (0, -1.0, math.inf, math.nan, True)),
        ("temperature", 0.0),
        ("kernel_temperature", "1"),
        ("ksm_global", 1),
        ("ksm_local", None),
        ("band_lowfreq", "yes"),
        *(("bands", value) for value in ((), (4, 2), (2, 2), (0, 2), 2, "24")),
        *(("fbm_kernel_sizes", value) for value in (3, (3.0,))),
        ("norm", "layer"),
        ("global_activation", "softmax"),
        ("local_activation", "softmax"),
        ("kernel_activation", "relu"),
        ("band_activation", None),
        ("band_mask", "exactly"),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^FDConfig\.{field} must be .+, not {re.escape(repr(value))}$"):
        FDConfig(**{field: value})


def test_settings_survive_json() -> None:
    config = FDConfig(kernel_num=7, reduction=0.25, fbm_kernel_sizes=(3, 5), bands=(2,), norm="rms", band_lowfreq=True)
    assert FDConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert hash(FDConfig(bands=[2, 4])) == hash(FDConfig(bands=(2, 4)))  # type: ignore[arg-type]


def test_groups_of_maps_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="band_groups=4 does not divide the 6 input channels"):
        FDConv2d(6, 4, 3, config=FDConfig(band_groups=4))
    FDConv2d(6, 4, 1, config=FDConfig(band_groups=4))  # has no bands


# State: names, shapes, round trips ---------------------------------------------------------------------------------


def test_names_and_shapes_are_the_official_ones() -> None:
    def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}

    norm = {"running_mean": (16,), "running_var": (16,), "weight": (16,), "bias": (16,), "num_batches_tracked": ()}
    conv = {
        "dft_weight": (2, 96, 16, 2),
        "frequency_group": (96, 16),
        "spectrum_scale": (1,),
        "bias": (32,),
        "KSM_Global.fc.weight": (16, 10, 1, 1),
        "KSM_Global.norm.weight": (16,),
        "KSM_Global.relu.scale": (1,),
        "KSM_Global.relu.bias": (1,),
        **_heads({"channel": 10, "filter": 32, "spatial": 9, "kernel": 14}, 16, 1, 1),
        "KSM_Local.norm.weight": (10,),
        "KSM_Local.norm.bias": (10,),
        "KSM_Local.conv.weight": (288, 1, 3),
        **{f"FBM.freq_weight_conv_list.{i}.weight": (1, 10, 3, 3) for i in range(3)},
        **{f"FBM.freq_weight_conv_list.{i}.bias": (1,) for i in range(3)},
    }
    assert shapes(FDConv2d(10, 32, 3, config=FDConfig(kernel_num=7, param_ratio=2))) == conv

    batch = shapes(FDConv2d(10, 32, 3, config=FDConfig(kernel_num=7, param_ratio=2, norm="batch")))
    assert set(conv) - set(batch) == {"KSM_Global.norm.weight"}
    assert {name: batch[f"KSM_Global.bn.{name}"] for name in norm} == norm
    paper = FDConv2d(10, 32, 3, config=FDConfig(kernel_num=7, param_ratio=2, spectrum="paper"))
    assert set(batch) - set(shapes(paper)) == {"spectrum_scale"}

    depthwise = shapes(FDConv2d(32, 32, 3, groups=32, bias=False))
    assert depthwise["dft_weight"] == (1, 96, 2, 2)
    assert set(conv) - set(depthwise) == {"bias", "KSM_Global.filter_fc.weight", "KSM_Global.filter_fc.bias"}

    pointwise = set(shapes(FDConv2d(10, 32, 1, config=FDConfig(kernel_num=1))))
    assert not [name for name in pointwise if "FBM" in name or "spatial_fc" in name or "kernel_fc" in name]

    assert shapes(FDLinear(512, 40)) == {
        "dft_weight": (1, 40, 257, 2),
        "frequency_group": (40, 257),
        "spectrum_scale": (1,),
        "bias": (40,),
        "KSM_Global.fc.weight": (32, 512),
        "KSM_Global.norm.weight": (32,),
        **_heads({"channel": 512, "filter": 40, "kernel": 64}, 32),
    }


def _heads(sizes: dict[str, int], width: int, *tail: int) -> dict[str, tuple[int, ...]]:
    weights = {f"KSM_Global.{name}_fc.weight": (size, width, *tail) for name, size in sizes.items()}
    return {**weights, **{f"KSM_Global.{name}_fc.bias": (size,) for name, size in sizes.items()}}


@both
def test_the_state_dict_carries_the_order_of_frequencies(kind: str) -> None:
    layer, x = make(kind)
    groups = layer.frequency_group
    groups.copy_(groups.flatten()[torch.randperm(groups.numel())].view_as(groups))
    y = layer(x)
    assert_close(y, reference(layer, x), "same-float32")
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    other, _ = make(kind)
    assert relative_error(other(x), y) > 0.01, "the order has no effect, so this test shows nothing"
    saved.seek(0)
    other.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    assert torch.equal(other(x), y)


@both
def test_copies_and_pickles_are_independent_and_equal(kind: str) -> None:
    layer, x = make(kind)
    y = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), y)
        with torch.no_grad():
            copied.dft_weight.mul_(2)
            copied.frequency_group.copy_(copied.frequency_group.flip(0, 1))
        assert not torch.equal(copied(x), y)
        assert torch.equal(layer(x), y)


@both
@pytest.mark.parametrize("built", ["by device", "by context", "moved"])
def test_a_layer_built_on_meta_becomes_real_by_loading(kind: str, built: str) -> None:
    layer, x = make(kind)
    y = layer(x)
    if built == "by device":
        empty = type(layer)(*_arguments(layer), config=SMALL, device="meta")
    elif built == "by context":
        with torch.device("meta"):
            empty = type(layer)(*_arguments(layer), config=SMALL)
    else:
        empty = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in empty.state_dict().values())
    assert empty.weight.device.type == "meta"
    assert empty.weight.shape == layer.weight.shape
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(copy.deepcopy(layer.state_dict()), strict=True, assign=True)
    filled = empty.to_empty(device="cpu")
    for tensor in [*filled.parameters(), *filled.buffers()]:  # what freshly allocated memory may hold
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 3)
    filled.load_state_dict(layer.state_dict(), strict=True)
    for loaded in (assigned.eval(), filled.eval()):
        assert torch.equal(loaded(x), y)


def _arguments(layer: Layer) -> tuple[Any, ...]:
    return (6, 4, 3, 1, 1, 1, 2) if isinstance(layer, FDConv2d) else (6, 5)


@both
def test_nothing_of_an_earlier_forward_stays_behind(kind: str) -> None:
    layer, x = make(kind)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()  # nothing made in inference mode is reused
    with torch.no_grad():
        layer(x)
        for parameter in layer.parameters():
            parameter.mul_(1.1)
    assert_close(layer(x), reference(layer, x), "same-float32")
    layer.double()
    x = torch.randn(2, *x.shape[1:], dtype=torch.float64)
    if kind == "conv":
        x = x[..., :5, :]
    assert_close(layer(x), reference(layer, x), "reference")


# Frequency groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d1", "d2", "n"),
    [(96, 96, 64), (72, 72, 64), (65, 65, 64), (1, 1, 4), (1, 9, 3), (9, 1, 3), (30, 42, 7), (5, 4, 50)],
)
def test_frequency_groups_are_equal_rings(d1: int, d2: int, n: int) -> None:
    groups = frequency_groups(d1, d2, n)
    assert groups.shape == (d1, d2 // 2 + 1)
    assert not groups.is_floating_point()
    # group of every coefficient with its exact squared radius (times (d1*d2)^2), in row-major order
    entries = [
        ((min(u, d1 - u) * d2) ** 2 + (v * d1) ** 2, int(groups[u, v])) for u in range(d1) for v in range(d2 // 2 + 1)
    ]
    total = len(entries)
    sizes = [0] * n
    for _, group in entries:
        sizes[group] += 1
    assert sizes == [total // n + 1] * (total % n) + [total // n] * (n - total % n)
    # sorting by radius alone, stably, brings the groups into order: equal radii are told apart by position
    in_order = [group for _, group in sorted(entries, key=lambda entry: entry[0])]
    assert in_order == sorted(in_order)


def test_frequency_groups_depend_on_nothing_else() -> None:
    expected = frequency_groups(96, 64, 64)
    frequency_groups(96, 64, 64).zero_()  # a caller's copy is the caller's
    assert torch.equal(frequency_groups(96, 64, 64), expected)
    default = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.equal(FDLinear(64, 96).frequency_group, expected)
            # sizes not asked for before, so that no cache answers
            groups = frequency_groups(40 + dtype.itemsize, 33, 9)
            torch.set_default_dtype(default)
            entries = [int(g) for g in groups.flatten()]
            assert sum(entries[i] == 0 for i in range(len(entries))) == math.ceil(len(entries) / 9)
    finally:
        torch.set_default_dtype(default)
    with torch.inference_mode():
        assert torch.equal(frequency_groups(96, 64, 64), expected)
    with torch.device("meta"):
        FDLinear(31, 37)
    assert torch.equal(FDLinear(31, 37).frequency_group.long(), frequency_groups(37, 31, 64).long())


def test_conversion_does_not_depend_on_the_surroundings() -> None:
    static = nn.Conv2d(6, 4, 3)
    config = FDConfig(kernel_num=5, param_ratio=2)
    expected = FDConv2d.from_conv(static, config).dft_weight
    with torch.device("meta"):
        assert torch.equal(FDConv2d.from_conv(static, config).dft_weight, expected)
    with torch.inference_mode():
        assert torch.equal(FDConv2d.from_conv(static, config).dft_weight, expected)


def test_interpolated_masks_do_not_depend_on_the_default_dtype() -> None:
    arguments: Any = (64, 64, (2, 4), torch.device("cpu"), torch.float32)
    expected = interpolated_masks(*arguments)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = interpolated_masks(*arguments)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(found, expected)


# Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("conv", FDConfig(kernel_num=5, min_attention_channels=2, bands=(2, 4), param_ratio=2)),
        (
            "conv",
            FDConfig(
                kernel_num=3,
                min_attention_channels=2,
                bands=(2,),
                band_lowfreq=True,
                band_activation="softmax",
                band_mask="interpolated",
                norm="rms",
                kernel_activation="softmax",
                global_activation="tanh",
                local_activation="tanh",
            ),
        ),
        ("linear", FDConfig(kernel_num=5, min_attention_channels=2, param_ratio=2, norm="batch")),
    ],
    ids=["conv", "conv, other choices", "linear"],
)
def test_gradients_are_those_of_finite_differences(kind: str, config: FDConfig, training: bool) -> None:
    layer: Layer
    if kind == "conv":
        layer = FDConv2d(4, 2, 3, padding=1, groups=2, dtype=torch.float64, config=config)
        x = torch.randn(3, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    else:
        layer = FDLinear(4, 3, dtype=torch.float64, config=config)
        x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    randomise_(layer, seed=3).train(training)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *parameters), fast_mode=True)


@both
def test_parameters_may_be_replaced_by_plain_tensors(kind: str) -> None:
    """As `torch.func` and `nn.DataParallel` do."""
    layer, x = make(kind)
    doubled = {name: 2 * parameter.detach() for name, parameter in layer.named_parameters()}
    y = torch.func.functional_call(layer, doubled, (x,))
    layer.load_state_dict({**layer.state_dict(), **doubled})
    assert torch.equal(y, layer(x))


@both
@pytest.mark.parametrize("batch", [1, 4])
def test_every_parameter_of_a_converted_layer_learns(kind: str, batch: int) -> None:
    config = FDConfig(kernel_num=5, param_ratio=2, bands=(2, 4))
    layer: Layer
    if kind == "conv":
        layer, x = FDConv2d.from_conv(nn.Conv2d(6, 4, 3, padding=1), config), torch.randn(batch, 6, 8, 7)
    else:
        layer, x = FDLinear.from_linear(nn.Linear(6, 5), config), torch.randn(batch, 4, 6)
    layer.train()
    target = torch.randn_like(layer(x))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(3):  # at first the heads are zero and stop the gradient of what is below them
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
    assert losses[2] < losses[0]
    dead = [name for name, parameter in layer.named_parameters() if not parameter.grad.any()]
    assert not dead


@both
def test_spectra_that_share_groups_do_not_learn_the_same(kind: str) -> None:
    config = FDConfig(kernel_num=5, param_ratio=3, bands=(2, 4))
    layer: Layer
    if kind == "conv":
        layer, x = FDConv2d.from_conv(nn.Conv2d(6, 4, 3), config).train(), torch.randn(4, 6, 8, 7)
    else:
        layer, x = FDLinear.from_linear(nn.Linear(6, 5), config).train(), torch.randn(4, 3, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    head = layer.get_parameter("KSM_Global.kernel_fc.bias").grad.view(3, 5)
    spectra = layer.dft_weight.grad
    for gradient in (head, spectra):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert relative_error(gradient[i], gradient[j]) > TOLERANCES["same-float32"]


# Precision ---------------------------------------------------------------------------------------------------------

low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def tolerance(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]


@both
@low_precision
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    layer, x = make(kind)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert_close(y, reference(layer, x), tolerance(dtype))
    y.float().square().sum().backward()
    for name, parameter in [("input", x), *layer.named_parameters()]:
        assert parameter.grad.isfinite().all(), name


@both
@low_precision
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "whole layer"])
def test_large_inputs_stay_finite(kind: str, dtype: torch.dtype, whole: bool) -> None:
    """Means, spectra and squares of such inputs leave float16's range, and `inf * 0` of a neutral head is NaN."""
    static: nn.Module
    if kind == "conv":
        static, x = nn.Conv2d(16, 8, 3, padding=1), 1500 + 200 * torch.randn(2, 16, 33, 32)
    else:
        static, x = nn.Linear(16, 8), 1500 + 200 * torch.randn(2, 50, 16)
    convert = FDConv2d.from_conv if kind == "conv" else FDLinear.from_linear
    if whole:
        static, x = static.to(dtype), x.to(dtype)
    layer = convert(static, FDConfig())
    for training in (False, True):
        layer.train(training)
        with torch.autocast("cpu", dtype=dtype, enabled=not whole):
            expected, y = static(x), layer(x)
        assert expected.isfinite().all()
        assert_close(y, expected, tolerance(dtype))
    if not whole:  # float16 parameters would need float16 gradients, whose range is the user's concern
        y.float().mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("gates", ["sigmoid", "tanh", "softmax"])
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "whole layer"])
def test_gates_far_from_neutral_stay_finite(gates: str, whole: bool) -> None:
    """Logits beyond float16's range saturate a gate."""
    config = FDConfig(kernel_num=5, kernel_activation=gates, band_activation=gates)  # type: ignore[arg-type]
    layer, x = make("conv", config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "kernel_fc" in name or "FBM" in name:
                parameter.fill_(50)
    x = 300 + 100 * x
    if whole:
        layer, x = layer.half(), x.half()
    with torch.autocast("cpu", dtype=torch.float16, enabled=not whole):
        assert layer(x).isfinite().all()


@both
def test_another_dtype_is_refused_as_the_static_layer_does(kind: str) -> None:
    for config in (SMALL, FDConfig(kernel_num=5, fbm_kernel_sizes=())):
        layer, x = make(kind, config)
        for batch in (x, x[:1]):
            with pytest.raises(RuntimeError, match=r"expected|same"):
                layer(batch.half())


@both
@low_precision
def test_layers_in_low_precision(kind: str, dtype: torch.dtype) -> None:
    layer, x = make(kind)
    layer, x = layer.to(dtype), x.to(dtype)
    assert layer.weight.dtype == dtype
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y, reference(layer, x), tolerance(dtype))
    layer.train()(x).float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


# Taken for the static layer ----------------------------------------------------------------------------------------


@both
def test_weight_looks_like_the_static_weight(kind: str) -> None:
    layer, _ = make(kind, dtype=torch.float64)
    static: nn.Conv2d | nn.Linear
    if isinstance(layer, FDConv2d):
        static = nn.Conv2d(6, 4, 3, padding=1, groups=2, dtype=torch.float64)
        layer, applied = FDConv2d.from_conv(static, SMALL), layer.to_conv()
        assert type(applied) is nn.Conv2d
        assert isinstance(layer, nn.Conv2d)
    else:
        static = nn.Linear(6, 5, dtype=torch.float64)
        layer, applied = FDLinear.from_linear(static, SMALL), layer.to_linear()
        assert type(applied) is nn.Linear
        assert isinstance(layer, nn.Linear)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert "weight" not in dict(layer.named_parameters(recurse=False))
    assert (weight.shape, weight.dtype, weight.device) == (static.weight.shape, torch.float64, static.weight.device)
    assert weight.requires_grad
    assert_close(weight, static.weight, "neutral-float64")
    assert layer.weight.numel() == static.weight.numel()
    assert layer.weight.data.dtype == torch.float64
    assert str(static) == str(applied)


@both
@pytest.mark.parametrize("ratio", [1, 3])
def test_weight_is_the_neutral_weight_of_any_state(kind: str, ratio: int) -> None:
    """Of a trained layer too: what is left when the gates are set to neutral."""
    config = FDConfig(kernel_num=5, min_attention_channels=3, bands=(2, 4), param_ratio=ratio)
    layer, x = make(kind, config, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    static = layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear()
    assert_close(static.weight, weight, "neutral-float64")
    for name, parameter in layer.named_parameters():
        if "_fc." in name or name.startswith("FBM") or name == "KSM_Local.conv.weight":
            nn.init.zeros_(parameter)
    assert_close(layer(x), static(x), "neutral-float64")


@both
def test_weight_can_be_computed_with(kind: str) -> None:
    layer, x = make(kind)
    y = F.conv2d(x, layer.weight, groups=2) if kind == "conv" else F.linear(x, layer.weight)
    y.square().sum().backward()
    assert layer.dft_weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert (layer.weight + 0).shape == layer.weight.shape
        assert torch.cat([layer.weight.flatten(), layer.weight.reshape(-1)]).isfinite().all()
        assert float(layer.weight.norm()) == pytest.approx(float(layer.weight.square().sum().sqrt()))


@both
def test_conversion_carries_over_what_a_layer_is(kind: str) -> None:
    def static(**options: Any) -> nn.Module:
        return nn.Conv2d(6, 4, 3, padding=1, **options) if kind == "conv" else nn.Linear(6, 4, **options)

    def convert(layer: nn.Module) -> Layer:
        return FDConv2d.from_conv(layer, SMALL) if kind == "conv" else FDLinear.from_linear(layer, SMALL)

    def back(layer: Layer) -> nn.Module:
        return layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear()

    frozen = static(dtype=torch.bfloat16).eval().requires_grad_(False)
    layer = convert(frozen)
    assert not layer.training
    assert not layer.dft_weight.requires_grad
    assert not layer.bias.requires_grad
    assert {t.dtype for t in layer.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in layer.modules())
    plain = back(layer)
    assert not plain.training
    assert not plain.weight.requires_grad
    assert torch.equal(plain.bias, frozen.bias)
    assert_close(plain.weight, frozen.weight, "bfloat16")

    mixed = static()
    mixed.bias.requires_grad_(False)
    layer = convert(mixed)
    assert layer.training
    assert layer.dft_weight.requires_grad
    assert not layer.bias.requires_grad
    assert layer.bias is not mixed.bias
    assert back(layer).weight.requires_grad
    assert not back(layer).bias.requires_grad

    assert convert(static(bias=False)).bias is None
    assert back(convert(static(bias=False))).bias is None
    meta = convert(static(device="meta"))
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}
    assert back(meta).weight.is_meta


def test_conversion_keeps_the_geometry() -> None:
    static = nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 2), (1, 3), 2, False, "reflect")
    layer = FDConv2d.from_conv(static, SMALL)
    for name in nn.Conv2d.__constants__:
        assert getattr(layer, name) == getattr(static, name), name
    assert str(layer.to_conv()) == str(static)
    assert str(FDConv2d.from_conv(nn.Conv2d(4, 4, 3, padding="same")).to_conv()).count("same") == 1


@both
def test_reset_parameters_gives_a_fresh_neutral_layer(kind: str) -> None:
    layer, x = make(kind, dtype=torch.float64)
    old = layer.weight.detach().clone()
    layer.reset_parameters()
    static = layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear()
    assert_close(layer(x), static(x), "neutral-float64")
    assert relative_error(static.weight, old) > 0.1
    bound = 1 / math.sqrt(static.weight[0].numel())  # nn.Conv2d and nn.Linear draw uniformly within this
    assert 0.5 * bound < static.weight.abs().max() < bound * (1 + 1e-6)


# Inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_inputs_without_a_batch(training: bool) -> None:
    layer, x = make("conv")
    layer.train(training)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    linear, rows = make("linear")
    assert_close(linear.train(training)(rows[0, 0]), linear(rows[0, :1])[0], "same-float32")


@both
def test_hooks_see_one_call(kind: str) -> None:
    layer, x = make(kind)
    calls: list[tuple[int, ...]] = []
    layer.register_forward_hook(lambda module, inputs, output: calls.append(tuple(inputs[0].shape)))
    unbatched = x[0] if kind == "conv" else x[0, 0]
    layer(x)
    layer(unbatched)
    assert calls == [tuple(x.shape), tuple(unbatched.shape)]


@both
def test_a_subclass_prepares_an_input_once(kind: str) -> None:
    layer, x = make(kind)
    unbatched = x[0] if kind == "conv" else x[0, 0]
    expected = layer(2 * unbatched)

    class Doubled(type(layer)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    layer.__class__ = Doubled
    assert torch.equal(layer(unbatched), expected)


@both
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch(kind: str, training: bool) -> None:
    layer, x = make(kind)
    expected = layer(x).shape[1:]
    before = copy.deepcopy(layer.state_dict())
    y = layer.train(training)(x[:0].requires_grad_())
    assert y.shape == (0, *expected)
    y.sum().backward()
    for name, parameter in layer.named_parameters():
        # zero, as the static layer's, or a distributed optimizer waits for it
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)) or name == "bias", name
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_memory_layout_makes_no_difference() -> None:
    layer, x = make("conv")
    y = layer(x)
    assert_close(layer(x.to(memory_format=torch.channels_last)), y, "same-float32")
    assert_close(layer(x.transpose(2, 3).contiguous().transpose(2, 3)), y, "same-float32")
    spread = torch.zeros(6, 12, 16, 7)
    spread[::2, ::2, ::2] = x
    assert_close(layer(spread[::2, ::2, ::2]), y, "same-float32")
    assert_close(layer(x[:1].expand(3, -1, -1, -1))[2:], layer(x[:1]), "same-float32")
    layer.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    assert_close(layer(x), y, "same-float32")
    layer(x).sum().backward()

    linear, tokens = make("linear")
    y = linear(tokens)
    assert_close(linear(tokens.transpose(1, 2).contiguous().transpose(1, 2)), y, "same-float32")
    assert_close(linear(tokens[:1].expand(3, -1, -1))[2:], y[:1], "same-float32")
    maps = torch.randn(2, 6, 4, 5)
    assert_close(linear(maps.permute(0, 2, 3, 1)), linear(maps.permute(0, 2, 3, 1).contiguous()), "same-float32")


@both
def test_samples_of_a_batch_do_not_meet(kind: str) -> None:
    layer, x = make(kind)
    y = layer(x)
    for sample in range(len(x)):
        assert_close(layer(x[sample : sample + 1]), y[sample : sample + 1], "same-float32")
    assert relative_error(layer(x.flip(0)).flip(0), y) <= TOLERANCES["same-float32"]


@both
def test_compiles_in_one_piece(kind: str) -> None:
    layer, x = make(kind)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(compiled(x), layer(x), "same-float32")
    compiled(x).square().sum().backward()
    gradient, layer.dft_weight.grad = layer.dft_weight.grad, None
    layer(x).square().sum().backward()
    assert_close(gradient, layer.dft_weight.grad, "same-float32")
    compiled.train()
    for batch in (2, 3, 1):  # the second size makes the compiler take the batch for a variable
        compiled(torch.randn(batch, *x.shape[1:])).sum().backward()
    torch._dynamo.reset()


@both
def test_exports_for_any_batch_and_size(kind: str) -> None:
    layer, x = make(kind)
    anything = torch.export.Dim.DYNAMIC
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: anything, x.dim() - 2: anything},)).module()
    for size in (2, 5):
        y = torch.randn(size, *x.shape[1:-2], 13, x.shape[-1])
        assert_close(exported(y), layer(y), "same-float32")


def test_running_statistics_follow_in_low_precision() -> None:
    config = replace(SMALL, norm="batch")
    layer, x = make("conv", config)
    layer.train()(x)
    half, _ = make("conv", config)
    half.half().train()(x.half())
    for name in ("running_mean", "running_var"):
        low, full = getattr(half.KSM_Global.bn, name), getattr(layer.KSM_Global.bn, name)
        assert low.dtype == torch.float16
        assert_close(low.float(), full, "float16")
    assert half.KSM_Global.bn.num_batches_tracked == layer.KSM_Global.bn.num_batches_tracked


def test_batches_and_sizes_that_change_recompile_twice_at_most() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = FDConv2d(6, 8, 3, padding=1).eval()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.no_grad():
        for shape in ((2, 32, 32), (3, 32, 32), (5, 32, 32), (4, 48, 48), (7, 64, 64), (3, 33, 33)):
            x = torch.randn(shape[0], 6, *shape[1:])
            assert_close(compiled(x), layer(x), "same-float32")
    assert counter.frame_count <= 3


@pytest.mark.slow
def test_inductor_takes_sizes_that_change() -> None:
    torch._dynamo.reset()
    layer = FDConv2d(6, 8, 3, padding=1).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in ((2, 32, 32), (5, 48, 40)):
            x = torch.randn(shape[0], 6, *shape[1:])
            assert (compiled(x) - layer(x)).norm() / layer(x).norm() < 1e-5


@pytest.mark.parametrize("spectrum", ["isometric", "paper"])
@pytest.mark.parametrize("param_ratio", [1, 2])
def test_the_groups_add_up_to_the_static_weight(spectrum: str, param_ratio: int) -> None:
    config = FDConfig(kernel_num=4, param_ratio=param_ratio, spectrum=spectrum)  # type: ignore[arg-type]
    layer = FDConv2d(6, 10, 3, groups=2, config=config)
    kernels = layer.group_kernels()
    assert kernels.shape == (4, 10, 3, 3, 3)
    torch.testing.assert_close(kernels.sum(0), layer.weight.detach())
    energies = kernels.square().sum((1, 2, 3, 4))
    assert torch.allclose(energies.sum(), layer.weight.detach().square().sum(), rtol=1e-5), "frequencies do not overlap"

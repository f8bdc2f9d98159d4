"""The layers against the slow numpy reference, and against the static layers they replace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, fdconv2d_reference, fdlinear_reference, randomise_
from torch import nn

from fdconv import FDConfig, FDConv2d, FDLinear

# torch's own remark on even kernels, which the static layer makes too
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def conv(c_in: int, c_out: int, kernel_size: Any, **rest: Any) -> dict[str, Any]:
    return {"in_channels": c_in, "out_channels": c_out, "kernel_size": kernel_size, **rest}


# name: (arguments of nn.Conv2d, map size, FDConfig)
CONV_CASES: dict[str, tuple[dict[str, Any], tuple[int, int], dict[str, Any]]] = {
    # channels, with every remainder of N mod n and both parities of D2
    "1x1 of 3 to 17 channels": (conv(3, 17, 1), (5, 4), {}),
    "1x1 of 96 to 96 channels": (conv(96, 96, 1), (3, 5), {}),
    "1x1 of 65 to 65 channels": (conv(65, 65, 1, bias=False), (4, 4), {}),
    "3x3 of 17 to 65 channels": (conv(17, 65, 3, padding=1), (7, 11), {}),
    "3x3 of 1 to 1 channels": (conv(1, 1, 3, padding=1), (6, 5), {}),
    "3x3 of 1 to 5 channels": (conv(1, 5, 3), (6, 5), {}),
    "1x1 of 1 to 1 channels": (conv(1, 1, 1), (3, 3), {}),
    "a wide bottleneck": (conv(65, 3, 1), (3, 4), {"reduction": 0.5, "min_attention_channels": 4}),
    # kernels and geometry
    "5x5 without bands": (conv(17, 3, 5, padding=2), (8, 9), {}),
    "5x5 with bands": (conv(4, 6, 5, padding=2), (9, 12), {"fbm_kernel_sizes": (3, 5)}),
    "1x1 with bands": (conv(4, 6, 1), (9, 12), {"fbm_kernel_sizes": (1,)}),
    "1x3": (conv(6, 5, (1, 3), padding=(0, 1)), (5, 6), {}),
    "3x1": (conv(5, 6, (3, 1), padding=(1, 0)), (5, 6), {}),
    "2x2": (conv(5, 4, 2), (5, 6), {}),
    "stride": (conv(6, 7, 3, stride=2, padding=1), (9, 8), {}),
    "uneven stride, padding and dilation": (
        conv(4, 3, (3, 2), stride=(1, 3), padding=(2, 1), dilation=(2, 3)),
        (9, 10),
        {},
    ),
    "dilation": (conv(5, 4, 3, padding=2, dilation=2), (7, 8), {}),
    "same padding, uneven": (conv(4, 3, 2, padding="same", dilation=3), (7, 6), {}),
    "same padding, uneven, reflected": (conv(4, 3, (4, 3), padding="same", padding_mode="reflect"), (7, 6), {}),
    "valid padding": (conv(4, 3, 3, padding="valid"), (6, 7), {}),
    "reflect": (conv(4, 3, 3, padding=(2, 1), padding_mode="reflect"), (6, 7), {}),
    "replicate": (conv(4, 3, 3, padding=(2, 1), stride=2, padding_mode="replicate"), (6, 7), {}),
    "circular": (conv(4, 6, 3, padding=(2, 1), groups=2, padding_mode="circular"), (6, 7), {}),
    "groups": (conv(6, 9, 3, padding=1, groups=3), (6, 5), {}),
    "grouped 1x1": (conv(8, 4, 1, groups=4), (6, 5), {}),
    "depthwise": (conv(17, 17, 3, padding=1, groups=17), (6, 5), {}),
    "depthwise with multiplier": (conv(4, 8, 3, padding=1, groups=4), (6, 5), {}),
    # spectrum
    "more groups than coefficients": (conv(3, 2, 1), (4, 4), {"kernel_num": 50}),
    "one group": (conv(4, 6, 3, padding=1), (4, 4), {"kernel_num": 1}),
    "one group, two spectra": (conv(4, 6, 3, padding=1), (4, 4), {"kernel_num": 1, "param_ratio": 2}),
    "two spectra": (conv(5, 6, 3, padding=1), (4, 4), {"kernel_num": 7, "param_ratio": 2}),
    "three spectra, softmax": (
        conv(5, 6, 1),
        (4, 4),
        {"kernel_num": 7, "param_ratio": 3, "kernel_activation": "softmax", "kernel_temperature": 0.7},
    ),
    "three spectra, tanh": (conv(5, 6, 1), (4, 4), {"kernel_num": 4, "param_ratio": 3, "kernel_activation": "tanh"}),
    # gates
    "tanh gates": (
        conv(5, 6, 3, padding=1),
        (5, 4),
        {"global_activation": "tanh", "local_activation": "tanh", "band_activation": "tanh"},
    ),
    "temperatures": (conv(5, 6, 3, padding=1), (5, 4), {"temperature": 1.7, "kernel_temperature": 0.6}),
    "rms norm": (conv(5, 6, 3, padding=1), (5, 4), {"norm": "rms"}),
    "global branch only": (conv(5, 6, 3, padding=1), (5, 4), {"ksm_local": False}),
    "local branch only": (conv(5, 6, 3, padding=1), (5, 4), {"ksm_global": False}),
    "bands only": (conv(5, 6, 3, padding=1), (5, 4), {"ksm_global": False, "ksm_local": False, "param_ratio": 2}),
    # bands
    "no bands": (conv(5, 6, 3, padding=1), (5, 4), {"fbm_kernel_sizes": ()}),
    "one band": (conv(5, 6, 3, padding=1), (8, 12), {"bands": (2,)}),
    "two bands and the lowest": (conv(5, 6, 3, padding=1), (8, 12), {"bands": (2, 4), "band_lowfreq": True}),
    "bands that keep the corner frequency": (conv(2, 3, 3, padding=1), (8, 12), {"bands": (1, 3, 6)}),
    "softmax maps": (
        conv(5, 6, 3, padding=1),
        (13, 7),
        {"band_activation": "softmax", "band_lowfreq": True, "bands": (2, 4)},
    ),
    "two groups of maps": (conv(6, 4, 3, padding=1), (9, 8), {"band_groups": 2, "bands": (2, 4)}),
    "two groups of maps, softmax, grouped": (
        conv(12, 9, 3, padding=1, groups=3),
        (9, 8),
        {"band_groups": 2, "band_activation": "softmax"},
    ),
    # map sizes
    "one pixel": (conv(4, 3, 3, padding=1), (1, 1), {}),
    "one row": (conv(4, 3, 3, padding=1), (1, 9), {}),
    "one column": (conv(4, 3, 3, padding=1), (9, 1), {}),
    "prime sides": (conv(4, 3, 3, padding=1), (23, 19), {}),
    "long": (conv(2, 3, 3, padding=1), (3, 70), {}),
    "interpolated, golden size": (conv(4, 3, 3, padding=1), (16, 16), {"band_mask": "interpolated"}),
    "interpolated, +f kept and -f dropped": (conv(4, 3, 3, padding=1), (23, 18), {"band_mask": "interpolated"}),
    "interpolated, larger than the grid": (conv(2, 3, 3, padding=1), (9, 90), {"band_mask": "interpolated"}),
    "interpolated, one pixel": (conv(2, 3, 3, padding=1), (1, 1), {"band_mask": "interpolated"}),
    "interpolated, other bands": (
        conv(4, 3, 3, padding=1),
        (21, 10),
        {"band_mask": "interpolated", "bands": (1, 3, 16), "band_lowfreq": True},
    ),
}


def check_conv(
    geometry: dict[str, Any], size: tuple[int, int], config: FDConfig, batch: int = 2, training: bool = False
) -> tuple[dict[str, torch.Tensor], FDConv2d]:
    """Compares one forward; returns the state before it and the layer after it."""
    layer = FDConv2d(**geometry, dtype=torch.float64, config=config)
    randomise_(layer, seed=1).train(training)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = torch.randn(
        batch, geometry["in_channels"], *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    kept = x.clone()
    expected = fdconv2d_reference(state, config, geometry, x, training)
    assert_close(layer(x), expected, "reference")
    assert torch.equal(x, kept), "the input was changed in place"
    return state, layer


@pytest.mark.parametrize("name", CONV_CASES)
def test_conv_equals_the_reference(name: str) -> None:
    geometry, size, settings_ = CONV_CASES[name]
    check_conv(geometry, size, FDConfig(**{"kernel_num": 8, **settings_}))


def test_conv_equals_the_reference_at_the_papers_settings() -> None:
    check_conv(conv(65, 96, 3, padding=1, stride=2), (14, 15), FDConfig())


@pytest.mark.parametrize("norm", ["batch", "rms"])
@pytest.mark.parametrize("batch", [1, 3])
def test_conv_in_training(norm: str, batch: int) -> None:
    config = FDConfig(kernel_num=8, norm=norm)
    before, layer = check_conv(conv(5, 6, 3, padding=1), (6, 5), config, batch=batch, training=True)
    changed = {name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])}
    statistics = {f"KSM_Global.bn.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert changed == (statistics if norm == "batch" and batch > 1 else set())


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_running_statistics_are_those_of_batch_norm(momentum: float | None) -> None:
    layer = randomise_(FDConv2d(4, 3, 1, dtype=torch.float64, config=FDConfig(kernel_num=4, norm="batch")), 1).train()
    norm = nn.BatchNorm1d(16, dtype=torch.float64)
    norm.load_state_dict({k.removeprefix("KSM_Global.bn."): v for k, v in layer.state_dict().items() if ".bn." in k})
    if momentum != norm.momentum:  # else the layer's default
        norm.momentum = layer.KSM_Global.bn.momentum = momentum
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    layer(x)
    norm(nn.functional.linear(x.mean((2, 3)), layer.state_dict()["KSM_Global.fc.weight"].flatten(1)))
    for name, tensor in norm.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[f"KSM_Global.bn.{name}"], tensor)


# name: (in, out, shape before the channels, FDConfig)
LINEAR_CASES: dict[str, tuple[int, int, tuple[int, ...], dict[str, Any]]] = {
    "rows": (17, 9, (3,), {}),
    "tokens": (16, 40, (2, 5), {}),
    "maps": (9, 17, (2, 3, 4), {}),
    "65 to 65": (65, 65, (2, 3), {"kernel_num": 64}),
    "from one channel": (1, 5, (2, 3), {}),
    "to one channel": (5, 1, (2, 3), {}),
    "one group": (5, 6, (2, 3), {"kernel_num": 1}),
    "more groups than coefficients": (3, 2, (2, 3), {"kernel_num": 50}),
    "two spectra": (6, 7, (2, 3), {"param_ratio": 2}),
    "three spectra, softmax": (
        6,
        7,
        (2, 3),
        {"param_ratio": 3, "kernel_activation": "softmax", "kernel_temperature": 0.7},
    ),
    "tanh gates": (6, 7, (2, 3), {"kernel_activation": "tanh", "global_activation": "tanh", "temperature": 1.3}),
    "batch norm": (6, 7, (3, 2), {"norm": "batch"}),
    "no global branch": (6, 7, (2, 3), {"ksm_global": False, "param_ratio": 2}),
}


@pytest.mark.parametrize("name", LINEAR_CASES)
def test_linear_equals_the_reference(name: str) -> None:
    c_in, c_out, shape, settings_ = LINEAR_CASES[name]
    config = FDConfig(**{"kernel_num": 8, **settings_})
    x = torch.randn(*shape, c_in, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for training in (False, True):
        layer = FDLinear(c_in, c_out, bias=name != "tokens", dtype=torch.float64, config=config)
        state = {k: v.clone() for k, v in randomise_(layer, seed=1).state_dict().items()}
        assert_close(layer.train(training)(x), fdlinear_reference(state, config, x, training), "reference")


# Random geometries -------------------------------------------------------------------------------------------------


@st.composite
def geometries(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, int]]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    c_in, c_out = groups * draw(st.integers(1, 6)), groups * draw(st.integers(1, 6))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (2, 2), (5, 5), (1, 3), (4, 3)]))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding_mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding: Any = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 3), st.integers(0, 3))))
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 2)))
    before = (
        {"same": [-(-r // 2) for r in reach], "valid": [0, 0]}.get(padding) if isinstance(padding, str) else padding
    )
    assert before is not None
    # The smallest map on which the static layer is defined: an output pixel, and enough to reflect or wrap.
    around = {"reflect": 1, "circular": 0}.get(padding_mode, -100)
    least = [max(1, r + 1 - 2 * b, b + around) for r, b in zip(reach, before, strict=True)]
    if isinstance(padding, str):
        least = [max(a, r + 1) for a, r in zip(least, reach, strict=True)]
    size = (least[0] + draw(st.integers(0, 9)), least[1] + draw(st.integers(0, 9)))
    geometry = conv(
        c_in, c_out, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        bias=draw(st.booleans()), padding_mode=padding_mode,
    )  # fmt: skip
    return geometry, size


@st.composite
def configs(draw: st.DrawFn) -> FDConfig:
    gates, kernel_gates = st.sampled_from(["sigmoid", "tanh"]), st.sampled_from(["sigmoid", "tanh", "softmax"])
    return FDConfig(
        kernel_num=draw(st.integers(1, 20)),
        param_ratio=draw(st.integers(1, 3)),
        ksm_global=draw(st.sampled_from([True, True, False])),
        ksm_local=draw(st.sampled_from([True, True, False])),
        min_attention_channels=draw(st.integers(1, 16)),
        norm=draw(st.sampled_from(["auto", "batch", "rms"])),
        global_activation=draw(gates),
        kernel_activation=draw(kernel_gates),
        local_activation=draw(gates),
        temperature=draw(st.sampled_from([0.5, 1.0])),
        kernel_temperature=draw(st.sampled_from([1.0, 2.0])),
        bands=draw(st.sampled_from([(2, 4, 8), (2,), (3, 5), (1, 2)])),
        band_mask=draw(st.sampled_from(["exact", "interpolated"])),
        band_activation=draw(kernel_gates),
        band_lowfreq=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=40)
@given(geometries(), configs(), st.integers(1, 3), st.booleans())
def test_any_conv_equals_the_reference(
    geometry: tuple[dict[str, Any], tuple[int, int]], config: FDConfig, batch: int, training: bool
) -> None:
    check_conv(*geometry, config, batch, training)


def check_neutral(layer: FDConv2d | FDLinear, static: nn.Conv2d | nn.Linear, x: torch.Tensor) -> None:
    expected = static(x)
    kind = "neutral-float32" if x.dtype == torch.float32 else "neutral-float64"
    # An output of one or two numbers may be a sum that cancels, and its relative error then says nothing. The norm that
    # outputs have on average: that without any cancellation, over the square root of the number of terms.
    bare = copy.deepcopy(static)
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.abs_()
        least = float(bare(x.abs()).norm()) / static.weight[0].numel() ** 0.5
    assert layer.training == static.training
    assert_close(layer(x), expected, kind, least)
    plain = layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear()
    assert_close(plain(x), expected, kind, least)


@settings(deadline=None, max_examples=40)
@given(geometries(), configs(), st.integers(1, 3), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_a_converted_conv_computes_what_it_did(
    geometry: tuple[dict[str, Any], tuple[int, int]],
    config: FDConfig,
    batch: int,
    training: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(batch)
    arguments, size = geometry
    static = nn.Conv2d(**arguments, dtype=dtype).train(training)
    x = torch.randn(batch, arguments["in_channels"], *size, dtype=dtype)
    check_neutral(FDConv2d.from_conv(static, config), static, x)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 33), st.integers(1, 33), st.lists(st.integers(1, 4), max_size=3),
    configs(), st.booleans(), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_a_converted_linear_computes_what_it_did(
    c_in: int, c_out: int, shape: list[int], config: FDConfig, training: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(c_in)
    static = nn.Linear(c_in, c_out, bias=training, dtype=dtype).train(training)
    x = torch.randn(*shape, c_in, dtype=dtype)
    check_neutral(FDLinear.from_linear(static, config), static, x)

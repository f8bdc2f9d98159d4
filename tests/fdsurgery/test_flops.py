"""What a layer is said to cost is what torch counts when it runs, component by component."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Any

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import fdsurgery
from fdconv import FDConfig, FDConv2d, FDLinear, LayerCost, flops, layer_cost, set_backend
from fdconv.backend import Backend
from fdsurgery.report import in_units, render

ATEN = torch.ops.aten
NEW = FDConfig(param_ratio=2, kernel_num=5, bands=(1, 3), band_lowfreq=True)
LAYERS: dict[str, tuple[Callable[[], FDConv2d | FDLinear], tuple[int, ...]]] = {
    "3x3": (lambda: FDConv2d(32, 48, 3, padding=1), (32, 14, 15)),
    "1x1": (lambda: FDConv2d(32, 48, 1), (32, 14, 15)),
    "1x1, stride 2, padded": (lambda: FDConv2d(32, 48, 1, stride=2, padding=1), (32, 14, 15)),
    "grouped, stride 2": (lambda: FDConv2d(32, 48, 3, stride=2, groups=4), (32, 17, 13)),
    "depthwise 7x7": (lambda: FDConv2d(24, 24, 7, padding="same", groups=24), (24, 9, 11)),
    "depthwise 1x1": (lambda: FDConv2d(24, 24, 1, groups=24), (24, 9, 11)),
    "oblong, dilated": (lambda: FDConv2d(7, 11, (3, 5), padding=(2, 1), dilation=(2, 1)), (7, 19, 23)),
    "reflected": (lambda: FDConv2d(8, 12, 3, padding=1, padding_mode="reflect"), (8, 13, 10)),
    "other settings": (lambda: FDConv2d(18, 20, 3, config=NEW), (18, 21, 16)),
    "band groups": (lambda: FDConv2d(18, 20, 3, config=FDConfig(band_groups=3)), (18, 21, 16)),
    "interpolated": (lambda: FDConv2d(16, 20, 3, config=FDConfig(band_mask="interpolated")), (16, 21, 16)),
    "learned edges": (lambda: FDConv2d(18, 20, 3, config=FDConfig(band_groups=3, band_edges="learned")), (18, 11, 8)),
    "dynamic edges": (lambda: FDConv2d(18, 20, 3, config=FDConfig(band_edges="dynamic")), (18, 11, 8)),
    "no modulation": (
        lambda: FDConv2d(16, 20, 3, config=FDConfig(ksm_global=False, ksm_local=False, fbm_kernel_sizes=())),
        (16, 9, 9),
    ),
    "no groups": (lambda: FDConv2d(16, 20, 1, config=FDConfig(kernel_num=1, ksm_local=False)), (16, 9, 9)),
    "tokens": (lambda: FDLinear(20, 30), (5, 20)),
    "map": (lambda: FDLinear(20, 31, config=NEW), (5, 7, 20)),
    "rows": (lambda: FDLinear(21, 30), (21,)),
}
SHARED = ("no modulation", "no groups", "learned edges")
"""Layers of which the samples of a batch share a part."""


@dataclass
class Count:
    """What torch's counter saw, in multiply-adds, by module and operator."""

    by_module: dict[str, dict[Any, int]]

    def of(self, module: str = "Global", *operators: Any) -> float:
        found = self.by_module.get(module, {})
        return sum(count for operator, count in found.items() if not operators or operator in operators) / 2


def count(model: Callable[..., Any], *inputs: Tensor) -> Count:
    with FlopCounterMode(display=False) as mode:
        model(*inputs)
    return Count(mode.get_flop_counts())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_components_are_what_torch_counts(name: str, device: str) -> None:
    make, shape = LAYERS[name]
    layer = make().to(device)
    cost = layer_cost(layer, shape)
    x = torch.zeros(1, *shape, device=device)
    seen, kind = count(layer, x), type(layer).__name__
    transforms = (ATEN._fft_r2c, ATEN._fft_c2r)
    static = layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear()

    assert cost.convolution == count(static, x).of()
    assert cost.heads == seen.of(f"{kind}.KSM_Global")
    assert cost.band_maps == seen.of(f"{kind}.FBM", ATEN.convolution)
    assert cost.band_transforms == pytest.approx(seen.of(f"{kind}.FBM") - cost.band_maps, abs=3)
    in_bands = seen.of(f"{kind}.FBM", *transforms)
    assert cost.inverse_transform == pytest.approx(seen.of("Global", *transforms) - in_bands, abs=1)
    assert cost.convolution + cost.added - cost.elementwise == pytest.approx(seen.of(), abs=3)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in SHARED])
def test_every_sample_costs_the_same(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().to("meta")
    cost = layer_cost(layer, shape)
    batch = torch.zeros(5, *shape, device="meta")
    assert count(layer, batch).of() == pytest.approx(5 * (cost.total - cost.elementwise), abs=15)


def test_a_cost_worked_out_by_hand() -> None:
    cost = layer_cost(FDConv2d(32, 64, 3, padding=1), (32, 8, 16))
    weights, points = 64 * 32 * 9, 192 * 96
    assert cost == LayerCost(
        convolution=8 * 16 * weights,
        heads=16 * (32 + 32 + 64 + 9 + 64),
        spectrum=2 * 192 * 49,
        inverse_transform=round(5 / 4 * points * log2(points)),
        local=3 * weights,
        products=3 * weights,
        band_maps=8 * 16 * 9 * 32 * 3,
        # Ranks 5x9, 3x5 and 3x3: at 8 rows the bands 4 and 8 end at the frequencies 1 and 0.
        band_transforms=32 * (8 * 16 * 9 + 5 * 8 * 9 + (5 * 9 + 8 * 5 + 3 * 5 + 8 * 3 + 1 * 3 + 8 * 1) * 16),
        band_products=32 * 8 * 16 * 4,
    )
    assert cost.elementwise == cost.spectrum + cost.products + cost.band_products
    assert cost.total == cost.convolution + cost.added


def test_factors_that_a_layer_lacks_cost_nothing() -> None:
    def products(layer: FDConv2d | FDLinear, shape: tuple[int, ...]) -> float:
        static = layer.to_conv() if isinstance(layer, FDConv2d) else layer.to_linear()
        return layer_cost(layer, shape).products / static.weight.numel()

    assert products(FDConv2d(32, 32, 3, config=FDConfig(ksm_local=False)), (32, 8, 8)) == 2
    assert products(FDConv2d(32, 32, 3, config=FDConfig(ksm_global=False)), (32, 8, 8)) == 1
    assert products(FDConv2d(32, 32, 1, groups=32), (32, 8, 8)) == 2
    assert products(FDLinear(32, 32), (32,)) == 2


@pytest.mark.parametrize(
    ("transform", "shape", "expected"),
    [
        (torch.fft.rfft, (3, 8), 3 * 2.5 * 8 * 3),
        (torch.fft.fft2, (4, 8, 16), 4 * 5 * 128 * 7),
        (torch.fft.rfft2, (4, 8, 16), 4 * 2.5 * 128 * 7),
        (lambda x: torch.fft.irfft2(x, s=(8, 15)), (4, 8, 8), 4 * 2.5 * 120 * log2(120)),
        (torch.fft.ifft, (2, 1), 0),
    ],
)
def test_fourier_transforms_are_counted(transform: Any, shape: tuple[int, ...], expected: float) -> None:
    assert 2 * count(transform, torch.zeros(shape)).of() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_either_gradient_of_a_convolution_costs_what_it_does(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(8, 24, 3, stride=2, groups=groups, bias=False)
    x = torch.zeros(2, 8, 9, 9, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = conv(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_training_is_counted_as_the_batch_grows() -> None:
    def step(batch: int) -> float:
        layer = FDConv2d(16, 24, 3, padding=1)
        with FlopCounterMode(display=False) as mode:
            layer(torch.zeros(batch, 16, 9, 9, requires_grad=True)).sum().backward()
        return mode.get_total_flops()

    assert step(4) == pytest.approx(2 * step(2), rel=1e-3)


def test_formulas_of_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(*_: Any, **__: Any) -> int:
        return 7

    monkeypatch.setitem(flop_counter.flop_registry, ATEN._fft_r2c, another)
    flops._register(flop_counter)
    assert flop_counter.flop_registry[ATEN._fft_r2c] is another


@pytest.mark.parametrize("config", [FDConfig(), FDConfig(ksm_local=False)])
@pytest.mark.parametrize("groups", [1, 4])
def test_fused_kernels_are_counted(groups: int, config: FDConfig) -> None:
    pytest.importorskip("triton")
    layer = FDConv2d(16, 24, 3, padding=1, groups=groups, config=config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer.to(device)
    x = torch.randn(2, 16, 5, 5, device=device, requires_grad=True)

    def forward_and_backward(backend: Backend) -> tuple[int, int]:
        with set_backend(backend), FlopCounterMode(display=False) as forward:
            y = layer(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    plain, fused = forward_and_backward("torch"), forward_and_backward("triton")
    assert fused[0] == plain[0]
    # The fused backward pass applies the taps once more, for it keeps none of the weights.
    assert fused[1] == plain[1] + 2 * 2 * layer_cost(layer, (16, 5, 5)).local


def counted(model: nn.Module, x: Tensor) -> float:
    return count(model.eval(), x).of()


def elementwise(plan: fdsurgery.Plan) -> int:
    names = ("spectrum", "products", "band_products")
    return sum(decision.multiply_adds_by_component[name] for decision in plan.swaps for name in names)


def check_plan(model: nn.Module, x: Tensor, **settings: Any) -> fdsurgery.Plan:
    """That a plan tells what torch counts of the model before and after conversion."""
    plan = fdsurgery.plan(model, example_inputs=x, **settings)
    plain = counted(model, x)
    converted = counted(fdsurgery.apply(plan, model), x)
    assert plan.swaps and plan.multiply_adds * len(x) == plain
    tolerance = 4 * len(plan.swaps) * len(x)
    expected = len(x) * (plan.multiply_adds_added - elementwise(plan))
    assert converted - plain == pytest.approx(expected, abs=tolerance)
    return plan


def test_a_plan_tells_what_a_converted_resnet_costs() -> None:
    with torch.device("meta"):
        plan = check_plan(timm.create_model("resnet26"), torch.zeros(3, 3, 70, 64))
    spatial = [decision for decision in plan.swaps if decision.site.kernel_size == (3, 3)]
    assert all(decision.multiply_adds_by_component["band_transforms"] for decision in spatial)
    assert plan.multiply_adds_added == sum(decision.multiply_adds_added for decision in plan.swaps)
    assert not any(decision.multiply_adds_added for decision in plan.kept)


def test_settings_change_what_a_plan_tells() -> None:
    model = timm.create_model("resnet18")
    paper, plain = (fdsurgery.plan(model, fbm_kernel_sizes=sizes) for sizes in ([3], []))
    bands = sum(
        count
        for decision in paper.swaps
        for name, count in decision.multiply_adds_by_component.items()
        if name.startswith("band_")
    )
    assert 0 < bands == paper.multiply_adds_added - plain.multiply_adds_added


class Pyramid(nn.Module):
    """A convolution that sees three sizes, one that pads by itself, and a linear layer whose samples are windows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 18, 1)
        self.same = Conv2dSame(18, 18, 3, stride=2)
        self.shared = nn.Conv2d(18, 18, 3, padding=1)
        self.expand = nn.Linear(18, 36)
        self.project = nn.Linear(36, 18)
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.stem(x).relu()).relu()
        for size in (16, 8, 4):
            x = self.shared(nn.functional.adaptive_avg_pool2d(x, size)).relu()
        windows = x.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 18)
        windows = windows + self.project(nn.functional.gelu(self.expand(windows)))
        return self.head(windows.reshape(len(x), -1, 18).mean(1))


def test_every_call_and_every_sample_of_a_layer_counts() -> None:
    plan = check_plan(Pyramid(), torch.zeros(2, 3, 37, 36), recipe="generic")
    found = {decision.site.name: decision.multiply_adds_by_component for decision in plan.swaps}
    assert {"same", "shared", "expand", "project"} <= set(found)
    layer = FDConv2d(18, 18, 3)
    sizes = [layer_cost(layer, (18, size, size)) for size in (19, 16, 8, 4)]
    assert found["shared"]["local"] == 3 * sizes[0].local
    assert found["shared"]["band_maps"] == sum(size.band_maps for size in sizes[1:])
    assert found["expand"]["spectrum"] == 4 * layer_cost(FDLinear(18, 36), (4, 18)).spectrum


def test_a_plan_is_saved_with_what_it_costs() -> None:
    plan = fdsurgery.plan(timm.create_model("resnet18"))
    data = json.loads(json.dumps(plan.to_dict()))
    assert fdsurgery.Plan.from_dict(data) == plan
    assert data["decisions"][1]["multiply_adds_by_component"]["band_maps"] == 56 * 56 * 64 * 27
    for decision in data["decisions"]:
        del decision["multiply_adds_by_component"]
    assert fdsurgery.Plan.from_dict(data).multiply_adds_added == 0


def test_a_plan_prints_what_it_costs() -> None:
    plan = fdsurgery.plan(timm.create_model("resnet18"))
    added = in_units(plan.multiply_adds_added)
    assert (
        f"+{added} multiply-adds a sample (+" in plan.summary() and f"of {in_units(1_814_073_344)})" in plan.summary()
    )
    narrow = render(plan, width=80)
    assert all(f"+{in_units(decision.multiply_adds_added)}" in narrow for decision in plan.swaps)
    line = next(line for line in render(plan).splitlines() if line.startswith("layer1.0.conv1"))
    assert line.endswith(f"+{in_units(plan.swaps[0].multiply_adds_added)}")


def test_units() -> None:
    assert [in_units(number) for number in (0, 12_300_000, 999_994_999, 4_089_184_256)] == [
        "0.00 M",
        "12.30 M",
        "999.99 M",
        "4.09 G",
    ]

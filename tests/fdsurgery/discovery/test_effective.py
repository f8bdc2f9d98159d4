"""Layers whose class computes the weight or pads the input in a way of its own, and what takes their place."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
import transformers
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdsurgery.discovery.effective import effective_layer, same_padding
from fdsurgery.recipe import parse_recipe
from fdsurgery.verification import relative_error

ALL = parse_recipe("swap: [{where: {kind: [conv, linear]}}]")


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrised(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


LAYERS = {
    "standardised": lambda: StdConv2d(8, 6, 3, stride=2),
    "scaled": lambda: ScaledStdConv2d(8, 6, 3, groups=2),
    "standardised, same": lambda: StdConv2dSame(8, 6, 3, stride=2),
    "scaled, same": lambda: ScaledStdConv2dSame(8, 6, 5, stride=3, dilation=2),
    "same": lambda: Conv2dSame(8, 6, (2, 3), stride=2, bias=False),
    "parametrised": lambda: parametrised(nn.Conv2d(8, 6, 3, padding="same")),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 6, 3, padding=1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 6, 1)).eval(),
    "standardised twice": lambda: parametrised(ScaledStdConv2d(8, 6, 3)),
    "timm linear": lambda: timm.layers.Linear(8, 6),
    "parametrised linear": lambda: parametrised(nn.Linear(8, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [(12, 15), (13, 11)])
def test_the_effective_layer_takes_the_place_and_restores(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(2, 8, *size) if isinstance(layer, nn.Conv2d) else torch.randn(2, *size, 8)
    model = nn.Sequential(nn.Identity(), layer).eval()
    expected = model(x)
    state = copy.deepcopy(model.state_dict())
    fdsurgery.sites(model, x)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "looking changes nothing"
    plan = fdsurgery.plan(model, ALL, example_inputs=x)
    count = sum(parameter.numel() for parameter in model.parameters())
    fdsurgery.apply(plan, model)
    assert isinstance(model[1], (FDConv2d, FDLinear))
    assert sum(parameter.numel() for parameter in model.parameters()) - count == plan.parameters_added
    assert relative_error(model(x), expected) < 1e-6
    assert all(parameter.requires_grad for parameter in model.parameters())
    fdsurgery.restore(model)
    assert relative_error(model(x), expected) < 1e-6
    assert not isinstance(model[1], (FDConv2d, FDLinear))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_meta_amount_to_the_same(name: str) -> None:
    found, on_meta = effective_layer(LAYERS[name]()), effective_layer(LAYERS[name]().to("meta"))
    assert not isinstance(found, str) and not isinstance(on_meta, str)
    assert found.pads_same == on_meta.pads_same and repr(found.layer) == repr(on_meta.layer)


def test_same_padding_is_tensorflows() -> None:
    for size in range(5, 20):
        for kernel, stride, dilation in [(3, 2, 1), (5, 3, 1), (2, 2, 1), (3, 1, 2), (1, 4, 1)]:
            conv = nn.Conv2d(1, 1, kernel, stride, dilation=dilation)
            out = conv(F.pad(torch.zeros(1, 1, size, size), same_padding((size, size), conv)))
            assert out.shape[-1] == -(-size // stride)
    assert same_padding((6, 5), nn.Conv2d(1, 1, 3, 2)) == [1, 1, 0, 1]


class ByInput(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


class Scaling(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class Adding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Strided(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, 2)


class Needy(nn.Linear):
    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        return super().forward(x + more)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (ByInput(4, 4, 1), "computes its weight from the input"),
        (Scaling(4, 4, 1), "changes the input first"),
        (Adding(4, 4, 1), "does more than one"),
        (Twice(4, 4, 1), "does more than one"),
        (Strided(4, 4, 1), "another stride or dilation"),
        (Needy(4, 4), "could not be called by itself"),
    ],
)
def test_what_amounts_to_no_plain_layer_says_why(layer: nn.Module, reason: str) -> None:
    found = effective_layer(layer)
    assert isinstance(found, str) and reason in found and type(layer).__name__ in found


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: timm.create_model("nf_resnet26", num_classes=7), 64),
        (lambda: timm.create_model("resnetv2_50x1_bit", num_classes=7), 64),
        (lambda: timm.create_model("tf_efficientnet_b0", num_classes=7), 65),
        (
            lambda: transformers.BitForImageClassification(
                transformers.BitConfig(embedding_size=32, hidden_sizes=[128, 256], depths=[1, 1], num_labels=7)
            ),
            64,
        ),
    ],
    ids=["nf_resnet", "bit", "tf_efficientnet", "hf bit"],
)
def test_models_of_such_layers_convert_and_load(build, size: int, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, x = build(), torch.randn(2, 3, size, size)
    fdsurgery.testing.settle_(model, x)
    before = copy.deepcopy(model)
    plan = fdsurgery.plan(model, "generic", example_inputs=x)
    fdsurgery.apply(plan, model)
    assert len(plan.swaps) > 4
    exact = [copy.deepcopy(one).double() for one in (before, model)]  # else the roundings of fifty layers add up
    assert fdsurgery.verify(*exact, x.double(), tolerance=1e-5).ok
    source = fdsurgery.ModelSource("file", "models.py:build")
    loaded = fdsurgery.load(fdsurgery.save(model, tmp_path / "saved", source=source), model=build())
    assert fdsurgery.verify(model, loaded, x).relative_error < 1e-6

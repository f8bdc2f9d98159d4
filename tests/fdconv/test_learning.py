"""A converted model learns as its plain twin does, in a training loop that knows nothing of it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from reference import randomise_
from torch import Tensor, nn
from torch.nn import functional as F

import fdsurgery
from benchmarks.movement import GATES, drawn, gates, movement
from fdconv import FDConfig, FDConv2d, FDLinear

Plain = nn.Conv2d | nn.Linear
STATIC = {"ksm_global": False, "ksm_local": False, "fbm_kernel_sizes": ()}

LAYERS: dict[str, Any] = {
    "3x3": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "odd width": lambda: nn.Conv2d(5, 7, 3),
    "one channel": lambda: nn.Conv2d(1, 4, 3),
    "a single column": lambda: nn.Conv2d(1, 5, (3, 1)),
    "two columns": lambda: nn.Conv2d(2, 3, 1),
    "oblong": lambda: nn.Conv2d(3, 5, (2, 5)),
    "7x7": lambda: nn.Conv2d(3, 4, 7, stride=2),
    "1x1": lambda: nn.Conv2d(8, 6, 1, bias=False),
    "groups": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "linear": lambda: nn.Linear(8, 5),
    "linear, odd": lambda: nn.Linear(7, 9),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def dynamic(plain: Plain, **settings: Any) -> FDConv2d | FDLinear:
    config = FDConfig(**settings)
    return FDLinear.from_linear(plain, config) if isinstance(plain, nn.Linear) else FDConv2d.from_conv(plain, config)


def batch(plain: Plain, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(plain, nn.Linear):
        return torch.randn(4, 3, plain.in_features, dtype=dtype)
    return torch.randn(2, plain.in_channels, 9, 8, dtype=dtype)


def static_weight(layer: FDConv2d | FDLinear) -> Tensor:
    return (layer.to_linear() if isinstance(layer, FDLinear) else layer.to_conv()).weight.detach()


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@layers
@pytest.mark.parametrize("ratio", [1, 3])
def test_the_spectrum_is_isometric(make: Any, ratio: int) -> None:
    layer = dynamic(make().double(), param_ratio=ratio, **STATIC)

    def weight(spectrum: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(layer, {"dft_weight": spectrum}):
            return layer._neutral_weight().flatten()

    jacobian = torch.autograd.functional.jacobian(weight, layer.dft_weight.detach()).flatten(1)
    torch.testing.assert_close(jacobian @ jacobian.T, torch.eye(len(jacobian), dtype=torch.float64), rtol=0, atol=1e-13)


@layers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("settings", [STATIC, {}], ids=["no modulation", "modulation frozen"])
def test_sgd_moves_the_weight_as_the_plain_one(
    make: Any, dtype: torch.dtype, tolerance: float, settings: dict[str, Any]
) -> None:
    """20 steps with momentum and decay."""
    plain = make().to(dtype)
    before = plain.weight.detach().clone()
    layer = dynamic(plain, param_ratio=2, **settings)
    trained = [p for name, p in layer.named_parameters() if name in ("dft_weight", "bias")]
    rates = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    pairs = [(plain, torch.optim.SGD(plain.parameters(), **rates)), (layer, torch.optim.SGD(trained, **rates))]
    for _ in range(20):
        x = batch(plain, dtype)
        target = torch.randn_like(plain(x))
        for model, optimizer in pairs:
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            optimizer.step()
    assert distance(plain.weight.detach(), before) > 0.05
    assert distance(static_weight(layer), plain.weight.detach()) < tolerance


NETWORKS = {
    "resnet": ("test_resnet", 64),
    "convnext": ("test_convnext", 128),
    "efficientnet": ("test_efficientnet", 64),
    "vit": ("test_vit", 160),
}


@pytest.mark.parametrize(("name", "size"), NETWORKS.values(), ids=NETWORKS)
def test_adamw_moves_the_weights_of_a_network_as_far(name: str, size: int) -> None:
    """The relative movement of each swapped weight after 5 steps, within a fifth.

    But for depthwise layers. Their image is `k` columns wide, of which column 0 stands for one frequency and is moved
    by twice as many numbers, so that a step is `sqrt(1 + 1/k)` as long; and where a few positions see most of the
    gradient, Adam moves those alone in a plain layer, and the whole filter here.
    """
    x, target = torch.randn(4, 3, size, size), torch.randint(0, 10, (4,))
    plain = fdsurgery.testing.settle_(timm.create_model(name, num_classes=10), x)
    converted = fdsurgery.convert(copy.deepcopy(plain), recipe="generic", example_inputs=x)
    swapped = {n: m for n, m in converted.named_modules() if isinstance(m, (FDConv2d, FDLinear))}
    before = {n: plain.get_submodule(n).weight.detach().clone() for n in swapped}  # type: ignore[operator, union-attr]
    for model in (plain, converted):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model.train()
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
    moved = {}
    for fqn, layer in swapped.items():
        theirs: Any = plain.get_submodule(fqn).weight
        moved[fqn] = distance(static_weight(layer), before[fqn]) / distance(theirs.detach(), before[fqn])
    assert swapped
    depthwise = {fqn for fqn, layer in swapped.items() if isinstance(layer, FDConv2d) and layer.groups > 1}
    assert not {fqn: ratio for fqn, ratio in moved.items() if not 0.8 < ratio < (1.45 if fqn in depthwise else 1.2)}


@pytest.mark.parametrize("inputs", ["normal", "rectified"])
@pytest.mark.parametrize("deviation", [1.0, 3.0])
@pytest.mark.parametrize("channels", [3, 16, 48, 200, 480, 2048])
def test_no_gate_saturates_within_five_steps(channels: int, deviation: float, inputs: str) -> None:
    most = movement("isometric", channels, inputs, deviation, steps=5, lr=1e-3).most
    assert set(most) == set(GATES)
    assert all(0 < moved < 0.9 for moved in most.values()), most


@pytest.mark.parametrize("channels", [16, 32, 48])
def test_gates_of_narrow_layers_move_no_slower_than_the_papers(channels: int) -> None:
    """With the same norm; batch norm of two samples makes other heads' inputs."""
    moved = {}
    for spectrum in ("paper", "isometric"):
        torch.manual_seed(1)
        x, target = drawn("rectified", 1.0, channels), torch.randn(2, 16, 12, 12)
        layer = FDConv2d(channels, 16, 3, padding=1, config=FDConfig(spectrum=spectrum, norm="rms"))  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
        F.mse_loss(layer(x), target).backward()
        optimizer.step()
        moved[spectrum] = {name: float((one - 1).abs().mean()) for name, one in gates(layer, x).items()}
    for name, one in moved["paper"].items():
        assert moved["isometric"][name] > 0.999 * one, name


@pytest.mark.parametrize("samples", [1, 2, 12])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_training_and_evaluation_agree(kind: str, samples: int) -> None:
    plain: Plain = nn.Conv2d(24, 8, 3) if kind == "conv" else nn.Linear(24, 8)
    layer = randomise_(dynamic(plain), seed=1)
    x = torch.randn(samples, 24, 7, 7) if kind == "conv" else torch.randn(samples, 5, 24)
    trained = layer.train()(x)
    torch.testing.assert_close(layer.eval()(x), trained, rtol=1e-6, atol=1e-6)
    alone = torch.cat([layer(one) for one in x.split(1)])
    torch.testing.assert_close(alone, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_accumulated_gradients_are_those_of_the_joint_batch(kind: str) -> None:
    plain: Plain = nn.Conv2d(24, 8, 3) if kind == "conv" else nn.Linear(24, 8)
    layer = randomise_(dynamic(plain.double()), seed=1).train()
    x = torch.randn(12, 24, 7, 7) if kind == "conv" else torch.randn(12, 5, 24)
    found = []
    for parts in (1, 4):
        layer.zero_grad()
        for part in x.double().chunk(parts):
            (layer(part).square().mean() / parts).backward()
        found.append({name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None})
    assert len(found[0]) == len(list(layer.parameters()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_there_is_nothing_to_synchronise() -> None:
    model = fdsurgery.convert(nn.Sequential(*(nn.Conv2d(24, 24, 3) for _ in range(3))), recipe="generic")
    assert any(isinstance(m, FDConv2d) for m in model.modules())
    assert not [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not [name for name, _ in model.named_buffers() if "running" in name]


def test_the_squeeze_is_drawn_at_a_size_that_does_not_matter() -> None:
    """RMS norm takes the size of the first map away, but for its epsilon."""
    layer = randomise_(dynamic(nn.Conv2d(24, 8, 1)), seed=1).eval()
    x = torch.randn(3, 24, 5, 5)
    before = layer(x)
    assert layer.KSM_Global is not None
    with torch.no_grad():
        layer.KSM_Global.fc.weight.mul_(math.sqrt(7))
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-4)


# What was saved before spectra were isometric ------------------------------------------------------------------------


def test_a_folder_of_version_0_1_has_the_papers_scales(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = fdsurgery.convert(
        fdsurgery.testing.settle_(timm.create_model("test_resnet"), x), spectrum="paper", kernel_num=8
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    fdsurgery.save(model.eval(), tmp_path / "old")
    file = tmp_path / "old" / "fdsurgery.json"
    description = json.loads(file.read_text())
    for entry in description["layers"].values():
        assert entry["settings"].pop("spectrum") == "paper"
    file.write_text(json.dumps(description))
    loaded = fdsurgery.load(tmp_path / "old")
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert {layer.config.spectrum for layer in loaded.modules() if isinstance(layer, FDConv2d)} == {"paper"}


@layers
def test_a_state_dict_in_the_papers_scales_is_rescaled(make: Any) -> None:
    plain = make()
    old = randomise_(dynamic(plain, spectrum="paper", norm="rms", reduction=8.0), seed=1).eval()
    new = dynamic(plain, reduction=8.0).eval()
    new.load_state_dict(old.state_dict())
    x = batch(plain)
    torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="stored isometrically, and this layer's as in the paper"):
        old.load_state_dict(new.state_dict())


def test_another_norm_is_told() -> None:
    old, new = FDConv2d(24, 8, 3, config=FDConfig(spectrum="paper")), FDConv2d(24, 8, 3)
    with pytest.raises(RuntimeError, match="another norm than this layer: convert the model with norm: batch"):
        new.load_state_dict(old.state_dict(), strict=False)

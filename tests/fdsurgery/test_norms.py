"""Norms folded into dynamic layers: outputs stay with any modulation, and what cannot be folded is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from models import CASES, small_hf_resnet
from test_inference import logits_of, stir
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn

import fdsurgery
from fdconv import FDConfig, FDConv2d, FDLinear
from fdsurgery import UnsupportedModelError
from fdsurgery.rewrite.folded import Folded, folded_norms

CONFIG = FDConfig(kernel_num=4)


def modulated(model: nn.Module, x: Tensor) -> nn.Module:
    """The model settled and converted, with modulation far from neutral, in float64."""
    fdsurgery.testing.settle_(model, x)
    return stir(fdsurgery.convert(model, example_inputs=x)).double().eval()


def error(found: Any, expected: Any) -> float:
    found, expected = logits_of(found), logits_of(expected)
    return float((found - expected).norm() / expected.norm())


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet": (lambda: timm.create_model("test_resnet"), 64, 8),
    "efficientnet, norms with drop and activation": (lambda: timm.create_model("test_efficientnet"), 64, 10),
    "levit, linear layers": (lambda: timm.create_model("levit_128s"), 224, 22),
    "torchvision": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=7), 64, 20),
    "transformers": (small_hf_resnet, 64, 6),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay(name: str) -> None:
    build, size, least = MODELS[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    model, x = modulated(build(), x), x.double()
    expected = logits_of(model(x))
    neutral = logits_of(fdsurgery.restore(copy.deepcopy(model))(x))
    assert error(neutral, expected) > 1e-3, "a neutral modulation proves nothing"
    assert fdsurgery.fuse_norms(model) is model
    assert len(folded_norms(model)) >= least
    assert error(model(x), expected) < 1e-10
    again = len(folded_norms(model))
    fdsurgery.fuse_norms(model)
    assert len(folded_norms(model)) == again
    assert error(model(x), expected) < 1e-10
    # With the neutral weight, too, the folded norm is there.
    assert error(fdsurgery.restore(model)(x), neutral) < 1e-10


class Pair(nn.Module):
    """A convolution and a norm, and whatever a test makes of the two."""

    def __init__(self, norm: nn.Module | None = None, run: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = FDConv2d(8, 8, 3, padding=1, bias=False, config=CONFIG)
        self.linear = FDLinear(8, 8, config=CONFIG)
        self.norm = nn.BatchNorm2d(8) if norm is None else norm
        self.other = nn.BatchNorm2d(8)
        self.run = run or (lambda self, x: self.norm(self.conv(x)))
        stir(self)
        with torch.no_grad():
            for module in self.modules():
                for key in ("running_mean", "running_var", "weight", "bias"):
                    value = getattr(module, key, None)
                    if "Norm" in type(module).__name__ and isinstance(value, Tensor):
                        value.uniform_(0.5, 2)
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, self.first(x))


class OwnFrozen(nn.Module):
    """As detection transformers have it, with an epsilon that is written in the code."""

    def __init__(self, epsilon: float, channels: int = 8) -> None:
        super().__init__()
        self.epsilon = epsilon
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.epsilon).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(8, eps=1e-2),
    "without affine": lambda: nn.BatchNorm2d(8, affine=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(8),
    "torchvision's frozen norm": lambda: torchvision.ops.FrozenBatchNorm2d(8, eps=1e-3),
    "timm's": lambda: BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout),
    "timm's, learned activation": lambda: BatchNormAct2d(8, act_layer=nn.PReLU),
    "timm's frozen norm": lambda: freeze_batch_norm_2d(nn.Sequential(BatchNormAct2d(8)))[0],
    "own frozen norm": lambda: OwnFrozen(1e-5),
    "InstanceNorm2d with running statistics": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_every_kind(name: str) -> None:
    model, x = Pair(NORMS[name]()), torch.randn(2, 3, 7, 5, dtype=torch.float64)
    expected = model(x)
    state = dict(model.state_dict())
    fdsurgery.fuse_norms(model, example_inputs=x)
    assert folded_norms(model) == ["norm"]
    torch.testing.assert_close(model(x), expected)
    assert {key for key in state if "norm.act" in key} == {key for key in model.state_dict() if key.startswith("norm.")}


FOLDED: dict[str, Callable[[Any, Tensor], Any]] = {
    "twice in the same pair": lambda self, x: self.norm(self.conv(self.norm(self.conv(x)))),
    "rows": lambda self, x: self.rows(self.linear(x.flatten(2).mT).flatten(0, 1)),
    "rows, and back": lambda self, x: (lambda y: self.rows(y.flatten(0, 1)).reshape_as(y))(
        self.linear(x.flatten(2).mT)
    ),
    "two vectors": lambda self, x: self.rows(self.linear(x.mean((2, 3)))),
}
LEFT_ALONE: dict[str, Callable[[Any, Tensor], Any]] = {
    "another reader": lambda self, x: (lambda y: self.norm(y) + y)(self.conv(x)),
    "the result too": lambda self, x: (lambda y: (self.norm(y), y))(self.conv(x)),
    "a norm for each call": lambda self, x: self.other(self.conv(self.norm(self.conv(x)))),
    "a norm of two layers": lambda self, x: self.norm(self.conv(self.norm(self.first(x[:, :3])))),
    "something in between": lambda self, x: self.norm(self.conv(x).relu()),
    "moved axes": lambda self, x: self.norm(self.conv(x[..., :8, :8]).transpose(1, 3)),
    "positions for channels": lambda self, x: self.rows(self.linear(x.flatten(2).mT[:, :8])),
    "part of it": lambda self, x: self.norm(self.conv(x))[:, :4] + self.conv(x)[:, 4:],
    "before the layer": lambda self, x: self.conv(self.norm(x)),
}


def pair(run: Callable[[Any, Tensor], Any]) -> Pair:
    model = Pair(run=run)
    model.rows = nn.BatchNorm1d(8).double().eval()
    with torch.no_grad():
        for value in model.rows.buffers():
            if value.is_floating_point():
                value.uniform_(0.5, 2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", FOLDED)
def test_other_forms_that_are_folded(name: str) -> None:
    model, x = pair(FOLDED[name]), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected = model(x)
    fdsurgery.fuse_norms(model, example_inputs=x)
    assert len(folded_norms(model)) == 1
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_not_a_layer_and_its_norm_is_left_alone(name: str) -> None:
    model, x = pair(LEFT_ALONE[name]), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    fdsurgery.fuse_norms(model, example_inputs=x)
    assert folded_norms(model) == []
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


class Doubling(nn.BatchNorm2d):
    """Has the statistics of a batch norm, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


@torch.no_grad()
@pytest.mark.parametrize(
    "norm", [lambda: Doubling(8), lambda: OwnFrozen(1e-3), lambda: nn.BatchNorm2d(8, track_running_stats=False)]
)
def test_norms_that_compute_something_else_are_left_alone(norm: Callable[[], nn.Module]) -> None:
    model, x = Pair(norm()), torch.randn(2, 3, 7, 5, dtype=torch.float64)
    expected = model(x)
    fdsurgery.fuse_norms(model, example_inputs=x)
    assert folded_norms(model) == []
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("watched", ["conv", "norm"])
def test_what_a_hook_reads_stays(watched: str) -> None:
    model, x = Pair(), torch.randn(2, 3, 7, 5, dtype=torch.float64)
    seen: list[Tensor] = []
    getattr(model, watched).register_forward_hook(lambda *given: seen.append(given[2]))
    model(x)
    fdsurgery.fuse_norms(model, example_inputs=x)
    model(x)
    torch.testing.assert_close(*seen, rtol=0, atol=0)


def test_refusals_change_nothing() -> None:
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    overflowing = nn.Sequential(Pair(), nn.Conv2d(8, 3, 1).double().eval(), Pair()).eval()
    overflowing[2].norm.weight.data.fill_(1e300)
    overflowing[2].conv.scale_filters(torch.full((8,), 1e300, dtype=torch.float64))
    partly = Pair()
    partly.norm.train()
    for model, message in (
        (Pair().train(), r"this model is in training mode.*call model.eval\(\) first"),
        (partly, r"'norm' or the layer before it is in training mode.*call model.eval\(\) first"),
        (overflowing, r"a scale of \S+ is not finite"),  # found when the first pair has been folded already
        (Pair().to("meta"), r"'conv' is on the meta device and has no values"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), r"has no dynamic layers: convert it first"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            fdsurgery.fuse_norms(model, example_inputs=x)
        assert list(model.state_dict()) == list(before) and not folded_norms(model)
        assert all(value.is_meta or torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_prepared_model_is_folded_already() -> None:
    x = torch.randn(2, 3, 32, 32)
    model = fdsurgery.testing.settle_(timm.create_model("test_resnet"), x)
    model, x = stir(fdsurgery.convert(model)).double(), x.double()
    expected = model(x).detach()
    fast = fdsurgery.compile_for_inference(model)
    assert len(folded_norms(fast)) >= 8 and not folded_norms(model)
    assert error(fast(x), expected) < 1e-10
    assert torch.equal(model(x), expected)
    with pytest.raises(UnsupportedModelError, match=r"prepared for inference already, and its norms are folded"):
        fdsurgery.fuse_norms(fast, example_inputs=x)


@torch.no_grad()
def test_a_folded_model_is_saved_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = fdsurgery.testing.settle_(timm.create_model("test_resnet"), x)
    stir(fdsurgery.convert(model))
    expected = fdsurgery.fuse_norms(model)(x)
    fdsurgery.save(model, tmp_path / "timm")
    loaded = fdsurgery.load(tmp_path / "timm")
    assert folded_norms(loaded) == folded_norms(model)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_folded_transformers_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = CASES["hf resnet"].settled()
    stir(fdsurgery.convert(model))
    expected = fdsurgery.fuse_norms(model)(x).logits
    for folder, save in (("ours", fdsurgery.save_pretrained), ("theirs", lambda model, to: model.save_pretrained(to))):
        save(model, tmp_path / folder)
        loaded = fdsurgery.from_pretrained(tmp_path / folder)
        assert folded_norms(loaded) == folded_norms(model)
        torch.testing.assert_close(loaded(x).logits, expected, rtol=0, atol=0)
        for module in loaded.modules():
            if isinstance(module, Folded):
                assert torch.equal(module.running_var, torch.ones_like(module.running_var))
    base = type(model.base_model).from_pretrained(tmp_path / "ours")
    assert len(folded_norms(base)) == len(folded_norms(model))
    torch.testing.assert_close(base(x).last_hidden_state, model.base_model(x).last_hidden_state, rtol=0, atol=0)


@torch.no_grad()
def test_whoever_folds_norms_afterwards_folds_nothing_twice() -> None:
    layer, norm = FDConv2d(4, 8, 3, config=CONFIG).eval(), nn.BatchNorm2d(8).eval()
    norm.running_var.uniform_(1, 2)
    folded = Folded(norm)
    weight = layer.weight.clone()
    fused, bias = nn.utils.fusion.fuse_conv_bn_weights(
        weight, layer.bias, folded.running_mean, folded.running_var, folded.eps, folded.weight, folded.bias
    )
    assert torch.equal(fused, weight) and torch.equal(bias, layer.bias)


@pytest.mark.parametrize("converted", [True, False])
def test_the_state_of_a_model_that_was_not_folded_is_refused(converted: bool) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval()
    x = torch.randn(1, 3, 8, 8)
    model = fdsurgery.convert(copy.deepcopy(plain), "generic", example_inputs=x)
    state = (model if converted else plain).state_dict()
    fdsurgery.fuse_norms(model, example_inputs=x)
    model.load_state_dict(model.state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="'2' was a norm, which was folded into the layer before it"):
            model.load_state_dict(state, strict=strict)

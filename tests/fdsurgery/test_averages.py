"""Averages of models keep the frequency groups, whoever makes them: whole numbers, which an average rounds down."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm.utils
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from fdconv import FDConfig, FDConv2d, FDLinear
from fdconv.spectrum import frequency_groups, mended_groups


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = FDConfig(kernel_num=16, norm="rms")
    model = nn.Sequential(
        FDConv2d(3, 6, 3, config=config),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        FDLinear(6, 9, config=config),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def with_groups_of(model: nn.Module, other: nn.Module) -> nn.Module:
    """A model of the same parameters, never averaged."""
    fresh = network(9)
    fresh.load_state_dict({**model.state_dict(), **dict(other.named_buffers())})
    return fresh


AVERAGES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "timm's ModelEma": (lambda model: timm.utils.ModelEma(model, 0.9), "update"),
    "timm's ModelEmaV2": (lambda model: timm.utils.ModelEmaV2(model, 0.9), "update"),
    "timm's ModelEmaV3": (lambda model: timm.utils.ModelEmaV3(model, 0.9), "update"),
    "averages": (lambda model: AveragedModel(model, use_buffers=True), "update_parameters"),
    "moving averages": (
        lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
        "update_parameters",
    ),
    "moving averages, many at a time": (
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
        "update_parameters",
    ),
}


@pytest.mark.parametrize("first", ["call", "state_dict"])
@pytest.mark.parametrize("name", AVERAGES)
def test_moving_averages(name: str, first: str) -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    make, update = AVERAGES[name]
    average = make(model)
    for seed in range(5):
        model.load_state_dict(network(seed).state_dict())
        getattr(average, update)(model)
    inner = average.ema if hasattr(average, "ema") else average.module
    y = inner(x) if first == "call" else None
    state = inner.state_dict()
    for key, value in model.named_buffers():
        assert torch.equal(state[key], value) or key.endswith("spectrum_scale"), key
    torch.testing.assert_close(inner(x) if y is None else y, with_groups_of(inner, model)(x))


def test_averaged_state_dicts() -> None:
    one, two, x = network(0), network(1), torch.randn(2, 3, 9, 9)
    with torch.no_grad():  # an order of their own, as official layers have
        for model in (one, two):
            for layer in (model[0], model[4]):
                layer.frequency_group.copy_(layer.frequency_group.flip(0, 1))
    states = one.state_dict(), two.state_dict()
    average = {key: 0.3 * value + 0.7 * states[1][key] for key, value in states[0].items()}
    loaded = network(2)
    loaded.load_state_dict(average)
    torch.testing.assert_close(loaded(x), with_groups_of(loaded, one)(x))
    for (key, value), expected in zip(loaded.named_buffers(), one.buffers(), strict=True):
        assert value.dtype == expected.dtype and torch.equal(value, expected), key


def test_groups_that_cannot_be_mended_are_told() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    model[0].frequency_group.zero_()
    model.state_dict()  # as those take that are about to be filled
    with pytest.raises(RuntimeError, match=r"frequency_group of FDConv2d\(6, 3, 3, 3\) does not hold the groups"):
        model(x)
    model.load_state_dict(network(1).state_dict())
    model(x)


@pytest.mark.parametrize(("d1", "d2", "kernel_num"), [(18, 9, 16), (4, 4, 64), (5, 7, 1), (40, 33, 300)])
def test_what_is_whole_and_what_is_not(d1: int, d2: int, kernel_num: int) -> None:
    groups = frequency_groups(d1, d2, kernel_num)
    assert mended_groups(groups, d1, d2, kernel_num) is groups
    turned = groups.flip(0, 1)
    assert mended_groups(turned, d1, d2, kernel_num) is turned
    if kernel_num == 1:
        return

    def rounded_down(held: Tensor) -> Tensor:
        return (held * 0.9 + held * 0.1 - 1e-3).clamp(min=0).to(groups.dtype)

    mended = mended_groups(rounded_down(groups), d1, d2, kernel_num)
    assert mended is not None and torch.equal(mended, groups) and mended.dtype == groups.dtype
    assert mended_groups(rounded_down(turned), d1, d2, kernel_num) is None
    assert mended_groups(torch.full_like(groups, 77), d1, d2, kernel_num) is None


def test_copies_are_looked_at_once_more() -> None:
    model, x = network(), torch.randn(2, 3, 9, 9)
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(copied(x), y)
        copied[4].frequency_group.fill_(3)
        with pytest.raises(RuntimeError, match="frequency_group of FDLinear"):
            copied(x)

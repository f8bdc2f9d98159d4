"""ODConv: against the authors' numbers, a reference written another way, and the plain layer that it starts as."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import (
    GOLDEN,
    conv,
    convolved_alone,
    error,
    golden_errors,
    made,
    perturbed,
    random,
    read,
    spread_after_training,
)
from torch import Tensor, nn

import fdsurgery
from fdconv.weight_reads import NeutralWeightWarning
from fdsurgery.operators import get_operator, operators
from fdsurgery.operators.odconv import ODConv2d

FILES = sorted(GOLDEN.glob("odconv*.safetensors"))
OPERATOR: Any = get_operator("odconv")


def reference(layer: Any, x: Tensor) -> Tensor:
    """The formulas of the paper for one sample after another, filter by filter, in float64; in evaluation mode."""
    state = {name: tensor.detach().double() for name, tensor in layer.state_dict().items()}
    temperature, results = state["temperature"], []

    def logits(head: str, hidden: Tensor) -> Tensor | None:
        weight = state.get(f"attention.{head}.weight")
        return None if weight is None else (weight[:, :, 0, 0] @ hidden + state[f"attention.{head}.bias"]) / temperature

    for sample in x.double():
        hidden = state["attention.fc.weight"][:, :, 0, 0] @ torch.stack([channel.mean() for channel in sample])
        if "attention.bn.weight" in state:
            hidden = (hidden - state["attention.bn.running_mean"]) / (state["attention.bn.running_var"] + 1e-5).sqrt()
            hidden = hidden * state["attention.bn.weight"] + state["attention.bn.bias"]
        else:
            hidden = hidden / (hidden.square().mean() + 1e-6).sqrt() * state["attention.norm.weight"]
        hidden = hidden.clamp(min=0)
        channel, filter_, spatial, kernel = (
            logits(f"{one}_fc", hidden) for one in ("channel", "filter", "spatial", "kernel")
        )
        assert channel is not None
        shares = torch.ones(1).double() if kernel is None else kernel.exp() / kernel.exp().sum()
        weight = sum(share * one for share, one in zip(shares, state["od_kernels"], strict=True))
        assert isinstance(weight, Tensor)
        filters, seen = weight.shape[:2]
        for row in range(filters):
            first = row // (filters // layer.groups) * seen
            weight[row] *= (1 + torch.tanh(channel[first : first + seen] / 2))[:, None, None]  # 2*sigmoid(z)
            if filter_ is not None:
                weight[row] *= 1 + torch.tanh(filter_[row] / 2)
            if spatial is not None:
                weight[row] *= (1 + torch.tanh(spatial / 2)).view(weight.shape[2:])
        results.append(convolved_alone(layer, sample, weight, state.get("bias")))
    return torch.stack(results)


CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "3x3": ((8, 6, 3), {"padding": 1}, {}),
    "one kernel": ((8, 6, 3), {"padding": 1, "stride": 2, "bias": False}, {"kernels": 1}),
    "1x1": ((8, 6, 1), {"stride": 2}, {"kernels": 2}),
    "1x1, one kernel": ((8, 6, 1), {}, {"kernels": 1}),
    "in groups": ((8, 12, 3), {"groups": 4, "padding": 2, "dilation": 2}, {}),
    "depthwise": ((6, 6, 3), {"groups": 6, "padding": 1}, {"kernels": 2}),
    "depthwise 1x1": ((6, 6, 1), {"groups": 6}, {"kernels": 1}),
    "several filters a channel": ((6, 12, 3), {"groups": 6, "padding": 1}, {"kernels": 1}),
    "not square": ((8, 6, (1, 5)), {"padding": (0, 2), "padding_mode": "reflect"}, {}),
    "rms": ((8, 6, 3), {"padding": "same"}, {"norm": "rms", "reduction": 0.5, "min_channels": 2}),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_authors_numbers(file: Path) -> None:
    of_output, of_gradient = golden_errors("odconv", file)
    assert of_output < 1e-6 and of_gradient < 1e-6
    config, state, _ = read(file)
    layer = OPERATOR.load_official(state, config)
    back = OPERATOR.official_state(layer)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    for name in ("kernel_num", "reduction", "min_channel", "temperature"):
        del config[name]
    layer = OPERATOR.load_official(state, config)
    assert layer.settings["kernels"] == len(state["weight"]) and layer.temperature.item() == 1


@pytest.mark.parametrize("size", [(3, 4), (13, 12)], ids=["small maps", "large maps"])
@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_paper_says(case: str, size: tuple[int, int]) -> None:
    shape, geometry, settings = CASES[case]
    plain, x = conv(*shape, **geometry).eval(), random(3, shape[0], *size)
    layer = made("odconv", plain, **settings)
    for temperature in (30, 2):
        layer.temperature.fill_(temperature)
        assert error(layer(x), plain(x)) < 3e-7
    expected = reference(perturbed(layer), x)
    assert error(plain(x), expected) > 0.1
    assert error(layer(x), expected) < 1e-6
    with torch.no_grad():
        assert error(layer(x), expected) < 1e-6
        assert error(layer(x[1]), expected[1]) < 1e-6
        assert error(copy.deepcopy(layer).double()(x.double()), expected) < 1e-14
        low, x16 = copy.deepcopy(layer).bfloat16(), x.bfloat16()
        assert error(low(x16), reference(low, x16)) < 1e-2
        with torch.autocast("cpu", torch.bfloat16):
            assert error(layer(x), expected) < 1e-2


@pytest.mark.parametrize("size", [2, 12])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("kernels", [1, 4])
def test_gates_on_maps_are_the_same_function(
    kernels: int, kernel: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = perturbed(made("odconv", conv(6, 10, kernel, padding=kernel // 2).double(), kernels=kernels))
    x, found = random(3, 6, size, size).double(), []
    for moves in (True, False):
        if not moves:
            monkeypatch.setattr(ODConv2d, "_may_move", lambda *_: False)
        own, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        own(leaf).square().sum().backward()
        found.append([leaf.grad, *(parameter.grad for parameter in own.parameters())])
    assert all(error(one, other) < 1e-12 for one, other in zip(*found, strict=True))


def test_a_linear_layer_is_a_1x1_convolution() -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(8, 6).eval(), random(3, 5, 8)
    for kernels in (1, 4):
        layer = made("odconv", plain, kernels=kernels)
        assert error(layer(x), plain(x)) < 3e-7
        perturbed(layer).temperature.fill_(2)
        twin = made("odconv", conv(8, 6, 1).eval(), kernels=kernels)
        twin.load_state_dict(layer.state_dict())
        expected = reference(twin, x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        assert error(layer(x), expected) < 1e-6
        assert error(layer(x.expand(8, 3, 5, 8).transpose(0, 1)), expected[:, None].expand(3, 8, 5, 6)) < 1e-6
        assert error(layer(x[:, 0]), plain(x[:, 0])) > 0.1 and layer(x[0, 0]).shape == (6,)


def test_one_sample_trains_and_none_is_taken() -> None:
    layer = made("odconv", conv(8, 6, 3))
    assert layer.training
    layer(random(1, 8, 5, 5)).sum().backward()
    assert layer.attention.kernel_fc.weight.grad is not None
    assert not layer.attention.bn.running_mean.any() and layer.attention.bn.num_batches_tracked == 0
    layer(random(2, 8, 5, 5))
    assert layer.attention.bn.running_mean.any()
    layer(random(0, 8, 5, 5)).sum().backward()
    assert layer(random(0, 8, 5, 5)).shape == (0, 6, 3, 3)


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_are_those_of_the_function(size: int) -> None:
    layer = perturbed(made("odconv", conv(3, 2, 2).double(), kernels=2, min_channels=3)).eval()
    x = random(2, 3, size, size).double().requires_grad_()
    leaves = (x, *layer.parameters())
    assert torch.autograd.gradcheck(lambda *_: layer(x), leaves)
    assert torch.autograd.gradgradcheck(lambda *_: layer(x).square(), (x, layer.attention.filter_fc.weight))


def test_kernels_move_apart_only_where_their_attention_differs() -> None:
    layer = made("odconv", conv(4, 4, 3, padding=1))
    dead = copy.deepcopy(layer)
    nn.init.zeros_(dead.attention.kernel_fc.weight)
    assert spread_after_training(layer, "od_kernels") > 0.05
    assert spread_after_training(dead, "od_kernels") < 1e-6


def test_it_gives_its_plain_layer_back() -> None:
    plain = conv(8, 6, 3)
    layer = made("odconv", plain)
    assert layer.is_neutral() and torch.equal(OPERATOR.restore(layer).weight, plain.weight)
    with torch.no_grad():
        layer.attention.spatial_fc.bias[0] = 1
    assert not layer.is_neutral()
    target = random(6, 8, 3, 3)
    perturbed(layer).set_weight(target)
    assert error(OPERATOR.restore(layer).weight, target) < 1e-6
    layer.eval()
    x, bias = random(2, 8, 5, 5), layer.bias.view(-1, 1, 1)
    before = layer(x) - bias
    with warnings.catch_warnings():  # of reading a weight that leaves the gates out, which is what is meant
        warnings.simplefilter("ignore", NeutralWeightWarning)
        layer.weight = 2 * layer.weight.detach()
    assert error(layer(x) - bias, 2 * before) < 1e-6


def test_its_temperature_has_a_schedule() -> None:
    layer = made("odconv", conv(8, 6, 3)).bfloat16()
    assert layer.temperature.shape == (1,) and layer.temperature.item() == 1 and "temperature" in layer.state_dict()
    for progress, temperature in ((0, 30), (0.5, 15.5), (1, 1), (3, 1)):
        assert OPERATOR.schedule(layer, progress) and layer.temperature.item() == temperature


def test_settings_have_limits_and_are_read_from_tensors() -> None:
    for settings, said in (
        ({"kernels": 0}, "odconv: kernels: .*greater than or equal to 1"),
        ({"kernels": 1.0}, "odconv: kernels: .*integer"),
        ({"reduction": 0}, "odconv: reduction: .*greater than 0"),
        ({"min_channels": 0}, "odconv: min_channels: "),
        ({"norm": "layer"}, "odconv: norm: .*'batch' or 'rms'"),
        ({"kernel": 4}, "'kernel' is no setting of odconv; known: kernels.*did you mean 'kernels'"),
    ):
        with pytest.raises(fdsurgery.RecipeError, match=said):
            OPERATOR.settings(settings)
    plain = conv(64, 6, 3)
    for settings in ({}, {"kernels": 1}, {"norm": "rms", "reduction": 0.5}, {"min_channels": 70}, {"min_channels": 5}):
        layer = made("odconv", plain, **settings)
        told = OPERATOR.settings(OPERATOR.settings_of_tensors(plain, layer.state_dict(), official=False))
        again = OPERATOR.make(plain, told)
        assert {name: one.shape for name, one in again.state_dict().items()} == {
            name: one.shape for name, one in layer.state_dict().items()
        }
    leaves = [operator.leaf for operator in operators().values()]
    assert leaves.count("od_kernels") == 1


def test_faulty_files_of_the_authors_end_in_one_message() -> None:
    config, state, _ = read(FILES[-1])
    for faulty, said in (
        ({**config, "kernal_num": 4}, "did you mean 'kernel_num'"),
        ({**config, "kernel_size": 1}, "the state does not fit the layer"),
        ({**config, "kernel_num": 3}, "the state does not fit the layer"),
        ({key: config[key] for key in config if key != "in_planes"}, "does not say in_channels"),
    ):
        with pytest.raises(fdsurgery.CheckpointError, match=said):
            OPERATOR.load_official(state, faulty)
    for layer, said in (
        (made("odconv", conv(8, 6, 3)), "has no bias"),
        (made("odconv", conv(8, 6, 3, bias=False), norm="rms"), "has no RMSNorm"),
    ):
        with pytest.raises(fdsurgery.CheckpointError, match=said):
            OPERATOR.official_state(layer)


def test_costs() -> None:
    layer = made("odconv", conv(32, 48, 3, padding=1, stride=2))
    width, weights = 16, 48 * 32 * 9
    heads = width * (32 + 32 + 48 + 9 + 4)
    assert OPERATOR.multiply_adds(layer, (32, 200, 200)) == {
        "heads": heads,
        "mixing": 4 * weights,
        "gates": 32 * 9 + 2 * weights,
    }
    small = OPERATOR.multiply_adds(layer, (32, 14, 14))
    assert small["gates"] == 32 * 14 * 14 + weights + 48 * 7 * 7
    added = sum(one.numel() for one in layer.parameters()) - weights - 48
    assert added == 3 * weights + width * 32 + 2 * width + (width + 1) * (32 + 48 + 9 + 4)
    one = made("odconv", conv(32, 32, 1, bias=False), kernels=1)
    assert OPERATOR.multiply_adds(one, (32, 5, 5)) == {"heads": width * 96, "gates": 2 * 32 * 25}
    depthwise = made("odconv", conv(32, 32, 1, groups=32, bias=False), kernels=1)
    assert OPERATOR.multiply_adds(depthwise, (32, 5, 5)) == {"heads": width * 64, "gates": 32}

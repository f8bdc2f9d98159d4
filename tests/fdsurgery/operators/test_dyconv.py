"""DY-Conv: against the authors' numbers, a reference written another way, and the plain layer that it starts as."""

from __future__ import annotations

import copy
import math
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

FILES = sorted(GOLDEN.glob("dyconv*.safetensors"))
OPERATOR: Any = get_operator("dyconv")


def reference(layer: Any, x: Tensor) -> Tensor:
    """Each sample convolved with every kernel, and the results mixed, in float64."""
    state = {name: tensor.detach().double() for name, tensor in layer.state_dict().items()}
    results = []
    for sample in x.double():
        hidden = [
            max(0.0, sum(float(w) * float(channel.mean()) for w, channel in zip(row.flatten(), sample, strict=True)))
            for row in state["attention.fc1.weight"]
        ]
        logits = [
            sum(float(w) * h for w, h in zip(row.flatten(), hidden, strict=True)) + float(bias)
            for row, bias in zip(state["attention.fc2.weight"], state["attention.fc2.bias"], strict=True)
        ]
        shares = [math.exp(logit / float(state["temperature"])) for logit in logits]
        result = torch.zeros(())
        for at, (share, kernel) in enumerate(zip(shares, state["kernels"], strict=True)):
            bias = None
            if "bias" in state:
                deltas = state["kernel_bias"]
                bias = state["bias"] + (deltas[at] if at < len(deltas) else -deltas.sum(0))
            result = result + share / sum(shares) * convolved_alone(layer, sample, kernel, bias)
        results.append(result)
    return torch.stack(results)


CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "3x3": ((8, 6, 3), {"padding": 1}, {}),
    "of an image": ((3, 6, 3), {"padding": 1, "stride": 2, "bias": False}, {"kernels": 3}),
    "1x1": ((8, 6, 1), {"stride": 2}, {"kernels": 2}),
    "in groups": ((8, 12, 3), {"groups": 4, "padding": 2, "dilation": 2}, {}),
    "depthwise": ((6, 6, 3), {"groups": 6, "padding": 1}, {"ratio": 1.0}),
    "not square": ((8, 6, (1, 5)), {"padding": (0, 2), "padding_mode": "reflect"}, {"ratio": 0.01}),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_authors_numbers(file: Path) -> None:
    of_output, of_gradient = golden_errors("dyconv", file)
    assert of_output < 1e-6 and of_gradient < 1e-6
    config, state, tensors = read(file)
    back = OPERATOR.official_state(OPERATOR.load_official(state, config))
    assert back.keys() == state.keys()
    # Biases are stored by their mean and what they differ by from it, which rounds.
    assert all(torch.equal(back[name], state[name]) for name in state if name != "bias")
    assert "bias" not in state or error(back["bias"], state["bias"]) < 1e-7
    again = OPERATOR.load_official(back, config)
    assert error(again(tensors["input"]), tensors["output"]) < 1e-6
    del config["K"], config["ratio"], config["temperature"]
    layer = OPERATOR.load_official(state, config)
    assert layer.settings == OPERATOR.settings({}) and layer.temperature.item() == 1


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_paper_says(case: str) -> None:
    shape, geometry, settings = CASES[case]
    plain, x = conv(*shape, **geometry).eval(), 3 * random(3, shape[0], 7, 8)
    layer = made("dyconv", plain, **settings)
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


def test_a_linear_layer_is_a_1x1_convolution() -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(8, 6).eval(), random(3, 5, 8)
    layer = made("dyconv", plain)
    assert error(layer(x), plain(x)) < 3e-7
    perturbed(layer)
    twin = made("dyconv", conv(8, 6, 1).eval())
    twin.load_state_dict(layer.state_dict())
    expected = reference(twin, x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
    assert error(layer(x), expected) < 1e-6
    assert error(layer(x.expand(8, 3, 5, 8).transpose(0, 1)), expected[:, None].expand(3, 8, 5, 6)) < 1e-6
    assert error(layer(x[:, 0]), plain(x[:, 0])) > 0.1 and layer(x[0, 0]).shape == (6,)


def test_one_sample_trains_and_none_is_taken() -> None:
    layer = made("dyconv", conv(8, 6, 3))
    layer(random(1, 8, 5, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    layer(random(0, 8, 5, 5)).sum().backward()
    assert layer(random(0, 8, 5, 5)).shape == (0, 6, 3, 3)


def test_gradients_are_those_of_the_function() -> None:
    layer = perturbed(made("dyconv", conv(3, 2, 2).double(), kernels=2))
    x = random(2, 3, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(lambda *_: layer(x).square(), (x, layer.attention.fc2.weight))


def test_kernels_move_apart_only_where_their_attention_differs() -> None:
    layer = made("dyconv", conv(4, 4, 3, padding=1))
    dead = copy.deepcopy(layer)
    nn.init.zeros_(dead.attention.fc2.weight)
    assert spread_after_training(layer, "kernels") > 0.05
    assert layer.kernel_bias.abs().max() > 0.01
    assert spread_after_training(dead, "kernels") < 1e-6


def test_it_gives_its_plain_layer_back() -> None:
    plain = conv(8, 6, 3)
    layer = made("dyconv", plain)
    assert layer.is_neutral() and torch.equal(OPERATOR.restore(layer).weight, plain.weight)
    nn.init.normal_(layer.attention.fc1.weight)
    assert layer.is_neutral(), "equal kernels are the same in any mixture"
    x, twice = random(2, 8, 5, 5), 2 * plain.weight.detach()
    target = random(6, 8, 3, 3)
    perturbed(layer).set_weight(target)
    assert not layer.is_neutral() and error(OPERATOR.restore(layer).weight, target) < 1e-6
    with warnings.catch_warnings():  # of reading a weight that leaves the mixture out, which is what is meant
        warnings.simplefilter("ignore", NeutralWeightWarning)
        with pytest.raises(ValueError, match="mixes its bias with its weight"):
            layer.weight = 2 * layer.weight.detach()
        layer = perturbed(made("dyconv", conv(8, 6, 3, bias=False)))
        before = layer(x)
        layer.weight = 2 * layer.weight.detach()
    assert error(layer(x), 2 * before) < 1e-6
    layer = made("dyconv", plain)
    layer.weight = twice
    assert error(layer(x) - plain.bias.view(-1, 1, 1), 2 * (plain(x) - plain.bias.view(-1, 1, 1))) < 1e-6


def test_its_temperature_has_a_schedule() -> None:
    layer = made("dyconv", conv(8, 6, 3)).bfloat16()
    assert layer.temperature.shape == (1,) and layer.temperature.item() == 1 and "temperature" in layer.state_dict()
    for progress, temperature in ((0, 30), (0.5, 15.5), (1, 1), (3, 1)):
        assert OPERATOR.schedule(layer, progress) and layer.temperature.item() == temperature


def test_biases_are_not_decayed() -> None:
    model = nn.Sequential(made("dyconv", conv(8, 6, 3)))
    groups = {group["name"]: group["params"] for group in fdsurgery.param_groups(model, 1.0, 0.1)}
    undecayed = [name for name, one in model.named_parameters() if any(one is other for other in groups["no decay"])]
    assert sorted(undecayed) == ["0.attention.fc2.bias", "0.bias", "0.kernel_bias"]


def test_settings_have_limits_and_are_read_from_tensors() -> None:
    for settings, said in (
        ({"kernels": 1}, "dyconv: kernels: .*greater than or equal to 2"),
        ({"kernels": "4"}, "dyconv: kernels: .*integer"),
        ({"ratio": 0}, "dyconv: ratio: .*greater than 0"),
        ({"ratio": 1.5}, "dyconv: ratio: .*less than or equal to 1"),
        ({"kernel": 4}, "'kernel' is no setting of dyconv; known: kernels.*did you mean 'kernels'"),
    ):
        with pytest.raises(fdsurgery.RecipeError, match=said):
            OPERATOR.settings(settings)
    for in_channels in (1, 3, 8):
        plain = conv(in_channels, 6, 3)
        for settings in ({}, {"kernels": 2}, {"ratio": 1.0}, {"ratio": 0.01}, {"ratio": 0.5}):
            layer = made("dyconv", plain, **settings)
            told = OPERATOR.settings(OPERATOR.settings_of_tensors(plain, layer.state_dict(), official=False))
            again = OPERATOR.make(plain, told)
            assert {name: one.shape for name, one in again.state_dict().items()} == {
                name: one.shape for name, one in layer.state_dict().items()
            }
    assert [operator.leaf for operator in operators().values()].count("kernels") == 1


def test_faulty_files_of_the_authors_end_in_one_message() -> None:
    config, state, _ = read(FILES[-1])
    for faulty, said in (
        ({**config, "temprature": 4}, "did you mean 'temperature'"),
        ({**config, "kernel_size": 1}, "the state does not fit the layer"),
        ({**config, "ratio": 1.0}, "the state does not fit the layer"),
        ({key: config[key] for key in config if key != "kernel_size"}, "does not say in_channels"),
    ):
        with pytest.raises(fdsurgery.CheckpointError, match=said):
            OPERATOR.load_official(state, faulty)


def test_costs() -> None:
    layer = made("dyconv", conv(32, 48, 3, padding=1, stride=2))
    weights, hidden = 48 * 32 * 9, 9
    assert OPERATOR.multiply_adds(layer, (32, 9, 9)) == {"heads": hidden * (32 + 4), "mixing": 4 * weights}
    added = sum(one.numel() for one in layer.parameters()) - weights - 48
    assert added == 3 * (weights + 48) + hidden * 32 + 4 * (hidden + 1)

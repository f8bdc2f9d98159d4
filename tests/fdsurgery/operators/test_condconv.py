"""CondConv: against timm's numbers, a reference written another way, and the plain layer that it starts as."""

from __future__ import annotations

import copy
import math
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
from fdsurgery.operators import get_operator

FILES = sorted(GOLDEN.glob("condconv*.safetensors"))
OPERATOR: Any = get_operator("condconv")


def reference(layer: Any, x: Tensor) -> Tensor:
    """Each sample convolved with every expert, and the results added up by sigmoids, in float64."""
    state = {name: tensor.detach().double() for name, tensor in layer.state_dict().items()}
    count = len(state["experts"])
    results = []
    for sample in x.double():
        means = [float(channel.mean()) for channel in sample]
        result = torch.zeros(())
        for at, kernel in enumerate(state["experts"]):
            logit = float(state["routing_fn.bias"][at])
            logit += sum(float(w) * mean for w, mean in zip(state["routing_fn.weight"][at], means, strict=True))
            share = 2 / count / (1 + math.exp(-logit))
            bias = None
            if "expert_bias" in state:
                deltas = state["expert_bias"]
                bias = state["bias"] + (deltas[at] if at < len(deltas) else -deltas.sum(0))
            result = result + share * convolved_alone(layer, sample, kernel, bias)
        results.append(result)
    return torch.stack(results)


CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "3x3": ((8, 6, 3), {"padding": 1}, {}),
    "of an image": ((3, 6, 3), {"padding": 1, "stride": 2, "bias": False}, {"experts": 3}),
    "1x1": ((8, 6, 1), {"stride": 2}, {"experts": 2}),
    "in groups": ((8, 12, 3), {"groups": 4, "padding": 2, "dilation": 2}, {}),
    "depthwise": ((6, 6, 3), {"groups": 6, "padding": 1}, {"experts": 5}),
    "not square": ((8, 6, (1, 5)), {"padding": (0, 2), "padding_mode": "reflect"}, {"experts": 4}),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_numbers_of_timm(file: Path) -> None:
    of_output, of_gradient = golden_errors("condconv", file)
    assert of_output < 1e-6 and of_gradient < 1e-6
    config, state, tensors = read(file)
    back = OPERATOR.official_state(OPERATOR.load_official(state, config))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state if name != "bias")
    assert "bias" not in state or error(back["bias"], state["bias"]) < 1e-7
    assert error(OPERATOR.load_official(back, config)(tensors["input"]), tensors["output"]) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_paper_says(case: str) -> None:
    shape, geometry, settings = CASES[case]
    plain, x = conv(*shape, **geometry).eval(), 3 * random(3, shape[0], 7, 8)
    layer = made("condconv", plain, **settings)
    assert error(layer(x), plain(x)) < 3e-7
    expected = reference(perturbed(layer), x)
    assert error(plain(x), expected) > 0.1
    assert error(layer(x), expected) < 1e-6
    assert error(copy.deepcopy(layer).double()(x.double()), expected) < 1e-14


def test_a_linear_layer_is_a_1x1_convolution() -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(8, 6).eval(), random(3, 5, 8)
    layer = perturbed(made("condconv", plain))
    twin = made("condconv", conv(8, 6, 1).eval())
    twin.load_state_dict(layer.state_dict())
    expected = reference(twin, x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
    assert error(layer(x), expected) < 1e-6


def test_the_parameters_are_as_many_as_the_formula_says() -> None:
    for shape, geometry, settings in CASES.values():
        plain = conv(*shape, **geometry)
        layer = made("condconv", plain, **settings)
        count, bias = layer.settings["experts"], plain.bias is not None
        expected = (count - 1) * (plain.weight.numel() + bias * plain.out_channels) + count * (plain.in_channels + 1)
        added = sum(one.numel() for one in layer.parameters()) - sum(one.numel() for one in plain.parameters())
        assert added == expected


def test_experts_move_apart_and_would_not_with_an_equal_routing() -> None:
    plain = conv(8, 8, 3, padding=1)
    layer = made("condconv", plain)
    assert spread_after_training(layer, "experts") > 0.05
    wrong = made("condconv", plain)
    with torch.no_grad():
        wrong.routing_fn.weight.zero_()
    assert wrong.is_neutral(), "that start is exact, and dead: all experts have the same gradient"
    assert spread_after_training(wrong, "experts") < 1e-6


def test_a_weight_that_is_multiplied_with_a_mixed_bias_is_refused() -> None:
    layer = perturbed(made("condconv", conv(8, 6, 3).eval()))
    with pytest.raises(ValueError, match="mixes its bias"), torch.no_grad():
        layer.weight.mul_(2)
    alone = perturbed(made("condconv", conv(8, 6, 3, bias=False).eval()))
    x = random(2, 8, 6, 6)
    expected = 2 * alone(x)
    with torch.no_grad():
        alone.weight.mul_(2)
    assert error(alone(x), expected) < 1e-6


def test_bad_input_is_told() -> None:
    for values, said in (
        ({"experts": 0}, "experts: Input should be greater than or equal to 1, not 0"),
        ({"experts": 2.5}, "experts: "),
        ({"expert": 2}, r"'expert' is no setting of condconv; known: experts; did you mean 'experts'\?"),
    ):
        with pytest.raises(fdsurgery.RecipeError, match=said):
            OPERATOR.settings(values)
    config, state, _ = read(FILES[0])
    with pytest.raises(fdsurgery.CheckpointError, match=r"'num_expert' is nothing.*did you mean 'num_experts'"):
        OPERATOR.load_official(state, {**config, "num_expert": 8})
    with pytest.raises(fdsurgery.CheckpointError, match="does not say in_channels"):
        OPERATOR.load_official(state, {"num_experts": 8})
    with pytest.raises(fdsurgery.CheckpointError, match="does not fit the layer"):
        OPERATOR.load_official(state | {"more": torch.ones(1)} | {"routing_fn.bias": torch.ones(3)}, config)

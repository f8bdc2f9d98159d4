"""KernelWarehouse's layers: against the authors' numbers, against loops, and at the start."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import fdsurgery
from fdconv.modulation import ContextBatchNorm
from fdsurgery.operators import get_operator
from fdsurgery.operators.kernel_warehouse_layers import KernelWarehouseConv2d, KernelWarehouseLinear

OPERATOR: Any = get_operator("kernel_warehouse")
GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "operators").glob("kw*.safetensors"))


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


def golden(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    with safe_open(str(file), "pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        config = json.loads(stored.metadata()["config"])
    return config, tensors, {key[6:]: value for key, value in tensors.items() if key.startswith("state.")}


def built(*plains: nn.Module, **settings: Any) -> list[Any]:
    """Layers of one warehouse."""
    names = [f"layer{at}" for at in range(len(plains))]
    complete = OPERATOR.settings({"warehouse": "one", **settings})
    made: list[Any] = OPERATOR.build(names, list(plains), [complete] * len(plains))
    return made


@torch.no_grad()
def perturbed(*layers: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        scales = layer.attention.official_scales()
        for name, parameter in layer.attention.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3 * scales.get(name, 1))
        norm = layer.attention.norm1
        if isinstance(norm, ContextBatchNorm):
            norm.running_mean.normal_(generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)


# The authors' numbers


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_the_authors_numbers(file: Path) -> None:
    config, tensors, state = golden(file)
    chain = OPERATOR.load_official(state, config)
    seen: dict[str, Tensor] = {}
    for entry in config["layers"]:
        layer = chain.get_submodule(entry["name"])
        layer.register_forward_hook(lambda _, __, y, name=entry["name"]: seen.update({name: y}))
    x = tensors["input"].requires_grad_()
    y = chain(x)
    y.square().sum().backward()
    assert distance(y, tensors["output"]) < 2e-6
    assert distance(x.grad, tensors["grad_input_of_sum_y2"]) < 3e-6
    assert all(distance(value, tensors[f"mid.{name}"]) < 2e-6 for name, value in seen.items())
    back = OPERATOR.official_state(chain)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    assert chain(x.double().float()).dtype == torch.float32 and not chain.training


def test_configurations_that_do_not_fit_are_told() -> None:
    config, _, state = golden(GOLDEN[0])

    def told(match: str, state: Any = state, **changed: Any) -> None:
        with pytest.raises(fdsurgery.CheckpointError, match=match):
            OPERATOR.load_official(state, {**config, **changed})

    def with_layer(at: int, **changed: Any) -> list[Any]:
        return [{**entry, **changed} if here == at else entry for here, entry in enumerate(config["layers"])]

    told("'reductoin' is nothing.*reduction", reductoin=1)
    told("'strides' is nothing.*stride", layers=with_layer(0, strides=2))
    told("start_cell is 4, and 3 follows", layers=with_layer(1, start_cell=4))
    told("assigned_cells is", layers=with_layer(2, assigned_cells=[1, 2, 3, 4]))
    told("layer_type|'conv3d'", layers=with_layer(0, layer_type="conv3d"))
    told("between_layers", between_layers="relu")
    told("'conv1.more' is not of its layers", state={**state, "conv1.more": torch.ones(1)})
    told("is missing", state={key: one for key, one in state.items() if key != "conv1.attention.fc2.bias"})
    told("differ in ratio: 2 for 'conv1', 1 for 'conv2'", layers=with_layer(0, cell_num_ratio=2))
    told("a whole number", layers=with_layer(0, cell_num_ratio=1.5))
    with pytest.raises(fdsurgery.CheckpointError, match="does not say layers"):
        OPERATOR.load_official(state, {key: one for key, one in config.items() if key != "layers"})


def test_what_follows_need_not_be_said_and_tau_ends_at_zero() -> None:
    config, tensors, state = golden(GOLDEN[0])
    follows = ("cell_shape", "start_cell", "num_local_mixture", "assigned_cells", "warehouse_name", "cell_num_ratio")
    bare = [{key: one for key, one in entry.items() if key not in follows} for entry in config["layers"]]
    left = {key: one for key, one in config.items() if key != "tau"}
    assert distance(OPERATOR.load_official(state, {**left, "layers": bare})(tensors["input"]), tensors["output"]) < 2e-6
    trained = OPERATOR.load_official(state, {**config, "mode": "train"})
    assert trained.conv2.training and distance(trained(tensors["input"]), tensors["output"]) > 1e-2


# Loops


def coefficients_by_loops(layer: Any, s: list[float], tau: float) -> list[list[float]]:
    """One sample's, number by number, in double precision."""
    attention = layer.attention
    n, m = layer.settings["cells"], layer.settings["places"]
    per_logit = next(2.0**power for power in range(20) if 4**power >= n + 1)
    per_hidden = per_logit * next(2.0**power for power in range(20) if 16 * 2**power >= len(attention.fc1.weight))
    fc1, fc2 = attention.fc1.weight.double().tolist(), (attention.fc2.weight.double() / per_hidden).tolist()
    norm = attention.norm1
    hidden = [sum(w * v for w, v in zip(row, s, strict=True)) for row in fc1]
    if isinstance(norm, ContextBatchNorm):
        means, variances = norm.running_mean.double().tolist(), norm.running_var.double().tolist()
    else:
        hidden = [h + b for h, b in zip(hidden, attention.fc1.bias.double().tolist(), strict=True)]
        mean = sum(hidden) / len(hidden)
        means = [mean] * len(hidden)
        variances = [sum((h - mean) ** 2 for h in hidden) / len(hidden)] * len(hidden)
    gains, shifts = norm.weight.double().tolist(), norm.bias.double().tolist()
    hidden = [
        max(0.0, (h - m) / math.sqrt(v + 1e-5) * g + b)
        for h, m, v, g, b in zip(hidden, means, variances, gains, shifts, strict=True)
    ]
    raw = [sum(w * h for w, h in zip(row, hidden, strict=True)) for row in fc2]
    bias = ((attention.fc2.bias if attention.fc3 is None else attention.basis_bias).double() / per_logit).tolist()
    if attention.fc3 is None:
        logits = [z + b for z, b in zip(raw, bias, strict=True)]
    else:
        own, basis, start = attention.own, attention.basis, layer.settings["start"]
        fc3 = attention.fc3.weight.double().tolist()
        logits = []
        for place in range(m):
            row = raw[place * (own + basis + 1) : (place + 1) * (own + basis + 1)]
            others = [sum(w * z for w, z in zip(one, row[own : own + basis], strict=True)) for one in fc3]
            spliced = others[:start] + row[:own] + others[start:] + row[-1:]
            logits += [z + b for z, b in zip(spliced, bias[place * (n + 1) :], strict=False)]
    found = []
    for place in range(m):
        row = logits[place * (n + 1) : (place + 1) * (n + 1)]
        total = sum(map(abs, row)) + 0.001
        home = int(layer.assigned_cells[place])
        found.append([(1 - tau) * z / total + tau * (cell == home) for cell, z in enumerate(row)][:-1])
    return found


def weight_by_loops(layer: Any, s: list[float], tau: float) -> Tensor:
    """One sample's weight, `(C_out, C_in/groups, k_h, k_w)`, float64."""
    mixture = coefficients_by_loops(layer, s, tau)
    cells = layer._stored().double()
    _, c_o, c_i, h, w = cells.shape
    shape = (*layer._static_shape(), 1, 1)[:4]
    weight = torch.zeros(shape, dtype=torch.float64)
    place = 0
    for y in range(0, shape[2], h):
        for x in range(0, shape[3], w):
            for o in range(0, shape[0], c_o):
                for i in range(0, shape[1], c_i):
                    mixed = sum(a * cell for a, cell in zip(mixture[place], cells, strict=True))
                    weight[o : o + c_o, i : i + c_i, y : y + h, x : x + w] = mixed
                    place += 1
    assert place == layer.settings["places"]
    return weight


CASES: dict[str, tuple[list[nn.Module], dict[str, Any]]] = {
    "1x1 and 3x3": ([nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3, stride=2, padding=1, bias=False)], {"min_channels": 4}),
    "4x, not square, dilated": ([nn.Conv2d(6, 9, (1, 3), dilation=2), nn.Conv2d(9, 3, (2, 1))], {"ratio": 4}),
    "grouped, padded by reflection": (
        [nn.Conv2d(8, 12, 3, groups=2, padding=1, padding_mode="reflect"), nn.Conv2d(12, 4, 1)],
        {"min_channels": 3, "reduction": 0.5},
    ),
    "whole kernels": ([nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)], {"spatial_partition": False, "ratio": 2}),
    "smaller cells": ([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)], {"cell_in_ratio": 0.5, "cell_out_ratio": 0.25}),
    "a basis": ([nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)], {"nonlocal_basis_ratio": 0.5, "ratio": 2}),
    "a wide attention": ([nn.Conv2d(40, 8, 1), nn.Conv2d(8, 4, 1)], {"reduction": 1.0, "ratio": 2}),
    "linear, layer norm": ([nn.Linear(8, 12), nn.Linear(12, 8, bias=False)], {"norm": "layer"}),
}


@pytest.mark.parametrize("tau", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_layers_are_what_loops_say(case: str, tau: float) -> None:
    torch.manual_seed(0)
    plains, settings = CASES[case]
    layers = built(*(copy.deepcopy(plain).double() for plain in plains), **settings)
    perturbed(*layers)
    for layer in layers:
        layer.eval().tau.fill_(tau)
        linear = isinstance(layer, nn.Linear)
        x = torch.randn((2, 5, layer.in_features) if linear else (2, layer.in_channels, 7, 6), dtype=torch.float64)
        means = x.mean(1) if linear else x.mean((2, 3))
        expected = []
        for sample, mean in zip(x, means.tolist(), strict=True):
            weight = weight_by_loops(layer, mean, tau)
            if linear:
                expected.append(F.linear(sample, weight[..., 0, 0], layer.bias))
                continue
            twin = layer.to_plain()
            twin.weight.data = weight
            expected.append(twin(sample))
        assert distance(layer(x), torch.stack(expected)) < 1e-12
        assert distance(layer(x[:1]), torch.stack(expected[:1])) < 1e-12


def test_the_order_of_places() -> None:
    """Position, output block, input block, the last fastest: told by a weight whose numbers say where they are."""
    conv = nn.Conv2d(4, 6, (1, 2), bias=False)
    index = torch.arange(6 * 4 * 2, dtype=torch.float64).view(6, 4, 1, 2)
    conv.double().weight.data = index
    (layer,) = built(conv, cell_in_ratio=0.5, cell_out_ratio=0.5)
    cells = layer.cells / 1.001
    assert layer.settings["cell_shape"] == [3, 2, 1, 1] and layer.settings["places"] == 8
    for place, (x, o, i) in enumerate((x, o, i) for x in range(2) for o in range(2) for i in range(2)):
        block = index[3 * o : 3 * o + 3, 2 * i : 2 * i + 2, :, x : x + 1]
        assert torch.allclose(cells[place], block, rtol=1e-15)


# The start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_the_start_is_the_plain_layer(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    plains, settings = CASES[case]
    plains = [copy.deepcopy(plain).to(dtype).train() for plain in plains]
    limit = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for plain, layer in zip(plains, built(*plains, **settings), strict=True):
        linear = isinstance(layer, nn.Linear)
        x = torch.randn((3, 4, layer.in_features) if linear else (3, layer.in_channels, 9, 8)).to(dtype)
        assert layer.is_neutral() and layer.training and layer(x).dtype == dtype
        assert distance(layer(x).double(), plain(x).double()) < limit
        assert distance(layer.weight.double(), plain.weight.double()) < limit
        assert distance(OPERATOR.restore(layer).weight.double(), plain.weight.double()) < limit
        layer.tau.fill_(1.0)
        assert distance(layer(x).double(), plain(x).double()) < limit + 1.1e-3, "off by 0.1 % in a schedule"
        assert not layer.is_neutral()


def test_it_is_alive_and_coefficients_of_other_cells_learn() -> None:
    torch.manual_seed(0)
    first, second = built(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), ratio=2)
    second(first(torch.randn(4, 8, 6, 6))).square().sum().backward()
    for layer in (first, second):
        gradient = layer.attention.fc2.weight.grad.view(layer.settings["places"], -1, 16)
        assert (gradient[:, :-1].abs().sum(-1) > 0).all(), "a coefficient without gradient"
    assert (first.cells.grad.flatten(1).abs().sum(1)[first.assigned_cells] > 0).all()
    assert first.cells.detach().flatten(1).abs().sum(1).min() > 0, "a spare cell is zero, and nobody would mix it"


def test_a_basis_is_alive_and_would_not_be_if_both_its_maps_were_zero() -> None:
    torch.manual_seed(0)

    def moved(dead: bool) -> float:
        layers = built(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nonlocal_basis_ratio=0.5)
        attention = layers[1].attention
        if dead:
            nn.init.zeros_(attention.fc3.weight)
        optimizer = torch.optim.SGD(layers[1].parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layers[1](torch.randn(4, 8, 5, 5)).square().mean().backward()
            optimizer.step()
        rows = attention.fc2.weight.view(layers[1].settings["places"], -1, 16)
        return float(rows[:, attention.own : -1].abs().sum())

    assert moved(dead=False) > 0 == moved(dead=True)


def losses(ratio: int, *, dead: bool = False) -> float:
    """After a hundred steps on two kinds of input that want two kernels; a static layer's loss is 1 by this measure."""
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    wanted = [torch.randn(8, 8, 3, 3) / 8 for _ in range(2)]
    layer = built(plain, ratio=ratio)[0] if ratio else copy.deepcopy(plain)
    if dead:
        with torch.no_grad():
            spare = torch.ones(len(layer.cells), dtype=torch.bool)
            spare[layer.assigned_cells] = False
            layer.cells[spare] = 0
            layer.attention.fc1.weight.zero_()
    optimizer = torch.optim.AdamW(layer.parameters(), 0.02)
    kinds = torch.tensor([[1.0], [-1.0]]) * torch.ones(8)
    for step in range(150):
        inputs = torch.randn(16, 8, 6, 6, generator=torch.Generator().manual_seed(step))
        kind = torch.arange(16) % 2
        x = inputs + kinds[kind, :, None, None]
        target = torch.stack([F.conv2d(one, wanted[int(k)], padding=1) for one, k in zip(x, kind, strict=True)])
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)


def test_mixtures_move_apart_in_training() -> None:
    static, once, four, dead = losses(0), losses(1), losses(4), losses(4, dead=True)
    assert once < 0.7 * static and four < 0.5 * static
    assert dead > 0.9 * static, "an attention that does not look at its input learns no more than a static layer"


def test_adam_leaves_the_assigned_cells_their_share() -> None:
    """Hundreds of logits that are zero move by a step each, and all are divided by their sum."""

    def share(scaled: bool) -> float:
        torch.manual_seed(0)
        layers = built(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(6)), ratio=4)
        if not scaled:  # as the authors store them
            for layer in layers:
                with torch.no_grad():
                    layer.attention.bias.div_(layer.attention.logit_scale)
                layer.attention.logit_scale = layer.attention.hidden_scale = 1.0
        net = nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        x = torch.randn(4, 16, 8, 8)
        for _ in range(5):
            optimizer.zero_grad()
            (net(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
        shares = []
        for layer in layers:
            mixture = layer.attention(x.mean((2, 3)), layer.assigned_cells, layer.tau)
            shares.append(mixture[:, torch.arange(9), layer.assigned_cells].min())
        return float(torch.stack(shares).min())

    assert share(scaled=True) > 0.6 and share(scaled=False) < 0.3


def test_gradients() -> None:
    torch.manual_seed(0)
    first, second = (
        layer.double().eval() for layer in built(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 3), ratio=1, min_channels=2)
    )
    perturbed(first, second)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def of(x: Tensor, cells: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(first, {"cells": cells}):
            return second(first(x))  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(of, (x, first.cells), fast_mode=True)


# Where layers cannot be made


def test_layers_must_agree_in_dtype_and_places() -> None:
    with pytest.raises(ValueError, match=r"differ in dtype: torch.float32 for 'layer0', torch.float64 for 'layer1'"):
        built(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1).double())
    with pytest.raises(ValueError, match="differ in device"):
        built(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, device="meta"))
    its = built(nn.Conv2d(8, 8, 1))[0].settings
    with pytest.raises(ValueError, match="which has another layer"):
        OPERATOR.build(["a", "b"], [nn.Conv2d(8, 8, 1)] * 2, [its, its])


def test_ratios_below_one_are_for_trained_layers_only() -> None:
    site: Any = fdsurgery.sites(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 2)), torch.randn(2, 3, 8, 8))[1]
    settings = OPERATOR.settings({"ratio": 0.5})
    assert "no exact start exists" in OPERATOR.refusal(site, settings)
    assert OPERATOR.refusal_of_trained(site, settings) is None
    config: dict[str, Any] = {"cell_num_ratio": 0.5, "tau": 0.2, "cell_inplane_ratio": 0.5, "mode": "eval"}
    entry = {"name": "c", "warehouse_id": 0, "in_planes": 8, "out_planes": 8, "kernel_size": 2, "padding": 1}
    torch.manual_seed(0)
    state = {
        "warehouse_manager.weights.0": torch.randn(4, 8, 4, 1, 1),
        "c.attention.fc1.weight": torch.randn(16, 8),
        "c.attention.fc2.weight": torch.randn(8 * 5, 16),
        "c.attention.fc2.bias": torch.randn(8 * 5),
        "c.attention.norm1.weight": torch.rand(16) + 0.5,
        "c.attention.norm1.bias": torch.randn(16),
        "c.attention.norm1.running_mean": torch.randn(16),
        "c.attention.norm1.running_var": torch.rand(16) + 0.5,
        "c.attention.norm1.num_batches_tracked": torch.tensor(3),
    }
    layer = OPERATOR.load_official(state, {**config, "layers": [entry]}).c
    assert layer.assigned_cells.tolist() == [0, 4, 4, 1, 2, 4, 4, 3]
    x = torch.randn(2, 8, 5, 5)
    weights = [weight_by_loops(layer, mean, 0.2) for mean in x.double().mean((2, 3)).tolist()]
    expected = [F.conv2d(one, weight.float(), padding=1) for one, weight in zip(x, weights, strict=True)]
    assert distance(layer(x), torch.stack(expected)) < 1e-5
    assert float(layer.to_plain().weight[:, 4:, 0, 0].abs().sum()) == 0, "an empty place of the static weight"
    with pytest.raises(ValueError, match="cannot hold one"):
        layer.set_weight(torch.zeros(8, 8, 2, 2))


def test_schedule() -> None:
    (layer,) = built(nn.Conv2d(8, 8, 1))
    told = []
    for progress in (0.0, 0.25, 1.0, 3.0):
        assert OPERATOR.schedule(layer, progress)
        told.append(float(layer.tau))
    assert told == [1.0, 0.75, 0.0, 0.0] and "tau" in layer.state_dict()


def test_reading_and_writing_the_static_weight() -> None:
    torch.manual_seed(0)
    first, second = built(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), ratio=2)
    kept, other = second.weight.detach().clone(), torch.randn(8, 8, 3, 3)
    with torch.no_grad():
        first.weight.copy_(other)
    assert distance(first.weight.detach(), other) < 1e-6 and torch.equal(second.weight.detach(), kept)
    nn.init.ones_(second.weight)
    assert distance(second.weight.detach(), torch.ones(8, 8, 1, 1)) < 1e-6
    perturbed(first)
    with pytest.raises(ValueError, match=r"as fdsurgery\.fuse_norms does"), torch.no_grad():
        first.weight.mul_(2.0)
    first.reset_parameters()
    assert first.is_neutral() and 0 < float(first.weight.detach().std()) < 0.5
    with pytest.raises(ValueError, match="weight must have the shape"):
        first.set_weight(other[:4])


def test_settings_by_shapes() -> None:
    for plains, settings in CASES.values():
        for layer in built(*plains, **settings):
            tensors = layer.state_dict()
            told = OPERATOR.settings(OPERATOR.settings_of_tensors(layer.to_plain(), tensors, False))
            its = layer.settings
            assert {key: told[key] for key in ("places", "cells", "norm")} == {
                key: its[key] for key in ("places", "cells", "norm")
            }
            width = max(int((told["reduction"]) * layer.attention.fc1.weight.shape[1]), told["min_channels"])
            assert width == layer.attention.width
            assert (told["nonlocal_basis_ratio"] < 1) == (its["nonlocal_basis_ratio"] < 1)
            assert told["cell_shape"] in (None, its["cell_shape"])


def test_classes() -> None:
    conv, linear = built(nn.Conv2d(8, 8, 1), nn.Linear(8, 8))
    assert isinstance(conv, KernelWarehouseConv2d) and isinstance(linear, KernelWarehouseLinear)
    assert linear.warehouse is conv.warehouse and linear._stored() is conv.cells

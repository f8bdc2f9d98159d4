"""DCD: the authors' numbers, a reference of loops, both ways of computing, and what torch's own layers can do."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import fdsurgery
from fdsurgery.operators import get_operator
from fdsurgery.operators.dcd_layers import DCDLayer, DCDLinear, dense, widths

GOLDEN = sorted((Path(__file__).parents[2] / "golden/operators").glob("dcd_*.safetensors"))
DCD: Any = get_operator("dcd")


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def perturbed(layer: DCDLayer, seed: int = 0) -> Any:
    """The layer with every parameter and statistic drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(drawn.square() + 0.5)
            elif name.endswith(("bn1.weight", "bn2.weight")):
                tensor.copy_(1 + 0.3 * drawn)
            elif tensor.is_floating_point() and name not in ("dcd_weight", "bias"):
                tensor.copy_(drawn / math.sqrt(max(1, tensor.flatten(1).shape[1] if tensor.dim() > 1 else 4)))
    return layer


def made(plain: nn.Module, **settings: Any) -> Any:
    return DCD.replace(plain, DCD.settings(settings))


def forced(layer: Any, folded: bool) -> Any:
    """The layer with one of its two ways; that of the weight exists in evaluation only."""
    layer = copy.deepcopy(layer)
    vars(layer)["_folds"] = lambda positions: folded
    return layer


# A reference: loops over samples and positions, float64


def hs(z: Tensor) -> Tensor:
    return (z + 3).clamp(0, 6) / 3


def norm(z: Tensor, state: dict[str, Tensor], name: str, train: bool) -> Tensor:
    """Of rows `(n, d)`."""
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    if train:
        mean = z.sum(0) / len(z)
        var = ((z - mean) ** 2).sum(0) / len(z)
    return (z - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def reference(layer: Any, x: Tensor, train: bool) -> Tensor:
    """`(B, C_out, H', W')`, or `(B, N, C_out)` of a linear layer for `(B, N, C_in)`."""
    state = {name: one.double() for name, one in layer.state_dict().items()}
    x, weight, bias = x.double(), state["dcd_weight"], state.get("bias", torch.zeros(1).double())
    if isinstance(layer, DCDLinear):
        q, p = state["cls_q.weight"], state["cls_p.weight"]
        contexts, reads = [one.mean(0) for one in x], [one @ q.T for one in x]
        static = [one @ weight.T + bias for one in x]
    else:
        q, p = state["q.weight"][:, :, 0, 0], state["p.weight"][:, :, 0, 0]
        contexts = [context(one, layer.pool) for one in x]
        (s_h, s_w), reads, static = layer.stride, [], []
        for one in x:
            reads.append(torch.stack([q @ one[:, i, j] for i in range(0, one.shape[1], s_h)
                                      for j in range(0, one.shape[2], s_w)]))  # fmt: skip
            static.append(loops(one, weight, layer).flatten(1).T)
    sizes = [len(one) for one in reads]
    z = norm(torch.cat(reads), state, "bn1", train).split(sizes)
    us = [state["fc.0.weight"] @ one for one in contexts]
    us = [u * hs(state["fc.1.fc.0.weight"] @ u) for u in us]
    d = len(q)
    mixed = [(state["fc_phi.weight"] @ u).view(d, d) @ one.T for u, one in zip(us, z, strict=True)]
    second = norm(torch.cat([one.T for one in mixed]), state, "bn2", train).split(sizes)
    results = []
    for u, one, other, conv in zip(us, z, second, static, strict=True):
        y = hs(state["fc_scale.weight"] @ u) * conv + (one + other) @ p.T
        results.append(y if isinstance(layer, DCDLinear) else y + bias)
    if isinstance(layer, DCDLinear):
        return torch.stack(results)
    h, w = (-(-n // s) for n, s in zip(x.shape[2:], layer.stride, strict=True))
    return torch.stack([y.T.reshape(-1, h, w) for y in results])


def context(one: Tensor, side: int) -> Tensor:
    """What `nn.AdaptiveAvgPool2d` is documented to give: window `floor(i*n/side)` to `ceil((i+1)*n/side)`."""
    _, h, w = one.shape
    values = []
    for channel in one:
        for i in range(side):
            for j in range(side):
                rows, columns = (slice(math.floor(at * n / side), math.ceil((at + 1) * n / side))
                                 for at, n in ((i, h), (j, w)))  # fmt: skip
                values.append(channel[rows, columns].mean())
    return torch.stack(values)


def loops(one: Tensor, weight: Tensor, conv: Any) -> Tensor:
    """A convolution, tap by tap."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    (k_h, k_w), (d_h, d_w), (s_h, s_w) = conv.kernel_size, conv.dilation, conv.stride
    top, left = d_h * (k_h - 1) // 2, d_w * (k_w - 1) // 2
    padded = F.pad(one[None], (left, left, top, top), mode=mode)[0]
    h, w = (-(-n // s) for n, s in zip(one.shape[1:], conv.stride, strict=True))
    parts = []
    for rows, kernels in zip(padded.chunk(conv.groups), weight.chunk(conv.groups), strict=True):
        part = torch.zeros(len(kernels), h, w, dtype=torch.float64)
        for u in range(k_h):
            for v in range(k_w):
                seen = rows[:, u * d_h :: s_h, v * d_w :: s_w][:, :h, :w]
                part = part + torch.einsum("oc,chw->ohw", kernels[:, :, u, v], seen)
        parts.append(part)
    return torch.cat(parts)


CONVS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1x1": ({"kernel_size": 1}, {}),
    "3x3 stride 2": ({"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}, {}),
    "dilated, other strides": ({"kernel_size": (3, 5), "stride": (2, 3), "padding": (2, 2), "dilation": (2, 1)}, {}),
    "1x3, reflected": ({"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "reflect"}, {"dim": 3}),
    "around": ({"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2}, {"variant": "basic"}),
    "grouped": ({"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2}, {"squeeze": 5}),
    "mobile": ({"kernel_size": 1, "stride": 2}, {"variant": "mobilenet"}),
}


def convs(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Conv2d, Any, Tensor]:
    torch.manual_seed(0)
    geometry, settings = CONVS[name]
    plain = nn.Conv2d(12, 16, **geometry, dtype=dtype)
    return plain, made(plain, **settings), torch.randn(3, 12, 9, 8, dtype=dtype)


@pytest.mark.parametrize("name", CONVS)
def test_it_computes_what_the_paper_says(name: str) -> None:
    _, layer, x = convs(name)
    perturbed(layer)
    expected = reference(layer, x, train=False)
    layer.eval()
    assert error(forced(layer, False)(x), expected) < 1e-12
    if layer.groups == 1:
        assert error(forced(layer, True)(x), expected) < 1e-12
    assert error(layer(x), expected) < 1e-12
    assert layer.is_neutral() is False
    copied = copy.deepcopy(layer).train()
    assert error(copied(x), reference(layer, x, train=True)) < 1e-12, "batch statistics"
    assert not torch.equal(copied.bn2.running_var, layer.bn2.running_var)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [(), (5,), (2, 3)])
def test_the_classifier_computes_what_the_authors_does(bias: bool, positions: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = perturbed(made(nn.Linear(10, 7, bias, dtype=torch.float64), dim=6, squeeze=4))
    x = torch.randn(4, *positions, 10, dtype=torch.float64)
    for train in (False, True):
        expected = reference(layer, x.view(4, -1, 10), train).view(4, *positions, 7)
        for folded in (False,) if train else (False, True):
            assert error(forced(layer.train(train), folded)(x), expected) < 1e-12
    assert torch.equal(layer.eval()(x[0, ..., :].view(-1, 10)[0]), layer(x[0, ..., :].view(-1, 10)[:1])[0])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_authors_numbers(path: Path) -> None:
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    state = {name.removeprefix("state."): one for name, one in tensors.items() if name.startswith("state.")}
    layer = DCD.load_official(state, config)
    assert layer.training == (config["mode"] == "train")
    for folded in (False,) if layer.training else (False, True):
        x = tensors["input"].clone().requires_grad_()
        y = forced(layer, folded)(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        assert error(y, tensors["output"]) < 1e-6
        assert error(gradient, tensors["grad_input_of_sum_y2"]) < 1e-6
    back = DCD.official_state(DCD.load_official(state, config))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    small = {key: value for key, value in config.items() if key not in ("pool", "dim", "squeeze", "mode")}
    found = DCD.load_official(state, small)  # from the shapes
    assert found.settings == layer.settings and not found.training


def test_files_are_there() -> None:
    assert len(GOLDEN) == 3


def test_official_layers_of_other_nets_go_round() -> None:
    names = {"conv_q.weight", "conv_p.weight", "conv.weight"}
    layer = perturbed(made(nn.Conv2d(32, 48, 1, bias=False), variant="mobilenet")).eval()
    state = DCD.official_state(layer)
    assert names < state.keys() and not {"q.weight", "dcd_weight"} & state.keys()
    config = {"variant": "mobilenet", "in_channels": 32, "out_channels": 48, "kernel_size": 1}
    again = DCD.load_official(state, config)
    assert all(torch.equal(one, state[name]) for name, one in DCD.official_state(again).items())
    x = torch.randn(2, 32, 5, 5)
    assert torch.equal(again(x), layer(x))

    classifier = perturbed(made(nn.Linear(20, 30))).eval()
    state = DCD.official_state(classifier)
    assert {"cls.weight", "cls.bias", "cls_q.weight", "cls_p.weight", "fc.1.fc.0.weight"} < state.keys()
    again = DCD.load_official(state, {"variant": "classifier", "in_features": 20, "out_features": 30})
    assert torch.equal(again(x[0, 0, :4].new_ones(2, 20)), classifier(torch.ones(2, 20)))


def test_official_layers_that_are_none() -> None:
    config = {"in_channels": 16, "out_channels": 8, "kernel_size": 1}
    state = DCD.official_state(made(nn.Conv2d(16, 8, 1, bias=False)))
    for wrong, values, said in (
        ({**config, "poool": 2}, state, "did you mean 'pool'"),
        ({**config, "bias": True}, state, "has no bias"),
        ({"in_channels": 16}, state, "does not say"),
        ({**config, "out_channels": 9}, state, "does not fit"),
        ({**config, "dim": 7}, state, "does not fit"),
        (config, {**state, "fc.0.weight": torch.zeros(0, 16)}, "no width: its C_in is below 16"),
        (config, {"weight": torch.zeros(8, 16, 1, 1)}, "no layer of DCD"),
        (config, {name: one for name, one in state.items() if name != "p.weight"}, "does not fit"),
    ):
        with pytest.raises(fdsurgery.CheckpointError, match=said):
            DCD.load_official(values, wrong)
    with pytest.raises(fdsurgery.CheckpointError, match="has no bias"):
        DCD.official_state(made(nn.Conv2d(16, 8, 1)))


# The two modes and the two ways


@pytest.mark.parametrize("name", ["3x3 stride 2", "around", "grouped"])
def test_training_and_evaluation_agree_once_the_statistics_are_settled(name: str) -> None:
    _, layer, x = convs(name)
    perturbed(layer).train()
    layer.bn1.momentum = layer.bn2.momentum = 1.0
    y = layer(x)
    count = y.numel() / y.shape[1]
    with torch.no_grad():
        for norm_ in (layer.bn1, layer.bn2):
            norm_.running_var *= (count - 1) / count  # torch keeps the unbiased one
    layer.eval()
    assert error(layer(x), y) < 1e-12
    if layer.groups == 1:
        assert error(forced(layer, True)(x), y) < 1e-12


@pytest.mark.parametrize("name", ["dilated, other strides", "mobile"])
def test_gradients_of_both_ways_agree(name: str) -> None:
    _, layer, x = convs(name)
    perturbed(layer).eval()
    found = []
    for folded in (False, True):
        one, given = forced(layer, folded), x.clone().requires_grad_()
        one(given).square().sum().backward()
        found.append({"x": given.grad, **{key: parameter.grad for key, parameter in one.named_parameters()}})
    for key, gradient in found[0].items():
        assert error(found[1][key], gradient) < 1e-10, key


@pytest.mark.parametrize("kind", ["training", "folded", "position by position", "linear"])
def test_gradcheck(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    layer = made(nn.Conv2d(3, 2, 3, stride=2, padding=1, dtype=torch.float64), dim=2, squeeze=2, pool=2)
    if kind == "linear":
        layer, x = made(nn.Linear(4, 3, dtype=torch.float64), dim=2, squeeze=2), x.flatten(1, 2)
    layer = forced(perturbed(layer).train(kind in ("training", "linear")), kind == "folded")
    names = [name for name, _ in layer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]

    def call(given: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(copy.deepcopy(layer), dict(zip(names, parameters, strict=True)), (given,))

    assert torch.autograd.gradcheck(call, (x.detach().requires_grad_(), *values), fast_mode=True)


def test_the_way_is_that_of_fewer_products() -> None:
    layer = made(nn.Conv2d(64, 32, 1))
    few, many = (sum(layer.products(100, folded=folded).values()) for folded in (False, True))
    assert few > many and layer.is_cheaper_folded(100) and not layer.is_cheaper_folded(10)
    assert not layer._folds(100), "in training the norms need every position"
    layer.eval()
    assert layer._folds(100) and not layer._folds(10)
    layer.bn2.train()
    assert not layer._folds(100)
    assert not made(nn.Conv2d(64, 32, 1, groups=2)).eval()._folds(10**6)


def test_a_weight_of_each_sample_is_shown() -> None:
    for name in ("dilated, other strides", "grouped"):
        _, layer, x = convs(name)
        perturbed(layer).eval()
        weights = layer.sample_weights(x)
        own = layer._sample_bias(layer._given(layer._context(x)))
        assert weights.shape == (3, 16, 12, *layer.kernel_size)
        for at, one in enumerate(x):
            y = F.conv2d(one[None], weights[at], layer.bias + own[at], layer.stride, layer.padding, layer.dilation)
            assert error(y[0], layer(x)[at]) < 1e-12


def test_a_grouped_weight_is_written_densely() -> None:
    weight, x = torch.randn(6, 2, 3, 3), torch.randn(2, 4, 5, 5)
    assert torch.allclose(F.conv2d(x, dense(weight, 2)), F.conv2d(x, weight, groups=2), atol=1e-6)


# The start


@pytest.mark.parametrize("name", CONVS)
def test_it_starts_as_the_plain_layer(name: str) -> None:
    plain, layer, x = convs(name, torch.float32)
    assert layer.is_neutral()
    bare = F.conv2d(layer._padded(x)[0], plain.weight, None, plain.stride, layer._padded(x)[1], plain.dilation,
                    plain.groups)  # fmt: skip
    exact = bare if plain.bias is None else bare + plain.bias[:, None, None]
    for _ in range(2):
        assert torch.equal(layer.train()(x), exact), "bit for bit, whatever the statistics"
    assert torch.allclose(layer.eval()(x), plain(x), atol=1e-5)
    if layer.groups == 1:
        assert torch.equal(layer.sample_weights(x), plain.weight.expand(3, *plain.weight.shape))
    restored = DCD.restore(perturbed(layer))
    assert type(restored) is nn.Conv2d and torch.equal(restored(x), plain(x))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_everything_learns_from_the_second_step_on(kind: str, train: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 8, 3, padding=1) if kind == "conv" else nn.Linear(16, 8)
    layer = made(plain).train(train)
    x = torch.randn(4, 16, 5, 5) if kind == "conv" else torch.randn(4, 5, 16)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.01)
    alive = []
    for _ in range(2):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        alive.append({name for name, one in layer.named_parameters() if one.grad is not None and one.grad.any()})
        optimizer.step()
    p = "p" if kind == "conv" else "cls_p"
    assert alive[0] == {"dcd_weight", "bias", f"{p}.weight", "fc_scale.weight"}
    assert alive[1] == {name for name, _ in layer.named_parameters()}


def trained(layer: nn.Module, steps: int = 150) -> float:
    """Loss of a 1x1 layer on four kinds of inputs, each with a kernel of its own."""
    generator = torch.Generator().manual_seed(1)
    kernels = torch.randn(4, 16, 16, generator=generator) / 4
    means = torch.randn(4, 16, 1, 1, generator=generator)
    optimizer = torch.optim.AdamW([one for one in layer.parameters() if one.requires_grad], 0.01)
    losses = []
    for _ in range(steps):
        kind = torch.randint(0, 4, (16,), generator=generator)
        x = means[kind] + torch.randn(16, 16, 4, 4, generator=generator)
        target = torch.einsum("boc,bchw->bohw", kernels[kind], x)
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-20:]).mean())


def test_samples_come_to_have_weights_of_their_own() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 16, 1)
    static, dynamic, gateless = copy.deepcopy(plain), made(plain, dim=8), made(plain, dim=8)
    for head in (gateless.fc_scale, gateless.fc_phi):  # what a width of 0 makes of the authors' layer
        nn.init.zeros_(head.weight)
        head.weight.requires_grad_(False)
    losses = [trained(layer) for layer in (static, dynamic, gateless)]
    assert losses[1] < 0.8 * losses[0]
    assert losses[2] > 0.95 * losses[0]
    weights = dynamic.eval().sample_weights(torch.randn(4, 16, 4, 4))
    assert error(weights[0], weights[1]) > 0.1


# Widths, parameters, products


@pytest.mark.parametrize(
    ("settings", "channels", "expected"),
    [
        ({}, (64, 256), (1, 8, 4)),
        ({}, (2048, 512), (1, 45, 128)),
        ({}, (8, 16), (1, 2, 4)),  # the authors' would have no width at all
        ({}, (1, 16), (1, 1, 4)),
        ({"dim": 30}, (64, 64), (1, 30, 56)),
        ({"variant": "basic"}, (64, 64), (2, 16, 16)),
        ({"variant": "basic"}, (8, 64), (2, 5, 4)),
        ({"variant": "basic", "pool": 1}, (64, 64), (1, 8, 4)),
        ({"pool": 2, "squeeze": 9}, (64, 64), (2, 16, 9)),
        ({"variant": "mobilenet"}, (16, 96), (2, 8, 8)),
        ({"variant": "mobilenet"}, (96, 24), (1, 12, 18)),
        ({"variant": "mobilenet"}, (960, 320), (1, 40, 200)),
        ({"variant": "mobilenet"}, (960, 160), (1, 40, 200)),
        ({"variant": "mobilenet"}, (8, 4), (1, 4, 4)),
    ],
)
def test_widths(settings: dict[str, Any], channels: tuple[int, int], expected: tuple[int, int, int]) -> None:
    assert widths(DCD.settings(settings), *channels, False) == expected


def test_parameters_and_products_of_a_resnet50() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    seen: dict[str, tuple[int, ...]] = {}
    for name, layer in model.named_modules():
        if re.fullmatch(r"layer\d\.\d+\.conv[123]|fc", name):
            layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: tuple(x[0].shape[1:])}))
    model(torch.empty(1, 3, 800, 1280, device="meta"))
    added: dict[str, int] = {}
    products = {"folded": 0, "heads": 0, "by positions": 0}
    for name, shape in seen.items():
        plain = model.get_submodule(name)
        layer = made(plain)
        added[name] = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in plain.parameters())
        if name == "fc":
            continue
        c_in, c_out, d, q = plain.in_channels, plain.out_channels, len(layer.q.weight), len(layer.fc[0].weight)
        assert added[name] == d * (c_in + c_out) + 4 * d + q * (c_in + q + d * d + c_out)
        told = DCD.multiply_adds(layer, shape)
        products["folded"] += sum(told.values())
        products["heads"] += told["heads"]
        positions = math.prod(-(-n // s) for n, s in zip(shape[1:], plain.stride, strict=True))
        everywhere = layer.products(positions, folded=False)
        products["by positions"] += everywhere["residual"] + everywhere["scale"]
    assert len(added) == 49 and added.pop("fc") == 228_992 and sum(added.values()) == 4_049_032
    assert round(products["heads"] / 1e9, 3) == 0.003
    assert round(products["by positions"] / 1e9, 3) == 5.898
    assert round(products["folded"] / 1e9, 3) == 0.315


@pytest.mark.parametrize(("recipe", "added"), [("dcd_resnet", 4_049_032), ("dcd_resnet_classifier", 4_278_024)])
def test_recipes(recipe: str, added: int) -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet50")
        plan = fdsurgery.plan(model, recipe)
        assert plan.parameters_added == added
        names = {one.site.name for one in plan.swaps}
        blocks = {name for name, _ in model.named_modules() if re.fullmatch(r"layer\d\.\d+\.conv[123]", name)}
        assert names == blocks | ({"fc"} if recipe == "dcd_resnet_classifier" else set()) and len(blocks) == 48
        basic = fdsurgery.plan(timm.create_model("resnet18"), recipe, variant="basic")
    assert {one.settings["variant"] for one in basic.swaps} == {"basic"}
    assert (
        fdsurgery.load_recipe("resnet").swap[0].operator == "fdconv" != fdsurgery.load_recipe(recipe).swap[0].operator
    )


def test_products_are_those_of_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in ("3x3 stride 2", "grouped"):
        plain, layer, x = convs(name)
        layer.train()
        counter = FlopCounterMode(display=False)
        with counter:
            layer(x)
        convolution = FlopCounterMode(display=False)
        with convolution:
            plain(x)
        told = layer.products(20, folded=False)
        width = len(layer.fc[0].weight)
        counted = (counter.get_total_flops() - convolution.get_total_flops()) // 2
        assert counted == 3 * (told["heads"] - width + told["residual"]), "all but what is elementwise"


# Settings and sites


def test_settings() -> None:
    assert DCD.settings({}) == {"variant": "bottleneck", "pool": None, "dim": None, "squeeze": None}
    for wrong, said in (
        ({"variant": "botleneck"}, "dcd: variant: .*'bottleneck', 'basic' or 'mobilenet'"),
        ({"pool": 3}, "dcd: pool: .*1 or 2"),
        ({"dim": 0}, "dcd: dim: .*greater than or equal to 1"),
        ({"squeeze": 2.0}, "dcd: squeeze: .*integer"),
        ({"sqeeze": 2}, "did you mean 'squeeze'"),
    ):
        with pytest.raises(fdsurgery.RecipeError, match=said):
            DCD.settings(wrong)


def site(**told: Any) -> fdsurgery.Site:
    return fdsurgery.Site("conv", "conv", "spatial", told.pop("in_channels", 16), 32, **told)


@pytest.mark.parametrize(
    ("one", "settings", "said"),
    [
        (site(kernel_size=(3, 3), padding=(1, 1), groups=16), {}, "depthwise"),
        (site(kernel_size=(3, 3)), {}, r"padding is \(0, 0\)"),
        (site(kernel_size=(3, 3), padding="valid"), {}, "padding is valid"),
        (site(kernel_size=(3, 3), padding=(1, 1), dilation=(2, 2)), {}, "padding"),
        (site(kernel_size=(3, 1), padding=(0, 1)), {}, "padding"),
        (site(kernel_size=(2, 2), dilation=(2, 2), padding=(1, 1)), {}, "no centre tap"),
        (site(kernel_size=(1, 4), padding="same"), {}, "no centre tap"),
        (site(kernel_size=(3, 3), stride=(2, 2), pads_same=True), {}, "where the residual reads"),
        (site(kernel_size=(3, 3), padding=(1, 1)), {"variant": "mobilenet"}, "1x1"),
        (fdsurgery.Site("fc", "linear", "head", 16, 32), {"pool": 2}, "no map"),
    ],
)
def test_refusals(one: fdsurgery.Site, settings: dict[str, Any], said: str) -> None:
    assert re.search(said, DCD.refusal(one, DCD.settings(settings)) or "")


def test_what_is_not_refused() -> None:
    for one in (
        site(kernel_size=(3, 3), padding=(1, 1), groups=4, stride=(2, 2)),
        site(kernel_size=(3, 3), padding=(1, 1), padding_mode="reflect"),
        site(kernel_size=(3, 3), padding="same", dilation=(2, 2)),
        site(kernel_size=(1, 1), padding="valid"),
        site(kernel_size=(1, 5), padding=(0, 4), dilation=(1, 2)),
        site(kernel_size=(3, 3), pads_same=True),
        site(kernel_size=(1, 1), stride=(2, 2), pads_same=True),
        site(in_channels=1),
        fdsurgery.Site("fc", "linear", "head", 16, 32),
    ):
        assert DCD.refusal(one, DCD.settings({})) is None


def test_a_layer_that_was_spoilt_afterwards_says_so() -> None:
    layer = made(nn.Conv2d(8, 8, 3, padding=1))
    layer.dilation = (2, 2)
    with pytest.raises(RuntimeError, match=r"padding is \(1, 1\), and the residual needs"):
        layer(torch.randn(1, 8, 6, 6))
    layer.padding = (2, 2)
    layer(torch.randn(1, 8, 6, 6))


def test_it_pads_as_tensorflow_does() -> None:
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    plain = Conv2dSame(12, 16, 3, dilation=2, bias=False).double()
    layer, x = perturbed(made(plain)).eval(), torch.randn(2, 12, 6, 7, dtype=torch.float64)
    assert layer.pads_same
    twin = perturbed(made(nn.Conv2d(12, 16, 3, padding=2, dilation=2, bias=False).double())).eval()
    twin.load_state_dict(layer.state_dict())
    for folded in (False, True):
        assert error(forced(layer, folded)(x), twin(x)) < 1e-12


def test_settings_are_read_from_tensors() -> None:
    for plain, settings in (
        (nn.Conv2d(16, 24, 3, padding=1), {"variant": "basic"}),
        (nn.Conv2d(16, 24, 1), {"dim": 5, "squeeze": 3, "pool": 2}),
        (nn.Linear(16, 24), {"dim": 5}),
    ):
        layer = made(plain, **settings)
        told = DCD.settings(DCD.settings_of_tensors(plain, layer.state_dict(), False))
        again = made(plain, **told)
        assert [one.shape for one in again.state_dict().values()] == [one.shape for one in layer.state_dict().values()]
        assert DCD.settings_of(layer) == DCD.settings(settings)


# As a layer of torch's own


def test_batches_of_one_and_none() -> None:
    for plain, shapes in (
        (nn.Conv2d(8, 6, 3, padding=1), [(1, 8, 1, 1), (1, 8, 3, 1), (8, 4, 5)]),
        (nn.Linear(8, 6), [(1, 8), (8,), (1, 3, 8)]),
    ):
        for shape in shapes:
            layer = perturbed(made(plain)).train()
            before = copy.deepcopy(layer)
            y = layer(torch.randn(shape))
            y.sum().backward()
            assert y.shape == plain(torch.randn(shape)).shape
            alone = math.prod(shape) == 8
            assert torch.equal(before.bn1.running_mean, layer.bn1.running_mean) == alone
            assert (layer.bn2.num_batches_tracked == 0) == alone
    for train in (True, False):
        layer = made(nn.Conv2d(8, 6, 3, padding=1)).train(train)
        for folded in (True, False) if not train else (False,):
            x = torch.zeros(0, 8, 5, 5, requires_grad=True)
            y = forced(layer, folded)(x)
            y.sum().backward()
            assert y.shape == (0, 6, 5, 5) and x.grad is not None
        linear = made(nn.Linear(8, 6)).train(train)
        assert linear(torch.zeros(0, 8)).shape == (0, 6) and linear(torch.zeros(0, 4, 8)).shape == (0, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_low_precision(dtype: torch.dtype, train: bool) -> None:
    for plain, shape in ((nn.Conv2d(16, 8, 3, padding=1), (3, 16, 8, 9)), (nn.Linear(16, 8), (3, 4, 16))):
        layer = perturbed(made(plain)).train(train)
        x = torch.randn(shape)
        exact = copy.deepcopy(layer)(x)
        for folded in (False,) if train else (False, True):
            y = forced(layer, folded).to(dtype)(x.to(dtype))
            assert y.dtype == dtype and error(y, exact) < (0.01 if dtype == torch.float16 else 0.06)
            with torch.autocast("cpu", dtype):
                y = forced(layer, folded)(x)
            assert y.dtype == dtype and error(y, exact) < (0.01 if dtype == torch.float16 else 0.06)
            y.float().sum().backward()


def test_norms_may_be_frozen_or_synchronised() -> None:
    _, layer, x = convs("3x3 stride 2", torch.float32)
    perturbed(layer).eval()
    expected = layer(x)
    layer.train()
    for one in layer.modules():
        if isinstance(one, nn.modules.batchnorm._BatchNorm):
            one.eval()
    assert error(layer(x), expected) < 1e-5
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer)).eval()
    assert type(layer[0].bn1) is nn.SyncBatchNorm
    for folded in (False, True):
        assert error(forced(layer[0], folded)(x), expected) < 1e-5


def test_copies_pickles_and_states() -> None:
    for plain, x in ((nn.Conv2d(8, 6, 3, padding=1), torch.randn(2, 8, 5, 5)), (nn.Linear(8, 6), torch.randn(2, 8))):
        layer = perturbed(made(plain)).eval()
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        fresh = made(copy.deepcopy(plain)).eval()
        fresh.load_state_dict(layer.state_dict())
        for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), fresh):
            assert torch.equal(other(x), layer(x))
        other = type(plain)(*(6, 8)[::-1], **({"kernel_size": 3, "padding": 1} if x.dim() == 4 else {}))
        with pytest.warns(UserWarning, match="what its modulation had learned is gone"):
            layer.load_state_dict(other.state_dict())
        assert torch.allclose(layer(x), other(x), atol=1e-5) and layer.is_neutral()


def test_its_weight_is_read_and_written() -> None:
    _, layer, x = convs("3x3 stride 2")
    perturbed(layer).eval()
    before = layer(x)
    with torch.no_grad():
        layer.weight *= 2  # as folding a norm does it
    assert error(layer(x), 2 * before) < 1e-12
    layer.weight = nn.Parameter(torch.ones_like(layer.weight))
    assert torch.equal(DCD.restore(layer).weight, torch.ones(16, 12, 3, 3, dtype=torch.float64))
    linear = perturbed(made(nn.Linear(8, 6)))
    with pytest.raises(ValueError, match="cannot be multiplied alone"), torch.no_grad():
        linear.weight *= 2


def test_channels_last() -> None:
    plain, layer, x = convs("3x3 stride 2", torch.float32)
    perturbed(layer)
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    for train in (False, True):  # which moves the statistics
        y = moved.train(train)(x.to(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert error(y, copy.deepcopy(layer).train(train)(x)) < 1e-5
    assert plain.weight.is_contiguous()


def test_vmap_and_second_derivatives() -> None:
    _, layer, x = convs("3x3 stride 2")
    perturbed(layer).eval()
    states = {name: torch.stack([one, 2 * one]) for name, one in layer.named_parameters()}
    for folded in (False, True):
        one = forced(layer, folded)
        both = torch.vmap(lambda state, one=one: torch.func.functional_call(one, state, (x,)))(states)
        assert error(both[0], one(x)) < 1e-12
        given = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(one(given).square().sum(), given, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), given)
        assert second.isfinite().all()


def test_it_is_exported_for_any_batch_and_size() -> None:
    layer, x = perturbed(made(nn.Conv2d(8, 6, 3, padding=1, stride=2))).eval(), torch.randn(2, 8, 16, 18)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()
    for shape in ((2, 8, 16, 18), (3, 8, 5, 7)):
        given = torch.randn(shape)
        assert error(exported(given), layer(given)) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("train", [True, False])
def test_it_is_compiled(train: bool) -> None:
    for plain, x in (
        (nn.Conv2d(8, 6, 3, padding=1), torch.randn(3, 8, 9, 9)),
        (nn.Linear(8, 6), torch.randn(3, 4, 8)),
    ):
        layer = perturbed(made(plain)).train(train)
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
        assert error(compiled(x), copy.deepcopy(layer)(x)) < 1e-5
        compiled(x).sum().backward()

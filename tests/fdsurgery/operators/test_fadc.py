"""FADC: frequency-adaptive dilated convolution."""

from __future__ import annotations

import copy
import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import fdsurgery
from fdsurgery.discovery.site import Site
from fdsurgery.errors import CheckpointError, RecipeError
from fdsurgery.operators import adaptive_dilation, get_operator
from fdsurgery.operators.fadc_layer import FADConv2d
from fdsurgery.operators.freq_select import FreqSelect, centred_low_passes
from fdsurgery.recipe import parse_recipe

GOLDEN = Path(__file__).parents[2] / "golden" / "operators"
OPERATOR = get_operator("fadc")


def settings(**given: Any) -> dict[str, Any]:
    return OPERATOR.settings(given)


def made(plain: nn.Conv2d, **given: Any) -> FADConv2d:
    layer = OPERATOR.replace(plain, settings(**given))
    assert isinstance(layer, FADConv2d)
    return layer


@torch.no_grad()
def perturb_(layer: nn.Module, by: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in layer.named_parameters():
        if name not in ("fadc_weight", "bias"):
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter))
    for name, buffer in layer.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
    return layer


def error(got: Tensor, wanted: Tensor) -> float:
    with torch.no_grad():
        return float((got.double() - wanted.double()).norm() / wanted.double().norm())


# Another way of computing it


def masked(x: Tensor, k: int) -> Tensor:
    """The authors' low-pass as they write it: a square of the centred spectrum, and the real part of what it leaves."""
    height, width = x.shape[-2:]
    mask = torch.zeros(height, width, dtype=x.dtype)
    top, bottom = round(height / 2 - height / (2 * k)), round(height / 2 + height / (2 * k))
    left, right = round(width / 2 - width / (2 * k)), round(width / 2 + width / (2 * k))
    mask[top:bottom, left:right] = 1
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1))).real


def selected(x: Tensor, module: FreqSelect) -> Tensor:
    bands, groups = module.config.bands, module.config.band_groups
    convs: Any = module.freq_weight_conv_list
    maps = [2 * torch.sigmoid(F.conv2d(x, one.weight, one.bias, padding=1, groups=groups)) for one in convs]
    maps = [one.repeat_interleave(x.shape[1] // groups, 1) for one in maps]
    passed = [x, *(masked(x, k) for k in bands)]
    y = sum(one * (wide - narrow) for one, (wide, narrow) in zip(maps, pairwise(passed), strict=False))
    return y + passed[-1] * (maps[-1] if module.config.band_lowfreq else 1)


def expected(layer: FADConv2d, x: Tensor) -> Tensor:
    """What a layer in eval mode gives, sample by sample, by torchvision's deformable convolution."""
    ops = pytest.importorskip("torchvision.ops")
    its = layer.settings
    if layer.FS is not None:
        x = selected(x, layer.FS)

    def gates(name: str, context: Tensor) -> Tensor:
        module: Any = getattr(layer, name)
        hidden = module.fc.weight[:, :, 0, 0] @ context
        if module.bn is not None:
            normed = (hidden - module.bn.running_mean) / (module.bn.running_var + module.bn.eps).sqrt()
            hidden = normed * module.bn.weight + module.bn.bias
        else:
            hidden = hidden / (hidden.square().mean() + 1e-6).sqrt() * module.norm.weight
        hidden = hidden.clamp(min=0)
        channel = 2 * torch.sigmoid(module.channel_fc.weight[:, :, 0, 0] @ hidden + module.channel_fc.bias)
        filters = torch.ones(layer.out_channels, dtype=x.dtype)
        if module.filter_fc is not None:
            filters = 2 * torch.sigmoid(module.filter_fc.weight[:, :, 0, 0] @ hidden + module.filter_fc.bias)
        ours, theirs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
        return torch.stack(
            [filters[o] * channel[o // ours * theirs : (o // ours + 1) * theirs] for o in range(layer.out_channels)]
        )[:, :, None, None]

    results = []
    for image in x:
        context, weight = image.mean((1, 2)), layer.fadc_weight
        mean = weight.mean((2, 3), keepdim=True).expand_as(weight)
        if its["adakern"] == "both":
            weight = mean * gates("OMNI_ATT1", context) + (weight - mean) * gates("OMNI_ATT2", context)
        elif its["adakern"] == "high":
            weight = mean + (weight - mean) * gates("OMNI_ATT", context)
        elif its["adakern"] == "low":
            weight = mean * gates("OMNI_ATT", context) + (weight - mean)
        left, right, top, bottom = layer._pads() if its["padding"] == "zeros" else (1, 1, 1, 1)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        mode = mode if its["padding"] == "zeros" else "replicate"
        padded = F.pad(image[None], (left, right, top, bottom), mode=mode)
        if layer.conv_offset is None or layer.conv_mask is None:
            results.append(F.conv2d(padded, weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups))
            continue
        d, k = layer.dilation, layer.kernel_size
        far = [d[way] * (k[way] // 2) for way in (0, 1)]
        # With repeated pixels the map is smaller than the plain layer reads: zeros lie beyond.
        more = [max(0, far[way] - 1) if its["padding"] == "repeat" else 0 for way in (0, 1)]
        whole = F.pad(padded, (more[1], more[1], more[0], more[0]))
        inner = whole[..., far[0] - 1 : whole.shape[-2] - far[0] + 1, far[1] - 1 : whole.shape[-1] - far[1] + 1]
        if far[0] == 0 or far[1] == 0:
            inner = F.pad(whole, (1 - far[1], 1 - far[1], 1 - far[0], 1 - far[0]))
        o = F.conv2d(inner, layer.conv_offset.weight, layer.conv_offset.bias, layer.stride)
        mask = 2 * torch.sigmoid(F.conv2d(inner, layer.conv_mask.weight, layer.conv_mask.bias, layer.stride))
        offsets = []
        for group in range(o.shape[1]):
            for u in range(k[0]):
                for v in range(k[1]):
                    for tap, apart, size in ((u, d[0], k[0]), (v, d[1], k[1])):
                        if its["dilation_rule"] == "relu":
                            dilation = (apart * (1 + o[:, group])).clamp(min=0)
                        elif its["dilation_rule"] == "abs":
                            dilation = 1 + o[:, group].abs() * apart
                        else:
                            dilation = 1 + ((o[:, group] + 1).clamp(min=0) - 1) * apart
                        offsets.append((tap - size // 2) * (dilation - apart))
        y = ops.deform_conv2d(
            whole, torch.stack(offsets, 1), weight, layer.bias, layer.stride, (0, 0), layer.dilation, mask
        )
        results.append(y)
    return torch.cat(results)


GEOMETRIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"stride": 2, "padding": 2, "dilation": 2, "bias": False}, {"adakern": "high"}),
    ({"padding": 3, "dilation": 3, "groups": 2}, {"adakern": "low", "map_groups": 4, "low_band": True}),
    ({"padding": 4, "dilation": 4, "stride": 2}, {"deform_groups": 2, "bands": [2, 3]}),
    ({"groups": 8}, {"norm": "rms"}),
    ({"kernel_size": 5, "padding": 2}, {"freqselect": False}),
    ({"kernel_size": 5, "padding": 1, "stride": (2, 1)}, {"adakern": "none"}),
    ({"padding": 0, "dilation": 2}, {}),
    ({"padding": 5}, {"adakern": "none", "freqselect": False}),
    ({"kernel_size": (1, 7), "padding": (0, 3)}, {}),
    ({"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)}, {"deform_groups": 4}),
    ({"padding_mode": "reflect", "padding": 2, "dilation": 2}, {}),
    ({"padding_mode": "circular", "padding": 1, "stride": 2}, {"adadr": False}),
    ({"groups": 8}, {"adadr": False, "adakern": "low"}),
    ({"stride": 2, "padding": 2, "dilation": 2}, {"dilation_rule": "zero"}),
    ({"padding": 2, "dilation": 2}, {"dilation_rule": "abs", "padding": "repeat"}),
    ({"kernel_size": 4, "padding": 1}, {"adadr": False}),
    ({"kernel_size": 1, "padding": 0}, {"adadr": False, "adakern": "none"}),
]


@pytest.mark.parametrize(("geometry", "given"), GEOMETRIES)
def test_it_starts_as_the_plain_layer_and_computes_the_formulas(geometry: dict[str, Any], given: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8, 13, 10)
    plain = nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **geometry}).eval()
    layer = made(plain, **given)
    assert layer.is_neutral() and not layer.training
    assert type(OPERATOR.restore(layer)) is nn.Conv2d and torch.equal(OPERATOR.restore(layer).weight, plain.weight)
    with torch.no_grad():
        assert given.get("padding") == "repeat" or error(layer(x), plain(x)) < 4e-7
        assert torch.allclose(layer(x[0]), layer(x)[0], atol=1e-5) and layer(x[:0]).shape == (0, *layer(x).shape[1:])
        wide, before = copy.deepcopy(layer).double(), layer(x)
        perturb_(wide)
        assert not wide.is_neutral()
        assert error(wide(x.double()), before) > 0.02
        assert error(wide(x.double()), expected(wide, x.double())) < 1e-12
        narrow = copy.deepcopy(wide).float()
        assert error(narrow(x), expected(wide, x.double())) < 5e-6


def test_sampling_is_exact_at_whole_numbers_for_every_dilation() -> None:
    torch.manual_seed(0)
    for dilation in (1, 2, 3, 4):
        for stride in (1, 2):
            for groups, kernel in ((1, 3), (4, 3), (8, 3), (1, 5)):
                padding = dilation * (kernel // 2)
                plain = nn.Conv2d(8, 8, kernel, stride, padding, dilation, groups).double()
                x = torch.randn(2, 8, 11, 14, dtype=torch.float64)
                assert error(made(plain)(x), plain(x)) < 1e-15


def test_a_pad_by_the_size_of_the_input_is_exact() -> None:
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    for size in (11, 12):
        plain = Conv2dSame(4, 6, 3, stride=2, dilation=2).eval()
        layer, x = made(plain), torch.randn(2, 4, size, size + 1)
        assert layer.pads_same and error(layer(x), plain(x)) < 4e-7
        assert OPERATOR.multiply_adds(layer, (4, size, size + 1))["dilation"] == 360 * 6 * (6 + (size == 12))


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("f*.safetensors")))
def test_the_authors_layers(name: str) -> None:
    assert name.startswith(("fadc_", "freqselect_"))
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {key.removeprefix("state."): tensor for key, tensor in tensors.items() if key.startswith("state.")}
    layer = OPERATOR.load_official(state, config)
    assert isinstance(layer, FreqSelect if name.startswith("freqselect_") else FADConv2d)
    x = tensors["input"].requires_grad_()
    y = layer(x)
    (to_x,) = torch.autograd.grad(y.square().sum(), x)
    assert error(y, tensors["output"]) < 3e-6
    assert error(to_x, tensors["grad_input_of_sum_y2"]) < 8e-6
    back = OPERATOR.official_state(layer)  # type: ignore[attr-defined]
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_what_is_wrong_with_a_file_is_said() -> None:
    with safe_open(GOLDEN / "fadc_16_16_d1_replicate.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {key[6:]: file.get_tensor(key) for key in file.keys() if key.startswith("state.")}  # noqa: SIM118
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"use_dct": True}, "use_dct=True cannot be read"),
        ({"padding_mode": "mirror"}, "'mirror' is none of repeat, zero and none"),
        ({"kernel_decompose": "hihg"}, "adakern"),
        ({"k_lits": [2]}, "k_list"),
        ({"kernel_size": 2}, "no middle tap"),
        ({"out_channels": 17}, "does not fit"),
        ({"deform_groups": 3}, "does not divide"),
        ({"bands": [1]}, "nothing that is known"),
    ]
    for change, said in wrong:
        with pytest.raises(CheckpointError, match=said):
            OPERATOR.load_official(state, {**config, **change})
    for word in ("padding_mode", "k_list", "use_zero_dilation", "kernel_size"):
        with pytest.raises(CheckpointError, match=word):
            OPERATOR.load_official(state, {key: value for key, value in config.items() if key != word})
    with pytest.raises(CheckpointError, match="does not fit"):
        OPERATOR.load_official({key: one for key, one in state.items() if key != "conv_mask.bias"}, config)
    with pytest.raises(CheckpointError, match="in_channels"):
        OPERATOR.load_official(state, {"operator": "freqselect", "k_list": [2]})
    theirs: Any = OPERATOR
    for geometry, given in (
        ({"padding": 2, "dilation": 2}, {}),
        ({"padding": 0}, {}),
        ({"padding": 1}, {"norm": "rms"}),
    ):
        with pytest.raises(CheckpointError, match="has no such layer"):
            theirs.official_state(made(nn.Conv2d(4, 4, 3, **geometry), **given))


def test_a_new_layer_goes_to_the_authors_code() -> None:
    torch.manual_seed(0)
    layer = perturb_(made(nn.Conv2d(16, 16, 3, padding=1)).eval())
    theirs: Any = OPERATOR
    config = {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "bias": True, "kernel_decompose": "both"}
    config |= {"use_zero_dilation": True, "padding_mode": "zero", "k_list": [2, 4, 8]}
    again = OPERATOR.load_official(theirs.official_state(layer), config)
    x = torch.randn(2, 16, 9, 8)
    assert error(again(x), layer(x)) < 1e-6


def test_low_passes_of_all_sizes() -> None:
    bands = (2, 3, 4, 5, 8)
    for height in range(1, 34):
        width = 34 - height
        x = torch.randn(1, 1, height, width, dtype=torch.float64)
        for k, passed in zip(bands, centred_low_passes(x, bands), strict=True):
            assert torch.allclose(passed, masked(x, k), atol=1e-12), (height, width, k)


def test_all_but_the_squeezes_have_a_gradient_at_the_first_step() -> None:
    torch.manual_seed(0)
    x, other = torch.randn(4, 8, 12, 12), nn.Conv2d(8, 8, 3, padding=1)
    for given in ({}, {"adakern": "high"}, {"low_band": True}, {"deform_groups": 2, "map_groups": 2}):
        layer = made(nn.Conv2d(8, 8, 3, padding=1), **given)
        (layer(x) - other(x)).square().mean().backward()
        dead = {name for name, one in layer.named_parameters() if one.grad is None or not one.grad.any()}
        assert dead and all(".fc." in name or ".bn." in name for name in dead)
        torch.optim.SGD(layer.parameters(), 1.0).step()
        layer.zero_grad()
        (layer(x) - other(x)).square().mean().backward()
        assert all(one.grad is not None and one.grad.any() for one in layer.parameters())
    still = OPERATOR.make(nn.Conv2d(8, 8, 3, padding=1), settings(dilation_rule="abs"))  # type: ignore[attr-defined]
    (still(x) - other(x)).square().mean().backward()
    assert not still.conv_offset.weight.grad.any(), "the authors' rule, exactly at its start"


def test_training_moves_the_dilation_where_it_is_wrong() -> None:
    """Targets by a kernel that reaches further than the layer's: only AdaDR can go there."""
    torch.manual_seed(0)
    smooth = nn.AvgPool2d(3, 1, 1)
    target = nn.Conv2d(4, 4, 3, padding=2, dilation=2).requires_grad_(False)
    plain = nn.Conv2d(4, 4, 3, padding=1)
    plain.load_state_dict(target.state_dict())
    losses = {}
    for name, layer in {"static": plain, "fadc": made(plain, adakern="none", freqselect=False)}.items():
        optimizer = torch.optim.AdamW(layer.parameters(), 0.02)
        for _ in range(120):
            x = smooth(torch.randn(8, 4, 12, 12))
            loss = (layer(x) - target(x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = float(loss.detach())
    assert losses["fadc"] < 0.3 * losses["static"], losses


@pytest.mark.parametrize("given", [{}, {"adakern": "none", "dilation_rule": "zero"}, {"adadr": False}])
def test_gradients(given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = made(nn.Conv2d(2, 2, 3, padding=2, dilation=2).double(), **{"min_channels": 2, "bands": [2], **given})
    perturb_(layer, 0.2)
    layer.eval()
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    arguments = (x, *(one.detach().requires_grad_() for one in layer.parameters()))
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


def test_a_batch_is_computed_in_parts_as_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = perturb_(made(nn.Conv2d(8, 6, 3, padding=1))).eval(), torch.randn(5, 8, 9, 8, requires_grad=True)

    def run() -> list[Tensor]:
        y = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), y)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    whole = run()
    monkeypatch.setattr(adaptive_dilation, "CHUNK", 2 * 9 * 8 * 72)
    assert all(error(one, other) < 2e-6 for one, other in zip(run(), whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    coarse = 4e-2 if dtype == torch.bfloat16 else 5e-3
    plain, x = nn.Conv2d(8, 8, 3, padding=3, dilation=3), torch.randn(2, 8, 40, 9)
    half = made(copy.deepcopy(plain).to(dtype))
    assert error(half(x.to(dtype)), copy.deepcopy(plain).to(dtype)(x.to(dtype))) < coarse
    layer = perturb_(made(plain)).eval()
    wanted = layer(x)
    got = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert got.dtype == dtype and error(got, wanted) < coarse
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype and error(y, wanted) < coarse
    y.float().square().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in layer.parameters())
    with pytest.raises(RuntimeError):
        layer(x.to(dtype))


def test_channels_last_copies_and_states() -> None:
    torch.manual_seed(0)
    plain, x = nn.Conv2d(8, 6, 3, padding=1), torch.randn(2, 8, 7, 9)
    layer = perturb_(made(plain)).eval()
    wanted = layer(x)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    y = last(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last) and error(y, wanted) < 1e-6
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), wanted)
    other = made(plain)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), wanted)
    new = nn.Conv2d(8, 6, 3, padding=1)
    with pytest.warns(UserWarning, match="what its modulation had learned is gone"):
        other.load_state_dict(new.state_dict())
    assert error(other(x), new(x)) < 4e-7


def test_it_trains_on_a_single_sample_and_on_one_position() -> None:
    torch.manual_seed(0)
    layer = perturb_(made(nn.Conv2d(8, 8, 3, padding=1))).train()
    for shape in ((1, 8, 9, 9), (1, 8, 1, 1), (3, 8, 2, 1)):
        layer(torch.randn(shape)).square().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in layer.parameters())


def test_taps_far_out_see_zeros() -> None:
    layer = made(nn.Conv2d(2, 2, 3, padding=1))
    x = torch.randn(1, 2, 6, 6)
    assert layer.conv_offset is not None and layer.conv_offset.bias is not None
    middle = nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        layer.conv_offset.bias.fill_(1e30)
        middle.weight.copy_(layer.fadc_weight[:, :, 1:2, 1:2])
        middle.bias.copy_(layer.bias)
    assert torch.allclose(layer(x), middle(x), atol=1e-6)
    with torch.no_grad():
        layer.conv_offset.bias.fill_(-5.0)  # all taps at the middle one
        middle.weight.copy_(layer.fadc_weight.sum((2, 3), keepdim=True))
    assert torch.allclose(layer(x), middle(x), atol=1e-5)


@pytest.mark.long
def test_it_is_exported_and_compiled() -> None:
    torch.manual_seed(0)
    layer = perturb_(made(nn.Conv2d(8, 6, 3, 2, 2, 2, 2), bands=[2, 4], deform_groups=2, map_groups=2)).eval()
    x, other = torch.randn(2, 8, 12, 9), torch.randn(3, 8, 11, 14)
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=6), 3: torch.export.Dim("width", min=6)}
    program = torch.export.export(layer, (x,), dynamic_shapes=(dims,))
    for one in (x, other):
        assert error(program.module()(one), layer(one)) < 2e-6
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert error(compiled(x), layer(x)) < 2e-6
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert error(traced(other[..., :12, :9]), layer(other[..., :12, :9])) < 2e-6


def test_transforms_of_functions() -> None:
    torch.manual_seed(0)
    layer = perturb_(made(nn.Conv2d(4, 4, 3, padding=1))).eval()
    x = torch.randn(3, 4, 6, 5)
    assert torch.allclose(torch.func.vmap(layer)(x[:, None])[:, 0], layer(x), atol=1e-5)
    _, moved = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    near = (layer.double()(x.double() + 1e-6) - layer(x.double() - 1e-6)) / 2e-6
    assert error(moved, near) < 1e-3


# What recipes and plans say


def site(**given: Any) -> Site:
    plain: Any = {"kernel_size": (3, 3), "padding": (1, 1), **given}
    return Site("layer", "conv", "spatial", 8, 8, **plain)


def test_what_it_cannot_take_is_said() -> None:
    assert OPERATOR.refusal(site(), settings()) is None
    assert OPERATOR.refusal(site(kernel_size=(5, 5), padding=(2, 2), groups=8), settings()) is None
    for given, asked, said in (
        ({"kernel_size": (2, 2)}, {}, "a 2x2 kernel has no middle tap"),
        ({"kernel_size": (1, 1)}, {}, "no taps to move apart"),
        ({"kernel_size": (1, 1)}, {"adadr": False}, "its own mean"),
        ({}, {"map_groups": 3}, "map_groups=3 does not divide its 8"),
        ({}, {"deform_groups": 3}, "deform_groups=3 does not divide its 8"),
        ({}, {"dilation_rule": "abs"}, "no gradient where it starts"),
        ({"dilation": (1, 2)}, {"dilation_rule": "zero"}, "knows one dilation"),
        ({}, {"padding": "repeat"}, "would change what it computes"),
    ):
        assert said in str(OPERATOR.refusal(site(**given), settings(**asked))), said
    assert OPERATOR.refusal(site(kernel_size=(2, 2)), settings(adadr=False)) is None
    assert OPERATOR.refusal(site(dilation=(2, 2), padding=(2, 2)), settings(dilation_rule="abs")) is None
    assert OPERATOR.refusal(site(padding_mode="replicate"), settings(padding="repeat")) is None
    linear = Site("fc", "linear", "linear", 8, 8)
    assert OPERATOR.refusal(linear, settings()) == "fadc takes convolutions only"
    with pytest.raises(ValueError, match="no middle tap"):
        FADConv2d(nn.Conv2d(4, 4, 2), settings())


def test_repeated_pixels_where_the_plain_layer_repeats_them() -> None:
    torch.manual_seed(0)
    plain, x = nn.Conv2d(4, 4, 3, 2, 1, padding_mode="replicate"), torch.randn(2, 4, 9, 8)
    assert error(made(plain, padding="repeat")(x), plain(x)) < 4e-7
    assert error(made(nn.Conv2d(4, 4, 3, 2, 1), padding="repeat")(x), nn.Conv2d(4, 4, 3, 2, 1)(x)) > 0.1


def test_settings_have_limits() -> None:
    assert settings(bands=(2, 4))["bands"] == [2, 4]
    for given, said in (
        ({"adakern": "none", "freqselect": False, "adadr": False}, "leaves a plain convolution"),
        ({"bands": [4, 2]}, "ascending"),
        ({"bands": [1]}, "greater than or equal to 2"),
        ({"bands": []}, "at least 1 item"),
        ({"adakern": "hihg"}, "'both', 'high', 'low' or 'none'"),
        ({"reduction": 0.0}, "greater than 0"),
        ({"adadr": 1}, "valid boolean"),
        ({"deform_group": 2}, "deform_groups"),
        ({"padding": "reflect"}, "'zeros' or 'repeat'"),
    ):
        with pytest.raises(RecipeError, match=said):
            settings(**given)


def test_the_settings_are_read_off_the_tensors() -> None:
    plain = nn.Conv2d(64, 32, 3, padding=1)
    unseen = (*OPERATOR.unseen_settings, "adakern")
    for given in (
        {},
        {"adakern": "high"},
        {"adakern": "none", "adadr": False},
        {"freqselect": False, "deform_groups": 2, "norm": "rms"},
        {"map_groups": 2, "min_channels": 5},
    ):
        layer = made(plain, **given)
        state: Any = dict(layer.state_dict())
        told = OPERATOR.settings_of_tensors(plain, state, False)
        again = made(plain, **told, **{key: value for key, value in given.items() if key in unseen and key not in told})
        assert {key: one.shape for key, one in again.state_dict().items()} == {
            key: one.shape for key, one in state.items()
        }
        assert OPERATOR.settings_of(layer) == settings(**given)
        kinds = OPERATOR.parameter_kinds(layer)
        assert kinds[layer.fadc_weight] == "weight" and kinds[layer.bias] == "bias"  # type: ignore[index]
        assert kinds.keys() == set(layer.parameters())


def test_parameters_and_multiply_adds_are_counted() -> None:
    with torch.device("meta"):
        plain = nn.Conv2d(128, 96, 3, 2, 1, bias=False)
        layer = made(plain)
    added = sum(one.numel() for one in layer.parameters()) - plain.weight.numel()
    assert added == 90 * 128 + 10 + 2 * (16 * 128 + 32 + 17 * 224) + 3 * (9 * 128 + 1)
    counted = OPERATOR.multiply_adds(layer, (128, 20, 32))
    rows, columns = (11, 7, 3), (17, 9, 5)  # coefficients of bands 2, 4, 8 on 20 and 32 positions
    split = (20 * 32 + rows[0] * 20) * columns[0]
    split += sum(2 * 11 * 17 + n * m * 32 + 20 * n * 32 for n, m in zip(rows, columns, strict=True))
    assert counted == {
        "attention": 2 * 16 * (128 + 224),
        "kernels": 10 * 96 * 128 + 2 * 96 * 128,
        "maps": 27 * 128 * 640,
        "bands": 128 * (split + 4 * 640),
        "dilation": 90 * 128 * 160,
        "sampling": 36 * (128 + 2) * 160,
    }


def test_its_band_maps_are_shown() -> None:
    layer, x = perturb_(made(nn.Conv2d(4, 4, 3, padding=1), map_groups=2)), torch.randn(2, 4, 6, 5)
    maps = OPERATOR.band_maps(layer, x)
    assert maps is not None and maps.shape == (2, 2, 3, 6, 5)
    assert OPERATOR.band_maps(made(nn.Conv2d(4, 4, 3), freqselect=False), x) is None
    convs: Any = layer.FS.freq_weight_conv_list  # type: ignore[union-attr]
    one = 2 * torch.sigmoid(F.conv2d(x, convs[1].weight, convs[1].bias, padding=1, groups=2))
    assert torch.allclose(maps[:, :, 1], one, atol=1e-6)


class Dilated(nn.Module):
    """Two stages, the second dilated, as in a segmenter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, 2, 1)
        self.conv1, self.norm1 = nn.Conv2d(20, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.conv2 = nn.Conv2d(20, 20, 3, padding=2, dilation=2)
        self.conv3 = nn.Conv2d(20, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(self.stem(x).relu())).relu()
        return self.head(self.conv3(self.conv2(x).relu()).relu().mean((2, 3)))


def test_a_recipe_mixes_operators() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 24, 21)
    before = fdsurgery.testing.settle_(Dilated(), x).eval()
    recipe = parse_recipe(
        "swap:\n"
        "  - {where: {name: 'conv2'}, operator: fadc, with: {low_band: true}}\n"
        "  - {where: {role: pointwise}, operator: fdconv, with: {kernel_num: 8}}\n"
    )
    after = fdsurgery.convert(copy.deepcopy(before), recipe, example_inputs=x)
    assert [type(one).__name__ for one in (after.conv1, after.conv2, after.conv3)] == [
        "Conv2d",
        "FADConv2d",
        "FDConv2d",
    ]
    assert fdsurgery.verify(before, after, x).ok
    restored = fdsurgery.restore(perturb_(after))
    assert type(restored.conv2) is nn.Conv2d and restored.conv2.dilation == (2, 2)


# Placements


def planned(model: nn.Module, recipe: Any, size: int = 96, **given: Any) -> Any:
    return fdsurgery.plan(model, recipe, example_inputs=torch.empty(1, 3, size, size, device="meta"), **given)


@pytest.mark.long
def test_a_resnet50_gains_as_many_parameters_as_the_authors() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("resnet50")
        plan = planned(model, "fadc_resnet", 256)
        stages: dict[str, int] = dict.fromkeys(("layer1", "layer2", "layer3", "layer4"), 0)
        for decision in planned(model, parse_recipe("swap: [{where: {name: '*.conv2'}, operator: fadc}]")).swaps:
            stages[decision.site.name.partition(".")[0]] += decision.parameters_added
        assert fdsurgery.plan(model).recipe == "resnet", "it is asked for by name"
    assert len(plan.swaps) == 13 and plan.parameters_added == 926_377
    assert sum(stages.values()) == 968_272 and stages["layer3"] + stages["layer4"] == 814_965
    # At 256 px: 90 products for offsets and masks, and 36 for sampling, of each channel and position of the outputs,
    # of which stage 2 has 4 layers of 32x32 with 128 channels, and so on.
    points = 4 * 128 * 32**2 + 6 * 256 * 16**2 + 3 * 512 * 8**2
    groups = 4 * 32**2 + 6 * 16**2 + 3 * 8**2
    counted = [decision.multiply_adds_by_component for decision in plan.swaps]
    assert sum(one["dilation"] for one in counted) == 90 * points
    assert sum(one["sampling"] for one in counted) == 36 * points + 72 * groups


@pytest.mark.long
def test_dilated_networks_are_placed_by_name() -> None:
    import timm
    import torchvision

    with torch.device("meta"):
        stretched = timm.create_model("resnet50", output_stride=8)
        segmenter = torchvision.models.segmentation.deeplabv3_resnet50(None, weights_backbone=None, aux_loss=True)
        mixed = parse_recipe("extends: fadc\nswap: [{where: {role: pointwise, name: '*layer4.*'}, operator: fdconv}]")
        plans = [planned(stretched, "fadc"), planned(segmenter, "fadc"), planned(segmenter, mixed)]
    assert [len(plan.swaps) for plan in plans[:2]] == [9, 12] and plans[0].parameters_added == 814_965
    dilations = {one.site.name: one.site.dilation[0] for one in plans[1].swaps}
    assert set(dilations.values()) == {1, 2, 4, 12, 24, 36}
    assert all(name.startswith(("backbone.layer3.", "backbone.layer4.", "classifier.0.convs.")) for name in dilations)
    operators = {one.site.name: one.operator for one in plans[2].swaps}
    assert {operators[name] for name in dilations} == {"fadc"}
    assert operators["backbone.layer4.1.conv1"] == operators["backbone.layer4.1.conv3"] == "fdconv"


@pytest.mark.long
def test_a_dilated_network_computes_what_it_did() -> None:
    import timm

    torch.manual_seed(0)
    x = torch.randn(2, 3, 97, 64)
    before = fdsurgery.testing.settle_(timm.create_model("resnet26", output_stride=8, num_classes=10), x).eval()
    recipe = parse_recipe("extends: fadc\nswap: [{where: {role: pointwise, name: 'layer4.*'}, operator: fdconv}]")
    after = fdsurgery.convert(copy.deepcopy(before), recipe, example_inputs=x)
    assert fdsurgery.verify(before, after, x).ok and error(after(x), before(x)) < 2e-6

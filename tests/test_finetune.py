"""Fine-tuning: groups, layer-wise decay, freezing, and optimizers that are older than the conversion."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import timm
import torch
from models import CASES, small_segformer
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import fdsurgery
from fdconv import FDConfig, FDConv2d, FDLinear
from fdsurgery import SurgeryError, UnsupportedModelError
from fdsurgery.recipe import parse_recipe

LR, WEIGHT_DECAY = 1e-3, 0.05
SCALED = parse_recipe("extends: generic\nfinetune: {spectrum_lr_scale: 0.5, modulation_lr_scale: 10}")
MODULATION = ("*KSM_*", "*FBM.*")


class Net(nn.Module):
    """Two layers that a conversion swaps, and static ones before, between and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.stem(x).relu()).relu())
        return self.head(self.second(x).relu().mean((2, 3)))


def batch() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def convert(model: nn.Module, **settings: Any) -> nn.Module:
    return fdsurgery.convert(model, "generic", example_inputs=batch().to(next(model.parameters())), **settings)


def described(groups: list[dict[str, Any]], model: nn.Module) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of every parameter, by name; fails for one that is in two groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    listed = [names[parameter] for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    return {names[parameter]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}


# Groups --------------------------------------------------------------------------------------------------------------


def test_every_parameter_is_in_the_group_it_belongs_to() -> None:
    model = convert(net(), kernel_num=4, band_edges="learned")
    groups = fdsurgery.param_groups(model, LR, WEIGHT_DECAY, recipe=SCALED)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups} == {
        "other": ["stem.weight", "head.weight"],
        "other, no decay": ["stem.bias", "first.bias", "norm.weight", "norm.bias", "second.bias", "head.bias"],
        "spectrum": ["first.dft_weight", "second.dft_weight"],
        "modulation": [
            *("first.KSM_Global." + name for name in (
                "fc.weight", "channel_fc.weight", "filter_fc.weight", "spatial_fc.weight", "kernel_fc.weight",
            )),
            "first.KSM_Local.conv.weight",
            *(f"first.FBM.freq_weight_conv_list.{band}.weight" for band in range(3)),
            *(f"second.KSM_Global.{name}.weight" for name in ("fc", "channel_fc", "filter_fc", "kernel_fc")),
            "second.KSM_Local.conv.weight",
        ],
        "modulation, no decay": [
            *("first.KSM_Global." + name for name in (
                "bn.weight", "bn.bias", "relu.scale", "relu.bias",
                "channel_fc.bias", "filter_fc.bias", "spatial_fc.bias", "kernel_fc.bias",
            )),
            "first.KSM_Local.norm.weight", "first.KSM_Local.norm.bias",
            *(f"first.FBM.freq_weight_conv_list.{band}.bias" for band in range(3)),
            "first.FBM.edges.edge",
            *("second.KSM_Global." + name for name in (
                "bn.weight", "bn.bias", "relu.scale", "relu.bias",
                "channel_fc.bias", "filter_fc.bias", "kernel_fc.bias",
            )),
            "second.KSM_Local.norm.weight", "second.KSM_Local.norm.bias",
        ],
    }  # fmt: skip
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "other": (LR, WEIGHT_DECAY),
        "other, no decay": (LR, 0.0),
        "spectrum": (LR * 0.5, WEIGHT_DECAY),
        "modulation": (LR * 10, WEIGHT_DECAY),
        "modulation, no decay": (LR * 10, 0.0),
    }


def test_without_a_section_all_rates_are_the_same() -> None:
    groups = fdsurgery.param_groups(convert(net()), LR, WEIGHT_DECAY)
    assert {group["lr"] for group in groups} == {LR} and len(groups) == 5


def test_frozen_parameters_are_left_out_and_shared_ones_listed_once() -> None:
    model = net()
    model.again = model.first
    model.tied = nn.Linear(12, 4)
    model.tied.weight = model.head.weight
    convert(model)
    assert isinstance(model.first, FDConv2d) and model.again is model.first
    model.stem.requires_grad_(False)
    model.first.dft_weight.requires_grad_(False)
    found = described(fdsurgery.param_groups(model, LR, WEIGHT_DECAY), model)
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_norms_of_several_axes_are_not_decayed() -> None:
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4)), nn.Linear(4, 4))
    found = described(fdsurgery.param_groups(model, LR, WEIGHT_DECAY), model)
    assert {name: decay for name, (_, decay) in found.items() if decay} == {"2.weight": WEIGHT_DECAY}


def test_wrapped_models_give_the_groups_of_the_model() -> None:
    model = meta("vit_tiny_patch16_224")
    expected = fdsurgery.param_groups(model, LR, WEIGHT_DECAY, layer_decay=0.75)
    compiled = torch.compile(nn.DataParallel(model))
    assert fdsurgery.param_groups(compiled, LR, WEIGHT_DECAY, layer_decay=0.75) == expected


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_an_optimizer_takes_the_groups_and_a_scheduler_keeps_their_ratios(optimizer: Any) -> None:
    model = convert(net().double())
    before = copy.deepcopy(model.state_dict())
    made = optimizer(fdsurgery.param_groups(model, LR, WEIGHT_DECAY, recipe=SCALED), lr=7.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(made, 10)
    for _ in range(2):  # the modulation's first maps move once its heads have
        made.zero_grad()
        model(batch().double()).square().mean().backward()
        made.step()
    scheduler.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    rates = {group["name"]: group["lr"] for group in made.param_groups}
    assert rates["modulation"] == pytest.approx(20 * rates["spectrum"])
    assert rates["other"] == pytest.approx(LR * (1 + math.cos(math.pi / 10)) / 2)


# Layer-wise decay ----------------------------------------------------------------------------------------------------


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


LAYERED = [
    "resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "levit_128s", "regnety_002",
    "pit_ti_224",  # has no group_matcher: timm counts its parameters
]  # fmt: skip


def of_timm(model: Any) -> dict[str, tuple[float, float]]:
    """What timm gives a model's parameters, in our terms."""
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_layer_decay(model, WEIGHT_DECAY, no_weight_decay_list=listed, layer_decay=0.75)
    return described([{**group, "lr": LR * group["lr_scale"]} for group in groups], model)


@pytest.mark.parametrize("name", LAYERED)
def test_plain_models_get_what_timm_gives_them(name: str) -> None:
    model = meta(name)
    groups = fdsurgery.param_groups(model, LR, WEIGHT_DECAY, layer_decay=0.75)
    assert described(groups, model) == of_timm(model)
    assert all("lr_scale" not in group for group in groups)


@pytest.mark.parametrize("name", LAYERED)
def test_dynamic_layers_get_what_the_plain_ones_got_times_the_factor(name: str) -> None:
    model = meta(name)
    expected = of_timm(model)
    fdsurgery.convert(model)
    groups = fdsurgery.param_groups(model, LR, WEIGHT_DECAY, recipe=SCALED, layer_decay=0.75)
    found = described(groups, model)
    layers = {prefix for prefix, module in model.named_modules() if isinstance(module, (FDConv2d, FDLinear))}
    assert layers and set(found) == {parameter for parameter, _ in model.named_parameters()}
    for parameter, (lr, decay) in found.items():
        layer = next((layer for layer in layers if parameter.startswith(f"{layer}.")), None)
        if layer is None or parameter == f"{layer}.bias":
            assert (lr, decay) == expected[parameter]
        else:
            plain, scale = expected[f"{layer}.weight"][0], 0.5 if parameter.endswith("dft_weight") else 10
            assert lr == plain * scale
    assert len({group["name"] for group in groups}) == len(groups)
    assert {group["name"].split(",")[0] for group in groups} == {f"layer {i}" for i in range(len({*of_depths(groups)}))}


def of_depths(groups: list[dict[str, Any]]) -> set[float]:
    scales = {"spectrum": 0.5, "modulation": 10.0, "other": 1.0}
    return {round(group["lr"] / scales[group["name"].split(", ")[1]], 12) for group in groups}


def test_no_weight_decay_of_the_model_is_respected() -> None:
    model = fdsurgery.convert(meta("swin_tiny_patch4_window7_224"))
    for layer_decay in (None, 0.75):
        found = described(fdsurgery.param_groups(model, LR, WEIGHT_DECAY, layer_decay=layer_decay), model)
        tables = {name: decay for name, (_, decay) in found.items() if "relative_position_bias_table" in name}
        assert tables and set(tables.values()) == {0.0}
        assert found["layers.0.blocks.0.attn.qkv.weight"][1] == WEIGHT_DECAY


def test_frozen_layers_do_not_shift_the_others() -> None:
    model = fdsurgery.convert(meta("resnet18"))
    whole = described(fdsurgery.param_groups(model, LR, WEIGHT_DECAY, layer_decay=0.75), model)
    trained = fdsurgery.freeze(model, ["layer4.*", "fc.*"])
    found = described(fdsurgery.param_groups(model, LR, WEIGHT_DECAY, layer_decay=0.75), model)
    assert found == {name: whole[name] for name in trained}


def test_timms_factory_and_scheduler_keep_the_rates() -> None:
    model = convert(net())

    def grouped(model: nn.Module) -> list[dict[str, Any]]:
        return fdsurgery.param_groups(model, LR, WEIGHT_DECAY, recipe=SCALED)

    optimizer = create_optimizer_v2(model, "adamw", lr=LR, weight_decay=WEIGHT_DECAY, param_group_fn=grouped)
    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    scheduler.step(5)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates["modulation"] == (pytest.approx(LR * 10 / 2), WEIGHT_DECAY)
    assert rates["spectrum"] == (pytest.approx(LR / 4), WEIGHT_DECAY)
    assert rates["other, no decay"] == (pytest.approx(LR / 2), 0.0)


def test_a_model_without_layers_is_an_error_with_a_remedy_that_works() -> None:
    with torch.device("meta"):
        model: Any = small_segformer()
    with pytest.raises(UnsupportedModelError, match=r"SegformerForSemanticSegmentation does not tell .*group_matcher"):
        fdsurgery.param_groups(model, LR, WEIGHT_DECAY, layer_decay=0.75)
    model.group_matcher = lambda coarse=False: {"stem": r"^segformer", "head": r"^decode_head"}
    found = described(fdsurgery.param_groups(model, LR, WEIGHT_DECAY, layer_decay=0.5), model)
    assert {name.split(".")[0]: lr for name, (lr, _) in found.items()} == {"segformer": LR / 2, "decode_head": LR}
    for wrong in (0, 1.1, -0.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            fdsurgery.param_groups(model, LR, WEIGHT_DECAY, layer_decay=wrong)


# What rates and decays mean for a spectrum ---------------------------------------------------------------------------

SHAPES = [(8, 8, 3), (16, 4, 1), (6, 10, 3), (5, 7, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES)


def pair(shape: tuple[int, int, int]) -> tuple[nn.Conv2d, FDConv2d]:
    torch.manual_seed(0)
    plain = nn.Conv2d(*shape, bias=False).double()
    return plain, FDConv2d.from_conv(plain, FDConfig(kernel_num=4))


def counted(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The half spectrum of a weight's image, and how many coefficients of the whole one each column stands for."""
    image = weight.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    count = torch.full((image.shape[1] // 2 + 1,), 2.0, dtype=torch.float64)
    count[0] = 1
    if image.shape[1] % 2 == 0:
        count[-1] = 1
    return torch.fft.rfft2(image), count


def slowness(shape: tuple[int, int, int]) -> float:
    channels, filters, k = shape
    return channels * filters * k * k / (2 * (min(channels, filters) // 2) ** 2)


@shapes
def test_decay_apart_from_the_gradient_is_that_of_the_weight(shape: tuple[int, int, int]) -> None:
    plain, layer = pair(shape)
    for parameter in (plain.weight, layer.dft_weight):
        parameter.grad = torch.zeros_like(parameter)
        torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(layer.weight + 0, plain.weight * 1.0)


@shapes
def test_decay_in_the_gradient_is_another_objective(shape: tuple[int, int, int]) -> None:
    plain, layer = pair(shape)
    spectrum, count = counted(plain.weight.detach())
    energy = (spectrum.abs().square() * count).sum(0) / plain.weight[:, 0].numel() / shape[0]
    assert float(energy.sum()) == pytest.approx(float(plain.weight.detach().square().sum()))
    expected = slowness(shape) * (energy.sum() + energy[count == 1].sum())
    assert float(layer.dft_weight.detach().square().sum()) == pytest.approx(float(expected))


@shapes
def test_the_steps_of_sgd_are_smaller_by_a_known_factor(shape: tuple[int, int, int]) -> None:
    plain, layer = pair(shape)
    target = torch.randn_like(plain.weight)
    moved = []
    for parameter, weight in ((plain.weight, lambda: plain.weight), (layer.dft_weight, lambda: layer.weight)):
        start = weight().detach() + 0
        (weight() * target).sum().backward()
        torch.optim.SGD([parameter], lr=0.1).step()
        moved.append(counted(weight().detach() - start))
    (expected, count), (found, _) = moved
    torch.testing.assert_close(found * slowness(shape), expected * count / 2)


def test_the_figures_for_adamw() -> None:
    torch.manual_seed(0)
    for plain, expected in (
        (nn.Conv2d(64, 64, 1), 1.4), (nn.Linear(64, 256), 2.8), (nn.Linear(256, 64), 2.8), (nn.Conv2d(64, 64, 3), 4.2)
    ):  # fmt: skip
        layer = FDConv2d.from_conv(plain) if isinstance(plain, nn.Conv2d) else FDLinear.from_linear(plain)
        ratio = float(layer.dft_weight.detach().square().mean().sqrt() / plain.weight.detach().square().mean().sqrt())
        assert ratio == pytest.approx(expected, rel=0.05)


# Freezing ------------------------------------------------------------------------------------------------------------


def training(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_modulation_is_what_the_authors_list_means() -> None:
    model = CASES["timm resnet18"].settled()[0]
    fdsurgery.convert(model)
    expected = [name for name, _ in model.named_parameters() if "KSM" in name or "FBM" in name]
    assert len(expected) > 16 and fdsurgery.freeze(model, "modulation") == expected == training(model)
    assert fdsurgery.freeze(model, ["*KSM*", "*FBM*"]) == expected == training(model)


def test_each_selection_trains_what_it_says() -> None:
    model = convert(net())
    names = [name for name, _ in model.named_parameters()]
    assert fdsurgery.freeze(model, "fdconv") == training(model) == [n for n in names if n.startswith(("first", "sec"))]
    assert "first.bias" in training(model)
    assert fdsurgery.freeze(model, "all") == training(model) == names
    chosen = ["head.*", "modulation"]
    expected = [n for n in names if n.startswith("head") or any(fnmatchcase(n, pattern) for pattern in MODULATION)]
    assert fdsurgery.freeze(model, chosen) == training(model) == expected
    assert fdsurgery.freeze(model, "norm.bias") == training(model) == ["norm.bias"]
    model.again = model.head
    assert fdsurgery.freeze(model, "again.*") == training(model) == ["head.weight", "head.bias"]


def test_only_what_trains_has_gradients_and_moves() -> None:
    model = convert(net())
    trained = fdsurgery.freeze(model, ["modulation", "head.*"])
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(fdsurgery.param_groups(model, LR, WEIGHT_DECAY))
    for _ in range(2):  # as above
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == trained
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"]), "statistics are not parameters"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("modulatoin", r"no parameter matches 'modulatoin', .*did you mean 'modulation'\?"),
        (["modulation", "haed.weight"], r"no parameter matches 'haed.weight', .*did you mean 'head.weight'"),
        ([], "nothing would train: give one or more of modulation, fdconv, all"),
    ],
)
def test_what_means_nothing_is_an_error(train: Any, message: str) -> None:
    model = convert(net())
    model.stem.requires_grad_(False)
    before = training(model)
    with pytest.raises(SurgeryError, match=message):
        fdsurgery.freeze(model, train)
    assert training(model) == before


def test_a_selection_of_nothing_says_why() -> None:
    with pytest.raises(SurgeryError, match="no dynamic layer; convert it first"):
        fdsurgery.freeze(net(), "fdconv")
    with pytest.raises(SurgeryError, match="the dynamic layers have no modulation"):
        fdsurgery.freeze(convert(net(), ksm_global=False, ksm_local=False, fbm_kernel_sizes=()), "modulation")


# Optimizers that are older than the conversion -----------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adadelta": lambda groups: torch.optim.Adadelta(groups, lr=1.0),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05, initial_accumulator_value=0.1),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.01, foreach=True),
    "Adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "ASGD": lambda groups: torch.optim.ASGD(groups, lr=0.05),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.9),
    "Rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
    "timm's LAMB": lambda groups: create_optimizer_v2(groups, "lamb", lr=0.01),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - torch.linspace(-1, 1, 4, dtype=x.dtype)).square().mean().backward()
    optimizer.step()


def two_groups(model: Net) -> list[dict[str, Any]]:
    """Biases apart, and the later layers at another rate."""
    late = [model.second.weight, model.head.weight]
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    early = [model.stem.weight, model.first.weight, model.norm.weight]
    return [{"params": early}, {"params": late, "lr": 0.003}, {"params": biases}]


def trained_pair(name: str) -> tuple[tuple[Net, torch.optim.Optimizer], tuple[Net, torch.optim.Optimizer]]:
    """A model that was converted between its third step and its fourth, and a twin that was not."""
    model = net().double()
    optimizer = OPTIMIZERS[name](two_groups(model))
    for _ in range(3):
        step(model, optimizer, batch().double())
    twin = copy.deepcopy(model)
    twin_optimizer = OPTIMIZERS[name](two_groups(twin))
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = dict(model.named_parameters())
    convert(model, kernel_num=4)
    assert fdsurgery.optimizer_after_surgery(optimizer, model, before) is optimizer
    return (model, optimizer), (twin, twin_optimizer)


STATIC = ["stem.*", "norm.*", "head.*", "first.bias", "second.bias"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 3], ids=["a step of everything", "steps while the swapped weights rest"])
def test_untouched_parameters_go_on_as_if_nothing_had_happened(name: str, steps: int) -> None:
    """Both compute the same until their swapped layers move, and from then on each learns for itself."""
    (model, optimizer), (twin, twin_optimizer) = trained_pair(name)
    start = copy.deepcopy(model.state_dict())
    if steps > 1:
        assert fdsurgery.freeze(model, STATIC) == fdsurgery.freeze(twin, STATIC)
    for _ in range(steps):
        x = batch().double()
        step(model, optimizer, x)
        step(twin, twin_optimizer, x)
    compared = [key for key, _ in model.named_parameters() if any(fnmatchcase(key, pattern) for pattern in STATIC)]
    assert len(compared) == 8
    for key in compared:
        moved, expected = (held.get_parameter(key).detach() - start[key] for held in (model, twin))
        assert expected.any(), key
        assert (moved - expected).norm() <= 1e-6 * expected.norm(), key
    for key in ("first.dft_weight", "first.KSM_Global.kernel_fc.weight", "second.KSM_Local.conv.weight"):
        assert torch.equal(model.get_parameter(key), start[key]) == (steps > 1), key


def test_what_left_is_gone_and_what_came_is_in_its_group() -> None:
    model = net()
    loss_weight = nn.Parameter(torch.ones(1))
    groups = [*two_groups(model), {"params": [loss_weight], "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    step(model, optimizer, batch())
    scheduler.step()
    old, before = [*optimizer.param_groups], dict(model.named_parameters())
    gone = [model.first.weight, model.second.weight]  # a bias stays the parameter that it was
    moments = optimizer.state[model.first.bias]
    convert(model)
    fdsurgery.optimizer_after_surgery(optimizer, model, before)
    assert all(new is known for new, known in zip(optimizer.param_groups, old, strict=True))
    names = {loss_weight: "loss", **{parameter: name for name, parameter in model.named_parameters()}}
    held = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]

    def dynamic(layer: str) -> list[str]:
        return [name for name in names.values() if name.startswith(f"{layer}.") and name != f"{layer}.bias"]

    assert held == [
        ["stem.weight", *dynamic("first"), "norm.weight"],
        [*dynamic("second"), "head.weight"],
        ["stem.bias", "first.bias", "norm.bias", "second.bias", "head.bias"],
        ["loss"],
    ]
    assert not {*gone} & optimizer.state.keys()
    assert optimizer.state[model.first.bias] is moments
    assert not {model.first.dft_weight, model.second.dft_weight} & optimizer.state.keys()
    state = copy.deepcopy(optimizer.state_dict())
    fdsurgery.optimizer_after_surgery(optimizer, model, before)
    assert str(optimizer.state_dict()) == str(state), "a second call has nothing to do"
    step(model, optimizer, batch())
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2.5e-4, 7.5e-4, 2.5e-4, 0.125])
    torch.optim.AdamW(optimizer.param_groups).load_state_dict(optimizer.state_dict())


def test_adagrad_is_given_the_state_that_earlier_releases_make_only_once() -> None:
    model = net()
    optimizer = OPTIMIZERS["Adagrad"](two_groups(model))
    before = dict(model.named_parameters())
    convert(model)
    fdsurgery.optimizer_after_surgery(optimizer, model, before)
    assert optimizer.state.keys() == {*model.parameters()}
    expected = torch.full_like(model.first.dft_weight, 0.1)
    assert torch.equal(optimizer.state[model.first.dft_weight]["sum"], expected)


def test_an_optimizer_of_a_part_stays_one_of_that_part() -> None:
    model = net()
    optimizer = torch.optim.SGD([*model.head.parameters(), model.first.weight], lr=0.1)
    before = dict(model.named_parameters())
    convert(model)
    fdsurgery.optimizer_after_surgery(optimizer, model, before)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {*model.head.parameters(), *model.first.parameters()} - {model.first.bias}


def test_names_in_groups_follow() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    before = dict(model.named_parameters())
    convert(model)
    fdsurgery.optimizer_after_surgery(optimizer, model, before)
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(model.named_parameters())


def test_layers_that_compute_their_weight_are_found() -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model.first)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, batch())
    before = dict(model.named_parameters())
    convert(model)
    assert isinstance(model.first, FDConv2d) and "first.parametrizations.weight.original0" in before
    fdsurgery.optimizer_after_surgery(optimizer, model, before)
    assert {*optimizer.param_groups[0]["params"]} == {*model.parameters()}
    step(model, optimizer, batch())


def replaced_head(model: Net) -> None:
    convert(model)
    model.head = nn.Linear(12, 4)


@pytest.mark.parametrize(
    ("change", "of_optimizer", "of_before", "message"),
    [
        (convert, "other", "model", "holds no parameter of this model"),
        (convert, "model", "other", r"'stem.weight' is a new parameter, and `before` has none"),
        (lambda _: None, "model", "model", r"take `before = dict\(model.named_parameters\(\)\)` before the conversion"),
        (replaced_head, "model", "model", r"'head.weight' is a new parameter.*optimizer.add_param_group"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    change: Callable[[Any], Any], of_optimizer: str, of_before: str, message: str
) -> None:
    models = {"model": net(), "other": net()}
    optimizer = torch.optim.SGD(models[of_optimizer].parameters(), lr=0.1)
    before = dict(models[of_before].named_parameters())
    change(models["model"])
    held = [*optimizer.param_groups[0]["params"]]
    with pytest.raises(SurgeryError, match=message):
        fdsurgery.optimizer_after_surgery(optimizer, models["model"], before)
    assert all(now is then for now, then in zip(optimizer.param_groups[0]["params"], held, strict=True))


@pytest.mark.parametrize("name", ["LBFGS", "Muon"])
def test_optimizers_that_cannot_take_a_spectrum_are_refused(name: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    model = net()
    before = dict(model.named_parameters())
    optimizer = getattr(torch.optim, name)([model.head.weight])
    convert(model)
    with pytest.raises(SurgeryError, match=f"{name} .*make a new one after the conversion"):
        fdsurgery.optimizer_after_surgery(optimizer, model, before)

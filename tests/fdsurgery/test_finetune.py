"""Fine-tuning: groups, layer-wise decay, freezing, and optimizers that are older than the conversion."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import CASES, small_segformer
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdsurgery import SurgeryError, UnsupportedModelError
from fdsurgery.finetune import remembered
from fdsurgery.recipe import FineTune, parse_recipe

LR, WEIGHT_DECAY = 1e-3, 0.05
LAYERED_RECIPE = parse_recipe("extends: generic\nfinetune: {layer_decay: 0.75}")
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
    groups = fdsurgery.param_groups(model, LR, WEIGHT_DECAY)
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups}
    assert held["decay"] == [
        "stem.weight",
        "first.dft_weight",
        *(
            "first.KSM_Global." + name
            for name in ("fc.weight", "channel_fc.weight", "filter_fc.weight", "spatial_fc.weight", "kernel_fc.weight")
        ),
        "first.KSM_Local.conv.weight",
        *(f"first.FBM.freq_weight_conv_list.{band}.weight" for band in range(3)),
        "second.dft_weight",
        *(f"second.KSM_Global.{name}.weight" for name in ("fc", "channel_fc", "filter_fc", "kernel_fc")),
        "second.KSM_Local.conv.weight",
        "head.weight",
    ]
    rest = [name for name in names.values() if name not in held["decay"]]
    assert held["no decay"] == rest
    assert {"norm.weight", "head.bias", "first.bias", "first.FBM.edges.edge", "first.KSM_Local.norm.weight"} < {*rest}
    assert {f"first.KSM_Global.{name}.bias" for name in ("channel_fc", "spatial_fc", "kernel_fc", "relu")} < {*rest}
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "decay": (LR, WEIGHT_DECAY),
        "no decay": (LR, 0.0),
    }


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


def test_vectors_with_axes_of_length_one_are_not_decayed_and_matrices_of_one_row_are() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Conv2d(1, 4, 1, bias=False), nn.Embedding(1, 4))
    model.scale = nn.Parameter(torch.ones(4, 1, 1))
    model.response_norm = nn.Parameter(torch.zeros(1, 1, 1, 4))
    model.temperature = nn.Parameter(torch.ones(1, 1))
    model.table = nn.Parameter(torch.ones(2, 4))
    found = described(fdsurgery.param_groups(model, LR, WEIGHT_DECAY), model)
    assert {name for name, (_, decay) in found.items() if decay} == {"0.weight", "1.weight", "2.weight", "table"}


def test_wrapped_models_give_the_groups_of_the_model() -> None:
    model = meta("vit_tiny_patch16_224")
    expected = fdsurgery.param_groups(model, LR, WEIGHT_DECAY, layer_decay=0.75)
    compiled = torch.compile(nn.DataParallel(model))
    assert fdsurgery.param_groups(compiled, LR, WEIGHT_DECAY, layer_decay=0.75) == expected


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_an_optimizer_takes_the_groups_and_a_scheduler_keeps_their_ratios(optimizer: Any) -> None:
    model = convert(net().double())
    before = copy.deepcopy(model.state_dict())
    groups = fdsurgery.param_groups(model, LR, WEIGHT_DECAY)
    groups[1]["lr"] *= 10
    made = optimizer(groups, lr=7.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(made, 10)
    for _ in range(2):  # the modulation's first maps move once its heads have
        made.zero_grad()
        model(batch().double()).square().mean().backward()
        made.step()
    scheduler.step()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    rates = {group["name"]: group["lr"] for group in made.param_groups}
    assert rates["no decay"] == pytest.approx(10 * rates["decay"])
    assert rates["decay"] == pytest.approx(LR * (1 + math.cos(math.pi / 10)) / 2)


# Layer-wise decay ----------------------------------------------------------------------------------------------------


def meta(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except NotImplementedError:  # timm before 1.0.30 counts the widths of a RegNet on the default device
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
def test_dynamic_layers_get_what_the_plain_ones_got(name: str) -> None:
    model = meta(name)
    expected = of_timm(model)
    fdsurgery.convert(model)
    groups = fdsurgery.param_groups(model, LR, WEIGHT_DECAY, layer_decay=0.75)
    found = described(groups, model)
    layers = {prefix for prefix, module in model.named_modules() if isinstance(module, (FDConv2d, FDLinear))}
    assert layers and set(found) == {parameter for parameter, _ in model.named_parameters()}
    for parameter, (lr, decay) in found.items():
        layer = next((layer for layer in layers if parameter.startswith(f"{layer}.")), None)
        if layer is None or parameter == f"{layer}.bias":
            assert (lr, decay) == expected[parameter]
        else:
            assert lr == expected[f"{layer}.weight"][0]
            assert decay in (0.0, WEIGHT_DECAY)
    assert len({group["name"] for group in groups}) == len(groups)
    depths = {group["lr"] for group in groups}
    assert {group["name"].split(",")[0] for group in groups} == {f"layer {i}" for i in range(len(depths))}


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
        return fdsurgery.param_groups(model, LR, WEIGHT_DECAY)

    optimizer = create_optimizer_v2(model, "adamw", lr=LR, weight_decay=WEIGHT_DECAY, param_group_fn=grouped)
    scheduler = CosineLRScheduler(optimizer, t_initial=10)
    scheduler.step(5)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates == {"decay": (pytest.approx(LR / 2), WEIGHT_DECAY), "no decay": (pytest.approx(LR / 2), 0.0)}


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


# What a model remembers of its recipe ---------------------------------------------------------------------------------


def layered_net() -> Net:
    model = net()
    model.group_matcher = Matcher()
    return model


class Matcher:
    """As timm's models have it: which layer a parameter belongs to. A class, so that it can be copied."""

    def __call__(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stem", "blocks": r"^(?:first|norm|second)"}


def rates(model: nn.Module, **settings: Any) -> dict[str, float]:
    found = described(fdsurgery.param_groups(model, LR, WEIGHT_DECAY, **settings), model)
    return {name.partition(".")[0]: lr for name, (lr, _) in found.items()}


def test_the_recipes_layer_decay_is_remembered_and_the_callers_wins() -> None:
    model = fdsurgery.convert(layered_net(), LAYERED_RECIPE, example_inputs=batch())
    expected = rates(model, layer_decay=0.75)
    assert expected["stem"] < expected["first"] < expected["head"] == LR
    assert rates(model) == expected
    groups = [fdsurgery.param_groups(of, LR, WEIGHT_DECAY) for of in (model, torch.compile(model))]
    assert groups[0] == groups[1]
    assert rates(copy.deepcopy(model)) == expected
    assert set(rates(model, layer_decay=1.0).values()) == {LR}
    fdsurgery.restore(model)
    assert set(rates(model).values()) == {LR} and "fdsurgery_finetune" not in vars(model)


def test_a_recipe_without_the_section_leaves_nothing_in_the_model() -> None:
    model = convert(layered_net())
    assert vars(model).keys() == vars(layered_net()).keys() and set(rates(model).values()) == {LR}


def test_a_failed_conversion_leaves_the_memory_as_it_was() -> None:
    model = layered_net()
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(SurgeryError, match="no parameter of this model"):
        fdsurgery.convert(model, LAYERED_RECIPE, example_inputs=batch(), optimizers=optimizer)
    assert remembered(model) == FineTune() and type(model.first) is nn.Conv2d


def test_a_plan_carries_it_to_another_model() -> None:
    plan = fdsurgery.plan(net(), LAYERED_RECIPE, example_inputs=batch())
    plan = fdsurgery.Plan.from_dict(plan.to_dict())
    assert plan.finetune == FineTune(layer_decay=0.75)
    earlier = {key: value for key, value in plan.to_dict().items() if key != "finetune"}
    assert fdsurgery.Plan.from_dict(earlier).finetune == FineTune(), "plans of 0.1 do not say"
    later = {**plan.to_dict(), "finetune": {"spectrum_lr_scale": 3.0}}
    assert fdsurgery.Plan.from_dict(later).finetune == FineTune(), "what no longer counts is passed over"
    with pytest.raises(SurgeryError, match=r"damaged: finetune: .*layer_decay must be above 0"):
        fdsurgery.Plan.from_dict({**plan.to_dict(), "finetune": {"layer_decay": 3.0}})
    with pytest.raises(SurgeryError, match="damaged: finetune"):
        fdsurgery.Plan.from_dict({**plan.to_dict(), "finetune": 3})


def test_it_is_saved_with_the_model(tmp_path: Path) -> None:
    recipe = parse_recipe("extends: convnext\nfinetune: {layer_decay: 0.5}")
    model = fdsurgery.convert(timm.create_model("test_convnext"), recipe)
    fdsurgery.save(model, tmp_path / "timm")
    assert rates_of(fdsurgery.load(tmp_path / "timm")) == rates_of(model)
    named = timm.create_model("test_convnext.fdconv", pretrained_cfg_overlay=None)
    assert remembered(named) == FineTune(), "the shipped recipes say nothing"
    assert remembered(timm.create_model(f"local-dir:{tmp_path / 'timm'}")) == FineTune(layer_decay=0.5)


def rates_of(model: nn.Module) -> set[float]:
    found = {group["lr"] for group in fdsurgery.param_groups(model, LR, WEIGHT_DECAY)}
    assert len(found) > 3
    return found


@pytest.mark.parametrize("damage", [3, {"layer_decay": 0}, {"layer_decay": "x"}, {"layer_decay": float("nan")}])
def test_a_damaged_section_is_refused(damage: Any, tmp_path: Path) -> None:
    import json

    fdsurgery.save(fdsurgery.convert(timm.create_model("test_convnext")), tmp_path / "saved")
    path = tmp_path / "saved" / "fdsurgery.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**description, "finetune": {"modulation_lr_scale": 10}}), encoding="utf-8")
    assert remembered(fdsurgery.load(tmp_path / "saved")) == FineTune()
    path.write_text(json.dumps({**description, "finetune": damage}), encoding="utf-8")
    with pytest.raises(SurgeryError, match=r"is damaged: .*(mapping|layer_decay)"):
        fdsurgery.load(tmp_path / "saved")


def test_a_transformers_model_tells_it_in_its_config(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = small_segformer()
    recipe = parse_recipe("extends: segformer\nfinetune: {layer_decay: 0.5}")
    fdsurgery.convert(model, recipe)
    model.save_pretrained(tmp_path)
    assert remembered(fdsurgery.from_pretrained(tmp_path)) == FineTune(layer_decay=0.5)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert remembered(backbone) == FineTune(layer_decay=0.5)
    fdsurgery.restore(model)
    assert remembered(model) == FineTune() and not hasattr(model.config, "quantization_config")


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
        ("modulatoin", r"no parameter matches 'modulatoin', .*did you mean 'modulation'"),
        (["modulation", "haed.weight"], r"no parameter matches 'haed.weight', .*did you mean 'head.weight'"),
        ([], "nothing would train: give one or more of modulation, dynamic, all"),
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


def test_one_call_converts_the_model_and_its_optimizers() -> None:
    twin, model = net(), net()
    made = [torch.optim.AdamW(two_groups(of), lr=0.01) for of in (twin, model)]
    torch.manual_seed(1)
    for of, optimizer in zip((twin, model), made, strict=True):
        torch.manual_seed(1)
        step(of, optimizer, batch())
    before = dict(twin.named_parameters())
    convert(twin)
    fdsurgery.optimizer_after_surgery(made[0], twin, before)
    loss = torch.optim.SGD([model.head.bias, nn.Parameter(torch.ones(1))], lr=0.1)
    plan = fdsurgery.plan(model, "generic", example_inputs=batch())
    assert fdsurgery.apply(plan, model, optimizers=(made[1], loss)) is model
    assert str(made[1].state_dict()) == str(made[0].state_dict())
    step(model, made[1], batch())
    assert loss.param_groups[0]["params"][0] is model.head.bias and not loss.state


def test_graphs_and_their_optimizers_are_converted_in_one_call() -> None:
    model = net()
    exported = torch.export.export(model, (batch(),)).module()
    optimizer = torch.optim.SGD(exported.parameters(), lr=0.1, momentum=0.9)
    step(exported, optimizer, batch())
    convert(exported, optimizers=optimizer)
    assert isinstance(exported.first, FDConv2d)
    assert {*optimizer.param_groups[0]["params"]} == {*exported.parameters()}
    step(exported, optimizer, batch())


def contents(optimizer: torch.optim.Optimizer) -> tuple[list[list[int]], str]:
    return [[id(one) for one in group["params"]] for group in optimizer.param_groups], str(optimizer.state_dict())


class Runner:
    """Holds a layer and does not show it."""

    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class OutOfReach(Net):
    """Calls a layer where it cannot be replaced, which shows once it has been."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = Runner(self.second)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.runner.layer(self.norm(self.first(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("model_class", "second", "message"),
    [(Net, "of another model", "holds no parameter of this model"), (OutOfReach, "none", "'second' is never called")],
)
def test_no_optimizer_changes_if_the_conversion_fails(model_class: type[Net], second: str, message: str) -> None:
    model = model_class()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01)]
    step(model, optimizers[0], batch())
    if second != "none":
        optimizers.append(torch.optim.AdamW(nn.Linear(3, 3).parameters()))
    before, held, state = contents(optimizers[0]), [*model.parameters()], copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError, match=message):
        convert(model, optimizers=optimizers)
    assert contents(optimizers[0]) == before and type(model.first) is nn.Conv2d
    assert all(now is then for now, then in zip(model.parameters(), held, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def by_hand(model: nn.Module, decay: Callable[[str, nn.Parameter], bool], **more: Any) -> list[dict[str, Any]]:
    """Groups as people write them: what is decayed, and what is not."""
    chosen: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        chosen[decay(name, parameter)].append(parameter)
    return [{"params": chosen[True], "weight_decay": 0.1}, {"params": chosen[False], "weight_decay": 0.0, **more}]


def test_what_needs_no_decay_goes_to_the_group_without() -> None:
    model = net()
    optimizer = torch.optim.AdamW(by_hand(model, lambda _, one: one.dim() > 1), lr=0.01)
    convert(model, optimizers=optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    expected = fdsurgery.param_groups(model, 0.01, 0.1)
    assert held == [[names[parameter] for parameter in group["params"]] for group in expected]


@pytest.mark.parametrize("groups", ["one", "another rate", "another decay"])
def test_where_no_group_without_decay_fits_all_stay_with_the_weight(groups: str) -> None:
    model = net()
    given: Any = by_hand(model, lambda _, one: one.dim() > 1)
    if groups == "one":
        given = model.parameters()
    elif groups == "another rate":
        given[1]["lr"] = 0.5
    else:
        given[1]["weight_decay"] = 0.01
    optimizer = torch.optim.AdamW(given, lr=0.01, weight_decay=0.1)
    convert(model, optimizers=optimizer)
    assert {*model.first.parameters()} - {model.first.bias} < {*optimizer.param_groups[0]["params"]}


@pytest.mark.parametrize("how", ["parameters", "groups", "param_groups"])
def test_the_state_fits_an_optimizer_that_is_made_anew_in_the_same_way(how: str) -> None:
    def made(model: nn.Module) -> torch.optim.Optimizer:
        groups: Any = {
            "parameters": lambda: model.parameters(),
            "groups": lambda: by_hand(model, lambda _, one: one.dim() > 1),
            "param_groups": lambda: fdsurgery.param_groups(model, 0.01, 0.1),
        }[how]()
        return torch.optim.AdamW(groups, lr=0.01)

    model = net()
    optimizer = made(model)
    convert(model, optimizers=optimizer)
    step(model, optimizer, batch())
    fresh = made(model)
    assert [group["params"] for group in fresh.param_groups] == [group["params"] for group in optimizer.param_groups]


def test_an_order_of_ones_own_is_kept() -> None:
    model = net()
    optimizer = torch.optim.SGD([*reversed([*model.parameters()])], lr=0.1)
    convert(model, optimizers=optimizer)
    held = optimizer.param_groups[0]["params"]
    assert held[0] is model.head.bias and held[-1] is model.stem.weight
    names = {parameter: name for name, parameter in model.named_parameters()}
    shown = [names[parameter].partition(".")[0] for parameter in held]
    assert shown == sorted(shown, key=["head", "second", "norm", "first", "stem"].index)


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

"""KernelWarehouse in whole models: what layers share is one parameter, whatever is done to some of them."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import distance, perturb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fdsurgery
from fdsurgery.checkpoints import convert_checkpoint
from fdsurgery.operators import get_operator, operator_of
from fdsurgery.operators.kernel_warehouse_layers import KernelWarehouseLayer
from fdsurgery.recipe import parse_recipe

OPERATOR: Any = get_operator("kernel_warehouse")
TEXT = """
swap:
  - where: {kind: conv, name: "*.conv[12]"}
    operator: kernel_warehouse
    with: {ratio: 2, min_channels: 4}
"""
X = torch.randn(2, 3, 10, 9, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu()).relu()


class Net(nn.Module):
    """Two stages of two blocks; a block of the second is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stage1 = nn.Sequential(Block(16, 16), Block(16, 16))
        self.stage2 = nn.Sequential(Block(16, 32), Block(32, 32))
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x).relu()))
        return self.head(self.norm(x + self.stage2[1](x)).mean((2, 3)))


def build() -> Net:
    return Net()


def plain(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    return fdsurgery.testing.settle_(Net(), X).to(dtype).eval()


def converted(model: Any = None, text: str = TEXT) -> Any:
    model = plain() if model is None else model
    return fdsurgery.convert(model, parse_recipe(text), example_inputs=X.to(model.stem.weight))


def trained() -> Any:
    return perturb(converted())


def owners(model: nn.Module) -> list[str]:
    return [name.removesuffix(".cells") for name, _ in model.named_parameters() if name.endswith(".cells")]


def warehouses(model: nn.Module) -> set[Any]:
    return {layer.warehouse for layer in model.modules() if isinstance(layer, KernelWarehouseLayer)}


# 1: a swap follows from the set and the order of the sites


def told(plan: fdsurgery.Plan) -> dict[str, tuple[Any, ...]]:
    keys = ("warehouse", "first", "start", "places", "cells")
    return {one.site.name: tuple(one.settings[key] for key in keys) for one in plan.swaps}


def test_a_plan_tells_the_warehouses_and_is_resolved_anew() -> None:
    plan = fdsurgery.plan(plain(), parse_recipe(TEXT), example_inputs=X)
    first, second = ("stage1", "stage1.0.conv1"), ("stage2", "stage2.0.conv1")
    assert told(plan) == {
        "stage1.0.conv1": (*first, 0, 9, 40),
        "stage1.0.conv2": (*first, 18, 1, 40),
        "stage1.1.conv1": (*first, 20, 9, 40),
        "stage1.1.conv2": (*first, 38, 1, 40),
        "stage2.0.conv1": (*second, 0, 9, 62),
        "stage2.0.conv2": (*second, 18, 2, 62),
        "stage2.1.conv1": (*second, 22, 18, 62),
        "stage2.1.conv2": (*second, 58, 2, 62),
    }
    assert plan.swaps[4].settings["cell_shape"] == [32, 16, 1, 1]
    edited = plan.exclude("stage1.0.conv1", reason="kept").exclude("stage2.1.*", reason="kept")
    assert told(edited) == {
        "stage1.0.conv2": ("stage1", "stage1.0.conv2", 0, 1, 22),
        "stage1.1.conv1": ("stage1", "stage1.0.conv2", 2, 9, 22),
        "stage1.1.conv2": ("stage1", "stage1.0.conv2", 20, 1, 22),
        "stage2.0.conv1": (*second, 0, 9, 22),
        "stage2.0.conv2": (*second, 18, 2, 22),
    }
    for one in (plan, edited, fdsurgery.Plan.from_dict(json.loads(json.dumps(edited.to_dict())))):
        model = fdsurgery.apply(one, plain())
        added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain().parameters())
        assert one.parameters_added == added, "what an edited plan says it costs"
        assert fdsurgery.verify(plain(), model, X).ok
        for decision in one.swaps:
            settings = operator_settings(model, decision.site.name)
            assert settings == decision.settings
            mixing = decision.site.calls * settings["cells"] * decision.site.multiply_adds
            positions = 90 * decision.site.calls
            assert decision.multiply_adds_by_component["mixing"] * positions == mixing


def operator_settings(model: nn.Module, name: str) -> dict[str, Any]:
    found: dict[str, Any] = OPERATOR.settings_of(model.get_submodule(name))
    return found


def test_two_conversions_of_one_model_make_warehouses_of_their_own(tmp_path: Path) -> None:
    model = converted(text=TEXT.replace("conv[12]", "conv1"))
    converted(model, TEXT.replace("conv[12]", "conv2"))
    assert owners(model) == ["stage1.0.conv1", "stage1.0.conv2", "stage2.0.conv1", "stage2.0.conv2"]
    perturb(model)
    source = fdsurgery.ModelSource("file", "models.py:build")
    loaded = fdsurgery.load(fdsurgery.save(model, tmp_path / "saved", source=source), model=build())
    assert owners(loaded) == owners(model) and torch.equal(loaded(X), model(X))


# 2: one parameter with many users


def test_the_cells_are_met_once() -> None:
    model = trained()
    assert owners(model) == ["stage1.0.conv1", "stage2.0.conv1"] and len(warehouses(model)) == 2
    assert [key for key in model.state_dict() if key.endswith(".cells")] == [f"{one}.cells" for one in owners(model)]
    assert all(f"{name}.assigned_cells" in model.state_dict() for name in fdsurgery.dynamic_layers(model))
    assert len(fdsurgery.dynamic_layers(model)) == 8
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    cells = model.stage1[0].conv1.cells
    before = cells.detach().clone()
    model.train()(X).square().sum().backward()
    used = cells.grad.flatten(1).abs().sum(1) > 0
    assert used.all()
    optimizer.step()
    assert torch.allclose(cells, before - 0.01 * cells.grad)
    follower = model.stage1[1].conv1
    assert follower._stored() is cells and follower.weight.requires_grad
    assert not any(parameter is cells for parameter in follower.parameters())
    assert cells not in OPERATOR.parameter_kinds(follower)


def test_copies_share_within_themselves() -> None:
    model = trained()
    expected = model(X)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loads = pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), *loads, copy.deepcopy(copy.deepcopy(model))):
        assert torch.equal(other(X), expected) and owners(other) == owners(model)
        assert not warehouses(other) & warehouses(model) and len(warehouses(other)) == 2
        assert sorted(len(one.layers) for one in warehouses(other)) == [4, 4]
        assert all(one.owner in set(other.modules()) for one in warehouses(other))
        fdsurgery.restore(other, "*.0.conv1")  # which needs to know the others
        assert owners(other) == ["stage1.0.conv2", "stage2.0.conv2"]


def test_a_copy_of_one_layer_brings_the_cells_along_and_shares_with_nobody() -> None:
    model = trained()
    layer = model.stage1[1].conv1
    x = torch.randn(2, 16, 5, 5)
    alone = copy.deepcopy(layer)
    assert torch.equal(alone(x), layer(x)) and alone._stored() is not layer._stored()
    assert [name for name, _ in alone.named_parameters()] == [name for name, _ in layer.named_parameters()]
    with torch.no_grad():
        alone._stored().zero_()
    assert not torch.equal(alone(x), layer(x)) and float(layer._stored().detach().abs().sum()) > 0
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        layer._replicate_for_data_parallel()


@pytest.mark.filterwarnings("ignore:.*from a non-meta parameter")
def test_it_moves_between_dtypes_and_devices_as_one() -> None:
    model = trained()
    expected = model(X)
    moved = copy.deepcopy(model).double()
    assert {one.dtype for one in moved.parameters()} == {torch.float64}
    assert distance(moved(X.double()), expected.double()) < 1e-5
    meta = copy.deepcopy(model).to("meta")
    assert meta.stage1[1].conv2._stored().is_meta and owners(meta) == owners(model)
    back = meta.to_empty(device="cpu")
    back.load_state_dict(model.state_dict())
    assert torch.equal(back(X), expected)
    assigned = converted(plain().to("meta"))
    assigned.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(assigned.eval()(X), expected)
    with pytest.raises(RuntimeError, match="have no memory; load it before"):
        converted(plain().to("meta")).load_state_dict(plain().state_dict())


# 3: all or nothing, and from files


def test_what_cannot_be_built_changes_nothing() -> None:
    model = plain()
    model.stage1[1].conv2.double()
    before = copy.deepcopy(model.state_dict())
    plan = fdsurgery.plan(plain(), parse_recipe(TEXT), example_inputs=X)
    with pytest.raises(
        fdsurgery.RewriteError, match=r"'stage1' differ in dtype: .*'stage1.1.conv2'.*nothing was changed"
    ):
        fdsurgery.surgery.carry_out(plan, fdsurgery.discovery.observe(plain(), X), model, ())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not fdsurgery.dynamic_layers(model)
    with pytest.raises(fdsurgery.RecipeError, match="differ in ratio"):
        parts = [
            f"{{where: {{name: 'stage1.{at}.conv*'}}, operator: kernel_warehouse, with: {{ratio: {at + 1}}}}}"
            for at in (0, 1)
        ]
        fdsurgery.convert(model, parse_recipe(f"swap: [{', '.join(parts)}]"), example_inputs=X)
    with pytest.raises(fdsurgery.PlanError, match=r"no exact start exists at ratio 0\.5"):
        fdsurgery.convert(plain(), parse_recipe(TEXT), example_inputs=X, ratio=0.5)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain ones whose warehouses lie in several, ours, and a state dict that says nothing of itself."""
    code = Path(__file__).read_text(encoding="utf-8")
    net = "class Block(nn.Module):" + code.partition("class Block(nn.Module):")[2].partition("def plain")[0]
    (tmp_path / "models.py").write_text(f"import torch\nfrom torch import Tensor, nn\n\n\n{net}", encoding="utf-8")
    spec = f"{tmp_path / 'models.py'}:build"
    monkeypatch.setattr(
        "fdsurgery.checkpoints.planning.plan",
        lambda model, *_, **__: fdsurgery.plan(model, parse_recipe(TEXT), example_inputs=X.to("meta")),
    )
    (tmp_path / "plain").mkdir()
    index: dict[str, str] = {}
    for at, part in enumerate(("stem", "stage1.0", "stage1.1", "stage2.0", "stage2.1", "norm", "head")):
        tensors = {key: value for key, value in plain().state_dict().items() if key.startswith(part)}
        name = f"model-{at + 1:05}-of-00007.safetensors"
        save_file(tensors, str(tmp_path / "plain" / name))
        index |= dict.fromkeys(tensors, name)
    (tmp_path / "plain" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index, "metadata": {}}))
    convert_checkpoint(tmp_path / "plain", tmp_path / "out.safetensors", model=spec)
    loaded = trained()
    loaded.load_state_dict(load_file(tmp_path / "out.safetensors"))
    assert distance(loaded(X), plain()(X)) < 1e-5
    convert_checkpoint(tmp_path / "plain", tmp_path / "out", model=spec)
    shards = [set(load_file(file)) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert set().union(*shards) == set(loaded.state_dict()) and sum(map(len, shards)) == len(loaded.state_dict())

    model = trained()
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    plan = convert_checkpoint(tmp_path / "ours.pth", tmp_path / "again", model=spec)
    assert any("warehouse" in note for note in plan.notes), "that names of warehouses are a guess"
    again = fdsurgery.load(tmp_path / "again", model=build())
    assert distance(again(X), model(X)) < 1e-6 and owners(again) == owners(model)


# 4: dtype and device are in test_kernel_warehouse; a layer that is used twice


def test_a_layer_that_is_used_twice_is_one_site_and_tied_weights_are_none() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 1)
            self.a = nn.Conv2d(16, 16, 3, padding=1)
            self.b = self.a
            self.c = nn.Conv2d(16, 16, 1)
            self.d = nn.Conv2d(16, 16, 1)
            self.d.weight = self.c.weight
            self.e = nn.Conv2d(16, 16, 1)
            self.head = nn.Conv2d(16, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(self.stem(x)).relu()).relu()
            return self.head(self.e(self.d(self.c(x).relu()).relu()).relu())

    torch.manual_seed(0)
    model = Twice().eval()
    expected = model(X)
    recipe = parse_recipe("swap: [{where: {name: '?'}, operator: kernel_warehouse, with: {min_channels: 4}}]")
    plan = fdsurgery.plan(model, recipe, example_inputs=X)
    assert [one.site.name for one in plan.swaps] == ["a", "e"] and plan.swaps[0].settings["cells"] == 10
    assert {one.site.name for one in plan.kept if "shares a parameter" in one.reason} == {"c", "d"}
    fdsurgery.apply(plan, model)
    assert model.a is model.b and len(model.a.warehouse.layers) == 2 and distance(model(X), expected) < 1e-5


# 5: freezing


def test_a_frozen_stage_keeps_cells_that_others_train() -> None:
    model = plain()
    for parameter in (*model.stage1[0].parameters(), *model.stage2.parameters()):
        parameter.requires_grad_(False)
    converted(model)
    assert model.stage1[0].conv1.cells.requires_grad, "the second block trains them"
    assert not model.stage2[0].conv1.cells.requires_grad
    assert not any(one.requires_grad for one in model.stage1[0].conv1.attention.parameters())
    assert all(one.requires_grad for one in model.stage1[1].conv1.parameters())
    model.stage1[0].requires_grad_(False)  # holds the owner
    assert not model.stage1[1].conv1._stored().requires_grad
    names = fdsurgery.freeze(model, "*.cells")
    assert names == [f"{one}.cells" for one in owners(model)]
    kinds = fdsurgery.freeze(model, "modulation")
    assert kinds and all(".attention." in name for name in kinds)


# 6: restoring some


@pytest.mark.parametrize(
    "names", ["stage1.0.conv1", "stage1.0.*", ["stage1.0.conv1", "stage1.1.conv1"], "stage1.1.conv2"]
)
def test_restoring_some_leaves_the_others_valid(names: Any, tmp_path: Path) -> None:
    model = trained()
    cells = model.stage1[0].conv1.cells
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model.train()(X).square().sum().backward()
    optimizer.step()
    model.eval()
    expected = {
        name: layer(torch.randn(2, layer.in_channels, 6, 6, generator=torch.Generator().manual_seed(3)))
        for name, layer in fdsurgery.dynamic_layers(model).items()
    }
    fdsurgery.restore(model, names)
    left = fdsurgery.dynamic_layers(model)
    assert 0 < len(left) < 8
    for name, layer in left.items():
        y = layer(torch.randn(2, layer.in_channels, 6, 6, generator=torch.Generator().manual_seed(3)))
        assert torch.equal(y, expected[name])
    first = next(iter(left))
    assert owners(model) == [first, "stage2.0.conv1"] and model.get_submodule(first).cells is cells
    assert type(model.stage1[1].conv2) is nn.Conv2d or type(model.stage1[0].conv1) is nn.Conv2d
    before = cells.detach().clone()
    optimizer.zero_grad()
    model.train()(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(cells, before), "the optimizer goes on with them"
    assert model.get_submodule(first).warehouse.layers == [
        one for name, one in left.items() if name.startswith("stage1")
    ]

    model.eval()
    source = fdsurgery.ModelSource("file", "models.py:build")
    loaded = fdsurgery.load(fdsurgery.save(model, tmp_path / "saved", source=source), model=build())
    assert torch.equal(loaded(X), model(X)) and owners(loaded) == owners(model)
    assert fdsurgery.restore(model).state_dict().keys() == plain().state_dict().keys()


def test_a_part_of_a_model_is_restored() -> None:
    text = TEXT.replace("ratio: 2", "ratio: 2, warehouse: one")
    model = perturb(converted(text=text))
    x = torch.randn(2, 16, 6, 6)
    expected = model.stage2(x)
    fdsurgery.restore(model.stage1)
    assert owners(model) == ["stage2.0.conv1"] and torch.equal(model.stage2(x), expected)
    assert all(operator_of(layer) is None for layer in model.stage1.modules())
    again = converted(model, text)  # and made dynamic again, beside what stayed
    assert owners(again) == ["stage1.0.conv1", "stage2.0.conv1"] and torch.equal(model.stage2(x), expected)


def test_restoring_nothing_is_told() -> None:
    model = trained()
    with pytest.raises(
        fdsurgery.SurgeryError, match=r"no dynamic layer of the model matches 'stage1.0.conv3'.*stage1.0.conv"
    ):
        fdsurgery.restore(model, ["stage1.0.conv1", "stage1.0.conv3"])
    assert len(fdsurgery.dynamic_layers(model)) == 8
    assert fdsurgery.restore(model, "stage1.*") is model and len(fdsurgery.dynamic_layers(model)) == 4


# Plain state dicts


def test_plain_weights_are_taken_whole_or_in_part() -> None:
    torch.manual_seed(7)
    other = fdsurgery.testing.settle_(Net(), X).eval()
    model = trained()
    with pytest.warns(UserWarning, match="what its modulation had learned is gone"):
        model.load_state_dict(other.state_dict())
    assert distance(model(X), other(X)) < 1e-5

    for name in ("stage1.1", "stage1.0.conv1"):  # without the owner of the cells, and the owner alone
        model, mixed = converted(), plain()
        part = {key: value for key, value in other.state_dict().items() if key.startswith(name)}
        model.load_state_dict(part, strict=False)
        mixed.load_state_dict(part, strict=False)
        assert distance(model(X), mixed(X)) < 1e-5, "the cells of other layers were touched"
    with pytest.raises(RuntimeError, match=r"size mismatch for stage1\.0\.conv1\.weight"):
        model.load_state_dict({"stage1.0.conv1.weight": torch.zeros(16, 16, 1, 1)}, strict=False)


@pytest.mark.long
def test_transformers(tmp_path: Path) -> None:
    """A head model and its base model: both load what either saved."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic")
    torch.manual_seed(0)
    model = fdsurgery.testing.settle_(transformers.ResNetForImageClassification(config), X).eval()
    recipe = (
        "swap: [{where: {kernel_size: 3, channels: {min: 16}}, operator: kernel_warehouse, with: {min_channels: 4}}]"
    )
    perturb(fdsurgery.convert(model, parse_recipe(recipe)))
    assert len(owners(model)) == 2 < len(fdsurgery.dynamic_layers(model))
    fdsurgery.save_pretrained(model, tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert distance(loaded(X).logits, model(X).logits) < 1e-5 and owners(loaded) == owners(model)
    base = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert distance(base(X).pooler_output, model.resnet(X).pooler_output) < 1e-5
    assert owners(base) == [name.removeprefix("resnet.") for name in owners(model)]

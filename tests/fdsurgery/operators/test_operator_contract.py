"""An operator that nobody here knows, whose layers share one weight, goes through every verb; and the register."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fdsurgery
from fdsurgery.checkpoints import convert_checkpoint
from fdsurgery.operators import get_operator, operator_of, operators, register
from fdsurgery.recipe import parse_recipe

RECIPE = "swap: [{where: {kind: conv, kernel_size: 3}, operator: banked, with: {gain: 0.5}}]\n"


class Banked(nn.Conv2d):
    """Its kernel is a mixture of those of all layers of its shape: at first its own, then as its input says.

    The first layer of a bank owns it; the others hold that layer where `nn.Module` does not look.
    """

    def __init__(self, conv: nn.Conv2d, settings: dict[str, Any], owner: Banked | None, kernels: list[Tensor]) -> None:
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(conv, name))
        self.settings = settings
        weight = conv.weight
        if owner is None:
            self.bank = nn.Parameter(torch.stack([one.detach() for one in kernels]).clone(), weight.requires_grad)
        self.owner = () if owner is None else (owner,)
        self.gate = nn.Parameter(weight.new_zeros(settings["size"], conv.in_channels))
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self.train(conv.training)

    @property
    def kernels(self) -> Tensor:
        (holder,) = self.owner or (self,)
        return holder.bank

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.kernels[self.settings["place"]].clone()  # which transformers may initialise without harm

    def forward(self, x: Tensor) -> Tensor:
        own = torch.zeros(self.settings["size"], dtype=x.dtype, device=x.device)
        own[self.settings["place"]] = 1
        mixture = own + self.settings["gain"] * torch.tanh(x.mean((2, 3)) @ self.gate.T)
        outputs = torch.stack([self._conv_forward(x, kernel, None) for kernel in self.kernels], 1)
        y = (mixture[..., None, None, None] * outputs).sum(1)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


class BankedOperator(fdsurgery.Operator):
    name = "banked"
    builds_together = True
    prepared: list[nn.Module]

    def settings(self, values: dict[str, Any]) -> dict[str, Any]:
        known = {"gain": 1.0, "place": 0, "size": 1}
        if unknown := values.keys() - known.keys():
            raise fdsurgery.RecipeError(f"{unknown.pop()!r} is no setting of banked")
        return known | values

    def refusal(self, site: Any, settings: dict[str, Any]) -> str | None:
        return "its kernel is not square" if site.kernel_size[0] != site.kernel_size[1] else None

    def resolve(self, sites: Any, settings: Any) -> list[dict[str, Any]]:
        shapes = [(site.out_channels, site.in_channels, site.groups, site.kernel_size) for site in sites]
        return [
            {**its, "place": shapes[:at].count(shapes[at]), "size": shapes.count(shapes[at])}
            for at, its in enumerate(settings)
        ]

    def multiply_adds(self, layer: Any, sample: tuple[int, ...]) -> dict[str, int]:
        return {"mixture": layer.settings["size"] * layer.weight.numel()}

    def build(self, names: Any, layers: Any, settings: Any) -> list[nn.Module]:
        made: list[nn.Module] = []
        owners: dict[Any, Banked] = {}
        for layer, its in zip(layers, settings, strict=True):
            alike = [other.weight for other in layers if other.weight.shape == layer.weight.shape]
            alike += [layer.weight] * (its["size"] - len(alike))  # one alone, without the others of its bank
            made.append(Banked(layer, its, owners.get(layer.weight.shape), alike))
            owners.setdefault(layer.weight.shape, made[-1])  # type: ignore[arg-type]
        return made

    def owns(self, layer: nn.Module) -> bool:
        return isinstance(layer, Banked)

    def settings_of(self, layer: Any) -> dict[str, Any]:
        return dict(layer.settings)

    def restore(self, layer: Any) -> nn.Module:
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        plain = nn.Conv2d(layer.in_channels, layer.out_channels, *geometry, bias=layer.bias is not None)
        plain.weight.data = layer.weight.detach().clone()
        if layer.bias is not None:
            plain.bias.data = layer.bias.detach().clone()
        return plain.train(layer.training)

    def parameter_kinds(self, layer: Any) -> Any:
        return {layer.gate: "modulation", **super().parameter_kinds(layer)}

    def undecayed(self, layer: Any) -> Any:
        return [layer.gate]


class Net(nn.Module):
    """Three layers of one shape, one of another, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=at > 0) for at in range(3))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(self.norm(x).mean((2, 3)))


def build() -> Net:
    return Net()


X = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    operators()
    monkeypatch.setattr(register, "_operators", dict(register._operators))
    fdsurgery.register_operator(BankedOperator())
    yield


def plain() -> Net:
    torch.manual_seed(1)
    return fdsurgery.testing.settle_(Net(), X).eval()


def perturbed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Banked):
                layer.gate.normal_()
    return model


def converted() -> nn.Module:
    return perturbed(fdsurgery.convert(plain(), parse_recipe(RECIPE), example_inputs=X))


def banks(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith(".bank")]


def same(left: nn.Module, right: nn.Module) -> bool:
    return torch.allclose(left(X), right(X), rtol=1e-5, atol=1e-6)


def test_a_plan_resolves_what_follows_from_all_its_sites_and_counts_what_they_share_once() -> None:
    plan = fdsurgery.plan(plain(), parse_recipe(RECIPE), example_inputs=X)
    told = {one.site.name: (one.settings["place"], one.settings["size"]) for one in plan.swaps}
    assert told == {"stem": (0, 1), "blocks.0": (0, 3), "blocks.1": (1, 3), "blocks.2": (2, 3)}
    model = fdsurgery.apply(plan, plain())
    added = sum(one.numel() for one in model.parameters()) - sum(one.numel() for one in plain().parameters())
    assert plan.parameters_added == added == 3 + 3 * 24
    assert plan.swaps[1].multiply_adds_by_component == {"mixture": 3 * 576}

    edited = plan.exclude("blocks.1", reason="too late")
    told = {one.site.name: (one.settings["place"], one.settings["size"]) for one in edited.swaps}
    assert told == {"stem": (0, 1), "blocks.0": (0, 2), "blocks.2": (1, 2)}
    assert fdsurgery.Plan.from_dict(json.loads(json.dumps(edited.to_dict()))).swaps == edited.swaps
    assert fdsurgery.verify(plain(), fdsurgery.apply(edited, plain()), X).ok


def test_it_starts_neutral_and_the_weight_has_one_owner() -> None:
    model = fdsurgery.convert(plain(), parse_recipe(RECIPE), example_inputs=X)
    checked = fdsurgery.verify(plain(), model, X)
    assert checked.ok and len(checked.layers) == 4
    assert banks(model) == ["stem.bank", "blocks.0.bank"]
    assert [name for name in model.state_dict() if name.endswith(".bank")] == banks(model)
    assert not same(plain(), perturbed(model))
    told = {site.name: site.obstacle for site in fdsurgery.sites(model, example_inputs=X)}
    assert told["blocks.2"] == "it is dynamic already"


def test_a_build_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = plain(), plain().state_dict()
    plan = fdsurgery.plan(model, parse_recipe(RECIPE), example_inputs=X)
    monkeypatch.setattr(BankedOperator, "build", lambda *_: 1 / 0)
    with pytest.raises(fdsurgery.RewriteError, match=r"4 layers, 'stem' first: ZeroDivisionError.*nothing was changed"):
        fdsurgery.apply(plan, model)
    assert type(model.blocks[0]) is nn.Conv2d and before.keys() == model.state_dict().keys()
    monkeypatch.setattr(BankedOperator, "build", lambda *_: [])
    with pytest.raises(fdsurgery.RewriteError, match="nothing was changed"):
        fdsurgery.apply(plan, model)


def test_restore_gives_each_its_own_kernel_back() -> None:
    model = fdsurgery.restore(converted())
    assert same(model, plain()) and model.state_dict().keys() == plain().state_dict().keys()


def test_copies_and_pickles_share_within_themselves() -> None:
    model = converted()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert same(other, model)
        assert other.blocks[1].kernels is other.blocks[0].bank is not model.blocks[0].bank


def test_it_is_saved_once_and_loads_shared(tmp_path: Path) -> None:
    model = converted()
    (tmp_path / "models.py").write_text("")
    source = fdsurgery.ModelSource("file", "models.py:build")
    fdsurgery.save(model, tmp_path / "saved", source=source)
    loaded = fdsurgery.load(tmp_path / "saved", model=build())
    assert same(loaded, model) and loaded.blocks[2].kernels is loaded.blocks[0].bank
    state = copy.deepcopy(model).state_dict()
    other = fdsurgery.convert(plain(), parse_recipe(RECIPE), example_inputs=X)
    other.load_state_dict(state)
    assert same(other, model)


def test_checkpoints_are_converted_with_what_must_be_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(plain().state_dict(), tmp_path / "plain.pth")
    code = Path(__file__).read_text().partition("class Net(nn.Module):")[2].partition("X = torch")[0]
    text = "import torch\nfrom torch import Tensor, nn\n\n\nclass Net(nn.Module):" + code
    (tmp_path / "models.py").write_text(text.replace("-> Net", ""))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    spec = f"{tmp_path / 'models.py'}:build"
    monkeypatch.setattr("fdsurgery.checkpoints.planning.plan", lambda model, recipe, **more: _plan(model))
    convert_checkpoint(tmp_path / "plain.pth", tmp_path / "out", model=spec, recipe=str(tmp_path / "recipe.yaml"))
    loaded = fdsurgery.load(tmp_path / "out", model=build())
    assert same(loaded, plain()) and loaded.blocks[2].kernels is loaded.blocks[0].bank
    # and what is ours goes to another folder as it is
    model = perturbed(loaded)
    fdsurgery.save(model, tmp_path / "tuned", source=fdsurgery.ModelSource("file", "models.py:build"))
    convert_checkpoint(tmp_path / "tuned", tmp_path / "again", model=spec)
    assert same(fdsurgery.load(tmp_path / "again", model=build()), model)


def _plan(model: nn.Module) -> fdsurgery.Plan:
    return fdsurgery.plan(model, parse_recipe(RECIPE), example_inputs=X.to("meta"))


def test_transformers_loads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    torch.manual_seed(0)
    model = fdsurgery.testing.settle_(transformers.ResNetForImageClassification(config), X).eval()
    perturbed(fdsurgery.convert(model, parse_recipe(RECIPE)))
    assert len(banks(model)) < sum(isinstance(layer, Banked) for layer in model.modules())
    fdsurgery.save_pretrained(model, tmp_path)
    assert "operator `banked`" in (tmp_path / "README.md").read_text()
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(X).logits, model(X).logits, atol=1e-5) and banks(loaded) == banks(model)


def test_fine_tuning_knows_what_its_parameters_are() -> None:
    model = converted()
    gates = [name for name, _ in model.named_parameters() if name.endswith(".gate")]
    assert fdsurgery.freeze(copy.deepcopy(model), "modulation") == gates
    assert set(fdsurgery.freeze(copy.deepcopy(model), "banked")) >= {*gates, *banks(model)}
    groups = {group["name"]: group["params"] for group in fdsurgery.param_groups(model, 1.0, 0.1)}
    named = dict(model.named_parameters())
    assert all(any(named[name] is one for one in groups["no decay"]) for name in gates)
    assert all(any(named[name] is one for one in groups["decay"]) for name in banks(model))

    fresh = plain()
    optimizer = torch.optim.SGD(fresh.parameters(), 0.1, momentum=0.9)
    fdsurgery.convert(fresh, parse_recipe(RECIPE), example_inputs=X, optimizers=optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert set(held) == set(fresh.parameters()) and len(held) == len(set(held))
    fresh.train()(X).square().sum().backward()
    before = fresh.blocks[0].bank.detach().clone()
    optimizer.step()
    assert not torch.equal(fresh.blocks[0].bank, before) and fresh.blocks[2].gate.grad.abs().sum() > 0


def test_it_is_prepared_for_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    monkeypatch.setattr(BankedOperator, "prepare", lambda _, layer: seen.append(layer))
    model = converted()
    fast = fdsurgery.compile_for_inference(model, example_inputs=X)
    assert same(fast, model) and len(seen) == 4
    assert isinstance(fdsurgery.fuse_norms(copy.deepcopy(model), example_inputs=X).norm, nn.BatchNorm2d)


# The register


def test_what_is_no_operator_is_refused() -> None:
    class Nameless(fdsurgery.Operator):
        pass

    class Named(fdsurgery.Operator):
        name = "fdconv"

    class Word(fdsurgery.Operator):
        name = "modulation"

    for wrong, said in (
        (BankedOperator, "not the class BankedOperator"),
        (nn.Identity(), "not a Identity"),
        (Nameless(), "must be a word"),
        (Named(), r"registered already, by fdsurgery\.operators\.fdconv"),
        (Word(), "gives the word another meaning"),
    ):
        with pytest.raises(fdsurgery.SurgeryError, match=said):
            fdsurgery.register_operator(wrong)  # type: ignore[type-var]
    assert {"fdconv", "banked"} <= operators().keys()
    assert not {"Nameless", "Word", "modulation"} & operators().keys()
    again = BankedOperator()
    assert fdsurgery.register_operator(again) is again is get_operator("banked")
    with pytest.raises(fdsurgery.RecipeError, match=r"no operator is called 'bankd'.*did you mean 'banked'"):
        get_operator("bankd")
    assert operator_of(nn.Conv2d(3, 3, 3)) is None


PACKAGE = """
import fdsurgery

class Elsewhere(fdsurgery.Operator):
    name = "elsewhere"

    def settings(self, values):
        return {"depth": 2, **values}

    def owns(self, layer):
        return False
"""


def test_a_package_brings_operators_by_entry_points(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(PACKAGE)
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fdsurgery.operators]\nelsewhere = elsewhere:Elsewhere\nbroken = elsewhere:Missing\n"
    )
    code = (
        "import warnings; warnings.simplefilter('always'); import fdsurgery; "
        "from fdsurgery.recipe import parse_recipe; "
        "print(parse_recipe('swap: [{where: {kind: conv}, operator: elsewhere, with: {depth: 3}}]').swap[0].operator)"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "elsewhere", run.stderr
    assert "the operator 'broken' of elsewhere:Missing cannot be used" in run.stderr


def test_threads_that_ask_at_once_all_see_every_operator() -> None:
    code = (
        "import threading; from fdsurgery.operators import operators; start = threading.Barrier(8); seen = []\n"
        "def ask():\n    start.wait(); seen.append(len(operators()))\n"
        "threads = [threading.Thread(target=ask) for _ in range(8)]\n"
        "[one.start() for one in threads]; [one.join() for one in threads]; print(set(seen) == {len(operators())})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stdout + run.stderr

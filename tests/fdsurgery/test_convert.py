"""The promises of a conversion, on models of every shipped recipe."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from models import CASES, Case
from torch import nn

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdsurgery import PlanError, RewriteError, UnsupportedModelError
from fdsurgery.operators.fdconv import FDConvOperator
from fdsurgery.recipe import parse_recipe
from fdsurgery.verification import relative_error

DYNAMIC = (FDConv2d, FDLinear)


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def tensors(output: object) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def test_conversion_changes_nothing_and_trains(case: Case) -> None:
    model, x = case.settled()
    before = copy.deepcopy(model)
    with torch.no_grad():
        outputs = tensors(model(x))
    assert all(output.std() > 1e-3 for output in outputs), "a degenerate model proves nothing"

    plan = fdsurgery.plan(model, example_inputs=x)
    assert plan.recipe == case.recipe
    assert len(plan.swaps) == case.swaps or (case.swaps < 0 and plan.swaps)
    assert fdsurgery.apply(plan, model) is model
    assert sum(isinstance(module, DYNAMIC) for module in model.modules()) == len(plan.swaps)
    counts = [sum(p.numel() for p in m.parameters()) for m in (before, model)]
    assert counts[1] - counts[0] == plan.parameters_added

    checked = fdsurgery.verify(before, model, x)
    assert checked.ok and checked.relative_error < 1e-5 and checked.outputs == len(outputs)

    model.train()
    sum(output.square().mean() for output in tensors(model(x)) if output.is_floating_point()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_training_mode_agrees_too(case: Case) -> None:
    model, x = case.settled()
    converted = fdsurgery.convert(copy.deepcopy(model), example_inputs=x)
    outputs = []
    for candidate in (model, converted):
        candidate.train()
        torch.manual_seed(1)  # stochastic depth draws the same paths
        outputs.append(tensors(candidate(x)))
    for expected, actual in zip(*outputs, strict=True):
        assert relative_error(actual.detach(), expected.detach()) < 1e-4


def test_restore_undoes_a_conversion(case: Case) -> None:
    model, x = case.settled()
    before = copy.deepcopy(model)
    fdsurgery.restore(fdsurgery.convert(model, example_inputs=x))
    assert not any(isinstance(module, DYNAMIC) for module in model.modules())
    assert list(model.state_dict()) == list(before.state_dict())
    assert fdsurgery.verify(before, model, x).ok


def test_the_papers_policy_on_resnet50() -> None:
    model = timm.create_model("resnet50")
    plan = fdsurgery.plan(model, norm="batch")
    assert plan.recipe == "resnet"
    assert len(plan.swaps) == 48
    assert plan.parameters_added == 3_647_120
    assert fdsurgery.plan(model).parameters_added == 3_645_680  # a norm has no bias


def test_an_unknown_model_is_converted_by_generic() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 24, 3, padding=1)
            self.b = nn.Conv2d(24, 32, 5, padding=2)
            self.c = nn.Conv2d(32, 32, 3, padding=1, groups=2)
            self.norm = nn.BatchNorm2d(32)
            self.up = nn.Linear(32, 64)
            self.down = nn.Linear(64, 32)
            self.out = nn.Linear(32, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.c(self.b(self.a(x).relu()).relu()))
            tokens = x.flatten(2).transpose(1, 2)
            tokens = tokens + self.down(torch.nn.functional.gelu(self.up(tokens)))
            return self.out(tokens.mean(1))

    x = torch.randn(2, 3, 16, 16)
    model = fdsurgery.testing.settle_(Odd(), x)
    before = copy.deepcopy(model)
    plan = fdsurgery.plan(model, example_inputs=x)
    assert plan.recipe == "generic"
    assert {decision.site.name for decision in plan.swaps} == {"b", "c", "up", "down"}
    fdsurgery.apply(plan, model)
    assert fdsurgery.verify(before, model, x).ok


# A converted model is still that model


class Block(nn.Module):
    """Holds its layers the ways real models do: as attributes, twice, and in plain lists, tuples and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.shared = nn.Conv2d(32, 32, 3, padding=1)
        self.again = self.shared
        self.listed = nn.Conv2d(32, 32, 1)
        self.plain_list = [self.listed, [nn.ReLU()]]
        self.tupled = nn.Conv2d(32, 32, 1)
        self.plain_tuple = (self.tupled, 3)
        self.keyed = nn.Conv2d(32, 32, 1)
        self.plain_dict = {"layer": {"deep": self.keyed}}
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.idle = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.stem(x)).relu()
        x = self.again(x)
        x = self.plain_tuple[0](self.plain_list[0](x).relu())
        x = self.plain_dict["layer"]["deep"](x).relu()
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1))


@pytest.fixture
def block() -> tuple[Block, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    model = Block()
    fdsurgery.testing.settle_(model, x)
    return model, x


def test_swaps_go_by_identity_wherever_a_model_holds_a_layer(block: tuple[Block, torch.Tensor]) -> None:
    model, x = block
    before = copy.deepcopy(model)
    plan = fdsurgery.plan(model, example_inputs=x)
    fdsurgery.apply(plan, model)
    assert {decision.site.name for decision in plan.swaps} == {"shared", "listed", "tupled", "keyed"}
    assert isinstance(model.shared, FDConv2d) and model.again is model.shared
    assert model.plain_list[0] is model.listed and isinstance(model.listed, FDConv2d)
    assert model.plain_tuple == (model.tupled, 3) and isinstance(model.tupled, FDConv2d)
    assert model.plain_dict["layer"]["deep"] is model.keyed and isinstance(model.keyed, FDConv2d)
    assert fdsurgery.verify(before, model, x).ok


def test_what_cannot_be_swapped_is_kept_and_says_why(block: tuple[Block, torch.Tensor]) -> None:
    model, x = block
    plan = fdsurgery.plan(model, example_inputs=x)
    reasons = {decision.site.name: decision.reason for decision in plan.kept}
    assert "never calls" in reasons["idle"]
    assert "weight" in reasons["attention.out_proj"]
    assert set(reasons) | {decision.site.name for decision in plan.swaps} == {site.name for site in plan.sites}
    assert all(reasons.values())


def test_properties_of_a_layer_carry_over(block: tuple[Block, torch.Tensor]) -> None:
    model, x = block
    model.double()
    model.listed.weight.requires_grad_(False)
    model.keyed.eval()
    model.tupled.train()
    model.shared.note = "set by somebody else"
    calls: list[str] = []
    handle = model.shared.register_forward_hook(lambda *_: calls.append("hook"))
    modes = {name: module.training for name, module in model.named_modules()}
    rest = [
        name for name in model.state_dict() if not name.startswith(("shared", "again", "listed", "tupled", "keyed"))
    ]

    fdsurgery.convert(model, example_inputs=x.double())
    assert calls == [], "looking at a model must not run its hooks"
    model(x.double())
    assert calls == ["hook", "hook"]
    handle.remove()
    model(x.double())
    assert calls == ["hook", "hook"], "the handle from before the conversion still removes the hook"

    assert type(model) is Block
    assert model.shared.note == "set by somebody else"
    assert all(module.training == modes[name] for name, module in model.named_modules() if name in modes)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert not any(p.requires_grad for p in model.listed.parameters() if p is not model.listed.bias)
    assert all(p.requires_grad for p in model.keyed.parameters())
    kept = [n for n in model.state_dict() if not n.startswith(("shared", "again", "listed", "tupled", "keyed"))]
    assert kept == rest
    assert isinstance(model.listed, nn.Conv2d)
    assert model.listed.weight.shape == (32, 32, 1, 1) and model.listed.weight.dtype == torch.float64
    assert (model.listed.in_channels, model.listed.kernel_size) == (32, (1, 1))


def test_accelerate_hooks_carry_over(block: tuple[Block, torch.Tensor]) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubling(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return 2 * output

    model, x = block
    before = copy.deepcopy(model)
    for candidate in (before, model):
        add_hook_to_module(candidate.listed, Doubling())
    fdsurgery.convert(model, example_inputs=x)
    assert isinstance(model.listed, FDConv2d)
    assert fdsurgery.verify(before, model, x).ok
    for candidate in (before, model):
        remove_hook_from_module(candidate.listed)
    assert fdsurgery.verify(before, model, x).ok


def test_a_model_on_meta_converts_and_takes_its_weights_later() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    fdsurgery.convert(model)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    real = timm.create_model("resnet18")
    x = torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(fdsurgery.testing.settle_(real, x))
    model.load_state_dict(fdsurgery.convert(real).state_dict(), assign=True)
    assert fdsurgery.verify(before, model, x).ok


# All or nothing


def identities(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]


@pytest.mark.parametrize("failing_call", [0, 2])
def test_a_failed_build_leaves_the_model_alone(
    block: tuple[Block, torch.Tensor], monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    model, x = block
    plan = fdsurgery.plan(model, example_inputs=x)
    state, names = copy.deepcopy(model.state_dict()), identities(model)
    original, calls = FDConvOperator.replace, []

    def failing(self: FDConvOperator, layer: nn.Module, settings: dict) -> nn.Module:
        calls.append(layer)
        if len(calls) > failing_call:
            raise MemoryError("injected")
        return original(self, layer, settings)

    monkeypatch.setattr(FDConvOperator, "replace", failing)
    with pytest.raises(RewriteError, match="injected"):
        fdsurgery.apply(plan, model)
    assert identities(model) == names
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Runner:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


class OutOfReach(nn.Module):
    """Calls a layer through an object that does not show what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.near = nn.Conv2d(8, 8, 3)
        self.far = nn.Conv2d(8, 8, 3)
        self.runner = Runner(self.far)
        self.kept = [self.near, (self.near,)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.runner.layer(self.near(self.stem(x))).mean((2, 3))


def test_a_layer_out_of_reach_fails_the_check_and_is_undone() -> None:
    x = torch.randn(2, 3, 12, 12)
    model = OutOfReach().eval()
    names, kept, state, y = identities(model), list(model.kept), copy.deepcopy(model.state_dict()), model(x)
    plan = fdsurgery.plan(model, example_inputs=x)
    assert {decision.site.name for decision in plan.swaps} == {"near", "far"}
    with pytest.raises(RewriteError, match=r"'far' is never called.*put back as it was"):
        fdsurgery.apply(plan, model)
    assert identities(model) == names and model.kept == kept
    assert list(model.state_dict()) == list(state) and torch.equal(model(x), y)
    fdsurgery.apply(plan.exclude("far", reason="the check said so"), model)
    assert isinstance(model.near, FDConv2d) and model.kept == [model.near, (model.near,)]


# Plans


def test_a_plan_survives_json_and_converts_another_copy() -> None:
    model, x = CASES["timm resnet18"].settled()
    plan = fdsurgery.plan(model, example_inputs=x, kernel_num=16)
    again = fdsurgery.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    before = copy.deepcopy(model)
    fdsurgery.apply(again, model)
    assert fdsurgery.verify(before, model, x).ok
    assert all(m.config.kernel_num == 16 for m in model.modules() if isinstance(m, DYNAMIC))
    for damaged in ({}, {"format": 99}, {**plan.to_dict(), "decisions": [{"site": {"name": "x"}}]}, [], None):
        with pytest.raises(PlanError):
            fdsurgery.Plan.from_dict(damaged)  # type: ignore[arg-type]


def test_a_plan_prints_every_site_with_its_reason() -> None:
    model, x = CASES["timm resnet18"].settled()
    plan = fdsurgery.plan(model, example_inputs=x)
    text = str(plan)
    for decision in plan.decisions:
        assert decision.site.name in text
    assert "16 of" in text and "resnet.yaml" in text


def test_a_plan_can_be_edited() -> None:
    model, x = CASES["timm resnet18"].settled()
    plan = fdsurgery.plan(model, example_inputs=x).exclude("layer4.*", reason="the last stage is small")
    assert len(plan.swaps) == 12
    assert sum(decision.reason == "the last stage is small" for decision in plan.kept) == 4
    with pytest.raises(PlanError, match=r"did you mean 'layer3"):
        plan.exclude("layer3.1.conv3", reason="no such layer")


def test_a_plan_for_another_model_is_refused() -> None:
    model, x = CASES["timm resnet18"].settled()
    plan = fdsurgery.plan(model, example_inputs=x)
    with pytest.raises(PlanError, match=r"another model: this one has no 'layer1.0.conv1'"):
        fdsurgery.apply(plan, CASES["timm vit"].build())
    with pytest.raises(PlanError, match="another model"):
        fdsurgery.apply(plan, narrow_resnet18())
    fdsurgery.apply(plan, model)
    with pytest.raises(PlanError, match="is a FDConv2d here"):
        fdsurgery.apply(plan, model)


def narrow_resnet18() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (2, 2, 2, 2), channels=(32, 64, 128, 256))


def test_nothing_to_swap_is_an_error_that_tells_why() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    x = torch.randn(2, 3, 8, 8)
    plan = fdsurgery.plan(model, example_inputs=x)
    assert not plan.swaps
    with pytest.raises(PlanError, match="swaps nothing: "):
        fdsurgery.apply(plan, model)


def test_overrides_win_and_unknown_ones_name_near_misses() -> None:
    model, x = CASES["timm vit"].settled()
    plan = fdsurgery.plan(model, example_inputs=x, kernel_num=8)
    assert {decision.settings["kernel_num"] for decision in plan.swaps} == {8}
    recipe = parse_recipe("swap: [{where: {role: ffn}, with: {kernel_num: 4, reduction: 0.5}}]")
    plan = fdsurgery.plan(model, recipe, example_inputs=x, kernel_num=8)
    assert {(swap.settings["kernel_num"], swap.settings["reduction"]) for swap in plan.swaps} == {(8, 0.5)}
    with pytest.raises(fdsurgery.RecipeError, match=r"'kernel_number' .* did you mean 'kernel_num'"):
        fdsurgery.plan(model, example_inputs=x, kernel_number=8)
    with pytest.raises(fdsurgery.RecipeError, match="kernel_num must be a whole number from 1"):
        fdsurgery.plan(model, example_inputs=x, kernel_num=0)


def test_planning_and_verifying_leave_no_trace() -> None:
    model, x = CASES["hf segformer"].settled()
    model.train()
    state, names = copy.deepcopy(model.state_dict()), identities(model)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fdsurgery.plan(model, example_inputs=x)
    fdsurgery.verify(model, model, x)
    assert torch.equal(torch.rand(1), expected)
    assert identities(model) == names and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# Models that must be converted earlier


def sharded() -> nn.Module:
    class FullyShardedDataParallel(nn.Sequential):
        """Stands for torch's class: building the real one takes a process group."""

    return FullyShardedDataParallel(nn.Conv2d(3, 3, 1))


def quantised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DataParallel(nn.Conv2d(3, 3, 1)), r"wrapped in DataParallel; convert model\.module first"),
        (lambda: torch.compile(nn.Conv2d(3, 3, 1)), r"compiled; convert the plain model"),
        (lambda: torch.jit.trace(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4)), "TorchScript"),
        (sharded, "sharded by FSDP; convert it first"),
        (quantised, "quantised"),
        (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), r"'0\.weight' has no shape yet .*call the model once"),
        (lambda: "resnet50", r"expected a torch\.nn\.Module, not str"),
    ],
)
def test_wrapped_models_are_refused_with_the_remedy(make, message: str) -> None:
    model = make()
    for verb in (fdsurgery.plan, fdsurgery.convert, fdsurgery.restore):
        with pytest.raises(UnsupportedModelError, match=message):
            verb(model)


# The check itself


def test_verify_finds_a_changed_output() -> None:
    model, x = CASES["timm vit"].settled()
    other = copy.deepcopy(model)
    assert fdsurgery.verify(model, other, x).relative_error == 0
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight[0, 0] += 0.1
    found = fdsurgery.verify(model, other, x)
    assert not found.ok and found.relative_error > 1e-5 and "CHANGED" in str(found)
    assert fdsurgery.verify(model, other, x, tolerance=1.0).ok
    assert relative_error(torch.ones(3), torch.ones(4)) == relative_error(torch.full((3,), torch.nan), torch.ones(3))
    assert not fdsurgery.verify(model, torch.nn.Identity(), x).ok


def test_settling_leaves_nothing_degenerate() -> None:
    model = timm.create_model("resnet18")
    assert any(not parameter.any() for parameter in model.parameters()), "timm starts some norms at zero"
    fdsurgery.testing.settle_(model, torch.randn(2, 3, 64, 64))
    assert all(parameter.std() > 0 for parameter in model.parameters())
    assert not model.training and all(buffer.any() for buffer in model.buffers())


def test_nothing_to_compare_is_no_success() -> None:
    class Empty(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[()]:
            return ()

    checked = fdsurgery.verify(Empty(), Empty(), torch.ones(1))
    assert not checked.ok and "nothing to compare" in str(checked)

"""The check of a conversion finds whatever is wrong, wherever it hides, and claims nothing that it has not seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from models import small_convnextv2, small_segformer
from torch import Tensor, nn

import fdsurgery
from fdsurgery.operators import operator_of
from fdsurgery.recipe import parse_recipe
from fdsurgery.verification import LayerVerification, Verification

EVERY = parse_recipe("swap: [{where: {kind: conv}}, {where: {kind: linear}, optional: true}]")


def dynamic(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if operator_of(layer) is not None}


@torch.no_grad()
def spoil(*layers: Any) -> None:
    """What no conversion may do: three times the weight, nothing else."""
    for layer in layers:
        layer.dft_weight.mul_(3)


def converted(model: nn.Module, x: Tensor, recipe: Any = "auto") -> tuple[nn.Module, nn.Module]:
    before = copy.deepcopy(model.eval())
    return before, fdsurgery.convert(model, recipe, example_inputs=x)


def check_that_spoiling_shows(before: nn.Module, after: nn.Module, x: Any) -> Verification:
    """Right as it is; wrong with all layers spoilt, and with any one of them, which is then named."""
    right = fdsurgery.verify(before, after, x)
    assert right.ok and "CHANGED" not in str(right), right
    layers = dynamic(after)
    assert [layer.fqn for layer in right.layers] == list(layers)
    state = {name: layer.dft_weight.detach().clone() for name, layer in layers.items()}
    spoil(*layers.values())
    found = fdsurgery.verify(before, after, x)
    assert not found.ok and "CHANGED" in str(found)
    assert {layer.fqn for layer in found.layers if not layer.ok} == {name for name in state if state[name].any()}
    for name, layer in layers.items():
        layer.dft_weight.data.copy_(state[name])
    for name in (next(iter(layers)), [name for name in layers if state[name].any()][-1]):
        spoil(layers[name])
        found = fdsurgery.verify(before, after, x)
        assert [layer.fqn for layer in found.layers if not layer.ok] == [name], found
        assert found.worst is not None and found.worst.fqn == name and f"{name!r}" in str(found)
        assert found.worst.relative_error == pytest.approx(2, rel=0.3), "but for the bias"
        layers[name].dft_weight.data.copy_(state[name])
    return right


# Freshly initialised: where the outputs show nothing


@pytest.mark.parametrize(
    ("name", "mute"),
    [
        ("test_resnet", True),
        ("test_convnext", True),
        ("test_vit", False),
        ("test_nfnet", None),
        ("test_efficientnet", None),
    ],
)
def test_a_fresh_model_is_compared_layer_by_layer(name: str, mute: bool | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 96, 96)
    model = timm.create_model(name, **({"img_size": 96} if name == "test_vit" else {}))
    right = check_that_spoiling_shows(*converted(model, x), x)
    if mute is not None:
        assert all(layer.reaches_output is not mute for layer in right.layers)
    count = len(right.layers)
    if mute:
        assert f"{count} of {count} swapped layers do not influence the outputs" in str(right)
        assert "proves nothing" in str(right) and "unchanged" not in str(right)


def test_the_outputs_alone_would_have_seen_nothing() -> None:
    """Or the tests above would prove nothing either."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 96, 96)
    before, after = converted(timm.create_model("test_resnet"), x)
    spoil(*dynamic(after).values())
    found = fdsurgery.verify(before, after, x)
    assert found.relative_error < found.tolerance and not found.ok and found.changed


def test_influence_is_what_noise_in_the_place_of_a_layer_makes() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 96, 96)
    model = fdsurgery.testing.settle_(timm.create_model("test_resnet"), x)
    before, after = converted(model, x)
    usual = before(x).detach()
    for layer in fdsurgery.verify(before, after, x).layers:
        changes = []
        for _ in range(8):
            noise = before.get_submodule(layer.fqn).register_forward_hook(
                lambda _, args, output: output + 0.01 * torch.randn_like(output) * output.square().mean().sqrt()
            )
            changes.append(float((before(x).detach() - usual).norm() / usual.norm() / 0.01))
            noise.remove()
        assert 0.4 < layer.influence / (sum(changes) / len(changes)) < 2.5, layer


# Kinds of layers and of models


class Twice(nn.Module):
    """A layer called twice, one held under two names, and one whose result nobody wants."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = self.first
        self.idle = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.again(self.again(x).relu())
        self.idle(x)
        return (self.first(x) + self.second(x.tanh())).mean((2, 3))


def test_calls_are_counted_and_layers_without_a_reader_compared() -> None:
    x = torch.randn(2, 3, 16, 16)
    right = check_that_spoiling_shows(*converted(Twice(), x, EVERY), x)
    seen = {layer.fqn: (layer.calls, layer.reaches_output) for layer in right.layers}
    assert seen == {"stem": (1, True), "again": (2, True), "first": (2, True), "idle": (1, False)}
    assert "1 of 4 swapped layers do not influence the outputs" in str(right)


def test_the_second_call_alone_differs() -> None:
    """An error that only one of the calls shows: a layer that changes after its first call."""
    x = torch.randn(2, 3, 16, 16)
    before, after = converted(Twice(), x, EVERY)

    def later(layer: Any, args: Any) -> None:
        layer.count = getattr(layer, "count", 0) + 1
        if layer.count == 2:
            spoil(layer)

    after.again.register_forward_pre_hook(later)
    found = fdsurgery.verify(before, after, x)
    assert [layer.fqn for layer in found.layers if not layer.ok] == ["again"]


@pytest.mark.parametrize("build", [small_segformer, small_convnextv2])
def test_transformers_models(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    before, after = converted(build(), x)
    check_that_spoiling_shows(before, after, {"pixel_values": x})


def test_layers_that_pad_as_tensorflow_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 65, 65)
    check_that_spoiling_shows(*converted(timm.create_model("test_efficientnet", pad_type="same"), x, EVERY), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_tolerance_follows_the_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 96, 96)
    model = fdsurgery.testing.settle_(timm.create_model("test_resnet"), x)
    x = x.to(dtype)
    before, after = converted(model.to(dtype), x)
    right = check_that_spoiling_shows(before, after, x)
    assert right.tolerance == {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-5)
    assert not fdsurgery.verify(before, after, x, tolerance=1e-17).ok, "a tolerance that is given counts"


def test_roundings_of_many_layers_add_up_and_are_no_change() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 8, dtype=torch.bfloat16)
    layers = [part for _ in range(64) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))]
    model = nn.Sequential(*layers).train()
    model(x.float())  # so that each layer gives as much as it gets
    before, after = converted(model.to(torch.bfloat16), x, EVERY)
    found = fdsurgery.verify(before, after, x)
    assert (
        found.ok and found.tolerance == pytest.approx(0.06) and all(layer.tolerance == 0.03 for layer in found.layers)
    )


def test_autocast_is_compared_in_its_own_dtype() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    before, after = converted(small_segformer(), x)
    with torch.autocast("cpu", torch.bfloat16):
        check_that_spoiling_shows(before, after, x)


def test_two_converted_models_and_the_way_back() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 96, 96)
    before, after = converted(timm.create_model("test_resnet"), x)
    again = copy.deepcopy(after)
    with torch.no_grad():
        for layer in (*dynamic(after).values(), *dynamic(again).values()):
            for parameter in layer.KSM_Global.parameters():
                parameter.fill_(0.1)
    check_that_spoiling_shows(after, again, x)
    back = fdsurgery.verify(after, fdsurgery.restore(copy.deepcopy(after)), x)
    assert len(back.layers) == 9 and not back.ok, "what the modulation does is lost, although the outputs agree"
    assert fdsurgery.verify(before, fdsurgery.restore(after), x).layers == ()


@pytest.mark.long
def test_wrapped_compiled_and_prepared_models() -> None:
    x = torch.randn(2, 3, 16, 16)
    before, after = converted(Twice(), x, EVERY)
    in_place, partly = copy.deepcopy(after), copy.deepcopy(after)
    in_place.compile(backend="eager")
    in_place(x)  # compiled without our hooks
    partly.again = torch.compile(partly.again, backend="eager")
    wrapped = torch.compile(after, backend="eager"), nn.DataParallel(after), fdsurgery.compile_for_inference(after)
    for other in (*wrapped, in_place, partly):
        found = fdsurgery.verify(before, other, x)
        assert found.ok and [layer.calls for layer in found.layers] == [1, 2, 2, 1], found
        assert [layer.reaches_output for layer in found.layers] == [True, True, True, False]
    spoil(after.idle, in_place.idle)
    assert not fdsurgery.verify(before, fdsurgery.compile_for_inference(after), x).ok
    assert not fdsurgery.verify(before, in_place, x).ok


def test_norms_that_are_folded_in_are_seen_in_the_outputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    model = fdsurgery.testing.settle_(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)), x
    )
    before, after = converted(model, x, EVERY)
    fused = fdsurgery.fuse_norms(after, example_inputs=x)
    found = fdsurgery.verify(before, fused, x)
    assert found.ok and "1 of 2 swapped layers compared by the outputs alone" in str(found)
    spoil(fused[0])
    assert fdsurgery.verify(before, fused, x).changed


def test_a_graph_of_functional_calls_has_layers_to_compare_with() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()).eval()
    before = torch.export.export(model, (x,)).module()
    after = fdsurgery.convert(copy.deepcopy(before), EVERY)
    check_that_spoiling_shows(before, after, x)


class Silent(nn.Module):
    """Gradients tell nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.other = nn.Conv2d(3, 8, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + 0 * self.other(x)


def test_without_gradients_noise_tells_what_reaches_the_output() -> None:
    x = torch.randn(2, 3, 16, 16)
    right = check_that_spoiling_shows(*converted(Silent(), x, EVERY), x)
    assert [layer.reaches_output for layer in right.layers] == [True, False]
    with torch.inference_mode():
        assert fdsurgery.verify(*converted(Silent(), x, EVERY), x).ok


# What cannot be seen is said


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.live = nn.Conv2d(3, 8, 3)
        self.dead = nn.Conv2d(8, 8, 3)
        self.use = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.live(x)
        return x + self.dead(nn.functional.pad(x * 0, (1, 1, 1, 1))) if self.use else x


def test_a_layer_that_gets_zeros_is_not_called_unchanged() -> None:
    x = torch.randn(2, 3, 16, 16)
    before, after = converted(Dead(), x, EVERY)
    spoil(after.dead)
    found = fdsurgery.verify(before, after, x)
    assert not found.ok and not found.changed
    assert "NOT CHECKED: 1 of 2 swapped layers, 'dead': it gets nothing but zeros" in str(found)
    before.use = after.use = False
    found = fdsurgery.verify(before, after, x)
    assert not found.ok and "'dead': these inputs never lead to a call of it" in str(found)
    assert found.to_dict()["layers_compared"] == 1 and found.to_dict()["ok"] is False


def test_a_layer_without_a_counterpart_is_seen_in_the_outputs_or_not_at_all() -> None:
    x = torch.randn(2, 3, 16, 16)
    _, after = converted(Twice(), x, EVERY)
    plain = fdsurgery.restore(copy.deepcopy(after))

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    found = fdsurgery.verify(Renamed(), after, x)
    assert "3 of 4 swapped layers compared by the outputs alone" in str(found) and not found.ok
    assert "'idle': the model before has no layer of this name" in str(found)
    spoil(after.stem)
    assert fdsurgery.verify(Renamed(), after, x).changed


def test_other_models_are_compared_without_a_traceback() -> None:
    x = torch.randn(2, 3, 16, 16)
    before, after = converted(Dead(), x, EVERY)
    before.dead = nn.Conv2d(4, 8, 3)
    before.use = False
    assert fdsurgery.verify(before, after, x).changed


def test_nothing_is_left_behind() -> None:
    class Marking(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))  # changes what it is given

    x = torch.randn(2, 3, 16, 16)
    before, after = converted(Marking(), x, EVERY)
    after.train()
    after.first.eval()
    given, modes = x.clone(), [module.training for module in after.modules()]
    assert fdsurgery.verify(before, after, x).ok and torch.equal(x, given)
    assert [module.training for module in after.modules()] == modes
    assert not any(module._forward_hooks for model in (before, after) for module in model.modules())
    assert all(parameter.grad is None for parameter in after.parameters())


def test_hooks_of_others_are_called_as_in_any_forward() -> None:
    x = torch.randn(2, 3, 16, 16)
    model = Twice()
    model.again.register_forward_hook(lambda _, args, output: output * 0.5)
    model.again.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    check_that_spoiling_shows(*converted(model, x, EVERY), x)


def test_a_verdict_is_made_of_its_parts() -> None:
    good = LayerVerification("a", 1e-7, 1e-5, 1, 0.5, True)
    assert Verification(1e-7, 1e-5, 1, (good,)).ok and Verification(1e-7, 1e-5, 1).ok
    assert not Verification(1e-7, 1e-5, 1, (good, LayerVerification("b", 1e-4, 1e-5, 1, 0.5, True))).ok
    assert not Verification(1e-4, 1e-5, 1, (good,)).ok
    assert not Verification(float("inf"), 1e-5, 0, (good,)).ok, "the model returned nothing that can be compared"


@dataclass
class Answer:
    logits: Any
    losses: Any = None


@pytest.mark.parametrize(
    ("answer", "outputs"),
    [
        (lambda y: {"logits": y, "cache": None}, 1),
        (lambda y: Answer([y, None], Answer(y)), 2),
        (lambda y: torch.complex(y, y), 1),
        (lambda y: torch.cat([y, torch.full_like(y, -torch.inf)], 1), 1),
        (lambda y: torch.where(y > 0, y, torch.nan), 1),
    ],
    ids=["dict", "dataclass", "complex", "hidden", "undefined"],
)
def test_outputs_of_every_form(answer: Callable[[Tensor], Any], outputs: int) -> None:
    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Any:
            return answer(self.net(x).mean((2, 3)) - 0.1)

    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    before, after = converted(Answers(), x, EVERY)
    found = fdsurgery.verify(before, after, x)
    assert found.ok and found.outputs == outputs, found
    before.net[0].bias.data += 0.1
    after.net[0].bias = before.net[0].bias
    before.net[2].bias.data += 0.01
    assert fdsurgery.verify(before, after, x).relative_error > 1e-3, "a bias of the model before, and not of the other"

"""Layers that look like plain ones and are more: kept with the reason, or swapped with all that hangs on them."""

from __future__ import annotations

import copy
import functools
import io
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import fdsurgery
from fdconv import FDConv2d

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions of which `a` and `b` would be swapped."""

    def __init__(self, kind: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a = kind(16, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(F.relu(self.stem(x))))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


def net(kind: type[nn.Conv2d] = nn.Conv2d) -> Net:
    torch.manual_seed(0)
    return Net(kind)


def reason(model: nn.Module, name: str = "a", x: Any = X) -> str | None:
    """Why a layer is kept; None if it is swapped."""
    decisions = {decision.site.name: decision for decision in fdsurgery.plan(model, example_inputs=x).decisions}
    return None if decisions[name].swap else decisions[name].reason


class DropsWeights(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class AddsNoise(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x) if self.training else x)


class HasABranch(nn.Conv2d):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.extra = nn.Conv2d(self.in_channels, self.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.extra(x) if self.training else super().forward(x)


class ForgetsItsBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, None if self.training else self.bias)


class Noisy(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * torch.rand_like(self.weight), self.bias)


class Masked(nn.Conv2d):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        mask = torch.ones(3, 3)
        mask[1, 1:] = mask[2:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class MasksInPlace(Masked):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class Cut(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = [self.weight[:, :, :1], torch.zeros_like(self.weight[:, :, 1:])]
        return self._conv_forward(x, torch.cat(rows, 2), self.bias)


class Writes(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.01, 0.01)
        return super().forward(x)


class Gated(nn.Conv2d):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) if gate is None else super().forward(x) * gate


class Stores(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.saved = super().forward(x)
        return self.saved


class Collects(nn.Conv2d):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.mean())
        return super().forward(x)


class LowRank(nn.Conv2d):
    """The weight is frozen, what is added to it learns."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.weight.requires_grad_(False)
        self.delta = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight + self.delta, self.bias)


class Penalised(nn.Conv2d):
    def penalty(self) -> Tensor:
        return self.weight.pow(2).sum()


class Aside(nn.Conv2d):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)


def forwards(forward: Callable[..., Tensor], **members: Any) -> type[nn.Conv2d]:
    """A class of convolutions with this forward, and with these members on every layer."""

    class Convolution(nn.Conv2d):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            for name, make in members.items():
                setattr(self, name, make())

    Convolution.forward = forward  # type: ignore[method-assign]
    return Convolution


def with_weight(change: Callable[[Any, Tensor], Tensor], **members: Any) -> type[nn.Conv2d]:
    return forwards(lambda self, x: self._conv_forward(x, change(self, self.weight), self.bias), **members)


def with_output(change: Callable[[Tensor], Tensor]) -> type[nn.Conv2d]:
    return forwards(lambda self, x: change(nn.Conv2d.forward(self, x)))


def seldom(number: Callable[[Any], float]) -> type[nn.Conv2d]:
    """Drops its weight in one step of many."""
    return with_weight(lambda self, w: w * 0 if self.training and number(self) < 0.01 else w, source=torch.Generator)


def rounded(w: Tensor) -> Tensor:
    scale = w.detach().abs().amax() / 127
    return (w / scale).round() * scale


def in_full_precision(self: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return nn.Conv2d.forward(self, x.float())


SEEN: list[Tensor] = []
CLASSES: dict[str, tuple[type[nn.Conv2d], str]] = {
    "Python's numbers": (seldom(lambda self: random.random()), "draws random numbers"),
    "numpy's numbers": (seldom(lambda self: float(numpy.random.rand())), "draws random numbers"),
    "a generator": (seldom(lambda self: float(torch.rand((), generator=self.source))), "draws random numbers"),
    "with gradients": (with_weight(lambda self, w: w * 2 if torch.is_grad_enabled() else w), "else in training"),
    "with batches": (forwards(lambda self, x: self._conv_forward(x, self.weight * len(x), None)), "from the input"),
    "relu in place": (with_output(lambda y: F.relu(y, inplace=True)), "for something else"),
    "a factor in place": (with_output(lambda y: y.mul_(2)), "for something else"),
    "a hook on the output": (with_output(lambda y: (y.requires_grad and y.register_hook(torch.neg), y)[1]), "else"),
    "told to others": (forwards(lambda self, x: (SEEN.append(x.mean()), nn.Conv2d.forward(self, x))[1]), "else too"),
    "counted in place": (
        with_weight(lambda self, w: (self.count.add_(1), w)[1], count=lambda: torch.zeros(())),
        "stores 'count'",
    ),
    "a second weight in evaluation": (
        with_weight(
            lambda self, w: w if self.training else self.kept, kept=lambda: nn.Parameter(torch.ones(16, 16, 3, 3))
        ),
        "else in training",
    ),
    "rounded": (with_weight(lambda self, w: w + (rounded(w) - w).detach()), "other gradients"),
    "signs": (with_weight(lambda self, w: w + (w.sign() - w).detach()), "other gradients"),
    "fake quantisation": (
        with_weight(lambda self, w: torch.fake_quantize_per_tensor_affine(w, 0.01, 0, -128, 127)),
        "other gradients",
    ),
    "a learned step": (
        with_weight(
            lambda self, w: (w / self.step + ((w / self.step).round() - w / self.step).detach()) * self.step,
            step=lambda: nn.Parameter(torch.tensor(0.02)),
        ),
        "other gradients",
    ),
    "detached": (with_weight(lambda self, w: w.detach()), "other gradients"),
    "a slower weight": (with_weight(lambda self, w: w * 0.1 + (w * 0.9).detach()), "other gradients"),
    "positive": (with_weight(lambda self, w: F.softplus(w)), "from being negative"),
    "in full precision": (forwards(in_full_precision), "where autocast is on"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_does_more_than_its_outputs_show_is_kept(name: str) -> None:
    kind, said = CLASSES[name]
    assert said in str(reason(net(kind)))


def test_averages_kept_for_evaluation() -> None:
    class Averaged(nn.Conv2d):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.register_buffer("average", self.weight.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight if self.training else self.average, self.bias)

    assert "another weight in training" in str(reason(net(Averaged))), "though the two are the same now"


@pytest.mark.parametrize(
    "kind",
    [
        with_weight(lambda self, w: w - w.mean((1, 2, 3), keepdim=True)),
        with_weight(lambda self, w: w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1)),
        with_weight(lambda self, w: w * 0.7),
        with_weight(lambda self, w: w + self.delta, delta=lambda: nn.Parameter(torch.zeros(16, 1, 1, 1))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_that_is_computed_smoothly_is_no_reason(kind: type[nn.Conv2d], dtype: torch.dtype) -> None:
    assert reason(net(kind).to(dtype), x=X.to(dtype)) is None


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (DropsWeights, "something else in training"),
        (AddsNoise, "draws random numbers"),
        (HasABranch, "something else in training"),
        (ForgetsItsBias, "something else in training"),
        (Noisy, "draws random numbers"),
        (Writes, "writes to its own"),
        (Gated, "takes 'gate'"),
        (Stores, "stores 'saved'"),
        (Collects, "stores 'seen'"),
        (LowRank, "some are frozen"),
        (Penalised, "'penalty' of its own"),
        (Aside, "'temperature' that is no part"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_class_that_does_more_is_kept(kind: type[nn.Conv2d], said: str, training: bool) -> None:
    model = net(kind).train(training)
    before = copy.deepcopy(model.state_dict())
    fdsurgery.convert(model, example_inputs=X)
    assert type(model.a) is kind and isinstance(model.b, FDConv2d)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items() if key.startswith("a."))
    assert model.a.training == training
    assert said in str(reason(net(kind).train(training)))


@pytest.mark.parametrize("kind", [Masked, MasksInPlace, Cut])
def test_masked_convolutions_are_kept_and_their_neighbours_too(kind: type[nn.Conv2d]) -> None:
    assert "at zero" in str(reason(net(kind))) and "'a' holds some of its weight at zero" in str(reason(net(kind), "b"))


@pytest.mark.parametrize("kind", [DropsWeights, AddsNoise, HasABranch, Noisy, Cut])
def test_and_so_is_one_without_values(kind: type[nn.Conv2d]) -> None:
    with torch.device("meta"):
        model = Net(kind)
    assert kind.__name__ in str(reason(model))


class HalvesInTraining(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2 if self.training else weight


class Upper(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu()


@pytest.mark.parametrize(
    ("rule", "said"), [(HalvesInTraining(), "in training"), (nn.Dropout(0.1), "in training"), (Upper(), "at zero")]
)
def test_parametrisations_are_tried_too(rule: nn.Module, said: str) -> None:
    model = net()
    parametrize.register_parametrization(model.a, "weight", rule)
    assert said in str(reason(model))


def test_calls_with_arguments_of_their_own() -> None:
    class Gates(Net):
        def features(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return F.relu(self.b(self.a(x, gate=x.mean((2, 3), keepdim=True))))

    assert "'gate' besides the input" in str(reason(Gates(Gated)))

    class ByAnotherName(Net):
        def features(self, x: Tensor) -> Tensor:
            return F.relu(self.b(self.a(x=F.relu(self.stem(x)))))

    class Renamed(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight, self.bias)

    assert "'x' besides the input" in str(reason(ByAnotherName(Renamed)))


class Generates(nn.Module):
    """Calls a part of itself with weights made outside, in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net, self.way = net(), way
        self.fast = nn.ParameterList(p.detach() + 0.01 for p in self.net.parameters())

    def forward(self, x: Tensor) -> Any:
        names = [name for name, _ in self.net.named_parameters()]
        if self.way == "functional_call":
            return torch.func.functional_call(self.net, dict(zip(names, self.fast, strict=True)), (x,))
        if self.way == "data":
            self.net.a.weight.data = self.fast[2].detach() * x.mean()
        else:
            self.net.a.weight = nn.Parameter(self.fast[2] + 0)
        return self.net(x)


@pytest.mark.parametrize(
    ("way", "said"), [("functional_call", "from outside"), ("data", "written to"), ("parameter", "from outside")]
)
def test_weights_from_outside(way: str, said: str) -> None:
    assert said in str(reason(Generates(way), "net.a"))


def test_inside_vmap() -> None:
    class Frames(Net):
        def forward(self, video: Tensor) -> Any:
            return torch.vmap(super().forward, in_dims=1, out_dims=1)(video)

    assert "torch.vmap" in str(reason(Frames(), x=torch.randn(2, 3, 3, 12, 12)))


@pytest.mark.parametrize("qat", [True, False])
def test_models_prepared_for_quantisation_are_refused(qat: bool) -> None:
    quantization: Any = torch.ao.quantization
    model = nn.Sequential(net(), nn.Identity()).train(qat)
    model.qconfig = quantization.get_default_qat_qconfig("x86") if qat else quantization.get_default_qconfig("x86")
    (quantization.prepare_qat if qat else quantization.prepare)(model, inplace=True)
    with pytest.raises(fdsurgery.UnsupportedModelError, match="prepared for quantisation"):
        fdsurgery.plan(model, example_inputs=X)


def test_members_go_along_and_come_back() -> None:
    model = net()
    model.a.register_buffer("mask", torch.ones(16), persistent=False)
    model.a.register_parameter("alpha", nn.Parameter(torch.tensor(1.5)))
    model.a.add_module("probe", nn.ReLU())
    model.a.note = "mine"
    model.a.register_forward_hook(lambda layer, inputs, output: output * layer.alpha)
    model.a.weight._no_weight_decay = True
    before, keys, bias = model(X), list(model.state_dict()), model.a.bias
    members = {name: set(vars(module)) for name, module in model.named_modules()}
    fdsurgery.convert(model, example_inputs=X)
    assert isinstance(model.a, FDConv2d) and model.a.bias is bias and model.a.dft_weight._no_weight_decay
    assert model.a.note == "mine" and model.a.probe is not None and "a.mask" not in model.state_dict()
    torch.testing.assert_close(model(X), before)
    fdsurgery.restore(model)
    assert list(model.state_dict()) == keys and model.a.bias is bias and model.a.weight._no_weight_decay
    assert {name: set(vars(module)) for name, module in model.named_modules()} == members
    torch.testing.assert_close(model(X), before)


def test_the_class_comes_back() -> None:
    class Marked(nn.Conv2d):
        pass

    model = net(Marked)
    fdsurgery.convert(model, example_inputs=X)
    assert isinstance(model.a, FDConv2d)
    assert type(fdsurgery.restore(model).a) is Marked and type(model.b) is nn.Conv2d


def test_methods_put_onto_a_layer_keep_it() -> None:
    model = net()
    model.a.penalty = Penalised.penalty.__get__(model.a)
    assert "'penalty' was put on" in str(reason(model))


def test_hooks_of_parameters() -> None:
    def hooked(hang: Callable[[Tensor], Any]) -> Net:
        model = net()
        hang(model.a.weight)
        return model

    for hang in (lambda w: w.register_hook(lambda g: g), lambda w: w.register_post_accumulate_grad_hook(print)):
        assert "its weight has hooks" in str(reason(hooked(hang)))
    assert "tensor 'mask' of others" in str(reason(hooked(lambda w: setattr(w, "mask", torch.ones(16)))))
    model, heard = net(), []
    model.a.bias.register_hook(heard.append)
    fdsurgery.convert(model, example_inputs=X)
    model(X).sum().backward()
    assert len(heard) == 1
    twice = net()
    twice.a.same = twice.a.weight
    assert "under two names" in str(reason(twice))


class Marked(nn.Parameter):
    pass


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (lambda model: setattr(model.b.weight, "data", model.a.weight.data), "shares a parameter with 'b.weight'"),
        (lambda model: setattr(model, "decayed", [{"params": (model.a.weight,)}]), "shares a parameter with 'decayed'"),
        (lambda model: setattr(model.a, "weight", Marked(model.a.weight.data)), "is a Marked"),
        (lambda model: setattr(model.a.weight, "past", [torch.ones(16)]), "tensor 'past' of others"),
    ],
    ids=["memory", "list", "class", "tensors"],
)
def test_a_weight_that_others_know(share: Callable[[Any], None], said: str) -> None:
    model = net()
    share(model)
    assert said in str(reason(model))


class Elsewhere(Net):
    """Calls a layer in training, and perhaps in evaluation, that it holds in a second place."""

    def __init__(self, hold: Callable[[nn.Module], Any], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.place, self.call = hold(self.a), call

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return F.relu(self.b(self.call(self.place, x) if self.training else self.a(x)))


@dataclass
class Box:
    layer: Any


@pytest.mark.parametrize(
    ("hold", "call"),
    [
        (lambda layer: deque([layer]), lambda place, x: place[0](x)),
        (lambda layer: {layer}, lambda place, x: next(iter(place))(x)),
        (lambda layer: Box([layer]), lambda place, x: place.layer[0](x)),
    ],
    ids=["deque", "set", "object"],
)
def test_layers_are_swapped_wherever_a_model_holds_them(hold: Any, call: Any) -> None:
    torch.manual_seed(0)
    model = Elsewhere(hold, call)
    fdsurgery.convert(model, example_inputs=X)
    model.train()(X).sum().backward()
    assert isinstance(model.a, FDConv2d) and model.a.dft_weight.grad is not None
    fdsurgery.restore(model)
    model(X).sum().backward()
    assert type(model.a) is nn.Conv2d and model.a.weight.grad is not None


@pytest.mark.parametrize(
    "hold",
    [lambda layer: lambda x: layer(x), lambda layer: functools.partial(layer), lambda layer: layer.forward],
    ids=["closure", "partial", "method"],
)
def test_functions_that_hold_a_layer_keep_it(hold: Any) -> None:
    torch.manual_seed(0)
    assert "a function that the model keeps ('place')" in str(reason(Elsewhere(hold, lambda place, x: place(x))))


def test_a_call_that_a_swap_would_not_reach_is_found_by_the_check() -> None:
    held: list[Any] = []

    class Global(Net):
        def features(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return F.relu(self.b(self.a(x) + held[0](x)))

    model = Global()
    held.append(model.a)
    before = model(X)
    assert "read past the layer" in str(reason(model))
    torch.testing.assert_close(fdsurgery.convert(model, example_inputs=X)(X), before)


def test_backward_hooks_of_a_layer() -> None:
    model, heard = net(), []
    model.a.register_full_backward_hook(lambda layer, given, got: heard.append(layer))
    model.b.register_full_backward_pre_hook(lambda layer, got: heard.append(layer))
    fdsurgery.convert(model, example_inputs=X)
    model(X).sum().backward()
    assert heard == [model.b, model.a] and isinstance(model.a, FDConv2d)


def test_hooks_that_know_their_module() -> None:
    model, heard = net(), []
    model.a.register_load_state_dict_pre_hook(lambda layer, *rest: heard.append(layer))
    parametrizations.weight_norm(model.b)
    fdsurgery.convert(model, example_inputs=X)
    model.load_state_dict(model.state_dict())
    assert heard == [model.a]
    for hooks in (model.b._load_state_dict_pre_hooks, fdsurgery.restore(model).b._load_state_dict_pre_hooks):
        assert not hooks, "the hook of weight norm ended with it"


def test_a_failed_swap_leaves_hooks_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    model.a.register_load_state_dict_pre_hook(lambda layer, *rest: None)
    parametrizations.weight_norm(model.b)
    hooks = [dict(layer._load_state_dict_pre_hooks) for layer in (model.a, model.b)]
    plan = fdsurgery.plan(model, example_inputs=X)
    monkeypatch.setattr("fdsurgery.surgery._check_in_use", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fdsurgery.apply(plan, model)
    assert hooks == [dict(layer._load_state_dict_pre_hooks) for layer in (model.a, model.b)]


def test_conversion_inside_inference_mode_trains() -> None:
    model, x = net(), X
    with torch.inference_mode():
        fdsurgery.apply(fdsurgery.plan(model, example_inputs=x * 1), model)
    assert not any(parameter.is_inference() for parameter in (*model.parameters(), *model.buffers()))
    model(x).sum().backward()
    with torch.inference_mode():
        fdsurgery.restore(model)
    model(x).sum().backward()
    assert model.a.weight.grad is not None


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(numpy.random.rand()), random.random()


def seeded(seed: int) -> None:
    torch.manual_seed(seed), numpy.random.seed(seed), random.seed(seed)


def test_random_state_is_left_alone() -> None:
    model, plain = net(), net()
    seeded(3)
    expected = draws()
    for act in (
        lambda: fdsurgery.plan(plain, example_inputs=X),
        lambda: fdsurgery.convert(model, example_inputs=X),
        lambda: fdsurgery.restore(model),
    ):
        seeded(3)
        act()
        assert draws() == expected


def test_new_modulation_depends_on_the_seed() -> None:
    def modulation(seed: int) -> dict[str, Tensor]:
        model = net()
        seeded(seed)
        fdsurgery.convert(model, example_inputs=X)
        return {key: value for key, value in model.state_dict().items() if ".KSM" in key}

    first, again, other = modulation(1), modulation(1), modulation(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


class TestStalePlans:
    def chain(self, conv: Callable[[], nn.Conv2d] = lambda: nn.Conv2d(32, 32, 3, padding=1)) -> nn.Module:
        torch.manual_seed(0)
        first, last = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), conv(), nn.ReLU(), last)

    @pytest.mark.parametrize(
        ("conv", "said"),
        [
            (lambda: nn.Conv2d(32, 32, 5, padding=2), "kernel_size was (3, 3) in the plan and is (5, 5) here"),
            (lambda: nn.Conv2d(32, 32, 3, stride=2, padding=1), "stride was (1, 1)"),
            (lambda: nn.Conv2d(32, 32, 3, padding=2, dilation=2), "dilation was (1, 1)"),
            (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=4), "groups was 1"),
            (lambda: nn.Conv2d(32, 32, 3), "padding was (1, 1)"),
            (lambda: nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"), "padding_mode was zeros"),
            (lambda: Stores(32, 32, 3, padding=1), "stores 'saved'"),
            (lambda: type("Other", (nn.Conv2d,), {})(32, 32, 3, padding=1), "layer_class was Conv2d"),
        ],
    )
    def test_geometry_and_class(self, conv: Callable[[], nn.Conv2d], said: str) -> None:
        plan, model = fdsurgery.plan(self.chain(), example_inputs=X), self.chain(conv)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(fdsurgery.PlanError) as error:
            fdsurgery.apply(plan, model)
        assert said in str(error.value) and "plan.exclude('2'" in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_forward_that_was_replaced_since(self) -> None:
        plan, model = fdsurgery.plan(self.chain(), example_inputs=X), self.chain()
        own = model[2].forward
        model[2].forward = lambda x: own(x) * 2
        with pytest.raises(fdsurgery.PlanError, match="forward was replaced"):
            fdsurgery.apply(plan, model)
        fdsurgery.apply(fdsurgery.Plan.from_dict(plan.to_dict()), self.chain())


def test_a_failing_check_names_the_layer_and_the_way_out() -> None:
    class Reads(Net):
        def features(self, x: Tensor) -> Tensor:
            x = self.a(self.stem(x))
            if type(self.b) is not nn.Conv2d:
                raise TypeError("not mine")
            return self.b(x)

    model = Reads()
    with pytest.raises(fdsurgery.RewriteError) as error:
        fdsurgery.convert(model, example_inputs=X)
    assert "not mine" in str(error.value) and "plan.exclude(" in str(error.value)
    assert "example_inputs" not in str(error.value) and type(model.a) is nn.Conv2d


def designed(weight: Tensor, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(weight.shape[1] * groups, weight.shape[0], weight.shape[2], padding=1, groups=groups, bias=False)
    conv.weight.data = weight
    return conv.requires_grad_(False)


BLUR = torch.tensor([1.0, 2, 1])
HAAR = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.5, -0.5], [0.5, -0.5]]]).repeat(8, 1, 1)[:, None]
SOBEL = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8


@pytest.mark.parametrize(
    "layer",
    [
        designed(torch.arange(16.0).view(1, 16, 1, 1).expand(4, 16, 1, 1).clone()),
        designed((BLUR[:, None] * BLUR / 16).expand(16, 1, 3, 3).clone(), groups=16),
        designed(HAAR, groups=16),
        designed(SOBEL.expand(16, 1, 3, 3).clone(), groups=16),
        designed(torch.linspace(0, 1, 64).view(4, 16, 1, 1).clone()),
    ],
    ids=["ramp", "blur", "haar", "sobel", "linear"],
)
def test_constants_that_look_like_layers(layer: nn.Conv2d) -> None:
    recipe = fdsurgery.recipe.parse_recipe("swap: [{where: {kind: conv}}]")
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), layer, nn.Conv2d(layer.out_channels, 4, 1))
    plan = fdsurgery.plan(model, recipe, example_inputs=X)
    assert "constant" in next(decision.reason for decision in plan.kept if decision.site.name == "2")
    layer.weight.data.normal_()
    assert len(fdsurgery.plan(model, recipe, example_inputs=X).swaps) == 3, "a frozen learned weight is none"


def test_numbers_that_no_spectrum_holds() -> None:
    def with_weight(change: Callable[[Tensor], Any], dtype: torch.dtype = torch.float32) -> str | None:
        model = net()
        with torch.no_grad():
            change(model.a.weight)
        return reason(model.to(dtype), x=X.to(dtype))

    assert with_weight(lambda w: w) is None
    assert "not finite" in str(with_weight(lambda w: w[3, 2, 1].fill_(float("nan"))))
    assert "not finite" in str(with_weight(lambda w: w[3, 2, 1].fill_(float("inf"))))
    assert "overflow in float16" in str(with_weight(lambda w: w.fill_(900.0), torch.float16))
    assert with_weight(lambda w: w.fill_(2.0), torch.float16) is None
    assert "differ too much in scale" in str(with_weight(lambda w: w[:4].div_(300)))
    assert with_weight(lambda w: w[:4].div_(300), torch.float64) is None
    assert "differ too much in scale" in str(with_weight(lambda w: w[:1].mul_(1e6)))
    assert with_weight(lambda w: w[:4].zero_()) is None and with_weight(lambda w: w[:4].mul_(1e-8)) is None, "dead ones"
    assert "exactly zero" in str(with_weight(lambda w: w[:, :, 2].zero_()))
    assert with_weight(lambda w: w.zero_()) is None


def test_the_limit_on_scales_is_where_the_transform_breaks_its_promise() -> None:
    for ratio, holds in ((30, True), (300, False)):
        conv = nn.Conv2d(128, 128, 3)
        with torch.no_grad():
            conv.weight[:4] /= ratio
        error = (FDConv2d.from_conv(conv).to_conv().weight - conv.weight).flatten(1).norm(dim=1)
        assert bool((error / conv.weight.flatten(1).norm(dim=1)).max() < 1e-5) == holds


def test_anyway_swaps_and_says_so() -> None:
    model = net()
    with torch.no_grad():
        model.a.weight[:, :, 2] = 0
    recipe = fdsurgery.recipe.parse_recipe("swap: [{where: {name: [a, b]}, anyway: true}]")
    plan = fdsurgery.plan(model, recipe, example_inputs=X)
    assert [decision.site.name for decision in plan.swaps] == ["a", "b"]
    assert "swapped anyway: 33% of its weight is exactly zero" in plan.swaps[0].reason
    assert "swapped anyway" in str(plan)
    fdsurgery.apply(fdsurgery.Plan.from_dict(plan.to_dict()), model)
    assert isinstance(model.a, FDConv2d)


def test_what_is_no_site_is_counted() -> None:
    model = nn.Sequential(
        net().stem, nn.ConvTranspose2d(16, 16, 2), nn.ConvTranspose2d(16, 16, 2), nn.Conv2d(16, 16, 3)
    )
    model[3].add_module("aside", nn.Conv1d(2, 2, 1))
    plan = fdsurgery.plan(model, example_inputs=X)
    assert plan.left_out == {"ConvTranspose2d": 2, "Conv1d": 1}
    assert "2 x ConvTranspose2d, 1 x Conv1d: not layers that can be swapped" in " ".join(str(plan).split())
    assert fdsurgery.Plan.from_dict(plan.to_dict()) == plan
    assert "not layers" not in str(fdsurgery.plan(net(), example_inputs=X))


def test_a_converted_model_can_be_pickled() -> None:
    model = net()
    parametrizations.weight_norm(model.a)
    fdsurgery.convert(model, example_inputs=X)
    for _ in range(2):
        torch.save(model, io.BytesIO())
        fdsurgery.restore(model)

"""Functional calls in `torch.fx` graphs become modules, and graphs convert as the models do that they come from."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from models import CASES
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdsurgery import PlanError, RewriteError, UnsupportedModelError, convert
from fdsurgery.operators.fdconv import FDConvOperator
from fdsurgery.rewrite import graph as rewriter
from fdsurgery.rewrite.graph import layer_calls, modules_from_calls
from fdsurgery.verification import relative_error

DYNAMIC = (FDConv2d, FDLinear)


class Functional(nn.Module):
    """Every spelling of a call that is a layer, with weights wherever people keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.w = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.b = nn.Parameter(torch.randn(16))
        self.bare = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.w_conv = nn.Identity()  # the name that `w` would get
        self.weights = nn.ParameterList([torch.randn(32, 8, 3, 3) / 8, torch.randn(32, 1, 5, 5) / 5])
        self.up = nn.Linear(32, 64)
        self.down = nn.ParameterDict({"weight": torch.randn(32, 64) / 8, "bias": torch.randn(32)})
        self.head = nn.Parameter(torch.randn(7, 32) / 6)
        self.norm = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.w_conv(self.stem(x)).relu()
        x = F.conv2d(x, self.w, self.b, (2, 1), 1).relu()
        x = torch.conv2d(x, weight=self.bare, bias=None, padding="same", dilation=2).relu()
        x = F.conv2d(bias=None, input=x, weight=self.weights[0], groups=2, stride=[1], padding=(1, 0)).relu()
        x = self.norm(torch.convolution(x, self.weights[1], None, [1, 1], [2, 2], [1, 1], False, [0, 0], 32))
        tokens = x.flatten(2).transpose(1, 2)
        hidden = F.gelu(F.linear(tokens, self.up.weight, self.up.bias))
        tokens = tokens + F.linear(hidden, bias=self.down["bias"], weight=self.down["weight"])
        return F.linear(tokens.mean(1), self.head)


NAMES = {"w_conv_1", "bare_conv", "weights.0_conv", "weights.1_conv", "up", "down", "head_linear"}


def traced(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=1024)},)).module()


def extracted(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torchvision.models.feature_extraction.create_feature_extractor(model, ["norm", "linear_2"])


def functional_model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    return fdsurgery.testing.settle_(Functional(), x), x


def state(graph_module: fx.GraphModule) -> tuple[Any, ...]:
    """All that can be told about a graph module: objects, names, order, values, nodes and code."""
    nodes = [(node, node.op, node.name, node.target, node.args, node.kwargs) for node in graph_module.graph.nodes]
    modules = [(name, id(module)) for name, module in graph_module.named_modules()]
    tensors = [(name, id(tensor)) for name, tensor in graph_module.named_parameters(remove_duplicate=False)]
    values = [(name, tensor.tolist()) for name, tensor in graph_module.state_dict().items()]
    modes = [module.training for module in graph_module.modules()]
    return id(graph_module.graph), nodes, modules, tensors, values, modes, graph_module.code


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in torch.utils._pytree.tree_leaves(model(x)) if isinstance(leaf, Tensor)]


def difference(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    return max(relative_error(a, b) for a, b in zip(outputs(model, x), outputs(other, x), strict=True))


# Calls become modules


@pytest.mark.parametrize("make", [traced, exported, extracted])
def test_every_spelling_becomes_a_module(make: Callable[[nn.Module, Tensor], fx.GraphModule]) -> None:
    model, x = functional_model()
    graph_module = make(model, x)
    before = outputs(graph_module, x)
    parameters = {id(parameter) for parameter in graph_module.parameters()}
    calls = layer_calls(graph_module)
    assert [call.obstacle for call in calls] == [None] * len(calls)
    # An exported model has neither the name of a module without parameters, nor modules of its own.
    expected = NAMES if make is not exported else NAMES - {"w_conv_1"} | {"w_conv", "stem"}
    assert {call.name for call in calls} == expected

    assert modules_from_calls(graph_module) is graph_module
    assert all(torch.equal(a, b) for a, b in zip(outputs(graph_module, x), before, strict=True))
    assert {id(parameter) for parameter in graph_module.parameters()} == parameters
    assert not any(node.op == "get_attr" and "norm" not in str(node.target) for node in graph_module.graph.nodes)
    assert layer_calls(graph_module) == []
    for name in expected:
        layer = graph_module.get_submodule(name)
        assert type(layer) in (nn.Conv2d, nn.Linear) and not layer.training
    assert {"up.weight", "up.bias", "down.weight", "down.bias"} <= set(graph_module.state_dict())


def test_geometry_is_read_from_the_arguments() -> None:
    model, _ = functional_model()
    layers: dict[str, Any] = dict(modules_from_calls(fx.symbolic_trace(model)).named_modules())
    assert layers["w_conv_1"].stride == (2, 1) and layers["w_conv_1"].padding == (1, 1)
    assert layers["bare_conv"].padding == "same" and layers["bare_conv"].dilation == (2, 2)
    assert layers["weights.0_conv"].stride == (1, 1) and layers["weights.0_conv"].padding == (1, 0)
    assert layers["weights.0_conv"].groups == 2 and layers["weights.0_conv"].in_channels == 16
    assert layers["weights.1_conv"].groups == layers["weights.1_conv"].in_channels == 32
    assert layers["head_linear"].in_features == 32 and layers["head_linear"].bias is None


@pytest.mark.parametrize("make", [traced, exported, extracted])
def test_a_graph_converts(make: Callable[[nn.Module, Tensor], fx.GraphModule]) -> None:
    model, x = functional_model()
    graph_module = make(model, x)
    before = outputs(graph_module, x)
    assert convert(graph_module, example_inputs=x) is graph_module
    swapped = {name for name, module in graph_module.named_modules() if isinstance(module, DYNAMIC)}
    w_conv = "w_conv" if make is exported else "w_conv_1"
    assert swapped == {w_conv, "bare_conv", "weights.0_conv", "weights.1_conv", "up", "down"}
    assert max(relative_error(a, b) for a, b in zip(outputs(graph_module, x), before, strict=True)) < 1e-5
    graph_module.graph.lint()

    copied = copy.deepcopy(graph_module)
    if make is not exported:
        copied.eval()  # torchvision's copies are in training mode
    assert difference(copied, graph_module, x) == 0
    for parameter in copied.parameters():
        nn.init.normal_(parameter, std=0.1)
    copied.load_state_dict(graph_module.state_dict())
    assert difference(copied, graph_module, x) == 0

    sum(output.square().mean() for output in torch.utils._pytree.tree_leaves(graph_module(x))).backward()
    for name, parameter in graph_module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_a_converted_trace_pickles() -> None:
    model, x = functional_model()
    graph_module = convert(fx.symbolic_trace(model), example_inputs=x)
    for node in graph_module.graph.nodes:
        node.type = None  # an annotation that is a string, which torch 2.8 does not pickle
    graph_module.recompile()
    assert difference(pickle.loads(pickle.dumps(graph_module)), graph_module, x) == 0


def test_new_layers_are_in_the_mode_that_was_exported() -> None:
    model, x = functional_model()
    for training in (True, False):
        graph_module = convert(exported(model.train(training), x), example_inputs=x)
        assert graph_module.training, "torch tells the mode now: ask it"
        dynamic = [module for module in graph_module.modules() if isinstance(module, DYNAMIC)]
        assert {part.training for module in dynamic for part in module.modules()} == {training}


def test_a_module_that_switches_graphs_has_both_rewritten() -> None:
    model, x = functional_model()
    extractor = extracted(model, x)
    convert(extractor, example_inputs=x)
    for training in (True, False):
        assert not layer_calls(extractor.train(training))
        assert all(output.isfinite().all() for output in outputs(extractor, x))
        assert outputs(extractor, x)[1].shape == (2, 7)


def test_a_layer_in_one_of_two_graphs_only_stays() -> None:
    class Switches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.other = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.w, padding=1 if self.training else 0), F.conv2d(x, self.other)

    extractor = torchvision.models.feature_extraction.create_feature_extractor(Switches(), ["conv2d", "conv2d_1"])
    first, second = layer_calls(extractor)
    assert "switches between graphs" in str(first.obstacle) and second.name == "other_conv"


def test_dtype_and_requires_grad_stay() -> None:
    model, x = functional_model()
    model.double().up.requires_grad_(False)
    graph_module = convert(fx.symbolic_trace(model), example_inputs=x.double())
    assert isinstance(graph_module.get_submodule("up"), FDLinear)
    assert not any(parameter.requires_grad for parameter in graph_module.get_submodule("up").parameters())
    assert {parameter.dtype for parameter in graph_module.parameters()} == {torch.float64}
    assert difference(graph_module, model, x.double()) < 1e-12


def test_aten_convolutions_become_modules() -> None:
    model, x = functional_model()
    program = torch.export.export(model, (x,)).run_decompositions({})
    graph_module = program.module()
    graph_module.graph.eliminate_dead_code()
    for node in graph_module.graph.nodes:  # as other exporters write it
        if node.target is torch.ops.aten.conv2d.default:
            given = {**dict(zip(("", "", "", "stride", "padding", "dilation", "groups"), node.args, strict=False))}
            args = (*node.args[:2], (*node.args, None)[2] if len(node.args) > 2 else None)
            rest = [given.get(key, [start, start]) for key, start in (("stride", 1), ("padding", 0), ("dilation", 1))]
            node.target = torch.ops.aten.convolution.default
            node.args = (*args, *rest, False, [0, 0], given.get("groups", 1))
    graph_module.recompile()
    assert any(node.target is torch.ops.aten.convolution.default for node in graph_module.graph.nodes)
    before = outputs(graph_module, x)
    modules_from_calls(graph_module)
    assert not any("conv" in str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
    assert torch.equal(outputs(graph_module, x)[0], before[0])


# Calls that stay


class Stays(nn.Module):
    """One call that is a layer, and many that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.tied = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.first = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.called = nn.Linear(8, 8)
        self.scaled = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.moving = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.register_buffer("constant", torch.randn(8, 8, 1, 1))
        self.upward = nn.Parameter(torch.randn(8, 8, 2, 2))
        self.line = nn.Parameter(torch.randn(8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.plain, padding=1)
        x = F.conv2d(F.conv2d(x, self.tied, padding=1), self.tied, padding=2, dilation=2)
        x = F.conv2d(x, self.first, padding=1)
        x = self.called(F.linear(x.transpose(1, 3), self.called.weight)).transpose(1, 3)
        x = F.conv2d(x, self.scaled * 2)
        x = F.conv2d(x, self.moving, padding=0)
        x = F.conv2d(x, self.constant)
        x = F.conv_transpose2d(x, self.upward, stride=2)
        return F.conv1d(x.flatten(2), self.line, padding=1)


REASONS = {
    "conv2d_1": "another use",
    "conv2d_2": "another use",
    "conv2d_3": "held under several names, first, alias",
    "linear": "another use",
    "conv2d_4": "weight is computed",
    "conv2d_5": "padding is computed",
    "conv2d_6": "not a parameter",
    "conv_transpose2d": "transposed",
    "conv1d": "two-dimensional",
}


def compute_padding(graph_module: fx.GraphModule, name: str) -> None:
    """Have a padding of zero computed in the graph; torch 2.8 traces no convolution that is given such a one."""
    (call,) = (node for node in graph_module.graph.nodes if node.name == name)
    with graph_module.graph.inserting_before(call):
        dims = graph_module.graph.call_method("dim", (call.args[0],))
        call.update_kwarg("padding", graph_module.graph.call_function(operator.sub, (dims, 4)))
    graph_module.recompile()


def test_what_is_no_layer_stays_and_the_reason_is_told() -> None:
    torch.manual_seed(0)
    model, x = Stays(), torch.randn(2, 8, 6, 6)
    graph_module = fx.symbolic_trace(model)
    graph_module.alias = graph_module.first
    compute_padding(graph_module, "conv2d_5")
    obstacles = {call.node.name: call.obstacle for call in layer_calls(graph_module)}
    assert obstacles.pop("conv2d") is None
    assert obstacles.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert reason in str(obstacles[name]), name

    modules_from_calls(graph_module)
    assert {call.node.name: call.obstacle for call in layer_calls(graph_module)} == obstacles
    assert torch.equal(graph_module(x), model(x))
    assert graph_module.alias is graph_module.first


def test_a_transposed_aten_convolution_stays() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("w")
    arguments = (x, weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)
    graph.output(graph.call_function(torch.ops.aten.convolution.default, arguments))
    root = nn.Module()
    root.w = nn.Parameter(torch.randn(4, 4, 2, 2))
    (call,) = layer_calls(fx.GraphModule(root, graph))
    assert "transposed" in str(call.obstacle)


def test_a_linear_with_the_batch_elsewhere_stays() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).transpose(0, 1))

    model, x = SequenceFirst(), torch.randn(3, 5, 8)
    calls = layer_calls(exported(model, x))
    assert [call.name for call in calls] == ["first", ""]
    assert "batch on axis 1" in str(calls[1].obstacle)

    model.second = model.first
    graph_module = exported(model, x)
    assert ["another use" in str(call.obstacle) for call in layer_calls(graph_module)] == [True, False]
    assert torch.equal(modules_from_calls(graph_module)(x), model(x))


# All or nothing


@pytest.mark.parametrize("make", [traced, exported])
@pytest.mark.parametrize("fails", ["build", "check", "lint", "plan", "place"])
def test_a_graph_that_cannot_be_converted_is_left_as_it_was(
    make: Callable[[nn.Module, Tensor], fx.GraphModule], fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = functional_model()
    graph_module = make(model, x)
    before = state(graph_module)
    expected = outputs(graph_module, x)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("injected")

    seen: list[nn.Module] = []

    def fail_third(self: Any, layer: nn.Module, settings: Any) -> Any:
        seen.append(layer)
        return fail() if len(seen) == 12 else original(self, layer, settings)

    original = FDConvOperator.replace
    settings: dict[str, Any] = {}
    match fails:
        case "build":
            monkeypatch.setattr(FDConvOperator, "replace", fail_third)
        case "check":
            monkeypatch.setattr("fdsurgery.surgery._check_in_use", fail)
        case "lint":
            monkeypatch.setattr(fx.Graph, "lint", fail)
        case "place":
            place = rewriter._move_parameters
            monkeypatch.setattr(
                rewriter, "_move_parameters", lambda *args: fail() if args[1].name == "up" else place(*args)
            )
        case "plan":
            settings = {"no_such_setting": 1}
    with pytest.raises((RewriteError, RuntimeError, fdsurgery.RecipeError)):
        convert(graph_module, example_inputs=x, **settings)
    assert state(graph_module) == before
    assert torch.equal(outputs(graph_module, x)[0], expected[0])

    monkeypatch.undo()
    convert(graph_module, example_inputs=x)
    assert relative_error(outputs(graph_module, x)[0], expected[0]) < 1e-5


def test_errors_name_what_would_be_right() -> None:
    model, x = functional_model()
    with pytest.raises(UnsupportedModelError, match=r"its module\(\)"):
        convert(torch.export.export(model, (x,)))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"fdsurgery\.convert"):
        modules_from_calls(model)  # type: ignore[arg-type]

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(x, self.w, padding=1).relu(), self.w)

    graph_module = fx.symbolic_trace(Tied())
    before = state(graph_module)
    with pytest.raises(
        PlanError, match=r"2 functional call\(s\) cannot be made modules, conv2d: .*'w' has another use"
    ):
        convert(graph_module, example_inputs=x)
    assert state(graph_module) == before


# Graphs of real models convert as the models do


def small_resnet() -> nn.Module:
    return timm.create_model("resnet18", layers=(1, 1, 1, 1), channels=(16, 24, 32, 40), num_classes=7)


def small_mixer() -> nn.Module:
    return timm.models.mlp_mixer.MlpMixer(img_size=64, num_blocks=2, embed_dim=32, num_classes=7)


def small_poolformer() -> nn.Module:
    return timm.models.metaformer.MetaFormer(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=7)


def small_mobilenet() -> nn.Module:
    blocks = [[1, 8, 1, 1], [6, 16, 2, 2], [6, 24, 2, 2]]
    return torchvision.models.MobileNetV2(7, inverted_residual_setting=blocks, width_mult=0.5)


def small_densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=7)


def small_torchvision_swin() -> nn.Module:
    return torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=7)


def small_torchvision_convnext() -> nn.Module:
    blocks = [
        torchvision.models.convnext.CNBlockConfig(12, 24, 1),
        torchvision.models.convnext.CNBlockConfig(24, None, 1),
    ]
    return torchvision.models.ConvNeXt(blocks, num_classes=7)


def small_torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(64, 16, 2, 4, 48, 96, num_classes=7)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm resnet": small_resnet,
    "timm convnext (linear FFN)": CASES["timm convnext (linear FFN)"].build,
    "timm convnext (1x1 FFN)": CASES["timm convnext (1x1 FFN)"].build,
    "timm swin": CASES["timm swin"].build,
    "timm vit": CASES["timm vit"].build,
    "timm mixer": small_mixer,
    "timm poolformer": small_poolformer,
    "torchvision mobilenet": small_mobilenet,
    "torchvision densenet": small_densenet,
    "torchvision swin": small_torchvision_swin,
    "torchvision convnext": small_torchvision_convnext,
    "torchvision vit": small_torchvision_vit,
}


@pytest.mark.parametrize("name", MODELS)
def test_both_rewriters_agree(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    x = torch.randn(2, 3, *((56, 56) if name == "timm swin" else (64, 64)))
    fdsurgery.testing.settle_(model, x)
    plan = fdsurgery.plan(model, "generic", example_inputs=x)
    tree = fdsurgery.apply(plan, copy.deepcopy(model))
    graph_module = fdsurgery.apply(plan, modules_from_calls(exported(model, x)))
    layers = {part: module for part, module in tree.named_modules() if isinstance(module, DYNAMIC)}
    assert layers.keys() == {part for part, module in graph_module.named_modules() if isinstance(module, DYNAMIC)}
    assert difference(tree, model, x) < 1e-5
    assert difference(graph_module, model, x) < 1e-5

    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tree.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 * parameter.std(unbiased=False) + 0.01))
    assert dict(tree.named_parameters()).keys() == dict(graph_module.named_parameters()).keys()
    graph_module.load_state_dict(tree.state_dict(), strict=False)
    assert difference(tree, model, x) > 1e-3, "the modulation is still neutral"
    assert difference(graph_module, tree, x) < 1e-5
    other_batch = torch.cat([x, x.flip(0) + 1, x * 2])
    assert difference(graph_module, tree, other_batch) < 1e-5


def test_packed_attention_becomes_modules_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    for batch_first in (True, False):
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first).eval()
        graph_module = exported(layer, x)
        modules_from_calls(graph_module)
        assert difference(graph_module, layer, x) < 1e-6

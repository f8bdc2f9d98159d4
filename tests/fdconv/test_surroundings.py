"""The layers compute the same whatever surrounds them: defaults of torch, modes, threads, layouts of inputs, batches.

What is right is told by PyTorch's own layer where the modulation is neutral, and where it is not by the same layer in
float64, in differentiable operations of torch, in no particular surroundings.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fdconv
import fdsurgery
from fdconv import FDConfig, FDConv2d, FDLinear
from fdconv.cpu import kernels
from fdconv.reference import Convolution, per_sample, sample_weights

SMALL = FDConfig(kernel_num=5, min_attention_channels=3, bands=(2, 4), norm="rms")
KINDS: dict[str, Callable[..., nn.Module]] = {
    "3x3": lambda **kw: nn.Conv2d(4, 6, 3, padding=1, **kw),
    "3x3 strided": lambda **kw: nn.Conv2d(4, 6, 3, stride=2, bias=False, **kw),
    "1x1": lambda **kw: nn.Conv2d(4, 6, 1, **kw),
    "1x1 strided": lambda **kw: nn.Conv2d(4, 6, 1, stride=2, bias=False, **kw),
    "depthwise": lambda **kw: nn.Conv2d(4, 4, 3, padding=1, groups=4, **kw),
    "grouped": lambda **kw: nn.Conv2d(4, 6, 3, padding=1, groups=2, **kw),
    "reflect": lambda **kw: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", **kw),
    "same": lambda **kw: nn.Conv2d(4, 6, (2, 3), padding="same", **kw),
    "linear": lambda **kw: nn.Linear(4, 6, **kw),
    "linear without bias": lambda **kw: nn.Linear(4, 6, bias=False, **kw),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))
BACKENDS = ["torch", *([] if kernels.reason_missing() else ["cpp"])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def dynamic(static: nn.Module, config: FDConfig = SMALL) -> FDConv2d | FDLinear:
    if isinstance(static, nn.Conv2d):
        return FDConv2d.from_conv(static, config)
    assert isinstance(static, nn.Linear)
    return FDLinear.from_linear(static, config)


def perturb(layer: nn.Module, scale: float = 0.3) -> nn.Module:
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(("KSM", "FBM")):
                noise = torch.randn(parameter.shape, generator=source, dtype=torch.float32)
                parameter.add_((noise * scale).to(parameter.dtype))
    return layer


def pair(kind: str, **place: Any) -> tuple[nn.Module, FDConv2d | FDLinear]:
    torch.manual_seed(0)
    static = KINDS[kind](device="cpu", dtype=torch.float32, **place)
    return static, dynamic(static)


def image(kind: str, batch: int = 3) -> Tensor:
    source = torch.Generator().manual_seed(2)
    shape = (batch, 5, 4) if kind.startswith("linear") else (batch, 4, 7, 6)
    return torch.randn(shape, generator=source, dtype=torch.float32, device="cpu")


@contextlib.contextmanager
def using(backend: Any) -> Iterator[None]:
    with fdconv.set_backend(backend):
        yield


Answer = dict[str, Tensor]


def answer(layer: nn.Module, x: Tensor, weight: Callable[[nn.Module], Tensor] | None = None) -> Answer:
    """Output and all gradients, those of the static weight included, of a weighted sum of the output."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    source = torch.Generator().manual_seed(3)
    weights = torch.randn(y.shape, generator=source, dtype=torch.float32, device="cpu").to(y.dtype)
    (y * weights).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def reference(layer: nn.Module, x: Tensor) -> Answer:
    """The answer in float64 by the reference, in no particular surroundings."""
    exact = copy.deepcopy(layer).double()
    assert isinstance(exact, (FDConv2d, FDLinear))

    def forward(input: Tensor) -> Tensor:
        context, given, conv = exact._context(input), input, None
        if isinstance(exact, FDConv2d):
            given, padding = exact._padded(input if exact.FBM is None else exact.FBM(input))
            conv = Convolution(exact.stride, padding, exact.dilation, exact.groups)
        weight = sample_weights(exact._spectra(), exact.frequency_group, exact._factors(context), exact._weight_shape())
        y = per_sample(given, weight, conv)
        if exact.bias is None:
            return y
        return y + (exact.bias if conv is None else exact.bias.view(-1, 1, 1))

    exact.forward = forward  # type: ignore[method-assign]
    return answer(exact, x.double())


def assert_same(found: Answer, right: Answer, tolerance: float) -> None:
    assert found.keys() == right.keys()
    for name, values in right.items():
        assert found[name].shape == values.shape, name
        scale = values.double().norm().clamp_min(1)  # a sum of numbers of order 1 may cancel
        error = float((found[name].double() - values.double()).norm() / scale)
        assert error < tolerance, f"{name}: {error:.1e}"


# Surroundings ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "device meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
}
everywhere = pytest.mark.parametrize("surroundings", list(SURROUNDINGS))


@everywhere
@every_backend
@every_kind
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_layers_compute_the_same_in_any_surroundings(surroundings: str, backend: str, kind: str) -> None:
    _, layer = pair(kind)
    perturb(layer)
    right = reference(layer, image(kind))
    found: list[Answer | BaseException] = []

    def run() -> None:  # in a thread of its own, for what a thread keeps must be made there
        try:
            with using(backend):
                with SURROUNDINGS[surroundings]():
                    found.append(answer(layer, image(kind)))
                found.append(answer(layer, image(kind)))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
        assert_same(one, right, 2e-5)
    assert len(found) == 2


@pytest.mark.parametrize("surroundings", ["float64", "bfloat16", "device meta"])
@pytest.mark.parametrize("kind", ["3x3", "linear"])
def test_fused_kernels_compute_the_same_in_any_surroundings(surroundings: str, kind: str) -> None:
    pytest.importorskip("triton")
    _, layer = pair(kind)
    perturb(layer)
    right = reference(layer, image(kind))
    with using("triton"), SURROUNDINGS[surroundings]():
        assert_same(answer(layer, image(kind)), right, 2e-5)


@everywhere
@every_kind
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_layers_are_built_alike_in_any_surroundings(surroundings: str, kind: str) -> None:
    static, _ = pair(kind)
    with SURROUNDINGS[surroundings]():
        layer = dynamic(static)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"cpu"}
    right, found = answer(static, image(kind)), answer(layer, image(kind))
    assert_same({name: found[name] for name in ("y", "x")}, {name: right[name] for name in ("y", "x")}, 2e-5)
    fresh = type(layer)(4, 6, *([] if kind.startswith("linear") else [3]), dtype=torch.float32, config=SMALL)
    assert not fresh.frequency_group.is_meta and not fresh.frequency_group.is_inference()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@every_kind
def test_a_layer_takes_the_default_dtype_as_its_static_twin_does(dtype: torch.dtype, kind: str) -> None:
    with default_dtype(dtype):
        static = KINDS[kind]()
        layer = dynamic(static)
        y = layer(image(kind).to(dtype))
    assert y.dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {dtype}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_backend
@every_kind
def test_layers_infer_within_modes_and_learn_afterwards(mode: Any, backend: str, kind: str) -> None:
    _, layer = pair(kind)
    perturb(layer)
    x = image(kind)
    right = reference(layer, x)
    with using(backend):
        with mode():
            found = {"y": layer(x.clone())}
        assert_same({"y": found["y"].clone()}, {"y": right["y"]}, 2e-5)
        assert_same(answer(layer, x), right, 2e-5)


@every_kind
def test_a_layer_built_in_inference_mode_infers_as_its_static_twin_does(kind: str) -> None:
    with torch.inference_mode():
        static = KINDS[kind]()
        layer = dynamic(static)
        assert_same({"y": layer(image(kind))}, {"y": static(image(kind))}, 2e-5)
    static, layer = pair(kind)  # and what was kept of it does no harm
    found = answer(layer, image(kind))
    assert_same({"y": found["y"]}, {"y": static(image(kind)).detach()}, 2e-5)


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str, kind: str) -> None:
    static, layer = pair(kind)
    perturb(layer)
    right = reference(layer, image(kind))
    with using(backend), torch.autocast("cpu", dtype):
        y = layer(image(kind))
        assert y.dtype == static(image(kind)).dtype == dtype
    assert_same({"y": y.detach()}, {"y": right["y"]}, 3e-2)


@every_kind
def test_fake_tensors_go_through_and_leave_nothing_behind(kind: str) -> None:
    with FakeTensorMode():
        static = KINDS[kind]()
        layer = dynamic(static)
        for batch in (0, 1, 3):
            x = torch.empty(image(kind, batch).shape)
            y, expected = layer(x), static(x)
            assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
        y.sum().backward()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _, layer = pair(kind)
    _, layer = pair(kind)
    perturb(layer)
    assert_same(answer(layer, image(kind)), reference(layer, image(kind)), 2e-5)


@every_backend
@every_kind
def test_forward_mode_derivatives(kind: str, backend: str) -> None:
    """As PyTorch's own layers have them: the directional derivative agrees with that of the backward pass."""
    _, layer = pair(kind)
    perturb(layer)
    x, direction = image(kind), torch.randn_like(image(kind))
    with using(backend):
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(x, direction))
            forward = torch.autograd.forward_ad.unpack_dual(y).tangent
        assert forward is not None
        x.requires_grad_()
        y = layer(x)
        weights = torch.randn_like(y)
        (to_x,) = torch.autograd.grad(y, x, weights)
    assert float((forward * weights).sum()) == pytest.approx(float((to_x * direction).sum()), rel=1e-3, abs=1e-3)


# Batches and layouts -----------------------------------------------------------------------------------------------


@every_backend
@every_kind
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_any_number_of_samples(batch: int, backend: str, kind: str, training: bool) -> None:
    static, layer = pair(kind)
    static.train(training)
    perturb(layer.train(training))
    x = image(kind, batch)
    with using(backend):
        found = answer(layer, x)
    plain = answer(static, x)
    assert found["y"].shape == plain["y"].shape
    assert found["y"].stride() == plain["y"].stride()
    assert {name for name, _ in layer.named_parameters()} <= found.keys()
    if batch:
        assert_same(found, reference(layer, x), 2e-5)
    else:
        assert all(not values.any() for values in found.values())


@pytest.mark.parametrize("config", [{"norm": "batch"}, {"band_mask": "interpolated"}, {"band_edges": "dynamic"}])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_no_samples_in_every_form_of_the_layer(config: dict[str, Any], training: bool) -> None:
    layer = FDConv2d(4, 6, 3, config=FDConfig(kernel_num=5, **config)).train(training)
    y = layer(torch.randn(0, 4, 8, 8, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 6, 6, 6)
    # of the norm's own parameters too, for trainers that count those without gradient as unused
    assert all(p.grad is not None and not p.grad.any() for n, p in layer.named_parameters() if "edges" not in n)
    assert layer.sample_weights(torch.randn(0, 4, 8, 8)).shape == (0, 6, 4, 3, 3)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda x: x[:1].expand(x.shape[0], -1, -1, -1),
    "one value": lambda x: x[:, :, :1, :1].expand(-1, -1, 7, 6),
    "sliced channels": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "sliced columns": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "sliced samples": lambda x: x.repeat_interleave(2, 0)[::2],
    "sliced channels last": lambda x: x.repeat_interleave(2, 1).contiguous(memory_format=torch.channels_last)[:, ::2],
    "tokens transposed": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (7, 6)),
}


@every_backend
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("linear")])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
def test_images_in_any_layout(layout: str, kind: str, backend: str, weight_format: torch.memory_format) -> None:
    """Values are right, and the result lies in memory as that of the static layer, whatever way computed it."""
    static, layer = pair(kind)
    perturb(layer)
    static, layer = static.to(memory_format=weight_format), layer.to(memory_format=weight_format)
    x = LAYOUTS[layout](image(kind))
    expected = static(x)
    with using(backend):
        y = layer(x)
        assert y.stride() == expected.stride()
        assert_same({"y": y.detach()}, {"y": reference(layer, x)["y"]}, 2e-5)
        x = x.detach().requires_grad_()
        layer(x).square().sum().backward()
    clean = image(kind) if layout not in ("expanded", "one value") else x.detach().contiguous()
    clean.requires_grad_()
    layer(clean).square().sum().backward()
    assert x.grad is not None and clean.grad is not None
    assert_same({"x": x.grad}, {"x": clean.grad}, 2e-5)


@every_backend
@pytest.mark.parametrize(
    "form",
    [
        lambda: torch.randn(4),
        lambda: torch.randn(3, 4),
        lambda: torch.randn(3, 2, 5, 4),
        lambda: torch.randn(3, 4, 5).transpose(1, 2),
        lambda: torch.randn(5, 3, 4).transpose(0, 1),
        lambda: torch.randn(3, 1, 4).expand(3, 5, 4),
        lambda: torch.randn(3, 5, 8)[..., ::2],
        lambda: torch.randn(3, 4, 6, 7).permute(0, 2, 3, 1),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_positions_in_any_layout(form: Callable[[], Tensor], bias: bool, backend: str) -> None:
    torch.manual_seed(0)
    static = nn.Linear(4, 6, bias=bias)
    layer = dynamic(static)
    x = form()
    with using(backend):
        y = layer(x)
        assert_same({"y": y.detach()}, {"y": static(x).detach()}, 2e-5)
        assert y.stride() == static(x).stride()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_goes_along(form: torch.memory_format) -> None:
    """With the layer when it is converted and restored, copied and moved; parameters lie as transforms want them."""
    static = nn.Conv2d(4, 6, 3).to(memory_format=form)
    x = torch.randn(2, 4, 8, 8)
    layer = FDConv2d.from_conv(static, SMALL)
    for one in (
        layer,
        copy.deepcopy(layer),
        layer.to_conv(),
        FDConv2d.from_conv(layer.to_conv()),
        layer.bfloat16().float(),
    ):
        assert one(x).stride() == static(x).stride()
        assert one.weight.stride() == static.weight.stride()
    assert all(p.is_contiguous() and p.stride() == torch.empty(p.shape).stride() for p in layer.parameters())
    assert layer.to(memory_format=torch.contiguous_format)(x).is_contiguous()
    assert layer.to(memory_format=torch.channels_last)(x).is_contiguous(memory_format=torch.channels_last)


@every_backend
@every_kind
def test_gradients_lie_in_memory_as_their_parameters(kind: str, backend: str) -> None:
    """Else DistributedDataParallel copies each of them in each step, and says so."""
    for form in (torch.contiguous_format, torch.channels_last):
        _, layer = pair(kind)
        layer = layer.to(memory_format=form)
        x = image(kind) if kind.startswith("linear") else image(kind).to(memory_format=form)
        with using(backend):
            layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.stride() == parameter.stride(), name


# Changes afterwards ------------------------------------------------------------------------------------------------


@every_backend
@every_kind
def test_results_may_be_changed_in_place(kind: str, backend: str) -> None:
    def through(layer: nn.Module) -> Answer:
        class Changing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor) -> Tensor:
                y = self.layer(x)
                y.mul_(2)
                y += 1
                return y.relu_()

        return answer(Changing(), image(kind))

    static, layer = pair(kind)
    layer.bias = static.bias = None  # a bias is added by an operation of its own, whose result nothing holds
    with using(backend):
        found = through(layer)
    right = through(static)
    assert_same({name: found[name] for name in ("y", "x")}, {name: right[name] for name in ("y", "x")}, 2e-5)


@every_backend
@every_kind
def test_results_stay_when_the_input_or_another_result_changes(kind: str, backend: str) -> None:
    _, layer = pair(kind)
    perturb(layer)
    with using(backend), torch.no_grad():
        x = image(kind)
        y = layer(x)
        kept = y.clone()
        x.zero_()
        layer(torch.randn(x.shape)).zero_()
        assert torch.equal(y, kept)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("reflect", "same")])  # padded: a copy is kept
def test_an_input_that_changes_before_the_backward_pass_is_told(kind: str) -> None:
    static, layer = pair(kind)
    perturb(layer)
    for one in (static, layer):
        x = image(kind)
        y = one(x)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# Tracing -----------------------------------------------------------------------------------------------------------


@every_kind
def test_a_traced_layer_takes_other_numbers_of_samples(kind: str) -> None:
    _, layer = pair(kind)
    perturb(layer)
    layer.eval()
    for batch in (1, 2):
        traced = torch.jit.trace(layer, (image(kind, batch),))
        for other in (1, 2, 4):
            assert_same({"y": traced(image(kind, other)).detach()}, {"y": layer(image(kind, other)).detach()}, 2e-5)


@pytest.mark.parametrize("kind", ["3x3", "linear"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_older_onnx_exporter_is_refused_in_one_sentence(kind: str, batch: int) -> None:
    pytest.importorskip("onnx")
    _, layer = pair(kind)
    with pytest.raises(RuntimeError, match="dynamo=True, dynamic_shapes"):
        torch.onnx.export(layer.eval(), (image(kind, batch),), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_take_images_whose_strides_the_tracer_does_not_know(backend: str) -> None:
    """A norm keeps the strides of its input when it runs, but not in the tracer's eyes."""
    x = torch.randn(2, 64, 16).transpose(1, 2).reshape(2, 16, 8, 8)
    for static in (nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 16, 3, padding=1, groups=4)):
        model = nn.Sequential(nn.GroupNorm(4, 16), perturb(dynamic(static))).eval()
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x), atol=1e-4, rtol=1e-4)
    tokens = nn.Sequential(nn.GroupNorm(4, 16), nn.Flatten(2), Transposed(), perturb(dynamic(nn.Linear(16, 8)))).eval()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(tokens, backend=backend)(x), tokens(x), atol=1e-4, rtol=1e-4)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_symbolic_tracing_takes_layers_for_leaves() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), perturb(dynamic(nn.Conv2d(4, 6, 3))), nn.Flatten(2), nn.Linear(4, 4))
    model[3] = perturb(dynamic(model[3]))
    x = torch.randn(2, 3, 6, 6)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    assert torch.equal(traced(x), model(x))


# Whole models ------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "padding": 1}
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, **kind), nn.ReLU(), nn.Conv2d(16, 16, 3, **kind), nn.Conv2d(16, 4, 3, **kind)
    )


@pytest.mark.parametrize("surroundings", [*SURROUNDINGS, "autocast", "no_grad", "inference_mode", "saved on cpu"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_models_convert_alike_in_any_surroundings(surroundings: str) -> None:
    """And learn afterwards; the random numbers that follow are those that would have followed anyway."""
    others: dict[str, Callable[[], Any]] = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "saved on cpu": torch.autograd.graph.save_on_cpu,
    }
    enter = (SURROUNDINGS | others)[surroundings]
    source = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(2, 3, 8, 8, generator=source, dtype=torch.float32, device="cpu")
    plain, model = net(), net()
    states = torch.get_rng_state(), random.getstate()
    with enter():
        plan = fdsurgery.plan(model, example_inputs=x)
        fdsurgery.apply(plan, model)
    assert (torch.equal(states[0], torch.get_rng_state()), states[1]) == (True, random.getstate())
    assert_same({"y": model(x).detach()}, {"y": plain(x).detach()}, 2e-5)
    assert not any(tensor.is_inference() or tensor.is_meta for tensor in model.state_dict(keep_vars=True).values())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model(x).sum().backward()
    with enter():
        fdsurgery.restore(model)
    assert_same({"y": model(x).detach()}, {"y": plain(x).detach()}, 2e-5)


def test_a_static_and_a_converted_run_see_the_same_random_numbers() -> None:
    def draws(convert: bool) -> tuple[Tensor, float]:
        model = net()
        torch.manual_seed(7)
        random.seed(7)
        if convert:
            fdsurgery.convert(model, example_inputs=torch.ones(2, 3, 8, 8))
        return torch.rand(4), random.random()

    static, converted = draws(False), draws(True)
    assert torch.equal(static[0], converted[0]) and static[1] == converted[1]
    first, second = net(), net()
    for seed, model in ((1, first), (2, second)):  # while what is new depends on the seed
        torch.manual_seed(seed)
        fdsurgery.convert(model, example_inputs=torch.ones(2, 3, 8, 8))
    assert not torch.equal(first[2].KSM_Global.fc.weight, second[2].KSM_Global.fc.weight)


# Source ------------------------------------------------------------------------------------------------------------


def test_no_allocation_leaves_dtype_or_device_to_a_default() -> None:
    names = {
        "empty",
        "zeros",
        "ones",
        "full",
        "arange",
        "tensor",
        "rand",
        "randn",
        "linspace",
        "eye",
        "fftfreq",
        "rfftfreq",
    }
    loose = []
    files = [file for package in (fdconv, fdsurgery) for file in Path(package.__file__).parent.rglob("*.py")]
    for file in sorted(files):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names):
                continue
            given = {keyword.arg for keyword in node.keywords}
            if ast.unparse(node.func).startswith("torch.") and not ({"dtype", "device"} <= given or None in given):
                loose.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    assert not loose, loose


@every_backend
@every_kind
def test_many_gradients_at_once(kind: str, backend: str) -> None:
    """The backward pass of a graph that is there already, batched by `torch.autograd` or by `torch.func`."""
    _, layer = pair(kind)
    perturb(layer)
    x = image(kind)
    with using(backend):
        y = layer(x)
        parameters = list(layer.parameters())
        above = torch.randn(3, *y.shape)
        single = [torch.autograd.grad(y, parameters, one, retain_graph=True) for one in above]
        batched = torch.autograd.grad(y, parameters, above, retain_graph=True, is_grads_batched=True)
        mapped = torch.func.vmap(lambda one: torch.autograd.grad(y, parameters, one, retain_graph=True))(above)
    for expected, *found in zip(zip(*single, strict=True), batched, mapped, strict=True):
        for one in found:
            torch.testing.assert_close(one, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (5, 8, 8), (2, 4, 8, 8, 1), (2, 8), (8,), ()])
@pytest.mark.parametrize("kind", ["3x3", "1x1", "grouped"])
def test_inputs_of_a_wrong_shape_are_refused_in_the_words_of_the_static_layer(
    kind: str, shape: tuple[int, ...]
) -> None:
    static = KINDS[kind]()
    said = []
    for layer in (static, dynamic(static)):
        with pytest.raises(RuntimeError) as told:
            layer(torch.ones(shape))
        said.append(str(told.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", ["3x3", "linear"])
def test_scripting_is_refused_in_one_sentence(kind: str) -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot take FD.*: use torch.jit.trace"):
        torch.jit.script(nn.Sequential(dynamic(KINDS[kind]()), nn.ReLU()))

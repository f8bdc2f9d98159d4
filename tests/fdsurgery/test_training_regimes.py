"""The layers keep PyTorch's promises in the regimes that people train in.

Everything is compared with a run that does without the regime: in float64, in one process, eager, nothing recomputed.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sample_loop import CASES, randomised
from torch import Tensor, nn
from torch import distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fdsurgery
from fdconv import FDConfig, FDConv2d, FDLinear, bands
from fdconv.cpu import sample_loop

Results = dict[str, Tensor]

SLACK = 30
"""Roundings of a low precision that a comparison allows: some gradients are sums that nearly cancel."""

kinds = pytest.mark.parametrize("kind", ["3x3", "strided, grouped", "1x1, two spectra, tanh", "linear"])
low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture(params=["chunk by chunk", "whole batches"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which a CPU computes the operator."""
    if request.param == "whole batches":
        monkeypatch.setattr(sample_loop, "serves", lambda *_: False)
        monkeypatch.setattr(bands, "is_plain", lambda _: False)


def made(kind: str) -> tuple[nn.Module, Tensor]:
    """A layer far from neutral, in training mode, and an input for it."""
    build, shape = CASES[kind]
    return randomised(build()), torch.randn(shape)


def with_batch_norm() -> tuple[nn.Module, Tensor]:
    """As `made`, each time the same."""
    torch.manual_seed(0)
    layer = FDConv2d(24, 40, 3, padding=1, config=FDConfig(kernel_num=8, norm="batch"))
    return randomised(layer), torch.randn(5, 24, 9, 11)


def network(norm: str = "auto") -> tuple[nn.Module, Tensor]:
    """Layers of either kind with static ones between them, all far from neutral, and an input."""
    config = FDConfig(kernel_num=8, norm=norm)  # type: ignore[arg-type]
    model = nn.Sequential(
        FDConv2d(6, 8, 3, padding=1, config=config),
        nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8),
        nn.ReLU(),
        FDConv2d(8, 12, 1, 2, groups=2, config=config),
        nn.Flatten(2),
        FDLinear(16, 6, config=config),
        nn.LayerNorm(6),
    ).double()
    return randomised(model), torch.randn(6, 6, 8, 8, dtype=torch.float64)


def results(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, to_x: bool = True) -> Results:
    """Output of a run, and the gradients of a loss in which every number of it counts differently."""
    layer.zero_grad()
    x = x.detach().requires_grad_(to_x)
    y = run(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
    found = {"y": y, **gradients(layer)} if x.grad is None else {"y": y, "x": x.grad, **gradients(layer)}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def exact_results(layer: nn.Module, x: Tensor) -> Results:
    exact = copy.deepcopy(layer).double()
    return results(exact, exact, x.double())


def assert_near(found: Results, expected: Results, tolerance: float) -> None:
    """Tensors of the same names, each within a relative error in the 2-norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-3)
        assert error <= tolerance, f"{name}: {error:.1e}"


def gradients(model: nn.Module) -> Results:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def buffers(model: nn.Module) -> Results:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


# Precision ---------------------------------------------------------------------------------------------------------


@kinds
@low_precision
@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "whole layer"])
def test_low_precision_costs_a_few_of_its_roundings(kind: str, dtype: torch.dtype, whole: bool) -> None:
    layer, x = made(kind)
    if whole:
        layer, x = layer.to(dtype), x.to(dtype)
    expected = exact_results(layer, x)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=not whole):
            return layer(x)

    found = results(run, layer, x)
    assert found["y"].dtype == dtype
    for name, value in [("x", x), *layer.named_parameters()]:
        assert found[name].dtype == value.dtype, name
    assert_near(found, expected, SLACK * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_changes_the_dtypes_that_it_does_for_static_layers(dtype: torch.dtype) -> None:
    for static, x in ((nn.Conv2d(6, 8, 3), torch.randn(3, 6, 5, 5)), (nn.Linear(6, 8), torch.randn(3, 5, 6))):
        static, x = static.to(dtype), x.to(dtype)
        layer = FDConv2d.from_conv(static) if isinstance(static, nn.Conv2d) else FDLinear.from_linear(static)
        with torch.autocast("cpu", torch.float16):
            assert layer(x).dtype == static(x).dtype


@kinds
def test_a_large_loss_scale_overflows_nothing_that_is_float32(kind: str) -> None:
    layer, x = made(kind)
    exact, scale = copy.deepcopy(layer).double(), 2.0**21  # the largest that the output's own gradient bears
    exact(x.double()).square().mean().sqrt().backward()
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", torch.float16):
        y = layer(x)
    scaler.scale(y.float().square().mean().sqrt()).backward()
    largest = max(float(gradient.abs().max()) for gradient in gradients(layer).values())
    assert torch.finfo(torch.float16).max < largest < math.inf
    scaler.unscale_(optimizer)
    assert_near(gradients(layer), gradients(exact), SLACK * torch.finfo(torch.float16).eps)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale, "a step was left out"


# Recomputation and repetition ----------------------------------------------------------------------------------------


def checkpointed(regime: str, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    if regime == "selective":

        def contexts() -> Any:
            return create_selective_checkpoint_contexts([torch.ops.aten.convolution.default])

        return lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    return lambda x: checkpoint(model, x, use_reentrant=regime == "reentrant")


@pytest.mark.parametrize("regime", ["reentrant", "non-reentrant", "selective"])
def test_checkpointing_changes_no_gradient(regime: str) -> None:
    """Statistics are updated by the forward pass and once more by its repetition, as those of `nn.BatchNorm2d` are."""
    model, x = network("batch")
    twice = copy.deepcopy(model)
    expected = results(twice, twice, x)
    twice(x)
    found = results(checkpointed(regime, model), model, x)
    assert_near(found, expected, 1e-12)
    assert_near(buffers(model), buffers(twice), 1e-12)
    assert all(bn.num_batches_tracked == 2 for bn in model.modules() if isinstance(bn, nn.modules.batchnorm._BatchNorm))


@pytest.fixture
def deterministic() -> Iterator[None]:
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives with NaN, too
    torch.set_num_threads(2)
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


@kinds
@pytest.mark.usefixtures("deterministic", "path")
def test_deterministic_algorithms_repeat_every_bit(kind: str) -> None:
    layer, x = made(kind)
    first, second = (results(layer, layer, x) for _ in range(2))
    assert_near(first, exact_results(layer, x), 1e-3)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


# Several processes ---------------------------------------------------------------------------------------------------


def on_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns in each of two processes that can talk to each other."""
    torch.multiprocessing.spawn(_process, (work, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _process(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = (folder / "rendezvous").as_uri()
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(minutes=2), rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def two_steps(loss: Callable[[], Tensor], model: nn.Module) -> Results:
    """The gradients of a second step, and the parameters after it: both show whether the first was right, too."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    parameters = {name: _whole(parameter.detach()) for name, parameter in model.named_parameters()}
    return {**parameters, **{f"gradient of {name}": _whole(gradient) for name, gradient in gradients(model).items()}}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def mean_square(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """A loss that is a mean over samples, so that the mean of those of two halves is that of the whole."""
    return lambda: (run(x) + torch.linspace(-1, 1, 6, dtype=x.dtype)).square().mean()


def half(x: Tensor, rank: int) -> Tensor:
    return x.chunk(2)[rank]


def _data_parallel(rank: int) -> dict[str, Results]:
    found = {}
    for regime in ("rms", "checkpointed"):
        model, x = network("rms")
        replica = DistributedDataParallel(model)
        run = checkpointed("non-reentrant", replica) if regime == "checkpointed" else replica
        found[regime] = two_steps(mean_square(run, half(x, rank)), model)
    model, x = network("batch")
    found["batch"] = two_steps(mean_square(DistributedDataParallel(model), half(x, rank)), model)
    model = network("batch")[0].eval()
    found["evaluation"] = two_steps(mean_square(DistributedDataParallel(model), half(x, rank)), model)
    return found


def test_data_parallel_gradients_are_those_of_the_joined_batch(tmp_path: Path) -> None:
    """DDP, which waits for the gradient of every parameter, and fails in a second step if one does not come.

    Batch norms see the samples of their own process, and what they gathered is sent to the others. `nn.SyncBatchNorm`
    is for accelerators only: on CPUs it refuses to train, and DDP refuses models that have it.
    """
    expected = {}
    for regime in ("rms", "checkpointed"):
        model, x = network("rms")
        expected[regime] = two_steps(mean_square(model, x), model)
    model, x = network("batch")
    halves = [mean_square(model, half(x, rank)) for rank in range(2)]
    expected["batch"] = two_steps(lambda: (halves[0]() + halves[1]()) / 2, model)
    model = network("batch")[0].eval()
    expected["evaluation"] = two_steps(mean_square(model, x), model)
    for found in on_two_processes(_data_parallel, tmp_path):
        assert found.keys() == expected.keys()
        for regime, value in expected.items():
            assert_near(found[regime], value, 1e-10)


def test_many_groups_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    dist.init_process_group("gloo", (tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    try:
        DistributedDataParallel(FDLinear(32, 64, config=FDConfig(kernel_num=300)))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_synchronised_batch_norm_takes_the_place_of_the_own_one(dtype: torch.dtype, training: bool) -> None:
    layer, x = with_batch_norm()
    layer, x = layer.to(dtype).train(training), x.to(dtype)
    expected = results(copied := copy.deepcopy(layer), copied, x)
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert isinstance(layer.KSM_Global.bn, nn.SyncBatchNorm)
    assert_near(results(layer, layer, x), expected, SLACK * torch.finfo(dtype).eps)


def _sharded(rank: int) -> dict[str, Results]:
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for regime in SHARDED:
        model, x = network("rms")
        if regime == "bfloat16":
            model, x = model.float(), x.float()
        options: dict[str, Any] = {"mesh": mesh}
        if regime == "by rows":  # one spectrum cannot be divided along its first axis
            options["shard_placement_fn"] = lambda parameter: Shard(1) if parameter.dim() == 4 else None
        if regime == "bfloat16":
            # Reduced in float64, for with gloo torch 2.8 gives float32 the sum over the processes, not the mean.
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float64)
        for layer in model.children():
            if isinstance(layer, (FDConv2d, FDLinear)):
                fully_shard(layer, **options)
        fully_shard(model, **options)
        steps = two_steps(mean_square(model, half(x, rank)), model)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        whole, _ = network("rms")
        whole.load_state_dict(state, strict=True)
        spectrum: Any = model.get_parameter("0.dft_weight")
        local = torch.tensor(spectrum.to_local().shape)
        found[regime] = {**steps, "local": local, "loaded": whole(network("rms")[1]).detach()}
    return found


SHARDED = {"as it comes": 1e-10, "by rows": 1e-10, "bfloat16": 3 * SLACK * torch.finfo(torch.bfloat16).eps}
"""Gradients of the modulation's scalars are sums that nearly cancel."""


def test_sharded_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    """FSDP2; what is gathered from all processes loads into a model that is not sharded."""
    model, x = network("rms")
    expected = two_steps(mean_square(model, x), model)
    expected["loaded"] = model(x).detach()
    for rank, found in enumerate(on_two_processes(_sharded, tmp_path)):
        for regime, tolerance in SHARDED.items():
            local = found[regime].pop("local")
            assert local.tolist() == ([1, 12, 10, 2] if regime == "by rows" else [1 - rank, 24, 10, 2])
            assert_near(found[regime], expected, tolerance)


# The compiler --------------------------------------------------------------------------------------------------------


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["3x3", "linear"])
def test_compiled_gradients_are_the_eager_ones(kind: str, counter: CompileCounterWithBackend) -> None:
    """A second size makes the compiler take sizes for variables, and a single sample is always its own case.

    So there are two recompilations for a static layer and for this one. Maps below twice the last band's number, 16
    pixels, have fewer frequencies in some bands, and the compiler takes those cases one by one.
    """
    layer = made(kind)[0].double()
    eager, compiled = copy.deepcopy(layer), torch.compile(layer, fullgraph=True, backend=counter)
    for batch, height, width in ((2, 16, 16), (3, 24, 20), (1, 17, 19), (5, 16, 33), (1, 20, 16)):
        x = torch.randn(batch, 24, height, width, dtype=torch.float64)
        x = x.movedim(1, -1).contiguous() if kind == "linear" else x
        assert_near(results(compiled, layer, x), results(eager, eager, x), 1e-10)
    assert_near(buffers(layer), buffers(eager), 1e-10)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("outermost", ["compiler", "checkpoint"])
def test_compiled_checkpoints_change_no_gradient(outermost: str, counter: CompileCounterWithBackend) -> None:
    model, x = network("batch")
    eager = copy.deepcopy(model)
    expected = results(eager, eager, x)

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    compiled: Callable[[Tensor], Tensor]
    if outermost == "compiler":
        compiled = torch.compile(run, fullgraph=True, backend=counter)
    else:
        compiled = checkpointed("non-reentrant", torch.compile(model, fullgraph=True, backend=counter))
    assert_near(results(compiled, model, x), expected, 1e-10)
    tracked = {int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert len(tracked) == 1, "nn.BatchNorm2d and the layers' own norms count alike"


# Derivatives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["3x3", "depthwise", "1x1, strided", "linear, rows"])
@pytest.mark.usefixtures("path")
def test_a_gradient_penalty_has_the_gradients_of_finite_differences(kind: str, training: bool) -> None:
    build, (batch, channels, *size) = CASES[kind]
    layer = randomised(build().double()).train(training)
    x = torch.randn(batch, channels, *(4 for _ in size), dtype=torch.float64)
    inputs = {"x": x.requires_grad_(), **dict(layer.named_parameters())}

    def penalty(inputs: Results) -> Tensor:
        x, parameters = inputs["x"], {name: value for name, value in inputs.items() if name != "x"}
        return slope_penalty(torch.func.functional_call(layer, parameters, (x,)), x)

    step = 1e-5
    for (name, value), gradient in zip(
        inputs.items(), torch.autograd.grad(penalty(inputs), list(inputs.values())), strict=True
    ):
        direction = unit(unit(gradient) + unit(torch.randn_like(gradient)))
        there, back = (penalty({**inputs, name: value + sign * step * direction}).detach() for sign in (1, -1))
        expected = (there - back) / (2 * step)
        assert ((gradient * direction).sum() - expected).abs() <= 1e-5 * expected.abs() + 1e-8, name


def unit(tensor: Tensor) -> Tensor:
    return tensor / tensor.norm().clamp(min=1e-30)


def slope_penalty(y: Tensor, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(y.square().mean().sqrt(), x, create_graph=True)
    return (slope.norm() - 1).square()


@pytest.mark.parametrize("kind", ["3x3", "strided, grouped", "1x1, two spectra, tanh", "linear"])
def test_a_gradient_penalty_does_not_depend_on_the_memory_layout(kind: str) -> None:
    layer, x = made(kind)
    layer, x = layer.double(), x.double()
    expected: Results = {}
    for given in (x, *layouts(x).values()):
        layer.zero_grad()
        leaf = given.detach().requires_grad_()
        slope_penalty(layer(leaf), leaf).backward()
        assert leaf.grad is not None
        found = {"x": leaf.grad.clone(), **{name: gradient.clone() for name, gradient in gradients(layer).items()}}
        expected = expected or found
        assert_near(found, expected, 1e-10)


@kinds
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.usefixtures("path")
def test_frozen_parameters_change_no_other_gradient(kind: str, batch: int) -> None:
    layer, x = made(kind)
    layer, x = layer.double(), x[:batch].double()
    expected = results(layer, layer, x)
    names = {name for name, _ in layer.named_parameters()}
    modulation = {name for name in names if name.startswith("KSM")}
    for trained in (*({name} for name in names), names - {"dft_weight"}, modulation, set()):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in trained)
        assert_near(results(layer, layer, x), {name: expected[name] for name in ("y", "x", *trained)}, 1e-12)
        if trained:
            found = results(layer, layer, x, to_x=False)
            assert_near(found, {name: expected[name] for name in ("y", *trained)}, 1e-12)


# Copies and layouts --------------------------------------------------------------------------------------------------


@kinds
def test_saved_and_copied_layers_compute_the_same(kind: str) -> None:
    layer, x = made(kind)
    expected = results(layer, layer, x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for copied in (torch.load(saved, weights_only=False), copy.deepcopy(layer)):
        assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in layer.parameters()}
        for name, value in results(copied, copied, x).items():
            assert torch.equal(value, expected[name]), name


def _trained(layer: nn.Module) -> nn.Module:
    """The layer after a step of its own invention."""
    with torch.no_grad():
        for tensor in [*layer.parameters(), layer.get_buffer("KSM_Global.bn.running_mean")]:
            tensor.add_(0.1)
    return layer


def _train_elsewhere(_: int, layer: nn.Module, x: Tensor, y: Tensor) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        y.copy_(layer(x))
    _trained(layer)


def test_a_layer_in_shared_memory_is_one_layer() -> None:
    layer, x = with_batch_norm()
    layer.eval().share_memory()
    before, y = layer(x).detach(), torch.zeros(5, 40, 9, 11).share_memory_()
    torch.multiprocessing.spawn(_train_elsewhere, (layer, x, y))
    assert_near({"y": y}, {"y": before}, 1e-6)
    assert_near({"y": layer(x)}, {"y": _trained(with_batch_norm()[0].eval())(x)}, 1e-6)


def layouts(x: Tensor) -> Results:
    """The same numbers in memory that is not contiguous."""
    every_other = torch.zeros([2 * size for size in x.shape], dtype=x.dtype)[(slice(None, None, 2),) * x.dim()]
    found = {"strided": every_other.copy_(x), "transposed": x.mT.contiguous().mT}
    if x.dim() == 4:
        found["channels last"] = x.to(memory_format=torch.channels_last)
    assert not any(layout.is_contiguous() for layout in found.values())
    return found


@kinds
@pytest.mark.parametrize("chunk", [1, 2**19])
@pytest.mark.usefixtures("path")
def test_memory_layouts_change_no_gradient(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_loop, "CHUNK", chunk)
    layer, x = made(kind)
    layer, x = layer.double(), x.double()
    expected = results(layer, layer, x)
    for name, given in layouts(x).items():

        def run(x: Tensor, name: str = name) -> Tensor:
            y: Tensor = layer(x)
            y.register_hook(lambda grad: layouts(grad)[name])
            return y

        assert_near(results(run, layer, given), expected, 1e-12)


# Averages of weights -------------------------------------------------------------------------------------------------


def test_averaged_models_average_the_spectrum() -> None:
    """And leave the frequency groups alone; the weight being linear in the spectrum, it is averaged as well."""
    static = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    x, decay = torch.randn(4, 3, 8, 8), 0.9
    model = randomised(fdsurgery.convert(static, "generic", example_inputs=x, kernel_num=8, norm="batch"))
    (layer,) = (module for module in model.modules() if isinstance(module, FDConv2d))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    average.update_parameters(model)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    weight = layer.weight.detach() + 0
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        average.update_parameters(model)
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
        weight = decay * weight + (1 - decay) * layer.weight.detach()
    assert_near(dict(average.module.named_parameters()), expected, 1e-5)
    (averaged,) = (module for module in average.modules() if isinstance(module, FDConv2d))
    assert_near({"weight": averaged.weight}, {"weight": weight}, 1e-5)
    assert torch.equal(averaged.frequency_group, layer.frequency_group)
    update_bn([x, 2 * x], average)
    assert averaged.get_buffer("KSM_Global.bn.num_batches_tracked") == 2
    model.load_state_dict({**model.state_dict(), **expected})
    model.load_state_dict(dict(average.module.named_buffers()), strict=False)
    assert_near({"y": average.eval()(x)}, {"y": model.eval()(x)}, 1e-5)

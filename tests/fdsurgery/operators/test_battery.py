"""What every operator must pass: the same nets and the same questions for all that are registered."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import NAMES, Net, build, converted, distance, images, perturb, plain, recipe, trained
from torch import Tensor, nn

import fdsurgery
from fdsurgery.checkpoints import convert_checkpoint
from fdsurgery.operators import get_operator, operator_of

# One of them in the default run, all in the long one; each has tests of its own besides.
pytestmark = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "odconv" else pytest.mark.long) for name in NAMES]
)


def dynamic(model: nn.Module) -> dict[str, Any]:
    found = fdsurgery.dynamic_layers(model)
    assert len(found) >= 4
    return found


def test_a_conversion_changes_nothing(name: str) -> None:
    x = images()
    model = converted(name)
    assert all(operator_of(layer) is get_operator(name) for layer in dynamic(model).values())
    assert distance(model(x), plain()(x)) < 1e-5
    checked = fdsurgery.verify(plain(), model, x)
    assert checked.ok and len(checked.layers) == len(dynamic(model))
    exact = converted(name, plain(torch.float64))
    assert distance(exact(x.double()), plain(torch.float64)(x.double())) < 1e-12
    assert distance(model.train()(x), plain().train()(x)) < 1e-5


def test_what_is_perturbed_computes_something_else(name: str) -> None:
    x = images()
    assert distance(trained(name)(x), plain()(x)) > 1e-3


def test_the_plan_counts_what_is_added(name: str) -> None:
    plan = fdsurgery.plan(plain(), recipe(name), example_inputs=images())
    model = fdsurgery.apply(plan, plain())
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain().parameters())
    assert plan.parameters_added == added
    assert plan.multiply_adds_added > 0
    text = fdsurgery.Plan.from_dict(plan.to_dict())
    assert text.swaps == plan.swaps


def test_the_random_state_is_left_alone(name: str) -> None:
    model = plain()
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    fdsurgery.convert(model, recipe(name), example_inputs=images())
    assert torch.equal(torch.randn(3), expected)


def test_the_static_weight_is_read_assigned_and_told(name: str) -> None:
    model, before = converted(name), dict(plain().named_modules())
    for fqn, layer in dynamic(model).items():
        twin: Any = before[fqn]
        assert layer.weight.shape == twin.weight.shape and layer.weight.dtype == twin.weight.dtype
        assert distance(layer.weight, twin.weight) < 1e-5
        other = torch.randn_like(twin.weight)
        with torch.no_grad():
            layer.weight.copy_(other)
            twin.weight.copy_(other)
        assert distance(layer.weight, other) < 1e-5
        assert isinstance(layer, type(twin))
    x = images()
    assert distance(model(x), build_like(before[""], x)) < 1e-5
    layer = next(iter(dynamic(perturb(model)).values()))
    with pytest.warns(fdsurgery.NeutralWeightWarning):
        layer.weight.sum()


def build_like(model: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = model(x)
    return result


def test_restore_gives_the_plain_layers_back(name: str) -> None:
    model, x = fdsurgery.restore(converted(name)), images()
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in plain().modules()]
    assert model.state_dict().keys() == plain().state_dict().keys()
    assert distance(model(x), plain()(x)) < 1e-5
    frozen = plain().requires_grad_(False)
    back = fdsurgery.restore(converted(name, frozen))
    assert not any(parameter.requires_grad for parameter in back.parameters())


def test_copies_and_pickles_compute_the_same(name: str) -> None:
    model, x = trained(name), images()
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), expected)
        shared = {id(one) for one in model.parameters()} & {id(one) for one in other.parameters()}
        assert not shared
    for layer in copy.deepcopy(model).modules():
        if operator_of(layer) is not None:
            perturb(layer)
    assert torch.equal(model(x), expected)


LOADS = """
import sys, torch, fdsurgery
folder = sys.argv[1]
torch.set_num_threads(1)
sys.path.insert(0, folder)
import models
with torch.no_grad():
    torch.save(fdsurgery.load(folder + "/saved", model=models.build())(torch.load(folder + "/x")), folder + "/y")
"""


def source_file(folder: Path) -> Path:
    """The net as a file of its own, for other processes."""
    code = Path(__file__).with_name("battery.py").read_text(encoding="utf-8")
    net = code.partition("class Net(nn.Module):")[2].partition("def build")[0]
    file = folder / "models.py"
    file.write_text(
        f"import torch\nfrom torch import Tensor, nn\n\n\nclass Net(nn.Module):{net}\ndef build():\n    return Net()\n",
        encoding="utf-8",
    )
    return file


def test_it_is_saved_and_loads_in_another_process(name: str, tmp_path: Path) -> None:
    model, x = trained(name), images()
    source = fdsurgery.ModelSource("file", f"{source_file(tmp_path)}:build")
    fdsurgery.save(model, tmp_path / "saved", source=source)
    torch.save(x, tmp_path / "x")
    subprocess.run([sys.executable, "-c", LOADS, str(tmp_path)], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y"), model(x))
    again = fdsurgery.load(tmp_path / "saved", model=build())
    assert fdsurgery.dynamic_layers(again).keys() == dynamic(model).keys()
    for fqn, layer in dynamic(model).items():
        operator = get_operator(name)
        assert operator.settings_of(fdsurgery.dynamic_layers(again)[fqn]) == operator.settings_of(layer)


def test_state_dicts_go_both_ways(name: str) -> None:
    model, x = trained(name), images()
    other = converted(name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    torch.manual_seed(9)
    fresh = fdsurgery.testing.settle_(Net(), x).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_state_dict(fresh.state_dict())
    assert distance(model(x), fresh(x)) < 1e-5


def test_checkpoints_become_dynamic_and_go_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(plain().state_dict(), tmp_path / "plain.pth")
    spec = f"{source_file(tmp_path)}:build"
    monkeypatch.setattr(
        "fdsurgery.checkpoints.planning.plan",
        lambda model, *_, **__: fdsurgery.plan(model, recipe(name), example_inputs=images().to("meta")),
    )
    convert_checkpoint(tmp_path / "plain.pth", tmp_path / "out", model=spec)
    x = images()
    loaded = fdsurgery.load(tmp_path / "out", model=build()).eval()
    assert distance(loaded(x), plain()(x)) < 1e-5
    source = fdsurgery.ModelSource("file", spec)
    fdsurgery.save(perturb(loaded), tmp_path / "tuned", source=source)
    convert_checkpoint(tmp_path / "tuned", tmp_path / "again", model=spec)
    assert torch.equal(fdsurgery.load(tmp_path / "again", model=build()).eval()(x), loaded(x))


def test_everything_trains_from_one_sample_on(name: str) -> None:
    model = converted(name).train()
    optimizer = torch.optim.AdamW(fdsurgery.param_groups(model, 1e-2, 0.01))
    target = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    for batch in (4, 1, 4):
        loss = (model(images(batch)) - target[:batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    silent = [fqn for fqn, one in model.named_parameters() if one.grad is None or not one.grad.abs().sum()]
    assert silent == [], "after three steps some parameters have no gradient"


def test_parameters_are_known_for_what_they_are(name: str) -> None:
    model = trained(name)
    kinds = [get_operator(name).parameter_kinds(layer) for layer in dynamic(model).values()]
    assert all("weight" in own.values() or "modulation" in own.values() for own in kinds)
    trainable = fdsurgery.freeze(copy.deepcopy(model), "modulation")
    told = {id(one) for own in kinds for one, kind in own.items() if kind == "modulation"}
    assert set(trainable) == {fqn for fqn, one in model.named_parameters() if id(one) in told}
    every = {id(one) for group in fdsurgery.param_groups(model, 1.0, 0.1) for one in group["params"]}
    assert every == {id(one) for one in model.parameters()}


def test_optimizers_come_along(name: str) -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    fdsurgery.convert(model, recipe(name), example_inputs=images(), optimizers=optimizer)
    held = [one for group in optimizer.param_groups for one in group["params"]]
    assert {id(one) for one in held} == {id(one) for one in model.parameters()} and len(held) == len(set(held))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(name: str, dtype: torch.dtype) -> None:
    model, x = trained(name), images()
    expected = model(x)
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype and distance(y, expected) < 0.05
    half = copy.deepcopy(model).to(dtype)
    y = half(x.to(dtype))
    assert y.dtype == dtype and distance(y, expected) < 0.1


def test_surroundings_do_not_show(name: str) -> None:
    model, x = trained(name), images()
    expected = model(x)
    default = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            fresh = converted(name)
            assert {one.dtype for one in fresh.parameters()} == {torch.float32}
            assert distance(model(x), expected) < 1e-5
    finally:
        torch.set_default_dtype(default)
    with torch.device("meta"):
        assert distance(model(x), expected) < 1e-5
    with torch.inference_mode():
        assert distance(model(x), expected) < 1e-5
    with torch.no_grad():
        assert distance(model(x), expected) < 1e-5
    strided = torch.randn(3, 3, 68, 64)[:, :, ::2, ::2]
    assert distance(model(strided), model(strided.contiguous())) < 1e-6
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert distance(last(x.contiguous(memory_format=torch.channels_last)), expected) < 1e-5
    none = model(images(0))
    assert none.shape == (0, 5)
    none.sum().backward()
    single = torch.cat([model(one[None]) for one in x])
    assert distance(single, expected) < 1e-5, "a sample depends on its company"


def test_results_lie_as_the_plain_layers_would(name: str) -> None:
    model, before = trained(name), dict(plain().named_modules())
    for fqn, layer in dynamic(model).items():
        twin: Any = before[fqn]
        if isinstance(twin, nn.Conv2d):
            x = torch.randn(2, twin.in_channels, 9, 8)
            for given in (x, x.contiguous(memory_format=torch.channels_last)):
                assert layer(given).stride() == twin(given).stride(), fqn
            assert torch.equal(layer(x)[0], layer(x[:1])[0]) or distance(layer(x)[0], layer(x[:1])[0]) < 1e-5
            assert layer(x[0]).shape == twin(x[0]).shape
        else:
            x = torch.randn(2, 6, twin.in_features)
            assert layer(x).shape == twin(x).shape and layer(x[0, 0]).shape == twin(x[0, 0]).shape
        y = layer(x)
        y.mul_(2)  # results may be changed in place
        y.sum().backward()


def test_gradients_are_those_of_differences(name: str) -> None:
    model = perturb(converted(name, plain(torch.float64)))
    for fqn, layer in dynamic(model).items():
        shape = (2, 5, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 5, 4)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(3))
        assert torch.autograd.gradcheck(layer, (x,), fast_mode=True), fqn
        inputs = [one for one in layer.parameters() if one.requires_grad]

        def of_parameters(*values: Tensor, layer: nn.Module = layer, x: Tensor = x) -> Tensor:
            names = [key for key, one in layer.named_parameters() if one.requires_grad]
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(of_parameters, inputs, fast_mode=True), fqn


def test_second_derivatives(name: str) -> None:
    model = perturb(converted(name, plain(torch.float64)))
    x = images().double().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    moved = copy.deepcopy(model)

    def penalty(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        (own,) = torch.autograd.grad(moved(at).square().sum(), at, create_graph=True)
        return own.square().sum().detach()

    direction = torch.randn_like(x)
    step = 1e-6  # so small that no ReLU changes sides
    difference = (penalty(x + step * direction) - penalty(x - step * direction)) / (2 * step)
    assert x.grad is not None
    assert abs(float((x.grad * direction).sum() - difference)) < 1e-4 * abs(float(difference)) + 1e-8


def test_vmap_over_batches(name: str) -> None:
    model = trained(name)
    x = torch.stack([images(), images().flip(0)])
    assert distance(torch.vmap(model)(x), torch.stack([model(one) for one in x])) < 1e-4


def test_norms_stay_where_they_cannot_be_folded(name: str) -> None:
    model, x = trained(name), images()
    expected = model(x)
    fused = fdsurgery.fuse_norms(copy.deepcopy(model), example_inputs=x)
    assert distance(fused(x), expected) < 1e-5
    assert distance(fdsurgery.compile_for_inference(model, example_inputs=x)(x), expected) < 1e-5


def test_a_fused_norm_is_right_or_refused(name: str) -> None:
    model, x = trained(name), images()
    expected = model.norm(model.wide(x.new_ones(2, 16, 9, 9)))
    try:
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(model.wide, model.norm)
    except (ValueError, RuntimeError) as error:
        assert "fuse_norms" in str(error) or "restore" in str(error)
        return
    assert distance(fused(x.new_ones(2, 16, 9, 9)), expected) < 1e-5


def test_schedules_end_where_conversion_starts(name: str) -> None:
    model, x = trained(name), images()
    expected = model(x)
    try:
        fdsurgery.schedule(model, 0, 10)
    except fdsurgery.FineTuningError as error:
        assert "has a schedule" in str(error)
        return
    assert distance(model(x), expected) > 1e-6
    state = copy.deepcopy(model.state_dict())
    fdsurgery.schedule(model, 10, 10)
    assert distance(model(x), expected) < 1e-6
    model.load_state_dict(state)
    assert distance(model(x), expected) > 1e-6, "what a schedule sets is saved"


def test_settings_that_are_wrong_are_told(name: str) -> None:
    operator = get_operator(name)
    with pytest.raises(fdsurgery.RecipeError, match="no setting of"):
        operator.settings({"colour": "red"})
    for key, schema in operator.settings_schema().items():
        assert schema.get("description"), f"{key} is not described"
    for key in operator.settings({}):
        with pytest.raises(fdsurgery.RecipeError):
            operator.settings({key: object()})


@pytest.mark.long
def test_it_compiles_and_exports(name: str) -> None:
    model, x = trained(name), images()
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False)
    y = compiled(x)
    assert distance(y, expected) < 1e-4
    y.square().sum().backward()
    found = {fqn: one.grad.clone() for fqn, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    # What is so small beside the others is what parts that cancel each other leave: rounding.
    least = 1e-5 * max(float(one.grad.norm()) for one in model.parameters() if one.grad is not None)
    for fqn, one in model.named_parameters():
        if one.grad is not None and one.grad.norm() > least:
            assert distance(found[fqn], one.grad) < 1e-3, fqn
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    for size in (1, 3, 5):
        assert distance(exported(images(size)), model(images(size))) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (images(1),), check_trace=False)
    assert distance(traced(images(3)), expected) < 1e-4


@pytest.mark.long
def test_onnx_gives_the_same(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = trained(name)
    file = tmp_path / "model.onnx"
    try:
        torch.onnx.export(model, (images(2),), str(file), dynamo=True, dynamic_shapes=({0: "batch"},))
    except Exception as error:
        pytest.skip(f"{name} cannot be written as ONNX: {type(error).__name__}")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for size in (2, 4):
        x = images(size)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert distance(torch.from_numpy(y), model(x)) < 1e-4


DDP = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
sys.path[:0] = sys.argv[2:]
from battery import images, trained

def work(rank, file, name):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(trained(name))
    model(images(4)[rank * 2 : rank * 2 + 2]).square().mean().backward()
    if rank == 0:
        found = {fqn: one.grad for fqn, one in model.module.named_parameters() if one.grad is not None}
        torch.save(found, file + ".grads")
    dist.destroy_process_group()

if __name__ == "__main__":
    name, _, file = sys.argv[1].partition(":")
    mp.spawn(work, (file, name), 2)
"""


@pytest.mark.long
def test_two_processes_train_as_one(name: str, tmp_path: Path) -> None:
    model = trained(name)
    model(images(4)).square().mean().backward()
    script = tmp_path / "script.py"
    script.write_text(DDP, encoding="utf-8")
    subprocess.run([sys.executable, str(script), f"{name}:{tmp_path / 'store'}", *sys.path], check=True)
    found = torch.load(tmp_path / "store.grads")
    own = {fqn: one.grad for fqn, one in model.named_parameters() if one.grad is not None}
    assert found.keys() == own.keys()
    for fqn, gradient in own.items():
        if gradient.norm() > 1e-6:
            assert distance(found[fqn], gradient) < 1e-4, fqn


def test_adamw_moves_a_weight_as_it_moves_a_plain_one(name: str) -> None:
    before = {fqn: layer.weight.detach().clone() for fqn, layer in plain().named_modules() if hasattr(layer, "weight")}
    moved = []
    for model in (plain(), converted(name)):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0)
        for _ in range(5):
            loss = (model(images(8)) - torch.linspace(-1, 1, 40).view(8, 5)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            moved.append({fqn: distance(model.get_submodule(fqn).weight, its) for fqn, its in before.items()})
    ratios = {fqn: moved[1][fqn] / moved[0][fqn] for fqn in fdsurgery.dynamic_layers(converted(name))}
    assert all(0.75 < ratio < 1.25 for ratio in ratios.values()), ratios

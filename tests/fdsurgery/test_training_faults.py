"""What goes wrong in training: overflow, NaN, odd batches, a process that is killed, and memory that runs out."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from models import CASES, Case, small_vit, timm_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fdsurgery
from fdconv import FDConfig, FDConv2d, FDLinear, bands, functional
from fdconv.cpu import sample_loop
from fdsurgery.verification import relative_error


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


def plain() -> nn.Module:
    """A net for images of any size, with a norm over the batch, one over the sample, and all kinds of layers."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 3, 1, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 1),
        nn.GroupNorm(2, 24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


SWAPPED = (2, 5, 9)


def converted(moved: bool = True, **settings: Any) -> nn.Module:
    """The net with its inner layers swapped, and away from neutral."""
    model = plain()
    fdsurgery.testing.settle_(model, torch.randn(4, 3, 17, 17))
    config = FDConfig(kernel_num=8, **settings)
    for position in SWAPPED:
        old: Any = model[position]
        new = FDLinear.from_linear if isinstance(old, nn.Linear) else FDConv2d.from_conv
        model[position] = new(old, config)
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


# Numbers that are none -----------------------------------------------------------------------------------------------


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), torch.arange(len(x)) % 5)


@pytest.mark.usefixtures("path")
def test_a_step_that_overflows_is_left_out_and_the_next_ones_are_taken() -> None:
    """Float16 with a loss scale that is too large by far, until it is not."""
    model, x = converted(), torch.randn(4, 3, 17, 17)
    optimizer = torch.optim.AdamW(fdsurgery.param_groups(model, 1e-3, 0.05))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-10)
    losses, taken = [], []
    for _ in range(12):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        scale = scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = loss(model, x)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(value.item())
        taken.append(scaler.get_scale() >= scale)
        same = {name: torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()}
        assert not any(same.values()) if taken[-1] else all(same.values())
    assert not taken[0] and all(taken[-6:])
    assert losses[-1] < losses[0] and all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_sample_spoils_no_other_where_the_norms_do_not(bad: float) -> None:
    """In evaluation, and in training where no norm is over the batch; and nothing that comes later."""
    x = torch.randn(5, 3, 17, 17)
    spoilt = x.clone()
    spoilt[2, 0, 3, 4] = bad
    others = [0, 1, 3, 4]
    for training in (False, True):
        model = converted(norm="rms").eval()
        for position in (*SWAPPED, 6):
            model[position].train(training)
        expected = model(x)
        found = model(spoilt)
        assert found[2].isnan().all()
        torch.testing.assert_close(found[others], expected[others], rtol=1e-5, atol=1e-6)
        found.sum().backward()
        assert all(not p.grad.isfinite().all() for layer in SWAPPED for p in [model[layer].dft_weight])
        model.zero_grad()
        (again := model(x)).sum().backward()
        torch.testing.assert_close(again, expected, rtol=1e-6, atol=1e-7)
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_sample_does_to_the_batch_norm_what_it_does_to_torchs(bad: float) -> None:
    context = torch.randn(5, 16)
    context[2, 3] = bad
    layer = FDConv2d(16, 16, 3, padding=1, config=FDConfig(kernel_num=8, norm="batch"))
    ours, theirs = layer.KSM_Global.bn, nn.BatchNorm1d(layer.KSM_Global.bn.num_features)
    x = nn.functional.linear(context, layer.KSM_Global.fc.weight.flatten(1))
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, equal_nan=True)


# Batches and sizes ---------------------------------------------------------------------------------------------------


LOADED = {
    "timm test_resnet": Case(timm_model("test_resnet"), (3, 64, 64), "resnet", -1),
    **{name: CASES[name] for name in ("timm convnext (1x1 FFN)", "hf segformer")},
}


@pytest.mark.parametrize("name", LOADED)
def test_a_loader_may_end_with_one_sample_and_sizes_may_change(name: str) -> None:
    """Odd ones too, in training mode; as in the plain twin."""
    static, x = LOADED[name].settled()
    dynamic = fdsurgery.convert(copy.deepcopy(static), example_inputs=x, kernel_num=8)
    sizes = [(64, 64), (67, 45), (33, 71), (81, 64)]
    for number, (height, width) in enumerate(sizes):
        samples = list(torch.randn(2 + number % 2, 3, height, width))
        batches = list(DataLoader(samples, batch_size=2))  # type: ignore[arg-type]
        assert len(batches[-1]) == (2 if number % 2 == 0 else 1)
        for batch in batches:
            results = []
            for model in (static, dynamic):
                torch.manual_seed(0)
                y = model.train()(batch)
                results.append(y if isinstance(y, Tensor) else y.logits)
            assert relative_error(results[1].detach(), results[0].detach()) < 1e-4
            dynamic.zero_grad()
            results[1].square().mean().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in dynamic.parameters())


# A process that is killed --------------------------------------------------------------------------------------------

STEPS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})
"""What Python tells its audit hooks that is a step of writing a folder."""


def killed_at(moment: int, work: Callable[[], object]) -> bool:
    """Do some work in a child that is killed just before its n-th step on the file system; False if it got through."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, _: Any) -> None:
            nonlocal seen
            if event in STEPS:
                seen += 1
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("kind", ["save", "save_pretrained"])
def test_a_process_killed_while_it_saves_leaves_the_old_or_the_new(kind: str, tmp_path: Path) -> None:
    """At any step, and on; training goes on from what is there, and saves again."""
    if kind == "save":
        old, source = converted(), fdsurgery.ModelSource("file", "models.py:build")
        folder = tmp_path / "saved"

        def save(model: nn.Module) -> object:
            return fdsurgery.save(model, folder, source=source)

        def load() -> nn.Module:
            return fdsurgery.load(folder, model=plain())

    else:
        old = fdsurgery.convert(small_vit(), kernel_num=8)
        folder = tmp_path / "saved"

        def save(model: nn.Module) -> object:
            return fdsurgery.save_pretrained(model, folder)

        def load() -> nn.Module:
            return fdsurgery.from_pretrained(folder)

    save(old)
    found = []
    for moment in range(1, 200):
        before = state(load())
        new = moved(load())
        killed = killed_at(moment, lambda new=new: save(new))  # type: ignore[misc]
        after = state(load())
        is_old = all(torch.equal(after[name], before[name]) for name in before)
        found.append("old" if is_old else "new")
        assert_equal(after, before if is_old else state(new))
        if not killed:
            break
    assert found[-1] == "new" and found[0] == "old" and len(found) > 4
    assert found == sorted(found, reverse=True), "a step forward is not taken back"


# Memory that runs out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_backward", [False, True])
def test_memory_that_runs_out_is_told_with_what_to_lower(in_backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the error that torch raised, so that programs which catch it go on as they do."""
    monkeypatch.setattr(sample_loop, "serves", lambda *_: False)
    model, x = converted(), torch.randn(4, 3, 17, 17)
    with monkeypatch.context() as full, pytest.raises(torch.OutOfMemoryError) as raised:
        y = model(x) if in_backward else None

        def run_out(*_: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        full.setattr(functional, "sample_weights", run_out)
        model(x) if y is None else y.sum().backward()
    (message,) = raised.value.args
    assert message.startswith("CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    assert message.count("dynamic layer") == 1 and "batch size" in message and "size, or recompute" in message
    assert f"4 samples has a weight {(32, 24, 1, 1) if in_backward else (16, 16, 3, 3)}" in message
    model.zero_grad()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "and the next step is taken"


def test_accelerate_finds_a_batch_size_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_loop, "serves", lambda *_: False)
    model, sample_weights = converted(), functional.sample_weights

    def small_memory(spectra: Tensor, group: Tensor, factors: Any, shape: Any) -> Tensor:
        if factors.batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample_weights(spectra, group, factors, shape)

    monkeypatch.setattr(functional, "sample_weights", small_memory)

    @accelerate.utils.find_executable_batch_size(starting_batch_size=4)
    def train(batch_size: int) -> int:
        model(torch.randn(batch_size, 3, 17, 17)).sum().backward()
        return batch_size

    assert train() == 2

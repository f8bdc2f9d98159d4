"""Checkpoints that are damaged or hostile, and conversions that are cut short.

Whatever happens, nothing of a file is executed, nothing hangs, the destination is the older result or the new one and
never half of either, and a fault is told in one message. Each test prints how many cases it tried.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import fdsurgery
from fdsurgery import CheckpointError, SurgeryError
from fdsurgery.checkpoints import CheckpointPlan, convert_checkpoint, load_tensors, plan_checkpoint, writing
from fdsurgery.cli import app
from fdsurgery.saving import atomic

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cuts processes short, which takes fork")

BUILD = """
from torch import nn

def build():
    conv = nn.Conv2d
    body = [conv(32, 32, 3), nn.ReLU(), conv(32, 48, 1), conv(48, 32, 3)]
    return nn.Sequential(conv(3, 32, 3), nn.BatchNorm2d(32), *body)
"""
SHARDS = 3


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "models.py").write_text(BUILD)
    return f"{tmp_path / 'models.py'}:build"


@pytest.fixture
def state(spec: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return fdsurgery.saving.source.build(spec, pretrained=False)[0].state_dict()


def save_sharded(state: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        part = {name: state[name] for name in list(state)[number::SHARDS]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail instead of hanging."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(source: Path, spec: str, **options: Any) -> str:
    """The one message of a conversion that must fail, and leave nothing behind."""
    out = source.parent / "out"
    before = listing(source.parent)
    with within(60), pytest.raises(SurgeryError) as raised:
        convert_checkpoint(source, out, model=spec, recipe="generic", **options)
    assert listing(source.parent) == before, "nothing is written"
    message = str(raised.value)
    assert message and "Traceback" not in message
    return message


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in str(path))


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a result, or None in place of those that are not whole."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "conversion.json"}


def test_flipped_bytes(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    """A flip in the header is refused, or was in a space; one in the data is a number, which nothing can tell."""
    whole = tmp_path / "whole.safetensors"
    save_file(state, whole)
    data = bytearray(whole.read_bytes())
    header_end = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(0)
    places = [*range(9), *(draw.randrange(8, header_end) for _ in range(150))]
    places += [draw.randrange(header_end, len(data)) for _ in range(15)]
    told = {"refused": 0, "converted": 0}
    for number, place in enumerate(places):
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "in.safetensors").write_bytes(damaged)
        try:
            with within(60):
                convert_checkpoint(folder / "in.safetensors", folder / "out", model=spec, recipe="generic")
        except SurgeryError as error:
            assert str(error)
            assert listing(folder) == ["in.safetensors"]
            told["refused"] += 1
        else:
            assert place >= header_end or load_file(folder / "in.safetensors").keys() == state.keys()
            assert load_tensors(folder / "out")
            told["converted"] += 1
        shutil.rmtree(folder)
    assert told["refused"] > 100
    print(f"\n{len(places)} flipped bytes: {told}")


def test_truncated_files(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "whole.safetensors")
    torch.save({"state_dict": state}, tmp_path / "whole.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    tried = 0
    for file in ("whole.safetensors", "whole.pth", "legacy.pth"):
        data = (tmp_path / file).read_bytes()
        folder = tmp_path / "case"
        folder.mkdir(exist_ok=True)
        damaged = folder / f"in{Path(file).suffix}"
        for length in {0, 1, 7, 8, 9, 100, *range(0, len(data), len(data) // 12), len(data) - 1}:
            damaged.write_bytes(data[:length])
            refused(damaged, spec)
            tried += 1
        damaged.unlink()
    print(f"\n{tried} truncated files, all refused")


class Payload:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_pickles_with_payloads(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    touch = f"open({str(mark)!r}, 'w').close()"
    payloads: list[Any] = [
        Payload(os.system, f"touch {mark}"),
        Payload(exec, touch),
        Payload(eval, touch),
        Payload(subprocess.call, ["touch", str(mark)]),
        Payload(Path.touch, mark),
        Payload(os.mkdir, str(mark)),
        Payload(shutil.copy, __file__, str(mark)),
        Payload(getattr, "", "join"),
        Payload(__import__, "os"),
        Payload(torch.load, str(mark)),
        Namespace(epochs=3),
        Path("somewhere"),
        object,
    ]
    places: list[Callable[[Any], Any]] = [
        lambda payload: payload,
        lambda payload: {"state_dict": state, "args": payload},
        lambda payload: {"state_dict": {**state, "0.weight": payload}},
        lambda payload: {**state, "extra": [payload]},
    ]
    folder = tmp_path / "case"
    folder.mkdir()
    tried = 0
    for payload in payloads:
        for place in places:
            for zipped in (True, False):
                torch.save(place(payload), folder / "in.pth", _use_new_zipfile_serialization=zipped)
                message = refused(folder / "in.pth", spec)
                assert "holds more than tensors" in message and "save its state dict alone" in message
                tried += 1
        (folder / "in.pth").write_bytes(pickle.dumps(payload))  # no torch.save at all
        refused(folder / "in.pth", spec)
        tried += 1
    assert not mark.exists()
    assert "argparse.Namespace" in message_of_arguments(folder, spec, state)
    # A file that says it is safetensors is never unpickled.
    (folder / "in.pth").rename(folder / "in.safetensors")
    assert "no whole safetensors file" in refused(folder / "in.safetensors", spec)
    print(f"\n{tried + 2} pickles with payloads, none executed")


def message_of_arguments(folder: Path, spec: str, state: dict[str, Tensor]) -> str:
    torch.save({"model": state, "args": Namespace(epochs=3)}, folder / "in.pth")
    return refused(folder / "in.pth", spec)


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"0.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_absurd_shapes_and_headers(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    huge = 1 << 62
    headers = [
        safetensors_bytes(entry([huge], [0, huge])),
        safetensors_bytes(entry([huge, huge], [0, 16]), bytes(16)),
        safetensors_bytes(entry([1 << 32, 1 << 32], [0, 0])),
        safetensors_bytes(entry([-1], [0, 4]), bytes(4)),
        safetensors_bytes(entry([1.5], [0, 6]), bytes(6)),
        safetensors_bytes(entry(["many"], [0, 4]), bytes(4)),
        safetensors_bytes(entry([2], [8, 0]), bytes(8)),
        safetensors_bytes(entry([2], [0, 8], "F33"), bytes(8)),
        safetensors_bytes(entry([2], [-8, 0]), bytes(8)),
        safetensors_bytes(entry([2], [4, 12]), bytes(12)),
        safetensors_bytes(entry([huge, 0], [0, 0])),
        safetensors_bytes(entry([0], [0, 0])),
        safetensors_bytes({}),
        safetensors_bytes([]),
        safetensors_bytes(b"[" * 100_000),
        safetensors_bytes(b'{"a":' * 100_000),
        struct.pack("<Q", huge) + b"{}",
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        b"",
    ]
    folder = tmp_path / "case"
    folder.mkdir()
    for header in headers:
        (folder / "in.safetensors").write_bytes(header)
        refused(folder / "in.safetensors", spec)
    (folder / "in.safetensors").unlink()

    views: list[Any] = [
        torch.zeros(1).expand(1 << 40),
        torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0)),
        torch.zeros(2, device="meta"),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(0),
        {"nested": torch.zeros(2)},
        3,
    ]
    for view in views:
        torch.save({**state, "0.weight": view}, folder / "in.pth")
        refused(folder / "in.pth", spec)
    for whole in ([], {}, None, 3, "text", {1: torch.zeros(2)}, [torch.zeros(2)], {"state_dict": {}}):
        torch.save(whole, folder / "in.pth")
        assert "holds no weights" in refused(folder / "in.pth", spec)

    # Layers that claim to be dynamic, with spectra and heads of no possible shape.
    module, _ = fdsurgery.saving.source.build(spec, pretrained=False)
    converted = fdsurgery.convert(module, "generic", example_inputs=torch.zeros(1, 3, 16, 16)).state_dict()
    layer = {name: value for name, value in converted.items() if name.startswith("2.")}
    plain = {name: value for name, value in state.items() if not name.startswith("2.")}
    absurd = 0
    for name, value in layer.items():
        for shape in ((0,), (1 << 40, 0), (*value.shape, 1), (2, *value.shape[1:]) if value.dim() else (3,)):
            if (name, shape[0]) == ("2.dft_weight", 2):
                continue  # two spectra with 32 groups each, which the kernel head of 64 agrees with
            torch.save({**plain, **layer, name: torch.zeros(shape)}, folder / "in.pth")
            refused(folder / "in.pth", spec)
            absurd += 1
    print(f"\n{len(headers) + len(views) + 8 + absurd} absurd shapes and headers, all refused")


def test_indices_and_files_that_are_none(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "case"
    source = folder / "in"
    index = source / "model.safetensors.index.json"
    names = [f"model-{number + 1:05}-of-{SHARDS:05}.safetensors" for number in range(SHARDS)]
    folder.mkdir()
    save_sharded(state, source)
    weight_map = json.loads(index.read_text())["weight_map"]
    secret = tmp_path / "secret.safetensors"
    save_file({"0.weight": torch.zeros(32, 3, 3, 3)}, secret)
    tried = 0

    def expect(message: str) -> None:
        nonlocal tried
        assert message in refused(source, spec), message
        tried += 1

    for one, other in ((0, 1), (1, 2), (0, 2)):
        for a, b in ((one, other), (other, one)):
            (source / "held").write_bytes((source / names[a]).read_bytes())
            os.replace(source / names[b], source / names[a])
            os.replace(source / "held", source / names[b])
        save_sharded(state, source)
        first, second = (source / names[one]).read_bytes(), (source / names[other]).read_bytes()
        (source / names[one]).write_bytes(second)
        (source / names[other]).write_bytes(first)
        expect("says that '0.")
        save_sharded(state, source)
    for place in (str(secret), "../secret.safetensors", "../../etc/passwd", "..", ".", "", "a/b", "\0", 3, None, ["x"]):
        index.write_text(json.dumps({"weight_map": {**weight_map, "0.weight": place}}))
        expect("is no name of a file beside it")
    for text in ("", "{", "[]", "{}", "null", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff\xfe"):
        index.write_bytes(text.encode("latin-1"))
        tried += bool(refused(source, spec))
    index.write_text(json.dumps({"weight_map": {**weight_map, "none.weight": names[0]}}))
    expect("does not have it")
    index.write_text(json.dumps({"weight_map": {**weight_map, "0.weight": "absent.safetensors"}}))
    expect("absent.safetensors: no such file")
    save_sharded(state, source)
    (source / names[1]).unlink()
    os.mkfifo(source / names[1])
    expect("is no regular file")
    (source / names[1]).unlink()
    (source / names[1]).mkdir()
    expect("is no regular file")

    for file in ("in.txt", "in", "in.onnx", "in.pkl"):
        (folder / file if file != "in" else folder / "none").write_text("text")
    for path in (folder / "in.txt", folder / "in.onnx", folder / "in.pkl", folder / "nowhere.pth", Path("/dev/zero")):
        with within(60), pytest.raises(SurgeryError):
            plan_checkpoint(path, folder / "out", model=spec)
        tried += 1
    os.mkfifo(folder / "pipe.safetensors")
    assert "is no regular file" in refused(folder / "pipe.safetensors", spec)
    print(f"\n{tried + 1} wrong indices, swapped shards and files that are none, all refused")


def test_values_that_are_not_finite(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    """In a layer that stays, they are kept as they are; one in a swapped layer would spoil the whole of it."""
    tried = 0
    cases = {"0.weight": True, "1.running_mean": True, "2.bias": True, "2.weight": False, "4.weight": False}
    for value in (float("nan"), float("inf"), -float("inf")):
        for name, kept in cases.items():
            spoilt = {key: tensor.clone() for key, tensor in state.items()}
            spoilt[name].view(-1)[3] = value
            folder = tmp_path / f"case{tried}"
            folder.mkdir()
            save_file(spoilt, folder / "in.safetensors")
            if kept:
                convert_checkpoint(folder / "in.safetensors", folder / "out", model=spec, recipe="generic")
                result = load_tensors(folder / "out")[name]
                assert torch.equal(result.view(torch.int32), spoilt[name].view(torch.int32))
            else:
                assert f"{name!r} holds 1 values that are not finite" in refused(folder / "in.safetensors", spec)
            tried += 1
    print(f"\n{tried} values that are not finite: kept as they are, or refused where they would spread")


def test_wrong_architectures(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "in.safetensors")
    others = [
        "timm:test_resnet",
        "timm:test_vit",
        "timm:test_convnext",
        "torchvision:vgg11",
        "transformers:ResNetModel",
    ]
    for other in others:
        assert (
            "tensors is named like" in (message := refused(tmp_path / "in.safetensors", other)) or "missing" in message
        )
    for change in (
        {"2.weight": torch.zeros(32, 32, 1, 1)},
        {"2.weight": torch.zeros(16, 32, 3, 3)},
        {"9.weight": torch.zeros(3)},
    ):
        save_file({**state, **change}, tmp_path / "in.safetensors")
        assert "nothing was written" in refused(tmp_path / "in.safetensors", spec)
    print(f"\n{len(others) + 3} wrong architectures, all refused")


class Cut:
    """Kills its process at the n-th thing it does to a file system."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def cut(*arguments: Any, **options: Any) -> Any:
            self.step()
            result = function(*arguments, **options)
            self.step()
            return result

        return cut


def in_a_child(run: Callable[[], None]) -> int:
    """The exit status of a process that does this; negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        except SurgeryError as error:
            status = 2  # first, for a limit on files holds for what pytest captures, too
            print(error, file=sys.stderr)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cut_short(plan: CheckpointPlan, at: int) -> Callable[[], None]:
    def run() -> None:
        cut = Cut(at)
        touching = [
            (os, "replace"),
            (os, "fsync"),
            (shutil, "rmtree"),
            (Path, "mkdir"),
            (atomic, "exchange_names"),
        ]
        for module, name in touching:
            setattr(module, name, cut.wrapped(getattr(module, name)))
        writing.carry_out(plan, lambda count: cut.step())

    return run


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_killed_at_every_point(
    kind: str, spec: str, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill loses nothing written; it only takes its time
    old = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    save_sharded(old, tmp_path / "older")
    save_sharded(state, tmp_path / "in")
    name = "result" if kind == "folder" else "result.safetensors"
    out, wanted = tmp_path / "out" / name, tmp_path / "wanted" / name
    for folder in ("out", "wanted"):
        (tmp_path / folder).mkdir()

    def result() -> dict[str, bytes]:
        return content(out) if kind == "folder" else {out.name: out.read_bytes()}

    convert_checkpoint(tmp_path / "in", wanted, model=spec, recipe="generic")
    new = content(wanted) if kind == "folder" else {wanted.name: wanted.read_bytes()}
    to_older = plan_checkpoint(tmp_path / "older", out, model=spec, recipe="generic")
    to_new = plan_checkpoint(tmp_path / "in", out, model=spec, recipe="generic")
    writing.carry_out(to_older)
    older = result()
    assert new != older
    seen = {"older": 0, "new": 0}
    at = 0
    while True:
        status = in_a_child(cut_short(to_new, at))
        assert status in (0, -signal.SIGKILL)
        assert result() in (older, new), f"half a result after a kill at step {at}"
        assert set(listing(tmp_path / "out")) >= {out.name}
        if status == 0:
            break
        seen["new" if result() == new else "older"] += 1
        # Every other time the next run goes on where this one was cut; else the older result stands there again.
        if at % 2 or result() == new:
            writing.carry_out(to_new)
            assert result() == new and sorted(path.name for path in out.parent.iterdir()) == [out.name]
            writing.carry_out(to_older)
        at += 1
    assert at > 30 and seen["older"] > 20 and seen["new"] > 0
    print(f"\nkilled at each of {at} points: {seen}")


def test_killed_where_folders_are_exchanged_in_two_steps(
    spec: str, state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "exchange_names", lambda one, other: False)  # other systems than Linux
    out = tmp_path / "out"
    save_sharded({name: value + 1 for name, value in state.items()}, tmp_path / "older")
    save_sharded(state, tmp_path / "in")
    convert_checkpoint(tmp_path / "older", out, model=spec, recipe="generic")
    older = content(out)
    plan = plan_checkpoint(tmp_path / "in", out, model=spec, recipe="generic")

    def between() -> None:
        replace = os.replace

        def replace_once(source: Any, target: Any) -> None:
            replace(source, target)
            if Path(target).name == "older":
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace_once  # type: ignore[assignment]
        writing.carry_out(plan)

    assert in_a_child(between) == -signal.SIGKILL
    assert not out.exists()

    def failing(*_: object) -> None:
        raise CheckpointError("it fails again")

    with monkeypatch.context() as patched:
        patched.setattr(writing, "_write_all", failing)
        with pytest.raises(CheckpointError, match="it fails again"):
            writing.carry_out(plan)
    assert content(out) == older
    writing.carry_out(plan)
    assert content(out) != older


def test_killed_at_random_moments_it_goes_on(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_sharded(state, tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "wanted", model=spec, recipe="generic")
    new = content(tmp_path / "wanted")
    plan = plan_checkpoint(tmp_path / "in", tmp_path / "out", model=spec, recipe="generic")
    start = time.perf_counter()
    writing.carry_out(plan)
    usual = time.perf_counter() - start
    shutil.rmtree(tmp_path / "out")
    draw, kills, finished = random.Random(0), 0, 0
    for _ in range(40):
        child = os.fork()
        if child == 0:
            try:
                writing.carry_out(plan)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, 1.2 * usual))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if (tmp_path / "out").exists():
            assert content(tmp_path / "out") == new
            finished += 1
            shutil.rmtree(tmp_path / "out")
    writing.carry_out(plan)
    assert content(tmp_path / "out") == new
    assert not any(path.name.endswith(".partial") for path in tmp_path.iterdir())
    print(f"\n40 runs, {kills} killed at random moments, {finished} results, all whole")


def test_a_killed_run_goes_on_with_the_files_that_are_done(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_sharded(state, tmp_path / "in")
    plan = plan_checkpoint(tmp_path / "in", tmp_path / "out", model=spec, recipe="generic")
    written = [0]

    def interrupt(count: int) -> None:
        written[0] += count
        if written[0] > sum(file.nbytes for file in plan.files[:2]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writing.carry_out(plan, interrupt)
    done = sorted((tmp_path / ".out.partial" / "content").glob("*.safetensors"))
    assert len(done) == 2 and not (tmp_path / "out").exists()
    stamps = [file.stat().st_mtime_ns for file in done]
    again = plan_checkpoint(tmp_path / "in", tmp_path / "out", model=spec, recipe="generic")
    writing.carry_out(again)
    kept = [(tmp_path / "out" / file.name).stat().st_mtime_ns for file in done]
    assert kept == stamps, "they were not written again"

    # Another conversion takes none of them.
    shutil.rmtree(tmp_path / "out")
    written[0] = 0
    with pytest.raises(KeyboardInterrupt):
        writing.carry_out(again, interrupt)
    changed = {name: value * 2 if value.is_floating_point() else value for name, value in state.items()}
    save_sharded(changed, tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", model=spec, recipe="generic")
    assert torch.equal(load_tensors(tmp_path / "out")["0.weight"], changed["0.weight"])


def test_a_full_disk(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_sharded(state, tmp_path / "in")
    save_file(state, tmp_path / "in.safetensors")
    tried = 0
    for source in ("in", "in.safetensors"):
        for out in ("out", "out.safetensors", "out.pth"):
            plan = plan_checkpoint(tmp_path / source, tmp_path / out, model=spec, recipe="generic")
            for limit in (0, 1, 100, 5_000, 20_000):

                def run(plan: CheckpointPlan = plan, limit: int = limit) -> None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                    writing.carry_out(plan)

                assert in_a_child(run) == 2, "an error of ours"
                names = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
                assert names == {"in", "in.safetensors", "models.py"}, names
                tried += 1
    print(f"\n{tried} full disks, nothing left behind")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system")
def test_a_small_and_a_read_only_file_system(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    save_sharded(state, tmp_path / "in")
    for size in (64, 128):
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", disk], capture_output=True
        ).returncode:
            pytest.skip("mounting is not permitted")
        try:
            with pytest.raises(SurgeryError, match="No space left on device; it is as it was"):
                convert_checkpoint(tmp_path / "in", disk / "out", model=spec, recipe="generic")
            assert listing(disk) == []
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            with pytest.raises(SurgeryError, match="Read-only file system"):
                convert_checkpoint(tmp_path / "in", disk / "out", model=spec, recipe="generic")
        finally:
            subprocess.run(["umount", disk], check=True)
    print("\n4 small or read-only file systems")


def test_places_that_cannot_be_written(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "in.safetensors")
    (tmp_path / "file").touch()
    (tmp_path / ".taken.partial").mkdir()
    (tmp_path / ".taken.partial" / "precious").touch()
    places = [
        tmp_path / "file" / "out",
        tmp_path / "taken",
        Path("/proc/out"),
        Path("/proc/out.pth"),
        tmp_path / ("x" * 300),
    ]
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        places.append(tmp_path / "locked" / "out")
    before = listing(tmp_path)
    for place in places:
        result = CliRunner().invoke(
            app, ["checkpoint", "convert", str(tmp_path / "in.safetensors"), str(place), "-m", spec, "-r", "generic"]
        )
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert len(result.stderr.strip().splitlines()) <= 4
        assert listing(tmp_path) == before
    print(f"\n{len(places)} places that cannot be written")


def test_a_checkpoint_that_changes_while_it_is_read(spec: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "in.safetensors")
    plan = plan_checkpoint(tmp_path / "in.safetensors", tmp_path / "out", model=spec, recipe="generic")
    data = (tmp_path / "in.safetensors").read_bytes()
    (tmp_path / "in.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SurgeryError, match="it was whole when it was opened"):
        writing.carry_out(plan)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()

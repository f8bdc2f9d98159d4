"""What replaces files and folders leaves the older ones or the new ones, wherever it is killed or fails."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from fdsurgery.saving import atomic

OLD = {"a": "old a", "b": "old b", "last": "old last"}
NEW = {"a": "new a", "b": "new b", "last": "new last"}
KINDS = ["one step", "two steps"]
Stopped = Callable[[int, Callable[[], object]], bool]


def make(folder: Path, content: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    for name, text in content.items():
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def stopping(stop: Callable[[], None], at: int, patch: pytest.MonkeyPatch) -> None:
    """Stop before the n-th thing that is done to the file system."""
    steps = count()

    def wrapped(function: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object) -> object:
            if next(steps) == at:
                stop()
            return function(*arguments)

        return step

    for module, name in ((os, "replace"), (os, "fsync"), (atomic, "exchange_names")):
        patch.setattr(module, name, wrapped(getattr(module, name)))


def killed_at(at: int, work: Callable[[], object]) -> bool:
    """Do some work in a child that is killed before its n-th step; False if it got through."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            stopping(lambda: os.kill(os.getpid(), signal.SIGKILL), at, pytest.MonkeyPatch())
            work()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def fails_at(at: int, work: Callable[[], object]) -> bool:
    """Do some work of which the n-th step fails; False if it got through."""

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        stopping(fail, at, patch)
        try:
            work()
        except OSError:
            return True
    return False


STOPPED = [pytest.param(killed_at, marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")), fails_at]


def in_steps(kind: str, patch: pytest.MonkeyPatch) -> None:
    if kind == "two steps":
        patch.setattr(atomic, "exchange_names", lambda one, other: False)
    elif sys.platform != "linux":
        pytest.skip("only Linux exchanges names")


def folders(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    for at in range(10):
        yield at, tmp_path / str(at)


@pytest.mark.parametrize("stopped", STOPPED)
def test_a_file_is_the_older_or_the_new_one(stopped: Stopped, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    seen = []
    for at in range(5):
        more = stopped(at, lambda: atomic.write_text(file, "neu: \u00fc\n"))
        seen.append(file.read_text(encoding="utf-8"))
        if not more:
            break
    assert seen == ["old", "old", "neu: \u00fc\n"], "its fsync, its rename, and through"
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "the last run has taken up what others left"


def test_a_file_whose_writer_fails_is_the_older_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(RuntimeError, match="in the middle"), atomic.whole_file(file) as stream:
        stream.write(b"new")
        raise RuntimeError("in the middle")
    assert file.read_text() == "old"


@pytest.mark.parametrize("stopped", STOPPED)
def test_files_move_one_by_one_and_the_last_one_last(stopped: Stopped, tmp_path: Path) -> None:
    seen = []
    for at, root in folders(tmp_path):
        fresh, folder = make(root / "fresh", NEW), make(root / "folder", OLD | {"other": "stays"})
        more = stopped(at, partial(atomic.replace_files, fresh, folder, last="last"))
        found = read(folder)
        assert found.pop("other") == "stays" and found.keys() == OLD.keys()
        assert all(text in (OLD[name], NEW[name]) for name, text in found.items())
        seen.append([name for name, text in found.items() if text == NEW[name]])
        if not more:
            break
    assert [len(moved) for moved in seen] == [0, 1, 2, 3]
    assert all("last" not in moved for moved in seen[:-1])


def test_files_move_to_where_nothing_is(tmp_path: Path) -> None:
    atomic.replace_files(make(tmp_path / "fresh", NEW), tmp_path / "folder", last="last")
    assert read(tmp_path / "folder") == NEW


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_survives_a_kill(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_steps(kind, monkeypatch)
    seen = []
    for at, root in folders(tmp_path):
        fresh, folder, aside = make(root / "fresh", NEW), make(root / "folder", OLD), root / "aside"
        more = killed_at(at, partial(atomic.replace_folder, fresh, folder, aside))
        if not folder.exists():
            assert kind == "two steps" and read(aside) == OLD
        atomic.put_back(folder, aside)
        seen.append(read(folder))
        if not more:
            break
    assert seen == [OLD] * (len(seen) - 1) + [NEW] and len(seen) == (2 if kind == "one step" else 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_survives_a_failure(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_steps(kind, monkeypatch)
    seen = []
    for at, root in folders(tmp_path):
        fresh, folder = make(root / "fresh", NEW), make(root / "folder", OLD)
        more = fails_at(at, partial(atomic.replace_folder, fresh, folder, root / "aside"))
        seen.append(read(folder))
        if not more:
            break
        assert read(fresh) == NEW and not (root / "aside").exists()
    assert seen == [OLD] * (len(seen) - 1) + [NEW] and len(seen) == (2 if kind == "one step" else 4)


def test_what_was_put_in_place_stays_there(tmp_path: Path) -> None:
    folder, aside = make(tmp_path / "folder", NEW), make(tmp_path / "aside", OLD)
    atomic.put_back(folder, aside)
    assert read(folder) == NEW and read(aside) == OLD
    atomic.put_back(folder, tmp_path / "nothing")
    assert read(folder) == NEW


def test_on_windows_no_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a rename replaces files only, and `renameat2` does not exist."""
    replace = os.replace

    def as_on_windows(source: Path, target: Path) -> None:
        if target.is_dir():
            raise PermissionError(5, "Access is denied")
        replace(source, target)

    def missing(one: Path, other: Path) -> bool:
        raise AssertionError("Windows has no C library of that name")

    monkeypatch.setattr(os, "replace", as_on_windows)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(atomic, "exchange_names", missing)
    fresh, folder = make(tmp_path / "fresh", NEW), make(tmp_path / "folder", OLD)
    atomic.replace_folder(fresh, folder, tmp_path / "aside")
    assert read(folder) == NEW and read(tmp_path / "aside") == OLD
    atomic.replace_folder(make(tmp_path / "fresh", OLD), tmp_path / "elsewhere", tmp_path / "not needed")
    assert read(tmp_path / "elsewhere") == OLD
    atomic.replace_files(make(tmp_path / "fresh", OLD), folder, last="last")
    assert read(folder) == OLD


def test_a_scratch_folder_goes_with_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic.scratch_beside(tmp_path / "new" / "folder") as scratch:
        assert scratch.parent == tmp_path / "new" and scratch.name.startswith(".folder-")
        (scratch / "file").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []

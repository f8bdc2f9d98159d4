"""Files and folders that appear whole: a process that is killed, or a full disk, leaves what was there before.

What is new is written beside what it replaces, on the same file system, and takes its name at the end. Linux exchanges
two names in one step. Elsewhere a folder cannot take the place of another one, so the older one is set aside first.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".unfinished"
"""The end of a file's name while it is written."""


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """A new empty folder on the file system of another one, whose parents are made. It is removed at the end."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        yield Path(scratch)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name, and replaces an older one, once it is whole and on the disk.

    Where writing fails or is killed, the older file stays, and what was written stands beside it as `NAME.unfinished`.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file, whole."""
    with whole_file(path) as stream:
        stream.write(text.encode())


def replace_files(fresh: Path, folder: Path, last: str) -> None:
    """Move the files of a new folder into an older one, one by one, over those of the same name.

    Each file is either the older or the new one at any moment.

    Args:
        fresh: holds the new files.
        folder: made if it is not there; its other files stay.
        last: name of the file that moves last, by which a reader knows the others.
    """
    if not folder.exists():
        os.replace(fresh, folder)
        return
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == last):
        os.replace(path, folder / path.name)


def replace_folder(fresh: Path, folder: Path, aside: Path) -> None:
    """Put a new folder in the place of an older one, if there is one. On failure the older one is there again.

    On Linux there is no moment at which neither is there. Elsewhere a process that is killed between two steps leaves
    the older one in `aside`; `put_back` ends that.

    Args:
        fresh: the new folder. Afterwards it may hold the older one.
        folder: its place.
        aside: a free name on the same file system, for the older folder. Afterwards it may hold that.
    """
    if not folder.exists():
        os.replace(fresh, folder)
        return
    if sys.platform == "linux" and exchange_names(fresh, folder):
        return
    os.replace(folder, aside)
    try:
        os.replace(fresh, folder)
    except OSError:
        os.replace(aside, folder)
        raise


def put_back(folder: Path, aside: Path) -> None:
    """After `replace_folder` was killed: put the older folder back where neither is in its place."""
    if aside.exists() and not folder.exists():
        os.replace(aside, folder)


def exchange_names(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the C library or the file system cannot."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return function is not None and function(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0

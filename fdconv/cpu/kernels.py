"""Compile, load and call the kernels of `kernels.cpp`: the steps of the loop over samples, each in one pass.

They are compiled when they are first needed, by the C++ compiler of the machine, and kept in the user's cache folder.
Where there is none the steps are taken by torch, and take longer: see `fdconv.cpu.sample_loop`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..reference import WeightShape

SOURCE = Path(__file__).with_name("kernels.cpp")
INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}
"""Flags for what torch itself found this CPU to have; without an entry, what its whole family has."""


class CannotCompile(Exception):
    """There are no kernels, and why."""


@lru_cache(maxsize=1)
def reason_missing() -> str | None:
    """Why there are no kernels here, or None if there are. Compiles them if nobody did so far."""
    try:
        _library()
    except CannotCompile as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(_compiled()))
    except OSError as error:
        raise CannotCompile(f"the compiled kernels cannot be loaded: {error}") from error
    pointer, number, switch = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.fdconv_scale.argtypes = [pointer, pointer, switch, pointer, pointer, *(number,) * 5, pointer, switch]
    library.fdconv_scale.restype = ctypes.c_uint32
    library.fdconv_transpose.argtypes = [pointer, pointer, number, number, number, switch]
    library.fdconv_modulate.argtypes = [pointer, pointer, pointer, switch]
    library.fdconv_modulate_backward.argtypes = [pointer, pointer, pointer, pointer, switch]
    library.fdconv_scale_backward.argtypes = [
        *(pointer, pointer, pointer, switch, pointer, pointer, pointer),
        *(number,) * 5,
        switch,
    ]
    for size in (library.fdconv_part, library.fdconv_tile):
        size.argtypes, size.restype = [], number
    return library


def _compiled() -> Path:
    """The shared library, compiled unless the cache has it."""
    compiler = _compiler()
    command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    command += INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    version = _run([compiler, "--version"])
    key = hashlib.sha256("\n".join([*command, version, SOURCE.read_text("utf-8")]).encode()).hexdigest()[:16]
    folder = _cache_folder()
    target = folder / f"kernels-{key}.so"
    if not target.exists():
        # Under a name of its own first: other processes may be compiling, too, and loading.
        handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            _run([*command, str(SOURCE), "-o", unfinished])
            os.replace(unfinished, target)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    return target


def _compiler() -> str:
    if os.name != "posix":
        raise CannotCompile("the kernels for CPUs need gcc or clang, on Linux or macOS")
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise CannotCompile(f"there is no C++ compiler {named or 'c++, g++ or clang++'} on this machine")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        raise CannotCompile(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _cache_folder() -> Path:
    """The user's, or where that cannot be written to, a new one that this process alone uses."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "fdconv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="fdconv-"))


# Calls. All tensors are float32 and contiguous, but for the group, uint8 or int32.


class Edges(ctypes.Structure):
    """A factor of the columns before `first` and from `last` on, as `Edges` in the C++."""

    _fields_ = (("factor", ctypes.c_float), ("first", ctypes.c_int64), ("last", ctypes.c_int64))

    @classmethod
    def of(cls, shape: WeightShape, *, turned: bool) -> Edges:
        """Those of half spectra, or of some that are given as one row, column after column."""
        columns, of_column = shape.width // 2 + 1, shape.out_channels * shape.kernel_size[0] if turned else 1
        return cls(shape.edge, of_column, (columns if shape.width % 2 else columns - 1) * of_column)


def scale(spectra: Tensor, group: Tensor, tables: Tensor, edges: Edges, out: Tensor) -> None:
    """The spectra scaled by their groups' factors and summed.

    Args:
        spectra: `(r, D1, D2h, 2)`.
        group: `(D1, D2h)`.
        tables: `(B, r, n)`.
        edges: another factor, of the edge columns.
        out: `(B, D2h, D1, 2)`, transposed.

    Raises:
        IndexError: a group is not among the `n`.
    """
    highest = _library().fdconv_scale(
        *(spectra.data_ptr(), group.data_ptr(), group.element_size(), tables.data_ptr(), out.data_ptr()),
        *(len(spectra), *group.shape, len(tables), tables.shape[2], ctypes.byref(edges), torch.get_num_threads()),
    )
    if highest >= tables.shape[2]:
        raise IndexError(
            f"frequency_group has a coefficient in group {highest}, but there are only {tables.shape[2]} groups: it is "
            "that of another layer, or damaged"
        )


def scale_backward(above: Tensor, spectra: Tensor, group: Tensor, tables: Tensor, to_spectra: Tensor) -> Tensor:
    """Gradient to the tables, `(B, r, n)`, from that to the result of `scale`; that to the spectra is added up.

    Args:
        above: `(B, D2h, D1, 2)`, transposed.
        to_spectra: as the spectra; added to.
    """
    to_tables = tables.new_empty(-(-len(group) // _library().fdconv_tile()), *tables.shape)
    _library().fdconv_scale_backward(
        *(above.data_ptr(), spectra.data_ptr(), group.data_ptr(), group.element_size(), tables.data_ptr()),
        *(to_spectra.data_ptr(), to_tables.data_ptr()),
        *(len(spectra), *group.shape, len(tables), tables.shape[2], torch.get_num_threads()),
    )
    return to_tables.sum(0)


def transpose(source: Tensor, out: Tensor) -> None:
    """Complex numbers `(B, rows, columns)` to `(B, columns, rows)`, both given as pairs of a last axis."""
    _library().fdconv_transpose(source.data_ptr(), out.data_ptr(), *source.shape[:3], torch.get_num_threads())


class Modulation(ctypes.Structure):
    """A weight's shape and the factors of its modulation, as `Weight` in the C++."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "samples filters channels groups height width tap_count".split()),
        *((name, ctypes.c_void_p) for name in "context taps rows columns".split()),
    )

    @classmethod
    def of(
        cls, shape: WeightShape, context: Tensor | None, taps: Tensor | None, rows: Tensor, columns: Tensor
    ) -> Modulation:
        """All tensors must be contiguous; they are kept for as long as it lives.

        Args:
            context: `(B, C_in + taps - 1)`, with zeros at its ends, or None without local branch.
            taps: `(taps, C_out*k_h*k_w)`, for half the gate, or None.
            rows: `(B, C_out, k_h*k_w)`.
            columns: `(B, C_in)`.
        """
        sizes = (len(rows), shape.out_channels, shape.in_channels, shape.groups, *shape.kernel_size)
        given = (context, taps, rows, columns)
        made = cls(*sizes, 1 if taps is None else len(taps), *(None if it is None else it.data_ptr() for it in given))
        made.given = given
        return made


def modulate(modulation: Modulation, image: Tensor, out: Tensor) -> None:
    """Weights `(B, C_out, C_in/groups, k_h, k_w)` of images `(B, C_out*k_h, C_in/groups*k_w)`."""
    _library().fdconv_modulate(ctypes.byref(modulation), image.data_ptr(), out.data_ptr(), torch.get_num_threads())


class _Gradients(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in "image rows taps columns context".split())


def modulate_backward(
    modulation: Modulation, above: Tensor, image: Tensor, to_image: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients to rows, columns, taps (summed over samples) and context; that to the image is written.

    Args:
        above: gradient to the weights.
        image: the images that they were made of.
        to_image: as the image.
    """
    _, taps, rows, columns = given = modulation.given
    samples, filters, _ = rows.shape
    parts = -(-filters // _library().fdconv_part())
    to_rows, to_columns = torch.empty_like(rows), columns.new_zeros(samples, parts, columns.shape[1])
    to_taps = to_context = None
    if taps is not None:
        to_taps = taps.new_empty(samples, *taps.shape)
        to_context = given[0].new_zeros(samples, parts, given[0].shape[1])
    places = (to_image, to_rows, to_taps, to_columns, to_context)
    to = _Gradients(*(None if place is None else place.data_ptr() for place in places))
    _library().fdconv_modulate_backward(
        *(ctypes.byref(modulation), ctypes.byref(to), above.data_ptr(), image.data_ptr(), torch.get_num_threads())
    )
    if to_taps is None or to_context is None:
        return to_rows, to_columns.sum(1), None, None
    return to_rows, to_columns.sum(1), to_taps.sum(0), to_context.sum(1)

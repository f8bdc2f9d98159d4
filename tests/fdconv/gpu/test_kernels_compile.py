"""Every kernel compiles to machine code of NVIDIA GPUs, none of which is needed, just as the launchers launch it.

The launchers are called with meta tensors, and where Triton would launch, it compiles for the GPU that a stand-in for
the driver describes. The tuner, told to measure, so compiles every candidate. What comes out is read: registers that
are kept in memory, shared memory, and the instructions of the matrix products.

Tests elsewhere run the kernels in Triton's interpreter, which Triton chooses at its import, so this runs in processes
of its own: `python tests/fdconv/gpu/test_kernels_compile.py 90 [--all]` prints a line of JSON for each kernel
compiled, and with `--asked` how often the tuner measures one call.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ARCHITECTURES = (80, 90)  # A100 and H100; what is made for 8.0 runs on every later 8.x
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = (1, 3, 7)
FACTORS = ("context", "filters", "channel", "filter_", "spatial")
TUNED = ("_scale", "_modulate", "_conv")
KERNELS = (*TUNED, "_scale_backward", "_modulate_backward")
BLOCKS = ("BLOCK", "ROWS", "COLUMNS", "CO", "CI", "P", "M", "N", "K")

SHARED = 99 * 1024
"""Bytes of shared memory that a program may have on the smallest of the GPUs with these instructions, the consumer
cards 8.6 and 8.9: what fits there fits into the 163 KiB of 8.0 and the 227 KiB of 9.0, and several times into those."""

SPILL = 64
"""Bytes a thread may keep in memory instead of registers. ptxas may trade a few for more programs at a time, 32 at most
where this was measured, with Triton 3.3, 3.6 and 3.9; a block too large for the registers takes more than a hundred."""

Case = dict[str, Any]


# In the child --------------------------------------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scale(ratio: int, group_dtype: torch.dtype, d1: int = 96, d2: int = 94, batch: int = 8) -> None:
    from fdconv.gpu.ops import _scale_spectrum, _scale_spectrum_backward

    spectra, group = meta(ratio, d1, d2 // 2 + 1, 2), meta(d1, d2 // 2 + 1, dtype=group_dtype)
    kernel = meta(batch, ratio * 64)
    _scale_spectrum(spectra, group, kernel, 1.0, 1.4, d2)
    _scale_spectrum_backward(meta(batch, *spectra.shape[1:]), spectra, group, kernel, 1.0, 1.4, d2)


def modulate(
    channels: int,
    kernel_size: int,
    groups: int,
    taps: int,
    dtype: torch.dtype,
    missing: tuple[str, ...] = (),
    batch: int = 8,
) -> None:
    from fdconv.gpu.ops import _modulate, _modulate_backward

    k, each = kernel_size, channels // groups
    image = meta(batch, channels * k, each * k)
    shapes = ((batch, channels), (channels * k * k, taps), (batch, channels), (batch, channels), (batch, k * k))
    factors = [None if name in missing else meta(*shape) for name, shape in zip(FACTORS, shapes, strict=True)]
    _modulate(image, *factors, k, k, groups, "sigmoid", dtype)
    grad = meta(batch, channels, each, k, k, dtype=dtype)
    _modulate_backward(grad, image, *factors, k, k, groups, "sigmoid")


def conv(
    channels_in: int,
    channels_out: int,
    size: int,
    kernel_size: int,
    dtype: torch.dtype,
    groups: int = 1,
    stride: int = 1,
    dilation: int = 1,
    batch: int = 8,
) -> None:
    from fdconv.gpu.ops import _conv

    x = meta(batch, channels_in, size, size, dtype=dtype)
    weight = meta(batch, channels_out, channels_in // groups, kernel_size, kernel_size, dtype=dtype)
    padding = dilation * (kernel_size // 2)
    _conv(x, weight, [stride] * 2, [padding] * 2, [dilation] * 2, groups)


def tuned_kernel(name: str) -> Any:
    """The kernel that is called so, e.g. `_scale_kernel` of `fdconv/gpu/scale.py`."""
    return getattr(importlib.import_module(f"fdconv.gpu{name.replace('_', '.')}"), f"{name}_kernel")


CALLS = {call.__name__: call for call in (scale, modulate, conv)}


def cases() -> Iterator[Case]:
    """A few of all: every candidate, dtype, kernel size and factor at least once in each kernel that knows it."""
    yield {"call": "scale", "ratio": 1, "group_dtype": torch.uint8}
    yield {"call": "scale", "ratio": 2, "group_dtype": torch.int32}
    usual: Case = {"call": "modulate", "channels": 256, "taps": 7}
    yield usual | {"kernel_size": 3, "groups": 1, "dtype": torch.bfloat16}
    yield usual | {"kernel_size": 1, "groups": 1, "dtype": torch.float32}
    yield usual | {"kernel_size": 7, "groups": 256, "dtype": torch.float16, "missing": ("channel", "filter_")}
    yield usual | {"kernel_size": 3, "groups": 4, "dtype": torch.float32, "missing": ("context", "filters", "spatial")}
    usual = {"call": "conv", "channels_in": 256, "channels_out": 256, "size": 28}
    yield usual | {"kernel_size": 3, "dtype": torch.bfloat16}
    yield usual | {"kernel_size": 3, "dtype": torch.float32}
    yield usual | {"kernel_size": 1, "dtype": torch.float16, "groups": 2, "size": 7}
    yield usual | {"kernel_size": 7, "dtype": torch.bfloat16, "channels_in": 3, "channels_out": 24, "stride": 2}


def all_cases() -> Iterator[Case]:
    """Everything the launchers can choose, in all combinations."""
    yield from cases()
    for ratio, dtype, (d1, d2) in itertools.product((1, 2, 3), (torch.uint8, torch.int32), ((768, 768), (21, 13))):
        yield {"call": "scale", "ratio": ratio, "group_dtype": dtype, "d1": d1, "d2": d2}
    absent = [(), *((name,) for name in FACTORS[2:]), FACTORS[:2], FACTORS]
    for size, (channels, groups), missing in itertools.product(
        KERNEL_SIZES, ((256, 1), (256, 4), (256, 256), (37, 1)), absent
    ):
        for dtype in DTYPES if not missing else DTYPES[1:2]:
            yield {
                "call": "modulate",
                "channels": channels,
                "kernel_size": size,
                "groups": groups,
                "taps": 7 if channels == 256 else 3,
                "dtype": dtype,
                "missing": missing,
            }
    for dtype, kernel_size, (channels_in, channels_out), size in itertools.product(
        DTYPES, KERNEL_SIZES, ((256, 256), (3, 16), (37, 70)), (56, 7)
    ):
        for groups, stride, dilation in ((1, 1, 1), (1, 2, 3), (channels_in if channels_in == 256 else 1, 1, 1)):
            yield {
                "call": "conv",
                "channels_in": channels_in,
                "channels_out": channels_out,
                "size": size,
                "kernel_size": kernel_size,
                "dtype": dtype,
                "groups": groups,
                "stride": stride,
                "dilation": dilation,
            }


def report(kernel: Any, folder: str) -> dict[str, Any]:
    """What one compiled kernel takes and how it multiplies."""
    import triton

    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "matrix_unit": bool(re.search(r"\b(wgmma\.mma_async|mma\.sync)", kernel.asm["ptx"])),
    }


def stand_in(architecture: int, launched: Callable[[Any, dict[str, Any]], None]) -> None:
    """Have Triton compile for a GPU that is not there, and instead of a launch pass on the kernel and its arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        """As much of Triton's driver as compiling asks for."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Driver())
    torch.cuda.is_current_stream_capturing = lambda: False
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **rest: launched(
        run(self, *args, grid=grid, warmup=True, **rest), rest
    )


def compile_all(architecture: int, chosen: Iterator[Case]) -> None:
    """Print a report of every kernel that these cases launch."""
    from fdconv.gpu import tuning

    known = set()
    case: Case = {}

    def launched(kernel: Any, arguments: dict[str, Any]) -> None:
        if kernel.hash not in known:
            known.add(kernel.hash)
            sizes = {name: arguments[name] for name in BLOCKS if name in arguments}
            print(json.dumps(report(kernel, folder) | {"case": str(case), "sizes": sizes}), flush=True)

    stand_in(architecture, launched)
    tuning.milliseconds = lambda call: call() or 1.0
    tuners = [tuned_kernel(name).tuner for name in TUNED]
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            for tuner in tuners:  # measures again, what it measured under the same key too
                tuner.cache_results = False
                tuner.cache.clear()
            rest = dict(case)
            CALLS[rest.pop("call")](**rest)


def count_asked(architecture: int) -> None:
    """Print how many candidates are measured for one call."""
    from fdconv.gpu import tuning

    asked = []
    stand_in(architecture, lambda kernel, arguments: None)
    tuning.milliseconds = lambda call: asked.append(call()) or 1.0
    scale(1, torch.uint8)
    print(json.dumps(len(asked)))


# In the tests --------------------------------------------------------------------------------------------------------


def child(architecture: int, cache: Path, *flags: str) -> list[Any]:
    """What this file prints when it is run as a program."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: it comes with PyTorch for CUDA, on Linux")
    for tool in ("ptxas", "cuobjdump"):
        if not (Path(triton.__file__).parent / "backends/nvidia/bin" / tool).exists():
            pytest.skip(f"this Triton comes without {tool}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(architecture), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: list[dict[str, Any]]) -> None:
    """What holds for every kernel, in whatever variant."""
    assert {one["kernel"] for one in kernels} == {f"{name}_kernel" for name in KERNELS}
    for one in kernels:
        assert one["spilled"] <= SPILL, one
        assert one["shared"] <= SHARED, one
        floats = "float32" in one["case"] or "_conv" not in one["kernel"]
        assert one["matrix_unit"] != floats, f"float32 is exact, the others are for the matrix unit: {one}"


@pytest.fixture(
    scope="module",
    params=[ARCHITECTURES[-1], *(pytest.param(one, marks=pytest.mark.long) for one in ARCHITECTURES[:-1])],
)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return child(request.param, tmp_path_factory.mktemp("triton"))


def test_kernels_compile_and_fit(kernels: list[dict[str, Any]]) -> None:
    check(kernels)


def test_every_candidate_is_compiled(kernels: list[dict[str, Any]]) -> None:

    for name in TUNED:
        variants: dict[str, set[str]] = {}
        for one in kernels:
            if one["kernel"] == f"{name}_kernel":
                variants.setdefault(one["case"], set()).add(str([one[key] for key in ("sizes", "warps", "stages")]))
        candidates = tuned_kernel(name).candidates
        assert max(map(len, variants.values())) == len(candidates), (name, variants)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_variants_compile_and_fit(architecture: int, tmp_path: Path) -> None:
    check(child(architecture, tmp_path, "--all"))


def test_choices_are_kept_on_disk(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    if "cache_results" not in inspect.signature(triton.autotune).parameters:
        pytest.skip("this Triton keeps them in memory only")
    assert [child(80, tmp_path, "--asked"), child(80, tmp_path, "--asked")] == [[4], [0]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--asked", action="store_true")
    options = parser.parse_args()
    if options.asked:
        count_asked(options.architecture)
    else:
        compile_all(options.architecture, all_cases() if options.all else cases())

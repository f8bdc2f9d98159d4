"""Checks every kernel against its twin on the GPU at hand, then times layers, bands and models there.

    python -m benchmarks.gpu [--peer FDConv.py]

Nothing is timed unless all checks pass. Writes `benchmarks/results/*-cuda.json` and `.md`, with the GPU's name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch

CHECKS = [
    "tests/fdconv/gpu/test_gpu_kernels.py",
    "tests/fdconv/test_backends.py",
    "tests/fdconv/test_bands.py",
    "tests/fdconv/test_golden.py",
    "tests/fdsurgery/test_inference.py",
    "tests/fdconv/gpu/test_autotune.py",
]
BENCHES = [
    ["benchmarks.model", "--dtype", "bfloat16", "--compiled"],
    ["benchmarks.bands"],
    ["benchmarks.layer", "--dtype", "bfloat16", "--compiled"],
]


def main() -> None:
    """Check, then time; the first step that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="FDConv.py of a checkout of the public code, timed beside ours")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "torch sees no CUDA device here. On a CPU the same tests run the kernels in Triton's interpreter: pytest"
        )
    for module, *flags in (["pytest", "-q", *CHECKS], *BENCHES):
        peer = ["--peer", options.peer] if options.peer and module == "benchmarks.model" else []
        place = [] if module == "pytest" else ["--device", "cuda"]
        subprocess.run([sys.executable, "-m", module, *flags, *place, *peer], check=True)


if __name__ == "__main__":
    main()

"""Converts a large synthetic checkpoint on disk: peak memory and speed, against a plain copy of the same files.

    python -m benchmarks.checkpoint [--gigabytes 8] [--folder DIR] [--output STEM]

The checkpoint is of a ViT of width 2048 in shards of five blocks; the recipe swaps both linears of every FFN, two
thirds of all numbers. A small one, of one shard, is converted too: what the large one takes more in memory is what its
size costs. Writes `benchmarks/results/checkpoint.json` and `.md`, or others of that stem, and deletes the checkpoints.
Runs on Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

STEM = Path(__file__).parent / "results" / "checkpoint"
WIDTH = 2048
BLOCKS_A_SHARD = 5
BLOCK_BYTES = 12 * WIDTH * WIDTH * 4


@dataclass(frozen=True)
class Row:
    """What was measured of one checkpoint."""

    shards: int
    gigabytes: float
    """Of the plain checkpoint."""
    written_gigabytes: float
    planned_megabytes: float
    """Peak resident memory of the process up to the plan, mostly its imports."""
    peak_megabytes: float
    """Peak resident memory of the whole run."""
    plan_seconds: float
    seconds: float
    """To convert, with fsync, without the plan."""
    copy_seconds: float
    """To copy the plain files, with fsync."""

    @property
    def megabytes_a_second(self) -> float:
        """Bytes written over the time it took."""
        return self.written_gigabytes * 1e3 / self.seconds


def write_checkpoint(folder: Path, blocks: int) -> str:
    """A sharded random checkpoint, and the SPEC of its model."""
    config = transformers.ViTConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=blocks, num_attention_heads=16
    )
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.ViTForImageClassification(config).state_dict()
    count = max(1, -(-blocks // BLOCKS_A_SHARD))
    parts: list[list[str]] = [[] for _ in range(count)]
    for name in shapes:
        block = next((int(piece) for piece in name.split(".") if piece.isdecimal()), 0)
        parts[block // BLOCKS_A_SHARD].append(name)
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        save_file({name: 0.02 * torch.randn(shapes[name].shape) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return f"hf:{folder}"


def measured_run(source: Path, destination: Path, spec: str) -> dict[str, float]:
    """Convert in this process, which should have done nothing before."""
    from fdsurgery.checkpoints import carry_out, plan_checkpoint

    torch.set_num_threads(1)
    start = time.perf_counter()
    plan = plan_checkpoint(source, destination, model=spec)
    planned = time.perf_counter()
    before = peak_megabytes()
    carry_out(plan)
    return {
        "written_gigabytes": plan.nbytes / 1e9,
        "plan_seconds": planned - start,
        "seconds": time.perf_counter() - planned,
        "planned_megabytes": before,
        "peak_megabytes": peak_megabytes(),
    }


def peak_megabytes() -> float:
    """Peak resident memory of this program; getrusage would count that of the process which started it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024 / 1e6


def copy_seconds(source: Path, destination: Path) -> float:
    """The time of a plain copy that is on the disk when it ends."""
    start = time.perf_counter()
    destination.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, destination / file.name)
        with (destination / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - start


def measure(folder: Path, blocks: int) -> Row:
    """Write a checkpoint, copy it, convert it, and remove all three."""
    source = folder / "plain"
    spec = write_checkpoint(source, blocks)
    files = list(source.glob("*.safetensors"))
    copied = copy_seconds(source, folder / "copy")
    shutil.rmtree(folder / "copy")
    arguments = [str(source), str(folder / "converted"), spec]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.checkpoint", "--run", *arguments], check=True, capture_output=True, text=True
    )
    row = Row(
        len(files),
        sum(file.stat().st_size for file in files) / 1e9,
        copy_seconds=copied,
        **json.loads(run.stdout.splitlines()[-1]),
    )
    shutil.rmtree(source)
    shutil.rmtree(folder / "converted")
    return row


def table(rows: list[Row]) -> str:
    """The figures as Markdown."""
    lines = [
        "| plain checkpoint | written | peak memory | of it before | plan | convert | MB/s written | plain copy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.gigabytes:.2f} GB in {row.shards} file(s) | {row.written_gigabytes:.2f} GB "
            f"| {row.peak_megabytes:.0f} MB | {row.planned_megabytes:.0f} MB | {row.plan_seconds:.1f} s "
            f"| {row.seconds:.1f} s | {row.megabytes_a_second:.0f} "
            f"| {row.copy_seconds:.1f} s, {row.gigabytes * 1e3 / row.copy_seconds:.0f} MB/s |"
        )
    largest = 4 * WIDTH * WIDTH * 4 / 1e6
    return "\n".join(lines) + f"\n\nThe largest tensor is of {largest:.0f} MB. One thread, float32.\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8, help="size of the large checkpoint")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; the temporary folder by default")
    parser.add_argument("--output", type=Path, default=STEM, metavar="STEM", help="files to write, without the ending")
    parser.add_argument("--run", nargs=3, metavar=("IN", "OUT", "SPEC"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        source, destination, spec = options.run
        print(json.dumps(measured_run(Path(source), Path(destination), spec)))
        return
    rows = []
    for blocks in (2, round(options.gigabytes * 1e9 / BLOCK_BYTES)):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            needed = 2.4 * blocks * BLOCK_BYTES
            if shutil.disk_usage(folder).free < needed:
                sys.exit(f"{needed / 1e9:.0f} GB of disk are needed at {folder}; ask for fewer --gigabytes")
            rows.append(measure(Path(folder), blocks))
    text = table(rows)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    content = {**machine, "rows": [asdict(row) for row in rows]}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()

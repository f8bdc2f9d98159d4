"""What is trained: rows, nets, and how much of it on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fdsurgery.operators import get_operator

ONLY_SPECTRA: dict[str, Any] = {"kernel_num": 1, "ksm_global": False, "ksm_local": False, "fbm_kernel_sizes": ()}
MEASURES = ("known", "unseen", "known_boundary", "unseen_boundary")


@dataclass(frozen=True)
class Row:
    """What becomes of the warmed-up net."""

    name: str
    settings: dict[str, Any] | None = None
    """Of the operator, over the recipe's; None for a net that stays plain."""
    operator: str = "fdconv"
    steps: str = "equal"
    """`equal`, `none`, or `time`: as many as take the time of `converted`."""
    adapter: bool = False
    """A plain net with as many parameters as `converted`, by an adapter on its last map that starts at zero."""


STATIC, TIMED, CONVERTED = "static", "static at equal time", "converted"
ROWS = (
    Row("head warmed up alone", steps="none"),
    Row(STATIC),
    Row("static, as many parameters (adapter)", adapter=True),
    Row(CONVERTED, {}),
    Row("converted, paper's parametrisation", {"spectrum": "paper", "norm": "batch"}),
    Row("no modulation (spectra only)", ONLY_SPECTRA),
    Row("KSM only", {"fbm_kernel_sizes": ()}),
    Row("bands only", {"kernel_num": 1, "ksm_global": False, "ksm_local": False}),
    Row("kernel_num 4", {"kernel_num": 4}),
    Row("kernel_num 16", {"kernel_num": 16}),
    Row(TIMED, steps="time"),
    Row("CondConv 8x", {}, "condconv"),
    Row("DY-Conv 4x", {}, "dyconv"),
    Row("DCD", {}, "dcd"),
    Row("ODConv 1x", {"kernels": 1}, "odconv"),
    Row("ODConv 4x", {"kernels": 4}, "odconv"),
    Row("KW 1x", {"ratio": 1}, "kernel_warehouse"),
    Row("FADC", {}, "fadc"),
)


def unknown_settings(row: Row) -> list[str]:
    """Settings of a row that the installed operator does not have."""
    return sorted(set(row.settings or ()) - get_operator(row.operator).settings({}).keys())


@dataclass(frozen=True)
class Net:
    """A pretrained net and its own share of the budget."""

    name: str
    family: str
    """`lite` or `resnet`."""
    steps: int
    without: tuple[str, ...]
    """Rows that it does not have."""
    variant: str = "lite0"
    """Which EfficientNet-Lite."""
    width: int = 64
    """Channels of a ResNet's first stage."""


@dataclass(frozen=True)
class Grid:
    """What is trained, and on how much."""

    nets: tuple[Net, ...]
    seeds: int
    size: int = 128
    """Side of a scene in pixels."""
    train: int = 900
    """Scenes to train on."""
    test: int = 144
    """Scenes to test on, of the known styles and of the unseen one each."""
    batch: int = 12
    warm_up: int = 80
    """Steps of the head alone."""
    pretraining: int = 1000
    """Steps of the ResNet on glyphs."""
    head: int = 64
    """Channels of the pyramid."""
    lr: float = 2e-3
    """The plain Lite0 net is as good with it as with 3e-3, and 2.4 points of mIoU better than with 1e-3 (one seed)."""
    downloads: bool = True
    """Real weights and art; else drawn ones."""


# EfficientNet-Lite's dynamic layers are 1x1, whose input has no bands to modulate, and no taps to move apart.
# Its widths have few common divisors, so that a warehouse of them has thousands of tiny cells.
NO_BANDS = ("KSM only", "bands only", "FADC", "KW 1x")
ON_RESNET = ("converted, paper's parametrisation", "no modulation (spectra only)", "kernel_num 4", "kernel_num 16")
GRIDS = {
    "cpu": Grid(
        nets=(
            Net("EfficientNet-Lite0", "lite", 150, NO_BANDS),
            Net("ResNet-18 of half width", "resnet", 120, ON_RESNET, width=32),
        ),
        seeds=3,
    ),
    "cuda": Grid(
        nets=(
            Net("EfficientNet-Lite2", "lite", 3000, NO_BANDS, variant="lite2"),
            Net("ResNet-18", "resnet", 3000, ON_RESNET),
        ),
        seeds=5,
        size=256,
        train=3000,
        test=500,
        batch=12,
        warm_up=300,
        pretraining=6000,
        lr=1e-3,  # for twenty times the steps; not tried yet
    ),
    "quick": Grid(
        nets=(Net("EfficientNet-Lite0", "lite", 2, NO_BANDS), Net("ResNet-18", "resnet", 2, ON_RESNET, width=32)),
        seeds=1,
        size=64,
        train=8,
        test=4,
        batch=2,
        warm_up=1,
        pretraining=2,
        head=16,
        downloads=False,
    ),
}

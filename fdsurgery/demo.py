"""The main job on data at hand: train a small net to find handwriting on photographs, convert it, fine-tune both.

Handwritten digits of scikit-learn are laid over photographs of scikit-image and scikit-learn, so it is known exactly
which pixels are ink. Scenes to test on have other digits on other parts of the photographs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import SurgeryError
from .inspect import band_maps
from .planning import plan
from .surgery import apply

BACKBONE = "test_resnet"
CLASSES = 2
"""Photograph and ink."""
PRETRAINING_STEPS = 200
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
PHOTOGRAPHS = ("astronaut", "chelsea", "china", "coffee", "flower", "motorcycle", "rocket")
TEST_SCENES = 48
TRAIN_SIDE, TEST_SIDE = 64, 96
CELL = 32
"""Pixels of a side of the squares that hold a digit at most."""
SCENES_DRAWN = 3
BANDS_DRAWN = ("above 1/4", "1/8 to 1/4", "1/16 to 1/8")
"""Cycles a pixel, of the paper's bands."""
COLOURS = {"found": (0.1, 0.45, 0.75), "missed": (0.85, 0.15, 0.15), "no ink": (0.95, 0.6, 0.1)}
"""Of the ink in masks."""


class Segmenter(nn.Module):
    """A backbone of timm with a pyramid of its features: `(B, 3, H, W)` to logits `(B, classes, H, W)`."""

    def __init__(self, width: int = 32) -> None:
        import timm

        super().__init__()
        self.backbone = timm.create_model(BACKBONE, features_only=True)
        self.lateral = nn.ModuleList(
            nn.Conv2d(channels, width, 1) for channels in self.backbone.feature_info.channels()
        )
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        finest, *coarser = [layer(features) for layer, features in zip(self.lateral, self.backbone(x), strict=True)]
        for features in coarser:
            finest = finest + _resized(features, finest.shape[-2:])
        return _resized(self.head(F.relu(self.mix(finest))), x.shape[-2:])


@dataclass(frozen=True)
class Material:
    """What scenes are made of."""

    photographs: Sequence[Tensor]
    """`(3, H, W)` each, from 0 to 1."""
    digits: Tensor
    """`(N, 8, 8)`, from 0 to 1."""


@dataclass(frozen=True)
class Scenes:
    """Photographs with handwriting on them."""

    images: Tensor
    """`(B, 3, S, S)`, from 0 to 1."""
    masks: Tensor
    """`(B, S, S)`: 1 on ink, else 0."""


@dataclass
class Run:
    """One model's training."""

    name: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    """Training loss of each step."""
    scores: dict[int, float] = field(default_factory=dict)
    """IoU of ink on the scenes to test on, by the number of steps before."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operations this small gain little from a second thread, and wait long for one where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run(output: Path, *, steps: int, seed: int, console: Console) -> dict[str, dict[int, float]]:
    """Run the demo and write its picture.

    Args:
        output: folder for `scenes.png`; made if it does not exist.
        steps: steps of fine-tuning for either model.
        seed: seed of the scenes, the weights and which digits are tested on.
        console: where progress and results go.

    Returns:
        IoU of ink, from 0 to 1, on the scenes to test on, of the `static` and the `converted` model by step.

    Raises:
        SurgeryError: a package that the demo needs is missing, or the folder cannot be made.
    """
    try:
        import matplotlib  # noqa: F401  here only to fail before minutes of training, not after
        import skimage  # noqa: F401
        import sklearn  # noqa: F401
        import timm  # noqa: F401
    except ImportError as missing:
        raise SurgeryError(f"the demo needs {missing.name}; pip install 'fdsurgery[demo]'") from None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise SurgeryError(f"{output} cannot be made: {fault.strerror}") from None
    material, tested = load_material(seed)
    scenes = draw_scenes(tested, TEST_SCENES, TEST_SIDE, np.random.default_rng(seed))
    torch.manual_seed(seed)
    model = Segmenter()
    console.print(
        f"timm {BACKBONE} with a pyramid, {_parameters(model):,} parameters, finds handwriting on photographs: "
        f"{', '.join(PHOTOGRAPHS)}"
    )
    train(Run("training", model), material, scenes, PRETRAINING_STEPS, seed, console)

    static, converted = Run("static", copy.deepcopy(model)), Run("converted", model)
    made = plan(model, example_inputs=scenes.images[:2])
    apply(made, model)
    console.print(made.summary())
    before, after = (predict(one.model, scenes.images) for one in (static, converted))
    same = float((before.argmax(1) == after.argmax(1)).float().mean())
    error = float((after - before).norm() / before.norm())
    console.print(f"after conversion: {same:.3%} of the pixels named the same, logits differ by {error:.1e} relative")
    for one in (static, converted):
        train(one, material, scenes, steps, seed + 1, console)

    table = Table(box=None, header_style="bold")
    for column in ("model", "parameters", "loss", "IoU of ink before", "IoU of ink after"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for one in (static, converted):
        loss, scores = np.mean(one.losses[-max(1, steps // 10) :]), list(one.scores.values())
        shown = (f"{_parameters(one.model):,}", f"{loss:.4f}", f"{scores[0]:.1%}", f"{scores[-1]:.1%}")
        table.add_row(one.name, *shown)
    console.print(table)
    picture = output / "scenes.png"
    draw(static, converted, scenes, picture)
    console.print(f"picture: {picture}", markup=False, highlight=False, soft_wrap=True)
    return {one.name: one.scores for one in (static, converted)}


def load_material(seed: int) -> tuple[Material, Material]:
    """What to train on, and what to test on: the right third of each photograph, and a quarter of the digits."""
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images).float() / 16
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(digits)))
    tested, trained = order[: len(order) // 4], order[len(order) // 4 :]
    photographs = [_photograph(name).tensor_split((-TEST_SIDE,), dim=2) for name in PHOTOGRAPHS]
    left, right = zip(*photographs, strict=True)
    return Material(left, digits[trained]), Material(right, digits[tested])


def draw_scenes(material: Material, count: int, side: int, random: np.random.Generator) -> Scenes:
    """Scenes of `side x side` pixels, the photographs in turn, each with a digit for every 32x32 pixels or so."""
    pairs = [
        _scene(material, material.photographs[int(random.integers(len(material.photographs)))], side, random)
        for index in range(count)
    ]
    return Scenes(torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs]))


def train(one: Run, material: Material, scenes: Scenes, steps: int, seed: int, console: Console) -> None:
    """Train a model with AdamW at a rate that falls to zero; runs with the same seed see the same scenes."""
    optimizer = torch.optim.AdamW(one.model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    random = np.random.default_rng(seed)
    one.scores[0] = ink_iou(one.model, scenes)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(one.name, total=steps)
        for step in range(1, steps + 1):
            batch = draw_scenes(material, BATCH_SIZE, TRAIN_SIDE, random)
            one.model.train()
            loss = F.cross_entropy(one.model(batch.images), batch.masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            one.losses.append(loss.item())
            if step == steps or step % max(1, steps // 5) == 0:
                one.scores[step] = ink_iou(one.model, scenes)
            progress.update(task, advance=1, description=f"{one.name}, IoU of ink {list(one.scores.values())[-1]:.1%}")


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in eval mode, `(B, classes, S, S)`."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(BATCH_SIZE)])


def ink_iou(model: nn.Module, scenes: Scenes) -> float:
    """Intersection over union of the pixels named ink and those that are, over all scenes."""
    named, ink = predict(model, scenes.images).argmax(1) == 1, scenes.masks == 1
    return float((named & ink).sum() / (named | ink).sum().clamp(min=1))


def draw(static: Run, converted: Run, scenes: Scenes, path: Path) -> None:
    """Scenes with both models' masks and the converted one's band maps, and the curves of both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(13, 9.2), layout="constrained")
    FigureCanvasAgg(figure)
    pictures, curves = figure.subfigures(2, 1, height_ratios=(2.1, 1))
    _draw_scenes(pictures, static, converted, scenes)
    loss_axes, score_axes = curves.subplots(1, 2)
    for one, color in ((static, "tab:gray"), (converted, "tab:blue")):
        parts = np.array_split(one.losses, min(20, len(one.losses)))
        ends = np.cumsum([len(part) for part in parts])
        loss_axes.plot(ends, [part.mean() for part in parts], "o-", color=color, label=one.name)
        score_axes.plot(
            [*one.scores], [100 * score for score in one.scores.values()], "o-", color=color, label=one.name
        )
    loss_axes.set(title="training loss", xlabel="step of fine-tuning")
    score_axes.set(title=f"IoU of ink on {TEST_SCENES} scenes, %", xlabel="step of fine-tuning")
    for axes in (loss_axes, score_axes):
        axes.legend()
    figure.savefig(path, dpi=100)


def _draw_scenes(figure: Any, static: Run, converted: Run, scenes: Scenes) -> None:
    """A row for each of the first scenes."""
    images, ink = scenes.images[:SCENES_DRAWN], scenes.masks[:SCENES_DRAWN] == 1
    named = [predict(one.model, images).argmax(1) == 1 for one in (static, converted)]
    layer, maps = next(iter(band_maps(converted.model, images).items()))
    titles = ("input", "truth", "static", "converted", *(f"bands {band}" for band in BANDS_DRAWN))
    figure.suptitle(
        f"masks of the fine-tuned models; at the right the band maps of {layer}, in cycles a pixel of its input"
    )
    grid = figure.subplots(SCENES_DRAWN, len(titles))
    reach = max(float((maps[:, 0] - 1).abs().max()), 1e-3)
    for row, axes in enumerate(grid):
        overlays = (_overlay(images[row], ink[row], of[row]) for of in (ink, *named))
        shown = [images[row].movedim(0, -1), *overlays]
        for one, picture in zip(axes, shown, strict=False):
            one.imshow(picture.clamp(0, 1))
        for one, values in zip(axes[len(shown) :], maps[row, 0], strict=True):
            last = one.imshow(values, vmin=1 - reach, vmax=1 + reach, cmap="coolwarm")
        for one, title in zip(axes, titles, strict=True):
            one.set(xticks=[], yticks=[])
            if row == 0:
                one.set_title(title)
    figure.colorbar(last, ax=grid[:, -1], label="factor of the band, 1 is neutral")
    for name, colour in COLOURS.items():
        grid[-1, 0].plot([], [], "s", color=colour, label=name)
    figure.legend(loc="outside lower left", ncols=len(COLOURS))


def _overlay(image: Tensor, ink: Tensor, named: Tensor) -> Tensor:
    """What was found, missed and found where nothing is, in colours over the pale grey picture, `(S, S, 3)`."""
    found, missed, wrong = torch.tensor([*COLOURS.values()], dtype=torch.float32, device="cpu")
    picture = (0.5 + 0.4 * image.mean(0))[..., None].repeat(1, 1, 3)
    for where, colour in ((ink & named, found), (ink & ~named, missed), (named & ~ink, wrong)):
        picture[where] = colour
    return picture


def _scene(material: Material, photograph: Tensor, side: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A square of a photograph, and in about half of its cells a digit of any colour."""
    top, left = (int(random.integers(0, size - side + 1)) for size in photograph.shape[1:])
    image = photograph[:, top : top + side, left : left + side].clone()
    image = image.flip(2) if random.random() < 0.5 else image
    mask = torch.zeros(side, side, dtype=torch.int64, device="cpu")
    for row, column in np.ndindex(side // CELL, side // CELL):
        if random.random() < 0.5:
            continue
        which, size = int(random.integers(len(material.digits))), int(random.integers(18, CELL - 1))
        y, x = (CELL * cell + int(random.integers(0, CELL - size + 1)) for cell in (row, column))
        ink = F.interpolate(material.digits[None, None, which], size=(size, size), mode="bicubic")[0]
        cover = (2 * ink).clamp(0, 1)
        colour = torch.from_numpy(random.random((3, 1, 1), dtype=np.float32))
        part = image[:, y : y + size, x : x + size]
        part += cover * (colour - part)
        mask[y : y + size, x : x + size][cover[0] > 0.5] = 1
    return image, mask


def _photograph(name: str) -> Tensor:
    """A photograph that comes with scikit-image or scikit-learn, three test scenes on its shorter side: `(3, H, W)`."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    if name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
    else:
        pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    image = torch.from_numpy(np.array(np.atleast_3d(pixels))).movedim(-1, 0).expand(3, -1, -1).float() / 255
    size = [3 * TEST_SIDE * length // min(image.shape[1:]) for length in image.shape[1:]]
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear")


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

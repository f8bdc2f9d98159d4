"""One training: a small net, plain or converted, on one task, with a budget that is the same for all."""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fdsurgery

from .data import TASKS, Data


@dataclass(frozen=True)
class Budget:
    """What every training is given."""

    train: int = 1000
    """Images to train on."""
    test: int = 500
    """Images to test on."""
    batch: int = 32
    """Images of a step, in dense tasks a third as many."""
    before: int = 250
    """Steps of the plain net before it is converted, or goes on as it is."""
    after: int = 150
    """Steps after that."""
    width: int = 16
    """Channels of the first stage; the second and third have two and three times as many."""
    lr: float = 2e-3


@dataclass(frozen=True)
class Variant:
    """What a net becomes after its first steps."""

    name: str
    settings: dict[str, Any] | None = None
    """Operator settings; None for a net that stays plain."""
    widened: bool = False
    """A plain net with as many parameters as the converted one, by more channels from the start."""
    trained: str = "all"
    """What trains after the conversion, for `fdsurgery.freeze`."""


ONLY_SPECTRA: dict[str, Any] = {"kernel_num": 1, "ksm_global": False, "ksm_local": False, "fbm_kernel_sizes": ()}
"""Nothing is dynamic then: what is left is that a plain weight is trained by its spectrum."""

VARIANTS = (
    Variant("static"),
    Variant("static, wider", widened=True),
    Variant("static in spectral coordinates", ONLY_SPECTRA),
    Variant("FDConv", {}),
    Variant("FDConv, paper's parametrisation", {"spectrum": "paper", "norm": "batch"}),
    Variant("n = 1", {"kernel_num": 1}),
    Variant("n = 4", {"kernel_num": 4}),
    Variant("n = 16", {"kernel_num": 16}),
    Variant("n = 128", {"kernel_num": 128}),
    Variant("n = 256", {"kernel_num": 256}),
    Variant("without KSM local", {"ksm_local": False}),
    Variant("without KSM global", {"ksm_global": False}),
    Variant("without FBM", {"fbm_kernel_sizes": ()}),
    Variant("interpolated masks", {"band_mask": "interpolated"}),
    Variant("learned band edges", {"band_edges": "learned"}),
    Variant("modulation alone trains", {}, trained="modulation"),
)


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class Net(nn.Module):
    """Three stages, each of half the resolution, and a head for images or for pixels.

    `(B, 1, S, S)` to logits `(B, classes)`, or `(B, classes, S, S)` where `dense`.
    """

    def __init__(self, width: int, classes: int, dense: bool) -> None:
        super().__init__()
        widths = (width, 2 * width, 3 * width)
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.downs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in itertools.pairwise(widths)
        )
        self.blocks = nn.ModuleList(Block(channels) for channels in widths)
        self.dense = dense
        if dense:
            self.laterals = nn.ModuleList(nn.Conv2d(channels, 2 * width, 1) for channels in widths)
            self.head = nn.Conv2d(2 * width, classes, 1)
        else:
            self.head = nn.Linear(widths[-1], classes)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](self.stem(x))
        stages = [x]
        for down, block in zip(self.downs, list(self.blocks)[1:], strict=True):
            x = block(down(x))
            stages.append(x)
        if not self.dense:
            return self.head(x.mean((2, 3)))
        size = stages[0].shape[-2:]
        merged = torch.zeros(())
        for lateral, stage in zip(self.laterals, stages, strict=True):
            merged = merged + F.interpolate(lateral(stage), size, mode="bilinear", align_corners=False)
        return self.head(F.relu(merged))


@dataclass
class Outcome:
    """What came of a training."""

    model: nn.Module = field(repr=False)
    before: float
    """The measure after the first steps, in percent."""
    after: float
    """At the end."""
    parameters: int
    seconds: float
    """Of the steps after the conversion."""


def run(task: str, variant: Variant, seed: int, budget: Budget, device: torch.device) -> Outcome:
    """Train the plain net, convert it or not, and train it on with a fresh schedule.

    Everything is drawn from the seed: what a row says can be had again.
    """
    data = task_data(task, seed, budget).to(device)
    static = Net(budget.width, data.classes, data.dense)
    width = budget.width
    if variant.widened:
        wanted = count(converted(static, data, {}))
        width = next(w for w in range(width, 4 * width) if count(Net(w, data.classes, data.dense)) >= wanted)
    model, before = pretrained(task, seed, budget, width, device)
    if variant.settings is not None:
        torch.manual_seed(seed)  # the first map of the attention is drawn
        model = converted(model, data, variant.settings)
        fdsurgery.freeze(model, variant.trained)
    start = time.perf_counter()
    train(model, data, seed + 1000, budget.after, budget)
    seconds = time.perf_counter() - start
    return Outcome(model, before, measure(model, data), count(model), seconds)


@lru_cache(maxsize=8)
def task_data(task: str, seed: int, budget: Budget) -> Data:
    """The task's images and labels."""
    return TASKS[task](seed, budget.train, budget.test)


_pretrained: dict[tuple[Any, ...], tuple[nn.Module, float]] = {}


def pretrained(task: str, seed: int, budget: Budget, width: int, device: torch.device) -> tuple[nn.Module, float]:
    """The plain net after its first steps, a copy of its own, and what it reaches; variants of one seed share it."""
    key = (task, seed, budget, width, device)
    if key not in _pretrained:
        data = task_data(task, seed, budget).to(device)
        torch.manual_seed(seed)
        model = Net(width, data.classes, data.dense).to(device)
        train(model, data, seed, budget.before, budget)
        if len(_pretrained) > 1:  # those of another seed; a seed has one net and a wider one
            _pretrained.clear()
        _pretrained[key] = (model, measure(model, data))
    model, reached = _pretrained[key]
    return copy.deepcopy(model), reached


def converted(model: nn.Module, data: Data, settings: dict[str, Any]) -> nn.Module:
    """A converted copy: all convolutions but the stem and the head."""
    return fdsurgery.convert(copy.deepcopy(model), "generic", example_inputs=data.train_images[:2], **settings)


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def train(model: nn.Module, data: Data, seed: int, steps: int, budget: Budget) -> None:
    """AdamW, warmed up over a tenth of the steps and then lowered along a cosine."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(fdsurgery.param_groups(model, lr=budget.lr, weight_decay=0.05))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.1
    )
    model.train()
    batch = budget.batch // 3 if data.dense else budget.batch
    for _ in range(steps):
        chosen = torch.randint(len(data.train_images), (batch,), generator=random)
        images, labels = data.train_images[chosen], data.train_labels[chosen]
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(model: nn.Module, data: Data) -> float:
    """Percent: accuracy, or in dense tasks the mean over classes of intersection over union."""
    model.eval()
    named = torch.cat([model(images).argmax(1) for images in data.test_images.split(64)])
    if not data.dense:
        return 100 * float((named == data.test_labels).float().mean())
    pairs = torch.bincount((data.test_labels * data.classes + named).flatten(), minlength=data.classes**2)
    table = pairs.view(data.classes, data.classes).double()
    both = table.diagonal()
    return 100 * float((both / (table.sum(0) + table.sum(1) - both).clamp_min(1)).mean())

"""One training: the warmed-up net, converted or not, in a plain loop that knows nothing of the conversion."""

from __future__ import annotations

import copy
import json
import statistics
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv import FDConv2d
from fdconv.reference import local_gate
from fdsurgery.inspect import band_maps

from ..lines import read
from ..timing import environment
from .art import KNOWN, UNSEEN, Material, material, synthetic
from .grids import CONVERTED, ROWS, STATIC, Grid, Net, Row
from .nets import Segmenter, adapted, converted, count, lite, resnet, resnet_weights
from .scenes import as_input, scenes


@dataclass(frozen=True)
class Scenes:
    """What the frozen stages give for the scenes of one seed, and the labels."""

    quarter: Tensor
    eighth: Tensor
    labels: Tensor

    def batch(self, chosen: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Some of them on a device, labels as integers."""
        parts = (self.quarter[chosen], self.eighth[chosen], self.labels[chosen].long())
        return tuple(part.to(device) for part in parts)  # type: ignore[return-value]


@dataclass(frozen=True)
class Start:
    """What all rows of a net and seed share."""

    stages: list[nn.Module]
    classes: int
    train: Scenes
    tests: dict[str, Scenes]
    looked_at: Tensor
    """Images whose gates are read."""


def material_of(grid: Grid, cache: Path) -> Material:
    """Glyphs and photographs of a grid."""
    return material(cache) if grid.downloads else synthetic()


def pretrained_stages(grid: Grid, net: Net, cache: Path, device: torch.device) -> list[nn.Module]:
    """The stages of a net with the weights that it starts from."""
    if net.family == "lite":
        return lite(net.variant, cache if grid.downloads else None)
    file = cache / f"resnet18-{net.width}-{grid.size}-{grid.pretraining}.pt" if grid.downloads else None
    made = resnet_weights(net.width, material_of(grid, cache), grid.pretraining, grid.size // 2, file, device)
    return resnet(net.width, made)


@lru_cache(maxsize=1)
def start(grid: Grid, net: Net, seed: int, cache: Path, device: torch.device) -> Start:
    """Scenes of a seed, and what the frozen stages see in them."""
    own = material_of(grid, cache)
    stages = pretrained_stages(grid, net, cache, device)
    frozen = Segmenter(copy.deepcopy(stages), 8, own.classes).to(device).eval()

    def seen(images: Tensor, labels: Tensor) -> Scenes:
        with torch.no_grad():
            maps = [frozen.early(as_input(part.to(device))) for part in images.split(64)]
        # Half the memory on a GPU, whose grid has larger scenes and more of them; the loop computes in float32.
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        quarter, eighth = (torch.cat([pair[index].to(dtype) for pair in maps]) for index in (0, 1))
        return Scenes(quarter, eighth, labels.to(device))

    train = seen(*scenes(own, grid.train, grid.size, KNOWN, test=False, seed=seed))
    styles = {"known": KNOWN, "unseen": UNSEEN}
    drawn = {name: scenes(own, grid.test, grid.size, style, test=True, seed=seed) for name, style in styles.items()}
    tests = {name: seen(*both) for name, both in drawn.items()}
    return Start(stages, own.classes, train, tests, as_input(drawn["known"][0][:8]).to(device))


@lru_cache(maxsize=1)
def warmed_up(grid: Grid, net: Net, seed: int, cache: Path, device: torch.device) -> Segmenter:
    """The net whose head has been trained alone; rows take a copy."""
    begin = start(grid, net, seed, cache, device)
    torch.manual_seed(seed)
    model = Segmenter(copy.deepcopy(begin.stages), grid.head, begin.classes).to(device)
    model.stages.requires_grad_(False)
    model.train()
    model.stages.eval()
    train(model, begin.train, grid.warm_up, seed, grid)
    model.stages[2:].requires_grad_(True)
    return model


def run(grid: Grid, net: Net, row: Row, seed: int, steps: int, cache: Path, device: torch.device) -> dict[str, Any]:
    """Train one row of one seed; everything is drawn from the seed."""
    begin = start(grid, net, seed, cache, device)
    model = copy.deepcopy(warmed_up(grid, net, seed, cache, device))
    torch.manual_seed(seed)  # the first maps of attention and adapter are drawn
    if row.adapter:
        model = adapted(model, net.family)
    if row.settings is not None:
        model = converted(model, net.family, row.settings, row.operator)
    model.train()
    seconds = train(model, begin.train, steps, seed + 1000, grid)
    return {
        "parameters": count(model),
        "steps": steps,
        "seconds_per_step": seconds,
        **measure(model, begin, grid),
        "gates": gates(model, begin.looked_at),
    }


def train(model: Segmenter, data: Scenes, steps: int, seed: int, grid: Grid) -> float:
    """AdamW, warmed up over a tenth of the steps and then lowered along a cosine.

    Returns:
        The median of the seconds of a step: of the processor on a CPU, where other jobs may run, of the clock on a GPU.
    """
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decays = [parameter for parameter in own if parameter.ndim > 1]
    others = [parameter for parameter in own if parameter.ndim <= 1]  # norms and biases
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=grid.lr
    )
    random, device = torch.Generator().manual_seed(seed), own[0].device
    if steps == 0:
        return 0.0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=grid.lr, total_steps=steps, pct_start=0.1)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    taken = []
    for _ in range(steps):
        begun = clock()
        quarter, eighth, labels = data.batch(torch.randint(len(data.labels), (grid.batch,), generator=random), device)
        loss = F.cross_entropy(model.late(quarter.float(), eighth.float()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - begun)
    return statistics.median(taken)


@torch.no_grad()
def measure(model: Segmenter, begin: Start, grid: Grid) -> dict[str, float]:
    """Percent, the mean over classes: intersection over union of all pixels, and of those along boundaries."""
    model.eval()
    found: dict[str, float] = {}
    reach = max(1, round(0.02 * grid.size * 2**0.5))  # 2 % of the diagonal, as boundary IoU is defined
    for name, data in begin.tests.items():
        whole = torch.zeros(2, begin.classes, dtype=torch.float64)
        boundary = torch.zeros(2, begin.classes, dtype=torch.float64)
        for part in torch.arange(len(data.labels)).split(grid.batch):
            quarter, eighth, labels = data.batch(part, data.labels.device)
            named = model.late(quarter.float(), eighth.float()).argmax(1)
            truth, guess = (F.one_hot(values, begin.classes).movedim(-1, 1).bool() for values in (labels, named))
            whole += overlap(truth, guess)
            boundary += overlap(truth & along_boundary(truth, reach), guess & along_boundary(guess, reach))
        found[name] = mean_iou(whole)
        found[f"{name}_boundary"] = mean_iou(boundary)
    return found


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Pixels of the intersection and of the union by class, `(2, classes)`, from masks `(B, classes, H, W)`."""
    return torch.stack([(one & other).sum((0, 2, 3)), (one | other).sum((0, 2, 3))]).double().cpu()


def along_boundary(masks: Tensor, reach: int) -> Tensor:
    """The pixels of masks `(B, C, H, W)` that are at most `reach` from one outside; so is the image's edge."""
    outside = F.pad((~masks).float(), (reach,) * 4, value=1.0)
    return masks & (F.max_pool2d(outside, 2 * reach + 1, stride=1) > 0)


def mean_iou(overlaps: Tensor) -> float:
    """Percent, over the classes that there are."""
    both, either = overlaps
    return 100 * float((both / either)[either > 0].mean())


@torch.no_grad()
def gates(model: Segmenter, images: Tensor) -> dict[str, float]:
    """The mean of `|gate - 1|` for each kind of gate, over layers."""
    found: dict[str, list[float]] = {}

    def look(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        factors = layer._factors(layer._context(inputs[0]))
        kinds = {kind: getattr(factors, kind) for kind in ("channel", "filter", "spatial", "kernel")}
        kinds["local"] = None if factors.taps is None else local_gate(factors, layer._weight_shape())
        for kind, gate in kinds.items():
            if gate is not None:
                found.setdefault(kind, []).append(float((gate - 1).abs().mean()))

    hooks = [layer.register_forward_pre_hook(look) for layer in model.modules() if isinstance(layer, FDConv2d)]
    try:
        maps = band_maps(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    if maps:
        found["bands"] = [float((gate - 1).abs().mean()) for gate in maps.values()]
    return {kind: statistics.mean(values) for kind, values in found.items()}


def rows_of(grid: Grid, net: Net, seed: int, names: list[str], device: str, cache: Path, file: Path) -> None:
    """Train some rows of one net and seed, and append a line for each to the file."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    place = torch.device(device)
    for row in ROWS:
        if row.name not in names:
            continue
        steps = steps_of(row, net, seed, read(file))
        if steps is None:
            continue
        begun = time.perf_counter()
        found = run(grid, net, row, seed, steps, cache, place)
        line = {"net": net.name, "row": row.name, "seed": seed, **_rounded(found)}
        line |= {"seconds": round(time.perf_counter() - begun, 1), "environment": environment(place)}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def steps_of(row: Row, net: Net, seed: int, done: list[dict[str, Any]]) -> int | None:
    """How many steps a row takes; None where that is not known, for what it is compared with is missing."""
    if row.steps != "time":
        return net.steps if row.steps == "equal" else 0
    paces = [
        line["seconds_per_step"]
        for name in (STATIC, CONVERTED)
        for line in done
        if (line["net"], line["row"], line["seed"]) == (net.name, name, seed)
    ]
    if len(paces) < 2:
        print(f"left out: {net.name}, {row.name}, seed {seed}: needs `{STATIC}` and `{CONVERTED}` of that seed first")
        return None
    return round(net.steps * paces[1] / paces[0])


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value

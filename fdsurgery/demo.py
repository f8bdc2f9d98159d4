"""The main job on data at hand: train a small model on handwritten digits, convert it, fine-tune both, compare."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fdconv import FDConv2d

from .errors import SurgeryError
from .inspect import kernel_response, radial_profile
from .planning import plan
from .surgery import apply

ARCHITECTURE = "test_resnet"
PRETRAINING_EPOCHS = 3
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
SAMPLES_DRAWN = 4  # whose kernels the picture averages; each sample has its own


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 handwritten digits, 8x8 scaled up to 32x32, a quarter of them for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Run:
    """One model's fine-tuning."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    """Mean training loss of each epoch."""
    accuracies: list[float] = field(default_factory=list)
    """Test accuracy before the first epoch and after each."""


def run(output: Path, *, epochs: int, seed: int, console: Console) -> dict[str, list[float]]:
    """Run the demo and write its picture.

    Args:
        output: folder for `digits.png`; made if it does not exist.
        epochs: epochs of fine-tuning for either model.
        seed: seed of the data split, the weights and the batches.
        console: where progress and results go.

    Returns:
        Test accuracies of the `static` and the `converted` model, before fine-tuning and after each epoch.

    Raises:
        SurgeryError: a package that the demo needs is missing, or the folder cannot be made.
    """
    try:
        import matplotlib  # noqa: F401  here only to fail before minutes of training, not after
        import timm
    except ImportError as missing:
        raise SurgeryError(f"the demo needs {missing.name}; pip install 'fdsurgery[demo]'") from None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise SurgeryError(f"{output} cannot be made: {fault.strerror}") from None
    digits = load_digits(seed)
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, in_chans=1, num_classes=10)
    console.print(
        f"timm {ARCHITECTURE}, {_parameters(model):,} parameters, on scikit-learn's digits: "
        f"{len(digits.train_labels)} to train, {len(digits.test_labels)} to test"
    )
    train([Run(model)], digits, PRETRAINING_EPOCHS, seed, console, "training")

    static, converted = Run(copy.deepcopy(model)), Run(model)
    made = plan(model, example_inputs=digits.test_images[:2])
    apply(made, model)
    console.print(made.summary())
    before, after = predict(static.model, digits.test_images), predict(converted.model, digits.test_images)
    same = int((before.argmax(1) == after.argmax(1)).sum())
    error = float((after - before).norm() / before.norm())
    console.print(
        f"after conversion: {same} of {len(before)} test predictions the same, logits differ by {error:.1e} relative"
    )

    site = next(decision.site.name for decision in reversed(made.swaps) if decision.site.kernel_size == (3, 3))
    static_layer = static.model.get_submodule(site)
    assert isinstance(static_layer, nn.Conv2d)
    kernels = [("static layer", static_layer.weight.detach().clone())]
    train([static, converted], digits, epochs, seed + 1, console, "fine-tuning")
    kernels.append(("static, fine-tuned", static_layer.weight))
    kernels.append(("converted, fine-tuned", mean_kernels(converted.model, site, digits.test_images[:SAMPLES_DRAWN])))

    table = Table(box=None, header_style="bold")
    for column in ("model", "parameters", "loss", "accuracy before", "accuracy after"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, finished in (("static", static), ("converted", converted)):
        table.add_row(
            name,
            f"{_parameters(finished.model):,}",
            f"{finished.losses[-1]:.4f}",
            f"{finished.accuracies[0]:.2%}",
            f"{finished.accuracies[-1]:.2%}",
        )
    console.print(table)
    picture = output / "digits.png"
    draw(static, converted, site, kernels, picture)
    console.print(f"picture: {picture}", markup=False, highlight=False, soft_wrap=True)
    return {"static": static.accuracies, "converted": converted.accuracies}


def load_digits(seed: int) -> Digits:
    """The digits, scaled to zero mean and unit deviation, and split by class."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    images = F.interpolate((images - images.mean()) / images.std(), size=(32, 32), mode="bilinear")
    labels = torch.from_numpy(data.target)
    split = train_test_split(
        torch.arange(len(labels), dtype=torch.int64, device="cpu"), test_size=0.25, random_state=seed, stratify=labels
    )
    train_index, test_index = (torch.as_tensor(part) for part in split)
    return Digits(images[train_index], labels[train_index], images[test_index], labels[test_index])


def train(runs: list[Run], digits: Digits, epochs: int, seed: int, console: Console, what: str) -> None:
    """Train each run alike: same batches in the same order, AdamW, cosine schedule. Fills the runs' curves."""
    batches = -(-len(digits.train_labels) // BATCH_SIZE)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for current in runs:
            name = "converted" if any(isinstance(m, FDConv2d) for m in current.model.modules()) else "static"
            task = progress.add_task(f"{what} {name}", total=epochs * batches)
            optimizer = torch.optim.AdamW(current.model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
            shuffle = torch.Generator().manual_seed(seed)
            current.accuracies.append(accuracy(current.model, digits))
            for _ in range(epochs):
                current.model.train()
                total = 0.0
                for index in torch.randperm(len(digits.train_labels), generator=shuffle).split(BATCH_SIZE):
                    loss = F.cross_entropy(current.model(digits.train_images[index]), digits.train_labels[index])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    total += loss.item() * len(index)
                    progress.advance(task)
                current.losses.append(total / len(digits.train_labels))
                current.accuracies.append(accuracy(current.model, digits))
                progress.update(task, description=f"{what} {name}, accuracy {current.accuracies[-1]:.2%}")


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in eval mode, `(B, 10)`."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(BATCH_SIZE)])


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Share of the test digits that the model names rightly."""
    return float((predict(model, digits.test_images).argmax(1) == digits.test_labels).float().mean())


@torch.no_grad()
def mean_kernels(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """The weights that a dynamic layer gives to each of some images, `(B, C_out, C_in, k_h, k_w)`."""
    layer = model.get_submodule(name)
    assert isinstance(layer, FDConv2d)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(layer.sample_weights(inputs[0])))
    try:
        predict(model, images)
    finally:
        handle.remove()
    return torch.cat(seen)


def draw(static: Run, converted: Run, site: str, kernels: list[tuple[str, Tensor]], path: Path) -> None:
    """The curves of both runs, and the frequency responses of one layer's kernels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    curves, maps = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    loss_axes, accuracy_axes, profile_axes = curves.subplots(1, 3)
    for name, finished, color in (("static", static, "tab:gray"), ("converted", converted, "tab:blue")):
        loss_axes.plot(range(1, len(finished.losses) + 1), finished.losses, "o-", color=color, label=name)
        accuracy_axes.plot([100 * value for value in finished.accuracies], "o-", color=color, label=name)
    loss_axes.set(title="training loss", xlabel="epoch of fine-tuning", yscale="log")
    accuracy_axes.set(title="test accuracy, %", xlabel="epoch of fine-tuning")
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    responses = [(name, kernel_response(weight)) for name, weight in kernels]
    for (name, response), style in zip(responses, (":", "-", "-"), strict=True):
        color = {"static, fine-tuned": "tab:gray", "converted, fine-tuned": "tab:blue"}.get(name, "black")
        profile_axes.plot(*radial_profile(response), style, color=color, label=name)
    profile_axes.set(title=f"kernels of {site}", xlabel="cycles a pixel", ylabel="mean |frequency response|")
    profile_axes.legend()
    highest = max(float(response.max()) for _, response in responses)
    map_axes = maps.subplots(1, 3)
    for axes, (name, response) in zip(map_axes, responses, strict=True):
        image = axes.imshow(response, vmin=0, vmax=highest, extent=(-0.5, 0.5, -0.5, 0.5), cmap="magma")
        axes.set(title=name, xlabel="cycles a pixel")
    maps.colorbar(image, ax=map_axes, label="mean |frequency response|")
    figure.savefig(path, dpi=110)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

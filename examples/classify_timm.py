"""Fine-tune a timm classifier with dynamic layers.

python examples/classify_timm.py  # scikit-learn's digits, from random weights
python examples/classify_timm.py --data DIR --model convnext_tiny --pretrained --image-size 224 --lr 1e-4 --epochs 30

DIR holds one folder of images per class, or `train` and `val` that do. Without these, a quarter of the images is held
out for testing.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import fdsurgery

WEIGHT_DECAY = 0.05
MAY_DIFFER_ON_RESUME = ("data", "output", "resume", "device", "workers")
console = Console(highlight=False)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        run(args)
    except (fdsurgery.SurgeryError, OSError) as error:
        fail(str(error))


def run(args: argparse.Namespace) -> None:
    known = timm.list_models() + timm.list_pretrained()
    if args.model not in known:
        close = difflib.get_close_matches(args.model, known, n=3)
        fail(f"timm has no model {args.model!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    config = timm.get_pretrained_cfg(args.model)
    device = choose_device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    train_set, test_set, classes = load_images(args.data or write_digits(args.output / "digits"), args, config)

    torch.manual_seed(args.seed)
    # timm's convolutional models take every image size; the others have to be told theirs.
    arguments = {"num_classes": len(classes), **({"img_size": args.image_size} if config.fixed_input_size else {})}
    model = timm.create_model(args.model, pretrained=args.pretrained, **arguments)
    if not args.static:
        plan = fdsurgery.plan(model, example_inputs=torch.zeros(1, 3, args.image_size, args.image_size))
        console.print(plan.summary())
        fdsurgery.apply(plan, model)
    if args.train != "all":  # a new classifier has to be trained in any case
        fdsurgery.freeze(model, [args.train, f"{model.pretrained_cfg['classifier']}.*"])
    model.to(device)

    drop_last = len(train_set) > args.batch_size  # batch norm cannot train on a last batch of one
    train_batches = DataLoader(train_set, args.batch_size, True, num_workers=args.workers, drop_last=drop_last)
    test_batches = DataLoader(test_set, args.batch_size, num_workers=args.workers)
    optimizer = torch.optim.AdamW(fdsurgery.param_groups(model, lr=args.lr, weight_decay=WEIGHT_DECAY))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train_batches))

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = load_checkpoint(args, parts) if args.resume else []
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 1000 + epoch)  # so that a resumed run draws what an uninterrupted one does
        start, total = time.perf_counter(), 0.0
        model.train()
        for images, labels in track(train_batches, f"epoch {epoch}/{args.epochs}"):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        logits, labels = predict(model, test_batches, device)
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        seconds = round(time.perf_counter() - start, 1)
        history.append({"epoch": epoch, "loss": total / len(train_batches), "accuracy": accuracy, "seconds": seconds})
        console.print("epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.2%}, {seconds} s".format(**history[-1]))
        save_checkpoint(args, parts, history)

    draw(test_set, predict(model, test_batches, device)[0], classes, args.output / "predictions.png")
    if not args.static:
        source = fdsurgery.ModelSource("timm", args.model, arguments)
        fdsurgery.save_pretrained(model.cpu(), args.output / "model", source=source, plan=plan)
    console.print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}", soft_wrap=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("--data", type=Path, help="folder of images (default: scikit-learn's digits)")
    parser.add_argument("--output", type=Path, default=Path("runs/classify"), help="folder for all results")
    parser.add_argument("--model", default="test_resnet", help="name of a timm model")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights, not from random ones")
    parser.add_argument("--static", action="store_true", help="train the plain model, for comparison")
    parser.add_argument("--train", choices=("all", "fdconv", "modulation"), default="all", help="what is trained")
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--image-size", type=positive, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint.pt of a run with the same flags")
    return parser.parse_args(argv)


def write_digits(folder: Path) -> Path:
    """scikit-learn's 1797 handwritten digits, 8x8 pixels each, as a folder of images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / str(label) / f"{index:04}.png")
    return folder


def load_images(data: Path, args: argparse.Namespace, config: Any) -> tuple[Subset[Any], Subset[Any], list[str]]:
    """Images to train on and to test on, with their labels, and the names of the classes."""
    if not data.is_dir():
        fail(f"--data {data}: no such folder")
    size = (args.image_size, args.image_size)
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)]
    flip = [] if args.data is None else [v2.RandomHorizontalFlip()]  # a mirrored digit is none
    augmented = v2.Compose([v2.RandomResizedCrop(size, scale=(0.7, 1.0)), *flip, *finish])
    plain = v2.Compose([v2.Resize(size), *finish])
    split = (data / "train").is_dir() and (data / "val").is_dir()
    train_set = ImageFolder(data / "train" if split else data, augmented)
    test_set = ImageFolder(data / "val" if split else data, plain)
    if train_set.classes != test_set.classes:
        odd = ", ".join(sorted(set(train_set.classes) ^ set(test_set.classes)))
        fail(f"--data {data}: train and val must have the same classes, but only one of them has {odd}")
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = 0 if split else -(-len(order) // 4)
    if held_out == len(order):
        fail(f"--data {data} holds one image; at least two are needed, one to train on and one to test on")
    test_order = range(len(test_set)) if split else order[:held_out]
    return Subset(train_set, order[held_out:]), Subset(test_set, test_order), train_set.classes


@torch.no_grad()
def predict(model: nn.Module, batches: DataLoader[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits `(N, classes)` and labels `(N,)` of all images."""
    model.eval()
    results = [(model(images.to(device)).float().cpu(), labels) for images, labels in batches]
    logits, labels = zip(*results, strict=True)
    return torch.cat(logits), torch.cat(labels)


def draw(test_set: Subset[Any], logits: Tensor, classes: list[str], path: Path) -> None:
    """Some test images with the class that the model names, and in red the one it should have named."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    grid = figure.subplots(3, 6).ravel()
    for axes, index in zip(grid, range(0, len(test_set), -(-len(test_set) // len(grid))), strict=False):
        image, label = test_set[index]
        named = int(logits[index].argmax())
        axes.imshow(((image - image.min()) / (image.max() - image.min()).clamp_min(1e-6)).permute(1, 2, 0))
        wrong = "" if named == label else f", is {classes[label]}"
        axes.set_title(classes[named] + wrong, color="red" if wrong else "black", fontsize=9)
    for axes in grid:
        axes.axis("off")
    figure.savefig(path, dpi=80)


def save_checkpoint(args: argparse.Namespace, parts: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Write `checkpoint.pt` and `metrics.json`; the old checkpoint stays until the new one is complete."""
    flags = {name: str(value) for name, value in vars(args).items()}
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"flags": flags, "history": history, **states}, args.output / "checkpoint.new")
    os.replace(args.output / "checkpoint.new", args.output / "checkpoint.pt")
    text = json.dumps({"flags": flags, "epochs": history}, indent=1)
    (args.output / "metrics.json").write_text(text, encoding="utf-8")


def load_checkpoint(args: argparse.Namespace, parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Load the states into `parts`; returns the history."""
    if not args.resume.is_file():
        fail(f"--resume {args.resume}: no such file")
    try:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        flags, history = checkpoint["flags"], checkpoint["history"]
    except Exception as error:  # torch has no error of its own for what is not a checkpoint
        fail(f"--resume {args.resume}: not a checkpoint of this script ({type(error).__name__})")
    for name, value in vars(args).items():
        if name not in MAY_DIFFER_ON_RESUME and flags.get(name) != str(value):
            fail(f"--resume {args.resume}: written with {name}={flags.get(name)}, and this run has {name}={value}")
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    return history


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        fail(f"--device {name}: torch finds no such device here")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def fail(message: str) -> NoReturn:
    """Bad input is answered in one line."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()

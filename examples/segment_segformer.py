"""Fine-tune SegFormer of transformers with dynamic layers.

python examples/segment_segformer.py  # mosaics of scikit-image's textures, from random weights
python examples/segment_segformer.py --data DIR --model nvidia/mit-b0 --image-size 512 --lr 6e-5 --epochs 50

DIR holds `images`, `masks` (a PNG for each image, of the same name) and `classes.txt` (a name a line). A pixel of a
mask is the number of its class, from 0, or 255 where it does not count. `images` and `masks` may also lie in `train`
and `val`; without these, a quarter of the images is held out for testing.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import fdsurgery

WEIGHT_DECAY = 0.05
UNLABELLED = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those that SegFormer was trained with
TINY = {"depths": [1] * 4, "hidden_sizes": [16, 32, 64, 96], "num_attention_heads": [1, 2, 4, 6]}
MAY_DIFFER_ON_RESUME = ("data", "output", "resume", "device", "workers")
console = Console(highlight=False)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        run(args)
    except (fdsurgery.SurgeryError, OSError) as error:
        fail(str(error))


def run(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    data = args.data or write_mosaics(args.output / "mosaics")
    train_set, test_set, classes = load_pairs(data, args)

    torch.manual_seed(args.seed)
    model = build(args.model, classes)
    if not args.static:
        plan = fdsurgery.plan(model, example_inputs=torch.zeros(1, 3, args.image_size, args.image_size))
        console.print(plan.summary())
        fdsurgery.apply(plan, model)
    if args.train != "all":  # the new decoder has to be trained in any case
        fdsurgery.freeze(model, [args.train, "decode_head.*"])
    model.to(device)

    train_batches = DataLoader(train_set, args.batch_size, True, num_workers=args.workers)
    test_batches = DataLoader(test_set, args.batch_size, num_workers=args.workers)
    optimizer = torch.optim.AdamW(fdsurgery.param_groups(model, lr=args.lr, weight_decay=WEIGHT_DECAY))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train_batches))

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = load_checkpoint(args, parts) if args.resume else []
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 1000 + epoch)  # so that a resumed run draws what an uninterrupted one does
        start, total = time.perf_counter(), 0.0
        model.train()
        for images, masks in track(train_batches, f"epoch {epoch}/{args.epochs}"):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = model(pixel_values=images.to(device), labels=masks.to(device)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        overlaps = intersection_over_union(model, test_batches, len(classes), device)
        scores = {"mean_iou": overlaps.nanmean().item(), "iou": dict(zip(classes, overlaps.tolist(), strict=True))}
        seconds = round(time.perf_counter() - start, 1)
        history.append({"epoch": epoch, "loss": total / len(train_batches), **scores, "seconds": seconds})
        console.print("epoch {epoch}: loss {loss:.4f}, mean IoU {mean_iou:.2%}, {seconds} s".format(**history[-1]))
        save_checkpoint(args, parts, history)

    draw(model, test_set, classes, device, args.output / "predictions.png")
    if not args.static:
        fdsurgery.save_pretrained(model, args.output / "model", plan=plan)
    console.print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}", soft_wrap=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("--data", type=Path, help="folder of images and masks (default: mosaics of textures)")
    parser.add_argument("--output", type=Path, default=Path("runs/segment"), help="folder for all results")
    parser.add_argument("--model", default="tiny", help="tiny, from random weights; a folder; or a name on the hub")
    parser.add_argument("--static", action="store_true", help="train the plain model, for comparison")
    parser.add_argument("--train", choices=("all", "fdconv", "modulation"), default="all", help="what is trained")
    parser.add_argument("--epochs", type=positive, default=15)
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--image-size", type=positive, default=96)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint.pt of a run with the same flags")
    return parser.parse_args(argv)


def build(name: str, classes: list[str]) -> SegformerForSemanticSegmentation:
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}
    if name == "tiny":
        return SegformerForSemanticSegmentation(SegformerConfig(**TINY, decoder_hidden_size=64, **labels))
    if "/" not in name and not Path(name).is_dir():
        close = difflib.get_close_matches(name, ["tiny", *os.listdir()], n=1)
        fail(f"--model {name}: neither `tiny` nor a folder" + (f"; did you mean {close[0]}?" if close else ""))
    return SegformerForSemanticSegmentation.from_pretrained(name, ignore_mismatched_sizes=True, **labels)


def write_mosaics(folder: Path) -> Path:
    """Mosaics of scikit-image's `brick`, `grass` and `gravel`, in grey, with masks that say which is where.

    Cells are those of six random points. What one trains on is cut from the upper halves of the three pictures, what
    one tests on from the lower halves. Every cell has the same mean and contrast, so that only the texture tells.
    """
    from skimage import data

    classes, size, points = ["brick", "grass", "gravel"], 96, 6
    random = np.random.default_rng(0)
    textures = [getattr(data, name)().astype(float) for name in classes]
    for part, count, top in (("train", 240, 0), ("val", 60, 256)):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            offsets = np.indices((size, size))[:, None] - random.uniform(0, size, (2, points, 1, 1))
            cells = (offsets**2).sum(0).argmin(0)
            mask = random.integers(len(classes), size=points)[cells]
            image = np.zeros((size, size))
            for cell in range(points):
                row, column = top + random.integers(256 - size), random.integers(512 - size)
                inside = cells == cell
                patch = textures[mask[inside][0] if inside.any() else 0][row : row + size, column : column + size]
                image[inside] = (patch[inside] - patch.mean()) / patch.std()
            pixels = (128 + 50 * image).clip(0, 255).astype("uint8")
            Image.fromarray(pixels).convert("RGB").save(folder / part / "images" / f"{index:03}.png")
            Image.fromarray(mask.astype("uint8")).save(folder / part / "masks" / f"{index:03}.png")
    (folder / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Images `(3, S, S)`, normalised, with masks `(S, S)` of class numbers."""

    images: list[Path]
    classes: int
    transform: v2.Transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = mask_of(self.images[index])
        image = tv_tensors.Image(Image.open(self.images[index]).convert("RGB"))
        mask = tv_tensors.Mask(Image.open(path))
        if mask.shape[0] != 1 or mask.shape[1:] != image.shape[1:]:
            fail(f"{path} must have one channel and the size of its image, and is {tuple(mask.shape)}")
        if (wrong := mask[(mask >= self.classes) & (mask != UNLABELLED)]).numel():
            fail(f"{path} has a pixel {int(wrong[0])}; classes.txt names {self.classes} classes, from 0")
        image, mask = self.transform(image, mask)
        return image.as_subclass(Tensor), mask[0].long()


def mask_of(image: Path) -> Path:
    return image.parent.parent / "masks" / f"{image.stem}.png"


def load_pairs(data: Path, args: argparse.Namespace) -> tuple[Pairs, Pairs, list[str]]:
    """Pairs to train on and to test on, and the names of the classes."""
    if not data.is_dir():
        fail(f"--data {data}: no such folder")
    classes = (data / "classes.txt").read_text(encoding="utf-8").split("\n")
    classes = [name.strip() for name in classes if name.strip()]
    finish = [
        v2.Resize((args.image_size, args.image_size)),
        v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    split = (data / "train").is_dir() and (data / "val").is_dir()
    folders = [data / "train" / "images", data / "val" / "images"] if split else [data / "images"]
    found = [sorted(path for path in folder.iterdir() if not path.name.startswith(".")) for folder in folders]
    for folder, images in zip(folders, found, strict=True):
        if len(images) < 3 - len(folders):
            fail(f"{folder} holds {len(images)} images; at least {3 - len(folders)} needed")
        for image in images:
            if not mask_of(image).is_file():
                fail(f"{image} has no mask: no file {mask_of(image)}")
    if not split:
        order = torch.randperm(len(found[0]), generator=torch.Generator().manual_seed(args.seed)).tolist()
        shuffled, held_out = [found[0][index] for index in order], -(-len(order) // 4)
        found = [shuffled[held_out:], shuffled[:held_out]]
    return (
        Pairs(found[0], len(classes), v2.Compose([v2.RandomHorizontalFlip(), *finish])),
        Pairs(found[1], len(classes), v2.Compose(finish)),
        classes,
    )


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The class of every pixel, `(B, S, S)`. SegFormer's logits have a quarter of the images' size."""
    logits = model(pixel_values=images).logits.float()
    return F.interpolate(logits, images.shape[-2:], mode="bilinear").argmax(1).cpu()


def intersection_over_union(model: nn.Module, batches: DataLoader[Any], classes: int, device: torch.device) -> Tensor:
    """IoU of each class over all pixels that count, `(classes,)`; NaN for a class that is nowhere."""
    model.eval()
    confusion = torch.zeros(classes, classes)
    for images, masks in batches:
        counts = masks != UNLABELLED
        pairs = masks[counts] * classes + predict(model, images.to(device))[counts]
        confusion += torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    return confusion.diag() / (confusion.sum(0) + confusion.sum(1) - confusion.diag())


def draw(model: nn.Module, test_set: Pairs, classes: list[str], device: torch.device, path: Path) -> None:
    """Some test images, their masks, and what the model makes of them."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    colours = colormaps["viridis"].resampled(len(classes))
    grid = figure.subplots(3, 6)
    for axes in grid.ravel():
        axes.axis("off")
    for column, index in zip(grid.T, range(0, len(test_set), -(-len(test_set) // 6)), strict=False):
        image, mask = test_set[index]
        shown = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).permute(1, 2, 0)
        column[0].imshow(shown.clamp(0, 1))
        for axes, labels in zip(column[1:], (mask, predict(model, image[None].to(device))[0]), strict=True):
            axes.imshow(np.ma.masked_equal(labels, UNLABELLED), vmin=0, vmax=max(1, len(classes) - 1), cmap=colours)
    for axes, name in zip(grid[:, 0], ("image", "mask", "predicted"), strict=True):
        axes.set_title(name, fontsize=9, loc="left")
    patches = [Patch(color=colours(number), label=name) for number, name in enumerate(classes)]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
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

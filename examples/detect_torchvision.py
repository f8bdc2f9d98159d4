"""Fine-tune a detector of torchvision with dynamic layers.

python examples/detect_torchvision.py  # scikit-learn's digits in noise, from random weights
python examples/detect_torchvision.py --data DIR --model fasterrcnn_resnet50_fpn --pretrained --image-size 640 \
    --lr 1e-4 --epochs 20

DIR holds `images` and `annotations.json` in COCO's format, or `train` and `val` that do. Without these, a quarter of
the images is held out for testing.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models, tv_tensors
from torchvision.models.detection import FasterRCNN, faster_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import box_iou
from torchvision.transforms import v2

import fdsurgery

WEIGHT_DECAY = 0.05
CERTAIN = 0.5  # detections below this score are not counted and not drawn
KINDS = ("fasterrcnn", "retinanet", "fcos")  # those that learn from boxes alone, at any image size
MAY_DIFFER_ON_RESUME = ("data", "output", "resume", "device", "workers")
DARK = {"facecolor": "black", "edgecolor": "none", "pad": 0.8}  # behind text on pictures
console = Console(highlight=False)
Target = dict[str, Tensor]


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        run(args)
    except (fdsurgery.SurgeryError, OSError) as error:
        fail(str(error))


def run(args: argparse.Namespace) -> None:
    known = ["tiny", *(name for name in models.list_models(models.detection) if name.startswith(KINDS))]
    if args.model not in known:
        close = difflib.get_close_matches(args.model, known, n=3)
        fail(f"--model {args.model}: not one of {', '.join(known)}" + (f"; did you mean {close[0]}?" if close else ""))
    if args.model == "tiny" and args.pretrained:
        fail(f"--pretrained: there are weights for {', '.join(known[1:])}, but none for tiny")
    device = choose_device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    train_set, test_set, classes = load_scenes(args.data or write_scenes(args.output / "scenes"), args)

    torch.manual_seed(args.seed)
    arguments = {"num_classes": len(classes), "min_size": args.image_size, "max_size": args.image_size * 5 // 3}
    model = build(args.model, arguments, args.pretrained)
    if not args.static:
        plan = fdsurgery.plan(model, example_inputs=([torch.rand(3, args.image_size, args.image_size)],))
        console.print(plan.summary())
        fdsurgery.apply(plan, model)
    if args.train != "all":  # what comes after the backbone is new, and has to be trained in any case
        heads = {name.partition(".")[0] for name, _ in model.named_parameters()} - {"backbone"}
        fdsurgery.freeze(model, [args.train, *(f"{head}.*" for head in sorted(heads))])
    model.to(device)

    train_batches = DataLoader(train_set, args.batch_size, True, num_workers=args.workers, collate_fn=together)
    test_batches = DataLoader(test_set, args.batch_size, num_workers=args.workers, collate_fn=together)
    optimizer = torch.optim.AdamW(fdsurgery.param_groups(model, lr=args.lr, weight_decay=WEIGHT_DECAY))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(train_batches))

    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    history = load_checkpoint(args, parts) if args.resume else []
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 1000 + epoch)  # so that a resumed run draws what an uninterrupted one does
        start, losses = time.perf_counter(), defaultdict(float)
        model.train()
        if args.pretrained:  # few images a batch tell less than the statistics that come along
            for module in model.modules():
                module.train(not isinstance(module, nn.BatchNorm2d))
        for images, targets in track(train_batches, f"epoch {epoch}/{args.epochs}"):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                found = model([image.to(device) for image in images], [on(device, target) for target in targets])
            optimizer.zero_grad()
            sum(found.values()).backward()
            optimizer.step()
            schedule.step()
            for name, loss in found.items():
                losses[name] += loss.item() / len(train_batches)
        recall, precision = recall_and_precision(model, test_batches, device)
        scores = {"loss": sum(losses.values()), "losses": dict(losses), "recall": recall, "precision": precision}
        history.append({"epoch": epoch, **scores, "seconds": round(time.perf_counter() - start, 1)})
        text = "epoch {epoch}: loss {loss:.4f}, recall {recall:.2%}, precision {precision:.2%}, {seconds} s"
        console.print(text.format(**history[-1]))
        save_checkpoint(args, parts, history)

    draw(model, test_set, classes, device, args.output / "predictions.png")
    if not args.static:
        ours = fdsurgery.ModelSource("file", f"{Path(__file__).name}:build_tiny", arguments)
        source = ours if args.model == "tiny" else fdsurgery.ModelSource("torchvision", args.model, arguments)
        fdsurgery.save_pretrained(model.cpu(), args.output / "model", source=source, plan=plan)
    console.print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}", soft_wrap=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("--data", type=Path, help="folder in COCO's format (default: digits in noise)")
    parser.add_argument("--output", type=Path, default=Path("runs/detect"), help="folder for all results")
    parser.add_argument("--model", default="tiny", help="tiny, a Faster R-CNN of this file; or a name of torchvision's")
    parser.add_argument("--pretrained", action="store_true", help="start from COCO's weights, not from random ones")
    parser.add_argument("--static", action="store_true", help="train the plain model, for comparison")
    parser.add_argument("--train", choices=("all", "fdconv", "modulation"), default="all", help="what is trained")
    parser.add_argument("--epochs", type=positive, default=10)
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--image-size", type=positive, default=96, help="the shorter side")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="checkpoint.pt of a run with the same flags")
    return parser.parse_args(argv)


def build(name: str, arguments: dict[str, int], pretrained: bool) -> nn.Module:
    if name == "tiny":
        return build_tiny(**arguments)
    model = models.get_model(name, weights=None, weights_backbone=None, **arguments)
    if pretrained:  # all but what depends on the number of classes
        own, weights = model.state_dict(), models.get_model_weights(name).DEFAULT.get_state_dict(progress=False)
        fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
        model.load_state_dict(fitting, strict=False)
    return model


def build_tiny(num_classes: int, min_size: int, max_size: int) -> FasterRCNN:
    """A Faster R-CNN with two stages of a ResNet, of one block each, for objects of 16 to 48 pixels."""
    body = ResNet(BasicBlock, [1, 1, 1, 1])
    backbone = BackboneWithFPN(body, {"layer1": "0", "layer2": "1"}, [64, 128], out_channels=64)
    return FasterRCNN(
        backbone,
        min_size=min_size,
        max_size=max_size,
        rpn_anchor_generator=AnchorGenerator(((16,), (24,), (36,)), ((0.5, 1.0),) * 3),
        box_head=faster_rcnn.TwoMLPHead(64 * 7 * 7, 128),
        box_predictor=faster_rcnn.FastRCNNPredictor(128, num_classes),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=50,
        box_batch_size_per_image=32,
    )


def write_scenes(folder: Path) -> Path:
    """Up to six of scikit-learn's digits, of 18 to 36 pixels, in scenes of 96 by 96 of noise, in COCO's format.

    What one tests on is made of other digits than what one trains on. Boxes fit the strokes, and do not overlap.
    """
    from sklearn.datasets import load_digits

    digits, size = load_digits(), 96
    random = np.random.default_rng(0)
    for part, count, first, last in (("train", 240, 0, 1300), ("val", 60, 1300, 1797)):
        (folder / part / "images").mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for number in range(count):
            scene = random.normal(90, 25, (size, size)) + random.normal(0, 10)
            taken = np.zeros((size, size), bool)
            for _ in range(random.integers(3, 7)):
                digit, side = random.integers(first, last), int(random.integers(18, 37))
                image = Image.fromarray((digits.images[digit] * 15.9).astype("uint8")).resize((side, side), 2)
                strokes = np.asarray(image) / 255.0
                rows, columns = np.nonzero(strokes.max(1) > 0.3)[0], np.nonzero(strokes.max(0) > 0.3)[0]
                strokes = strokes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                height, width = strokes.shape
                y, x = int(random.integers(size - height)), int(random.integers(size - width))
                window = (slice(y, y + height), slice(x, x + width))
                if taken[window].any():
                    continue
                taken[window] = True
                scene[window] += (210 - scene[window]) * strokes
                category = int(digits.target[digit])
                box = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
                annotations.append({"id": len(annotations), "image_id": number, "category_id": category, **box})
            name = f"{number:03}.png"
            Image.fromarray(scene.clip(0, 255).astype("uint8")).save(folder / part / "images" / name)
            images.append({"id": number, "file_name": name, "width": size, "height": size})
        categories = [{"id": label, "name": str(label)} for label in range(10)]
        coco = {"images": images, "annotations": annotations, "categories": categories}
        (folder / part / "annotations.json").write_text(json.dumps(coco), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Scenes(Dataset[tuple[Tensor, Target]]):
    """Images `(3, H, W)` from 0 to 1, with `boxes` `(N, 4)` as left, top, right, bottom and `labels` `(N,)`, from 1."""

    scenes: list[tuple[Path, Target]]
    transform: v2.Transform

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        file, target = self.scenes[index]
        image = tv_tensors.Image(Image.open(file).convert("RGB"))
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
        image, boxes = self.transform(image, boxes)
        return image.as_subclass(Tensor), {"boxes": boxes.as_subclass(Tensor), "labels": target["labels"]}


def read_coco(folder: Path) -> tuple[list[tuple[Path, Target]], list[str]]:
    """Images of a folder with what is in them, and the names of the classes, of which the first is background."""
    path = folder / "annotations.json"
    try:
        coco = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted(coco["categories"], key=lambda category: category["id"])
        label_of = {category["id"]: label for label, category in enumerate(categories, 1)}
        inside: dict[Any, tuple[list[list[float]], list[int]]] = {image["id"]: ([], []) for image in coco["images"]}
        for entry in coco["annotations"]:
            left, top, width, height = entry["bbox"]
            if entry["category_id"] not in label_of or entry["image_id"] not in inside:
                fail(f"{path}: annotation {entry['id']} is of a category or an image that the file does not have")
            if min(width, height) <= 0:
                fail(f"{path}: annotation {entry['id']} has a box {width} wide and {height} high")
            if not entry.get("iscrowd"):
                inside[entry["image_id"]][0].append([left, top, left + width, top + height])
                inside[entry["image_id"]][1].append(label_of[entry["category_id"]])
        files = [folder / "images" / image["file_name"] for image in coco["images"]]
        classes = ["background", *(category["name"] for category in categories)]
    except (ValueError, TypeError) as error:
        fail(f"{path} is not in COCO's format: {error}")
    except KeyError as error:
        fail(f"{path} is not in COCO's format: {error} is missing")
    for file in files:
        if not file.is_file():
            fail(f"{path} names {file.name}, and there is no {file}")
    targets = [
        {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels).long()}
        for boxes, labels in inside.values()
    ]
    return list(zip(files, targets, strict=True)), classes


def load_scenes(data: Path, args: argparse.Namespace) -> tuple[Scenes, Scenes, list[str]]:
    """Scenes to train on and to test on, and the names of the classes."""
    if not data.is_dir():
        fail(f"--data {data}: no such folder")
    finish = [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)]
    flip = [] if args.data is None else [v2.RandomHorizontalFlip()]  # a mirrored digit is none
    if (data / "train").is_dir() and (data / "val").is_dir():
        train, classes = read_coco(data / "train")
        test, test_classes = read_coco(data / "val")
        if classes != test_classes:
            fail(
                f"--data {data}: train and val must have the same categories, not {classes[1:]} and {test_classes[1:]}"
            )
    else:
        scenes, classes = read_coco(data)
        order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(args.seed)).tolist()
        shuffled, held_out = [scenes[index] for index in order], -(-len(order) // 4)
        train, test = shuffled[held_out:], shuffled[:held_out]
    if not train or not test:
        fail(f"--data {data}: {len(train)} images to train on and {len(test)} to test on; at least one of each needed")
    return Scenes(train, v2.Compose([*flip, *finish])), Scenes(test, v2.Compose(finish)), classes


def together(batch: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in batch], [target for _, target in batch]


def on(device: torch.device, tensors: Target) -> Target:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@torch.no_grad()
def predict(model: nn.Module, images: list[Tensor], device: torch.device) -> list[Target]:
    """The detections of which the model is certain, the surest first."""
    found = model.eval()([image.to(device) for image in images])
    return [on(torch.device("cpu"), {k: v[one["scores"] >= CERTAIN] for k, v in one.items()}) for one in found]


def recall_and_precision(model: nn.Module, batches: DataLoader[Any], device: torch.device) -> tuple[float, float]:
    """The part of the objects that were found, and of the detections that are right."""
    hit = objects = detections = 0
    for images, targets in batches:
        for found, target in zip(predict(model, images, device), targets, strict=True):
            hit += hits(found, target)
            objects += len(target["boxes"])
            detections += len(found["boxes"])
    return hit / max(1, objects), hit / max(1, detections)


def hits(found: Target, target: Target, threshold: float = 0.5) -> int:
    """How many detections overlap an object of their class, by IoU; no object counts twice. The surest come first."""
    overlaps = box_iou(found["boxes"], target["boxes"]) * (found["labels"][:, None] == target["labels"])
    count = 0
    for row in overlaps if overlaps.numel() else ():
        if row.max() >= threshold:
            count += 1
            overlaps[:, row.argmax()] = 0
    return count


def draw(model: nn.Module, test_set: Scenes, classes: list[str], device: torch.device, path: Path) -> None:
    """Some test images with what the model finds in them, and the boxes of the objects dotted."""
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    grid = figure.subplots(2, 3).ravel()
    for axes, index in zip(grid, range(0, len(test_set), -(-len(test_set) // len(grid))), strict=False):
        image, target = test_set[index]
        axes.imshow(image.permute(1, 2, 0), interpolation="nearest")
        found = predict(model, [image], device)[0]
        for boxes, style in ((target["boxes"], {"color": "white", "ls": ":"}), (found["boxes"], {"color": "orange"})):
            for left, top, right, bottom in boxes.tolist():
                axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))
        for (left, top, *_), label, score in zip(
            *(found[k].tolist() for k in ("boxes", "labels", "scores")), strict=True
        ):
            axes.text(left, top - 2, f"{classes[label]} {score:.0%}", color="orange", fontsize=8, bbox=DARK)
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

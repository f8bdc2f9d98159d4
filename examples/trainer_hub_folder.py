"""Fine-tune an image classifier of transformers with dynamic layers by `Trainer`, and save it as a folder for the hub.

python examples/trainer_hub_folder.py  # scikit-learn's digits, from random weights
python examples/trainer_hub_folder.py --data DIR --model facebook/convnextv2-tiny-1k-224 --image-size 224 --lr 1e-4 \
    --epochs 30

DIR holds one folder of images per class, or `train` and `val` that do. Without these, a quarter of the images is held
out for testing.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
    set_seed,
)

import fdsurgery

WEIGHT_DECAY = 0.05
TINY = {"depths": [1, 1, 2, 1], "hidden_sizes": [24, 32, 48, 64], "patch_size": 2}
MAY_DIFFER_ON_RESUME = ("data", "output", "resume", "device", "workers")
FLAGS = "flags.json"  # in each checkpoint, beside what Trainer writes there


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        run(args)
    except (fdsurgery.SurgeryError, OSError) as error:
        fail(str(error))


def run(args: argparse.Namespace) -> None:
    flags = {name: str(value) for name, value in vars(args).items()}
    if args.resume:
        check_checkpoint(args.resume, flags)
    args.output.mkdir(parents=True, exist_ok=True)
    processor = build_processor(args.model, args.image_size)
    train_set, test_set, classes = load_images(args.data or write_digits(args.output / "digits"), args, processor)

    set_seed(args.seed)
    model = build(args.model, args.image_size, classes)
    plan = None
    if not args.static:
        plan = fdsurgery.plan(model, example_inputs=torch.zeros(1, 3, args.image_size, args.image_size))
        print(plan.summary())
        fdsurgery.apply(plan, model)
    if args.train != "all":  # the new classifier has to be trained in any case
        fdsurgery.freeze(model, [args.train, "classifier.*"])

    settings = TrainingArguments(
        output_dir=str(args.output / "checkpoints"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        seed=args.seed,
        use_cpu=args.device == "cpu",
        bf16=args.amp,
        dataloader_num_workers=args.workers,
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=train_set,
        eval_dataset=test_set,
        data_collator=together,
        compute_metrics=accuracy,
        optimizers=(torch.optim.AdamW(fdsurgery.param_groups(model, lr=args.lr, weight_decay=WEIGHT_DECAY)), None),
        callbacks=[Record(flags, args.output)],
    )
    trainer.train(resume_from_checkpoint=args.resume and str(args.resume))
    draw(test_set, trainer.predict(test_set).predictions, classes, args.output / "predictions.png")

    folder = args.output / "model"
    if args.static:
        model.save_pretrained(folder)
    else:
        fdsurgery.save_pretrained(model, folder, plan=plan)
    processor.save_pretrained(folder)
    images = torch.stack([test_set[index][0] for index in range(min(8, len(test_set)))])
    print(f"loaded from {folder}, logits differ by at most {difference(model, folder, images):.1e}")
    print(f"in {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("--data", type=Path, help="folder of images (default: scikit-learn's digits)")
    parser.add_argument("--output", type=Path, default=Path("runs/trainer"), help="folder for all results")
    parser.add_argument(
        "--model", default="tiny", help="tiny, a ConvNeXt V2 of random weights; a folder; or a name on the hub"
    )
    parser.add_argument("--static", action="store_true", help="train the plain model, for comparison")
    parser.add_argument("--train", choices=("all", "fdconv", "modulation"), default="all", help="what is trained")
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--batch-size", type=positive, default=32, help="for each device")
    parser.add_argument("--image-size", type=positive, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: what Trainer finds")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="checkpoints/checkpoint-N of a run with these flags")
    return parser.parse_args(argv)


def build_processor(name: str, size: int) -> Any:
    """What turns images into a model's inputs. Its mean and spread are used here; all of it by who loads the model."""
    if name == "tiny":
        return ViTImageProcessor(size={"height": size, "width": size})
    if "/" not in name and not Path(name).is_dir():
        close = difflib.get_close_matches(name, ["tiny", *os.listdir()], n=1)
        fail(f"--model {name}: neither `tiny` nor a folder" + (f"; did you mean {close[0]}?" if close else ""))
    return AutoImageProcessor.from_pretrained(name)


def build(name: str, size: int, classes: list[str]) -> Any:
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}
    if name == "tiny":
        return ConvNextV2ForImageClassification(ConvNextV2Config(**TINY, image_size=size, **labels))
    return AutoModelForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)


def write_digits(folder: Path) -> Path:
    """scikit-learn's 1797 handwritten digits, 8x8 pixels each, as a folder of images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / str(label) / f"{index:04}.png")
    return folder


def load_images(data: Path, args: argparse.Namespace, processor: Any) -> tuple[Subset[Any], Subset[Any], list[str]]:
    """Images to train on and to test on, with their labels, and the names of the classes."""
    if not data.is_dir():
        fail(f"--data {data}: no such folder")
    size = (args.image_size, args.image_size)
    finish = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(processor.image_mean, processor.image_std),
    ]
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


def together(batch: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([image for image, _ in batch]),
        "labels": torch.tensor([label for _, label in batch]),
    }


def accuracy(evaluated: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions.argmax(1) == evaluated.label_ids).mean())}


class Record(TrainerCallback):
    """Writes the flags into every checkpoint, and `metrics.json` with every epoch."""

    def __init__(self, flags: dict[str, str], output: Path) -> None:
        self.flags, self.output = flags, output

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        text = json.dumps(self.flags, indent=1)
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / FLAGS).write_text(text, encoding="utf-8")

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        losses = {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}
        history = [
            {"epoch": round(entry["epoch"]), "loss": losses[entry["step"]], "accuracy": entry["eval_accuracy"]}
            for entry in state.log_history
            if "eval_accuracy" in entry
        ]
        text = json.dumps({"flags": self.flags, "epochs": history}, indent=1)
        (self.output / "metrics.json").write_text(text, encoding="utf-8")


def check_checkpoint(folder: Path, flags: dict[str, str]) -> None:
    if not folder.is_dir():
        fail(f"--resume {folder}: no such folder")
    try:
        earlier = json.loads((folder / FLAGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"--resume {folder}: not a checkpoint of this script ({type(error).__name__} at {FLAGS})")
    for name, value in flags.items():
        if name not in MAY_DIFFER_ON_RESUME and earlier.get(name) != value:
            fail(f"--resume {folder}: written with {name}={earlier.get(name)}, and this run has {name}={value}")


@torch.no_grad()
def difference(model: Any, folder: Path, images: Tensor) -> float:
    """How far the logits of a saved model, loaded as users of transformers do it, are from those of the model."""
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    found, expected = loaded(images).logits, model.cpu().eval()(images).logits
    return (found - expected).abs().max().item()


def draw(test_set: Subset[Any], logits: np.ndarray, classes: list[str], path: Path) -> None:
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

"""The examples run to their end, leave what they say, resume where they stopped, and answer bad input in one line."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fdsurgery

ROOT = Path(__file__).parents[2]
SCRIPTS = ("classify_timm", "segment_segformer", "detect_torchvision", "trainer_hub_folder")
SMALL = ["--device", "cpu", "--image-size", "32", "--batch-size", "3", "--epochs", "2"]

slow = pytest.mark.slow
scripts = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield


@functools.cache
def script(name: str) -> ModuleType:
    pytest.importorskip("skimage" if name == "segment_segformer" else "sklearn")
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Small folders of data -----------------------------------------------------------------------------------------------


def picture(path: Path, height: int = 40, width: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype="uint8")
    Image.fromarray(pixels).save(path)


def write_classes(folder: Path) -> None:
    for number in range(8):
        picture(folder / ("cat", "dog")[number % 2] / f"{number}.png")


def write_masks(folder: Path) -> None:
    (folder / "masks").mkdir(parents=True)
    for number in range(6):
        picture(folder / "images" / f"{number}.png")
        mask = np.random.default_rng(number).integers(0, 2, (40, 48)).astype("uint8")
        mask[:3] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    (folder / "classes.txt").write_text("sea\nland\n")


def write_coco(folder: Path) -> None:
    """Category numbers with a gap, an image with nothing in it, and a crowd."""
    images, annotations = [], []
    for number in range(6):
        picture(folder / "images" / f"{number}.png")
        images.append({"id": 10 + number, "file_name": f"{number}.png", "width": 48, "height": 40})
        for corner in range(number % 3):
            box = {"bbox": [4 + 10 * corner, 3, 16.5, 20], "iscrowd": int(number == 5 and corner == 1)}
            category = (7, 3)[corner]
            annotations.append({"id": len(annotations), "image_id": 10 + number, "category_id": category, **box})
    categories = [{"id": 7, "name": "cow"}, {"id": 3, "name": "bee"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(coco))


WRITERS = dict(zip(SCRIPTS, (write_classes, write_masks, write_coco, write_classes), strict=True))


@pytest.fixture
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Data for the script that a test is for."""
    WRITERS[request.getfixturevalue("name")](tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs that nothing has interrupted, each made once: the folders of their data and of their results."""

    @functools.cache
    def run(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        WRITERS[name](folder / "data")
        script(name).main([*SMALL, "--data", str(folder / "data"), "--output", str(folder / "out")])
        return folder / "data", folder / "out"

    return run


def checkpoint_of(name: str, output: Path) -> Path:
    """The last one."""
    if name == "trainer_hub_folder":
        return max((output / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    return output / "checkpoint.pt"


def weights(name: str, output: Path) -> dict[str, Tensor]:
    """The model's state in the last checkpoint."""
    path = checkpoint_of(name, output)
    if name == "trainer_hub_folder":
        from safetensors.torch import load_file

        return load_file(path / "model.safetensors")
    states: dict[str, Tensor] = torch.load(path, weights_only=True)["model"]
    return states


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def history(output: Path) -> list[dict[str, Any]]:
    epochs = json.loads((output / "metrics.json").read_text())["epochs"]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in epochs]


# Runs ----------------------------------------------------------------------------------------------------------------

MEASURES = {
    "classify_timm": ("accuracy",),
    "segment_segformer": ("mean_iou",),
    "detect_torchvision": ("recall", "precision"),
    "trainer_hub_folder": ("accuracy",),
}


@scripts
def test_a_run_leaves_metrics_a_picture_a_checkpoint_and_the_model(name: str, finished: Any) -> None:
    _, output = finished(name)
    epochs = history(output)
    assert [entry["epoch"] for entry in epochs] == [1, 2]
    for entry in epochs:
        assert 0 < entry["loss"] < 50 and all(0 <= entry[measure] <= 1 for measure in MEASURES[name])
    assert min(Image.open(output / "predictions.png").size) > 200
    if name == "detect_torchvision":
        plain = script(name).build_tiny(num_classes=3, min_size=32, max_size=53)
        loaded = fdsurgery.load(output / "model", model=plain)
    else:
        loaded = fdsurgery.from_pretrained(output / "model")
    assert any("dft_weight" in key for key in loaded.state_dict())
    assert_equal(loaded.state_dict(), weights(name, output))


@pytest.mark.parametrize("name", [SCRIPTS[0], *(pytest.param(name, marks=slow) for name in SCRIPTS[1:])])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    name: str, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = finished(name)
    module, argv = script(name), [*SMALL, "--data", str(data), "--output"]
    if name == "trainer_hub_folder":  # it keeps a checkpoint of each epoch
        first = min((output / "checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    else:
        save = module.save_checkpoint

        def stop(*arguments: Any) -> None:
            save(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
            interrupted.setattr(module, "save_checkpoint", stop)
            module.main([*argv, str(tmp_path / "stopped")])
        first = tmp_path / "stopped" / "checkpoint.pt"
        assert len(history(tmp_path / "stopped")) == 1
    torch.randn(7)  # what the process drew before makes no difference
    module.main([*argv, str(tmp_path / "resumed"), "--resume", str(first)])
    assert_equal(weights(name, tmp_path / "resumed"), weights(name, output))
    assert history(tmp_path / "resumed") == history(output)


@pytest.mark.parametrize("name", [SCRIPTS[0], *(pytest.param(name, marks=slow) for name in SCRIPTS[1:])])
def test_with_train_modulation_the_rest_stays(name: str, data: Path, tmp_path: Path) -> None:
    """Two runs with different rates differ in modulation and head alone, and there they do."""
    argv = [*SMALL, "--data", str(data), "--train", "modulation"]
    results = []
    for rate in ("1e-3", "1e-2"):
        script(name).main([*argv, "--lr", rate, "--output", str(tmp_path / rate)])
        results.append(weights(name, tmp_path / rate))
    changed = {key for key in results[0] if not torch.equal(results[0][key], results[1][key])}
    assert any("KSM" in key for key in changed)
    heads = ("fc.", "decode_head.", "rpn.", "roi_heads.", "classifier.")
    allowed = ("KSM", "FBM", "running_", "num_batches")
    assert all(key.startswith(heads) or any(part in key for part in allowed) for key in changed)


@slow
@scripts
@pytest.mark.parametrize("flags", [["--static"], ["--amp", "--workers", "2"], []])
def test_other_flags_and_the_data_that_an_example_brings(
    name: str, flags: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    given = ["--data", str(request.getfixturevalue("data"))] if flags else []
    script(name).main([*SMALL, "--epochs", "1", *given, *flags, "--output", str(tmp_path / "out")])
    assert len(history(tmp_path / "out")) == 1 and (tmp_path / "out" / "predictions.png").is_file()
    states = weights(name, tmp_path / "out")
    assert any("dft_weight" in key for key in states) == (flags != ["--static"])
    assert all(value.isfinite().all() for value in states.values())


@slow
@pytest.mark.parametrize("model", ["fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"])
def test_detectors_of_torchvision(model: str, tmp_path: Path) -> None:
    write_coco(tmp_path / "data")
    argv = [*SMALL, "--epochs", "1", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    script("detect_torchvision").main([*argv, "--model", model, "--train", "modulation"])
    loaded = fdsurgery.load(tmp_path / "out" / "model")
    assert_equal(loaded.state_dict(), weights("detect_torchvision", tmp_path / "out"))


def test_pretrained_detectors_keep_all_but_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    module, name = script("detect_torchvision"), "fasterrcnn_mobilenet_v3_large_320_fpn"
    trained = module.models.get_model(name, weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr(module.models.WeightsEnum, "get_state_dict", lambda *_, **__: trained)
    torch.manual_seed(1)
    state = module.build(name, {"num_classes": 3, "min_size": 32, "max_size": 53}, True).state_dict()
    other = {key for key in state if not torch.equal(state[key], trained[key])}
    predictor = "roi_heads.box_predictor"
    assert other == {f"{predictor}.{part}.{kind}" for part in ("cls_score", "bbox_pred") for kind in ("weight", "bias")}


# Measures ------------------------------------------------------------------------------------------------------------


def test_hits_counts_each_object_once_and_by_class() -> None:
    hits = script("detect_torchvision").hits
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}

    def count(found: list[tuple[int, list[float]]]) -> int:
        coordinates = torch.tensor([box for _, box in found]).reshape(-1, 4)
        result: int = hits({"boxes": coordinates, "labels": torch.tensor([label for label, _ in found])}, target)
        return result

    first, second = boxes.tolist()
    assert count([(1, first), (2, second)]) == 2
    assert count([(1, first), (1, first)]) == 1
    assert count([(2, first), (1, second)]) == 0
    assert count([(1, [0, 0, 10, 6])]) == 1, "an overlap of 0.6"
    assert count([(1, [0, 0, 10, 4])]) == 0, "an overlap of 0.4"
    assert count([]) == 0
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert hits(target, nothing) == 0


def test_intersection_over_union_leaves_out_what_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("segment_segformer")
    masks, found = torch.randint(0, 3, (2, 4, 6, 5))
    masks[:, :2] = 255
    monkeypatch.setattr(module, "predict", lambda model, images: images)
    batches = [(found[:2], masks[:2]), (found[2:], masks[2:])]
    result = module.intersection_over_union(torch.nn.Identity(), batches, 4, torch.device("cpu"))
    counts = masks != 255
    for label in range(3):
        both = ((masks == label) & (found == label))[counts].sum()
        either = ((masks == label) | (found == label))[counts].sum()
        assert result[label].item() == pytest.approx((both / either).item())
    assert result[3].isnan()


def test_boxes_are_read_as_corners_and_crowds_left_out(tmp_path: Path) -> None:
    write_coco(tmp_path)
    scenes, classes = script("detect_torchvision").read_coco(tmp_path)
    files, targets = zip(*scenes, strict=True)
    assert classes == ["background", "bee", "cow"]
    assert [file.name for file in files] == [f"{number}.png" for number in range(6)]
    assert [target["labels"].tolist() for target in targets] == [[], [2], [2, 1], [], [2], [2]]
    assert targets[2]["boxes"].tolist() == [[4, 3, 20.5, 23], [14, 3, 30.5, 23]]
    assert targets[0]["boxes"].shape == (0, 4)


# Bad input -----------------------------------------------------------------------------------------------------------


def error_of(name: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        script(name).main(argv)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    (line,) = lines
    return line


@scripts
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--epochs", "0"], "'0' is no whole number above 0"),
        (["--resume", "nowhere.pt"], "--resume nowhere.pt: no such"),
        (["--train", "some"], "invalid choice: 'some'"),
        (["--device", "cpi"], "cpi"),
    ],
)
def test_flags_that_cannot_be_meant(
    name: str, flags: list[str], said: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(name, [*SMALL, "--data", str(data), *flags], capsys)


@pytest.mark.parametrize(
    ("name", "model", "close"),
    [
        ("classify_timm", "test_resnt", "test_resnet"),
        ("segment_segformer", "tinny", "tiny"),
        ("detect_torchvision", "fasterrcnn_resnet50_fpm", "fasterrcnn_resnet50_fpn"),
        ("trainer_hub_folder", "dat", "data"),
    ],
)
def test_unknown_models_are_told_with_near_misses(
    name: str, model: str, close: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(name, [*SMALL, "--data", str(data), "--model", model], capsys)
    assert model in error and f"did you mean {close}" in error


@scripts
def test_only_checkpoints_of_a_run_with_these_flags_are_resumed(
    name: str, finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = finished(name)
    argv = [*SMALL, "--data", str(data), "--output", "out", "--resume"]
    other = tmp_path / "other"
    if name == "trainer_hub_folder":
        shutil.copytree(output / "model", other)
    else:
        other.write_text("something else")
    assert "not a checkpoint of this script" in error_of(name, [*argv, str(other)], capsys)
    error = error_of(name, [*argv, str(checkpoint_of(name, output)), "--seed", "5"], capsys)
    assert "written with seed=0, and this run has seed=5" in error


def spoil(folder: Path, **entries: Any) -> None:
    path = folder / "annotations.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


BOX = {"id": 5, "image_id": 10, "category_id": 3, "bbox": [1, 2, 0, 4]}
BROKEN: dict[str, tuple[str, Any, str]] = {
    "no second image": (
        "classify_timm",
        lambda f: [f.joinpath("cat", f"{n}.png").unlink() for n in (0, 2, 4, 6)],
        "cat",
    ),
    "classes differ": (
        "trainer_hub_folder",
        lambda f: (write_classes(f / "train"), picture(f / "val/cat/1.png")),
        "dog",
    ),
    "no mask": ("segment_segformer", lambda f: (f / "masks/2.png").unlink(), "2.png has no mask"),
    "another size": ("segment_segformer", lambda f: picture(f / "images/2.png", 8, 8), "the size of its image"),
    "a class too many": (
        "segment_segformer",
        lambda f: (f / "classes.txt").write_text("sea"),
        "has a pixel 1; classes.txt names 1 classes",
    ),
    "no image": ("detect_torchvision", lambda f: (f / "images/2.png").unlink(), "names 2.png, and there is no"),
    "no JSON": ("detect_torchvision", lambda f: (f / "annotations.json").write_text("{"), "is not in COCO's format"),
    "no categories": ("detect_torchvision", lambda f: spoil(f, categories=[]), "annotation 0 is of a category"),
    "an empty box": ("detect_torchvision", lambda f: spoil(f, annotations=[BOX]), "annotation 5 has a box 0 wide"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_data_are_told_by_their_file(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, damage, said = BROKEN[case]
    WRITERS[name](tmp_path / "data")
    damage(tmp_path / "data")
    assert said in error_of(name, [*SMALL, "--data", str(tmp_path / "data"), "--output", "out"], capsys)

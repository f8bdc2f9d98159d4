"""Saved is enough: a converted model comes back in a fresh process, to the same outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from models import CASES
from torch import nn

import fdsurgery
from fdconv import FDConv2d
from fdsurgery import CheckpointError, Source

LOAD_AND_RUN = """
import sys, torch, fdsurgery
torch.set_num_threads(1)  # as in the tests: sums are split by threads, and rounded differently
folder, inputs, outputs = sys.argv[1:]
model = fdsurgery.load(folder)
assert not model.training
with torch.no_grad():
    result = model(torch.load(inputs, weights_only=True))
torch.save(result if isinstance(result, torch.Tensor) else result.logits, outputs)
"""


def trained_a_little(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Move every parameter off its start, so that a layer loaded as neutral would be found out."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.train()
    model(x)
    return model.eval()


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, torch.Tensor) else result.logits


SAVED = {
    "timm resnet18": None,
    "timm convnext (1x1 FFN)": Source("timm", "convnext_atto", {"depths": [1, 1, 2, 1], "dims": [24, 32, 48, 64]}),
    "hf segformer": None,
    "hf convnextv2": None,
}


@pytest.mark.parametrize("name", SAVED)
def test_a_fresh_process_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    model, x = CASES[name].settled()
    trained_a_little(fdsurgery.convert(model, example_inputs=x), x)
    fdsurgery.save(model, tmp_path / "saved", source=SAVED[name])
    assert sorted(os.listdir(tmp_path / "saved")) == ["fdsurgery.json", "model.safetensors"]

    torch.save(x, tmp_path / "x.pt")
    arguments = [str(tmp_path / part) for part in ("saved", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, *arguments], check=True, cwd=tmp_path)
    loaded = torch.load(tmp_path / "y.pt", weights_only=True)
    torch.testing.assert_close(loaded, logits(model, x), rtol=0, atol=0)


def test_a_model_from_the_callers_code_loads_onto_a_fresh_one(tmp_path: Path) -> None:
    def build() -> nn.Module:
        shared = nn.Conv2d(32, 32, 3, padding=1)
        return nn.Sequential(nn.Conv2d(3, 32, 3), shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(32 * 36, 4))

    x = torch.randn(2, 3, 8, 8)
    model = build()
    fdsurgery.settle_(model, x)
    trained_a_little(fdsurgery.convert(model, example_inputs=x), x)
    with pytest.raises(CheckpointError, match="pass source="):
        fdsurgery.save(model, tmp_path / "saved")
    fdsurgery.save(model, tmp_path / "saved", source=Source("file", "models.py:build"))
    with pytest.raises(CheckpointError, match=r"built by models\.py:build.*load\(folder, model=\.\.\.\)"):
        fdsurgery.load(tmp_path / "saved")
    loaded = fdsurgery.load(tmp_path / "saved", model=build())
    assert loaded[1] is loaded[3] and isinstance(loaded[1], FDConv2d)
    torch.testing.assert_close(logits(loaded, x), logits(model, x), rtol=0, atol=0)


def test_parameters_that_overlap_in_memory_are_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
        model[2].bias = nn.Parameter(model[0].bias.data)
        return model

    model = fdsurgery.convert(build(), example_inputs=torch.randn(1, 3, 9, 9))
    fdsurgery.save(model, tmp_path / "saved", source=Source("file", "models.py:build"))
    loaded = fdsurgery.load(tmp_path / "saved", model=build())
    assert torch.equal(loaded[2].bias, model[0].bias) and torch.equal(loaded[0].bias, model[0].bias)


def test_saving_again_replaces_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    model, x = CASES["timm resnet18"].settled()
    with pytest.raises(CheckpointError, match="no dynamic layers"):
        fdsurgery.save(model, tmp_path / "saved")
    fdsurgery.convert(model, example_inputs=x)
    fdsurgery.save(model, tmp_path / "saved")
    trained_a_little(model, x)
    fdsurgery.save(model, tmp_path / "saved")
    torch.testing.assert_close(logits(fdsurgery.load(tmp_path / "saved"), x), logits(model, x))

    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        fdsurgery.save(model, other)
    assert sorted(os.listdir(tmp_path)) == ["other", "saved"], "no scratch folder is left"


def test_a_failed_save_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = CASES["timm resnet18"].settled()
    fdsurgery.convert(model, example_inputs=x)
    fdsurgery.save(model, tmp_path / "saved")
    expected = logits(model, x)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fdsurgery.checkpoint.save_file", full_disk)
    trained_a_little(model, x)
    with pytest.raises(CheckpointError, match="No space left"):
        fdsurgery.save(model, tmp_path / "saved")
    assert os.listdir(tmp_path) == ["saved"]
    torch.testing.assert_close(logits(fdsurgery.load(tmp_path / "saved"), x), expected)


def test_a_source_that_builds_another_model_is_found_on_saving(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", in_chans=1, num_classes=10)
    fdsurgery.convert(model, example_inputs=torch.randn(2, 1, 64, 64))
    with pytest.raises(CheckpointError, match=r"another model .*'conv1.weight' first"):
        fdsurgery.save(model, tmp_path / "saved")
    fdsurgery.save(model, tmp_path / "saved", source=Source("timm", "resnet18", {"in_chans": 1, "num_classes": 10}))
    assert fdsurgery.load(tmp_path / "saved").conv1.in_channels == 1


def test_damaged_saves_are_told_in_one_message(tmp_path: Path) -> None:
    model, x = CASES["timm resnet18"].settled()
    fdsurgery.convert(model, example_inputs=x)
    saved = fdsurgery.save(model, tmp_path / "saved")
    description = json.loads((saved / "fdsurgery.json").read_text())
    weights = (saved / "model.safetensors").read_bytes()

    def expect(message: str, **changes: object) -> None:
        (saved / "fdsurgery.json").write_text(json.dumps({**description, **changes}))
        with pytest.raises(CheckpointError, match=message):
            fdsurgery.load(saved)

    expect("expected format 1, found 7", format=7)
    expect("is damaged", source={"library": "timm"})
    expect("is damaged", layers={"layer1.0.conv1": {"operator": "fdconv", "settings": {"kernel_nums": 3}}})
    expect("has no layer 'layer9'", layers={"layer9": description["layers"]["layer1.0.conv1"]})
    expect("does not fit the model", layers={"layer1.0.conv1": description["layers"]["layer1.0.conv1"]})
    expect("unknown source library 'os'", source={"library": "os", "name": "system", "arguments": {}})
    expect("no model class 'pipeline'", source={"library": "transformers", "name": "pipeline", "arguments": {}})
    for text in ("", "{", "[]", "null"):
        (saved / "fdsurgery.json").write_text(text)
        with pytest.raises(CheckpointError):
            fdsurgery.load(saved)
    (saved / "fdsurgery.json").write_text(json.dumps(description))
    for damaged in (b"", weights[:100], weights[:-1000]):
        (saved / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="does not fit"):
            fdsurgery.load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        fdsurgery.load(saved)
    with pytest.raises(CheckpointError, match="no saved converted model"):
        fdsurgery.load(tmp_path / "nowhere")


def test_a_detector_with_weights_is_built_again_with_its_frozen_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision
    from torchvision.models._api import WeightsEnum
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as builder

    from fdsurgery.sources import build

    torch.manual_seed(0)
    downloaded = builder(weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: downloaded)
    model, source = build("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", pretrained=True)
    frozen = [m for m in model.modules() if isinstance(m, torchvision.ops.FrozenBatchNorm2d)]
    assert frozen and source.arguments == {"frozen_norms": frozen[0].eps}
    fdsurgery.convert(model.backbone, "generic", example_inputs=torch.randn(1, 3, 64, 64), kernel_num=4)
    fdsurgery.save(model, tmp_path / "saved", source=source)
    loaded = fdsurgery.load(tmp_path / "saved")
    images = torch.randn(1, 3, 64, 64)
    for name, expected in model.backbone(images).items():
        torch.testing.assert_close(loaded.backbone(images)[name], expected)
    assert build("torchvision:resnet18", pretrained=False)[1].arguments == {}

"""Checkpoints of the authors' code of the other operators, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from battery import distance, perturb
from torch import nn

import fdsurgery
from fdsurgery.checkpoints import (
    MisfitError,
    WholePlan,
    convert_checkpoint,
    load_official_state_dict,
    load_tensors,
    official_state_dict,
    plan_checkpoint,
)

SMALL: dict[str, dict[str, Any]] = {
    "dcd": {},
    "fadc": {"dilation_rule": "zero"},
    "odconv": {"kernels": 2},
    "kernel_warehouse": {},
}
RESNETS: dict[str, tuple[str, dict[str, Any], int]] = {
    "odconv 1x": ("odconv_resnet", {"kernels": 1}, 28_635_112),
    "odconv 4x": ("odconv_resnet", {"kernels": 4}, 90_670_888),
    "kw 1x": ("kw_resnet", {"ratio": 1}, 28_052_310),
    "kw 4x": ("kw_resnet", {"ratio": 4}, 102_015_144),
    "dcd": ("dcd_resnet", {}, 25_557_032 + 4_049_032),
    "fadc": ("fadc_resnet", {"dilation_rule": "zero"}, 25_557_032 + 926_377),
}
"""Recipe, settings, and parameters of a whole ResNet-50. The authors' DCD net has a dynamic classifier besides."""


def converted(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(3)
    model = timm.create_model("test_resnet").eval()
    fdsurgery.testing.settle_(model, torch.randn(4, 3, 64, 64))
    return perturb(fdsurgery.convert(model, operator=name, **{**SMALL[name], **settings}).eval())


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SMALL)
def test_in_and_out(name: str, tmp_path: Path) -> None:
    model = converted(name)
    theirs = official_state_dict(model)
    assert not any(layer.stored_name in key for layer in fdsurgery.dynamic_layers(model).values() for key in theirs)
    torch.save({"state_dict": {f"module.{key}": value for key, value in theirs.items()}}, tmp_path / "theirs.pth")

    options: dict[str, Any] = {"model": "timm:test_resnet", "settings": SMALL[name]}
    plan = plan_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours", **options)
    assert isinstance(plan, WholePlan) and plan.operator == name and not (tmp_path / "ours").exists()
    convert_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours", **options)
    loaded = fdsurgery.load(tmp_path / "ours").eval()
    assert distance(loaded(X), model(X)) < 1e-6

    convert_checkpoint(tmp_path / "ours", tmp_path / "back.safetensors", to="official")
    back = load_tensors(tmp_path / "back.safetensors")
    assert back.keys() == theirs.keys()
    assert [key for key in back if not torch.equal(back[key], theirs[key])] == []


def test_what_does_not_fit_is_told_before_anything_is_changed(tmp_path: Path) -> None:
    model = converted("dcd")
    theirs = official_state_dict(model)
    torch.save(theirs, tmp_path / "theirs.pth")
    with pytest.raises(fdsurgery.CheckpointError, match=r"a checkpoint of dcd.*give --model SPEC"):
        plan_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours")
    with pytest.raises(fdsurgery.CheckpointError, match="is a folder; give one"):
        plan_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours.pth", model="timm:test_resnet")
    with pytest.raises(MisfitError, match="wrong shape"):
        plan_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours", model="timm:test_resnet", settings={"dim": 4})
    broken = {key: value for key, value in theirs.items() if key != "layer1.0.conv1.p.weight"} | {"more": torch.ones(1)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MisfitError, match=r"1 missing, 1 unexpected(.|\n)*layer1.0.conv1.p.weight"):
        load_official_state_dict(model, broken)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(fdsurgery.CheckpointError, match="no dynamic layers"):
        official_state_dict(timm.create_model("test_resnet"))
    with pytest.raises(fdsurgery.CheckpointError, match="must be a file that ends in"):
        fdsurgery.save(model, tmp_path / "saved")
        convert_checkpoint(tmp_path / "saved", tmp_path / "folder", to="official")
    assert not (tmp_path / "folder").exists() and not (tmp_path / "ours").exists()


@pytest.mark.long
@pytest.mark.parametrize("case", RESNETS)
def test_resnet50(case: str, tmp_path: Path) -> None:
    recipe, settings, parameters = RESNETS[case]
    torch.manual_seed(3)
    model = timm.create_model("resnet50").eval()
    fdsurgery.testing.settle_(model, torch.randn(4, 3, 64, 64))
    model = perturb(fdsurgery.convert(model, recipe, **settings).eval(), 0.05)
    theirs = official_state_dict(model)
    buffers = ("running_mean", "running_var", "num_batches_tracked", "dilated_offset")
    assert sum(one.numel() for name, one in theirs.items() if not name.endswith(buffers)) == parameters
    torch.save(theirs, tmp_path / "theirs.pth")
    convert_checkpoint(
        tmp_path / "theirs.pth", tmp_path / "ours", model="timm:resnet50", recipe=recipe, settings=settings
    )
    loaded = fdsurgery.load(tmp_path / "ours").eval()
    with torch.no_grad():
        assert distance(loaded(X), model(X)) < 1e-5
    convert_checkpoint(tmp_path / "ours", tmp_path / "back.safetensors", to="official")
    back = load_tensors(tmp_path / "back.safetensors")
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)


def test_a_trained_layer_is_read_that_no_conversion_would_make(tmp_path: Path) -> None:
    """The authors' own rule for the dilation, and their padding, are no neutral start, and are read all the same."""
    settings = {"dilation_rule": "abs", "padding": "repeat"}
    with pytest.raises(fdsurgery.PlanError, match="no gradient where it starts"):
        fdsurgery.convert(timm.create_model("test_resnet"), operator="fadc", **settings)
    theirs = official_state_dict(converted("fadc"))
    torch.save(theirs, tmp_path / "theirs.pth")
    options: dict[str, Any] = {"model": "timm:test_resnet", "operator": "fadc", "settings": settings}
    convert_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours", **options)
    loaded = fdsurgery.load(tmp_path / "ours")
    assert all(layer.settings["padding"] == "repeat" for layer in fdsurgery.dynamic_layers(loaded).values())
    assert all(torch.equal(value, theirs[key]) for key, value in official_state_dict(loaded).items())

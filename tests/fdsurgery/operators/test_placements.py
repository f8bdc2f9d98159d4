"""CondConv, DY-Conv, ODConv and KernelWarehouse where they are in a ResNet-50: the numbers that were published."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision

import fdsurgery

PLAIN = 25_557_032
PLACED: dict[str, tuple[str, dict[str, Any], int, int, dict[str, int]]] = {
    "CondConv 8x": ("condconv_resnet", {}, 9, 89_981_000, {"routing": 65_536, "mixing": 102_760_448}),
    "DY-Conv 4x": ("dyconv_resnet", {}, 52, 75_338_144, {"heads": 5_001_424, "mixing": 93_782_016}),
    "ODConv 1x": ("odconv_resnet", {"kernels": 1}, 48, 3_078_080, {"heads": 3_031_728}),
    "ODConv 4x": ("odconv_resnet", {"kernels": 4}, 48, 65_113_856, {"heads": 3_037_488, "mixing": 82_706_432}),
    "KW 1x": ("kw_resnet", {}, 50, 2_495_278, {"attention": 2_452_192, "mixing": 2_035_355_648}),
    "KW 4x": ("kw_resnet", {"ratio": 4}, 50, 76_458_112, {"attention": 6_021_040, "mixing": 8_141_422_592}),
}
"""Recipe, settings, layers, parameters added, and multiply-adds that no size of an image changes."""


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(timm.models.resnet50, id="timm"),
        pytest.param(torchvision.models.resnet50, id="torchvision", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("case", PLACED)
def test_a_resnet50_gains_what_was_published(case: str, build: Any) -> None:
    recipe, settings, layers, added, costs = PLACED[case]
    with torch.device("meta"):
        model = build()
        plan = fdsurgery.plan(model, recipe, example_inputs=torch.empty(1, 3, 800, 1280), **settings)
        assert len(plan.swaps) == layers and plan.parameters_added == added
        counted: Counter[str] = Counter()
        for decision in plan.swaps:
            counted.update(decision.multiply_adds_by_component)
        gates = counted.pop("gates", 0)
        assert counted == costs and bool(gates) == (recipe == "odconv_resnet")
        fdsurgery.apply(plan, model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PLAIN + added
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"+{added:,} |" in page


def test_placements_are_found_by_name_only() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
        assert fdsurgery.plan(model).recipe == "resnet"
        kept = fdsurgery.plan(model, "odconv_resnet").kept
        assert {"the authors leave the stem static", "the authors leave the downsample branch static"} < {
            decision.reason for decision in kept
        }
        detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    swapped = fdsurgery.plan(
        detector.backbone, "dyconv_resnet", example_inputs=torch.empty(1, 3, 64, 64, device="meta")
    )
    assert swapped.parameters_added == 75_338_144
    with pytest.raises(fdsurgery.RecipeError, match="'experts' is no setting of odconv"):
        fdsurgery.plan(model, "odconv_resnet", experts=8)

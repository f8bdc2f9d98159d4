"""A sample of `python -m benchmarks.zoo`, so that the sweep itself goes on working."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from releases import since

from benchmarks import tracers
from benchmarks.zoo import TIMM, Raw, measure, run, table


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """`measure` sets what suits a process of its own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "spec",
    [
        "timm:test_vit",
        pytest.param("timm:test_efficientnet", marks=pytest.mark.long),
        pytest.param("transformers:SegformerForSemanticSegmentation", marks=pytest.mark.long),
    ],
)
def test_a_model_is_measured(spec: str) -> None:
    row = measure(spec)
    assert row["status"] == "converted" and row["tracer"] == "meta" and row["swaps"] > 0
    assert row["error"] < 1e-5 and row["gradients"] == "finite" and row["compile"] == "yes"
    assert row.get("features_only", "agrees") in ("agrees", "timm has none")
    line = next(line for line in table([row]).splitlines() if spec in line)
    assert f"| {row['recipe']} | {row['swaps']} |" in line and "1 stem" in line


def test_what_fails_is_a_row_too() -> None:
    row = run("zoo", "timm:no_such_model", seconds=60)
    assert row["status"] == "failed" and "no_such_model" in row["reason"]
    assert run("zoo", "timm:resnet18", seconds=0.01)["status"] == "out of time"
    assert "failed" in table([row])


def test_a_detector_is_compared_where_its_head_writes() -> None:
    import torchvision

    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    scores, boxes = Raw(model.eval())([torch.rand(3, 64, 64)])[0]
    assert len(scores) == len(boxes) > 0


@since("timm", "1.0.31", "may lack models of the list, which is of that release")
def test_every_timm_module_has_its_model() -> None:
    import json

    import timm

    known = json.loads(TIMM.read_text(encoding="utf-8"))
    assert set(known.values()) <= set(timm.list_models())
    assert len(known) >= 90


@pytest.mark.long
def test_tracers_are_compared() -> None:
    row = tracers.measure("timm:coat_tiny")  # it holds modules under several names
    assert (row["record"], row["sites"], row["fx"], row["timm"], row["export"]) == ("meta", 101, "same", "same", "same")
    odd = {"model": "hf:odd", "status": "observed", "record": "real", "fx": "refuses", "export": "other"}
    text = tracers.table([row, odd | {"export_reason": "2 sites differ, a first"}])
    assert "| timm | 1 | 1 | 0 | 1 | 1 | 1 |" in text and "Of 4 graphs, 3 show" in text
    assert "| hf:odd | export | 2 sites differ, a first |" in text

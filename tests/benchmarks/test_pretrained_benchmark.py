"""The bench on pretrained nets: nothing tested on is trained on, rows start alike and can be had again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("skimage")

from benchmarks.pretrained import __main__ as bench
from benchmarks.pretrained import art, grids, report, scenes, training

QUICK = grids.GRIDS["quick"]
LITE, RESNET = QUICK.nets
ROWS = {row.name: row for row in grids.ROWS}
CPU = torch.device("cpu")
NOWHERE = Path("nothing is downloaded")


def test_scenes_are_drawn_from_the_seed() -> None:
    own = art.synthetic()
    one, again, other = (scenes.scenes(own, 3, 64, art.KNOWN, test=False, seed=seed) for seed in (0, 0, 1))
    assert one[0].shape == (3, 3, 64, 64) and one[1].shape == (3, 64, 64)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1]) and not torch.equal(one[0], other[0])
    assert 0 < int(one[1].max()) < own.classes


def test_training_and_testing_share_no_glyph_and_no_photograph() -> None:
    own = art.synthetic()
    for trained, tested in zip(own.identities(False), own.identities(True), strict=True):
        assert len(trained) and len(tested) and not set(trained) & set(tested)
    assert len(own.backgrounds(False)) == len(own.backgrounds(True)) == 1


def test_a_pasted_glyph_is_labelled_where_it_is_opaque() -> None:
    image, labels = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    glyph = np.zeros((32, 32, 4), np.uint8)
    glyph[8:24, 8:24] = 255
    scenes._paste(image, labels, glyph, 5, np.random.default_rng(0), least=0.5, most=0.5)
    assert set(np.unique(labels)) == {0, 5} and 180 < (labels == 5).sum() < 330  # half of its side is opaque, turned
    assert (image[labels == 5] > 80).all() and image[labels == 0].mean() < 10


def test_boundaries_and_intersections() -> None:
    square = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    square[..., 2:10, 2:10] = True
    rim = training.along_boundary(square, 2)
    assert int(rim.sum()) == 64 - 16 and not rim[0, 0, 4:8, 4:8].any()
    whole = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    assert int(training.along_boundary(whole, 1).sum()) == 20, "the image's edge is a boundary"
    both = torch.tensor([[6.0, 1, 0], [12.0, 2, 0]])
    assert training.mean_iou(both) == pytest.approx(50), "a class that is nowhere does not count"


def test_rows_start_alike_and_can_be_had_again() -> None:
    row, steps = ROWS[grids.CONVERTED], 2
    first, again = (training.run(QUICK, RESNET, row, 0, steps, NOWHERE, CPU) for _ in range(2))
    assert {**first, "seconds_per_step": 0} == {**again, "seconds_per_step": 0}
    assert set(first["gates"]) >= {"channel", "filter", "spatial", "kernel", "local", "bands"}
    assert all(0 < moved < 0.5 for moved in first["gates"].values())
    untrained = training.run(QUICK, RESNET, row, 0, 0, NOWHERE, CPU)
    static = training.run(QUICK, RESNET, ROWS["head warmed up alone"], 0, 0, NOWHERE, CPU)
    assert not any(untrained["gates"].values())
    for measure in grids.MEASURES:
        assert untrained[measure] == pytest.approx(static[measure], abs=0.5)
    assert not static["gates"] and static["parameters"] < untrained["parameters"]
    adapted = training.run(QUICK, RESNET, ROWS["static, as many parameters (adapter)"], 0, 0, NOWHERE, CPU)
    assert 1 <= adapted["parameters"] / untrained["parameters"] < 1.001 and adapted["known"] == static["known"]


def test_only_the_late_stages_become_dynamic_and_train() -> None:
    model = training.converted(training.warmed_up(QUICK, LITE, 0, NOWHERE, CPU), LITE.family, {})
    training.warmed_up.cache_clear()
    swapped = [name for name, layer in model.named_modules() if isinstance(layer, training.FDConv2d)]
    assert len(swapped) == 22 and all(name.startswith(("stages.2.", "stages.3.")) for name in swapped)
    frozen = {name.split(".")[1] for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {"0", "1"}


def test_every_row_means_settings_that_there_are() -> None:
    unknown = {row.name: grids.unknown_settings(row) for row in grids.ROWS}
    assert all(not names or names == ["spectrum"] for names in unknown.values())


def test_a_run_goes_on_where_it_was_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pretrained-quick.jsonl"
    training.rows_of(QUICK, RESNET, 0, [grids.STATIC, grids.CONVERTED, grids.TIMED], "cpu", NOWHERE, file)
    with file.open("a") as lines:
        lines.write('{"net": "Res')  # cut short by a kill
    rows = report.read(file)
    assert [row["row"] for row in rows] == [grids.STATIC, grids.CONVERTED, grids.TIMED]
    pace = {row["row"]: row["seconds_per_step"] for row in rows}
    assert rows[2]["steps"] == pytest.approx(2 * pace[grids.CONVERTED] / pace[grids.STATIC], abs=0.6)
    wanted = bench._wanted([RESNET], range(1), [""], rows)
    assert grids.STATIC not in wanted[0, RESNET] and "KSM only" in wanted[0, RESNET]
    assert bench._wanted([RESNET], range(1), [grids.STATIC, "bands"], []) == {(0, RESNET): [grids.STATIC, "bands only"]}
    by = {(row["row"], row["seed"]): row["known"] for row in rows}
    gain = by[grids.CONVERTED, 0] - by[grids.STATIC, 0]
    assert report.gains(rows, grids.CONVERTED, grids.STATIC, "known") == [gain]
    bench.main(["--quick", "--report", "--output", str(tmp_path)])
    text = file.with_suffix(".md").read_text()
    assert "| at equal time |" in text and "| local | bands |" in text
    assert all(json.dumps(row) for row in rows) and str(file.with_suffix(".md")) in capsys.readouterr().out


def test_what_is_compared_with_must_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training.steps_of(ROWS[grids.TIMED], RESNET, 0, []) is None
    assert "needs `static` and `converted`" in capsys.readouterr().out

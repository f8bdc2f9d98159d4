"""The accuracy bench compares like with like: same data, same start, same batches; and its rows can be had again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("skimage")

from benchmarks.accuracy import __main__ as bench
from benchmarks.accuracy import data, maps, training

SMALL = training.Budget(train=24, test=12, batch=6, before=3, after=2, width=16)
CPU = torch.device("cpu")


@pytest.mark.parametrize("task", data.TASKS)
def test_data_is_drawn_from_the_seed(task: str) -> None:
    one, again, other = (data.TASKS[task](seed, 24, 12) for seed in (0, 0, 1))
    assert len(one.train_images) == len(one.train_labels) == 24 and len(one.test_images) == 12
    assert one.train_labels.max() < one.classes and one.dense == (
        one.train_labels.shape[1:] == one.train_images.shape[2:]
    )
    assert torch.equal(one.train_images, again.train_images) and torch.equal(one.test_labels, again.test_labels)
    assert not torch.equal(one.train_images, other.train_images)


def test_training_and_testing_share_no_pixel() -> None:
    for name in data.TEXTURES:
        shape = data.picture(name).shape
        train, test = ({tuple(corner) for corner in data._tiles(shape, part, 0)} for part in ("train", "test"))
        assert train and test and not train & test


def test_a_row_can_be_had_again_and_all_variants_start_alike() -> None:
    variants = {variant.name: variant for variant in training.VARIANTS}
    first = training.run("textures", variants["FDConv"], 0, SMALL, CPU)
    training._pretrained.clear()
    again = training.run("textures", variants["FDConv"], 0, SMALL, CPU)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    static = training.run("textures", variants["static"], 0, SMALL, CPU)
    assert first.before == again.before == static.before
    wider = training.run("textures", variants["static, wider"], 0, SMALL, CPU)
    assert static.parameters < first.parameters <= wider.parameters < 1.15 * first.parameters


def test_only_the_modulation_trains_where_that_is_asked() -> None:
    variant = next(variant for variant in training.VARIANTS if variant.trained == "modulation")
    outcome = training.run("boundaries", variant, 0, SMALL, CPU)
    start, _ = training.pretrained("boundaries", 0, SMALL, SMALL.width, CPU)
    assert torch.equal(outcome.model.stem[0].weight, start.stem[0].weight)
    assert any(parameter.requires_grad for parameter in outcome.model.parameters())


def test_intersection_over_union() -> None:
    class Answers(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(images[:, 0].long(), 3).movedim(-1, 1).float()

    labels = torch.tensor([[[0, 0, 1], [1, 2, 2]]])
    named = torch.tensor([[[[0.0, 1, 1], [1, 2, 0]]]])
    found = training.measure(Answers(), data.Data(named, labels, named, labels, 3))
    assert found == pytest.approx(100 * (1 / 3 + 2 / 3 + 1 / 2) / 3)


def test_maps_that_are_edges_correlate_with_edges() -> None:
    net = training.Net(16, 4, dense=True)
    converted = training.converted(net, data.TASKS["boundaries"](0, 4, 4), {})
    assert all(value != value for value in maps.edge_correlations(converted, CPU)), "neutral maps say nothing"
    image = maps.middle("camera")
    flat, step = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 1
    assert maps.edge_strength(flat).max() == 0 and maps.edge_strength(step)[0, 0, 4].argmax() in (3, 4)
    assert image.shape == (1, 1, maps.SIDE, maps.SIDE)


def test_rows_are_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.GRIDS, "cpu", bench.Grid(SMALL, 2))
    monkeypatch.setattr(bench, "IMAGES", tmp_path)
    file = tmp_path / "accuracy-cpu.jsonl"
    for seed in (0, 1):
        bench.rows_of("cpu", "pictures", seed, ["static", "FDConv"], "cpu", file)
    with file.open("a") as lines:
        lines.write('{"task": "pict')  # cut short by a kill
    rows = bench.read(file)
    assert len(rows) == 4 and all(json.dumps(row) for row in rows)
    by = {(row["variant"], row["seed"]): row["after"] for row in rows}
    assert bench.gains(rows, "pictures", "FDConv") == [by["FDConv", s] - by["static", s] for s in (0, 1)]
    bench.report("cpu", file)
    assert "| FDConv |" in file.with_suffix(".md").read_text() and (tmp_path / "accuracy-cpu.png").exists()

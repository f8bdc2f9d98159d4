"""The demo: what its scenes are made of, what its pictures show, and that it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import fdsurgery
from fdconv import FDConv2d
from fdsurgery.inspect import band_maps


@pytest.fixture(scope="module")
def demo() -> Any:
    for library in ("matplotlib", "skimage", "sklearn", "timm"):
        pytest.importorskip(library)
    import fdsurgery.demo

    return fdsurgery.demo


def test_no_pixel_and_no_digit_is_in_training_and_in_testing(demo: Any) -> None:
    trained, tested = demo.load_material(0)
    for left, right, name in zip(trained.photographs, tested.photographs, demo.PHOTOGRAPHS, strict=True):
        whole = demo._photograph(name)
        assert torch.equal(torch.cat([left, right], dim=2), whole) and right.shape[2] == demo.TEST_SIDE
        assert whole.min() >= 0 and whole.max() < 1 + 1e-5 and left.shape[2] >= demo.TEST_SIDE
    rows = {tuple(row) for row in torch.cat([trained.digits, tested.digits]).flatten(1).tolist()}
    assert len(trained.digits) + len(tested.digits) == len(rows) == 1797, "no digit is there twice"


def test_masks_are_where_the_ink_is(demo: Any) -> None:
    grey = demo.Material([torch.full((3, 96, 96), 0.5)], torch.ones(1, 8, 8))
    scenes = demo.draw_scenes(grey, 8, 64, np.random.default_rng(0))
    changed = (scenes.images - 0.5).abs().amax(1) > 0
    assert torch.equal(changed, scenes.masks == 1), "a digit that is all ink covers all that it is given"
    assert 0.1 < scenes.masks.double().mean() < 0.5 and scenes.masks.shape == (8, 64, 64)
    again = demo.draw_scenes(grey, 8, 64, np.random.default_rng(0))
    assert torch.equal(scenes.images, again.images)


class Fixed(nn.Module):
    """Names ink where the red channel is above a half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], dim=1)


def test_the_score_is_intersection_over_union(demo: Any) -> None:
    images = torch.zeros(1, 3, 4, 4)
    images[0, 0, :2] = 1  # 8 pixels named
    masks = torch.zeros(1, 4, 4, dtype=torch.int64)
    masks[0, 1:] = 1  # 12 are ink, of which 4 are named
    assert demo.ink_iou(Fixed(), demo.Scenes(images, masks)) == pytest.approx(4 / 16)


def test_overlays_tell_found_missed_and_wrong_apart(demo: Any) -> None:
    ink, named = torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, True, False]])
    picture = demo._overlay(torch.zeros(3, 1, 4), ink, named)
    expected = [*demo.COLOURS.values(), (0.5, 0.5, 0.5)]
    torch.testing.assert_close(picture[0], torch.tensor(expected))


def test_a_missing_package_is_told_before_anything_is_done(demo: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(fdsurgery.SurgeryError, match=r"pip install 'fdsurgery\[demo\]'"):
        demo.run(tmp_path / "out", steps=1, seed=0, console=Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_it_runs_and_draws(demo: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(demo, "PRETRAINING_STEPS", 2)
    monkeypatch.setattr(demo, "TEST_SCENES", 4)
    threads = torch.get_num_threads()
    result = demo.run(tmp_path / "demo", steps=2, seed=0, console=Console(quiet=True))
    assert (tmp_path / "demo" / "scenes.png").stat().st_size > 50_000
    assert torch.get_num_threads() == threads
    assert set(result) == {"static", "converted"} and [*result["static"]] == [*result["converted"]] == [0, 1, 2]
    assert result["static"][0] == pytest.approx(result["converted"][0], abs=1e-3), "conversion changes no prediction"


@pytest.mark.long
def test_both_learn(demo: Any, tmp_path: Path) -> None:
    result = demo.run(tmp_path, steps=40, seed=0, console=Console(quiet=True))
    assert min(result["static"][40], result["converted"][40]) > 0.5


@pytest.mark.parametrize("channels", [4, 96])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_band_maps_are_the_factors_that_the_layer_uses(channels: int, groups: int, activation: str) -> None:
    """Rebuilt from the maps and low-passes of the input, in the paper's own sum, is what the layer's FBM gives."""
    from fdconv.low_pass import low_passes

    torch.manual_seed(0)
    middle = nn.Conv2d(channels, channels, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, channels, 1), middle, nn.Conv2d(channels, 2, 1)).double()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    settings = {"band_groups": groups, "band_activation": activation}
    fdsurgery.convert(model, "generic", example_inputs=x, **settings)
    layer = model[1]
    assert isinstance(layer, FDConv2d) and layer.FBM is not None
    for parameter in layer.FBM.parameters():
        nn.init.normal_(parameter)
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    maps = band_maps(model, x)
    assert [*maps] == ["1"] and maps["1"].shape == (2, groups, 3, 12, 12)
    assert model.training and not maps["1"].requires_grad
    inputs = seen[0]
    low = low_passes(inputs, layer.config.bands)
    bands = [high - next_ for high, next_ in zip([inputs, *low[:-1]], low, strict=True)]
    expected = low[-1]
    for index, band in enumerate(bands):
        expected = expected + maps["1"][:, :, index].repeat_interleave(channels // groups, 1) * band
    torch.testing.assert_close(layer.FBM(inputs), expected)


def test_band_maps_of_a_fresh_conversion_are_neutral() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(1, 3, 8, 8)
    assert band_maps(model, x) == {}
    fdsurgery.convert(model, "generic", example_inputs=x)
    assert torch.equal(band_maps(model, x)["1"], torch.ones(1, 1, 3, 8, 8)) and not model.training

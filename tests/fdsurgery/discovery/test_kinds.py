"""The table of layer kinds: what a row says of its layers is what torch's layers are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fdsurgery
from fdsurgery.discovery.kinds import CONV, KINDS, LINEAR, LayerKind, convolves, kind_named, kind_of, known_kind

CONV1D = replace(CONV, plain=nn.Conv1d, axes=1)
CONV3D = replace(CONV, plain=nn.Conv3d, axes=3)
"""Rows that the table does not have yet."""

LAYERS: dict[str, tuple[LayerKind, Any, tuple[int, ...]]] = {
    "linear": (LINEAR, nn.Linear(6, 4), (2, 5, 6)),
    "linear on maps": (LINEAR, nn.Linear(6, 4, bias=False), (2, 5, 7, 6)),
    "convolution": (CONV, nn.Conv2d(6, 4, (1, 3), (1, 2), (0, 1), padding_mode="circular"), (2, 6, 5, 7)),
    "grouped": (CONV, nn.Conv2d(6, 4, 3, padding="same", dilation=2, groups=2), (2, 6, 9, 7)),
    "depthwise": (CONV, nn.Conv2d(6, 12, 3, groups=6, bias=False), (2, 6, 5, 7)),
    "pointwise": (CONV, nn.Conv2d(6, 4, 1), (2, 6, 5, 7)),
    "1-D": (CONV1D, nn.Conv1d(6, 4, 3, 2, 1, groups=2), (2, 6, 9)),
    "3-D": (CONV3D, nn.Conv3d(6, 4, (1, 3, 3), padding=1), (2, 6, 5, 7, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_reads_its_layers(name: str) -> None:
    kind, layer, shape = LAYERS[name]
    assert kind.weight_shape(layer) == layer.weight.shape
    x = torch.randn(shape)
    y = layer(x)
    in_axis, out_axis = (x.shape.index(6), 1 if kind.convolves else -1)
    assert kind.channels(layer) == (x.shape[in_axis], y.shape[out_axis])
    positions = [axis for axis in range(1, x.dim()) if axis != in_axis]
    assert list(kind.position_axes(x.dim())) == positions
    assert kind.positions(x.shape) == x[0].numel() // 6 and kind.positions(y.shape) == y[0].numel() // y.shape[out_axis]
    assert kind.sample_axes == (x.dim() - 1 if kind.convolves else 1)
    bias = torch.randn(y.shape[out_axis])
    assert torch.equal((y + kind.along_outputs(bias)).movedim(out_axis, -1), y.movedim(out_axis, -1) + bias)
    assert kind.is_product(layer) == (name in ("linear", "linear on maps", "pointwise"))
    assert kind.is_depthwise(layer) == (name == "depthwise")


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_made_like_another_one(name: str) -> None:
    kind, layer, shape = LAYERS[name]
    made = kind.make(*kind.channels(layer), bias=layer.bias is not None, **kind.geometry(layer))
    assert repr(made) == repr(layer) and all(parameter.is_meta for parameter in made.parameters())
    made.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(shape)
    assert torch.equal(made(x), layer(x))


def test_one_position_is_seen_whatever_the_batch() -> None:
    assert CONV.sees_one_position((2, 6, 1, 1), 2) and not CONV.sees_one_position((2, 6, 1, 2), 2)
    assert LINEAR.sees_one_position((2, 6), 2) and LINEAR.sees_one_position((2, 1, 6), 2)
    assert not LINEAR.sees_one_position((2, 3, 6), 2) and not LINEAR.sees_one_position((6, 6), 2)


def test_classes_and_names_tell_the_kind() -> None:
    class Own(nn.Conv2d):
        pass

    assert kind_of(Own(3, 4, 1)) is known_kind(nn.LazyConv2d(4, 1)) is CONV
    assert kind_of(nn.modules.linear.NonDynamicallyQuantizableLinear(3, 4)) is LINEAR
    for other in (nn.Conv1d(3, 4, 1), nn.ConvTranspose2d(3, 4, 1), nn.Bilinear(3, 4, 5), nn.ReLU(), None):
        assert kind_of(other) is None and not convolves(other)
    with pytest.raises(AssertionError, match="a ReLU is no layer that can be swapped"):
        known_kind(nn.ReLU())
    assert [kind_named(kind.name) for kind in KINDS] == list(KINDS)
    assert convolves(Own(3, 4, 1)) and not convolves(nn.Linear(3, 4))


def test_nothing_else_asks_for_the_class_of_a_layer() -> None:
    ladder = re.compile(r"isinstance\([^()]*(\([^()]*\))?[^()]*nn\.(Conv2d|Linear)\b")
    root = Path(fdsurgery.__file__).parent
    files = [file for file in root.rglob("*.py") if "operators" not in file.relative_to(root).parts]
    files.remove(root / "inputs.py")  # looks for what reads an image
    found = [
        f"{file.relative_to(root)}: {line.strip()}"
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if ladder.search(line)
    ]
    assert not found, "ask discovery/kinds.py"

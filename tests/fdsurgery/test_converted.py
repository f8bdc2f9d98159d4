"""What a converted model holds, seen from outside."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fdsurgery
from fdconv import FDConv2d, FDLinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.module
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.module(x).relu()).relu()
        return self.fc(x.movedim(1, -1)).movedim(-1, 1)


def converted() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), Block(), nn.Conv2d(8, 4, 3))
    recipe = fdsurgery.recipe.parse_recipe("swap: [{where: {name: '[12].*'}, with: {kernel_num: 4}}]")
    return fdsurgery.convert(model, recipe, example_inputs=torch.randn(2, 3, 12, 12))


NAMES = ["1.module", "1.fc", "2.module", "2.fc"]


def test_dynamic_layers_by_name_each_once() -> None:
    model = converted()
    layers = fdsurgery.dynamic_layers(model)
    assert list(layers) == NAMES
    assert all(layer is model.get_submodule(name) for name, layer in layers.items())
    assert [type(layer) for layer in layers.values()] == [FDConv2d, FDLinear] * 2
    assert fdsurgery.dynamic_layers(layers["1.fc"]) == {"": layers["1.fc"]}
    assert fdsurgery.dynamic_layers(fdsurgery.restore(model)) == {}


def test_dynamic_layers_are_seen_through_wrappers(tmp_path: Path) -> None:
    model = converted()
    layers = fdsurgery.dynamic_layers(model)
    assert fdsurgery.dynamic_layers(torch.compile(model)) == layers
    assert fdsurgery.dynamic_layers(nn.DataParallel(model)) == layers
    average = torch.optim.swa_utils.AveragedModel(model)
    assert list(fdsurgery.dynamic_layers(average)) == NAMES
    assert fdsurgery.dynamic_layers(average)["1.fc"] is average.module[1].fc
    torch.distributed.init_process_group("gloo", (tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    try:
        assert fdsurgery.dynamic_layers(torch.compile(nn.parallel.DistributedDataParallel(model))) == layers
    finally:
        torch.distributed.destroy_process_group()
    in_parts = copy.copy(model)
    in_parts._modules = {**model._modules, "1": torch.compile(model[1])}
    assert fdsurgery.dynamic_layers(in_parts) == layers, "and where a part is compiled"
    model[1].compile()
    assert fdsurgery.dynamic_layers(model) == layers


def test_looking_at_layers_needs_no_import_of_its_own() -> None:
    code = (
        "import sys, fdsurgery; fdsurgery.inspect.band_maps, fdsurgery.inspect.kernel_response, fdsurgery.testing.settle_; "
        "assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not hasattr(fdsurgery, "settle_")


@pytest.mark.parametrize("name", ["plan", "sites", "convert"])
def test_tracers_are_no_option_of_users(name: str) -> None:
    with pytest.raises((TypeError, fdsurgery.RecipeError), match="tracer"):
        getattr(fdsurgery, name)(nn.Conv2d(3, 3, 3), tracer="export")

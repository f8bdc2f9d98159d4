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


def test_parameters_are_counted_as_peft_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    model = converted()
    everything = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(layer.dft_weight.numel() + 8 for layer in fdsurgery.dynamic_layers(model).values())
    plain = sum(layer.weight.numel() + len(layer.bias) for layer in (model[0], model[3]))
    modulation = everything - stored - plain
    count = fdsurgery.count_parameters(model)
    assert (count.all, count.trainable) == (everything, everything)
    assert (count.modulation, count.trainable_modulation) == (modulation, modulation) and modulation > 0
    fdsurgery.freeze(model, ["2.*", "3.*"])
    count = fdsurgery.count_parameters(nn.DataParallel(model))
    half = stored // 2 + modulation // 2  # the two blocks are alike
    assert count.trainable == half + model[3].weight.numel() + 4
    assert (count.all, count.modulation, count.trainable_modulation) == (everything, modulation, modulation // 2)
    assert fdsurgery.print_trainable_parameters(model) is None  # type: ignore[func-returns-value]
    assert capsys.readouterr().out == (
        f"trainable params: {count.trainable:,} || all params: {everything:,} || "
        f"trainable%: {100 * count.trainable / everything:.4f} || "
        f"modulation params: {modulation:,}, of which {modulation // 2:,} trainable\n"
    )


def test_a_plain_model_and_an_empty_one_are_counted_too() -> None:
    assert str(fdsurgery.count_parameters(nn.Linear(4, 4))).startswith("trainable params: 20 || all params: 20 || ")
    assert "trainable%: 0.0000 || modulation params: 0, of which 0 trainable" in str(
        fdsurgery.count_parameters(nn.ReLU())
    )


def test_looking_at_layers_needs_no_import_of_its_own() -> None:
    code = (
        "import sys, fdsurgery; fdsurgery.inspect.band_maps, fdsurgery.inspect.kernel_response; "
        "fdsurgery.testing.settle_; assert 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "settle_" not in fdsurgery.__all__


@pytest.mark.parametrize("name", ["plan", "sites", "convert"])
def test_tracers_are_no_option_of_users(name: str) -> None:
    with pytest.raises((TypeError, fdsurgery.RecipeError), match="tracer"):
        getattr(fdsurgery, name)(nn.Conv2d(3, 3, 3), tracer="export")


def test_earlier_names_are_told_and_serve() -> None:
    with pytest.warns(DeprecationWarning, match=r"now fdsurgery\.testing\.settle_"):
        assert fdsurgery.settle_ is fdsurgery.testing.settle_
    with pytest.warns(DeprecationWarning, match=r"now fdsurgery\.ModelSource"):
        assert fdsurgery.Source is fdsurgery.ModelSource
    with pytest.raises(AttributeError, match="no attribute 'settle'"):
        _ = fdsurgery.settle

"""An operator of somebody else, entered in `OPERATORS` and nowhere else: its layers are dynamic layers everywhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fdsurgery
from fdsurgery.checkpoints import convert_checkpoint
from fdsurgery.operators import register
from fdsurgery.recipe import parse_recipe
from fdsurgery.recipe.schema import json_schema

TEXT = "swap: [{where: {role: spatial, kernel_size: 3}, operator: mixed, with: {k: 2}}]\n"


class MixedConv2d(nn.Conv2d):
    """Mixes k kernels for each sample; as the plain layer while they are equal."""

    def __init__(self, conv: nn.Conv2d, k: int) -> None:
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(conv, name))
        self.kernels = nn.Parameter(conv.weight.detach().unsqueeze(0).repeat(k, 1, 1, 1, 1))
        self.gate = nn.Parameter(torch.zeros(k, conv.in_channels, device=conv.weight.device, dtype=conv.weight.dtype))
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        self.train(conv.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.kernels.mean(0)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.softmax(x.mean((2, 3)) @ self.gate.T, 1)
        outputs = [self._conv_forward(x, kernel, self.bias) for kernel in self.kernels]
        return sum(gate.view(-1, 1, 1, 1) * output for gate, output in zip(gates.T, outputs, strict=True))


class MixedOperator(fdsurgery.Operator):
    name = "mixed"

    def settings(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"k": 4, **values}

    def refusal(self, site: Any, settings: dict[str, Any]) -> str | None:
        return None if site.kind == "conv" else "it takes convolutions"

    def replace(self, layer: Any, settings: dict[str, Any]) -> nn.Module:
        return MixedConv2d(layer, settings["k"])

    def owns(self, layer: nn.Module) -> bool:
        return isinstance(layer, MixedConv2d)

    def settings_of(self, layer: Any) -> dict[str, Any]:
        return {"k": len(layer.kernels)}

    def restore(self, layer: Any) -> nn.Module:
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
        )
        plain.weight.data.copy_(layer.weight)
        if layer.bias is not None:
            plain.bias.data.copy_(layer.bias)
        return plain


@pytest.fixture(autouse=True)
def entered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fdsurgery.operators.operators()  # those of others, before ours
    monkeypatch.setattr(register, "_operators", dict(register._operators))
    fdsurgery.register_operator(MixedOperator())
    yield


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    before = fdsurgery.testing.settle_(timm.create_model("test_resnet", num_classes=10), x)
    return before, fdsurgery.convert(copy.deepcopy(before), parse_recipe(TEXT), example_inputs=x), x


def test_it_is_found_verified_and_told_as_dynamic(models: tuple[nn.Module, nn.Module, Tensor]) -> None:
    before, after, x = models
    checked = fdsurgery.verify(before, after, x)
    assert checked.ok and len(checked.layers) == 9
    assert {site.obstacle for site in fdsurgery.sites(after) if site.layer_class == "MixedConv2d"} == {
        "it is dynamic already"
    }
    with torch.no_grad():
        after.layer4[0].conv1.kernels.mul_(3)
    assert not fdsurgery.verify(before, after, x).ok


def test_a_plan_claims_no_cost_that_was_not_counted(models: tuple[nn.Module, nn.Module, Tensor]) -> None:
    summary = fdsurgery.plan(models[0], parse_recipe(TEXT)).summary()
    assert "multiply-adds not counted for mixed" in summary and "+0.00" not in summary


def test_fine_tuning_knows_its_parameters(models: tuple[nn.Module, nn.Module, Tensor]) -> None:
    before, after, _ = models
    trained = fdsurgery.freeze(copy.deepcopy(after), "mixed")
    assert len(trained) == 18 and all(name.rpartition(".")[2] in ("kernels", "gate") for name in trained)
    with pytest.raises(fdsurgery.FineTuningError, match="an operator that does not tell which parameters that is"):
        fdsurgery.freeze(after, "modulation")

    model = copy.deepcopy(before)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    parameters = dict(model.named_parameters())
    fdsurgery.convert(model, parse_recipe(TEXT))
    fdsurgery.optimizer_after_surgery(optimizer, model, parameters)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(model.parameters())

    def rates(of: nn.Module) -> dict[str, float]:
        names = {parameter: name for name, parameter in of.named_parameters()}
        groups = fdsurgery.param_groups(of, 1.0, 0.05, layer_decay=0.5)
        return {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}

    plain = rates(before)
    assert all(
        rate == plain[name.replace(".kernels", ".weight").replace(".gate", ".weight")]
        for name, rate in rates(after).items()
    )


def test_inference_and_the_way_back(models: tuple[nn.Module, nn.Module, Tensor]) -> None:
    before, after, x = models
    fast = fdsurgery.compile_for_inference(after)
    assert torch.equal(fast(x), after(x)) and not fast(x).requires_grad
    assert fdsurgery.verify(before, fdsurgery.restore(after), x).ok


def test_checkpoints_are_converted_on_disk(models: tuple[nn.Module, nn.Module, Tensor], tmp_path: Path) -> None:
    before, _, x = models
    torch.save(before.state_dict(), tmp_path / "plain.pth")
    arguments: Any = {"model": "timm:test_resnet", "recipe": parse_recipe(TEXT)}
    convert_checkpoint(tmp_path / "plain.pth", tmp_path / "out", **arguments)
    assert fdsurgery.verify(before, fdsurgery.load(tmp_path / "out"), x).ok
    with pytest.raises(fdsurgery.CheckpointError, match="no form of the authors' is known for layers of 'mixed'"):
        convert_checkpoint(tmp_path / "plain.pth", tmp_path / "official.pth", to="official", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain.pth"]


def test_timm_reads_its_weights(tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text(TEXT)
    arguments = {"num_classes": 10, "recipe": str(tmp_path / "mixed.yaml")}
    model = timm.create_model("test_resnet.fdconv", **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "saved.pth")
    again = timm.create_model(
        "test_resnet.fdconv", **arguments, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "saved.pth")}
    )
    features = [one.eval().forward_features(torch.ones(1, 3, 64, 64)) for one in (model, again)]
    assert torch.equal(*features), "all but the classifier, which timm leaves out for other classes"
    half = {name: value for name, value in model.state_dict().items() if "layer4.0.conv1" not in name}
    half["layer4.0.conv1.weight"] = torch.zeros(96, 192, 3, 3)
    with pytest.raises(RuntimeError, match="converted by another recipe"):
        again.load_state_dict(half)


def test_editors_know_its_settings() -> None:
    known = json_schema()["$defs"]["SwapRule"]["properties"]["with"]["properties"]
    assert known["k"] == {"description": "mixed: default 4"} and "kernel_num" in known

"""Converted networks of Ultralytics: its trainer is refused and not let drop the dynamic layers.

Ultralytics need not be installed: a stand-in shows what is guarded; the library itself, that it has what is guarded.
"""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fdsurgery
from fdsurgery.errors import UnsupportedModelError
from fdsurgery.integrations.ultralytics import guards, library
from fdsurgery.operators import operator_of
from fdsurgery.recipe import parse_recipe

SPATIAL = parse_recipe("swap: [{where: {kernel_size: 3}}]")


def dynamic(model: nn.Module) -> int:
    return sum(operator_of(layer) is not None for layer in model.modules())


class Network(nn.Sequential):
    """Copies what has the same name and shape, as Ultralytics' networks do."""

    def load(self, weights: Any) -> int:
        given = weights["model"] if isinstance(weights, dict) else weights
        own = self.state_dict()
        same = {name: value for name, value in given.state_dict().items() if name in own}
        self.load_state_dict(same, strict=False)
        return len(same)


def network() -> Network:
    return Network(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


class Yolo(nn.Module):
    """Holds a network, and has a `train` that is none of torch's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> str:
        return "results"

    def train(self, trainer: Any = None, **kwargs: Any) -> str:  # type: ignore[override]
        return "trained"

    def tune(self, **kwargs: Any) -> str:
        return "tuned"


@pytest.fixture
def stand_in() -> types.SimpleNamespace:
    """The stand-in's classes, guarded as Ultralytics' own are."""
    kind = type("Yolo", (Yolo,), {"train": Yolo.train, "tune": Yolo.tune, "__module__": library.ENGINE})
    base = type("Network", (Network,), {"load": Network.load})
    engine, tasks = types.ModuleType(library.ENGINE), types.ModuleType(library.TASKS)
    engine.Model, tasks.BaseModel = kind, base  # type: ignore[attr-defined]
    for _ in range(2):  # a second time does nothing
        guards.guard_engine(engine)
        guards.guard_tasks(tasks)
    return types.SimpleNamespace(Model=kind, BaseModel=base)


def test_training_a_converted_network_is_refused_and_a_plain_one_trains(stand_in: types.SimpleNamespace) -> None:
    yolo = stand_in.Model(network())
    assert (yolo.train(data="x"), yolo.tune()) == ("trained", "tuned")
    fdsurgery.convert(yolo.model, SPATIAL, example_inputs=torch.randn(2, 3, 16, 16))
    for verb in (yolo.train, yolo.tune):
        with pytest.raises(UnsupportedModelError, match=r"2 dynamic layers would be lost.*loop of your own"):
            verb(data="x")
    assert dynamic(yolo.model) == 2
    fdsurgery.restore(yolo.model)
    assert yolo.train() == "trained"
    assert stand_in.Model("exported.onnx").train() == "trained", "what is no module is left to the library"


def test_copying_weights_drops_no_dynamic_layer(stand_in: types.SimpleNamespace) -> None:
    x = torch.randn(2, 3, 16, 16)
    plain = stand_in.BaseModel(*network())
    converted = fdsurgery.convert(copy.deepcopy(plain), SPATIAL, example_inputs=x)
    assert plain.load(copy.deepcopy(plain)) == 4
    for into, source in ((plain, converted), (plain, {"model": converted}), (converted, plain)):
        state = copy.deepcopy(into.state_dict())
        with pytest.raises(UnsupportedModelError, match="2 layers are dynamic in only one of the two networks, '0'"):
            into.load(source)
        assert all(torch.equal(value, state[name]) for name, value in into.state_dict().items())
    twin = copy.deepcopy(converted)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    converted.load(twin)
    assert torch.equal(converted(x), twin(x))


def test_the_wrapper_stands_for_its_network(stand_in: types.SimpleNamespace) -> None:
    x = torch.randn(2, 3, 16, 16)
    yolo = stand_in.Model(network())
    before = copy.deepcopy(yolo.model)
    plan = fdsurgery.plan(yolo, SPATIAL, example_inputs=x)
    assert [decision.site.name for decision in plan.swaps] == ["0", "2"]
    assert fdsurgery.apply(plan, yolo) is yolo and dynamic(yolo.model) == 2
    assert fdsurgery.verify(before, yolo.model, x).ok
    assert fdsurgery.restore(yolo) is yolo and dynamic(yolo.model) == 0
    assert fdsurgery.convert(yolo, SPATIAL, example_inputs=x) is yolo and dynamic(yolo.model) == 2
    with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module, not str"):
        fdsurgery.plan(stand_in.Model("exported.onnx"))


def test_a_release_without_what_is_guarded_is_told() -> None:
    with pytest.warns(UserWarning, match=r"has no Model\.(train|tune) in this release.*loop of your own"):
        guards.guard_engine(types.ModuleType(library.ENGINE))


def test_ultralytics_itself_is_guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ultralytics = pytest.importorskip("ultralytics")
    from ultralytics.cfg import get_cfg

    yolo = ultralytics.YOLO("yolov8n.yaml")
    plain = copy.deepcopy(yolo.model)
    assert fdsurgery.plan(yolo).swaps == fdsurgery.plan(yolo.model).swaps != ()
    fdsurgery.convert(yolo)
    count = dynamic(yolo.model)
    assert count > 40
    for verb in (yolo.train, yolo.tune):
        with pytest.raises(UnsupportedModelError, match=f"this one's {count} dynamic layers would be lost"):
            verb(data="coco8.yaml", epochs=1)
    for into, source in ((yolo.model, plain), (plain, yolo.model)):
        with pytest.raises(UnsupportedModelError, match="are dynamic in only one of the two networks"):
            into.load(source)
    assert dynamic(yolo.model) == count

    # What the message recommends.
    model = yolo.model.train()
    model.args = get_cfg()
    optimizer = torch.optim.AdamW(fdsurgery.param_groups(model, lr=1e-3, weight_decay=0.01))
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.6, 0.2, 0.3]])
    batch: dict[str, Any] = {"img": torch.rand(2, 3, 64, 64), "cls": torch.zeros(2, 1), "bboxes": boxes}
    batch["batch_idx"] = torch.arange(2.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = model(batch)[0].sum()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any("KSM" in name for name in moved) and any("dft_weight" in name for name in moved)

"""Schedules of dynamic layers, by hand and by the callbacks of trainers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import converted, images, plain
from torch import Tensor, nn

import fdsurgery
from fdsurgery.schedules import steps_of


def temperatures(model: nn.Module) -> set[float]:
    return {float(value) for name, value in model.named_buffers() if name.endswith("temperature")}


def test_a_schedule_falls_evenly_and_stays_at_its_end() -> None:
    model = converted("dyconv")
    count = len(fdsurgery.dynamic_layers(model))
    assert temperatures(model) == {1.0}, "nothing is needed after a conversion"
    for step, expected in ((0, 30.0), (5, 15.5), (10, 1.0), (11, 1.0)):
        assert fdsurgery.schedule(model, step, 10) == count
        assert list(temperatures(model)) == [pytest.approx(expected)]


def test_it_is_saved(tmp_path: Path) -> None:
    model = converted("dyconv")
    fdsurgery.schedule(model, 3, 10)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = converted("dyconv")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert list(temperatures(other)) == list(temperatures(model)) == [pytest.approx(1 + 29 * 0.7)]


@pytest.mark.parametrize(
    "model, step, steps, said",
    [
        ("plain", 0, 10, "Net has no dynamic layers: convert it first"),
        ("fdconv", 0, 10, r"none of the \d dynamic layers \(fdconv\) has a schedule"),
        ("dyconv", 0, 0, "not from 0 over 0"),
        ("dyconv", -1, 10, "not from -1 over 10"),
    ],
)
def test_what_has_no_schedule_is_told(model: str, step: int, steps: int, said: str) -> None:
    with pytest.raises(fdsurgery.FineTuningError, match=said):
        fdsurgery.schedule(plain() if model == "plain" else converted(model), step, steps)


def test_a_fraction_of_all_steps() -> None:
    assert (steps_of(0.1, 1000), steps_of(1, 7), steps_of(0.01, 3)) == (100, 7, 1)
    for wrong in (0, 1.5, -0.1):
        with pytest.raises(fdsurgery.FineTuningError, match="above 0 and at most 1"):
            steps_of(wrong, 10)
    with pytest.raises(fdsurgery.FineTuningError, match="max_steps"):
        steps_of(0.1, float("inf"))


class Seen(nn.Module):
    """A model that notes the temperature at each of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = converted("dyconv")
        self.seen: list[float] = []

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        (temperature,) = temperatures(self)
        self.seen.append(temperature)
        logits = self.net(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


ROWS = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images(8))]
EXPECTED = [30.0, 15.5, 1.0, 1.0]
"""Of four steps, where the schedule takes half of them."""


def test_the_callback_of_the_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from fdsurgery.callbacks.trainer import ScheduleCallback

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    model = Seen()
    transformers.Trainer(model, arguments, train_dataset=ROWS, callbacks=[ScheduleCallback(0.5)]).train()
    assert model.seen == pytest.approx(EXPECTED) and temperatures(model) == {1.0}


def test_the_callback_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from fdsurgery.callbacks.lightning import ScheduleCallback

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Seen()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[ScheduleCallback(0.5)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(copy.deepcopy(ROWS), 2))  # type: ignore[arg-type]
    assert module.model.seen == pytest.approx(EXPECTED) and temperatures(module) == {1.0}

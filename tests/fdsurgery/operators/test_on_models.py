"""Every operator on a small model of every kind: exact, restored, and the same after a state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from battery import NAMES, distance, perturb
from models import CASES

import fdsurgery
from fdsurgery.saving.folder import described_layers

pytestmark = [pytest.mark.long, pytest.mark.parametrize("case", CASES), pytest.mark.parametrize("name", NAMES)]


@torch.no_grad()
def test_a_model_stays_what_it_is_and_comes_back(name: str, case: str) -> None:
    before, x = CASES[case].settled()
    model = copy.deepcopy(before)
    try:
        fdsurgery.convert(model, example_inputs=x, operator=name)
    except fdsurgery.PlanError as error:
        assert "swaps nothing" in str(error) and name in ("dcd", "fadc"), error
        pytest.skip(f"{name} takes none of its sites")
    checked = fdsurgery.verify(before, model, x)
    assert checked.ok, str(checked)
    assert all(one["operator"] == name for one in described_layers(model).values())

    perturb(model, 0.02)  # in a deep net much more of it ends in infinity
    other = fdsurgery.convert(copy.deepcopy(before), example_inputs=x, operator=name)
    other.load_state_dict(model.state_dict())
    expected, found = (_first(one(x)) for one in (model, other))
    assert torch.equal(found, expected)

    plain = fdsurgery.restore(fdsurgery.convert(copy.deepcopy(before), example_inputs=x, operator=name))
    assert plain.state_dict().keys() == before.state_dict().keys()
    assert distance(_first(plain(x)), _first(before(x))) < 1e-5


def _first(output: object) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]  # type: ignore[index]
    return output

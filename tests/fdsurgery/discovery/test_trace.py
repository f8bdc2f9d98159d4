"""The graphs of other tracers show what a recorded forward shows."""

from __future__ import annotations

import pytest
import torch
from models import CASES
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fdsurgery
from fdsurgery import DiscoveryError
from fdsurgery.discovery import example_inputs, observe
from fdsurgery.discovery.trace import TRACERS, observe_by

REFUSES = {("hf", "fx"), ("hf", "timm")}
"""Libraries whose models a tracer does not take: their forwards branch on values and pass keywords on."""


def takes_traced_flags() -> bool:
    """True if this torch traces timm's attention in Vision Transformers, which is given `is_causal`."""
    try:
        fx.symbolic_trace(lambda x, causal: F.scaled_dot_product_attention(x, x, x, is_causal=causal))
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", CASES)
def test_every_tracer_shows_the_same_sites(name: str, tracer: str) -> None:
    model = CASES[name].build().eval()
    if (name.split()[0], tracer) in REFUSES:
        with pytest.raises(DiscoveryError, match=rf"could not be traced by {tracer}: .*takes more models"):
            observe_by(tracer, model)
        return
    if (name, tracer) == ("timm vit", "timm") and not takes_traced_flags():
        pytest.skip("this torch's attention takes no traced flag")
    seen = observe_by(tracer, model)
    assert seen.tracer == tracer
    assert len(seen.sites) > 8 and len({site.role for site in seen.sites}) > 3
    assert seen.sites == observe(model).sites


class Odd(nn.Module):
    """A layer called as a function, and one whose weight has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.functional = nn.Linear(8, 16)
        self.read = nn.Linear(16, 8)

    def forward(self, x: Tensor, *, scale: float = 2.0, flip: bool = False) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = F.linear(x.flip(1) if flip else x, self.functional.weight, self.functional.bias)
        return self.read(x) * self.read.weight.sum() * scale


@pytest.mark.parametrize("tracer", ["record", "fx", "export"])
def test_functions_with_the_weights_of_a_layer_are_no_calls_of_it(tracer: str) -> None:
    model, x = Odd(), torch.randn(2, 3, 8, 8)
    seen = observe(model, x) if tracer == "record" else observe_by(tracer, model, x)  # type: ignore[arg-type]
    sites = {site.name: site for site in seen.sites}
    assert [site.calls for site in sites.values()] == [1, 0, 1]
    assert "read past the layer" in str(sites["functional"].obstacle)
    assert "read past the layer" in str(sites["read"].obstacle)


def test_an_unknown_tracer_is_told_what_there_is() -> None:
    with pytest.raises(DiscoveryError, match=r"no tracer 'fxx'; there are fx, timm, export"):
        observe_by("fxx", nn.Conv2d(3, 3, 3))  # type: ignore[arg-type]


def test_plans_of_version_0_1_may_name_another_tracer() -> None:
    """And are carried out as they were made; what is in the way now is looked up in a recorded forward."""
    model = CASES["timm resnet18"].build()
    plan = fdsurgery.plan(model)
    assert plan.tracer == "meta" and observe_by("export", model).sites == plan.sites
    earlier = fdsurgery.Plan.from_dict({**plan.to_dict(), "tracer": "export"})
    assert earlier.tracer == "export" and earlier.decisions == plan.decisions
    fdsurgery.apply(earlier, model)
    assert len(fdsurgery.dynamic_layers(model)) == len(plan.swaps)


@pytest.mark.parametrize("name", ["hf vit", "timm convnext (linear FFN)"])
def test_an_exported_model_tells_its_inputs(name: str) -> None:
    model = CASES[name].build().eval()
    inputs = example_inputs(model)
    graph_module = torch.export.export(model, inputs.args, dict(inputs.kwargs)).module()
    assert str(example_inputs(graph_module)) == str(inputs)
    swaps = {decision.site.name for decision in fdsurgery.plan(model, "generic").swaps}
    fdsurgery.convert(graph_module)
    assert swaps == {part for part, module in graph_module.named_modules() if type(module).__name__.startswith("FD")}

"""Models that fold norms and merge branches by themselves: right outputs, or one error with the remedy."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from test_inference import stir
from timm.utils import reparameterize_model
from torch import Tensor, nn

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdconv.weight_reads import WeightReadError
from fdsurgery.rewrite.folded import folded_norms
from fdsurgery.verification import relative_error

REMEDY = r"cannot be used by \w+ \(.*it would put a plain layer in this one's place.*fdsurgery\.fuse_norms"

TIMM = {
    "byobnet": ("mobileone_s0", "repvgg_a0", "test_byobnet"),
    "efficientvim": ("efficientvim_m1",),
    "efficientvit_msra": ("efficientvit_m0",),
    "fastvit": ("fastvit_t8", "fastvit_mci0"),
    "ghostnet": ("ghostnetv3_050",),
    "iformer": ("iformer_t",),
    "lcnetv2": ("lcnetv2_small",),
    "levit": ("levit_128s", "levit_conv_128s"),
    "nextvit": ("nextvit_small",),
    "repghost": ("repghostnet_050",),
    "repvit": ("repvit_m0_9",),
    "shvit": ("shvit_s1",),
    "tiny_vit": ("tiny_vit_5m_224",),
}
"""By the module of timm that reparameterises."""
QUICK = ("test_byobnet", "levit_128s")
NAMES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for names in TIMM.values() for name in names
]
FIXED_SIZE = ("levit", "tiny_vit", "efficientvit")
CHAOTIC = ("mobileone_s0", "repvgg_a0")
"""Fresh ones: without a path around their layers, float32 is too little to compare by."""


def first(output: Any) -> Tensor:
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def dynamic(model: nn.Module) -> int:
    return sum(isinstance(layer, (FDConv2d, FDLinear)) for layer in model.modules())


@torch.no_grad()
def modulated(model: nn.Module, x: Tensor) -> nn.Module:
    """Converted, with modulation that tells, and statistics that follow it."""
    fdsurgery.testing.settle_(model, x)
    model = stir(fdsurgery.convert(model, example_inputs=x)).train()
    for _ in range(5):
        model(x)
    return model.eval()


@torch.no_grad()
def right_or_refused(act: Callable[[nn.Module], Any], model: nn.Module, x: Tensor, expected: Tensor) -> None:
    """What an action leaves computes what the model did, and so does the model if it is refused halfway."""
    acted_on = copy.deepcopy(model)
    try:
        result = act(acted_on)
    except WeightReadError as error:
        assert re.search(REMEDY, str(error))
        result = acted_on
    except AssertionError as error:  # of timm, which asks for the class of a norm
        assert not str(error) and folded_norms(model)
        result = acted_on
    assert dynamic(result) == dynamic(model)
    assert relative_error(first(result(x)), expected) < 2e-3


ACTS: dict[str, Callable[[nn.Module], Any]] = {
    "reparameterize_model": reparameterize_model,
    "in place": lambda model: reparameterize_model(model, inplace=True),
    "its own method": lambda model: (
        getattr(model, "fuse", getattr(model, "convert_to_deploy", lambda: None))() or model
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_timm_models(name: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    size = plain.default_cfg["input_size"][-1] if name.startswith(FIXED_SIZE) else 64
    x = torch.randn(2, 3, size, size)
    model = modulated(copy.deepcopy(plain), x)
    if name in CHAOTIC:
        model, x = model.double(), x.double()
    expected = first(model(x))
    assert relative_error(first(fdsurgery.restore(copy.deepcopy(model))(x)), expected) > 4e-3, (
        "the modulation must tell"
    )
    for act in ACTS.values():
        right_or_refused(act, model, x, expected)
    fdsurgery.fuse_norms(model, example_inputs=x)
    assert relative_error(first(model(x)), expected) < 2e-3
    for act in ACTS.values():
        right_or_refused(act, model, x, expected)
    # The remedy: first this, then that.
    x = x.float()
    fdsurgery.testing.settle_(plain, x)
    expected = first(plain(x))
    converted = fdsurgery.convert(reparameterize_model(plain), example_inputs=x)
    assert dynamic(converted) and relative_error(first(converted(x)), expected) < 1e-3


def test_every_family_of_timm_that_reparameterises_is_here() -> None:
    import timm.models

    found, modules = set(), {info.name for info in pkgutil.iter_modules(timm.models.__path__)}
    for info in pkgutil.iter_modules(timm.models.__path__):
        if info.name.startswith("_") or not (timm.list_models(module=info.name)):
            continue
        source = inspect.getsource(importlib.import_module(f"timm.models.{info.name}"))
        if re.search(r"def (fuse|reparameterize|switch_to_deploy|convert_to_deploy)\(", source):
            found.add(info.name)
    assert found == TIMM.keys() & modules


YOLO = [
    pytest.param("yolo11n.yaml", False, id="yolo11n"),
    pytest.param("yolov8n.yaml", False, id="yolov8n", marks=pytest.mark.long),
    pytest.param("yolov9t.yaml", True, id="yolov9t, RepConv", marks=pytest.mark.long),
    pytest.param("yolov10n.yaml", True, id="yolov10n, RepVGGDW", marks=pytest.mark.long),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "merges"), YOLO)
def test_ultralytics_folds_into_dynamic_layers(
    name: str, merges: bool, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("yolo")))
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = tasks.DetectionModel(name, ch=3, nc=4, verbose=False)
    scores = lambda model: torch.cat([part.flatten() for part in raw(model(x))])  # noqa: E731
    model = modulated(model, x)
    expected = scores(model)
    assert relative_error(scores(fdsurgery.restore(copy.deepcopy(model))), expected) > 3e-3
    for prepare in (lambda model: model, lambda model: fdsurgery.fuse_norms(model, example_inputs=x)):
        fused = prepare(copy.deepcopy(model))
        assert relative_error(scores(fused), expected) < 5e-4
        try:
            fused.fuse(verbose=False)
        except WeightReadError as error:
            assert merges and re.search(REMEDY, str(error))
            continue
        assert dynamic(fused) == dynamic(model)
        assert relative_error(scores(fused), expected) < 5e-4


def raw(output: Any) -> list[Tensor]:
    """What the heads give, before boxes are made of it."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output[1]) if isinstance(leaf, Tensor)]

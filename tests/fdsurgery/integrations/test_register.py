"""The register of libraries, with one that is in it only here: every verb asks it, and none needs a line of its own."""

from __future__ import annotations

import copy
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import save_file
from test_cli import invoke
from torch import nn

import fdsurgery
from fdsurgery.allowed import arguments_from
from fdsurgery.checkpoints import carry_out, plan_checkpoint
from fdsurgery.errors import CheckpointError, DiscoveryError, RecipeError, UnsupportedModelError
from fdsurgery.inputs import ExampleTensors, Inputs
from fdsurgery.integrations import LIBRARIES, Library, ModelSource, SourceError, network_of, register_library
from fdsurgery.operators import operator_of
from fdsurgery.recipe import parse_recipe
from fdsurgery.recipe.authoring import draft
from fdsurgery.recipe.schema import json_schema
from fdsurgery.saving.source import build, infer
from fdsurgery.testing import settle_

PACKAGE = '''
import torch
from torch import nn

class Net(nn.Module):
    """Takes 5 channels and a gain for each sample, which nobody could guess."""

    def __init__(self, name, width, classes=4):
        super().__init__()
        self.name, self.width, self.classes = name, width, classes
        self.stem = nn.Conv2d(5, width, 3)
        self.body = nn.Conv2d(width, width, 3)
        self.reset_classifier(classes)

    def reset_classifier(self, classes):
        self.head = nn.Linear(self.width, classes)

    def forward(self, image, gain):
        x = self.body(self.stem(image).relu()).relu() * gain[:, None, None, None]
        return self.head(x.mean((2, 3)))

class Predictor(nn.Module):
    """Holds a network and is none."""

    def __init__(self, network):
        super().__init__()
        self.network = network

class Adapter(nn.Module):
    pass

WIDTHS = {"net_small": 24, "net_large": 32}

def create(name, **arguments):
    return Net(name, WIDTHS[name], **arguments)
'''
RECIPE = """
description: The 3x3 convolutions of toylib's nets.
match: {toylib: net_*}
keep: [{role: stem, because: it reads the image and costs the most}]
swap: [{where: {role: spatial}}]
"""
TRAINERS: list[ModuleType] = []


class Toylib(Library):
    """Answers every question."""

    name = "toylib"
    forms = ("toylib:NAME",)
    families = "names of toylib's nets, e.g. `net_*`"
    hooks: ClassVar = {"toylib.trainer": f"{__name__}:TRAINERS.append"}

    def build(self, spec: str, *, pretrained: bool) -> tuple[nn.Module, ModelSource]:
        name = spec.partition(":")[2]
        if pretrained or name not in self.module().WIDTHS:
            raise SourceError(f"toylib has no model {name!r} with trained weights")
        return self.module().create(name), ModelSource(self.name, name)

    def rebuild(self, source: ModelSource) -> nn.Module:
        return self.module().create(source.name, **arguments_from(source.arguments, {"classes"}, self.name))

    def infer(self, model: Any) -> ModelSource:
        return ModelSource(self.name, model.name, {"classes": model.classes})

    def family(self, model: nn.Module) -> str | None:
        return model.name if self.owns(model) and hasattr(model, "name") else None  # type: ignore[return-value]

    def network(self, model: nn.Module) -> nn.Module | None:
        return model.network if type(model).__name__ == "Predictor" else None  # type: ignore[return-value]

    def refusal(self, module: nn.Module, step: Literal["convert", "save"]) -> str | None:
        return f"is an adapter of toylib; remove it before you {step}" if type(module).__name__ == "Adapter" else None

    def example_inputs(self, model: nn.Module) -> Iterable[Inputs] | None:
        if not self.owns(model):
            return None
        make = ExampleTensors(model)
        return [Inputs((make.image(5, 16, 16), make.floats(2)))]

    def saved_names(self, model: nn.Module, names: Iterable[str]) -> dict[str, str]:
        return {name: name.replace("body", "trunk") for name in names}

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        return ("head",)

    def specs_of(self, is_meant: Callable[[str], bool]) -> list[str]:
        return [f"toylib:{name}" for name in self.module().WIDTHS if is_meant(name)]


@pytest.fixture
def toylib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library on Python's path and in the register, with a recipe among the shipped ones; afterwards neither."""
    package = tmp_path / "path" / "toylib"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "trainer.py").write_text("def train(model): ...")
    (tmp_path / "toy.yaml").write_text(RECIPE)
    monkeypatch.syspath_prepend(str(package.parent))
    shipped = {**fdsurgery.shipped_recipes(), "toy": tmp_path / "toy.yaml"}
    monkeypatch.setattr("fdsurgery.recipe.library.shipped_recipes", lambda: shipped)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    register_library(Toylib())
    yield
    del LIBRARIES["toylib"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "toylib"]:
        del sys.modules[name]
    TRAINERS.clear()


def small() -> Any:
    torch.manual_seed(0)
    model = build("toylib:net_small", pretrained=False)[0]
    return settle_(model, torch.randn(4, 5, 16, 16), torch.rand(4))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 5, 16, 16), torch.rand(2)


def dynamic(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if operator_of(layer) is not None]


def test_a_spec_names_its_models(toylib: None) -> None:
    model, source = build("toylib:net_large", pretrained=False)
    assert (model.width, model.training, source) == (32, False, ModelSource("toylib", "net_large"))
    assert json.loads(invoke("plan", "toylib:net_small", "--json"))["recipe"] == "toy"
    assert "toylib has no model 'net'" in invoke("plan", "toylib:net", code=2)
    with pytest.raises(SourceError, match=r"expected timm:NAME, .*toylib:NAME.*; did you mean 'toylib'"):
        build("toylibs:net_small", pretrained=False)


def test_recipes_match_its_families(toylib: None) -> None:
    plan = fdsurgery.plan(small())
    assert (plan.recipe, plan.recognised) == ("toy", "recognised as toylib net_small")
    assert [decision.site.name for decision in plan.swaps] == ["body"]
    assert parse_recipe(RECIPE).match.toylib == parse_recipe(RECIPE).match["toylib"] == ("net_*",)
    assert parse_recipe("extends: ffn").match.toylib == ()
    described = json_schema()["$defs"]["Match"]["properties"]["toylib"]
    assert described["description"] == "Globs for names of toylib's nets, e.g. `net_*`."
    assert "toylib" in invoke("recipes", "list").splitlines()[0]
    assert 'toylib: ["net_small"]' in draft(small(), fdsurgery.sites(small()))
    with pytest.raises(RecipeError, match=r"match\.tpylib: no such key; .* did you mean 'toylib'"):
        parse_recipe("match: {tpylib: x}")


def test_it_gives_example_inputs(toylib: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    assert str(fdsurgery.discovery.example_inputs(model)) == "input_0: (2, 5, 16, 16), input_1: (2,)"
    monkeypatch.setattr(Toylib, "example_inputs", Library.example_inputs)
    with pytest.raises(DiscoveryError, match="Pass example_inputs="):
        fdsurgery.plan(model)


def test_its_models_are_saved_and_built_again(toylib: None, tmp_path: Path) -> None:
    model = fdsurgery.convert(small())
    x = batch()
    assert infer(model) == ModelSource("toylib", "net_small", {"classes": 4})
    fdsurgery.save(model, tmp_path / "saved")
    loaded = fdsurgery.load(tmp_path / "saved")
    assert type(loaded) is type(model) and dynamic(loaded) == ["body"]
    assert torch.equal(loaded(*x), model(*x))
    with pytest.raises(CheckpointError, match="builds another model than this one"):
        fdsurgery.save(model, tmp_path / "large", source=ModelSource("toylib", "net_large"))

    description = json.loads((tmp_path / "saved" / "fdsurgery.json").read_text())
    description["source"]["arguments"]["checkpoint_path"] = "x.pth"
    (tmp_path / "saved" / "fdsurgery.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="toylib argument 'checkpoint_path' is never taken from a file"):
        fdsurgery.load(tmp_path / "saved")
    del LIBRARIES["toylib"]
    try:
        with pytest.raises(CheckpointError, match="unknown source library 'toylib'; expected timm, transformers or"):
            fdsurgery.load(tmp_path / "saved")
        with pytest.warns(UserWarning, match="a Net does not say how it was built"):
            fdsurgery.save(model, tmp_path / "again")
        with pytest.raises(RecipeError, match=r"match\.toylib: no such key; known: timm, transformers, torchvision$"):
            fdsurgery.load_recipe(tmp_path / "toy.yaml")
        assert list(json_schema()["$defs"]["Match"]["properties"]) == ["timm", "transformers", "torchvision"]
    finally:
        LIBRARIES["toylib"] = Toylib()


def test_its_wrapper_stands_for_the_network(toylib: None) -> None:
    from toylib import Predictor

    x = batch()
    predictor = Predictor(small())
    plain = copy.deepcopy(predictor.network)
    assert network_of(predictor) is predictor.network and network_of(plain) is plain
    plan = fdsurgery.plan(predictor)
    assert (plan.model_class, plan.recipe) == ("Net", "toy")
    assert fdsurgery.apply(plan, predictor) is predictor and dynamic(predictor) == ["network.body"]
    assert fdsurgery.verify(plain, predictor.network, x).ok
    assert fdsurgery.param_groups(predictor, lr=1e-3, weight_decay=0.01)
    assert fdsurgery.restore(predictor) is predictor and dynamic(predictor) == []
    assert fdsurgery.convert(predictor) is predictor and dynamic(predictor) == ["network.body"]


def test_what_it_puts_into_a_model_can_stand_in_the_way(toylib: None, tmp_path: Path) -> None:
    from toylib import Adapter

    model = small()
    model.body.adapter = Adapter()
    with pytest.raises(UnsupportedModelError, match=r"'body\.adapter' is an adapter of toylib; .* before you convert"):
        fdsurgery.plan(model)
    converted = fdsurgery.convert(small())
    converted.adapter = Adapter()
    with pytest.raises(CheckpointError, match="'adapter' is an adapter of toylib; remove it before you save"):
        fdsurgery.save(converted, tmp_path / "saved")


def test_its_hooks_are_called_on_import(toylib: None) -> None:
    import toylib as package

    assert TRAINERS == [], "the module was not imported yet"
    import toylib.trainer

    assert [package.trainer] == TRAINERS
    register_library(Toylib())  # imported already
    assert [package.trainer] * 2 == TRAINERS


def test_its_checkpoints_are_converted_without_a_model(toylib: None, tmp_path: Path) -> None:
    plain = small()
    plain.reset_classifier(7)
    saved = {name.replace("body", "trunk"): tensor for name, tensor in plain.state_dict().items()}
    save_file(saved, str(tmp_path / "plain.safetensors"))
    for more in ({"model": "toylib:net_small"}, {"recipe": "toy"}):
        plan = plan_checkpoint(tmp_path / "plain.safetensors", tmp_path / f"out-{len(more)}-{next(iter(more))}", **more)
        assert list(plan.layers) == ["body"] and "saved names of toylib" in str(plan)
        carry_out(plan)
    loaded = fdsurgery.load(tmp_path / "out-1-model", model=copy.deepcopy(plain))
    assert fdsurgery.verify(plain, loaded, batch()).ok
    save_file({**saved, "stem.weight": torch.zeros(7, 5, 3, 3)}, str(tmp_path / "other.safetensors"))
    for globs, count in (("net_s*", "none of the 1 models"), ("[net_*, x]", "none of the 2 models"), ("x", "no model")):
        recipe = parse_recipe(RECIPE.replace("net_*", globs))
        with pytest.raises(CheckpointError, match=f"fits {count}"):
            plan_checkpoint(tmp_path / "other.safetensors", tmp_path / "out", recipe=recipe)


# Those that come with the package


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=list(LIBRARIES))
def test_a_library_is_a_folder_and_names_what_exists(library: Library) -> None:
    root = Path(fdsurgery.__file__).parent
    assert (root / "integrations" / library.name / "library.py").exists()
    for function in library.hooks.values():
        assert callable(pkgutil.resolve_name(function))
    extra = re.fullmatch(r"fdsurgery\[(\w+)\]", library.requirement)
    if extra is not None:
        assert f"\n{extra[1]} = [" in (root.parent / "pyproject.toml").read_text(encoding="utf-8")


def test_a_library_that_has_nothing_to_say_is_asked_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Library):
        name = "silent"

    silent, model = Silent(), nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    monkeypatch.setitem(LIBRARIES, "silent", silent)
    assert not silent.takes("silent:x") and not silent.owns(model)
    assert silent.infer(model) is silent.family(model) is silent.network(model) is silent.example_inputs(model) is None
    assert fdsurgery.plan(model, parse_recipe("swap: [{where: {kind: conv}}]")).swaps
    with pytest.raises(SourceError, match=r"silent is not installed .* pip install 'silent'"):
        silent.module()
    for source in (ModelSource("silent", "x"), ModelSource("peft", "x")):
        with pytest.raises(CheckpointError, match="unknown source library"):
            fdsurgery.saving.source.rebuild(source)

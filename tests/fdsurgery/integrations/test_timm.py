"""Converted models by their names in timm: built, loaded, saved and trained as timm's users do it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from releases import older
from timm.models import load_checkpoint
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdsurgery.integrations.timm import __main__ as script_runner
from fdsurgery.integrations.timm import factory, registration
from fdsurgery.verification import relative_error

FAMILIES = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet"]
SIZE = 64


def arguments(name: str) -> dict[str, Any]:
    return {"img_size": SIZE} if "vit" in name else {}


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, SIZE, SIZE)


def plain_model(name: str, x: Tensor, **more: Any) -> nn.Module:
    torch.manual_seed(1)
    return fdsurgery.testing.settle_(timm.create_model(name, **arguments(name), **more), x)


def saved(model: nn.Module, path: Path) -> str:
    torch.save(model.state_dict(), path)
    return str(path)


def dynamic(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, (FDConv2d, FDLinear))]


def trained(model: nn.Module) -> nn.Module:
    """As if it had been trained: modulation is not neutral."""
    for layer in dynamic(model):
        for name, parameter in layer.named_parameters():
            if name.startswith(("KSM", "FBM")):
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def features(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval().forward_features(x)


@pytest.fixture
def registered_toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A model of the user's own, entered in timm's registry after fdsurgery was imported, with two tags."""
    module: Any = types.ModuleType("users_models")

    def config(seed: int, **more: Any) -> PretrainedCfg:
        return PretrainedCfg(
            url=f"https://example.invalid/toy-{seed}.pth", num_classes=5, first_conv="conv1", classifier="fc", **more
        )

    def toy_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        sizes = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (16, 24, 32, 40)}
        return timm.models.build_model_with_cfg(ResNet, "toy_resnet", pretrained, **{**sizes, **kwargs})

    toy_resnet.__module__ = module.__name__
    module.toy_resnet = toy_resnet
    cfgs = {"one": config(1), "two": config(2, mean=(0.5, 0.5, 0.5))}
    module.default_cfgs = {"toy_resnet": DefaultCfg(deque(cfgs), cfgs, True)}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    timm.models.register_model(toy_resnet)
    yield module
    registry = sys.modules["timm.models._registry"]
    for table in (registry._model_entrypoints, registry._model_to_module, registry._model_default_cfgs):
        table.pop("toy_resnet", None)
    registry._model_with_tags.pop("toy_resnet", None)
    registry._module_to_models.pop(module.__name__, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_name_gives_the_converted_model(name: str, x: Tensor, tmp_path: Path) -> None:
    plain = plain_model(name, x)
    overlay = {"file": saved(plain, tmp_path / "plain.pth")}
    model = timm.create_model(f"{name}.fdconv", pretrained=True, pretrained_cfg_overlay=overlay, **arguments(name))
    assert type(model) is type(plain)
    expected = fdsurgery.convert(copy.deepcopy(plain))
    assert [type(layer) for layer in dynamic(model)] == [type(layer) for layer in dynamic(expected)]
    assert relative_error(outputs(model, x), outputs(plain, x)) < 1e-5


def test_the_tag_chooses_the_weights_and_the_config(registered_toy: Any, x: Tensor, tmp_path: Path) -> None:
    weights = {}
    for seed in (1, 2):  # where timm would have put what it downloads
        torch.manual_seed(seed)
        weights[seed] = fdsurgery.testing.settle_(registered_toy.toy_resnet(num_classes=5), x)
        saved(weights[seed], tmp_path / f"toy-{seed}.pth")
    for name, seed in (("toy_resnet", 1), ("toy_resnet.one", 1), ("toy_resnet.two", 2)):
        model = timm.create_model(f"{name}.fdconv", pretrained=True, cache_dir=str(tmp_path))
        assert dynamic(model) and relative_error(outputs(model, x), outputs(weights[seed], x)) < 1e-5
        plain = timm.create_model(name, pretrained=True, cache_dir=str(tmp_path))
        assert model.pretrained_cfg == {**plain.pretrained_cfg, "architecture": "toy_resnet.fdconv"}
        assert model.default_cfg is model.pretrained_cfg
        data = timm.data.resolve_model_data_config(model)
        assert data == timm.data.resolve_model_data_config(plain)
        assert data["mean"] == ((0.5, 0.5, 0.5) if seed == 2 else (0.485, 0.456, 0.406))
    adapted = timm.create_model(
        "toy_resnet.two.fdconv", pretrained=True, cache_dir=str(tmp_path), num_classes=7, in_chans=1
    )
    expected = timm.create_model("toy_resnet.two", pretrained=True, cache_dir=str(tmp_path), num_classes=7, in_chans=1)
    gray = x[:, :1]
    assert adapted.num_classes == 7 and outputs(adapted, gray).shape == (2, 7)
    assert relative_error(features(adapted, gray), features(expected, gray)) < 1e-5


def test_a_config_passed_as_well_does_not_lose_the_suffix(x: Tensor, tmp_path: Path) -> None:
    plain = plain_model("test_resnet", x)
    config = {**plain.pretrained_cfg, "file": saved(plain, tmp_path / "plain.pth"), "hf_hub_id": None}
    for given in (config, PretrainedCfg(**config), "r160_in1k"):
        model = timm.create_model("test_resnet.fdconv", pretrained=given != "r160_in1k", pretrained_cfg=given)
        assert dynamic(model) and model.pretrained_cfg["tag"] == "r160_in1k"
        if given != "r160_in1k":
            assert relative_error(outputs(model, x), outputs(plain, x)) < 1e-5


def test_names_that_mean_nothing() -> None:
    with pytest.raises(RuntimeError, match=r"Unknown model \(no_such_net\.fdconv\)"):
        timm.create_model("no_such_net.fdconv")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("test_resnet.no_such_tag.fdconv")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("test_resnet.fdcon")


def test_lists_of_timm_stay_as_they_are() -> None:
    before = timm.list_models(), timm.list_pretrained()
    timm.create_model("test_resnet.fdconv")
    assert (timm.list_models(), timm.list_pretrained()) == before
    assert not any("fdconv" in name for names in before for name in names)
    assert timm.is_model("test_resnet.fdconv") and timm.is_model("test_resnet.r160_in1k.fdconv")
    assert not timm.is_model("no_such_net.fdconv")


def test_arguments_reach_the_plain_model(x: Tensor) -> None:
    model = timm.create_model("test_vit.fdconv", drop_path_rate=0.3, drop_rate=0.1, img_size=SIZE, global_pool="avg")
    plain = timm.create_model("test_vit", drop_path_rate=0.3, drop_rate=0.1, img_size=SIZE, global_pool="avg")
    assert [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")] == [
        m.drop_prob for m in plain.modules() if hasattr(m, "drop_prob")
    ]
    assert model.global_pool == "avg" and model.head_drop.p == 0.1
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model("test_resnet.fdconv", no_such_argument=1)


def test_another_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: resnet\nkeep:\n  - {name: 'layer1*', because: 'static'}\n")
    model = timm.create_model("test_resnet.fdconv", recipe=str(tmp_path / "mine.yaml"))
    assert not dynamic(model.layer1) and dynamic(model.layer2)
    with pytest.raises(fdsurgery.RecipeError, match="resnet"):
        timm.create_model("test_resnet.fdconv", recipe="resnets")


@pytest.mark.parametrize("flag", ["scriptable", "exportable", "no_jit"])
def test_flags_of_the_factory(flag: str, x: Tensor) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet.fdconv", **{flag: True}).eval()
    if flag == "exportable":
        traced = torch.jit.trace(model, x, check_trace=False)
        assert relative_error(traced(x), outputs(model, x)) < 1e-5
    assert dynamic(model)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_resnet.fdconv")
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_features_only(name: str, x: Tensor, tmp_path: Path) -> None:
    plain = plain_model(name, x)
    overlay = {"file": saved(plain, tmp_path / "plain.pth")}
    wanted: dict[str, Any] = {"features_only": True, "out_indices": (0, 1), **arguments(name)}
    expected = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **wanted)
    model = timm.create_model(f"{name}.fdconv", pretrained=True, pretrained_cfg_overlay=overlay, **wanted)
    assert dynamic(model) and model.feature_info.channels() == expected.feature_info.channels()
    for actual, static in zip(outputs(model, x), outputs(expected, x), strict=True):
        assert relative_error(actual, static) < 1e-5

    whole = trained(
        timm.create_model(f"{name}.fdconv", pretrained=True, pretrained_cfg_overlay=overlay, **arguments(name))
    )
    overlay = {"file": saved(whole, tmp_path / "trained.pth")}
    model = timm.create_model(f"{name}.fdconv", pretrained=True, pretrained_cfg_overlay=overlay, **wanted)
    own = {key.removeprefix("model.").replace(".", "_"): value for key, value in model.state_dict().items()}
    expected_state = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    assert own and all(torch.equal(value, expected_state[key]) for key, value in own.items())
    assert outputs(model, x)[-1].isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_of_the_plain_model_is_converted(name: str, x: Tensor, tmp_path: Path) -> None:
    plain = plain_model(name, x)
    path = saved(plain, tmp_path / "plain.pth")
    built = timm.create_model(f"{name}.fdconv", checkpoint_path=path, **arguments(name))
    loaded = trained(timm.create_model(f"{name}.fdconv", **arguments(name)))
    load_checkpoint(loaded, path)
    for model in (built, copy.deepcopy(loaded)):
        assert dynamic(model) and relative_error(outputs(model, x), outputs(plain, x)) < 1e-5


def test_a_plain_checkpoint_inside_of_a_larger_model(x: Tensor) -> None:
    class Detector(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone, self.neck = backbone, nn.Linear(3, 3)

    plain = plain_model("test_resnet", x)
    detector = Detector(trained(timm.create_model("test_resnet.fdconv")))
    detector.load_state_dict(Detector(plain).state_dict(), strict=False)
    assert relative_error(outputs(detector.backbone, x), outputs(plain, x)) < 1e-5


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_that_fits_neither(strict: bool, x: Tensor) -> None:
    model = timm.create_model("test_resnet.fdconv")
    before = copy.deepcopy(model.state_dict())
    other = timm.create_model("test_resnet", channels=(32, 48, 48, 100)).state_dict()
    with pytest.raises(RuntimeError, match=r"one of the plain test_resnet, and does not fit that.*size mismatch"):
        try:
            model.load_state_dict(other, strict=strict)
        except RuntimeError as error:
            raise RuntimeError(" ".join(str(error).split())) from None

    half = copy.deepcopy(before)
    layer = next(key for key in half if key.endswith(".dft_weight")).removesuffix(".dft_weight")
    half = {key: value for key, value in half.items() if not key.startswith(layer)}
    half[f"{layer}.weight"] = torch.zeros(model.get_submodule(layer).weight.shape)
    with pytest.raises(RuntimeError, match="converted by another recipe"):
        model.load_state_dict(half, strict=strict)


def test_converted_weights_for_another_head_and_stem(x: Tensor, tmp_path: Path) -> None:
    whole = trained(timm.create_model("test_resnet.fdconv"))
    overlay = {"file": saved(whole, tmp_path / "trained.pth")}
    model = timm.create_model("test_resnet.fdconv", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4)
    assert model.fc.out_features == 4
    assert torch.equal(features(model, x), features(whole, x))
    gray = timm.create_model("test_resnet.fdconv", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    assert relative_error(outputs(gray, x[:, :1]), outputs(whole, x[:, :1].expand(-1, 3, -1, -1))) < 1e-5


@pytest.mark.parametrize("classes", [1000, 4])
def test_weights_converted_otherwise_are_refused(classes: int, tmp_path: Path) -> None:
    (tmp_path / "less.yaml").write_text("extends: resnet\nkeep:\n  - {name: 'layer1*', because: 'static'}\n")
    less = timm.create_model("test_resnet.fdconv", recipe=str(tmp_path / "less.yaml"))
    part = {key: value for key, value in less.state_dict().items() if not key.startswith("layer1")}
    for tensors in (less.state_dict(), part):  # of the second, timm would only log what is missing
        overlay = {"state_dict": tensors}
        with pytest.raises(fdsurgery.CheckpointError, match=r"another recipe|otherwise|do not fit"):
            timm.create_model(
                "test_resnet.fdconv", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes
            )


def test_a_checkpoint_of_timms_training_with_its_average(x: Tensor, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet.fdconv", num_classes=3)
    ema = ModelEmaV3(model, decay=0.5)
    groups = [layer.frequency_group.clone() for layer in dynamic(model)]
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2)
    model.train()
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    assert all(torch.equal(a, layer.frequency_group) for a, layer in zip(groups, dynamic(ema.module), strict=True))
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")

    loaded = timm.create_model("test_resnet.fdconv", num_classes=3, checkpoint_path=path)
    assert torch.equal(outputs(loaded, x), outputs(ema.module, x))
    resumed = timm.create_model("test_resnet.fdconv", num_classes=3)
    again = create_optimizer_v2(resumed, "adamw", lr=1e-2)
    assert timm.models.resume_checkpoint(resumed, path, again, log_info=False) == 1
    assert torch.equal(outputs(resumed, x), outputs(model, x))
    for net, opt in ((model, optimizer), (resumed, again)):
        net.train()
        net(x).square().mean().backward()
        opt.step()
    assert torch.equal(outputs(resumed, x), outputs(model, x))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_layer_decay_of_timm_knows_the_layers(name: str) -> None:
    def scales(model: nn.Module) -> dict[str, float]:
        groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5).param_groups
        of = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
        return {key: of[id(parameter)] for key, parameter in model.named_parameters()}

    plain = scales(timm.create_model(name, **arguments(name)))
    model = timm.create_model(f"{name}.fdconv", **arguments(name))
    names = {key: f"{key}.weight" for key, layer in model.named_modules() if isinstance(layer, (FDConv2d, FDLinear))}
    assert len(set(plain.values())) > 3
    for key, scale in scales(model).items():
        layer = next((layer for layer in names if key.startswith(f"{layer}.")), None)
        assert scale == plain[key if layer is None or key == f"{layer}.bias" else names[layer]], key


def test_copies_and_pickles(x: Tensor, tmp_path: Path) -> None:
    model = trained(timm.create_model("test_resnet.fdconv"))
    torch.save(model, tmp_path / "whole.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert torch.equal(outputs(other, x), outputs(model, x))
        other.load_state_dict(plain_model("test_resnet", x).state_dict())
        assert relative_error(outputs(other, x), outputs(plain_model("test_resnet", x), x)) < 1e-5


def test_a_folder_of_fdsurgery_as_a_local_dir(x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(fdsurgery.convert(plain_model("test_resnet", x, num_classes=3), kernel_num=8))
    fdsurgery.save(model, tmp_path / "saved")
    spec = f"local-dir:{tmp_path / 'saved'}"
    loaded = timm.create_model(spec, pretrained=True)
    assert loaded.num_classes == 3 and {layer.config.kernel_num for layer in dynamic(loaded)} == {8}
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    other = timm.create_model(spec, pretrained=True, num_classes=6)
    assert other.num_classes == 6 and torch.equal(features(other, x), features(model, x))
    backbone = timm.create_model(spec, pretrained=True, features_only=True, out_indices=(1, 2))
    expected = model.forward_intermediates(x, indices=(1, 2), intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs(backbone, x), expected, strict=True))
    # Some weights of the registry have a class too many; those of the folder have not.
    registered = timm.get_pretrained_cfg("test_resnet")
    with monkeypatch.context() as patch:
        patch.setattr(timm, "get_pretrained_cfg", lambda name: replace(registered, label_offset=1))
        assert torch.equal(outputs(timm.create_model(spec, pretrained=True), x), outputs(model, x))
    fresh = timm.create_model(spec)
    assert {layer.config.kernel_num for layer in dynamic(fresh)} == {8}
    assert not torch.equal(outputs(fresh, x), outputs(model, x))

    hf = fdsurgery.ModelSource("torchvision", "resnet18")
    description = json.loads((tmp_path / "saved" / "fdsurgery.json").read_text())
    (tmp_path / "saved" / "fdsurgery.json").write_text(json.dumps({**description, "source": hf.to_dict()}))
    with pytest.raises(fdsurgery.CheckpointError, match="a model of torchvision, resnet18"):
        timm.create_model(spec, pretrained=True)


def test_saved_by_either_and_loaded_by_either(x: Tensor, tmp_path: Path) -> None:
    model = trained(timm.create_model("test_resnet.fdconv", num_classes=3))
    fdsurgery.save(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/fdsurgery.json").read_text())["source"]["name"] == "test_resnet.r160_in1k"
    assert torch.equal(outputs(fdsurgery.load(tmp_path / "ours"), x), outputs(model, x))
    told = {"recipe": "resnet"} if older("timm", "1.0.31") else None  # from then on timm finds it on the model
    timm.models._hub.save_for_hf(model, tmp_path / "timms", model_args=told)
    config = json.loads((tmp_path / "timms/config.json").read_text())
    assert config["architecture"] == "test_resnet.fdconv" and config["model_args"]["recipe"] == "resnet"
    for classes in ({}, {"num_classes": 8}):
        loaded = timm.create_model(f"local-dir:{tmp_path / 'timms'}", pretrained=True, **classes)
        assert torch.equal(features(loaded, x), features(model, x))
    # A timm that does not know us must not put random weights in the place of dynamic layers.
    program = f"import timm; timm.create_model('local-dir:{tmp_path / 'timms'}', pretrained=True, num_classes=8)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode != 0 and "recipe" in run.stderr


def test_a_repository_of_the_hub(x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm uploads it; in the place of the hub is a folder."""
    model = trained(timm.create_model("test_resnet.fdconv", num_classes=3))
    timm.models._hub.save_for_hf(model, tmp_path)
    hub = sys.modules["timm.models._hub"]
    monkeypatch.setattr(hub, "download_from_hf", lambda model_id, filename, **_: str(tmp_path / filename))
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo_id=None, filename="", **_: here(tmp_path / filename))

    def here(path: Path) -> str:
        if not path.exists():
            raise hub.EntryNotFoundError(str(path))
        return str(path)

    loaded = timm.create_model("hf-hub:me/mine", pretrained=True)
    assert torch.equal(outputs(loaded, x), outputs(model, x))
    other = timm.create_model("hf-hub:me/mine", pretrained=True, num_classes=6)
    assert torch.equal(features(other, x), features(model, x))


@pytest.mark.parametrize(
    "program",
    [
        "import fdsurgery, sys; assert 'timm' not in sys.modules; from timm import create_model",
        "from timm import create_model; import fdsurgery",
    ],
)
def test_either_may_be_imported_first(program: str) -> None:
    check = "assert any(type(m).__name__ == 'FDConv2d' for m in create_model('test_resnet.fdconv').modules())"
    subprocess.run([sys.executable, "-c", f"{program}\n{check}"], check=True)


def test_nothing_is_wrapped_twice() -> None:
    module = sys.modules["timm.models._factory"]
    before = dict(vars(module))
    assert factory.install(module) == []
    assert vars(module) == before


def test_a_timm_of_another_build_is_left_alone() -> None:
    strange = types.ModuleType("timm.models._factory")
    strange.model_entrypoint = timm.model_entrypoint
    with pytest.warns(UserWarning, match="no split_model_name_tag; call fdsurgery.convert"):
        registration.enter(strange)
    assert strange.model_entrypoint is timm.model_entrypoint


SCRIPT = """
import argparse, pickle, sys, torch, torch.distributed as dist, helper
from timm import create_model

class InMain:
    pass

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    model = create_model(parser.parse_args().model)
    pickle.loads(pickle.dumps(InMain()))
    if "RANK" in __import__("os").environ:
        dist.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    print(helper.WORD, sys.argv[1:], sum(type(m).__name__ == "FDConv2d" for m in model.modules()))
    if dist.is_initialized():
        dist.destroy_process_group()
"""


def run_script(tmp_path: Path, *command: str) -> str:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("WORD = 'trained'")  # scripts import what lies beside them
    script = [str(tmp_path / "train.py"), "--model", "test_resnet.fdconv"]
    run = subprocess.run(
        [sys.executable, *command, "-m", "fdsurgery.integrations.timm", *script], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_script_run_through_us(tmp_path: Path) -> None:
    assert run_script(tmp_path).strip() == "trained ['--model', 'test_resnet.fdconv'] 9"


@pytest.mark.parametrize(("given", "said"), [([], "usage: "), (["no_such.py"], "no_such.py: no such file")])
def test_no_script_to_run(given: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["timm_models", *given])
    with pytest.raises(SystemExit, match=said):
        script_runner.main()


@pytest.mark.slow
def test_a_script_run_through_us_in_two_processes(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert run_script(tmp_path, *launcher).count("trained") == 2


@pytest.mark.slow
@pytest.mark.skipif(
    "FDSURGERY_TIMM_CHECKOUT" not in os.environ, reason="FDSURGERY_TIMM_CHECKOUT names no checkout of timm"
)
def test_timms_own_scripts(tmp_path: Path) -> None:
    """train.py with a moving average, resumed, and validate.py on what it saved."""
    scripts = Path(os.environ["FDSURGERY_TIMM_CHECKOUT"])
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    image = pytest.importorskip("PIL.Image")
    for index, (picture, label) in enumerate(zip(digits.images[:60], digits.target[:60], strict=True)):
        folder = tmp_path / "data" / ("train" if index < 40 else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray((picture * 15).astype("uint8")).resize((32, 32)).convert("RGB").save(folder / f"{index}.png")
    common = "--num-classes 10 --img-size 32 -b 20 --workers 0 --device cpu --model test_resnet.fdconv".split()
    training = [
        "--model-ema",
        "--output",
        str(tmp_path),
        "--train-split",
        "train",
        "--val-split",
        "val",
        "--lr",
        "1e-3",
    ]
    training += ["--opt", "adamw", "--warmup-epochs", "0", "--cooldown-epochs", "0", "--log-interval", "1"]

    def run(script: str, *more: str) -> str:
        command = [sys.executable, "-m", "fdsurgery.integrations.timm", str(scripts / script), str(tmp_path / "data")]
        run = subprocess.run([*command, *common, *more], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout + run.stderr

    run("train.py", *training, "--epochs", "1", "--experiment", "first")
    last = str(tmp_path / "first" / "last.pth.tar")
    assert "Restoring optimizer" in run(
        "train.py", *training, "--epochs", "2", "--experiment", "second", "--resume", last
    )
    best = str(tmp_path / "second" / "model_best.pth.tar")
    result = run("validate.py", "--split", "val", "--checkpoint", best, "--use-ema")
    assert '"model": "test_resnet.fdconv"' in result

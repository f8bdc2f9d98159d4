"""Saved is enough: a converted model comes back in a fresh process, to the same outputs."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from models import CASES
from safetensors import safe_open
from torch import nn

import fdsurgery
from fdconv import FDConv2d
from fdsurgery import CheckpointError, ModelSource

LOAD_AND_RUN = """
import sys, torch, fdsurgery
torch.set_num_threads(1)  # as in the tests: sums are split by threads, and rounded differently
folder, inputs, outputs = sys.argv[1:]
model = fdsurgery.load(folder)
assert not model.training
with torch.no_grad():
    result = model(torch.load(inputs, weights_only=True))
torch.save(result if isinstance(result, torch.Tensor) else result.logits, outputs)
"""


def trained_a_little(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Move every parameter off its start, so that a layer loaded as neutral would be found out."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.train()
    model(x)
    return model.eval()


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(x)
    return result if isinstance(result, torch.Tensor) else result.logits


SAVED = {
    "timm resnet18": None,
    "timm convnext (1x1 FFN)": ModelSource("timm", "convnext_atto", {"depths": [1, 1, 2, 1], "dims": [24, 32, 48, 64]}),
    "hf segformer": None,
    "hf convnextv2": None,
}


@pytest.mark.parametrize("name", SAVED)
def test_a_fresh_process_gives_the_same_outputs(name: str, tmp_path: Path) -> None:
    model, x = CASES[name].settled()
    trained_a_little(fdsurgery.convert(model, example_inputs=x), x)
    fdsurgery.save(model, tmp_path / "saved", source=SAVED[name])
    assert sorted(os.listdir(tmp_path / "saved")) == ["fdsurgery.json", "model.safetensors"]

    torch.save(x, tmp_path / "x.pt")
    arguments = [str(tmp_path / part) for part in ("saved", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, *arguments], check=True, cwd=tmp_path)
    loaded = torch.load(tmp_path / "y.pt", weights_only=True)
    torch.testing.assert_close(loaded, logits(model, x), rtol=0, atol=0)


def test_a_model_from_the_callers_code_loads_onto_a_fresh_one(tmp_path: Path) -> None:
    def build() -> nn.Module:
        shared = nn.Conv2d(32, 32, 3, padding=1)
        return nn.Sequential(nn.Conv2d(3, 32, 3), shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(32 * 36, 4))

    x = torch.randn(2, 3, 8, 8)
    model = build()
    fdsurgery.testing.settle_(model, x)
    trained_a_little(fdsurgery.convert(model, example_inputs=x), x)
    with pytest.warns(UserWarning, match=r"does not say how it was built.*model=plain.*pass source="):
        fdsurgery.save(model, tmp_path / "alone")
    with pytest.raises(CheckpointError, match=r"does not say how it is built: give the plain model"):
        fdsurgery.load(tmp_path / "alone")
    again = fdsurgery.load(tmp_path / "alone", model=build())
    torch.testing.assert_close(logits(again, x), logits(model, x), rtol=0, atol=0)
    fdsurgery.save(model, tmp_path / "saved", source=ModelSource("file", "models.py:build"))
    with pytest.raises(CheckpointError, match=r"built by models\.py:build.*load\(folder, model=\.\.\.\)"):
        fdsurgery.load(tmp_path / "saved")
    loaded = fdsurgery.load(tmp_path / "saved", model=build())
    assert loaded[1] is loaded[3] and isinstance(loaded[1], FDConv2d)
    torch.testing.assert_close(logits(loaded, x), logits(model, x), rtol=0, atol=0)


def test_parameters_that_overlap_in_memory_are_saved(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3))
        model[2].bias = nn.Parameter(model[0].bias.data)
        return model

    model = fdsurgery.convert(build(), example_inputs=torch.randn(1, 3, 9, 9))
    fdsurgery.save(model, tmp_path / "saved", source=ModelSource("file", "models.py:build"))
    loaded = fdsurgery.load(tmp_path / "saved", model=build())
    assert torch.equal(loaded[2].bias, model[0].bias) and torch.equal(loaded[0].bias, model[0].bias)


def test_saving_again_replaces_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    model, x = CASES["timm resnet18"].settled()
    with pytest.raises(CheckpointError, match="no dynamic layers"):
        fdsurgery.save(model, tmp_path / "saved")
    fdsurgery.convert(model, example_inputs=x)
    fdsurgery.save(model, tmp_path / "saved")
    trained_a_little(model, x)
    fdsurgery.save(model, tmp_path / "saved")
    torch.testing.assert_close(logits(fdsurgery.load(tmp_path / "saved"), x), logits(model, x))

    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        fdsurgery.save(model, other)
    assert sorted(os.listdir(tmp_path)) == ["other", "saved"], "no scratch folder is left"


def test_a_failed_save_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = CASES["timm resnet18"].settled()
    fdsurgery.convert(model, example_inputs=x)
    fdsurgery.save(model, tmp_path / "saved")
    expected = logits(model, x)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fdsurgery.saving.folder.save_file", full_disk)
    trained_a_little(model, x)
    with pytest.raises(CheckpointError, match="No space left"):
        fdsurgery.save(model, tmp_path / "saved")
    assert os.listdir(tmp_path) == ["saved"]
    torch.testing.assert_close(logits(fdsurgery.load(tmp_path / "saved"), x), expected)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "test_resnet": {
        "global_pool": "max",
        "output_stride": 8,
        "in_chans": 1,
        "drop_path_rate": 0.2,
        "act_layer": "gelu",
    },
    "test_resnet.r160_in1k": {"act_layer": nn.SiLU, "drop_rate": 0.3},
    "test_vit": {"img_size": 64, "class_token": False, "global_pool": "avg", "qk_norm": True, "num_classes": 0},
    "test_convnext": {"features_only": True, "out_indices": (1, 2), "kernel_sizes": 5},
    "test_byobnet": {"norm_layer": nn.BatchNorm2d},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_timm_are_remembered(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **ARGUMENTS[name])
    x = torch.randn(2, ARGUMENTS[name].get("in_chans", 3), 64, 64)
    trained_a_little(fdsurgery.convert(fdsurgery.testing.settle_(model, x), example_inputs=x), x)
    loaded = fdsurgery.load(fdsurgery.save(model, tmp_path / "saved"))
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    if hasattr(model, "pretrained_cfg"):
        assert loaded.pretrained_cfg == model.pretrained_cfg
    drops = [[m.drop_prob for m in one.modules() if isinstance(m, timm.layers.DropPath)] for one in (model, loaded)]
    assert drops[0] == drops[1] and (drops[0] or "drop_path_rate" not in ARGUMENTS[name])


@pytest.mark.parametrize(
    ("name", "arguments", "difference"),
    [
        ("test_resnet", {"global_pool": "max"}, r"'global_pool' has pool_type='max', and 'avg' there"),
        ("test_resnet", {"output_stride": 8}, r"'layer\d.*' has (stride|dilation|padding)="),
        ("test_resnet", {"act_layer": "gelu"}, r"is a timm\.layers\.activations\.GELU, and a torch"),
        ("test_resnet", {"in_chans": 1}, r"has in_chan"),
        ("test_resnet", {"drop_path_rate": 0.1}, r"DropPath"),
        ("test_resnet", {"features_only": True}, r"the model itself is a timm.*FeatureListNet"),
        ("test_vit", {"img_size": 64}, r"has img_size=|pos_embed"),
        ("test_vit", {"global_pool": "avg"}, r"global_pool"),
        ("test_vit", {"norm_layer": partial(nn.LayerNorm, eps=0.5)}, r"'blocks\.0\.norm1' .*(eps=0\.5|LayerNorm)"),
    ],
)
def test_a_source_that_builds_another_model_is_found_on_saving(
    name: str, arguments: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    model = timm.create_model(name, **arguments)
    fdsurgery.convert(model, example_inputs=torch.randn(2, arguments.get("in_chans", 3), *model_size(arguments)))
    vars(model).pop("_model_args")  # as of a release of timm that does not note them, without us
    with pytest.raises(CheckpointError, match=rf"builds another model than this one: .*{difference}.*pass source="):
        fdsurgery.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def model_size(arguments: dict[str, Any]) -> tuple[int, int]:
    return (64, 64) if "img_size" in arguments else (160, 160)


def test_models_changed_by_hand_are_not_saved_as_their_library_builds_them(tmp_path: Path) -> None:
    def saved(change: Callable[[Any], object]) -> None:
        torch.manual_seed(0)
        model = fdsurgery.convert(timm.create_model("test_resnet"), example_inputs=torch.randn(2, 3, 64, 64))
        change(model)
        fdsurgery.save(model, tmp_path / "saved")

    with pytest.raises(CheckpointError, match=r"'fc' is a torch\.nn\.modules\.container\.Sequential"):
        saved(lambda model: setattr(model, "fc", nn.Sequential(model.fc)))
    with pytest.raises(CheckpointError, match=r"that one has 'act1'|'act1' is a "):
        saved(lambda model: delattr(model, "act1") if hasattr(model, "act1") else setattr(model.conv1, "1", nn.Tanh()))
    with pytest.raises(CheckpointError, match=r"stride=\(1, 1\), and"):
        saved(
            lambda model: next(m for m in model.modules() if getattr(m, "stride", 1) == (2, 2)).__setattr__(
                "stride", (1, 1)
            )
        )
    with pytest.raises(CheckpointError, match=r"on .*64x64.* it computes|on pixel|on input.* step"):
        saved(
            lambda model: setattr(model.layer4, "forward", lambda x: type(model.layer4).forward(model.layer4, x).abs())
        )
    saved(lambda model: model.reset_classifier(7))
    assert fdsurgery.load(tmp_path / "saved").num_classes == 7


def small() -> nn.Module:
    torch.manual_seed(0)
    return fdsurgery.convert(timm.create_model("test_resnet"), example_inputs=torch.randn(2, 3, 64, 64))


def compiled_part(model: Any) -> nn.Module:
    model.layer1 = torch.compile(model.layer1, backend="eager")
    model.layer2[0] = nn.DataParallel(torch.compile(model.layer2[0], backend="eager"))
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "parts": compiled_part,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_saved_under_the_names_of_the_plain_one(wrapper: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = trained_a_little(small(), x)
    expected = logits(model, x)
    wrapped = WRAPPERS[wrapper](model)
    before = [(name, module) for name, module in wrapped.named_modules()]
    for save in (fdsurgery.save, fdsurgery.save_pretrained):
        save(wrapped, tmp_path / "saved")
        with safe_open(tmp_path / "saved/model.safetensors", framework="pt") as file:
            assert not any("_orig_mod" in name or "module." in name for name in file.keys())  # noqa: SIM118
        assert torch.equal(logits(fdsurgery.load(tmp_path / "saved"), x), expected)
    after = list(wrapped.named_modules())
    assert [(name, id(module)) for name, module in before] == [(name, id(module)) for name, module in after]


def test_forms_whose_weights_are_not_their_own_are_refused_with_the_remedy(tmp_path: Path) -> None:
    import peft

    adapted = peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules="fc"))
    with pytest.raises(CheckpointError, match=r"PEFT adapter \(PeftModel\).*merge_and_unload\(\)"):
        fdsurgery.save(adapted, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="'fc' carries a PEFT adapter"):
        fdsurgery.save(adapted.get_base_model(), tmp_path / "saved")
    fdsurgery.save(adapted.merge_and_unload(), tmp_path / "saved")
    with pytest.raises(CheckpointError, match="prepared for inference"):
        fdsurgery.save(fdsurgery.compile_for_inference(small()), tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()


class MixedTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 32, 3).to(torch.float64)
        self.third = nn.Conv2d(32, 4, 3)
        self.register_buffer("table", torch.linspace(0, 1, 7), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x.to(self.first.bias.dtype)).float())
        return self.third(self.second(x.double()).float())


def test_types_of_all_tensors_are_kept(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10).to(torch.bfloat16)
    fdsurgery.convert(model)
    loaded = fdsurgery.load(fdsurgery.save(model, tmp_path / "half"))
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    x = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    assert torch.equal(logits(loaded, x), logits(model.eval(), x))

    mixed = MixedTypes().eval()
    mixed.first.half()
    mixed.table = mixed.table.half()
    fdsurgery.convert(mixed, example_inputs=torch.randn(2, 3, 9, 9), kernel_num=4)
    fdsurgery.save(mixed, tmp_path / "mixed", source=ModelSource("file", "models.py:build"))
    back = fdsurgery.load(tmp_path / "mixed", model=MixedTypes())
    for (name, tensor), (_, expected) in zip(back.named_parameters(), mixed.named_parameters(), strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert torch.equal(back.table, mixed.table) and back.table.dtype == torch.float16


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            ModelSource("timm", "test_resnet", {"checkpoint_path": "x.pth"}),
            "'checkpoint_path' is never taken from a file",
        ),
        (ModelSource("timm", "test_resnet", {"pretrained_cfg": {"file": "x.pth"}}), "'pretrained_cfg' is never taken"),
        (ModelSource("timm", "test_resnet", {"pretrained": True}), "'pretrained' is never taken"),
        (ModelSource("timm", "test_resnet", {"global_pul": "max"}), "none that a saved model may give; did you mean"),
        (ModelSource("timm", "hf-hub:somebody/model"), "no name of timm's registry"),
        (ModelSource("timm", "local-dir:m"), "no name of timm's registry"),
        (ModelSource("timm", "../test_resnet"), "no name of timm's registry"),
        (ModelSource("timm", "test_resnet", {"layers": [10**9] * 4}), "digits|larger model"),
        (ModelSource("timm", "test_resnet", {"layers": [10**6] * 4}), "larger model than its weights are for"),
        (ModelSource("torchvision", "resnet18", {"weights": "DEFAULT"}), "'weights' is never taken from a file"),
        (
            ModelSource("torchvision", "fcn_resnet50", {"weights_backbone": "DEFAULT"}),
            "'weights_backbone' is never taken",
        ),
        (ModelSource("transformers", "pipeline"), "no model class 'pipeline'"),
        (ModelSource("transformers", "PreTrainedModel"), "no config of its own"),
        (ModelSource("transformers", "DetrModel", {"backbone": "somebody/backbone"}), "would have to be fetched"),
        (ModelSource("transformers", "TimmWrapperModel", {"architecture": "hf-hub:a/b"}), "no name of timm's registry"),
        (
            ModelSource(
                "transformers", "TimmWrapperModel", {"architecture": "test_resnet", "model_args": {"file": "x"}}
            ),
            "'file' is never taken from a file",
        ),
        (ModelSource("transformers", "TimmBackbone", {"backbone": "local-dir:x"}), "no name of timm's registry"),
        (ModelSource("transformers", "YosoModel"), "download code when they are built"),
    ],
)
def test_a_description_cannot_make_a_library_read_fetch_or_run(
    source: ModelSource, message: str, tmp_path: Path
) -> None:
    saved = fdsurgery.save(small(), tmp_path / "saved")
    description = json.loads((saved / "fdsurgery.json").read_text())
    (saved / "fdsurgery.json").write_text(json.dumps({**description, "source": source.to_dict()}))
    with pytest.raises(CheckpointError, match=message):
        fdsurgery.load(saved)


def test_loading_leaves_no_trace_and_takes_none(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = trained_a_little(small(), x)
    fdsurgery.save(model, tmp_path / "saved")

    def drawn() -> tuple[float, ...]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    def seeded() -> None:
        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(3)

    seeded()
    expected = drawn()
    seeded()
    fdsurgery.load(fdsurgery.save(model, tmp_path / "again"))
    assert drawn() == expected
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.device("meta"):
            loaded = fdsurgery.load(tmp_path / "saved")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(default)
    assert not any(tensor.is_inference() or tensor.is_meta for tensor in loaded.state_dict().values())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits(loaded, x), logits(model, x))


def test_a_save_that_does_not_fit_leaves_the_callers_model_as_it_was(tmp_path: Path) -> None:
    fdsurgery.save(small(), tmp_path / "saved", source=ModelSource("file", "models.py:build"))
    plain = timm.create_model("test_resnet", num_classes=3).half()
    before = copy.deepcopy(plain)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        fdsurgery.load(tmp_path / "saved", model=plain)
    assert [type(m) for m in plain.modules()] == [type(m) for m in before.modules()]
    for tensor, expected in zip(plain.state_dict().values(), before.state_dict().values(), strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def test_damaged_saves_are_told_in_one_message(tmp_path: Path) -> None:
    model, x = CASES["timm resnet18"].settled()
    fdsurgery.convert(model, example_inputs=x)
    saved = fdsurgery.save(model, tmp_path / "saved")
    description = json.loads((saved / "fdsurgery.json").read_text())
    weights = (saved / "model.safetensors").read_bytes()

    def expect(message: str, **changes: object) -> None:
        (saved / "fdsurgery.json").write_text(json.dumps({**description, **changes}))
        with pytest.raises(CheckpointError, match=message):
            fdsurgery.load(saved)

    expect("expected format 1, found 7", format=7)
    expect("is damaged", source={"library": "timm"})
    expect("is damaged", layers={"layer1.0.conv1": {"operator": "fdconv", "settings": {"kernel_nums": 3}}})
    expect("has no layer 'layer9'", layers={"layer9": description["layers"]["layer1.0.conv1"]})
    expect("does not fit the model", layers={"layer1.0.conv1": description["layers"]["layer1.0.conv1"]})
    expect("unknown source library 'os'", source={"library": "os", "name": "system", "arguments": {}})
    expect("no model class 'pipeline'", source={"library": "transformers", "name": "pipeline", "arguments": {}})
    for text in ("", "{", "[]", "null"):
        (saved / "fdsurgery.json").write_text(text)
        with pytest.raises(CheckpointError):
            fdsurgery.load(saved)
    (saved / "fdsurgery.json").write_text(json.dumps(description))
    for damaged in (b"", weights[:100], weights[:-1000]):
        (saved / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no whole safetensors"):
            fdsurgery.load(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        fdsurgery.load(saved)
    with pytest.raises(CheckpointError, match="no saved converted model"):
        fdsurgery.load(tmp_path / "nowhere")


def test_a_detector_with_weights_is_built_again_with_its_frozen_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision
    from torchvision.models._api import WeightsEnum
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as builder

    from fdsurgery.saving.source import build

    torch.manual_seed(0)
    downloaded = builder(weights=None, weights_backbone=None).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: downloaded)
    model, source = build("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", pretrained=True)
    frozen = [m for m in model.modules() if isinstance(m, torchvision.ops.FrozenBatchNorm2d)]
    assert frozen and source.arguments == {"frozen_norms": frozen[0].eps}
    fdsurgery.convert(model.backbone, "generic", example_inputs=torch.randn(1, 3, 64, 64), kernel_num=4)
    fdsurgery.save(model, tmp_path / "saved", source=source)
    loaded = fdsurgery.load(tmp_path / "saved")
    images = torch.randn(1, 3, 64, 64)
    for name, expected in model.backbone(images).items():
        torch.testing.assert_close(loaded.backbone(images)[name], expected)
    assert build("torchvision:resnet18", pretrained=False)[1].arguments == {}

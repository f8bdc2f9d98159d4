"""Checkpoints converted on disk: what the authors' tool does, for any recipe, and their names to ours and back.

Their code is not part of this repository. What their tool writes is stated here by names, shapes and a formula in
numpy's float64.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from models import small_hf_resnet, small_segformer, small_vit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_folder import logits, trained_a_little
from torch import Tensor, nn
from typer.testing import CliRunner

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdconv.official import public_groups
from fdsurgery import CheckpointError
from fdsurgery.checkpoints import MisfitError, convert_checkpoint, load_tensors, plan_checkpoint
from fdsurgery.cli import app

State = dict[str, Tensor]


def random_state(model: nn.Module) -> State:
    """A model's state with every number drawn at random, so that no two tensors can be confused."""
    torch.manual_seed(0)
    return {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


def in_mmseg_names(state: State) -> State:
    """A timm ViT's backbone as mmseg names it."""
    pairs = [
        ("blocks.", "layers."),
        (".norm1.", ".ln1."),
        (".norm2.", ".ln2."),
        ("attn.qkv.", "attn.attn.in_proj_"),
        ("attn.proj.", "attn.attn.out_proj."),
        ("mlp.fc1.", "ffn.layers.0.0."),
        ("mlp.fc2.", "ffn.layers.1."),
        ("patch_embed.proj.", "patch_embed.projection."),
    ]
    renamed = {}
    for name, value in state.items():
        if name.startswith("head."):
            continue
        for timm_part, mmseg_part in pairs:
            name = name.replace(timm_part, mmseg_part)
        renamed["ln1." + name[5:] if name.startswith("norm.") else name] = value
    return renamed


def dft_weight(weight: Tensor) -> np.ndarray[Any, Any]:
    """The authors' formula: the spectrum of the weight image over half of the smaller channel count."""
    out, in_channels, *kernel = weight.shape
    k = kernel[0] if kernel else 1
    image = weight.double().numpy().reshape(out, in_channels, k, k).transpose(0, 2, 1, 3).reshape(out * k, -1)
    spectrum = np.fft.rfft2(image) / (min(out, in_channels) // 2)
    return np.stack([spectrum.real, spectrum.imag], -1)[None]


def written_by_the_tool(state: State, patterns: tuple[str, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """What `tools/convert_to_fdconv.py` makes of a state dict: names by pattern, from 32 channels, 1x1 and 3x3."""
    result = {}
    for name, value in state.items():
        matched = any(pattern in name for pattern in patterns) and min(value.shape[:2]) >= 32
        if matched and (value.dim() == 2 or value.shape[2] in (1, 3)):
            result[name.replace(".weight", ".dft_weight")] = dft_weight(value)
        else:
            result[name] = value.numpy()
    return result


def in_mmdet_names(state: State) -> State:
    """A timm ResNet, its stem of one convolution or of three, as mmdet names it."""
    deep = "conv1.0.weight" in state
    renamed = {}
    for name, value in state.items():
        if deep and name.startswith("conv1."):
            name = "stem." + name.removeprefix("conv1.")
        if deep and name.startswith("bn1."):
            name = "stem.7." + name.removeprefix("bn1.")
        renamed[name] = value
    return renamed


def in_mmpretrain(state: State) -> State:
    """With the prefixes that a whole classifier has there."""
    renamed = in_mmdet_names(state)
    return {("head." if name.startswith("fc.") else "backbone.") + name: value for name, value in renamed.items()}


TOOL = {
    "resnet": ("timm:test_resnet", ("conv1.weight", "conv2.weight", "conv3.weight"), 9),
    "vit": ("timm:deit_tiny_patch16_224", (".ffn.layers.0.0.weight", ".ffn.layers.1.weight"), 24),
}


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("pattern", TOOL)
def test_the_authors_tool_is_met_tensor_by_tensor(pattern: str, prefix: str, tmp_path: Path) -> None:
    spec, patterns, layers = TOOL[pattern]
    state = random_state(timm.create_model(spec.removeprefix("timm:")))
    state = (
        {k: v for k, v in in_mmdet_names(state).items() if "fc" not in k}
        if pattern == "resnet"
        else in_mmseg_names(state)
    )
    if pattern == "vit":
        state["pos_embed"] = torch.randn(1, 1025, 192)  # of another image size, as in mmseg
    meet_the_tool({prefix + name: value for name, value in state.items()}, spec, patterns, layers, tmp_path)


@pytest.mark.slow
def test_the_authors_tool_is_met_on_resnet50(tmp_path: Path) -> None:
    state = random_state(timm.create_model("resnet50"))
    meet_the_tool(state, "timm:resnet50", TOOL["resnet"][1], 48, tmp_path)


def meet_the_tool(state: State, spec: str, patterns: tuple[str, ...], layers: int, tmp_path: Path) -> None:
    state = (
        {**state, "decode_head.conv_seg.weight": torch.randn(19, 256, 1, 1)} if "backbone.cls_token" in state else state
    )
    torch.save({"state_dict": state, "meta": {"epoch": 3}}, tmp_path / "in.pth")
    plan = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", model=spec, to="official")

    expected = written_by_the_tool(state, patterns)
    result = torch.load(tmp_path / "out.pth", weights_only=True)
    assert result.keys() == expected.keys()
    assert sum("dft_weight" in name for name in result) == layers == len(plan.layers)
    for name, value in expected.items():
        assert result[name].shape == value.shape, name
        error = np.linalg.norm(result[name].double().numpy() - value)
        assert error <= (1e-6 if "dft" in name else 0) * np.linalg.norm(value), name


def test_a_recipe_alone_finds_the_model(tmp_path: Path) -> None:
    torch.save(random_state(timm.create_model("resnet18")), tmp_path / "in.pth")
    plan = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out", recipe="resnet")
    assert plan.model == "timm:resnet18" and len(plan.layers) == 16
    assert not (tmp_path / "out" / "fdsurgery.json").exists(), "another model may have the very same tensors"
    with pytest.raises(CheckpointError, match="fits none of the"):
        plan_checkpoint(tmp_path / "in.pth", tmp_path / "other", recipe="densenet")
    with pytest.raises(CheckpointError, match="give --model SPEC, or --recipe NAME"):
        plan_checkpoint(tmp_path / "in.pth", tmp_path / "other")


def settled(spec: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = timm.create_model(spec), torch.randn(2, 3, 64, 64)
    return fdsurgery.testing.settle_(model, x), x


def save_sharded(state: State, folder: Path, count: int, suffix: str = ".safetensors") -> None:
    """In several files with an index, as transformers writes it."""
    folder.mkdir()
    names, weight_map = list(state), {}
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    for number in range(count):
        file = f"{stem}-{number + 1:05}-of-{count:05}{suffix}"
        part = {name: state[name] for name in names[number::count]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file) if suffix == ".safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_every_wrapping_of_a_plain_checkpoint_gives_the_same_model(tmp_path: Path) -> None:
    model, x = settled("test_resnet")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    mm = in_mmpretrain(state)
    pickled: dict[str, tuple[Any, dict[str, Any]]] = {
        "bare": (state, {}),
        "state_dict": ({"state_dict": state, "epoch": 3, "optimizer": {"state": {}}}, {}),
        "ema": ({"epoch": 3, "model_ema": state}, {}),
        "chosen": ({"model": zeros, "model_ema": state}, {"key": "model_ema"}),
        "nested": ({"model": {"state_dict": state}}, {}),
        "ddp": ({"model": {"module." + name: value for name, value in state.items()}}, {}),
        "mmdet": ({"state_dict": {**mm, "neck.conv.weight": torch.zeros(3)}, "meta": {}}, {}),
        "ddp mmdet": ({"state_dict": {"module." + name: value for name, value in mm.items()}}, {}),
    }
    sources: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name, (content, options) in pickled.items():
        torch.save(content, tmp_path / f"{name}.pth")
        sources[name] = (tmp_path / f"{name}.pth", options)
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "one.safetensors")
    save_sharded(state, tmp_path / "many", 3)
    save_sharded(state, tmp_path / "bins", 3, ".bin")
    for file in ("legacy.pth", "one.safetensors", "many", "bins", "many/model.safetensors.index.json"):
        sources[file] = (tmp_path / file, {})

    results = {}
    for number, (name, (source, options)) in enumerate(sources.items()):
        convert_checkpoint(source, tmp_path / f"out{number}", model="timm:test_resnet", recipe="resnet", **options)
        results[name] = load_tensors(tmp_path / f"out{number}")
    converted = fdsurgery.convert(timm.create_model("test_resnet"))
    for name, result in results.items():
        assert result.keys() == results["bare"].keys() == converted.state_dict().keys(), name
        assert all(torch.equal(value, results["bare"][key]) for key, value in result.items()), name
    converted.load_state_dict(results["many"])
    torch.testing.assert_close(logits(converted.eval(), x), logits(model, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(converted.layer1[0].conv1.dft_weight, fdsurgery.convert(model).layer1[0].conv1.dft_weight)


def official(model: nn.Module) -> nn.Module:
    """A converted model as the authors' code would have trained it: its band masks, its order, nothing neutral."""
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (FDConv2d, FDLinear)):
                layer.frequency_group.copy_(public_groups(layer))
                for name, parameter in layer.named_parameters():
                    if name.startswith(("KSM_", "FBM")):
                        parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def official_state(model: nn.Module) -> State:
    """As their checkpoints have it: without the order."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith("frequency_group")}


TRAVELS = """
import sys, torch, fdsurgery
torch.set_num_threads(1)
for folder, inputs, outputs in zip(*[iter(sys.argv[1:])] * 3):
    with torch.no_grad():
        result = fdsurgery.load(folder)(torch.load(inputs, weights_only=True))
    torch.save(result if isinstance(result, torch.Tensor) else result.logits, outputs)
"""


SIXTEEN: dict[str, Any] = {"kernel_num": 16}
"""Small layers do not make 64 groups of one size."""
NORMED: dict[str, Any] = {**SIXTEEN, "norm": "batch"}
"""The authors' convolutions have no other norm."""


@pytest.mark.parametrize(
    "name", [pytest.param("test_resnet", marks=pytest.mark.long), pytest.param("resnet50", marks=pytest.mark.slow)]
)
def test_three_checkpoints_travel_there_and_back(name: str, tmp_path: Path) -> None:
    """Plain, converted, loaded in a fresh process to the same outputs, and back to the official names."""
    cases: dict[str, tuple[nn.Module, Tensor, Path, str]] = {}
    plain, x = settled(name)
    torch.save({"model": plain.state_dict()}, tmp_path / "timm.pth")
    cases["timm"] = (plain, x, tmp_path / "timm.pth", f"timm:{name}")

    theirs = official(fdsurgery.convert(settled(name)[0], band_mask="interpolated", spectrum="paper", **SIXTEEN))
    torch.save({"state_dict": in_mmpretrain(official_state(theirs)), "meta": {}}, tmp_path / "official.pth")
    cases["official"] = (theirs, x, tmp_path / "official.pth", f"timm:{name}")

    torch.manual_seed(0)
    segformer = fdsurgery.testing.settle_(small_segformer(), x)
    segformer.save_pretrained(tmp_path / "segformer")
    cases["transformers"] = (segformer, x, tmp_path / "segformer", f"hf:{tmp_path / 'segformer'}")

    arguments = []
    for case, (_, inputs, source, spec) in cases.items():
        settings = SIXTEEN if case == "transformers" else NORMED
        plan = convert_checkpoint(source, tmp_path / f"{case}-ours", model=spec, settings=settings)
        assert plan.source_form == ("official" if case == "official" else "plain")
        torch.save(inputs, tmp_path / f"{case}-x")
        arguments += [str(tmp_path / f"{case}-{part}") for part in ("ours", "x", "y")]
    subprocess.run([sys.executable, "-c", TRAVELS, *arguments], check=True, cwd=tmp_path)
    for case, (model, inputs, source, spec) in cases.items():
        y = torch.load(tmp_path / f"{case}-y", weights_only=True)
        torch.testing.assert_close(y, logits(model, inputs), rtol=1e-4, atol=1e-4)

        back = converted(tmp_path / f"{case}-ours", tmp_path / f"{case}-back.pth", model=spec, to="official")
        if case == "official":
            expected = in_mmdet_names(official_state(theirs))
        else:
            expected = converted(source, tmp_path / f"{case}-tool.pth", model=spec, to="official", settings=SIXTEEN)
        layers = {k.removesuffix("dft_weight") for k in expected if k.endswith("dft_weight")}
        assert layers == {k.removesuffix("dft_weight") for k in back if k.endswith("dft_weight")}
        rescaled = {key for key in expected if key.endswith("dft_weight")}  # to the isometric spectrum and back
        assert [key for key in expected.keys() - rescaled if not torch.equal(back[key], expected[key])] == [], case
        for key in rescaled:
            assert (back[key] - expected[key]).norm() <= 1e-6 * expected[key].norm(), key
        for key in back.keys() - expected.keys():
            assert any(key.startswith(layer) for layer in layers), key


def converted(source: Path, destination: Path, **options: Any) -> State:
    convert_checkpoint(source, destination, **options)
    return load_tensors(destination)


def in_mmseg_mit_names(model: nn.Module) -> State:
    """A SegFormer's encoder as mmseg names it: fused queries, keys and values, 1x1 convolutions in the FFNs."""
    state, result = dict(model.state_dict()), {}
    encoder = model.segformer
    if not hasattr(encoder, "stages"):
        pytest.skip("this transformers has older names for a SegFormer's modules than those mapped here")
    for s, stage in enumerate(encoder.stages):
        modules = {f"layers.{s}.0.projection": stage.patch_embeddings.proj, f"layers.{s}.2": stage.layer_norm}
        modules[f"layers.{s}.0.norm"] = stage.patch_embeddings.layer_norm
        for b, block in enumerate(stage.blocks):
            at, attention = f"layers.{s}.1.{b}.", block.attention
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            for leaf in ("weight", "bias"):
                result[f"{at}attn.attn.in_proj_{leaf}"] = torch.cat([getattr(part, leaf).detach() for part in parts])
            modules |= {f"{at}norm1": block.layernorm_before, f"{at}norm2": block.layernorm_after}
            modules |= {f"{at}attn.attn.out_proj": attention.o_proj, f"{at}ffn.layers.1": block.mlp.dwconv.dwconv}
            modules |= {f"{at}ffn.layers.0": block.mlp.fc1, f"{at}ffn.layers.4": block.mlp.fc2}
            if hasattr(attention, "sequence_reduction"):
                modules[f"{at}attn.sr"] = attention.sequence_reduction.sequence_reduction
                modules[f"{at}attn.norm"] = attention.sequence_reduction.layer_norm
        for name, module in modules.items():
            for leaf, value in module.state_dict().items():
                pixel = ".ffn.layers." in name and leaf == "weight" and value.dim() == 2
                result[f"{name}.{leaf}"] = value[:, :, None, None] if pixel else value
    assert sum(value.numel() for value in result.values()) == sum(
        value.numel() for name, value in state.items() if name.startswith("segformer.")
    )
    return result


@pytest.fixture(scope="module")
def mit(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, str]:
    """A SegFormer encoder, an input for it, and the SPEC of it."""
    folder = tmp_path_factory.mktemp("mit")
    torch.manual_seed(0)
    model, x = small_segformer(), torch.randn(2, 3, 64, 64)
    fdsurgery.testing.settle_(model, x)
    encoder = transformers.SegformerModel(model.config).eval()
    encoder.load_state_dict({k[10:]: v for k, v in model.state_dict().items() if k.startswith("segformer.")})
    encoder.config.architectures = ["SegformerModel"]
    encoder.config.save_pretrained(folder)
    encoder.mmseg = in_mmseg_mit_names(model)
    return encoder, x, f"hf:{folder}"


def test_mmseg_mit_goes_to_transformers_and_back(mit: tuple[nn.Module, Tensor, str], tmp_path: Path) -> None:
    encoder, x, spec = mit
    mm = {**{"backbone." + k: v for k, v in encoder.mmseg.items()}, "decode_head.conv_seg.weight": torch.zeros(5)}
    torch.save({"state_dict": mm}, tmp_path / "mm.pth")
    plan = convert_checkpoint(tmp_path / "mm.pth", tmp_path / "ours", model=spec)
    assert len(plan.layers) == 10 and plan.left_behind == ("decode_head.conv_seg.weight",)
    loaded = fdsurgery.load(tmp_path / "ours")
    y = [model(x).last_hidden_state.detach() for model in (loaded, encoder)]
    torch.testing.assert_close(*y, rtol=1e-4, atol=1e-4)

    # Names of transformers in, names of mmseg out; and kept where they were mmseg's already.
    encoder.save_pretrained(tmp_path / "hf")
    for source, prefix in ((tmp_path / "hf", ""), (tmp_path / "mm.pth", "backbone.")):
        convert_checkpoint(source, tmp_path / "official.safetensors", model=spec, to="official")
        result = load_file(tmp_path / "official.safetensors")
        swapped = {
            f"{prefix}{k}" for k in encoder.mmseg if k.endswith((".ffn.layers.0.weight", ".ffn.layers.4.weight"))
        }
        assert len(swapped) == 10
        for name, value in encoder.mmseg.items():
            if prefix + name in swapped:
                expected = torch.from_numpy(dft_weight(value)).float()
                torch.testing.assert_close(result[prefix + name.replace("weight", "dft_weight")], expected)
            else:
                assert torch.equal(result[prefix + name], value), name


THEIR_NAMES = {
    "resnet": (small_hf_resnet, ("conv1.weight", "layer2.0.conv1.dft_weight", "layer2.0.downsample.0.weight")),
    "vit": (small_vit, ("ln1.bias", "layers.1.attn.attn.in_proj_weight", "layers.1.ffn.layers.0.0.dft_weight")),
}


@pytest.mark.parametrize("family", THEIR_NAMES)
def test_other_transformers_models_go_to_their_names_and_back(family: str, tmp_path: Path) -> None:
    build, names = THEIR_NAMES[family]
    torch.manual_seed(0)
    model, x = build(), torch.randn(2, 3, 64, 64)
    fdsurgery.testing.settle_(model, x).save_pretrained(tmp_path / "plain")
    spec = f"hf:{tmp_path / 'plain'}"
    theirs = converted(tmp_path / "plain", tmp_path / "theirs.pth", to="official")
    assert theirs.keys() >= set(names)
    assert not any("encoder" in name or "embedder" in name for name in theirs)
    if family == "vit":
        state = model.state_dict()
        names = [name for name in state if ".1." in name and name.endswith(("q_proj.weight", "query.weight"))]
        names += [name for name in state if ".1." in name and name.endswith(("k_proj.weight", "key.weight"))]
        names += [name for name in state if ".1." in name and name.endswith(("v_proj.weight", "value.weight"))]
        parts = [state[name] for name in names]
        assert torch.equal(theirs["layers.1.attn.attn.in_proj_weight"], torch.cat(parts))
    convert_checkpoint(tmp_path / "theirs.pth", tmp_path / "ours", model=spec)
    torch.testing.assert_close(logits(fdsurgery.load(tmp_path / "ours"), x), logits(model, x), rtol=1e-4, atol=1e-4)


def test_an_official_vit_is_read_by_timm(tmp_path: Path) -> None:
    plain = timm.create_model("deit_tiny_patch16_224", img_size=64)
    (tmp_path / "models.py").write_text(
        "import timm\ndef build():\n    return timm.create_model('deit_tiny_patch16_224', img_size=64, num_classes=0)\n"
    )
    spec, x = f"{tmp_path / 'models.py'}:build", torch.randn(2, 3, 64, 64)
    theirs = official(
        fdsurgery.convert(fdsurgery.testing.settle_(plain, x), band_mask="interpolated", spectrum="paper")
    )
    theirs.reset_classifier(0)
    torch.save({"state_dict": in_mmseg_names(official_state(theirs))}, tmp_path / "official.pth")
    convert_checkpoint(tmp_path / "official.pth", tmp_path / "ours", model=spec, recipe="vit")
    ours = fdsurgery.load(tmp_path / "ours", model=fdsurgery.saving.source.build(spec, pretrained=False)[0])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_settings_are_seen_in_an_official_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"kernel_num": 16, "param_ratio": 2, "reduction": 0.25, "band_lowfreq": True}
    settings |= {"band_groups": 2, "ksm_local": False, "band_mask": "interpolated"}
    model, x = settled("test_resnet")
    theirs = official(fdsurgery.convert(model, spectrum="paper", **settings))
    save_file(official_state(theirs), tmp_path / "in.safetensors")
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "ours", model="timm:test_resnet")
    torch.testing.assert_close(logits(fdsurgery.load(tmp_path / "ours"), x), logits(theirs, x), rtol=1e-5, atol=1e-5)
    changed = plan_checkpoint(
        tmp_path / "in.safetensors", tmp_path / "x", model="timm:test_resnet", settings={"kernel_temperature": 2.0}
    )
    assert changed.description is not None
    assert {entry["settings"]["kernel_temperature"] for entry in changed.description["layers"].values()} == {2.0}


def test_the_tools_own_output_is_read_with_neutral_modulation(tmp_path: Path) -> None:
    model, x = settled("test_resnet")
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    convert_checkpoint(tmp_path / "plain.pth", tmp_path / "tool.pth", model="timm:test_resnet", to="official")
    convert_checkpoint(tmp_path / "tool.pth", tmp_path / "ours", model="timm:test_resnet")
    torch.testing.assert_close(logits(fdsurgery.load(tmp_path / "ours"), x), logits(model, x), rtol=1e-5, atol=1e-5)


def test_our_order_is_carried_and_the_difference_told(tmp_path: Path) -> None:
    model, x = settled("test_resnet")
    trained_a_little(fdsurgery.convert(model, norm="batch", **SIXTEEN), x)
    fdsurgery.save(model, tmp_path / "ours")
    options: dict[str, Any] = {"model": "timm:test_resnet", "to": "official"}
    plan = convert_checkpoint(tmp_path / "ours", tmp_path / "official.safetensors", **options)
    assert any("does not read frequency_group" in note for note in plan.notes)
    assert any("7 layers cut their bands exactly" in note for note in plan.notes)
    expected = {name for name in in_mmdet_names(model.state_dict()) if not name.endswith("spectrum_scale")}
    assert load_file(tmp_path / "official.safetensors").keys() == expected
    again = convert_checkpoint(tmp_path / "official.safetensors", tmp_path / "again", model="timm:test_resnet")
    assert again.source_form == "ours", "the order is in it"
    torch.testing.assert_close(logits(fdsurgery.load(tmp_path / "again"), x), logits(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [0, 7])
def test_the_classifier_is_that_of_the_checkpoint(classes: int, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=classes)
    torch.save(model.state_dict(), tmp_path / "in.pth")
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "ours", model="timm:test_resnet")
    assert fdsurgery.load(tmp_path / "ours").num_classes == classes


def test_what_does_not_fit_is_a_list_and_nothing_is_written(tmp_path: Path) -> None:
    state = random_state(timm.create_model("test_resnet"))
    state["layer1.0.conf1.weight"] = state.pop("layer1.0.conv1.weight")
    state["layer2.0.bn1.weight"] = torch.zeros(3)
    state["fc_aux.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(MisfitError) as raised:
        convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "out", model="timm:test_resnet")
    assert {problem.kind for problem in raised.value.problems} == {"missing", "unexpected", "wrong shape"}
    text = str(raised.value)
    assert "1 wrong shape, 1 missing, 2 unexpected; nothing was written" in text
    assert "missing: layer1.0.conv1.weight; did you mean 'layer1.0.conf1.weight'?" in text
    assert "unexpected: layer1.0.conf1.weight; did you mean 'layer1.0.conv1.weight'?" in text
    assert "wrong shape: layer2.0.bn1.weight is 3 in the checkpoint, 48 in the model" in text
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_convolution_of_theirs_is_no_linear_layer_of_ours(mit: tuple[nn.Module, Tensor, str], tmp_path: Path) -> None:
    encoder, _, spec = mit
    state = dict(encoder.mmseg)
    name = "layers.0.1.0.ffn.layers.0"
    conv = FDConv2d(16, 64, 1)
    del state[f"{name}.weight"], state[f"{name}.bias"]
    state |= {f"{name}.{leaf}": value for leaf, value in conv.state_dict().items() if leaf != "frequency_group"}
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(MisfitError, match=rf"no counterpart: {name}: it is modulated as a convolution"):
        plan_checkpoint(tmp_path / "in.pth", tmp_path / "out", model=spec)


def test_layers_that_the_public_code_does_not_have_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnext26ts").state_dict(), tmp_path / "plain.pth")
    with pytest.raises(MisfitError, match=r"its convolution has \d+ groups"):
        plan_checkpoint(tmp_path / "plain.pth", tmp_path / "x.pth", model="timm:resnext26ts", to="official")
    options: dict[str, Any] = {"model": "timm:test_resnet", "settings": {"kernel_num": 7, "norm": "batch"}}
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "small.pth")
    noted = plan_checkpoint(tmp_path / "small.pth", tmp_path / "x.pth", to="official", **options)
    assert any("make no 7 groups of one size" in note for note in noted.notes)
    convert_checkpoint(tmp_path / "small.pth", tmp_path / "ours", **options)
    with pytest.raises(MisfitError, match="make no 7 groups of one size"):
        plan_checkpoint(tmp_path / "ours", tmp_path / "x.pth", to="official", model="timm:test_resnet")


def test_many_files_stay_many(tmp_path: Path) -> None:
    model, x = settled("test_resnet")
    save_sharded(model.state_dict(), tmp_path / "plain", 4)
    counted: list[int] = []
    plan = plan_checkpoint(tmp_path / "plain", tmp_path / "ours", model="timm:test_resnet")
    fdsurgery.checkpoints.carry_out(plan, counted.append)
    assert sum(counted) == plan.nbytes
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert files == [
        "conversion.json",
        "fdsurgery.json",
        *(f"model-{number:05}-of-00004.safetensors" for number in range(1, 5)),
        "model.safetensors.index.json",
    ]
    for file in files[2:6]:
        with safe_open(tmp_path / "ours" / file, "pt") as opened:  # it refuses gaps and wrong offsets
            assert len(opened.keys()) > 10
            assert all(opened.get_tensor(name) is not None for name in opened.keys())  # noqa: SIM118
    converted = fdsurgery.convert(timm.create_model("test_resnet"))
    converted.load_state_dict(load_tensors(tmp_path / "ours"))
    torch.testing.assert_close(logits(converted.eval(), x), logits(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    model = settled("test_resnet")[0].to(dtype)
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", model="timm:test_resnet")
    converted = fdsurgery.convert(model, example_inputs=torch.randn(1, 3, 64, 64, dtype=dtype)).state_dict()
    result = load_file(tmp_path / "out.safetensors")
    assert {name: value.dtype for name, value in result.items()} == {k: v.dtype for k, v in converted.items()}
    assert all(torch.equal(value, converted[name]) for name, value in result.items() if "KSM_Global.fc." not in name)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    save_file(random_state(timm.create_model("test_resnet")), tmp_path / "in.safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        convert_checkpoint(tmp_path / "in.safetensors", tmp_path / name, model="timm:test_resnet")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_tied_layers_come_once_or_under_every_name(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(
        "from torch import nn\ndef build():\n    shared = nn.Conv2d(32, 32, 3, padding=1)\n"
        "    return nn.Sequential(nn.Conv2d(3, 32, 3), shared, nn.ReLU(), shared)\n"
    )
    spec = f"{tmp_path / 'models.py'}:build"
    model = fdsurgery.saving.source.build(spec, pretrained=False)[0]
    state = model.state_dict()
    once = {name: value for name, value in state.items() if not name.startswith("3.")}
    for number, content in enumerate((state, once)):
        torch.save(content, tmp_path / f"{number}.pth")
        convert_checkpoint(tmp_path / f"{number}.pth", tmp_path / f"out{number}", model=spec)
        loaded = fdsurgery.load(
            tmp_path / f"out{number}", model=fdsurgery.saving.source.build(spec, pretrained=False)[0]
        )
        assert loaded[1] is loaded[3] and isinstance(loaded[1], FDConv2d)
        x = torch.randn(1, 3, 16, 16)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["checkpoint", "convert", *arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = settled("test_resnet")
    save_file(model.state_dict(), "in.safetensors")
    text = invoke("in.safetensors", "out", "--model", "timm:test_resnet", "--dry-run")
    assert "9 dynamic layers, by recipe resnet" in text and "in.safetensors: 92 tensors, 1.9 MB" in text
    plan = json.loads(invoke("in.safetensors", "out", "-m", "timm:test_resnet", "--dry-run", "--json"))
    assert plan["files"]["model.safetensors"]["layer1.0.conv1.dft_weight"] == ["F32", 1, 96, 49, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"], "a dry run writes nothing"
    assert "written to out" in invoke("in.safetensors", "out", "-m", "timm:test_resnet", "--set", "kernel_num=16")
    assert fdsurgery.load("out").layer1[0].conv1.config.kernel_num == 16
    invoke("in.safetensors", "out", "-m", "timm:test_resnet")
    torch.testing.assert_close(logits(fdsurgery.load("out"), x), logits(model, x), rtol=1e-5, atol=1e-5)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    for arguments, message in (
        (["in.safetensors", "in.safetensors"], "is or holds what is to be read"),
        (["in.safetensors", "."], "is or holds what is to be read"),
        (["in.safetensors", "precious"], "is not empty and holds no earlier conversion"),
        (["in.safetensor", "x"], "no such file; did you mean 'in.safetensors'?"),
        (["in.safetensors", "x", "--to", "offical"], "did you mean 'official'?"),
        (["in.safetensors", "x", "--from", "theirs"], "a checkpoint is one of plain, official, ours"),
        (
            ["in.safetensors", "x", "--from", "official"],
            "is no official checkpoint: it has no tensors",
        ),
        (["in.safetensors", "x", "--key", "model"], "has no entries to choose 'model' from"),
        (["in.safetensors", "x", "--model", "timm:resnet5000"], "timm has no model 'resnet5000'"),
        (["in.safetensors", "x", "--model", "timm:vit_tiny_patch16_224"], "none of its 92 tensors is named like"),
        (["in.safetensors", "x", "--recipe", "resnett"], "did you mean 'resnet'"),
    ):
        options = [] if "--model" in arguments or "--recipe" in arguments else ["--model", "timm:test_resnet"]
        assert message in invoke(*arguments, *options, code=2).replace("\n", " ")
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", "out", "precious"}


SETTINGS = {"temperature": 3.0, "bands": (2, 4, 8, 16), "global_activation": "tanh", "band_activation": "softmax"}


def settings_in(folder: Path) -> list[dict[str, Any]]:
    layers = json.loads((folder / "fdsurgery.json").read_text())["layers"]
    return [{name: entry["settings"][name] for name in SETTINGS} for entry in layers.values()]


def test_a_bare_file_of_ours_tells_the_settings(tmp_path: Path) -> None:
    model = fdsurgery.convert(timm.create_model("test_resnet", num_classes=3), **SETTINGS)
    fdsurgery.save(model, tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "model.safetensors", tmp_path / "elsewhere.safetensors")
    wanted = [{**SETTINGS, "bands": list(SETTINGS["bands"])}] * 9
    for at, source in enumerate(("saved", "saved/model.safetensors", "elsewhere.safetensors", "out0.safetensors")):
        plan = convert_checkpoint(tmp_path / source, tmp_path / f"out{at}", model="timm:test_resnet")
        assert settings_in(tmp_path / f"out{at}") == wanted and not any("guessed" in note for note in plan.notes)
        if at == 0:  # a file that a conversion has written tells them too
            convert_checkpoint(tmp_path / source, tmp_path / "out0.safetensors", model="timm:test_resnet")


def test_what_is_guessed_is_said(tmp_path: Path) -> None:
    model = fdsurgery.convert(timm.create_model("test_resnet", num_classes=3), temperature=3.0)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    plan = convert_checkpoint(tmp_path / "bare.pth", tmp_path / "out", model="timm:test_resnet")
    assert any("settings of 9 layers, 'layer1.0.conv1' first, are guessed" in note for note in plan.notes)
    assert any("temperature 1.0" in note and "--set" in note for note in plan.notes)
    given = {"temperature": 3.0}
    plan = convert_checkpoint(tmp_path / "bare.pth", tmp_path / "told", model="timm:test_resnet", settings=given)
    assert any("temperature 3.0" in note for note in plan.notes)
    assert all(entry["temperature"] == 3.0 for entry in settings_in(tmp_path / "told"))


def test_a_folder_of_transformers_tells_the_settings(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(depths=[1, 1], hidden_sizes=[64, 128], embedding_size=64, num_labels=3)
    model = fdsurgery.convert(transformers.ResNetForImageClassification(config), **SETTINGS)
    fdsurgery.save_pretrained(model, tmp_path / "saved")
    for at, source in enumerate(("saved", "saved/model.safetensors")):
        plan = convert_checkpoint(tmp_path / source, tmp_path / f"out{at}", model=f"hf:{tmp_path / 'saved'}")
        assert all(
            entry["temperature"] == 3.0 and entry["bands"] == [2, 4, 8, 16] for entry in settings_in(plan.destination)
        )
        assert not any("guessed" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"band_edges": "learned"}, "band_edges is 'learned'"),
        ({"band_edges": "dynamic"}, "band_edges is 'dynamic'"),
        ({"norm": "rms"}, "norm is 'rms'"),
        ({"band_activation": "softmax"}, "band_activation is 'softmax'"),
        ({"ksm_global": False}, "ksm_global is False"),
        ({"kernel_activation": "tanh"}, "kernel_activation is 'tanh'"),
        ({"reduction": 1e-3, "min_attention_channels": 4}, "min_attention_channels is 4"),
    ],
)
def test_what_the_authors_code_cannot_hold_is_refused(settings: dict[str, Any], setting: str, tmp_path: Path) -> None:
    model = fdsurgery.convert(
        timm.create_model("test_resnet", num_classes=3), **{"kernel_num": 2, "norm": "batch"} | settings
    )
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    fdsurgery.save(model, tmp_path / "saved")
    with pytest.raises(MisfitError, match=f"no counterpart: layer1\\.0\\.conv1: its {setting}, which the public"):
        convert_checkpoint(tmp_path / "saved", tmp_path / "o.pth", model="timm:test_resnet", to="official")
    assert not (tmp_path / "o.pth").exists()


def test_what_the_authors_code_must_be_told_is_said(tmp_path: Path) -> None:
    model = fdsurgery.convert(
        timm.create_model("test_resnet", num_classes=3),
        kernel_num=2,
        norm="batch",
        temperature=3.0,
        bands=(2, 4),
        kernel_activation="softmax",
    )
    fdsurgery.save(model, tmp_path / "saved")
    plan = convert_checkpoint(tmp_path / "saved", tmp_path / "o.pth", model="timm:test_resnet", to="official")
    told = next(note for note in plan.notes if "must be built with" in note)
    assert "ksm_global_act='softmax'" in told and "temp=3.0" in told and "{'k_list': [2, 4]}" in told

"""PEFT's adapters on converted models: what works computes what it should, what cannot work says so."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import small_vit
from torch import Tensor, nn

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdsurgery.integrations.peft import registration
from fdsurgery.verification import relative_error

peft = pytest.importorskip("peft")

from fdsurgery.integrations.peft.lora import BesideDynamic  # noqa: E402  imports peft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LINEAR = ["qkv", "fc1"]  # an attention layer, plain, and an FFN layer, dynamic
CONV = r"layer\d\.\d\.conv[12]"


def randomise_modulation(model: nn.Module) -> None:
    """Modulation away from neutral, where a dynamic layer is no longer its static twin."""
    for layer in model.modules():
        if isinstance(layer, (FDConv2d, FDLinear)):
            for module in (layer.KSM_Global, layer.KSM_Local, layer.FBM):
                for parameter in module.parameters() if module is not None else ():
                    nn.init.normal_(parameter, std=0.2)


def randomise_adapters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


def converted(name: str) -> tuple[nn.Module, Tensor]:
    """A converted model with modulation, and a batch."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = small_vit() if name == "hf vit" else timm.create_model(name, **({"img_size": 64} if "vit" in name else {}))
    model = fdsurgery.convert(fdsurgery.testing.settle_(model, x))
    randomise_modulation(model)
    return model, x


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(x)
    return getattr(result, "logits", result)


def adapted(name: str, **settings: Any) -> tuple[Any, nn.Module, Tensor]:
    """A model with random LoRA adapters, the model without them, and a batch."""
    model, x = converted(name)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, **settings)).eval()
    randomise_adapters(adapted)
    return adapted, model, x


@pytest.mark.parametrize(
    ("name", "targets"), [("test_vit", LINEAR), ("hf vit", ["fc1", "intermediate.dense"]), ("test_resnet", CONV)]
)
def test_a_fresh_adapter_changes_nothing_and_is_plain(name: str, targets: Any) -> None:
    model, x = converted(name)
    before = outputs(model, x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).eval()
    assert relative_error(outputs(adapted, x), before) < 1e-6
    beside = [layer for layer in adapted.modules() if isinstance(layer, BesideDynamic)]
    assert beside
    for layer in beside:
        assert isinstance(layer.base_layer, (FDConv2d, FDLinear))
        parts = [*layer.lora_A.values(), *layer.lora_B.values()]
        assert {type(part) for part in parts} <= {nn.Linear, nn.Conv2d}


def test_the_sum_beside_a_linear_layer() -> None:
    model, _, _ = adapted("test_vit", target_modules=LINEAR)
    layer = model.base_model.model.blocks[0].mlp.fc1
    x = torch.randn(2, 5, layer.in_features)
    weights = layer.base_layer.sample_weights(x)[..., 0, 0]
    assert not torch.allclose(weights[0], weights[1])  # else the layer is static, and this test proves little
    expected = torch.einsum("bpi,boi->bpo", x, weights) + layer.base_layer.bias
    expected = expected + layer.scaling["default"] * (
        x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    )
    assert relative_error(layer(x), expected) < 1e-5


def test_the_sum_beside_a_convolution() -> None:
    model, _, _ = adapted("test_resnet", target_modules=CONV)
    layer = model.base_model.model.layer2[0].conv2
    x = torch.randn(2, layer.in_features, 7, 9)
    a, b, conv = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer
    branch = nn.functional.conv2d(nn.functional.conv2d(x, a, None, conv.stride, conv.padding), b)
    assert relative_error(layer(x), conv(x) + layer.scaling["default"] * branch) < 1e-6


@pytest.mark.parametrize(
    ("name", "targets"), [("test_vit", LINEAR), ("hf vit", ["fc1", "intermediate.dense"]), ("test_resnet", CONV)]
)
def test_adapters_train_save_load_and_switch_off(name: str, targets: Any, tmp_path: Path) -> None:
    model, x = converted(name)
    plain = outputs(model, x)
    base = copy.deepcopy(model)
    trained = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    frozen = {key: value.clone() for key, value in trained.state_dict().items() if "lora_" not in key}
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=0.02)
    trained.eval()  # so that no norm counts the batch
    for _ in range(2):
        result = trained(x)
        getattr(result, "logits", result).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relative_error(outputs(trained, x), plain) > 1e-3
    assert all(torch.equal(trained.state_dict()[key], value) for key, value in frozen.items())
    trained.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded, x), outputs(trained, x))
    with loaded.disable_adapter():
        assert relative_error(outputs(loaded, x), plain) < 1e-6
    assert relative_error(outputs(loaded.unload(), x), plain) < 1e-6


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize(("name", "targets"), [("test_vit", LINEAR), ("test_resnet", CONV)])
def test_merging_is_refused_and_changes_no_output(name: str, targets: Any, safe: bool) -> None:
    for merge in (lambda m: m.merge_and_unload(safe_merge=safe), lambda m: m.merge_adapter(safe_merge=safe)):
        model, _, x = adapted(name, target_modules=targets)
        before = outputs(model, x)
        with pytest.raises(fdsurgery.UnsupportedModelError, match="cannot be merged into a dynamic layer"):
            merge(model)
        assert relative_error(outputs(model, x), before) < 1e-5  # plain layers before it may be merged by now


def test_adapters_beside_plain_layers_alone_merge() -> None:
    model, _, x = adapted("test_vit", target_modules=["qkv", "proj"])
    before = outputs(model, x)
    merged = model.merge_and_unload()
    assert relative_error(outputs(merged, x), before) < 1e-5
    assert not any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in merged.modules())


@pytest.mark.parametrize("initialisation", ["pissa", "pissa_niter_2", "olora", "corda"])
def test_initialisations_that_change_the_weight_are_refused(initialisation: str) -> None:
    model, _ = converted("test_vit")
    with pytest.raises(fdsurgery.UnsupportedModelError, match="init_lora_weights"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights=initialisation))


@pytest.mark.parametrize("initialisation", ["gaussian", "orthogonal"])
def test_initialisations_that_do_not_are_not(initialisation: str) -> None:
    model, x = converted("test_vit")
    before = outputs(model, x)
    config = peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights=initialisation)
    assert relative_error(outputs(peft.get_peft_model(model, config).eval(), x), before) < 1e-5


@pytest.mark.parametrize(("name", "targets"), [("test_vit", ["fc1"]), ("test_resnet", CONV)])
def test_dora_is_refused_beside_dynamic_layers_only(name: str, targets: Any) -> None:
    model, _ = converted(name)
    with pytest.raises(fdsurgery.UnsupportedModelError, match="needs the weight of the layer"):
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=targets, use_dora=True))
    if name == "test_vit":
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv"], use_dora=True))


def test_a_second_adapter_is_held_to_the_same() -> None:
    model, _, _ = adapted("test_resnet", target_modules=CONV)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=CONV))
    layer = model.base_model.model.layer2[0].conv2
    assert type(layer.lora_A["second"]) is nn.Conv2d and isinstance(layer.base_layer, FDConv2d)
    with pytest.raises(fdsurgery.UnsupportedModelError, match="DoraConv2dVariant"):
        model.add_adapter("third", peft.LoraConfig(r=2, target_modules=CONV, use_dora=True))
    assert isinstance(layer.base_layer, FDConv2d)


@pytest.mark.parametrize("tuner", ["LoHaConfig", "LoKrConfig", "IA3Config", "OFTConfig"])
def test_merges_of_other_adapters_are_not_lost_in_silence(tuner: str) -> None:
    """They go into the static weight: exact while the modulation is neutral, and told where it is not."""
    model, x = converted("test_vit")
    for name, parameter in model.named_parameters():
        if "_fc." in name:
            nn.init.zeros_(parameter)
    settings = {"feedforward_modules": []} if tuner == "IA3Config" else {}
    adapted = peft.get_peft_model(model, getattr(peft, tuner)(target_modules=["fc1"], **settings)).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
            assert "fc1" in name
    before = outputs(adapted, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fdsurgery.NeutralWeightWarning)
        adapted.merge_adapter()
    assert relative_error(outputs(adapted, x), before) < 1e-5
    adapted.unmerge_adapter()
    for name, parameter in adapted.named_parameters():
        if "_fc." in name:
            nn.init.normal_(parameter, std=0.2)
    with pytest.warns(fdsurgery.NeutralWeightWarning, match="modulation"):
        adapted.merge_adapter()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_modulation_trains_and_is_saved_as_modules_to_save(name: str, tmp_path: Path) -> None:
    model, x = converted(name)
    base = copy.deepcopy(model)
    parts = ["KSM_Global", "KSM_Local", "FBM"]
    targets = ["qkv"] if name == "test_vit" else "fc"  # as a pattern, which is the whole name: no layer's KSM_Global.fc
    trained = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, modules_to_save=parts)).eval()
    before = outputs(trained, x)
    assert relative_error(before, outputs(base, x)) < 1e-6
    trains = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in trains)
    for name, parameter in trained.named_parameters():
        if ".KSM_Global.modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    assert relative_error(outputs(trained, x), before) > 1e-3
    trained.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded, x), outputs(trained, x))


def test_modulation_to_save_inside_of_an_adapter_is_refused_by_peft() -> None:
    model, _ = converted("test_resnet")
    with pytest.raises(ValueError, match=r"KSM_Global|ModulesToSaveWrapper"):
        peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=CONV, modules_to_save=["KSM_Global"]))


def test_a_dynamic_layer_as_a_module_to_save(tmp_path: Path) -> None:
    model, x = converted("test_vit")
    base = copy.deepcopy(model)
    config = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["fc2"])
    trained = peft.get_peft_model(model, config).eval()
    copied = trained.base_model.model.blocks[0].mlp.fc2.modules_to_save["default"]
    assert isinstance(copied, FDLinear) and copied.dft_weight.requires_grad
    nn.init.normal_(copied.dft_weight)
    trained.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded, x), outputs(trained, x))
    with loaded.disable_adapter():
        assert relative_error(outputs(loaded, x), outputs(trained, x)) > 1e-3


def test_all_linear_leaves_the_modulation_alone() -> None:
    model, _ = converted("test_vit")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    names = [name for name, layer in adapted.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    assert names and not any("KSM" in name for name in names)


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_with_adapters_is_not_converted(merged: bool) -> None:
    model = timm.create_model("test_vit", img_size=64)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=LINEAR))
    if merged:
        adapted.merge_adapter()
    for whole in (adapted, adapted.base_model.model):
        with pytest.raises(fdsurgery.UnsupportedModelError, match="merge_and_unload"):
            fdsurgery.convert(whole)
    plain = adapted.unload() if merged else adapted.merge_and_unload()
    assert any(isinstance(layer, FDLinear) for layer in fdsurgery.convert(plain).modules())


@pytest.mark.parametrize("order", ["import fdsurgery; import peft", "import peft; import fdsurgery"])
@pytest.mark.long
def test_either_may_be_imported_first(order: str) -> None:
    program = (
        f"{order}; from fdconv import FDConv2d; from torch import nn\n"
        "model = nn.ModuleDict({'layer': FDConv2d(4, 8, 3)})\n"
        "adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=['layer']))\n"
        "assert type(adapted.base_model.model['layer']).__name__ == 'DynamicConv2d'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_is_changed_twice() -> None:
    from peft.tuners.lora import model as lora_model

    before = lora_model.dispatch_default
    registration.install(lora_model)
    assert lora_model.dispatch_default is before

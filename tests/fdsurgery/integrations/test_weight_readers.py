"""Code of other libraries that takes `.weight` of a layer past its forward: what docs/weight_readers.md says of it."""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fdsurgery
from fdconv import FDConfig, FDConv2d, FDLinear
from fdconv.weight_reads import NeutralWeightWarning
from fdsurgery.verification import relative_error

PAGE = Path(__file__).parents[3] / "docs" / "weight_readers.md"
CONFIG = FDConfig(kernel_num=4)
OUTCOMES = ("right", "warned", "refused", "passed over")


class Net(nn.Module):
    """Dynamic layers between plain ones, with a norm behind one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(self.stem(x).relu())).relu().flatten(2).mT
        return self.head((y + self.fc2(self.fc1(y).relu())).mean(1))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return fdsurgery.testing.settle_(Net(), X)


def dynamic_net() -> Any:
    model: Any = plain_net()
    model.conv = FDConv2d.from_conv(model.conv, CONFIG)
    model.fc1, model.fc2 = (FDLinear.from_linear(layer, CONFIG) for layer in (model.fc1, model.fc2))
    return far_from_neutral(model).eval()


def far_from_neutral(model: Any) -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "KSM" in name or "FBM" in name:
            parameter.data += torch.randn_like(parameter) * 0.3
    return model


Reader = Callable[[Any], Any]
ROWS: dict[str, Reader] = {}
"""What the rows of the page run: a model is given, and what takes its place returned; None where it stays."""


def row(name: str) -> Callable[[Reader], Reader]:
    def note(reader: Reader) -> Reader:
        ROWS[name] = reader
        return reader

    return note


def library(name: str) -> Any:
    return pytest.importorskip(name)


# torch


@row("`torch.nn.utils.fuse_conv_bn_eval`")
def _(model: Any) -> None:
    model.conv, model.bn = nn.utils.fusion.fuse_conv_bn_eval(model.conv, model.bn), nn.Identity()


@row("`torch.nn.utils.fuse_linear_bn_eval`")
def _(model: Any) -> None:
    norm = nn.BatchNorm1d(16).eval()
    norm.eps = 0.0
    model.fc1 = nn.utils.fusion.fuse_linear_bn_eval(model.fc1, norm)


@row("`torch.nn.TransformerEncoderLayer`, compiled")
def _(model: Any) -> None:
    x = torch.randn(2, 3, 8)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).eval()
    fdsurgery.convert(model, recipe="ffn", example_inputs=x)
    far_from_neutral(model[0].linear1)
    with torch.enable_grad():
        expected = model(x).detach()
    torch._dynamo.reset()
    assert relative_error(torch.compile(model, backend="aot_eager")(x), expected) < 1e-5


@row("`torch.ao.quantization.fuse_modules`")
def _(model: Any) -> Any:
    return torch.ao.quantization.fuse_modules(model, [["conv", "bn"]])


@row("`torch.ao.quantization.quantize_dynamic`")
def _(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@row("`torch.ao.quantization.prepare_qat`")
def _(model: Any) -> Any:
    model.train().qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model).eval()


@row("`torch.ao.quantization.quantize_fx.prepare_fx`")
def _(model: Any) -> Any:
    quantize_fx = importlib.import_module("torch.ao.quantization.quantize_fx")
    return quantize_fx.prepare_fx(model, torch.ao.quantization.get_default_qconfig_mapping("fbgemm"), X)


@row("`torch.ao.pruning` sparsifiers")
def _(model: Any) -> None:
    importlib.import_module("torch.ao.pruning").WeightNormSparsifier().prepare(model, [{"tensor_fqn": "fc1.weight"}])


@row("`torch.fx.experimental.optimization.fuse`")
def _(model: Any) -> Any:
    return importlib.import_module("torch.fx.experimental.optimization").fuse(model)


@row("`torch.fx.experimental.optimization.optimize_for_inference`")
def _(model: Any) -> Any:
    return importlib.import_module("torch.fx.experimental.optimization").optimize_for_inference(model)


@row("`torch.jit.freeze`, `torch.jit.optimize_for_inference` of a traced model")
def _(model: Any) -> Any:
    return torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, X)))


@row("`torch._inductor.config.freezing`")
def _(model: Any) -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(model.fc1, nn.ReLU()), torch.randn(2, 8)  # of which little is to be compiled
    expected = model(x)
    with importlib.import_module("torch._inductor.config").patch(freezing=True):
        assert relative_error(torch.compile(model)(x), expected) < 1e-5


@row("`torch.nn.utils.prune`")
def _(model: Any) -> None:
    prune.l1_unstructured(model.conv, "weight", 0.5)


@row("`torch.nn.utils.parametrize`, `parametrizations`")
def _(model: Any) -> None:
    parametrizations.weight_norm(model.fc1)


@row("`torch.nn.utils.spectral_norm`, `weight_norm` (hooks)")
def _(model: Any) -> None:
    nn.utils.spectral_norm(model.fc1)


@row("`torch.nn.utils.convert_conv2d_weight_memory_format`")
def _(model: Any) -> Any:
    return nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)


@row("`torch.func.functional_call` with a static weight")
def _(model: Any) -> Any:
    torch.func.functional_call(model, {"conv.weight": torch.zeros(8, 8, 3, 3)}, (X,))


@row("`torch.utils.mkldnn.to_mkldnn`")
def _(model: Any) -> None:
    importlib.import_module("torch.utils.mkldnn").to_mkldnn(nn.Sequential(model.conv))


@row("`torch.nn.init`, `_init_weights` of a model")
def _(model: Any) -> None:
    drawn = torch.nn.init.kaiming_normal_(torch.empty(8, 8, 3, 3), generator=torch.Generator().manual_seed(1))
    layer = copy.deepcopy(model.conv)
    nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    layer.reset_modulation()
    torch.testing.assert_close(layer.weight.detach().clone(), drawn)


@row("`F.linear(x, layer.weight)`, `F.conv2d(x, layer.weight)`")
def _(model: Any) -> None:
    nn.functional.linear(torch.randn(2, 8), model.fc1.weight)


@row("a penalty on `layer.weight`")
def _(model: Any) -> None:
    model.conv.weight.abs().sum()


@row("`plain.weight.copy_(layer.weight)`")
def _(model: Any) -> None:
    nn.Linear(8, 16).weight.copy_(model.fc1.weight)


# timm, ultralytics


@row("`timm.utils.reparameterize_model`, a model's `fuse()`, `reparameterize()`")
def _(model: Any) -> Any:
    layer = library("timm.models.levit").ConvNorm(8, 8, 3, padding=1).eval()
    layer.linear, layer.bn = model.conv, model.bn
    library("timm.utils").reparameterize_model(nn.Sequential(layer))


@row("`timm.utils.agc`, averages of a model")
def _(model: Any) -> Any:
    return library("timm.utils").ModelEmaV3(model).module


@row("`ultralytics` `model.fuse()`")
def _(model: Any) -> None:
    model.conv, model.bn = (
        library("ultralytics.utils.torch_utils").fuse_conv_and_bn(model.conv, model.bn),
        nn.Identity(),
    )


@row("`ultralytics` `RepConv`, `RepVGGDW`")
def _(model: Any) -> None:
    block = library("ultralytics.nn.modules.conv").RepConv(8, 8).eval()
    block.conv1.conv, block.conv1.bn = model.conv, model.bn
    block.fuse_convs()


# transformers, PEFT, diffusers, segmentation_models_pytorch


@row("`transformers.pytorch_utils.prune_linear_layer`")
def _(model: Any) -> None:
    library("transformers.pytorch_utils").prune_linear_layer(model.fc1, torch.arange(8))


def adapted(model: Any, method: str, **settings: Any) -> Any:
    peft = library("peft")
    return peft.get_peft_model(model, getattr(peft, f"{method}Config")(target_modules=["fc1"], **settings)).eval()


@row("PEFT: LoRA, beside the layer")
def _(model: Any) -> Any:
    return adapted(model, "Lora")


@row("PEFT: LoRA, merged")
def _(model: Any) -> Any:
    return adapted(model, "Lora").merge_and_unload()


@row("PEFT: DoRA, PiSSA, OLoRA")
def _(model: Any) -> Any:
    return adapted(model, "Lora", use_dora=True)


@row("PEFT: LoHa, LoKr, IA3, OFT, BOFT, VeRA, RoAd, beside the layer")
def _(model: Any) -> Any:
    return adapted(model, "LoHa")


@row("PEFT: the same, merged")
def _(model: Any) -> Any:
    return adapted(model, "LoHa").merge_and_unload()


@row("PEFT: HRA, SHiRA")
def _(model: Any) -> Any:
    return adapted(model, "HRA")(X)


@row("`diffusers` `fuse_qkv_projections`")
def _(model: Any) -> None:
    attention = library("diffusers.models.attention_processor").Attention(8, heads=2, dim_head=4)
    for name in ("to_q", "to_k", "to_v"):
        setattr(attention, name, FDLinear(8, 8, bias=False, config=CONFIG))
    attention.fuse_projections()


@row("`segmentation_models_pytorch` `replace_strides_with_dilation`")
def _(model: Any) -> None:
    dilate = library("segmentation_models_pytorch.encoders._utils").replace_strides_with_dilation
    plain = nn.Conv2d(4, 4, 3, stride=2, padding=1)
    dynamic = FDConv2d.from_conv(plain, CONFIG)
    for layer in (plain, dynamic):
        dilate(nn.Sequential(layer), 2)
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(dynamic(x), plain(x))


# torchao


@row("`torchao` `quantize_`")
def _(model: Any) -> None:
    quantization = library("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


@row("`torchao` `quantize_` with a filter that takes dynamic layers")
def _(model: Any) -> None:
    quantization = library("torchao.quantization")
    takes = lambda module, name: isinstance(module, nn.Linear)  # noqa: E731
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=takes)


@row("`torchao` `apply_fake_sparsity`, `sparsify_`")
def _(model: Any) -> None:
    library("torchao.sparsity").apply_fake_sparsity(model)


@row("`torchao` `convert_to_float8_training`")
def _(model: Any) -> None:
    library("torchao.float8").convert_to_float8_training(model)


def table() -> dict[str, str]:
    """The outcome of each row of the page."""
    lines = [line.split("|")[1:-1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines if not set(line[0].strip()) <= set("-: ")]
    return {reader: outcome for reader, outcome, *_ in cells if reader != "reader"}


def test_the_page_lists_what_is_run_here() -> None:
    assert list(table()) == list(ROWS)
    assert set(table().values()) == set(OUTCOMES)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ROWS)
def test_what_becomes_of_a_reader(name: str) -> None:
    model, outcome = dynamic_net(), table()[name]
    expected = model(X)
    neutral = fdsurgery.restore(copy.deepcopy(model))(X)
    assert relative_error(neutral, expected) > 0.05, "a neutral modulation proves nothing"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if outcome == "refused":
            with pytest.raises(Exception) as refusal:
                ROWS[name](model)
            assert len(str(refusal.value)) > 5
            assert torch.equal(model(X), expected)
            return
        result = ROWS[name](model)
    told = [warning for warning in caught if issubclass(warning.category, NeutralWeightWarning)]
    assert bool(told) == (outcome == "warned")
    result = model if result is None else result
    if outcome == "right":
        assert relative_error(result(X), expected) < 1e-5
    elif outcome == "passed over":
        assert sum(isinstance(layer, (FDConv2d, FDLinear)) for layer in result.modules()) == 3
        own = {name: layer for name, layer in result.named_modules() if isinstance(layer, (FDConv2d, FDLinear))}
        for name, layer in dynamic_net().named_modules():
            if isinstance(layer, (FDConv2d, FDLinear)):
                x = torch.randn(2, 8, 5, 5) if isinstance(layer, FDConv2d) else torch.randn(2, layer.in_features)
                assert torch.equal(own[name](x), layer(x))
    else:
        assert re.search(r"computes with the weight of a dynamic layer.*Call the layer", str(told[0].message))

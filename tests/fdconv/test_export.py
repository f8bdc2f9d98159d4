"""Converted models leave PyTorch: `torch.export` and ONNX, any batch, real arithmetic, the same numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fdsurgery
from fdconv import FDConfig, FDConv2d, FDLinear, constants, onnx_fft
from fdsurgery.verification import relative_error

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from benchmarks.export import modulated_, session  # noqa: E402

ANY_BATCH, ANY_SIZE = {0: "batch"}, {0: "batch", 2: "height", 3: "width"}
SIZES = [(1, 1), (1, 2), (3, 1), (6, 8), (7, 9), (16, 17), (34, 23), (46, 51), (96, 65), (53, 288), (576, 192)]


# The transform


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_real_image_is_the_inverse_real_transform(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    height, width = size  # numbers that are no image's spectrum: a trained one need not be
    spectra = torch.randn(2, height, width // 2 + 1, 2, dtype=torch.float64)
    expected = torch.fft.irfft2(torch.view_as_complex(spectra), s=size)
    assert relative_error(onnx_fft.real_image(onnx_fft.planes(spectra, width), width), expected) < 1e-13
    assert relative_error(onnx_fft.real_image(onnx_fft.planes(spectra.float(), width), width), expected) < 1e-6


def test_factors_are_few_and_small() -> None:
    for size in range(1, 1000):
        found = onnx_fft.factors(size)
        assert math.prod(found) == size
        for factor in found:
            prime = all(factor % divisor for divisor in range(2, factor))
            assert factor <= onnx_fft.LARGEST or prime
    assert onnx_fft.factors(1536) == [16, 16, 6]


def test_constants_are_made_outside_a_trace() -> None:
    constants._kept.cache_clear()
    with FakeTensorMode():
        (step,) = constants.constant(onnx_fft._steps, 5, False, torch.float32)
    assert type(step) is Tensor and relative_error(step[0, 0], torch.tensor([1.0] * 5 + [0.0] * 5) / 5) < 1e-6


# Layers


class Layers(nn.Module):
    """Every way in which a layer uses its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = FDConv2d(3, 12, 3, stride=2, padding=1)
        shared = FDConfig(kernel_num=8, param_ratio=2, kernel_activation="softmax")
        self.grouped = FDConv2d(12, 18, (3, 5), padding=(1, 4), dilation=(1, 2), groups=3, config=shared)
        self.static = FDConv2d(18, 18, 3, padding="same", config=FDConfig(ksm_global=False, ksm_local=False))
        self.point = FDConv2d(18, 14, 1, stride=2)
        self.tokens = FDLinear(14, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.static(self.grouped(self.strided(x).relu()).relu()).relu()
        return self.tokens(self.point(x).flatten(2).transpose(1, 2))


def layers() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(8, 3, 18, 22)
    return modulated_(model, x, std=0.2), x


def exported(model: nn.Module, x: Tensor, path: Path, dynamic: dict[int, str] | None) -> Any:
    """The file's graph, and the file as a function in onnxruntime."""
    shapes = None if dynamic is None else (dynamic,)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    return onnx.load(path), session(path, threads=1)


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def assert_agrees(run: Any, model: nn.Module, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        x = torch.randn(shape)
        assert relative_error(run(x), first(model(x))) < 1e-5, shape


def assert_is_real(file: Any) -> None:
    """No complex numbers, and nothing that stands for them."""
    complex_types = {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
    graph = onnx.shape_inference.infer_shapes(file).graph
    values = [value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)]
    types = {*values, *(tensor.data_type for tensor in graph.initializer)}
    assert onnx.TensorProto.FLOAT in types and not types & complex_types
    assert not {node.op_type for node in graph.node} & {"DFT", "STFT"}
    assert {node.domain for node in graph.node} <= {""}


def test_layers_run_in_onnxruntime_for_any_batch(tmp_path: Path) -> None:
    model, x = layers()
    file, run = exported(model, x[:2], tmp_path / "model.onnx", ANY_BATCH)
    assert_is_real(file)
    assert_agrees(run, model, *((batch, *x.shape[1:]) for batch in (1, 2, 5)))


def test_layers_of_a_fixed_batch_stay_convolutions(tmp_path: Path) -> None:
    model, x = layers()
    file, run = exported(model, x[:2], tmp_path / "model.onnx", None)
    assert_is_real(file)
    groups = [onnx.helper.get_node_attr_value(node, "group") for node in file.graph.node if node.op_type == "Conv"]
    assert {2, 6} <= set(groups)
    assert_agrees(run, model, (2, *x.shape[1:]))


# Converted models


def converted(model: nn.Module, x: Tensor) -> nn.Module:
    fdsurgery.testing.settle_(model, x)
    with torch.no_grad():
        before = first(model(x))
        modulated_(fdsurgery.convert(model), x, std=0.05)
        assert relative_error(first(model(x)), before) > 1e-2  # else a file without the modulation would pass
    return model


def small_resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 48, 48)
    return converted(timm.create_model("test_resnet"), x), x


def small_segformer() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[4, 4],
        decoder_hidden_size=32,
        num_labels=5,
        initializer_range=0.2,  # at its own of 0.02, biases drown the signal
    )
    x = torch.randn(8, 3, 48, 48)
    return converted(transformers.SegformerForSemanticSegmentation(config), x), x


def test_a_converted_resnet_exports_with_torch() -> None:
    model, x = small_resnet()
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    assert_agrees(program, model, (1, *x.shape[1:]), (3, *x.shape[1:]))


def test_a_converted_segformer_exports_with_torch_at_any_size() -> None:
    model, x = small_segformer()
    shapes = (dict.fromkeys(ANY_SIZE, torch.export.Dim.DYNAMIC),)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=shapes).module()
    assert_agrees(lambda x: first(program(x)), model, (1, *x.shape[1:]), (3, 3, 64, 96))


@pytest.mark.long
def test_a_converted_resnet_runs_in_onnxruntime(tmp_path: Path) -> None:
    model, x = small_resnet()
    file, run = exported(model, x[:2], tmp_path / "model.onnx", ANY_BATCH)
    assert_is_real(file)
    assert_agrees(run, model, (1, *x.shape[1:]), (3, *x.shape[1:]))


def test_a_converted_segformer_runs_in_onnxruntime_at_any_size(tmp_path: Path) -> None:
    model, x = small_segformer()
    file, run = exported(model, x[:2], tmp_path / "model.onnx", ANY_SIZE)
    assert_is_real(file)
    assert_agrees(run, model, (1, *x.shape[1:]), (3, 3, 64, 96))

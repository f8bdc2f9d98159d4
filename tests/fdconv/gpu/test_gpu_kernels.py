"""The fused kernels against a few lines of torch in float64, values and gradients.

Without a GPU they run in Triton's interpreter, which conftest.py switches on.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

CUDA = torch.cuda.is_available()
pytest.importorskip("triton")

import test_golden as golden  # noqa: E402

from fdconv import FDConfig, FDConv2d, set_backend  # noqa: E402
from fdconv.gpu import blocks, common, conv, modulate, ops, scale, tuning  # noqa: E402
from fdconv.official import load_layer  # noqa: E402
from fdconv.spectrum import frequency_groups, group_dtype, image_to_weight  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")


def _skip_where_numpy_is_too_new() -> None:
    """The interpreter of older Triton turns arrays of one element into numbers, which NumPy 2.4 no longer does."""
    one = torch.ones(1, 1, 1, 2)
    try:
        ops.scale_spectrum(one, one[0, ..., 0].byte() - 1, one[0, 0, :, :1], 1.0, 1.5, 1)
    except Exception as error:
        if "only 0-dimensional arrays can be converted to Python scalars" not in str(error):
            raise
        pytest.skip("this Triton's interpreter needs NumPy below 2.4", allow_module_level=True)


if not CUDA and common.available(DEVICE):
    _skip_where_numpy_is_too_new()

NAMES = ("image", "context", "taps", "channel", "filter_", "spatial")
Tensors = list[Tensor | None]


@pytest.fixture(autouse=True)
def _setting(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # The gradients of the convolution are cuDNN's, which would round float32 to fewer digits.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def assert_same(ours: Tensor, exact: Tensor, tolerance: float = 2e-6) -> None:
    """Equal up to rounding, measured against the largest value."""
    assert ours.shape == exact.shape
    assert ours.isfinite().all()
    if exact.numel():
        assert (ours.double() - exact.double()).abs().max() <= tolerance * exact.abs().max().clamp(min=1.0)


def check(ours: Any, twin: Any, inputs: Tensors, tolerance: float = 2e-6, grad_tolerance: float = 2e-6) -> None:
    """Value and every gradient of `ours(*inputs)` are those of `twin` in float64."""
    exact_inputs = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    y, exact = ours(*inputs), twin(*exact_inputs)
    assert y.is_contiguous()
    assert_same(y, exact, tolerance)
    cotangent = torch.randn_like(exact).to(y.dtype)
    grads = torch.autograd.grad(y, [x for x in inputs if x is not None], cotangent)
    expected = torch.autograd.grad(exact, [x for x in exact_inputs if x is not None], cotangent.double())
    for x, one, other in zip([x for x in inputs if x is not None], grads, expected, strict=True):
        assert one.dtype == x.dtype
        assert_same(one, other, grad_tolerance)


def shifted(x: Tensor) -> Tensor:
    """The same values, contiguous, from an address that is no multiple of anything."""
    flat = x.detach().flatten()
    return torch.cat([flat.new_zeros(1), flat])[1:].view(x.shape).requires_grad_(x.requires_grad)


def transposed(x: Tensor) -> Tensor:
    """The same values with the first and the last axis swapped in memory."""
    return x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(x.requires_grad)


layouts = pytest.mark.parametrize("layout", [shifted, transposed])


# Spectrum ------------------------------------------------------------------------------------------------------------


def scale_twin(spectra: Tensor, group: Tensor, kernel: Tensor, scale: float, edge: float, width: int) -> Tensor:
    factor = kernel.unflatten(1, (len(spectra), -1))[:, :, group.long()]
    columns = torch.tensor([scale * edge if 2 * v in (0, width) else scale for v in range(width // 2 + 1)])
    return torch.einsum("rijk,brij->bijk", spectra, factor) * columns.to(spectra.device, spectra.dtype)[:, None]


def check_scale(d1: int, d2: int, ratio: int, kernel_num: int, batch: int, dtype: torch.dtype | None = None) -> None:
    group = frequency_groups(d1, d2, kernel_num).to(DEVICE, dtype or group_dtype(kernel_num))
    inputs: Tensors = [draw(ratio, d1, d2 // 2 + 1, 2), draw(batch, ratio * kernel_num)]
    check(
        lambda spectra, kernel: ops.scale_spectrum(spectra, group, kernel, 1.5, 1.3, d2),
        lambda spectra, kernel: scale_twin(spectra, group, kernel, 1.5, 1.3, d2),
        inputs,
        grad_tolerance=1e-5,
    )


@pytest.mark.parametrize("kernel_num", [1, 4, 64])
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize(("d1", "d2", "batch"), [(1, 1, 1), (7, 5, 3), (12, 16, 2), (33, 70, 2)])
def test_scale(d1: int, d2: int, batch: int, ratio: int, kernel_num: int) -> None:
    check_scale(d1, d2, ratio, kernel_num, batch)


def test_scale_three_spectra() -> None:
    check_scale(5, 6, 3, 4, 2)


@pytest.mark.parametrize(("kernel_num", "dtype"), [(4, torch.int32), (200, torch.uint8), (300, torch.int32)])
def test_scale_group_dtypes(kernel_num: int, dtype: torch.dtype) -> None:
    check_scale(19, 32, 1, kernel_num, 2, dtype)


def test_scale_any_group_map() -> None:
    """The groups need not be rings: a map drawn at random, that leaves groups out too."""
    group = torch.randint(2, 7, (18, 40), dtype=torch.uint8, device=DEVICE)
    check(
        lambda spectra, kernel: ops.scale_spectrum(spectra, group, kernel, 0.5, 1.0, 78),
        lambda spectra, kernel: scale_twin(spectra, group, kernel, 0.5, 1.0, 78),
        [draw(1, 18, 40, 2), draw(2, 9)],
        grad_tolerance=1e-5,
    )


@pytest.mark.parametrize("programs", [1, 3])
def test_scale_programs_with_several_samples(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PROGRAMS", programs)  # 5 samples: 5 for one program; 2, 2 and 1 for three
    check_scale(6, 8, 1, 4, 5)


@layouts
def test_scale_layouts(layout: Any) -> None:
    group = frequency_groups(7, 10, 4).to(DEVICE)
    check(
        lambda spectra, kernel: ops.scale_spectrum(spectra, layout(group), kernel, 1.0, 0.7, 11),
        lambda spectra, kernel: scale_twin(spectra, group, kernel, 1.0, 0.7, 11),
        [layout(draw(2, 7, 6, 2)), layout(draw(3, 8))],
        grad_tolerance=1e-5,
    )


def test_scale_without_samples() -> None:
    check_scale(4, 6, 1, 4, 0)


# Modulation ----------------------------------------------------------------------------------------------------------


def modulate_twin(*inputs: Tensor | None, kernel_size: tuple[int, int], groups: int, activation: str) -> Tensor:
    image, context, taps, channel, filter_, spatial = inputs
    assert image is not None
    weight = image_to_weight(image.contiguous(), kernel_size)
    batch, channels_out, channels_group, k_h, k_w = weight.shape
    if context is not None and taps is not None:
        count = taps.shape[1]
        padded = F.pad(context, (count // 2, count // 2))
        logits = torch.zeros_like(weight)
        for tap in range(count):
            window = padded[:, tap : tap + context.shape[1]].view(batch, groups, 1, channels_group, 1, 1)
            by_group = taps[:, tap].view(groups, channels_out // groups, 1, k_h, k_w)
            logits = logits + (window * by_group).flatten(1, 2)
        weight = weight * (2 * torch.sigmoid(logits) if activation == "sigmoid" else 1 + torch.tanh(logits))
    if channel is not None:
        by_group = channel.view(batch, groups, 1, channels_group, 1, 1)
        weight = (weight.unflatten(1, (groups, channels_out // groups)) * by_group).flatten(1, 2)
    if filter_ is not None:
        weight = weight * filter_.view(batch, channels_out, 1, 1, 1)
    if spatial is not None:
        weight = weight * spatial.view(batch, 1, 1, k_h, k_w)
    return weight


def modulate_inputs(
    batch: int, channels_in: int, channels_out: int, kernel_size: tuple[int, int], groups: int, taps: int
) -> Tensors:
    k_h, k_w = kernel_size
    return [
        draw(batch, channels_out * k_h, channels_in // groups * k_w),
        draw(batch, channels_in),
        draw(channels_out * k_h * k_w, taps),
        draw(batch, channels_in),
        draw(batch, channels_out),
        draw(batch, k_h * k_w),
    ]


def check_modulate(
    inputs: Tensors,
    kernel_size: tuple[int, int],
    groups: int,
    activation: str = "sigmoid",
    dtype: torch.dtype = torch.float32,
) -> None:
    settings: dict[str, Any] = {"kernel_size": kernel_size, "groups": groups, "activation": activation}
    check(
        lambda *x: ops.modulate(*x, **settings, dtype=dtype),
        lambda *x: modulate_twin(*x, **settings),
        inputs,
        tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype],
        grad_tolerance=1e-5,
    )


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize(
    ("channels_in", "channels_out", "kernel_size", "groups", "taps", "batch"),
    [
        (1, 1, (1, 1), 1, 1, 1),
        (1, 1, (3, 3), 1, 1, 2),
        (1, 5, (3, 3), 1, 3, 1),
        (7, 1, (1, 1), 1, 3, 3),
        (7, 5, (3, 3), 1, 3, 2),
        (5, 3, (5, 1), 1, 5, 3),
        (5, 3, (2, 4), 1, 3, 2),
        (37, 70, (1, 1), 1, 7, 1),
        (35, 9, (3, 3), 1, 5, 1),
        (6, 4, (3, 3), 2, 3, 2),
        (12, 9, (1, 1), 3, 7, 2),
        (74, 4, (1, 1), 2, 5, 1),
        (6, 6, (5, 1), 6, 3, 3),
        (5, 10, (3, 3), 5, 3, 2),
    ],
)
def test_modulate(
    channels_in: int,
    channels_out: int,
    kernel_size: tuple[int, int],
    groups: int,
    taps: int,
    batch: int,
    activation: str,
) -> None:
    inputs = modulate_inputs(batch, channels_in, channels_out, kernel_size, groups, taps)
    check_modulate(inputs, kernel_size, groups, activation)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "missing", [("context", "taps"), ("channel",), ("filter_",), ("spatial",), NAMES[1:]], ids=",".join
)
def test_modulate_without(missing: tuple[str, ...], groups: int) -> None:
    inputs = modulate_inputs(2, 6, 4, (3, 1), groups, 3)
    check_modulate(
        [None if name in missing else x for name, x in zip(NAMES, inputs, strict=True)], (3, 1), groups, "tanh"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modulate_dtypes(dtype: torch.dtype) -> None:
    check_modulate(modulate_inputs(2, 6, 4, (3, 3), 2, 3), (3, 3), 2, dtype=dtype)


def test_modulate_filters_of_another_dtype() -> None:
    inputs = modulate_inputs(2, 5, 4, (3, 3), 1, 3)
    filters = inputs[2]
    assert filters is not None
    inputs[2] = filters.detach().bfloat16().requires_grad_()
    settings: dict[str, Any] = {"kernel_size": (3, 3), "groups": 1, "activation": "sigmoid"}
    exact = modulate_twin(*(None if x is None else x.detach().double() for x in inputs), **settings)
    ours = ops.modulate(*inputs, **settings, dtype=torch.float32)  # type: ignore[arg-type]
    assert_same(ours, exact)
    (grad,) = torch.autograd.grad(ours.sum(), inputs[2])  # type: ignore[arg-type]
    assert grad.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_modulate_large_logits(activation: str) -> None:
    """The gate saturates without overflow, and its gradient vanishes."""
    inputs = modulate_inputs(1, 5, 4, (1, 1), 1, 3)
    inputs = [x if x is None or i != 1 else (x * 1e4).detach().requires_grad_() for i, x in enumerate(inputs)]
    check_modulate(inputs, (1, 1), 1, activation)


@layouts
@pytest.mark.parametrize("groups", [1, 3])
def test_modulate_layouts(groups: int, layout: Any) -> None:
    inputs = modulate_inputs(2, 6, 9, (3, 3), groups, 3)
    check_modulate([None if x is None else layout(x) for x in inputs], (3, 3), groups)


def test_modulate_without_samples() -> None:
    check_modulate(modulate_inputs(0, 6, 4, (3, 3), 2, 3), (3, 3), 2)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ratio", [1, 2])
def test_both_make_a_layers_weight(ratio: int, groups: int) -> None:
    """Spectrum and modulation in a row are what FDConv2d computes in float64."""
    config = FDConfig(kernel_num=4, param_ratio=ratio, min_attention_channels=3)
    layer = FDConv2d(10, 6, (3, 2), groups=groups, config=config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(3, 10, 4, 4, dtype=torch.float64)
    context = x.mean((2, 3))
    assert layer.KSM_Global is not None
    assert layer.KSM_Local is not None
    factors = layer.KSM_Global(context)
    kernel, channel, filter_, spatial = (
        one.float().to(DEVICE) for one in (factors.kernel, factors.channel, factors.filter, factors.spatial)
    )
    norm = layer.KSM_Local.norm
    context = F.layer_norm(context, (10,), norm.weight, norm.bias, norm.eps)
    spectrum = ops.scale_spectrum(
        layer.dft_weight.float().to(DEVICE), layer.frequency_group.to(DEVICE), kernel, *layer._scale(), 10 // groups * 2
    )
    weight = ops.modulate(
        torch.fft.irfft2(torch.view_as_complex(spectrum), s=(18, 10 // groups * 2)),
        context.float().to(DEVICE),
        layer.KSM_Local.conv.weight.flatten(1).float().to(DEVICE),
        channel,
        filter_,
        spatial,
        kernel_size=(3, 2),
        groups=groups,
        activation=config.local_activation,
        dtype=torch.float32,
    )
    assert_same(weight.cpu(), layer.sample_weights(x), 5e-6)


# Convolution ---------------------------------------------------------------------------------------------------------


def check_conv(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | str = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    tolerance: float = 5e-6,
) -> None:
    check(
        lambda x, weight: ops.conv2d_per_sample(x, weight, stride, padding, dilation, groups),
        lambda x, weight: torch.stack(
            [F.conv2d(*one, None, stride, padding, dilation, groups) for one in zip(x, weight, strict=True)]
        ),
        [x, weight],
        tolerance,
        tolerance,
    )


@pytest.mark.parametrize(
    ("batch", "channels_in", "channels_out", "size", "kernel_size", "stride", "padding", "dilation", "groups"),
    [
        (1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
        (2, 7, 5, (5, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1),
        (3, 5, 3, (7, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
        (2, 3, 17, (9, 11), (3, 3), (2, 1), (1, 2), (1, 1), 1),
        (2, 11, 2, (8, 5), (5, 1), (1, 2), (2, 0), (1, 1), 1),
        (1, 2, 3, (11, 9), (3, 3), (3, 2), (2, 4), (2, 3), 1),
        (2, 6, 4, (5, 6), (3, 3), (1, 1), (1, 1), (1, 1), 2),
        (2, 5, 10, (6, 5), (3, 3), (2, 2), (1, 1), (1, 1), 5),
        (1, 70, 66, (3, 3), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    ],
)
def test_conv(
    batch: int,
    channels_in: int,
    channels_out: int,
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    x, weight = draw(batch, channels_in, *size), draw(batch, channels_out, channels_in // groups, *kernel_size)
    check_conv(x, weight, stride, padding, dilation, groups)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conv_dtypes(dtype: torch.dtype) -> None:
    check_conv(draw(2, 6, 5, 6, dtype=dtype), draw(2, 4, 3, 3, 3, dtype=dtype), groups=2, tolerance=1e-2)


@layouts
def test_conv_layouts(layout: Any) -> None:
    check_conv(layout(draw(2, 3, 5, 6)), layout(draw(2, 4, 3, 3, 3)), padding=(1, 1))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("which", ["x", "weight"])
def test_conv_keeps_samples_apart(which: str) -> None:
    """What overflowed in one sample reaches no other, not even times zero."""
    x, weight = (t.detach() for t in (draw(3, 3, 5, 6), draw(3, 4, 3, 3, 3)))
    expected = ops.conv2d_per_sample(x, weight, (1, 1), (1, 1), (1, 1), 1)
    (x if which == "x" else weight)[1] = float("inf")
    y = ops.conv2d_per_sample(x, weight, (1, 1), (1, 1), (1, 1), 1)
    torch.testing.assert_close(y[::2], expected[::2], rtol=0, atol=0)


def test_conv_without_samples() -> None:
    x, weight = draw(0, 3, 5, 6), draw(0, 4, 3, 3, 3)
    y = ops.conv2d_per_sample(x, weight, (1, 1), (1, 1), (1, 1), 1)
    assert y.shape == (0, 4, 5, 6)
    for x_, grad in zip((x, weight), torch.autograd.grad(y.sum(), (x, weight)), strict=True):
        assert grad.shape == x_.shape


# Tuning --------------------------------------------------------------------------------------------------------------


def launch_scale(batch: int, channels: int) -> None:
    check_scale(131, channels, 1, 4, batch)


def launch_modulate(batch: int, channels: int) -> None:
    check_modulate(modulate_inputs(batch, channels, 70, (3, 1), 1, 3), (3, 1), 1)


def launch_conv(batch: int, channels: int) -> None:
    check_conv(draw(batch, channels, 13, 11), draw(batch, 67, channels, 3, 3), padding=(1, 1))


TUNED = {
    scale._scale_kernel: launch_scale,
    modulate._modulate_kernel: launch_modulate,
    conv._conv_kernel: launch_conv,
}
tuned_kernels = pytest.mark.parametrize("tuned", TUNED, ids=lambda tuned: tuned.kernel.__name__)


class Measured:
    """Tuners that measure, in the interpreter too: no time, but that the later a candidate comes the faster it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.capturing = False
        self.launched: list[dict[str, int]] = []
        monkeypatch.setattr(tuning, "milliseconds", self.milliseconds)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        for tuned in TUNED:
            monkeypatch.setattr(tuned, "interpreted", False)
            monkeypatch.setattr(tuned.tuner, "cache", {})
            monkeypatch.setattr(tuned.tuner, "cache_results", False, raising=False)
            monkeypatch.setattr(tuned.kernel, "run", self.run(tuned.kernel.run))
            monkeypatch.setattr(type(tuned.kernel), "__getitem__", self.launch)  # Triton 3.4 interprets without `run`

    @staticmethod
    def launch(kernel: Any, grid: Any) -> Any:
        return functools.partial(kernel.run, grid=grid, warmup=False)

    def milliseconds(self, call: Any) -> float:
        call()
        self.asked += 1
        return -self.asked

    def run(self, run: Any) -> Any:
        def spy(*args: Any, **rest: Any) -> Any:
            names = ("BLOCK", "CO", "CI", "P", "M", "N", "K", "num_warps")
            self.launched.append({name: rest[name] for name in names if name in rest})
            return run(*args, **rest)

        return spy


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    return Measured(monkeypatch)


@pytest.mark.parametrize(
    ("tuned", "number"),
    [
        pytest.param(tuned, number, id=f"{tuned.kernel.__name__}-{number}")
        for tuned in TUNED
        for number in range(len(tuned.candidates))
    ],
)
def test_every_candidate_gives_the_same_numbers(tuned: Any, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(tuned, "candidates", tuned.candidates[number:])
    if tuned is conv._conv_kernel:  # as it is, however large
        monkeypatch.setattr(tuned, "fit", lambda candidate, arguments: candidate)
    TUNED[tuned](2, 7)


@tuned_kernels
def test_measures_once_for_about_the_same_sizes(tuned: Any, measured: Measured) -> None:
    TUNED[tuned](5, 7)
    asked = measured.asked
    assert 1 < asked <= len(tuned.candidates)
    TUNED[tuned](7, 7)
    assert measured.asked == asked, "5 and 7 samples are both about 8"
    TUNED[tuned](3, 7)
    assert measured.asked == 2 * asked
    TUNED[tuned](3, 10)
    assert measured.asked > 2 * asked


def test_measures_once_for_about_as_many_pixels(measured: Measured) -> None:
    def launch(height: int) -> None:
        check_conv(draw(2, 3, height, 11), draw(2, 17, 3, 3, 3), padding=(1, 1))

    launch(7)
    asked = measured.asked
    launch(9)
    assert measured.asked == asked, "77 and 99 are both about 128"
    launch(13)
    assert measured.asked > asked


@tuned_kernels
def test_the_fastest_serves(tuned: Any, measured: Measured) -> None:
    TUNED[tuned](2, 7)
    first, *_, last = measured.launched[: measured.asked]
    assert len(measured.launched) == measured.asked + 1
    TUNED[tuned](2, 7)
    assert measured.launched[measured.asked :] == [last, last]
    assert last != first


@tuned_kernels
def test_the_first_candidate_serves_where_results_must_not_change(
    tuned: Any, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    deterministic = False
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    TUNED[tuned](2, 7)
    asked, first = measured.asked, measured.launched[0]
    deterministic = True
    TUNED[tuned](2, 7)
    assert measured.launched[-1] == first, "though another was the fastest"
    TUNED[tuned](2, 10)
    assert measured.asked == asked


@tuned_kernels
def test_nothing_is_measured_while_a_graph_is_captured(tuned: Any, measured: Measured) -> None:
    measured.capturing = True
    TUNED[tuned](2, 7)
    (first,) = measured.launched
    assert measured.asked == 0
    assert not tuned.tuner.nargs, "would keep the tensors"
    measured.capturing = False
    TUNED[tuned](2, 7)
    assert measured.asked > 1, "the choice was only put off"
    assert measured.launched[1] == first
    asked, last = measured.asked, measured.launched[-1]
    measured.capturing = True
    TUNED[tuned](2, 7)
    assert measured.asked == asked
    assert measured.launched[-1] == last, "a choice made before serves"


@tuned_kernels
def test_nothing_is_measured_in_the_interpreter(
    tuned: Any, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "interpreted", True)
    TUNED[tuned](2, 7)
    assert measured.asked == 0


def test_interpreted_is_known() -> None:
    assert all(tuned.interpreted != CUDA for tuned in TUNED)


def test_a_measurement_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch to compile, ten to measure, of which the shortest counts."""
    clock = 0.0
    durations = iter([100.0, 5.0, 3.0, 2.0, *[4.0] * 7])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def call() -> None:
        nonlocal clock
        clock += next(durations)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert tuning.milliseconds(call) == 2.0
    assert next(durations, None) is None


# All of them ---------------------------------------------------------------------------------------------------------


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """One call of every registered operator."""
    ops = torch.ops.fdconv
    scale = (draw(2, 7, 6, 2), frequency_groups(7, 10, 4).to(DEVICE), draw(3, 8), 1.5, 1.3, 10)
    image = modulate_inputs(2, 6, 4, (3, 2), 2, 3)
    some = [image[0], None, None, image[3], None, image[5]]
    grad = torch.randn(2, 4, 3, 3, 2, device=DEVICE)
    conv = (draw(2, 6, 5, 7), draw(2, 4, 3, 3, 3), [2, 1], [1, 0], [1, 2], 2)

    def detached(values: Any) -> tuple[Any, ...]:
        return tuple(value.detach() if isinstance(value, Tensor) else value for value in values)

    return {
        "scale": (ops.scale_spectrum.default, scale),
        "scale_backward": (
            ops.scale_spectrum_backward.default,
            (torch.randn(3, 7, 6, 2, device=DEVICE), *detached(scale)),
        ),
        "modulate": (ops.modulate.default, (*image, 3, 2, 2, "tanh", torch.float32)),
        "modulate_some": (ops.modulate.default, (*some, 3, 2, 2, "sigmoid", torch.bfloat16)),
        "modulate_backward": (ops.modulate_backward.default, (grad, *detached(image), 3, 2, 2, "tanh")),
        "modulate_backward_some": (ops.modulate_backward.default, (grad, *detached(some), 3, 2, 2, "sigmoid")),
        "conv": (ops.conv2d_per_sample.default, conv),
    }


@pytest.mark.parametrize("name", calls())
def test_operators_are_well_behaved(name: str) -> None:
    operator, arguments = calls()[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", calls())
def test_every_element_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, arguments = calls()[name]
    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    expected = operator(*arguments)
    poisoned = 0

    def poisoning(empty: Any) -> Any:
        def poison(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal poisoned
            made: Tensor = empty(*args, **kwargs)
            poisoned += made.is_floating_point()
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return poison

    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", poisoning(Tensor.new_empty))
    y = operator(*arguments)
    monkeypatch.undo()
    assert poisoned > 0
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_compiles_in_one_graph() -> None:
    """Value and gradients, through a graph of all three."""
    group = frequency_groups(12, 9, 4).to(DEVICE)
    inputs = modulate_inputs(2, 6, 4, (3, 3), 2, 3)[1:]

    def function(spectra: Tensor, kernel: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        spectrum = ops.scale_spectrum(spectra, group, kernel, 1.0, 1.3, 9)
        image = torch.fft.irfft2(torch.view_as_complex(spectrum), s=(12, 9))
        weight = ops.modulate(image, *factors, kernel_size=(3, 3), groups=2, activation="sigmoid", dtype=torch.float32)
        return ops.conv2d_per_sample(x, weight, (1, 1), (1, 1), (1, 1), 2)

    arguments = [draw(1, 12, 5, 2), draw(2, 4), draw(2, 6, 5, 5), *(x for x in inputs if x is not None)]
    expected = function(*arguments)
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(y, expected)
    cotangent = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, arguments, cotangent), torch.autograd.grad(expected, arguments, cotangent)
    )


def test_available() -> None:
    assert common.available(DEVICE)


def test_imports_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from fdconv.gpu import common
assert not common.available(torch.device("cpu"))
assert not common.available(torch.device("cuda"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.long if path.stem.startswith("conv3x3_64") else ())
        for path in golden.FILES
    ],
)
def test_official_layers_give_their_own_numbers(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("not through the kernels")

    monkeypatch.setattr("fdconv.functional.sample_weights", fail)
    tensors, state, config = golden.read(path)
    layer = load_layer(state, config, tensors["group_index"]).to(DEVICE)
    with set_backend("triton"):
        golden.check(layer, {name: tensor.to(DEVICE) for name, tensor in tensors.items()})

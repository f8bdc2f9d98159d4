"""The operator once more, the slow way: float64 numpy, explicit loops, whole-map complex FFTs.

It shares no code with `fdconv`: parameters come from a layer's state dict by their official names, the rest from the
description of the operator. Nothing here is meant to be fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from fdconv import FDConfig

#: Largest relative error `|a - b| / |b|` (2-norm over the whole tensor) for each kind of comparison.
TOLERANCES: dict[str, float] = {
    # Both sides in float64; FFTs, sums over C_in*k*k terms and the exponentials leave 1e-15 to 1e-13.
    "reference": 1e-10,
    # The rule of golden/README.md: the public code computed in float32 with another order of summation.
    "golden": 1e-4,
    # At conversion only the weight's trip to the spectrum and back rounds: a few units in the last place (6e-8, 1e-16).
    "neutral-float32": 1e-6,
    "neutral-float64": 1e-12,
    # The same arithmetic on another memory layout, batch size or code path; float32 sums in another order.
    "same-float32": 1e-5,
    # Weights, gates and maps rounded to 8 (bfloat16) or 11 (float16) significant bits, several roundings in a row.
    "bfloat16": 3e-2,
    "float16": 4e-3,
}


def relative_error(actual: Any, expected: Any, least: float = 0.0) -> float:
    """`|actual - expected| / |expected|` in the 2-norm; NaN anywhere gives NaN, which no tolerance accepts.

    `least`: where `|expected|` is below this, it stands in for it.
    """
    a, b = _array(actual), _array(expected)
    assert a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
    scale = max(float(np.sqrt((b**2).sum())), least)
    return float(np.sqrt(((a - b) ** 2).sum())) / (scale if scale > 0 else 1.0)


def assert_close(actual: Any, expected: Any, kind: str, least: float = 0.0) -> None:
    """Fails unless the relative error is within `TOLERANCES[kind]`."""
    error = relative_error(actual, expected, least)
    assert error <= TOLERANCES[kind], f"relative error {error:.2e} above {TOLERANCES[kind]:.0e} ({kind})"


def randomise_(module: nn.Module, seed: int) -> nn.Module:
    """Draws every parameter and running statistic so that no gate is neutral, no norm trivial and no copy equal."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, mean: float, std: float) -> torch.Tensor:
        values = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return (mean + std * values).to(like)

    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            tail = name.rsplit(".", 2)[-2:]
            if not tensor.is_floating_point():
                if tail[-1] == "num_batches_tracked":
                    tensor.fill_(7)
            elif tail[-1] == "dft_weight":  # of the size it had, so that outputs stay around 1
                tensor.copy_(normal(tensor, 0.0, max(float(tensor.double().square().mean().sqrt()), 1e-2)))
            elif tail[-1] == "running_var":
                tensor.copy_(normal(tensor, 0.0, 0.5).abs() + 0.5)
            elif tail[-1] == "running_mean":
                tensor.copy_(normal(tensor, 0.0, 0.2))
            elif tail in (["bn", "weight"], ["norm", "weight"], ["relu", "scale"]):
                tensor.copy_(normal(tensor, 1.0, 0.3))
            elif tail == ["fc", "weight"]:
                tensor.copy_(normal(tensor, 0.0, 1.5 / tensor.shape[1] ** 0.5))
            else:
                tensor.copy_(normal(tensor, 0.0, 0.3))
    return module


def fdconv2d_reference(
    state: Mapping[str, torch.Tensor],
    config: FDConfig,
    geometry: Mapping[str, Any],
    x: torch.Tensor,
    training: bool = False,
) -> np.ndarray:
    """Output of `FDConv2d` for a batch `(B, C, H, W)`. `geometry`: the arguments of `nn.Conv2d`, by name."""
    c_in, c_out = geometry["in_channels"], geometry["out_channels"]
    k_h, k_w = _pair(geometry["kernel_size"])
    groups = geometry.get("groups", 1)
    c_group = c_in // groups
    p = _as_in_the_paper(state, config, (c_out * k_h, c_group * k_w), max(1, min(c_in, c_out) // 2))
    maps = _array(x)
    batch = maps.shape[0]
    context = maps.mean(axis=(2, 3))

    hidden = None
    if config.ksm_global:
        auto = "batch" if config.spectrum == "paper" else "rms"
        hidden = _hidden(p, context, auto if config.norm == "auto" else config.norm, training)
        hidden = p["KSM_Global.relu.scale"] * np.maximum(hidden, 0) ** 2 + p["KSM_Global.relu.bias"]
    channel = filter_ = spatial = None
    if hidden is not None:
        channel = _gate(_head(p, "channel_fc", hidden), config.global_activation, config.temperature)
        if not groups == c_in == c_out:
            filter_ = _gate(_head(p, "filter_fc", hidden), config.global_activation, config.temperature)
        if (k_h, k_w) != (1, 1):
            spatial = _gate(_head(p, "spatial_fc", hidden), config.global_activation, config.temperature)
    local = None
    if config.ksm_local:
        local = _local_gates(p, context, config.local_activation)  # (B, C_out*k_h*k_w, C_in)

    r, n = config.param_ratio, config.kernel_num
    kernel = np.full((batch, r * n), 1 / (r * n))
    if hidden is not None and r * n > 1:
        z = _head(p, "kernel_fc", hidden)
        if config.kernel_activation == "softmax":
            kernel = _softmax(z / config.kernel_temperature, axis=1)
        else:
            kernel = _gate(z, config.kernel_activation, config.kernel_temperature) / (r * n)
    alpha = max(1, min(c_in, c_out) // 2) * n * r

    if k_h == k_w and k_h in config.fbm_kernel_sizes:
        maps = _band_modulation(p, config, maps)

    outputs = []
    for b in range(batch):
        image = _weight_image(p, kernel[b].reshape(r, n), alpha, c_out * k_h, c_group * k_w)
        weight = image.reshape(c_out, k_h, c_group, k_w).transpose(0, 2, 1, 3).copy()
        for o in range(c_out):
            first = o // (c_out // groups) * c_group  # this filter's first input channel
            for c in range(c_group):
                for i in range(k_h):
                    for j in range(k_w):
                        gate = 1.0
                        if channel is not None:
                            gate *= channel[b, first + c]
                        if filter_ is not None:
                            gate *= filter_[b, o]
                        if spatial is not None:
                            gate *= spatial[b, i * k_w + j]
                        if local is not None:
                            gate *= local[b, (o * k_h + i) * k_w + j, first + c]
                        weight[o, c, i, j] *= gate
        outputs.append(_convolve(maps[b], weight, p.get("bias"), geometry))
    return np.stack(outputs)


def fdlinear_reference(
    state: Mapping[str, torch.Tensor], config: FDConfig, x: torch.Tensor, training: bool = False
) -> np.ndarray:
    """Output of `FDLinear` for `(B, ..., C)`."""
    data = _array(x)
    batch, c_in = data.shape[0], data.shape[-1]
    r, n = config.param_ratio, config.kernel_num
    c_out = state["dft_weight"].shape[1]
    neutral = max(1, min(c_in, c_out) // 2) * (1 if config.kernel_activation == "softmax" else r)
    p = _as_in_the_paper(state, config, (c_out, c_in), neutral)
    context = data.reshape(batch, -1, c_in).mean(axis=1)
    channel, filter_ = np.ones((batch, c_in)), np.ones((batch, c_out))
    z = np.zeros((batch, r * n))
    if config.ksm_global:
        hidden = _hidden(p, context, "batch" if config.norm == "batch" else "rms", training)
        hidden = np.maximum(hidden, 0)
        channel = _gate(_head(p, "channel_fc", hidden), config.global_activation, config.temperature)
        filter_ = _gate(_head(p, "filter_fc", hidden), config.global_activation, config.temperature)
        if r * n > 1:
            z = _head(p, "kernel_fc", hidden)
    if config.kernel_activation == "softmax":
        kernel = n * _softmax(z / config.kernel_temperature, axis=1)
    else:
        kernel = _gate(z, config.kernel_activation, config.kernel_temperature)
    alpha = max(1, min(c_in, c_out) // 2) * r
    outputs = []
    for b in range(batch):
        weight = _weight_image(p, kernel[b].reshape(r, n), alpha, c_out, c_in)
        weight = weight * filter_[b][:, None] * channel[b][None, :]
        y = data[b] @ weight.T
        outputs.append(y + p["bias"] if "bias" in p else y)
    return np.stack(outputs)


def _as_in_the_paper(
    state: Mapping[str, torch.Tensor], config: FDConfig, size: tuple[int, int], neutral: float
) -> dict[str, np.ndarray]:
    """A layer's numbers as the paper has them. `neutral`: factor of its spectrum at which the static weight comes out.

    The isometric ones are `rfft2(W)/(c*w_v)`, `c = sqrt(D1*D2/2)`, `w_v = sqrt(2)` where a column stands for one
    frequency; of `r` spectra each is `sqrt(r)` times as large. Logits of more inputs than usual have smaller weights.
    """
    p = {name: _array(tensor) for name, tensor in state.items()}
    if config.spectrum == "paper":
        return p
    d1, d2 = size
    columns = np.array([2**0.5 if v == 0 or 2 * v == d2 else 1.0 for v in range(d2 // 2 + 1)])
    p["dft_weight"] = p["dft_weight"] * ((d1 * d2 / 2 / config.param_ratio) ** 0.5 / neutral * columns)[:, None]
    for name, values in p.items():
        if name.endswith("_fc.weight"):
            p[name] = values * min(1.0, 16 / values.shape[1])
        elif name.startswith("FBM.freq") and name.endswith("weight"):
            p[name] = values * min(1.0, 48 / values.shape[1])
    return p


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return values.double().numpy() if values.is_floating_point() else values.long().numpy()
    return np.asarray(values)


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, (int, str)) else tuple(value)


def _gate(z: np.ndarray, kind: str, temperature: float = 1.0) -> np.ndarray:
    z = z / temperature
    return {"sigmoid": 2 / (1 + np.exp(-z)), "tanh": 1 + np.tanh(z)}[kind]


def _softmax(z: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def _head(p: Mapping[str, np.ndarray], name: str, hidden: np.ndarray) -> np.ndarray:
    weight = p[f"KSM_Global.{name}.weight"]
    return hidden @ weight.reshape(weight.shape[0], -1).T + p[f"KSM_Global.{name}.bias"]


def _hidden(p: Mapping[str, np.ndarray], context: np.ndarray, norm: str, training: bool) -> np.ndarray:
    weight = p["KSM_Global.fc.weight"]
    h = context @ weight.reshape(weight.shape[0], -1).T
    if norm == "rms":
        return h / np.sqrt((h**2).mean(axis=1, keepdims=True) + 1e-6) * p["KSM_Global.norm.weight"]
    mean, var = p["KSM_Global.bn.running_mean"], p["KSM_Global.bn.running_var"]
    if training and len(h) > 1:
        mean, var = h.mean(axis=0), h.var(axis=0)
    return (h - mean) / np.sqrt(var + 1e-5) * p["KSM_Global.bn.weight"] + p["KSM_Global.bn.bias"]


def _local_gates(p: Mapping[str, np.ndarray], context: np.ndarray, kind: str) -> np.ndarray:
    batch, c_in = context.shape
    mean, var = context.mean(axis=1, keepdims=True), context.var(axis=1, keepdims=True)
    s = (context - mean) / np.sqrt(var + 1e-5) * p["KSM_Local.norm.weight"] + p["KSM_Local.norm.bias"]
    taps = p["KSM_Local.conv.weight"]  # (rows, 1, ks)
    logits = np.zeros((batch, len(taps), c_in))
    for c in range(c_in):
        for t in range(taps.shape[2]):
            source = c + t - taps.shape[2] // 2
            if 0 <= source < c_in:
                logits[:, :, c] += s[:, source, None] * taps[None, :, 0, t]
    return _gate(logits, kind)


def _weight_image(p: Mapping[str, np.ndarray], kernel: np.ndarray, alpha: float, d1: int, d2: int) -> np.ndarray:
    group = p["frequency_group"]
    image = np.zeros((d1, d2))
    for i, share in enumerate(kernel):
        pairs = p["dft_weight"][i]
        half = alpha * share[group] * (pairs[..., 0] + 1j * pairs[..., 1])
        assert half.shape == (d1, d2 // 2 + 1)
        image += np.fft.ifft2(_whole_spectrum(half, d2)).real
    return image


def _whole_spectrum(half: np.ndarray, d2: int) -> np.ndarray:
    """All `d2` columns from the first `d2//2 + 1`: column `-v` is the conjugate of column `v` with its rows negated."""
    d1 = half.shape[0]
    whole = np.zeros((d1, d2), dtype=half.dtype)
    for u in range(d1):
        for v in range(d2):
            whole[u, v] = half[u, v] if v <= d2 // 2 else np.conj(half[-u % d1, d2 - v])
    return whole


def _band_modulation(p: Mapping[str, np.ndarray], config: FDConfig, x: np.ndarray) -> np.ndarray:
    batch, c_in, h, w = x.shape
    bands = [np.fft.ifft2(np.fft.fft2(x) * _mask(h, w, k, config.band_mask)).real for k in config.bands]
    pieces = [x - bands[0]]
    pieces += [wide - narrow for wide, narrow in pairwise(bands)]
    if config.band_lowfreq:
        pieces.append(bands[-1])
    logits = np.zeros((len(pieces), batch, config.band_groups, h, w))
    c_band = c_in // config.band_groups
    for i in range(len(pieces)):
        weight = p[f"FBM.freq_weight_conv_list.{i}.weight"]
        bias = p[f"FBM.freq_weight_conv_list.{i}.bias"]
        for b in range(batch):
            for g in range(config.band_groups):
                part = {"kernel_size": 3, "padding": 1}
                logits[i, b, g] = _convolve(x[b, g * c_band : (g + 1) * c_band], weight[g : g + 1], bias[g], part)[0]
    if config.band_activation == "softmax":
        maps = len(pieces) * _softmax(logits, axis=0)
    else:
        maps = _gate(logits, config.band_activation)
    y = np.zeros_like(x) if config.band_lowfreq else bands[-1].copy()
    for i, piece in enumerate(pieces):
        for c in range(c_in):
            y[:, c] += maps[i, :, c // c_band] * piece[:, c]
    return y


def _mask(h: int, w: int, k: int, kind: str) -> np.ndarray:
    """Frequencies of an `(h, w)` map that `L_k` keeps, in the order of `fft2`."""
    if kind == "exact":
        near = 1 / (2 * k) + 1e-12  # two frequencies of a map of side n are never closer to the cut than 1/(2*k*n)
        rows, columns = np.abs(np.fft.fftfreq(h)) <= near, np.abs(np.fft.fftfreq(w)) <= near
        return rows[:, None] & columns[None, :]
    # In float32, as the public code compares: 0.25 + 1e-8 rounds to 0.25, so band 2 loses the frequency 1/4 itself,
    # whereas 0.125 + 1e-8 rounds up, so band 4 keeps 1/8.
    largest = np.maximum(np.abs(np.fft.fftfreq(64))[:, None], np.fft.rfftfreq(64)[None, :])
    grid = largest.astype(np.float32) < np.float32(0.5 / k + 1e-8)
    half = np.zeros((h, w // 2 + 1))
    for i in range(h):
        for j in range(w // 2 + 1):
            half[i, j] = grid[i * 64 // h, j * 33 // (w // 2 + 1)]
    return _whole_spectrum(half, w)


def _convolve(x: np.ndarray, weight: np.ndarray, bias: Any, geometry: Mapping[str, Any]) -> np.ndarray:
    """One sample `(C, H, W)`, the way `nn.Conv2d` describes it."""
    k_h, k_w = weight.shape[2:]
    stride_h, stride_w = _pair(geometry.get("stride", 1))
    step_h, step_w = _pair(geometry.get("dilation", 1))
    groups = geometry.get("groups", 1)
    padding = geometry.get("padding", 0)
    if padding == "same":
        total_h, total_w = step_h * (k_h - 1), step_w * (k_w - 1)
        sides = (total_h // 2, total_h - total_h // 2), (total_w // 2, total_w - total_w // 2)
    else:
        pad_h, pad_w = (0, 0) if padding == "valid" else _pair(padding)
        sides = (pad_h, pad_h), (pad_w, pad_w)
    mode = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    x = np.pad(x, ((0, 0), *sides), mode=mode[geometry.get("padding_mode", "zeros")])
    out_h = (x.shape[1] - step_h * (k_h - 1) - 1) // stride_h + 1
    out_w = (x.shape[2] - step_w * (k_w - 1) - 1) // stride_w + 1
    c_out, c_group = weight.shape[:2]
    y = np.zeros((c_out, out_h, out_w))
    for j in range(groups):
        outs = slice(j * c_out // groups, (j + 1) * c_out // groups)
        ins = x[j * c_group : (j + 1) * c_group]
        for a in range(k_h):
            for b in range(k_w):
                top, left = a * step_h, b * step_w
                seen = ins[
                    :,
                    top : top + stride_h * (out_h - 1) + 1 : stride_h,
                    left : left + stride_w * (out_w - 1) + 1 : stride_w,
                ]
                y[outs] += np.tensordot(weight[outs, :, a, b], seen, axes=1)
    return y if bias is None else y + np.reshape(bias, (-1, 1, 1))

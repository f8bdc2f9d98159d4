"""What the tests of DY-Conv and ODConv share: files of the authors' numbers, perturbed layers, small trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fdsurgery.operators import get_operator

GOLDEN = Path(__file__).parents[2] / "golden" / "operators"


def read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Configuration and state of the authors' layer, and all tensors of the file."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        config = json.loads(opened.metadata()["config"])
    state = {name.removeprefix("state."): one for name, one in tensors.items() if name.startswith("state.")}
    return config, state, tensors


@torch.no_grad()
def error(found: Any, expected: Any) -> float:
    """Relative, in the 2-norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def golden_errors(operator: str, file: Path) -> tuple[float, float]:
    """Of output and of gradient to the input, against the authors' numbers."""
    config, state, tensors = read(file)
    layer = get_operator(operator).load_official(state, config)
    assert layer.training == (config["mode"] == "train")
    x = tensors["input"].requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return error(y, tensors["output"]), error(x.grad, tensors["grad_input_of_sum_y2"])


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, always the same, float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv(*shape: Any, **more: Any) -> nn.Conv2d:
    """A plain convolution, always the same."""
    torch.manual_seed(0)
    return nn.Conv2d(*shape, **more)


def made(operator: str, plain: nn.Module, **settings: Any) -> Any:
    """The dynamic layer of a plain one, always the same."""
    torch.manual_seed(1)
    one = get_operator(operator)
    return one.replace(plain, one.settings(settings))


@torch.no_grad()
def perturbed(layer: Any) -> Any:
    """The same layer with every parameter and statistic moved from where it starts."""
    for seed, (name, tensor) in enumerate(layer.state_dict(keep_vars=True).items()):
        if tensor.is_floating_point() and name != "temperature":
            noise = random(*tensor.shape, seed=seed).to(tensor.dtype)
            tensor.add_(noise.abs() if name.endswith("running_var") else 0.3 * noise)
    return layer


def convolved_alone(layer: Any, sample: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One sample `(C, H, W)` as `nn.Conv2d` convolves it with this weight, in the geometry of a layer."""
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias is not None,
        layer.padding_mode,
    ).double()
    state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    plain.load_state_dict(state)
    with torch.no_grad():
        return plain(sample[None])[0]  # type: ignore[no-any-return]


def spread_after_training(layer: Any, kernels: str, steps: int = 30) -> float:
    """How far a layer's kernels are apart, relatively, after it has learned what another weight does to some inputs."""
    teacher = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
    x = random(8, layer.in_channels, 6, 6) * torch.linspace(0.5, 2, 8).view(-1, 1, 1, 1) + random(8, 1, 1, 1, seed=5)
    with torch.no_grad():
        teacher.weight.copy_(random(*teacher.weight.shape, seed=3))
        target = teacher(x) * torch.tensor([1.0, -1.0]).repeat(4).view(-1, 1, 1, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    stored = getattr(layer, kernels).detach()
    return error(stored, stored.mean(0, keepdim=True).expand_as(stored))

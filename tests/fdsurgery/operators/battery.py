"""Small nets for every operator, and modulation that is not neutral."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fdsurgery
from fdsurgery.operators import operator_of, operators
from fdsurgery.recipe import Recipe, parse_recipe

SMALL: dict[str, dict[str, object]] = {"fdconv": {"kernel_num": 4}}
"""Settings with which an operator takes the layers of these nets."""


class Net(nn.Module):
    """Convolutions of several kinds, and the two layers of an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.point = nn.Conv2d(24, 32, 1)
        self.far = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.fc1 = nn.Linear(32, 48)
        self.fc2 = nn.Linear(48, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.wide(self.stem(x).relu())).relu()
        x = self.point(x).relu()
        x = x + self.far(x).relu()
        x = (x + self.grouped(x)).flatten(2).transpose(1, 2)
        x = x + self.fc2(nn.functional.gelu(self.fc1(x)))
        return self.head(x.mean(1))


def build() -> Net:
    return Net()


def images(batch: int = 3, size: int = 34) -> Tensor:
    return torch.randn(batch, 3, size, size - 2, generator=torch.Generator().manual_seed(5))


def plain(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(1)
    return fdsurgery.testing.settle_(Net(), images()).to(dtype).eval()


def recipe(operator: str) -> Recipe:
    """All sites but the head, as far as the operator takes them."""
    text = f"""
keep: [{{name: head, because: "it stays"}}]
swap:
  - where: {{kind: [conv, linear]}}
    operator: {operator}
    with: {SMALL.get(operator, {})!r}
"""
    return parse_recipe(text)


def converted(operator: str, model: nn.Module | None = None) -> nn.Module:
    model = plain() if model is None else model
    parameter = next(model.parameters())
    return fdsurgery.convert(model, recipe(operator), example_inputs=images().to(parameter))


@torch.no_grad()
def perturb(model: nn.Module, scale: float = 0.2, seed: int = 2) -> nn.Module:
    """Move what modulates, and kernels apart, so that nothing is neutral."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        operator = operator_of(layer)
        if operator is None:
            continue
        for parameter, kind in operator.parameter_kinds(layer).items():
            if kind != "bias":
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                size = parameter.std() if kind == "weight" and parameter.numel() > 1 else 1.0
                parameter.add_(noise * scale * size)
    return model


def trained(operator: str) -> nn.Module:
    """A converted model that is not neutral."""
    return perturb(converted(operator))


def distance(left: Tensor, right: Tensor) -> float:
    """Relative, by the 2-norm."""
    return float((left - right).double().norm() / right.double().norm())


NAMES = sorted(operators())

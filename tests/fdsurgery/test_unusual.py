"""A model in nobody's style converts with `generic`: roles come from data flow, not from names or classes."""

from __future__ import annotations

import torch
from releases import since
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdsurgery.verification import relative_error


class Wobble(nn.Module):
    """A gated FFN on pixels with the channels last; layers in a dict, one of them used by every block."""

    def __init__(self, gadgets: dict[str, nn.Module], key: int) -> None:
        super().__init__()
        self.gadgets = nn.ModuleDict({"shared": gadgets["shared"]})
        self.q = nn.Linear(24, 24)  # by its name a query; it is none
        self.k = nn.Linear(24, 2 * 36)
        self.out_proj = nn.Linear(36, 24)
        self.gain = nn.Parameter(torch.rand(24))
        self.key = key

    def forward(self, picture: Tensor) -> Tensor:  # N H W C
        mixed = self.gadgets["shared"](picture.movedim(-1, 1)).movedim(1, -1)
        picture = picture + mixed * torch.sigmoid(self.q(picture.mean((1, 2), keepdim=True)))
        centred = picture - picture.mean(-1, keepdim=True)
        value, gate = self.k(centred / (centred.std(-1, keepdim=True) + 1e-3)).tensor_split(2, -1)
        return torch.add(picture, self.out_proj(value * F.silu(gate)) * self.gain, alpha=0.5)


class Contraption(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squash = nn.Parameter(torch.randn(24, 27) / 5)
        gadgets: dict[str, nn.Module] = {"shared": nn.Conv2d(24, 24, 3, padding=1, padding_mode="reflect")}
        self.zoo = nn.ModuleList([Wobble(gadgets, key) for key in range(3)])
        self.loose = [nn.Conv2d(24, 32, 3, stride=2)]  # in a plain list: not registered, and yet called
        self.register_module("0x", self.loose[0])
        self.kernel = nn.Parameter(torch.randn(40, 32, 3, 3) / 17)
        self.verdict = nn.Parameter(torch.randn(5, 40) / 6)

    def forward(self, photo: Tensor) -> dict[str, Tensor]:
        patches = F.unfold(photo, 3, stride=3).transpose(1, 2)
        side = photo.shape[-1] // 3
        picture = F.linear(patches, self.squash).unflatten(1, (side, side))
        for animal in self.zoo:
            picture = animal(picture)
        picture = F.relu(self.loose[0](torch.einsum("nhwc->nchw", picture)))
        picture = F.conv2d(picture, self.kernel, padding="same").relu()
        return {"verdict": F.linear(picture.amax((-2, -1)), self.verdict)}


def contraption() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = Contraption().eval(), torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        return model, x, model(x)["verdict"]


LAYERS = {"zoo.0.gadgets.shared", "0x", *(f"zoo.{key}.{name}" for key in range(3) for name in ("k", "out_proj"))}


def dynamic_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (FDConv2d, FDLinear))}


def test_its_modules_convert() -> None:
    model, x, before = contraption()
    roles = {site.name: (site.role, site.layout, site.calls) for site in fdsurgery.sites(model, x)}
    assert roles["zoo.1.k"] == ("expand", "NHWC", 1) and roles["zoo.1.out_proj"] == ("project", "NHWC", 1)
    assert roles["zoo.0.gadgets.shared"] == ("spatial", "NCHW", 3) and roles["zoo.0.q"][0] == "linear"

    fdsurgery.convert(model, "generic", example_inputs=x)
    assert dynamic_layers(model) == LAYERS
    shared = {id(wobble.gadgets["shared"]) for wobble in model.zoo}
    assert len(shared) == 1 and model.loose[0] is model.get_submodule("0x")
    with torch.no_grad():
        assert relative_error(model(x)["verdict"], before) < 1e-5


@since("torch", "2.8", "calls what an exported model shares by the last of its names")
def test_its_functional_calls_convert_in_a_graph() -> None:
    model, x, before = contraption()
    graph_module = fdsurgery.convert(torch.export.export(model, (x,)).module(), "generic")
    # Its first and last layers are a stem on patches and a head; what is between them is all dynamic now.
    assert dynamic_layers(graph_module) == LAYERS | {"kernel_conv"}
    with torch.no_grad():
        assert relative_error(graph_module(x)["verdict"], before) < 1e-5

    graph_module = fdsurgery.convert(fx.symbolic_trace(model), "generic", example_inputs=x)
    assert "kernel_conv" in dynamic_layers(graph_module)
    with torch.no_grad():
        assert relative_error(graph_module(x)["verdict"], before) < 1e-5

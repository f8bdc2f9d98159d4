"""torch's transformer layers, whose fused kernels take the weights of their linear layers and not the layers."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_inference import stir
from torch import Tensor, nn

import fdsurgery
from fdconv import FDLinear
from fdsurgery.rewrite.tree import swapped

WIDTH, HEADS, HIDDEN = 32, 4, 64


class Encoder(nn.Module):
    """An encoder, or a layer of one, and a head."""

    def __init__(self, layers: int = 2, **arguments: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, dropout=0.0, **arguments)  # type: ignore[arg-type]
        self.encoder: nn.Module = nn.TransformerEncoder(layer, layers) if layers else layer
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.encoder(x, src_key_padding_mask=mask)
        valid = torch.ones_like(y[..., :1]) if mask is None else (~mask).unsqueeze(-1).to(y.dtype)
        return self.head((y * valid).sum(1))


class Whole(nn.Module):
    """Encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, HIDDEN, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(x, x.flip(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: Encoder(0, norm_first=True, activation="gelu"),
    "encoder and decoder": Whole,
}


def converted(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module, Tensor]:
    """A plain model, the same with modulation far from neutral, and an input."""
    plain, x = build().eval(), torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    model = stir(fdsurgery.convert(copy.deepcopy(plain), recipe="ffn", example_inputs=x))
    return plain, model, x


def slow(model: nn.Module, *inputs: Tensor) -> Tensor:
    """What the model computes layer by layer: with gradients, torch has no fused kernel."""
    with torch.enable_grad():
        return model(*inputs).detach()


def compiled(model: nn.Module, *inputs: Tensor) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")(*inputs)


WAYS: dict[str, Callable[..., Tensor]] = {
    "eager": lambda model, *inputs: model(*inputs),
    "compiled": compiled,
    "exported": lambda model, *inputs: torch.export.export(model, inputs).module()(*inputs),
    "exported, strict": lambda model, *inputs: torch.export.export(model, inputs, strict=True).module()(*inputs),
    "traced": lambda model, *inputs: torch.jit.trace(model, inputs, check_trace=False)(*inputs),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_the_modulation_counts_whatever_way_it_runs(name: str, way: str) -> None:
    plain, model, x = converted(MODELS[name])
    expected = slow(model, x)
    assert (expected - slow(plain, x)).norm() > 1e-2 * expected.norm(), "a neutral modulation proves nothing"
    torch.testing.assert_close(WAYS[way](model, x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [(0,), (1,), (0, 1)])
def test_padding_is_not_packed_away_from_dynamic_layers(dynamic: tuple[int, ...]) -> None:
    plain, _, x = converted(Encoder)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = copy.deepcopy(plain)
    layers = [model.encoder.layers[position] for position in dynamic]
    with swapped(model, {layer.linear1: FDLinear.from_linear(layer.linear1) for layer in layers}):
        pass
    torch.testing.assert_close(model(x, mask), plain(x, mask), rtol=1e-4, atol=1e-4)
    stir(model)
    torch.testing.assert_close(model(x, mask), slow(model, x, mask), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_choice_is_copied_saved_and_undone(tmp_path: Path) -> None:
    plain, model, x = converted(Encoder)
    expected = slow(model, x)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unpickled = torch.load(pickled, weights_only=False)
    torch.testing.assert_close(compiled(copy.deepcopy(unpickled), x), expected, rtol=1e-4, atol=1e-4)
    before = [dict(vars(module)) for module in plain.modules() if "Encoder" in type(module).__name__]
    after = [dict(vars(module)) for module in fdsurgery.restore(model).modules() if "Encoder" in type(module).__name__]
    for own, own_after in zip(before, after, strict=True):
        assert own.keys() == own_after.keys()
        for switch in ("activation_relu_or_gelu", "use_nested_tensor"):
            assert own.get(switch) == own_after.get(switch) and type(own.get(switch)) is type(own_after.get(switch))


def test_a_swap_that_fails_leaves_the_choice_as_it_was() -> None:
    model = Encoder()
    layer = model.encoder.layers[0]
    before = dict(vars(layer)), dict(vars(model.encoder))
    with pytest.raises(KeyError), swapped(model, {layer.linear1: FDLinear.from_linear(layer.linear1)}):
        assert not layer.activation_relu_or_gelu and not model.encoder.use_nested_tensor
        raise KeyError
    assert (dict(vars(layer)), dict(vars(model.encoder))) == before


@torch.no_grad()
def test_switches_that_were_off_stay_off() -> None:
    model = Encoder()
    model.encoder.layers[0].activation_relu_or_gelu = 0
    fdsurgery.restore(fdsurgery.convert(model, recipe="ffn", example_inputs=torch.randn(2, 5, WIDTH)))
    assert [layer.activation_relu_or_gelu for layer in model.encoder.layers] == [0, 1]

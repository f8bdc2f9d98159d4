"""What one observed forward tells about a model, and that looking leaves no trace."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import timm
import torch
import torchvision
import transformers
from models import CASES
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fdsurgery
from fdsurgery import DiscoveryError, Site
from fdsurgery.discovery import Inputs, example_inputs, observe
from fdsurgery.discovery.flow import Flow
from fdsurgery.discovery.record import record
from fdsurgery.discovery.roles import find_roles

ATTENTION = (
    "qkv", "q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "attn.proj", "attention.output", "out_proj",
    "to_q", "to_k", "to_v", "to_out", "in_proj", "attn.q", "attn.k", "attn.v",
)  # fmt: skip


def by_name(model: nn.Module, inputs: Any = None) -> dict[str, Site]:
    return {site.name: site for site in fdsurgery.sites(model, inputs)}


def roles(model: nn.Module, inputs: Any = None) -> Counter[tuple[str, int, int, tuple[int, int]]]:
    """How often each role occurs with each shape: what is the same however an architecture is spelled."""
    with torch.device("meta"):
        return Counter(
            (site.role, site.in_channels, site.out_channels, site.kernel_size)
            for site in fdsurgery.sites(model, inputs)
            if site.role != "linear"  # three spellings of q, k and v
        )


# Roles


def test_a_resnet50_reads_the_same_in_three_spellings() -> None:
    with torch.device("meta"):
        spellings = [
            timm.create_model("resnet50"),
            torchvision.models.resnet50(),
            transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000)),
        ]
    first, *others = [roles(model) for model in spellings]
    assert Counter(role for role, *_ in first.elements()) == {
        "stem": 1, "pointwise": 32, "spatial": 16, "shortcut": 4, "head": 1,
    }  # fmt: skip
    # transformers' bottleneck strides in its 3x3 convolution too, but its first stage is wired alike.
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("spellings", "ffns"),
    [
        (
            [
                lambda: timm.create_model("convnext_tiny"),
                torchvision.models.convnext_tiny,
                lambda: transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=1000)),
            ],
            18,
        ),
        (
            [
                lambda: timm.create_model("swin_tiny_patch4_window7_224"),
                lambda: transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=1000)),
            ],
            12,
        ),
        (
            [
                lambda: timm.create_model("vit_base_patch16_224"),
                torchvision.models.vit_b_16,
                lambda: transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)),
            ],
            12,
        ),
    ],
    ids=["convnext", "swin", "vit"],
)
def test_ffns_are_found_in_every_spelling(spellings: list[Callable[[], nn.Module]], ffns: int) -> None:
    with torch.device("meta"):
        found = [roles(spelling()) for spelling in spellings]
    assert sum(count for (role, *_), count in found[0].items() if role == "expand") == ffns
    assert all(other == found[0] for other in found[1:])


class Tokens(nn.Module):
    """An image's pixels as tokens, a block over them, and a head."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.block = block
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class Layers(nn.Module):
    """Linear layers by name, and what to do with them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, int]) -> None:
        super().__init__()
        self.run = run
        for name, shape in shapes.items():
            self.add_module(name, nn.Linear(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    return x + m.out(F.scaled_dot_product_attention(q, k, v))


def spatial_gate(m: Any, x: Tensor) -> Tensor:
    value, gate = F.gelu(m.a(x)).chunk(2, -1)
    return x + m.b(value * m.over_tokens(gate.transpose(1, 2)).transpose(1, 2))


def class_token_only(m: Any, x: Tensor) -> Tensor:
    return torch.cat((x[:, :1] + m.b(F.gelu(m.a(x[:, :1]))), x[:, 1:]), 1)


BLOCKS: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "plain": (
        Layers(lambda m, x: x + m.b(F.gelu(m.a(x))), a=(8, 32), b=(32, 8)),
        {"a": "expand", "b": "project"},
    ),
    "no residual": (Layers(lambda m, x: m.b(F.gelu(m.a(x))), a=(8, 32), b=(32, 8)), {}),
    "no activation": (Layers(lambda m, x: x + m.b(m.a(x)), a=(8, 32), b=(32, 8)), {}),
    "gated": (
        Layers(lambda m, x: x + m.c(F.silu(m.a(x)) * m.b(x)), a=(8, 24), b=(8, 24), c=(24, 8)),
        {"a": "gate", "b": "expand", "c": "project"},
    ),
    "gate called second": (
        Layers(lambda m, x: x + m.c(m.b(x) * F.silu(m.a(x))), a=(8, 24), b=(8, 24), c=(24, 8)),
        {"a": "gate", "b": "expand", "c": "project"},
    ),
    "gated, each clamped by itself": (
        Layers(
            lambda m, x: x + m.c(F.silu(m.a(x.clamp(-9, 9))) * m.b(x.clamp(-8, 8))), a=(8, 24), b=(8, 24), c=(24, 8)
        ),
        {"a": "gate", "b": "expand", "c": "project"},
    ),
    "packed gate": (
        Layers(lambda m, x: x + m.b(F.glu(m.a(x))), a=(8, 48), b=(24, 8)),
        {"a": "expand", "b": "project"},
    ),
    "norm, scale, dropout": (
        Layers(
            lambda m, x: x.add_(0.1 * F.dropout(m.b(F.layer_norm(F.relu_(m.a(F.layer_norm(x, (8,)))), (32,))), 0.1)),
            a=(8, 32),
            b=(32, 8),
        ),
        {"a": "expand", "b": "project"},
    ),
    "a layer over tokens inside": (
        Layers(spatial_gate, a=(8, 32), over_tokens=(16, 16), b=(16, 8)),
        {"a": "expand", "b": "project"},
    ),
    "pooled": (
        Layers(lambda m, x: x + m.b(F.gelu(m.a(x)).mean(1, keepdim=True)), a=(8, 32), b=(32, 8)),
        {},
    ),
    "one token": (Layers(class_token_only, a=(8, 32), b=(32, 8)), {}),
    "one feature for all": (Layers(lambda m, x: x + m.b(F.gelu(m.a(x))), a=(8, 32), b=(32, 1)), {}),
    "attention": (Layers(attention, q=(8, 8), k=(8, 8), v=(8, 8), out=(8, 8)), {}),
    "activated attention": (
        Layers(
            lambda m, x: x + m.out(F.gelu(m.q(x)) @ (F.gelu(m.k(x)).transpose(1, 2) @ m.v(x))),
            q=(8, 8),
            k=(8, 8),
            v=(8, 8),
            out=(8, 8),
        ),
        {},
    ),
    "two inputs": (
        Layers(lambda m, x: x + m.c(F.gelu(m.a(x)) + m.b(x.flip(1))), a=(8, 16), b=(8, 16), c=(16, 8)),
        {},
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_an_ffn_is_what_widens_bends_narrows_and_is_added(name: str) -> None:
    block, expected = BLOCKS[name]
    sites = by_name(Tokens(block), torch.randn(2, 3, 16, 16))
    found = {name.removeprefix("block."): site for name, site in sites.items() if name.startswith("block.")}
    assert {name: site.role for name, site in found.items() if site.in_ffn} == expected
    assert {site.ffn for site in found.values()} <= {None, "block.b", "block.c"}
    assert len({site.ffn for site in found.values() if site.in_ffn}) == bool(expected)
    assert sites["stem"].role == "stem" and sites["head"].role == "head"


class Pixels(nn.Module):
    """1x1 convolutions by name with one 3x3 and one depthwise convolution, and what to do with them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, int]) -> None:
        super().__init__()
        self.run = run
        self.stem = nn.Conv2d(3, 8, 4, 4)
        for name, shape in shapes.items():
            self.add_module(name, nn.Conv2d(*shape, 1))
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.dense = nn.Conv2d(16, 16, 3, padding=1)
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self, self.stem(x))).mean((2, 3))


def squeeze_excite(m: Any, x: Tensor) -> Tensor:
    hidden = F.silu(m.deep(F.silu(m.a(x))))
    return hidden * m.up(F.relu(m.down(hidden.mean((2, 3), keepdim=True)))).sigmoid()


PIXELS: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "plain": (Pixels(lambda m, x: x + m.b(F.gelu(m.a(x))), a=(8, 32), b=(32, 8)), {"a": "expand", "b": "project"}),
    "depthwise between": (
        Pixels(lambda m, x: x + m.b(F.relu6(m.deep(F.relu6(m.a(x))))), a=(8, 16), b=(16, 8)),
        {"a": "expand", "b": "project"},
    ),
    "squeeze and excitation between": (
        Pixels(lambda m, x: x + m.b(squeeze_excite(m, x)), a=(8, 16), b=(16, 8), down=(16, 4), up=(4, 16)),
        {"a": "expand", "b": "project"},
    ),
    "mixed into what it read": (
        Pixels(lambda m, x: x + 0.1 * (m.b(F.relu(m.a(x))) - x), a=(8, 16), b=(16, 8)),
        {"a": "expand", "b": "project"},
    ),
    "dense convolution between": (
        Pixels(lambda m, x: x + m.b(F.relu(m.dense(F.relu(m.a(x))))), a=(8, 16), b=(16, 8)),
        {},
    ),
    "dense convolutions": (Pixels(lambda m, x: x + m.second(F.relu(m.first(x)))), {}),
    "narrow first": (Pixels(lambda m, x: x + m.b(F.relu(m.a(x))), a=(8, 4), b=(4, 8)), {}),
    "added to another scale": (
        Pixels(lambda m, x: m.c(x.square()) + m.b(F.relu(m.a(m.c(x)))), a=(8, 16), b=(16, 8), c=(8, 8)),
        {},
    ),
}


@pytest.mark.parametrize("name", PIXELS)
def test_an_ffn_may_be_made_of_convolutions(name: str) -> None:
    block, expected = PIXELS[name]
    assert {s.name: s.role for s in fdsurgery.sites(block, torch.randn(2, 3, 32, 32)) if s.in_ffn} == expected


def test_a_block_that_runs_twice_is_one_ffn() -> None:
    block = Layers(lambda m, x: x + m.b(F.gelu(m.a(x))), a=(8, 32), b=(32, 8))
    sites = by_name(Tokens(nn.Sequential(block, block)), torch.randn(2, 3, 16, 16))
    assert (sites["block.0.a"].role, sites["block.0.b"].role) == ("expand", "project")
    assert sites["block.0.a"].calls == 2 and sites["block.0.a"].aliases == ("block.1.a",)


def test_torchs_own_transformer_is_read() -> None:
    block = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
    sites = by_name(Tokens(block), torch.randn(2, 3, 16, 16))
    assert (sites["block.linear1"].role, sites["block.linear2"].role) == ("expand", "project")
    assert sites["block.linear1"].obstacle is None
    assert "MultiheadAttention" in sites["block.self_attn.out_proj"].obstacle


def test_what_a_site_tells() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, (1, 3), (2, 1), dilation=(1, 2)), nn.Conv2d(8, 8, 3, groups=8))
    model.again = model[1]
    first, second = fdsurgery.sites(model, torch.randn(2, 3, 20, 20))
    assert (first.name, first.kind, first.role, first.in_channels, first.out_channels) == ("0", "conv", "stem", 3, 8)
    assert (first.kernel_size, first.stride, first.dilation, first.groups) == ((1, 3), (2, 1), (1, 2), 1)
    assert (first.layout, first.input_shape, first.calls) == ("NCHW", (2, 3, 20, 20), 1)
    assert (first.layer_class, first.parent_class, first.aliases) == ("Conv2d", "Sequential", ())
    assert (second.role, second.groups, second.aliases) == ("depthwise", 8, ("again",))


def test_a_layer_inside_a_layer_is_a_part_of_it() -> None:
    outer = nn.Conv2d(3, 8, 3)
    outer.inner = nn.Conv2d(3, 8, 3)
    assert [site.name for site in fdsurgery.sites(nn.Sequential(outer))] == ["0"]


@pytest.mark.parametrize(
    ("shape", "layout"), [((4, 8), "rows"), ((4, 5, 8), "tokens"), ((4, 5, 6, 8), "NHWC")]
)  # fmt: skip
def test_layouts_of_linear_layers(shape: tuple[int, ...], layout: str) -> None:
    assert fdsurgery.sites(nn.Sequential(nn.Linear(8, 8)), torch.randn(shape))[0].layout == layout


def test_a_feature_pyramid_has_no_shortcuts() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.deeper = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
            self.lateral, self.top, self.out = (nn.Conv2d(8, 8, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            fine = self.stem(x)
            coarse = self.top(self.deeper(fine))
            return self.out(self.lateral(fine) + F.interpolate(coarse, fine.shape[2:])).relu()

    assert by_name(Pyramid(), torch.randn(2, 3, 18, 18))["lateral"].role == "pointwise"


def test_heads_may_be_averaged() -> None:
    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mixer = nn.Linear(3, 8), nn.Linear(8, 8)
            self.head, self.head_dist = nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mixer(self.stem(x).relu()).relu()
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2

    roles = {name: site.role for name, site in by_name(Distilled(), torch.randn(2, 4, 3)).items()}
    assert roles == {"stem": "linear", "mixer": "linear", "head": "head", "head_dist": "head"}


@pytest.mark.parametrize(
    "inputs",
    [torch.randn(4, 8), torch.randn(4, 5, 8), torch.randn(4, 5, 6, 8), {"input": torch.randn(4, 5, 8)}],
    ids=["rows", "tokens", "pixels", "by keyword"],
)
def test_multiply_adds_are_those_of_one_sample(inputs: Any) -> None:
    shape = (inputs["input"] if isinstance(inputs, dict) else inputs).shape
    site = fdsurgery.sites(nn.ModuleDict({"layer": nn.Linear(8, 3)})["layer"], inputs)[0]
    assert site.multiply_adds == shape.numel() // 4 * 3


def test_multiply_adds_of_convolutions() -> None:
    class TakesAList(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, (1, 3), stride=2, groups=2)

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.conv(torch.stack(images)) + self.conv(torch.stack(images).flip(3))

    outputs, summands, calls = 6 * 4 * 3, 2 * 3, 2
    for count in (1, 3):
        site = fdsurgery.sites(TakesAList(), ([torch.randn(4, 7, 7) for _ in range(count)],))[0]
        assert site.multiply_adds == outputs * summands * calls


class PackedPatches(nn.Module):
    """Takes the patches of all images as rows, and for each image how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.expand, self.project = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, rows: Tensor, grid: Tensor) -> Tensor:
        x = self.embed(rows)
        return (x + self.project(F.gelu(self.expand(x)))).cos()


def test_rows_may_be_patches() -> None:
    sites = by_name(PackedPatches(), (torch.randn(40, 8), torch.tensor([[1, 4, 5]] * 2)))
    assert (sites["expand"].role, sites["project"].role) == ("expand", "project")
    assert sites["expand"].multiply_adds == 20 * 8 * 32


def test_a_frozen_norm_hides_no_shortcut() -> None:
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"]
        ),
        encoder_layers=1, decoder_layers=1, d_model=16, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    found = Counter(site.role for site in fdsurgery.sites(transformers.DetrForObjectDetection(config)))
    assert found["shortcut"] == 2 and found["expand"] == found["project"] == 2


# Obstacles


class Hazards(nn.Module):
    """One layer of each kind that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.idle = nn.Conv2d(8, 8, 1)
        self.pooled = nn.Conv2d(8, 8, 1)
        self.read = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.hooked = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.patched = nn.Linear(8, 8)
        forward = self.patched.forward
        self.patched.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
        self.subclass = Shifted(8, 8, 1)
        self.constant = nn.Linear(2, 8)
        self.register_buffer("positions", torch.randn(4, 2))
        self.free = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.subclass(x * self.pooled(x.mean((2, 3), keepdim=True)))
        x = x.flatten(2).transpose(1, 2)
        x = F.linear(x, self.read.weight) + self.constant(self.positions)[:1]
        x = self.attention(x, x, x, need_weights=False)[0]
        for layer in (self.one, self.other, self.normed, self.hooked, self.patched, self.free):
            x = layer(x).relu()
        return x.mean(1)


class Shifted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias) + 1


OBSTACLES = {
    "idle": "never calls it",
    "pooled": "one pixel",
    "read": "weight is read past the layer by 'the model' (Hazards)",
    "attention.out_proj": "weight is read past the layer by 'attention' (MultiheadAttention)",
    "one": "shares a parameter with 'other.weight'",
    "other": "shares a parameter with 'one.weight'",
    "hooked": "computed before each call",
    "patched": "forward was replaced",
    "subclass": "does more than one convolution or product",
    "constant": "does not depend on the model's input",
}


def test_what_stands_in_the_way_is_told() -> None:
    sites = by_name(Hazards(), torch.randn(2, 3, 16, 16))
    assert {name for name, site in sites.items() if site.obstacle} == set(OBSTACLES)
    for name, reason in OBSTACLES.items():
        assert reason in sites[name].obstacle, (name, sites[name].obstacle)


class Folded(nn.Module):
    """FFNs on 9 positions before the samples, and on parts as if each were a sample: 4 strips, then 64 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.strips = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])
        self.patches = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])
        self.on_patches = nn.Conv2d(8, 8, 1)
        self.positions_first = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        tokens = x.flatten(2).permute(2, 0, 1)[:9]
        x = x + self.positions_first[1](self.positions_first[0](tokens).relu()).mean(0)[..., None, None]
        rows = x.unflatten(2, (4, 4)).permute(0, 2, 3, 4, 1).flatten(0, 1)  # (4B, 4, 16, C)
        rows = rows + self.strips[1](self.strips[0](rows).relu())
        patches = rows.unflatten(2, (4, 4)).unflatten(0, (-1, 4)).flatten(1, 3).flatten(0, 1)  # (64B, 4, C)
        patches = patches + self.patches[1](self.patches[0](patches).relu())
        return self.on_patches(patches.transpose(1, 2).unflatten(2, (2, 2))).unflatten(0, (-1, 64)).mean((1, 3, 4))


def test_samples_that_are_not_the_first_axis() -> None:
    sites = by_name(Folded(), torch.randn(2, 3, 32, 32))
    folded = {name for name, site in sites.items() if "64 parts of every sample" in (site.obstacle or "")}
    assert folded == {"patches.0", "patches.1", "on_patches"}
    second = {name for name, site in sites.items() if "samples second" in (site.obstacle or "")}
    assert second == {"positions_first.0", "positions_first.1"}
    assert sites["strips.0"].obstacle is None and sites["strips.0"].role == "expand"


def test_a_model_that_is_one_layer_offers_nothing_to_swap() -> None:
    (site,) = fdsurgery.sites(nn.Conv2d(3, 8, 3))
    assert (site.name, site.calls) == ("", 1) and "whole model" in site.obstacle


def test_a_glance_at_a_weight_is_no_obstacle() -> None:
    class Glances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x.type_as(self.stem.weight).to(self.stem.weight.device))
            assert self.conv.weight.dim() == 4 and self.conv.weight.size(0) == 8
            return self.conv(x.to(self.conv.weight.data.dtype)) + torch.zeros_like(self.conv.weight).sum()

    assert [site.obstacle for site in fdsurgery.sites(Glances(), torch.randn(2, 3, 16, 16))] == [None, None]


def test_a_hook_that_accelerate_hung_is_no_obstacle_and_stays() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    for layer in model:
        add_hook_to_module(layer, ModelHook())
    forward = model[0].forward
    assert [(site.calls, site.obstacle) for site in fdsurgery.sites(model)] == [(1, None), (1, None)]
    assert model[0].forward is forward


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(DiscoveryError, match=r"'0\.weight' has no shape yet"):
        observe(nn.Sequential(nn.LazyConv2d(8, 3)), torch.randn(2, 3, 8, 8))


def test_scripted_parts_are_kept() -> None:
    # Traced, not scripted: torch.jit.script knows built-in functions by their address, so that now and then it takes a
    # fresh list of a layer for one of them and fails.
    scripted = torch.jit.trace(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), torch.randn(2, 8, 14, 14))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), scripted, nn.Conv2d(8, 8, 3))
    sites = by_name(model, torch.randn(2, 3, 16, 16))
    assert "ScriptModule" in sites["1.0"].obstacle
    assert (sites["1.0"].in_channels, sites["1.0"].out_channels, sites["1.0"].kernel_size) == (8, 8, (3, 3))
    assert sites["2"].role != "stem", "what a scripted module returns comes from the layers before it"
    assert sites["2"].obstacle is None


@pytest.mark.parametrize(
    ("name", "layer_class"),
    [
        ("timm convnext (linear FFN)", "FDLinear"),
        ("timm convnext (1x1 FFN)", "FDConv2d"),
        ("timm resnet18", "FDConv2d"),
    ],
)
def test_a_converted_model_is_observed_again(name: str, layer_class: str) -> None:
    model, x = CASES[name].settled()
    before = by_name(model, x)
    plan = fdsurgery.plan(model, example_inputs=x)
    fdsurgery.apply(plan, model)
    after = by_name(model, x)
    assert list(after) == list(before)
    for decision in plan.swaps:
        site = after[decision.site.name]
        assert site.obstacle == "it is dynamic already" and site.calls == 1
        assert site.role == decision.site.role
    assert layer_class in {after[decision.site.name].layer_class for decision in plan.swaps}
    with pytest.raises(fdsurgery.PlanError, match="it is dynamic already"):
        fdsurgery.convert(model, example_inputs=x)


# Looking


def everything(model: nn.Module) -> list[Any]:
    """All that could be changed by looking."""
    found: list[Any] = []
    for module in model.modules():
        hooks = [list(value.items()) for key, value in vars(module).items() if key.endswith("_hooks") and value]
        found.append((id(module), module.training, sorted(vars(module)), hooks))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append((id(tensor), tensor._version, tensor.requires_grad, tensor.device, tensor.grad is None))
    return found


@pytest.mark.parametrize("name", ["timm resnet18", "timm swin", "hf segformer", "hf vit"])
@pytest.mark.parametrize("training", [False, True])
def test_looking_leaves_no_trace(name: str, training: bool) -> None:
    model, x = CASES[name].settled()
    model.train(training)
    next(model.children()).train(not training)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    tensors = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    things = everything(model)
    observe(model, x)
    observe(model)
    record(model, Inputs((x,)), meta=False)
    assert everything(model) == things and calls == []
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert now.keys() == tensors.keys() and all(torch.equal(now[name], tensors[name]) for name in now)


@pytest.mark.parametrize("branching", [False, True])
def test_a_replaced_forward_does_not_reach_past_the_copy(branching: bool) -> None:
    """Its closure holds the model's own modules, in training mode and with hooks."""
    block = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    forward, calls = block.forward, []
    block.forward = lambda x: 2 * forward(-x if branching and x.sum() > 0 else x)  # type: ignore[method-assign]
    block[1].register_forward_hook(lambda *_: calls.append(1))
    seen = observe(nn.Sequential(nn.Conv2d(3, 8, 3), block).train(), torch.randn(2, 3, 8, 8))
    assert seen.tracer == ("real" if branching else "meta") and seen.calls == {"0": 1, "1.1": 1}
    assert block[0].num_batches_tracked == 0 and not block[0].running_mean.any() and calls == []


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models_run_as_they_were_written(whole: bool) -> None:
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    compiled = torch.compile(block)
    model = compiled if whole else nn.Sequential(compiled)
    seen = observe(model.train(), torch.randn(2, 3, 8, 8))
    assert seen.tracer == "meta" and list(seen.calls.values()) == [1, 1]
    assert [site.role for site in seen.sites] == ["stem", "head"]
    assert block[1].num_batches_tracked == 0


def test_compiled_functions_run_as_they_were_written() -> None:
    compilations: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    doubled = torch.compile(lambda x: F.relu(x) * 2, backend=backend)
    block = Layers(lambda m, x: x + m.b(doubled(m.a(x))), a=(8, 32), b=(32, 8))
    assert by_name(Tokens(block), torch.randn(2, 3, 16, 16))["block.a"].role == "expand"
    assert compilations == []


class Remembers(nn.Conv2d):
    """Counts its calls, draws, and keeps what it saw."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.last = x
        return super().forward(x + 0 * torch.rand(()))


def test_layers_that_change_as_they_run_are_left_alone() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), Remembers(8, 8, 1)).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state, attributes = torch.get_rng_state(), sorted(vars(model[1]))
    fdsurgery.sites(model, torch.randn(2, 3, 8, 8, generator=torch.Generator()))
    assert len(before) == 3 and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state) and sorted(vars(model[1])) == attributes


def test_a_layer_that_writes_to_its_weight_writes_to_a_copy() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(4, 8, max_norm=0.1), nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.table(torch.arange(4)).sum()

    model = Lookup()
    before = model.table.weight.clone()
    record(model, Inputs((torch.randn(2, 3, 8, 8),)), meta=False)
    assert torch.equal(model.table.weight, before)


def test_a_forward_that_clamps_its_scale_clamps_a_copy() -> None:
    class Clamps(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.scale.data.clamp_(max=1)
            return super().forward(x) * self.scale

    model = Clamps(nn.Conv2d(3, 8, 3))
    model.scale = nn.Parameter(torch.tensor(9.0))
    record(model, Inputs((torch.randn(2, 3, 8, 8),)), meta=False)
    assert model.scale == 9


@pytest.mark.parametrize("branching", [False, True])
def test_hooks_run_on_a_copy_where_the_forward_needs_them(branching: bool) -> None:
    class Collects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 5, 1)
            self.features: dict[str, Tensor] = {}
            self.body[0].register_forward_hook(lambda module, args, output: self.features.update(middle=output))

        def forward(self, x: Tensor) -> Tensor:
            self.body(-x if branching and x.sum() > 0 else x)
            return self.head(self.features["middle"])

    model = Collects()
    seen = observe(model, torch.randn(2, 3, 8, 8))
    assert seen.tracer == ("real" if branching else "meta") and seen.calls == {"body.0": 1, "head": 1}
    assert [site.role for site in seen.sites] == ["stem", "head"]
    assert model.features == {}


def test_a_forward_that_writes_to_its_buffers_writes_to_copies() -> None:
    class Counting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return super().forward(x)

    model = Counting(nn.Conv2d(3, 8, 3))
    model.register_buffer("count", torch.zeros(()))
    for meta in (True, False):
        record(model, Inputs((torch.randn(2, 3, 8, 8),)), meta=meta)
    assert model.count == 0


def test_the_forward_runs_in_eval_mode() -> None:
    class Moody(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return super().forward(x)

    model = nn.Sequential(Moody(3, 8, 3)).train()
    assert observe(model).calls == {"0": 1} and model[0].training


@pytest.mark.parametrize(
    "write",
    [
        lambda blank, values: blank.__setitem__(slice(None), values),
        lambda blank, values: blank.copy_(values),
        lambda blank, values: blank[:, :4].copy_(values[:, :4]),
        lambda blank, values: torch.mul(values, 2, out=blank),
        lambda blank, values: torch.mul(values[:, :4], 2, out=blank[:, :4]),
        lambda blank, values: torch.max(values, 0, out=(blank[0], torch.empty(0, dtype=torch.long))),
    ],
    ids=["setitem", "in place", "through a view", "out=", "out=, a view", "out=, a tuple"],
)
def test_data_flows_through_what_is_written_in_place(write: Callable[[Tensor, Tensor], Any]) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.after = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            values = self.conv(x)
            blank = torch.zeros(values.shape, device=x.device)
            write(blank, values)
            return self.after(blank)

    after = by_name(Writes(), torch.randn(2, 3, 8, 8))["after"]
    assert after.obstacle is None and after.role == "head"


def test_data_flows_through_code_that_cannot_be_watched() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():  # as an extension would
                return x * 2

    after = fdsurgery.sites(nn.Sequential(nn.Conv2d(3, 8, 3), Hidden(), nn.Conv2d(8, 8, 3)))[1]
    assert after.obstacle is None and after.role == "head"


def test_what_cannot_be_copied_is_shared() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    model.lock = threading.Lock()
    assert observe(model).calls == {"0": 1}


def test_meta_tensors_serve_where_they_can_and_real_ones_where_not() -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert observe(nn.Sequential(*layers), torch.ones(2, 3, 9, 9)).tracer == "meta"
    seen = observe(Branching(*layers), torch.ones(2, 3, 9, 9))
    assert seen.tracer == "real" and seen.note.startswith("on meta tensors: ")
    assert [site.calls for site in seen.sites] == [1, 1]


def test_a_model_that_draws_leaves_the_generators_alone() -> None:
    class Drawing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if float(torch.rand(())) + random.random() + numpy.random.rand() < 0:
                return x
            return super().forward(x)

    model = Drawing(nn.Conv2d(3, 8, 3))
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    observe(model, torch.ones(2, 3, 9, 9))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert all(numpy.array_equal(now, then) for now, then in zip(numpy.random.get_state(), numpy_state, strict=True))


def test_a_model_on_meta_is_observed() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    assert observe(model).tracer == "meta" and len(observe(model).sites) == 21


class Picky(nn.Sequential):
    """Takes only small images, and looks at them."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 64:
            raise ValueError("small images only")
        return super().forward(x if x.sum() > 0 else -x)


def test_a_real_forward_gets_the_input_that_only_meta_tensors_could_not_serve() -> None:
    seen = observe(Picky(nn.Conv2d(3, 8, 3)))
    assert seen.tracer == "real" and [tuple(x.shape) for _, x in seen.inputs.tensors()] == [(2, 3, 64, 64)]
    assert "meta" in seen.note


def test_a_forward_that_only_runs_for_real_gets_a_try() -> None:
    class KnowsItsDevice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if x.device.type != "cpu":
                raise ValueError("not this device")
            return super().forward(x)

    seen = observe(KnowsItsDevice(nn.Conv2d(3, 8, 3)))
    assert seen.tracer == "real" and "not this device" in seen.note


def test_a_model_on_meta_that_needs_values_says_so() -> None:
    with torch.device("meta"):
        model = Picky(nn.Conv2d(3, 8, 3))
    with pytest.raises(DiscoveryError, match=r"\(2, 3, 64, 64\).*weights are on the meta device"):
        observe(model)


def test_what_meta_shows_is_what_real_tensors_show() -> None:
    for name in ("timm swin", "hf segformer", "timm ghostnet (no recipe of its own)"):
        model, x = CASES[name].settled()
        layers = {key: module for key, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
        meta, real = (find_roles(Flow(record(model, Inputs((x,)), meta=meta), layers)) for meta in (True, False))
        assert meta == real


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (torch.ones(1), Inputs((torch.ones(1),))),
        ((1, 2), Inputs((1, 2))),
        ([1, 2], Inputs((1, 2))),
        ({"x": 1}, Inputs(kwargs={"x": 1})),
        (Inputs((3,)), Inputs((3,))),
    ],
)
def test_how_example_inputs_are_read(inputs: Any, expected: Inputs) -> None:
    assert Inputs.of(inputs) == expected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_inputs_are_guessed(case: Any) -> None:
    model = case.build()
    inputs = example_inputs(model)
    (_, tensor), *_ = inputs.tensors()
    assert tensor.shape[0] == 2 and tensor.dim() == 4
    model.eval()(*inputs.args, **inputs.kwargs)


def test_a_model_of_unknown_inputs_says_what_to_pass() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.conv(left) + self.conv(right)

    with pytest.raises(DiscoveryError, match=r"Two could not be observed: .*right.* Pass example_inputs="):
        observe(Two())
    with pytest.raises(DiscoveryError, match="A tuple is read as positional arguments"):
        observe(Two(), torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert observe(Two(), (x, x)).calls == observe(Two(), {"left": x, "right": x}).calls == {"conv": 2}


# The zoo


@pytest.mark.slow
def test_every_timm_family_is_observed_and_no_attention_is_taken_for_an_ffn() -> None:
    families: dict[str, str] = {}
    for name in timm.list_models():
        families.setdefault(timm.models._registry._model_to_module[name], name)
    failed = {}
    for name in families.values():
        try:
            with torch.device("meta"):
                seen = observe(timm.create_model(name))
        except Exception as error:
            failed[name] = error
            continue
        assert seen.sites, name
        wrong = [site.name for site in seen.sites if site.in_ffn and any(word in site.name for word in ATTENTION)]
        assert not wrong, (name, wrong)
    assert not failed, failed


# FFNs of linear layers, and of 1x1 convolutions: one for each residual MLP and inverted residual block.
FFNS = {
    "caformer_s18": (12, 12),  # six of them are its separable convolutions
    "coat_tiny": (14, 0),
    "convit_tiny": (12, 0),
    "crossvit_tiny_240": (15, 0),
    "csatv2": (32, 0),
    "densenet121": (0, 0),
    "edgenext_xx_small": (12, 0),
    "efficientformer_l1": (1, 14),
    "efficientnet_b0": (0, 9),
    "efficientvim_m1": (0, 6),
    "eva02_tiny_patch14_224": (12, 0),
    "fastvit_t8": (0, 10),
    "focalnet_tiny_srf": (0, 12),
    "gmlp_ti16_224": (30, 0),
    "hiera_tiny_224": (12, 0),
    "levit_128s": (11, 0),
    "mvitv2_tiny": (10, 0),
    "pvt_v2_b0": (8, 0),
    "resnet50": (0, 0),
    "swinv2_tiny_window8_256": (12, 0),
    "test_mambaout": (6, 0),
    "tiny_vit_5m_224": (10, 2),
    "tnt_s_legacy_patch16_224": (24, 0),
    "twins_svt_small": (18, 0),
    "vit_base_patch16_xp_224": (0, 0),  # fc1 is one layer with qkv
    "vit_small_plus_patch16_dinov3": (12, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FFNS)
def test_ffns_of_the_zoo(name: str) -> None:
    with torch.device("meta"):
        seen = observe(timm.create_model(name))
    found = Counter(site.kind for site in seen.sites if site.role == "project")
    assert (found["linear"], found["conv"]) == FFNS[name]


@pytest.mark.slow
def test_a_detector_is_observed() -> None:
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64
    )
    seen = observe(detector)
    assert seen.tracer == "real" and seen.note
    assert all(seen.calls.values())
    assert seen.calls["rpn.head.cls_logits"] == 3, "once for each scale"


@pytest.mark.slow
def test_a_segmenter_that_holds_layers_in_lists_is_observed() -> None:
    with torch.device("meta"):
        model = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig())
    seen = observe(model)
    assert sum(site.role == "project" for site in seen.sites) == 24 + 6 + 9  # Swin, pixel decoder, decoder
    assert all(site.calls or "MultiheadAttention" in site.obstacle for site in seen.sites)
    assert not [site.name for site in seen.sites if site.in_ffn and any(word in site.name for word in ATTENTION)]

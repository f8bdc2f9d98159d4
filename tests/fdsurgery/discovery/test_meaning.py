"""Positions that must not see each other: a global mean would mix them, though a fresh conversion does not show it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fdsurgery
from fdconv import FDConv2d, FDLinear

N, D = 12, 32
SEQUENCE = torch.randn(2, N, 8, generator=torch.Generator().manual_seed(0))
LOWER = torch.ones(N, N, dtype=torch.bool).tril()
Attend = Callable[["Block", Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """A transformer block with an attention of any kind."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.register_buffer("mask", LOWER)
        self.hidden = ~LOWER  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(self.attend(self, q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, *attends: Attend) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, D)
        self.blocks = nn.ModuleList(Block(attend) for attend in attends)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


def masked_scores(change: Callable[[Block, Tensor], Tensor]) -> Attend:
    """Attention by hand, with scores changed before the softmax."""

    def attend(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return change(block, q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v

    return attend


def sdpa(**arguments: Any) -> Attend:
    return lambda block, q, k, v: F.scaled_dot_product_attention(q, k, v, **arguments)


FULL = sdpa()
BAND = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 2
GROUPS = torch.arange(N)[:, None] // 4 == torch.arange(N) // 4
PREFIX = LOWER | (torch.arange(N) < 4)
KEYS = (torch.arange(N) < 9).expand(N, N)
CAUSAL: dict[str, Attend] = {
    "is_causal": sdpa(is_causal=True),
    "a buffer": lambda block, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=block.mask),
    "made in forward": lambda block, q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()
    ),
    "added": masked_scores(lambda block, s: s + torch.full((N, N), float("-inf"), device=s.device).triu(1)),
    "masked_fill": masked_scores(lambda block, s: s.masked_fill(~block.mask[None, None], float("-inf"))),
    "the lowest number": masked_scores(lambda block, s: s.masked_fill(block.hidden.to(s.device), -1e9)),
    "where": masked_scores(lambda block, s: torch.where(block.mask, s, torch.finfo(s.dtype).min)),
    "compared indices": masked_scores(
        lambda block, s: (
            s + (torch.arange(N, device=s.device)[:, None] < torch.arange(N, device=s.device)).float() * -1e9
        )
    ),
    "torch's mask": masked_scores(
        lambda block, s: s + nn.Transformer.generate_square_subsequent_mask(N, device=s.device)
    ),
    "multiplied": lambda block, q, k, v: ((q @ k.mT).softmax(-1) * block.mask) @ v,
    "folded heads": lambda block, q, k, v: (
        torch.baddbmm(
            torch.full((N, N), -1e9, device=q.device).triu(1).expand(4, N, N), q.flatten(0, 1), k.flatten(0, 1).mT
        )
        .softmax(-1)
        .unflatten(0, (2, 2))
        @ v
    ),
    "linear attention": lambda block, q, k, v: torch.einsum(
        "bhnd,bhnde->bhne", q.softmax(-1), torch.cumsum(torch.einsum("bhnd,bhne->bhnde", k.exp(), v), 2)
    ),
    "scaled behind": masked_scores(lambda block, s: s.masked_fill(~block.mask, float("-inf")).float() * 1.0),
}
OTHERS: dict[str, tuple[tuple[Attend, ...], str]] = {
    "groups": ((sdpa(attn_mask=GROUPS),) * 2, "keeps positions apart"),
    "a prefix": ((sdpa(attn_mask=PREFIX),) * 2, "keeps positions apart"),
    "hidden keys": ((sdpa(attn_mask=KEYS),) * 2, "masks some positions"),
}
MEETING: dict[str, tuple[Attend, ...]] = {
    "full": (FULL, FULL),
    "a band": (sdpa(attn_mask=BAND),) * 2,
    "windows, then all": (sdpa(attn_mask=GROUPS), FULL),
    "windows, then shifted ones": (sdpa(attn_mask=GROUPS), sdpa(attn_mask=GROUPS.roll((2, 2), (0, 1)))),
    "a learned bias": (masked_scores(lambda block, s: s + block.fc1.weight[:N, :N]),) * 2,
    "forwards and backwards": (sdpa(is_causal=True), sdpa(attn_mask=LOWER.T)),
}


def cautions(model: nn.Module, inputs: Any) -> dict[str, str]:
    return {site.name: site.caution for site in fdsurgery.sites(model.eval(), inputs) if site.caution}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_decoders_are_kept(name: str) -> None:
    model = Decoder(CAUSAL[name], CAUSAL[name])
    reasons = {decision.site.name: decision.reason for decision in fdsurgery.plan(model, example_inputs=SEQUENCE).kept}
    for block in range(2):
        for layer in ("fc1", "fc2"):
            assert "attention is causal (in 'blocks.0')" in reasons[f"blocks.{block}.{layer}"]


def test_masks_are_read_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        assert "causal" in cautions(Decoder(CAUSAL["made in forward"]), None)["blocks.0.fc1"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_told(name: str) -> None:
    attends, said = OTHERS[name]
    assert said in cautions(Decoder(*attends), SEQUENCE)["blocks.1.fc2"]


@pytest.mark.parametrize("name", MEETING)
def test_where_all_positions_meet_nothing_is_said(name: str) -> None:
    assert cautions(Decoder(*MEETING[name]), SEQUENCE) == {}


def test_what_is_kept_would_have_leaked() -> None:
    """The claim behind all of this: after training, the future changes the past; and `anyway` does it all the same."""
    model = Decoder(CAUSAL["is_causal"], CAUSAL["is_causal"])
    recipe = fdsurgery.recipe.parse_recipe("swap: [{where: {role: ffn}, anyway: true}]")
    plan = fdsurgery.plan(model, recipe, example_inputs=SEQUENCE)
    assert len(plan.swaps) == 4 and all("swapped anyway: attention is causal" in swap.reason for swap in plan.swaps)
    other = SEQUENCE.clone()
    other[:, -1] += 1
    plain = copy.deepcopy(model)
    fdsurgery.apply(plan, model)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, FDLinear):
                for parameter in layer.KSM_Global.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
        assert torch.equal(plain(SEQUENCE)[:, :-1], plain(other)[:, :-1])
        assert not torch.allclose(model(SEQUENCE)[:, :-1], model(other)[:, :-1], rtol=1e-4)


class Encoder(nn.Module):
    """torch's own encoder layers."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments
        self.embed = nn.Linear(8, D)
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(self.embed(x), src_key_padding_mask=padding, **self.arguments)


def test_torchs_encoder() -> None:
    assert cautions(Encoder(), SEQUENCE) == {}
    causal = Encoder(mask=nn.Transformer.generate_square_subsequent_mask(N), is_causal=True)
    assert "causal" in cautions(causal, SEQUENCE)["encoder.layers.1.linear2"]
    padding = torch.zeros(2, N, dtype=torch.bool)
    assert cautions(Encoder(), (SEQUENCE, padding)) == {}, "nothing is hidden"
    padding[1, 9:] = True
    assert "masks some positions" in cautions(Encoder(), (SEQUENCE, padding))["encoder.layers.0.linear1"]


WORDS = torch.ones(2, N, dtype=torch.long)
SMALL = {"vocab_size": 99, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}


def bart() -> nn.Module:
    encoder = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    return transformers.BartModel(transformers.BartConfig(**SMALL, **encoder))


def t5(attention: str) -> Callable[[], nn.Module]:
    config = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 99}
    return lambda: transformers.T5Model(transformers.T5Config(**config, attn_implementation=attention))


class Translator(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, D)
        self.whole = nn.Transformer(D, 2, 2, 2, 2 * D, batch_first=True)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(N, device=input_ids.device)
        return self.whole(self.embed(input_ids), self.embed(decoder_input_ids), tgt_mask=mask)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(bart, id="bart"),
        pytest.param(
            t5("sdpa"),
            id="t5",
            marks=pytest.mark.skipif(not transformers.T5Model._supports_sdpa, reason="an older T5 has only its own"),
        ),
        pytest.param(t5("eager"), id="t5, written out"),
        pytest.param(Translator, id="torch"),
    ],
)
def test_what_a_decoder_reads_from_an_encoder_is_no_way_from_later_to_earlier(build: Callable[[], nn.Module]) -> None:
    found = cautions(build(), {"input_ids": WORDS, "decoder_input_ids": WORDS})  # of one length
    layers = {name for name in found if "decoder" in name and "attention is causal" in found[name]}
    assert len([name for name in layers if name.endswith(("fc1", "fc2", "wi", "wo", "linear1", "linear2"))]) == 4
    assert not any("encoder." in name.replace("decoder.", "") for name in found)


def test_masks_that_are_written_entry_by_entry() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    mask = torch.ones(2, 800, dtype=torch.long)
    inputs = {"input_values": torch.randn(2, 800), "attention_mask": mask}
    model = transformers.Wav2Vec2Model(config)
    assert cautions(model, inputs) == {}
    mask[1, 400:] = 0
    assert "masks some positions" in cautions(model, inputs)["encoder.layers.0.feed_forward.output_dense"]


def text_and_vision() -> dict[str, dict[str, Any]]:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {
        "text_config": small | {"vocab_size": 99, "eos_token_id": 2, "bos_token_id": 1},
        "vision_config": small | {"image_size": 32, "patch_size": 8},
    }


def test_vision_towers_stay_swappable_beside_causal_text() -> None:
    model = transformers.CLIPModel(transformers.CLIPConfig(**text_and_vision()))
    plan = fdsurgery.plan(model, "ffn")
    assert {swap.site.name.split(".")[0] for swap in plan.swaps} == {"vision_model"} and len(plan.swaps) == 4
    kept = [kept for kept in plan.kept if kept.site.in_ffn]
    assert len(kept) == 4 and all("causal" in decision.reason for decision in kept)
    words = SEQUENCE.new_ones(2, 17, dtype=torch.long)
    both = {"input_ids": words, "pixel_values": torch.randn(2, 3, 32, 32)}  # as many words as patches
    assert {swap.site.name for swap in fdsurgery.plan(model, "ffn", example_inputs=both).swaps} == {
        swap.site.name for swap in plan.swaps
    }


def test_padded_patches_of_siglip2() -> None:
    config = transformers.Siglip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_patches=64, patch_size=4
    )
    model = transformers.Siglip2VisionModel(config)
    mask = torch.ones(2, 64, dtype=torch.long)
    inputs = {"pixel_values": torch.randn(2, 64, 48), "pixel_attention_mask": mask}
    inputs["spatial_shapes"] = torch.tensor([[8, 8], [6, 8]])
    assert len(fdsurgery.plan(model, "ffn", example_inputs=inputs).swaps) >= 4
    mask[1, 48:] = 0
    assert not [
        swap for swap in fdsurgery.plan(model, "ffn", example_inputs=inputs).swaps if "head" not in swap.site.name
    ]


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "maxvit_tiny_rw_224"])
def test_shifted_windows_are_no_such_thing(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert cautions(model, torch.empty(2, 3, 224, 224, device="meta")) == {}
    if name.startswith("swin_"):
        assert cautions(timm.create_model(name, depths=(2, 2), embed_dim=24, num_heads=(1, 2)), None) == {}


class MaskedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = [self.weight[:, :, :1], torch.zeros_like(self.weight[:, :, 1:])]
        return self._conv_forward(x, torch.cat(rows, 2), self.bias)


def test_layers_beside_masked_convolutions() -> None:
    """A 1x1 convolution sees one pixel, but its mean would see those that the masked ones hide."""
    model = nn.Sequential(
        MaskedConv(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3)
    )
    found = cautions(model, torch.randn(2, 3, 12, 12))
    assert "'0' holds some of its weight at zero" in found["2"] and "'0'" in found["4"]


HALF = (torch.arange(12) < 6).float()


@pytest.mark.parametrize(
    ("change", "mask"),
    [
        (lambda x, mask: x * mask, HALF.expand(2, 1, 12, 12)),
        (lambda x, mask: x * mask.expand_as(x), HALF.expand(2, 1, 12, 12)),
        (lambda x, mask: x.masked_fill(mask == 0, 0), HALF.expand(2, 1, 12, 12)),
        (lambda x, mask: torch.where(mask > 0, x, 0), HALF.expand(2, 1, 12, 12)),
    ],
    ids=["factor", "full factor", "filled", "chosen"],
)
def test_features_of_which_a_mask_takes_positions_out(change: Callable[[Tensor, Tensor], Tensor], mask: Tensor) -> None:
    """As in sparse and partial convolutions, and behind padding."""

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.second(F.relu(change(self.first(x), mask)))

    x = torch.randn(2, 3, 12, 12)
    assert "a mask takes some positions out" in cautions(Sparse(), (x, mask))["second"]
    assert cautions(Sparse(), (x, torch.ones_like(mask))) == {}, "nothing is hidden"


def test_tokens_of_which_a_mask_takes_some_out() -> None:
    class Pooled(nn.Module):
        def __init__(self, write: bool) -> None:
            super().__init__()
            self.write = write
            self.embed, self.fc1, self.fc2 = nn.Linear(8, D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

        def forward(self, x: Tensor, there: Tensor) -> Tensor:
            x = self.embed(x)
            if self.write:
                x[~there.bool()] = 0
            x = x + self.fc2(F.gelu(self.fc1(x)))
            return (x * there[..., None]).sum(1) if not self.write else x

    there = torch.ones(2, N)
    there[1, 8:] = 0
    for write in (False, True):
        assert "a mask takes some positions out" in cautions(Pooled(write), (SEQUENCE, there))["fc1"]
        assert cautions(Pooled(write), (SEQUENCE, torch.ones(2, N))) == {}


@pytest.mark.parametrize(("pad", "told"), [((1, 1, 2, 0), True), ((1, 1, 1, 1), False), ((0, 2, 1, 1), True)])
def test_convolutions_that_are_causal_by_their_padding(pad: tuple[int, ...], told: bool) -> None:
    model = nn.Sequential(nn.ZeroPad2d(pad), nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU())
    assert ("padded on one side only" in cautions(model, torch.randn(2, 3, 12, 12)).get("3", "")) == told


class Packs(nn.Module):
    """Images of a batch side by side in one sequence, or one after the other."""

    def __init__(self, one_by_one: bool) -> None:
        super().__init__()
        self.one_by_one = one_by_one
        self.patch, self.block = nn.Conv2d(3, D, 4, 4), Block(FULL)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        if self.one_by_one:
            return torch.cat([self.block(image) for image in tokens.split(1)])
        return self.block(tokens.reshape(1, -1, D)).view_as(tokens)


def test_packed_samples() -> None:
    x = torch.randn(2, 3, 16, 16)
    assert "a batch of 2 in 1" in cautions(Packs(False), x)["block.fc1"]
    assert cautions(Packs(True), x) == {}
    canvas = nn.Sequential(nn.Conv2d(3, D, 3), nn.ReLU(), nn.Conv2d(D, D, 3))

    class Canvas(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.canvas = canvas

        def forward(self, x: Tensor) -> Tensor:
            return self.canvas(torch.cat(list(x.split(1)), -1))

    assert "a batch of 2 in 1" in cautions(Canvas(), x)["canvas.2"]


def test_plain_convnets_are_free_of_it() -> None:
    for name in ("test_resnet", "test_efficientnet", "tf_efficientnetv2_b0"):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert cautions(model, torch.empty(2, 3, 64, 64, device="meta")) == {}
        assert not any(isinstance(module, FDConv2d) for module in model.modules())

"""Small models of every kind, with weights on which a comparison means something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from fdsurgery.testing import settle_


@dataclass(frozen=True)
class Case:
    """A model, an input for it, and what its recipe is expected to do."""

    build: Callable[[], nn.Module]
    input_size: tuple[int, int, int]
    recipe: str
    swaps: int

    def settled(self, seed: int = 0) -> tuple[nn.Module, Tensor]:
        """The model with non-degenerate weights and settled statistics, in eval mode, and a batch for it."""
        torch.manual_seed(seed)
        model = self.build()
        x = torch.randn(2, *self.input_size)
        return settle_(model, x), x


def small_segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        depths=[1, 1, 2, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 4, 8],
        decoder_hidden_size=32,
        num_labels=5,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def small_convnextv2() -> nn.Module:
    config = transformers.ConvNextV2Config(depths=[1, 1, 2, 1], hidden_sizes=[16, 24, 40, 48], image_size=64)
    return transformers.ConvNextV2ForImageClassification(config)


def small_swin() -> nn.Module:
    config = transformers.SwinConfig(image_size=64, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4)
    return transformers.SwinForImageClassification(config)


def small_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=64
    )
    return transformers.ViTForImageClassification(config)


def small_hf_resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=32, hidden_sizes=[64, 96], depths=[2, 2])
    return transformers.ResNetForImageClassification(config)


def timm_model(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **arguments)


CASES: dict[str, Case] = {
    "timm resnet18": Case(timm_model("resnet18"), (3, 64, 64), "resnet", 16),
    "timm resnet26d": Case(timm_model("resnet26d"), (3, 64, 64), "resnet", 24),
    "timm convnext (linear FFN)": Case(
        timm_model("convnext_tiny", depths=(1, 1, 2, 1), dims=(24, 32, 48, 64)), (3, 64, 64), "convnext", 10
    ),
    "timm convnext (1x1 FFN)": Case(
        timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(24, 32, 48, 64)), (3, 64, 64), "convnext", 10
    ),
    "timm swin": Case(
        timm_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=24, num_heads=(2, 4)),
        (3, 56, 56),
        "swin",
        4,
    ),
    "timm vit": Case(
        timm_model("vit_small_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=4), (3, 64, 64), "vit", 4
    ),
    "hf segformer": Case(small_segformer, (3, 64, 64), "segformer", 10),
    "hf convnextv2": Case(small_convnextv2, (3, 64, 64), "convnext", 10),
    "hf swin": Case(small_swin, (3, 64, 64), "swin", 4),
    "hf vit": Case(small_vit, (3, 64, 64), "vit", 4),
    "hf resnet": Case(small_hf_resnet, (3, 64, 64), "resnet", 6),
    "timm ghostnet (no recipe of its own)": Case(timm_model("ghostnet_050"), (3, 64, 64), "generic", -1),
}

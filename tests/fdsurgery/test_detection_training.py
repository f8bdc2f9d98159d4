"""torchvision's detectors train after conversion as their plain twins do, converted as a whole or in the backbone."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection, resnet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d

import fdsurgery
from fdconv import FDConv2d, FDLinear
from fdsurgery.verification import relative_error

Target = dict[str, Tensor]

TWO_STAGE: dict[str, Any] = {
    "rpn_pre_nms_top_n_train": 40,
    "rpn_post_nms_top_n_train": 20,
    "rpn_pre_nms_top_n_test": 20,
    "rpn_post_nms_top_n_test": 8,
    "rpn_batch_size_per_image": 16,
    "box_batch_size_per_image": 16,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "FasterRCNN": TWO_STAGE,
    "MaskRCNN": TWO_STAGE,
    "RetinaNet": {"topk_candidates": 20, "score_thresh": 0.0},
    "FCOS": {"topk_candidates": 20, "score_thresh": 0.0},
}
SHIPPED = {"FasterRCNN": "fasterrcnn_resnet50_fpn", "MaskRCNN": "maskrcnn_resnet50_fpn"}

slow = pytest.mark.slow
cases = pytest.mark.parametrize(
    ("name", "part"),
    [
        ("FasterRCNN", "whole"),
        ("MaskRCNN", "backbone"),
        ("RetinaNet", "whole"),
        pytest.param("FasterRCNN", "backbone", marks=slow),
        pytest.param("MaskRCNN", "whole", marks=slow),
        pytest.param("FCOS", "whole", marks=slow),
        pytest.param("FasterRCNN, ResNet-50", "whole", marks=slow),
        pytest.param("MaskRCNN, ResNet-50", "whole", marks=slow),
    ],
)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def small_backbone() -> nn.Module:
    """A ResNet and a pyramid, built as torchvision builds its own, of one block a stage."""
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=FrozenBatchNorm2d)
    stages = {f"layer{stage}": str(stage - 1) for stage in (1, 2, 3)}
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
    return BackboneWithFPN(body, stages, [64, 128, 256], out_channels=32)


@functools.cache
def _pair(name: str, part: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    kind, _, shipped = name.partition(", ")
    settings: dict[str, Any] = {"num_classes": 4, "min_size": 64, "max_size": 96, **SETTINGS[kind]}
    if shipped:
        # In float64: through fifty batch norms of a few positions, gradients lose 1 % of themselves in float32.
        plain = getattr(detection, SHIPPED[kind])(weights=None, weights_backbone=None, **settings).double()
    else:
        if kind in ("RetinaNet", "FCOS"):
            sizes = ((16,), (32,), (64,), (128,))
            ratios = ((1.0,),) if kind == "FCOS" else ((0.5, 1.0, 2.0),)
            settings["anchor_generator"] = detection.anchor_utils.AnchorGenerator(sizes, ratios * len(sizes))
        else:
            sizes = ((8,), (16,), (32,), (64,))
            settings["rpn_anchor_generator"] = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4)
        plain = getattr(detection, kind)(small_backbone(), **settings)
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
                module.weight.uniform_(0.5, 1)
                module.bias.normal_(std=0.1)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    converted = copy.deepcopy(plain)
    if part == "whole":
        fdsurgery.convert(converted, kernel_num=4)
    else:
        fdsurgery.convert(converted.backbone, example_inputs=images(plain, (64, 64))[0][0][None], kernel_num=4)
    return plain, converted


def pair(name: str, part: str) -> tuple[Any, Any]:
    plain, converted = _pair(name, part)
    return copy.deepcopy(plain), copy.deepcopy(converted)


def images(model: nn.Module, *sizes: tuple[int, int]) -> tuple[list[Tensor], list[Target]]:
    """Images of these sizes for a model, with a box, two or three in each, and their masks."""
    dtype = next(model.parameters()).dtype
    found: tuple[list[Tensor], list[Target]] = ([], [])
    for number, (height, width) in enumerate(sizes):
        count = 1 + number % 3
        corners = torch.rand(count, 2) * torch.tensor([width / 2, height / 2])
        boxes = torch.cat([corners, corners + 12 + 15 * torch.rand(count, 2)], 1)
        masks = torch.zeros(count, height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        found[0].append(torch.rand(3, height, width, dtype=dtype))
        found[1].append({"boxes": boxes.to(dtype), "labels": torch.randint(1, 4, (count,)), "masks": masks})
    return found


ODD = ((61, 83), (75, 64), (97, 50))


def dynamic(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, (FDConv2d, FDLinear))]


def losses(model: nn.Module, given: tuple[list[Tensor], list[Target]]) -> Target:
    torch.manual_seed(1)  # proposals and anchors are drawn at random
    result: Target = model.train()(*copy.deepcopy(given))
    return result


@cases
def test_features_and_detections_stay(name: str, part: str) -> None:
    plain, converted = pair(name, part)
    layers = dynamic(converted)
    assert layers and all(layer.startswith("backbone.") for layer in layers) == (part == "backbone")
    for given in (images(plain, *ODD)[0], images(plain, (80, 65))[0]):
        batch = converted.transform(given)[0].tensors
        with torch.no_grad():
            expected, found = plain.eval().backbone(batch), converted.eval().backbone(batch)
            assert expected.keys() == found.keys()
            for level in expected:
                assert relative_error(found[level], expected[level]) < 1e-5
            for one, other in zip(converted(given), plain(given), strict=True):
                assert one.keys() == other.keys() and len(one["boxes"]) > 0
                for key, value in other.items():
                    torch.testing.assert_close(one[key], value, rtol=1e-4, atol=1e-4)


@cases
def test_a_training_step_is_that_of_the_plain_twin_and_more_of_them_learn(name: str, part: str) -> None:
    plain, converted = pair(name, part)
    layers = dynamic(converted)
    given = images(plain, *ODD)
    results = {}
    for model in (plain, converted):
        found = losses(model, given)
        sum(found.values()).backward()  # type: ignore[union-attr]
        results[model] = {key: value.item() for key, value in found.items()}
    assert results[converted] == pytest.approx(results[plain], rel=1e-4)

    def plain_name(own: str) -> str:
        layer = next((layer for layer in layers if own.startswith(f"{layer}.")), None)
        return own if layer is None or own == f"{layer}.bias" else f"{layer}.weight"

    expected = {own: parameter.grad for own, parameter in plain.named_parameters()}
    total = float(torch.stack([gradient.norm() for gradient in expected.values() if gradient is not None]).norm())
    assert "ResNet-50" in name or any(gradient is None for gradient in expected.values()), "the stem is frozen"
    for own, parameter in converted.named_parameters():
        static = expected[plain_name(own)]
        assert (parameter.grad is None) == (static is None), own
        if parameter.grad is not None and static is not None:
            assert parameter.grad.isfinite().all(), own
            if own in expected:  # at conversion the modulation passes no gradient on
                error = float((parameter.grad - static).norm())
                assert error <= 2e-3 * max(float(static.norm()), 1e-3 * total), own

    rate = 1e-5 if "ResNet-50" in name else 1e-3  # at which a ResNet-50 with random weights diverges, plain or not
    groups = fdsurgery.param_groups(converted, lr=rate, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups)
    history = []
    for step in range(4):
        found = losses(converted, given if step != 2 else images(plain, (66, 91), (64, 64)))
        assert all(value.isfinite() for value in found.values())
        value = sum(found.values())
        assert isinstance(value, Tensor)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        history.append(value.item())
    assert history[3] < history[0]

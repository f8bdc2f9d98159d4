"""The nets: four pretrained stages under a small pyramid, the first two of them frozen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import fdsurgery

from .art import KNOWN, Material, picture, weights_file
from .scenes import as_input, portraits

FOLDER = Path(__file__).parent
EXPECTED = {
    "chelsea": "cat",
    "coffee": "espresso",
    "rocket": "missile",
    "china.jpg": "palace",
    "flower.jpg": "daisy",
}
"""A word of the class that each photograph has."""


class Pyramid(nn.Module):
    """Maps of strides 4 to 32 to logits `(B, classes, H/4, W/4)`."""

    def __init__(self, channels: list[int], width: int, classes: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.smooth = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        merged: Tensor | None = None
        for lateral, seen in zip(reversed(self.laterals), reversed(maps), strict=True):
            own = lateral(seen)
            if merged is not None:
                own = own + F.interpolate(merged, own.shape[-2:], mode="bilinear", align_corners=False)
            merged = own
        return self.out(F.relu(self.norm(self.smooth(merged))))


class Segmenter(nn.Module):
    """`(B, 3, H, W)` to logits of the same size, in a part that stays as it is and one that is trained."""

    def __init__(self, stages: list[nn.Module], width: int, classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        with torch.no_grad():
            x = torch.zeros(1, 3, 64, 64)
            self.channels = [(x := stage(x)).shape[1] for stage in self.stages.eval()]
        self.head = Pyramid(self.channels, width, classes)
        self.stages[:2].requires_grad_(False)

    def early(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of strides 4 and 8."""
        quarter = self.stages[0](x)
        return quarter, self.stages[1](quarter)

    def late(self, quarter: Tensor, eighth: Tensor) -> Tensor:
        """Logits, from what `early` gave."""
        sixteenth = self.stages[2](eighth)
        logits = self.head([quarter, eighth, sixteenth, self.stages[3](sixteenth)])
        return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(*self.early(x))


class Adapter(nn.Module):
    """Adds to a map what two 1x1 convolutions make of it; nothing at the start."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.into = nn.Conv2d(channels, hidden, 1, bias=False)
        self.back = nn.Conv2d(hidden, channels, 1, bias=False)
        nn.init.zeros_(self.back.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(F.relu(self.into(x)))


def lite(name: str, cache: Path | None) -> list[nn.Module]:
    """The stages of `lite0` or `lite2` with ImageNet weights; as drawn where there is no cache."""
    net = timm.create_model(f"tf_efficientnet_{name}") if cache is None else classifier(name, cache)
    blocks = net.blocks
    stem = nn.Sequential(net.conv_stem, net.bn1, blocks[0], blocks[1])
    return [stem, blocks[2], nn.Sequential(blocks[3], blocks[4]), nn.Sequential(blocks[5], blocks[6])]


def classifier(name: str, cache: Path) -> Any:
    """The whole net with its ImageNet weights, whose tensors are in timm's order under other names."""
    net = timm.create_model(f"tf_efficientnet_{name}")
    kept = torch.load(weights_file(name, cache), map_location="cpu", weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), kept.values(), strict=True)))
    return net.eval()


@torch.no_grad()
def check(name: str, cache: Path) -> dict[str, str]:
    """The class that the weights see in each of five photographs.

    Raises `SystemExit` where it is not the expected one in at least four: the weights are then in the wrong places.
    """
    net, labels, seen = classifier(name, cache), timm.data.ImageNetInfo(), {}
    for photograph in EXPECTED:
        image = torch.from_numpy(picture(photograph).copy()).permute(2, 0, 1)[None].float()
        scale = 256 / min(image.shape[2:])
        image = F.interpolate(image, scale_factor=scale, mode="bilinear", antialias=True)
        top, left = ((length - 224) // 2 for length in image.shape[2:])
        logits = net(as_input(image[..., top : top + 224, left : left + 224]))
        seen[photograph] = labels.index_to_description(int(logits.argmax()), detailed=True)
    if sum(word in seen[photograph] for photograph, word in EXPECTED.items()) < 4:
        raise SystemExit(f"the weights of {name} are not where they belong; they see {seen}")
    return seen


def resnet(width: int, weights: dict[str, Tensor] | None = None) -> list[nn.Module]:
    """The stages of a ResNet-18 whose first has `width` channels."""
    net = timm.create_model("resnet18", channels=_widths(width), num_classes=0)
    if weights is not None:
        net.load_state_dict(weights)
    return [nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool, net.layer1), net.layer2, net.layer3, net.layer4]


def _widths(width: int) -> tuple[int, ...]:
    return tuple(width * 2**stage for stage in range(4))


def resnet_weights(
    width: int, material: Material, steps: int, size: int, file: Path | None, device: torch.device
) -> dict[str, Tensor]:
    """Of a ResNet-18 that has learned to tell which glyph it sees, from those to train on; kept in a file."""
    if file is not None and file.exists():
        return torch.load(file, map_location="cpu", weights_only=True)
    torch.manual_seed(0)
    images, names = portraits(material, min(8 * steps, 8000), size, KNOWN, seed=0)
    net = timm.create_model("resnet18", channels=_widths(width), num_classes=int(names.max()) + 1).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    right = 0.0
    for _ in track(range(steps), "ResNet-18 learns glyphs"):
        chosen = torch.randint(len(images), (64,))
        logits = net(as_input(images[chosen].to(device)))
        wanted = names[chosen].to(device)
        loss = F.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right = 0.95 * right + 0.05 * float((logits.argmax(1) == wanted).float().mean())
    print(f"ResNet-18 names {100 * right:.0f} % of the glyphs it was trained on")
    weights = {key: value.cpu() for key, value in net.state_dict().items() if not key.startswith("fc.")}
    if file is not None:
        torch.save(weights, file)
    return weights


def adapted(net: Segmenter, family: str) -> Segmenter:
    """The same net with as many parameters as the conversion would give it, the new ones on the last map."""
    added = count(converted(copy.deepcopy(net), family, {})) - count(net)
    channels = net.channels[-1]
    adapter = Adapter(channels, -(-added // (2 * channels))).to(next(net.parameters()).device)
    net.stages[3] = nn.Sequential(net.stages[3], adapter)
    return net


def count(model: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def converted(net: Segmenter, family: str, settings: dict[str, Any], operator: str = "fdconv") -> Segmenter:
    """The same net with its trained stages made dynamic, by the recipe of its family (`lite` or `resnet`)."""
    image = torch.zeros(1, 3, 64, 64, device=next(net.parameters()).device)
    fdsurgery.convert(net, FOLDER / f"{family}.yaml", example_inputs=image, operator=operator, **settings)
    return net

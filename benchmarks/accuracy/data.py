"""The tasks: small, real where it can be had, and none so easy that a plain net solves it.

What is drawn depends on the seed alone. Nothing is downloaded: digits come with scikit-learn, pictures with
scikit-image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 64
"""Side of the tiles of a picture that go to training or to testing as a whole, so that no pixel is in both."""
TEXTURES = ("brick", "grass", "gravel", "moon", "immunohistochemistry", "retina", "hubble_deep_field", "cell", "coins")
HELD_OUT = ("camera", "astronaut", "chelsea", "coffee", "rocket")
"""Pictures that no task trains on."""


@dataclass(frozen=True)
class Data:
    """Grey images `(N, 1, S, S)`, and labels `(N,)` or, in dense tasks, `(N, S, S)`."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    @property
    def dense(self) -> bool:
        """Whether every pixel has a label."""
        return self.train_labels.dim() == 3

    def to(self, device: torch.device) -> Data:
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def digits(seed: int, train: int, test: int) -> Data:
    """scikit-learn's 1797 handwritten digits, 8x8 scaled up to 24x24 and buried in noise; `train` counts up to 1197."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(small, size=24, mode="bilinear")
    labels = torch.tensor(bunch.target)
    noise = np.random.default_rng(seed)
    images = _noisy(_standardised(images.squeeze(1).numpy()), 1.5, noise)
    order = torch.from_numpy(noise.permutation(len(labels)))
    tested, trained = order[: min(test, 600)], order[600:][:train]
    return Data(images[trained], labels[trained], images[tested], labels[tested], classes=10)


def textures(seed: int, train: int, test: int) -> Data:
    """Which of nine pictures a 24x24 patch is from; patches are standardised, so that brightness tells nothing."""

    def draw(count: int, part: str, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        labels = random.permutation(np.arange(count) % len(TEXTURES))
        tiles = [_tiles(picture(name).shape, part, seed) for name in TEXTURES]
        patches = np.stack([_crop(picture(TEXTURES[label]), tiles[label], 24, random) for label in labels])
        return _noisy(_standardised(patches), 0.5, random), torch.from_numpy(labels)

    return _drawn(draw, seed, train, test, len(TEXTURES))


def pictures(seed: int, train: int, test: int) -> Data:
    """Coins, ink and stained tissue in 48x48 patches of three pictures; masks as `masked_pictures` derives them."""

    def draw(count: int, part: str, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        both = [np.stack(pair) for pair in masked_pictures()]
        tiles = [_tiles(pair.shape[1:], part, seed) for pair in both]
        which = random.permutation(np.arange(count) % len(both))
        patches = np.stack([_crop(both[index], tiles[index], 48, random) for index in which])
        images = _noisy(_standardised(patches[:, 0]), 0.5, random)
        return images, torch.from_numpy(patches[:, 1].astype(np.int64))

    return _drawn(draw, seed, train, test, classes=4)


def boundaries(seed: int, train: int, test: int) -> Data:
    """Shapes in 48x48 noise that only their boundary tells apart: sharp, soft, or serrated."""

    def draw(count: int, part: str, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        scenes = [_scene(48, random) for _ in range(count)]
        images = _noisy(np.stack([image for image, _ in scenes]), 0.15, random)
        return images, torch.from_numpy(np.stack([labels for _, labels in scenes]))

    return _drawn(draw, seed, train, test, classes=4)


Draw = Callable[[int, str, np.random.Generator], tuple[Tensor, Tensor]]
"""From how many, `train` or `test`, and a source of chance to images and labels."""

TASKS: dict[str, Callable[[int, int, int], Data]] = {
    task.__name__: task for task in (digits, textures, pictures, boundaries)
}


@lru_cache
def picture(name: str) -> np.ndarray:
    """A picture of scikit-image in grey, `(H, W)`, float32 from 0 to 1."""
    from skimage import color, data, util

    image = util.img_as_float32(getattr(data, name)())
    return color.rgb2gray(image[..., :3]).astype(np.float32) if image.ndim == 3 else image


@lru_cache
def masked_pictures() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Grey pictures with masks that are 1 on coins, 2 on ink, 3 on brown stain, and 0 elsewhere.

    Coins: watershed of the Sobel magnitude, from markers below grey 30 and above 150. Ink of a page: below Sauvola's
    threshold. Stain of tissue: Otsu's threshold on the DAB channel of the coloured picture, which the grey one lacks.
    """
    from skimage import color, data, filters, segmentation

    coins = data.coins()
    markers = (coins < 30) + 2 * (coins > 150)
    on_coin = segmentation.watershed(filters.sobel(coins), markers) == 2
    page = data.page()
    ink = page < filters.threshold_sauvola(page, window_size=25)
    brown = color.rgb2hed(data.immunohistochemistry())[..., 2]
    stain = brown > filters.threshold_otsu(brown)
    masks = {"coins": on_coin, "page": ink, "immunohistochemistry": stain}
    numbered = enumerate(masks.items(), 1)
    return tuple((picture(name), (index * mask).astype(np.float32)) for index, (name, mask) in numbered)


def _drawn(draw: Draw, seed: int, train: int, test: int, classes: int) -> Data:
    random = np.random.default_rng(seed)
    return Data(*draw(train, "train", random), *draw(test, "test", random), classes)


def _tiles(shape: tuple[int, ...], part: str, seed: int) -> np.ndarray:
    """Corners of a picture's tiles, a quarter of them for testing: `(N, 2)`."""
    rows, columns = (np.arange(size // TILE) * TILE for size in shape)
    corners = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    corners = np.random.default_rng(seed).permutation(corners)
    quarter = max(1, len(corners) // 4)
    return corners[:quarter] if part == "test" else corners[quarter:]


def _crop(image: np.ndarray, corners: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """A square from anywhere in one of the tiles, perhaps mirrored."""
    top, left = random.choice(corners) + random.integers(0, TILE - size + 1, 2)
    patch = image[..., top : top + size, left : left + size]
    return patch[..., ::-1] if random.random() < 0.5 else patch


def _scene(size: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Three shapes over a slope of grey, the later over the earlier, and the labels."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    slope = random.normal(0, 0.3, 2)
    image = slope[0] * (y / size - 0.5) + slope[1] * (x / size - 0.5)
    labels = np.zeros((size, size), np.int64)
    for kind in random.integers(1, 4, 3):
        centre = random.uniform(8, size - 8, 2)
        angle = np.arctan2(y - centre[0], x - centre[1])
        phases = random.uniform(0, 2 * np.pi, 3)
        bent = 0.15 * np.sin(2 * angle + phases[0]) + 0.1 * np.sin(3 * angle + phases[1])
        radius = random.uniform(7, 11) * (1 + bent)
        if kind == 3:
            radius = radius + 1.2 * np.sign(np.sin(14 * angle + phases[2]))
        depth = radius - np.hypot(y - centre[0], x - centre[1])
        cover = 1 / (1 + np.exp(-depth / (2.0 if kind == 2 else 0.3)))
        grey = random.choice([-1, 1]) * random.uniform(0.5, 1)
        image = image * (1 - cover) + grey * cover
        labels[depth > 0] = kind
    return image.astype(np.float32), labels


def _standardised(images: np.ndarray) -> np.ndarray:
    """Every image with mean 0 and deviation 1."""
    mean, deviation = images.mean((1, 2), keepdims=True), images.std((1, 2), keepdims=True)
    return (images - mean) / (deviation + 1e-3)


def _noisy(images: np.ndarray, deviation: float, random: np.random.Generator) -> Tensor:
    noise = random.normal(0, deviation, images.shape)
    return torch.from_numpy((images + noise).astype(np.float32)).unsqueeze(1)

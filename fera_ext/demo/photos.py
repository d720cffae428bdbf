"""Photographs as patches: the images that scikit-image carries, cut into small RGB squares.

The fine-tuning set of the demo is two photographs that no everyday picture resembles: a
deep field of galaxies (sparse points on black, flat spectrum) and stained tissue (dense texture).
The right-hand part of each is held out, so that training and evaluation share no pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

PATCH = 32
"""Side of a patch in pixels: the sample size of the demo model."""


@dataclass(frozen=True)
class Photo:
    """A photograph shipped in a package's data folder.

    ``scale`` shrinks it before patches are cut, so that a patch shows things and not a blur.
    """

    name: str
    package: str
    path: str
    scale: float

    def load(self) -> np.ndarray:
        """The image as (H, W, 3) uint8. Raises FileNotFoundError when its package lacks it."""
        source = Path(str(resources.files(self.package))) / self.path
        with Image.open(source) as image:
            rgb = image.convert("RGB")
        size = (round(rgb.width * self.scale), round(rgb.height * self.scale))
        return np.asarray(rgb.resize(size, Image.Resampling.LANCZOS))


FINETUNE_PHOTOS = (
    Photo("deep field", "skimage.data", "hubble_deep_field.jpg", 0.6),
    Photo("tissue", "skimage.data", "ihc.png", 0.5),
)
HELD_OUT = 0.3
"""Fraction of each photograph's width, on the right, that training never sees."""


def split(image: np.ndarray, held_out: float = HELD_OUT) -> tuple[np.ndarray, np.ndarray]:
    """Cut (H, W, 3) into the left part for training and the right part for evaluation."""
    edge = round(image.shape[1] * (1.0 - held_out))
    return image[:, :edge], image[:, edge:]


def random_patches(
    images: list[np.ndarray],
    count: int,
    rng: np.random.Generator,
    size: int = PATCH,
    scales: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """``count`` square patches, the images taken in turn, as (count, 3, size, size) in [-1, 1].

    Each patch has a random place and is mirrored half of the time. ``scales`` bounds the shrink
    factor (log-uniform): the square cut is ``size / factor`` wide and is resampled to ``size``.
    Raises ValueError when an image is smaller than a patch.
    """
    out = np.empty((count, size, size, 3), dtype=np.uint8)
    for i in range(count):
        image = images[i % len(images)]
        height, width = image.shape[:2]
        factor = float(np.exp(rng.uniform(np.log(scales[0]), np.log(scales[1]))))
        side = min(round(size / factor), height, width)
        if side < size:
            raise ValueError(f"random_patches: image must be at least {size} px, got {image.shape}")
        top = int(rng.integers(0, height - side + 1))
        left = int(rng.integers(0, width - side + 1))
        patch = image[top : top + side, left : left + side]
        if side != size:
            patch = np.asarray(Image.fromarray(patch).resize((size, size), Image.Resampling.BOX))
        out[i] = patch[:, ::-1] if rng.random() < 0.5 else patch
    return out.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0


def finetune_images() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The training parts and the held-out parts of the demo's photographs, each (H, W, 3)."""
    pairs = [split(photo.load()) for photo in FINETUNE_PHOTOS]
    return [a for a, _ in pairs], [b for _, b in pairs]

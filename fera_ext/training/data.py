"""A folder of images, in an order that is a function of the seed and the position alone.

Training consumes an endless stream of positions; position p is image ``permutation(seed, epoch)[p mod n]``,
cropped with a generator seeded by (seed, p). So a resumed run sees exactly what the unbroken run
would have seen, mid-epoch too, whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from fera_ext.training.errors import TrainError, first_line

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

ORDER, CROP, NOISE, DROPOUT, VALIDATION = range(5)
"""Names of the independent random streams of a run."""


def stream_seed(seed: int, stream: int, *counters: int) -> int:
    """A 63-bit seed for one draw: the same arguments give the same seed, on every machine."""
    state = np.random.SeedSequence((seed, stream, *counters)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on ``device``; a copy to a GPU goes through pinned memory, so that the host need not wait for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def find_images(folder: Path) -> list[Path]:
    """The images directly in ``folder``, sorted by name.

    Raises:
        TrainError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise TrainError(f"instance_data_dir must be a folder of images, got {folder}", exit_code=2)
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not found:
        raise TrainError(
            f"instance_data_dir must hold at least one image ({', '.join(EXTENSIONS)}), got none in {folder}",
            exit_code=2,
        )
    return found


def fingerprint(files: list[Path]) -> str:
    """The number of images and a digest of their names and sizes in bytes, wherever the folder is.

    Raises:
        TrainError: one of them is gone.
    """
    try:
        listed = sorted((file.name, file.stat().st_size) for file in files)
    except OSError as error:
        raise TrainError(f"instance_data_dir must be readable, got {first_line(error)}") from error
    digest = hashlib.sha256(json.dumps(listed).encode())
    return f"{len(listed)} files sha256:{digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class Batch:
    """A batch on the CPU.

    Attributes:
        pixels: (B, 3, S, S) float32 in [-1, 1]; empty where no file of the folder could be read.
        originals: (B, 2) int64, height and width of each image as it was found, upright.
        sizes: (B, 2) int64, height and width of each image after it was resized, before the crop.
        corners: (B, 2) int64, top and left of each crop.
        corrupt: the files that could not be read, with the reason.
    """

    pixels: torch.Tensor
    originals: torch.Tensor
    sizes: torch.Tensor
    corners: torch.Tensor
    corrupt: dict[str, str]


class ImageFolder(Dataset[dict[str, Any]]):
    """The crop at each position of the stream.

    Args:
        files: the images.
        resolution: side of the square crops in pixels; the shorter side is resized to it first.
        seed: of the order and the crops.
        center_crop: take the middle instead of a random place.
        random_flip: mirror half of the crops.
        channels: 3 for RGB, 1 for grey.
    """

    def __init__(
        self,
        files: list[Path],
        resolution: int,
        seed: int,
        *,
        center_crop: bool = False,
        random_flip: bool = False,
        channels: int = 3,
    ) -> None:
        self.files = files
        self.resolution = resolution
        self.seed = seed
        self.center_crop = center_crop
        self.random_flip = random_flip
        self.mode = "L" if channels == 1 else "RGB"
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def file_index(self, position: int) -> int:
        """Which file stands at a position of the stream."""
        epoch, offset = divmod(position, len(self.files))
        if epoch != self._epoch:
            rng = np.random.default_rng(stream_seed(self.seed, ORDER, epoch))
            self._epoch, self._order = epoch, rng.permutation(len(self.files))
        return int(self._order[offset])

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The sample at ``position``; a file that cannot be read is replaced by the next one in the folder.

        Where no file can be read it has no pixels: an exception would arrive from another process with that
        process's trace as its message.
        """
        corrupt: dict[str, str] = {}
        first = self.file_index(position)
        for skipped in range(len(self.files)):
            file = self.files[(first + skipped) % len(self.files)]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    image = self._open(file)
            except Exception as error:  # a damaged file makes the readers raise nearly anything
                corrupt[str(file)] = first_line(error)
                continue
            return {**self._crop(image, position), "corrupt": corrupt}
        return {"corrupt": corrupt}

    def _open(self, file: Path) -> Image.Image:
        with Image.open(file) as image:
            image.load()
            try:
                upright = ImageOps.exif_transpose(image)
            except Exception:  # broken EXIF data: struct.error, TypeError and others
                upright = image.copy()
            upright = _eight_bit(upright)
            if upright.mode in ("RGBA", "LA", "P", "PA"):
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert(self.mode)

    def _crop(self, image: Image.Image, position: int) -> dict[str, Any]:
        size = self.resolution
        original = image.size[::-1]
        factor = size / min(image.size)
        width, height = (max(size, round(side * factor)) for side in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        rng = np.random.default_rng(stream_seed(self.seed, CROP, position))
        top, left = (int(rng.integers(0, side - size + 1)) for side in (height, width))
        mirrored = rng.random() < 0.5
        if self.center_crop:
            top, left = (height - size) // 2, (width - size) // 2
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
        pixels = pixels.reshape(size, size, -1)
        if self.random_flip and mirrored:
            pixels = pixels[:, ::-1]
        array = np.ascontiguousarray(pixels.transpose(2, 0, 1)) / 127.5 - 1.0
        return {
            "pixels": torch.from_numpy(array),
            "original": original,
            "size": (height, width),
            "corner": (top, left),
        }


def _eight_bit(image: Image.Image) -> Image.Image:
    """Deeper grey images as 8-bit ones; Pillow's own conversion cuts them off at 255.

    Raises:
        ValueError: values whose white is unknown.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    white = 1.0 if image.mode == "F" else 65535.0
    # Written so that a NaN fails.
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"values must be in [0, {white:g}], got {values.min():g} to {values.max():g}")
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))


class Positions(Sampler[list[int]]):
    """Batches of positions for one process of several, from micro-step ``start`` on, without end."""

    def __init__(self, batch: int, start: int, process: int = 0, processes: int = 1) -> None:
        self.batch = batch
        self.start = start
        self.process = process
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.start
        while True:
            first = (micro * self.processes + self.process) * self.batch
            yield list(range(first, first + self.batch))
            micro += 1


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Samples to a batch."""
    corrupt: dict[str, str] = {}
    for sample in samples:
        corrupt.update(sample["corrupt"])
    if not all("pixels" in sample for sample in samples):
        none = torch.empty(0)
        return Batch(none, none, none, none, corrupt)
    return Batch(
        torch.stack([s["pixels"] for s in samples]),
        torch.tensor([s["original"] for s in samples]),
        torch.tensor([s["size"] for s in samples]),
        torch.tensor([s["corner"] for s in samples]),
        corrupt,
    )


def batches(folder: ImageFolder, positions: Positions, workers: int) -> Iterator[Batch]:
    """The stream of batches; each corrupt file is warned of once, by name.

    Raises:
        TrainError: no file can be read.
    """
    loader = DataLoader(
        folder,
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
    )
    warned: set[str] = set()
    for batch in loader:
        if not len(batch.pixels):
            file, reason = next(iter(batch.corrupt.items()))
            raise TrainError(
                f"instance_data_dir must hold a readable image, got {len(batch.corrupt)} corrupt files, such as "
                f"{file} ({reason})"
            )
        for file, reason in batch.corrupt.items():
            if file not in warned:
                warned.add(file)
                warnings.warn(f"corrupt image skipped: {file} ({reason})", stacklevel=2)
        yield batch

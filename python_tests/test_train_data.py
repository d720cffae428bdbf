"""fera-ext train: the folder of images."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import helpers_train as parts
import numpy as np
import pytest
import torch
from helpers_train import arguments, command, one_line_error, train
from PIL import Image

from fera_ext.training.data import ImageFolder, Positions, find_images


def test_corrupt_image_is_skipped_by_name(model: Path, tmp_path: Path) -> None:
    folder = parts.write_images(tmp_path / "images", 3)
    good = (folder / "0.png").read_bytes()
    (folder / "bad.png").write_bytes(good[: len(good) // 2])
    (folder / "worse.jpg").write_bytes(b"not an image")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code, log = train(model, folder, tmp_path / "out", max_train_steps=6)
    messages = [str(w.message) for w in caught if "corrupt image skipped" in str(w.message)]
    assert code == 0
    assert len(log) == 6
    assert sorted("bad.png" in m for m in messages) == [False, True]
    assert sum("worse.jpg" in m for m in messages) == 1


def test_all_images_corrupt(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"x")
    message = one_line_error(command(*arguments(model, folder, tmp_path / "out")), 1)
    assert "readable image" in message


RAMP = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
"""Columns from black to nearly white."""


def ramp_of(mode: str) -> Image.Image:
    """The ramp in an image of another mode."""
    if mode in ("I;16", "I"):
        return Image.fromarray(RAMP.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32) / 255)
    if mode in ("RGBA", "LA"):
        # Black, less and less opaque, over white.
        image = Image.new(mode, (32, 32))
        image.putalpha(Image.fromarray(255 - RAMP))
        return image
    return Image.fromarray(RAMP).convert(mode)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "I;16", "I", "F", "CMYK"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("a.tif" if mode in ("I", "F", "CMYK") else "a.png")
    image = ramp_of(mode)
    assert image.mode == mode
    image.save(file)
    # As large as the crop: nothing is resized.
    for channels in (3, 1):
        sample = ImageFolder([file], 32, 0, channels=channels)[0]
        assert sample["pixels"].shape == (channels, 32, 32)
        got = (sample["pixels"].numpy() + 1) * 127.5
        np.testing.assert_allclose(got, np.broadcast_to(RAMP, got.shape), atol=1.01)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "b.png")
    assert ImageFolder([tmp_path / "b.png"], 16, 0)[0]["size"] == (16, 24)


@pytest.mark.parametrize("values", [[0.0, 2.0], [-0.5, 1.0], [0.0, float("nan")]])
def test_float_image_of_unknown_white_is_skipped(values: list[float], tmp_path: Path) -> None:
    Image.fromarray(np.array([values] * 2, dtype=np.float32)).save(tmp_path / "a.tif")
    sample = ImageFolder([tmp_path / "a.tif"], 2, 0)[0]
    assert "pixels" not in sample
    assert "must be in [0, 1]" in sample["corrupt"][str(tmp_path / "a.tif")]


def test_order_visits_each_image_once_an_epoch(images: Path) -> None:
    folder = ImageFolder(find_images(images), 16, 0)
    epochs = [[folder.file_index(5 * e + i) for i in range(5)] for e in range(4)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_centre_crop_is_the_middle(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    middle = torch.from_numpy(pixels[10:50].transpose(2, 0, 1).astype(np.float32)) / 127.5 - 1
    centre = ImageFolder([tmp_path / "a.png"], 40, 0, center_crop=True)
    anywhere = ImageFolder([tmp_path / "a.png"], 40, 0)
    for position in range(4):
        torch.testing.assert_close(centre[position]["pixels"], middle)
        assert centre[position]["corner"] == (10, 0)
    assert len({anywhere[position]["corner"] for position in range(8)}) > 1


def test_processes_share_the_stream_without_overlap() -> None:
    from itertools import islice

    seen = [p for rank in range(2) for batch in islice(Positions(3, 0, rank, 2), 4) for p in batch]
    assert sorted(seen) == list(range(24))
    assert next(iter(Positions(3, 2, 1, 2))) == [15, 16, 17]


def test_corrupt_folder_with_workers_is_one_line(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"x")
    line = arguments(model, folder, tmp_path / "out", "--dataloader_num_workers", "2")
    message = one_line_error(command(*line), 1)
    assert "readable image, got 2 corrupt files" in message
    assert "a.png" in message or "b.png" in message


@pytest.mark.parametrize("error", [struct.error("unpack"), TypeError("a tuple"), KeyError(1)])
def test_broken_exif_leaves_the_image(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageOps

    def broken(_: Any) -> Any:
        raise error

    file = parts.write_images(tmp_path, 1) / "0.png"
    plain = ImageFolder([file], 16, 0)[0]
    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    sample = ImageFolder([file], 16, 0)[0]
    assert sample["corrupt"] == {}
    assert torch.equal(sample["pixels"], plain["pixels"])


def test_any_error_of_a_reader_skips_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = find_images(parts.write_images(tmp_path, 2))
    read = Image.open

    def broken(file: Any) -> Any:
        if Path(file).name == "0.png":
            raise struct.error("unpack requires a buffer of 2 bytes")
        return read(file)

    monkeypatch.setattr(Image, "open", broken)
    samples = [ImageFolder(files, 16, 0)[p] for p in range(2)]
    assert {k for s in samples for k in s["corrupt"]} == {str(files[0])}
    assert all("pixels" in s for s in samples)


def test_orientation_and_original_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.tile(np.arange(0, 240, 6, dtype=np.uint8), (20, 1)))
    image.save(tmp_path / "a.png", exif=exif)
    sample = ImageFolder([tmp_path / "a.png"], 10, 0)[0]
    # The file has 20 rows of 40; turned by a quarter, it is 40 high, and its ramp goes down.
    assert sample["original"] == (40, 20)
    assert sample["size"] == (20, 10)
    assert (sample["pixels"][0].diff(dim=0) > 0).all()


def test_fingerprint_is_of_names_and_sizes(tmp_path: Path) -> None:
    from fera_ext.training.data import fingerprint

    one, other = (find_images(parts.write_images(tmp_path / name, 3)) for name in ("a", "b"))
    assert fingerprint(one) == fingerprint(other) == fingerprint(other[::-1])
    assert fingerprint(one).startswith("3 files sha256:")
    assert fingerprint(one[:2]) != fingerprint(one)
    other[1].write_bytes(other[1].read_bytes() + b"x")
    assert fingerprint(other) != fingerprint(one)

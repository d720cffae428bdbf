"""The Bands value: identity, saving, limits, and what its filters promise."""

from __future__ import annotations

import pickle

import pytest
import torch

from fera_ext import reference
from fera_ext.bands import Bands

CPU, F64 = torch.device("cpu"), torch.float64


def _masks(height: int = 8, width: int = 8) -> torch.Tensor:
    fy = torch.fft.fftfreq(height)[:, None].abs()
    fx = torch.fft.rfftfreq(width)[None]
    return torch.stack([torch.exp(-4 * (fy + fx)), 1 - torch.exp(-4 * (fy + fx))])


@pytest.mark.parametrize("bands", [Bands.dog(4), Bands.rings(2), Bands.author(3), Bands.custom(_masks())])
def test_is_a_value(bands: Bands) -> None:
    masks = bands.masks
    again = Bands.from_dict(bands.to_dict(), masks)
    assert again == bands
    assert hash(again) == hash(bands)
    assert pickle.loads(pickle.dumps(bands)) == bands
    with pytest.raises(AttributeError):
        bands.name = "other"  # type: ignore[misc]
    assert bands != Bands.dog(5)


def test_from_dict_is_strict() -> None:
    with pytest.raises(ValueError, match="parameters must be K, got sigma"):
        Bands.from_dict({"name": "dog", "K": 3, "sigma": 1})
    with pytest.raises(ValueError, match="masks must be given"):
        Bands.from_dict({"name": "custom"})
    saved = Bands.custom(_masks()).to_dict()
    with pytest.raises(ValueError, match="masks must be the saved ones"):
        Bands.from_dict(saved, _masks() * 2)
    with pytest.raises(ValueError, match="masks must be a tensor"):
        Bands("custom", (("K", 2),))


def test_custom_masks_must_be_symmetric() -> None:
    first = _masks()
    first[0, 1, 0] += 1
    with pytest.raises(ValueError, match="asymmetric first column"):
        Bands.custom(first)
    last = _masks()
    last[0, 1, -1] += 1
    with pytest.raises(ValueError, match="asymmetric last column"):
        Bands.custom(last).filters(8, 8, CPU, F64)
    Bands.custom(last).filters(8, 9, CPU, F64)  # of odd width: no column stands for itself there


@pytest.mark.parametrize("size", [(1, 1), (16, 24), (31, 33)], ids=str)
def test_dog_transfers_sum_to_one(size: tuple[int, int]) -> None:
    transfers = Bands.dog(5).filters(*size, CPU, F64).table.sqrt()
    torch.testing.assert_close(transfers.sum(0), torch.ones_like(transfers[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (16, 24), (31, 33), (128, 128)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_rings_are_parseval_tight(size: tuple[int, int], count: int) -> None:
    z = torch.randn(2, 3, *size, dtype=F64)
    energy = reference.band_energy(z, Bands.rings(count)).sum(1)
    torch.testing.assert_close(energy, z.flatten(1).square().sum(1))


def test_author_blurs_keep_a_constant_inside() -> None:
    filters = Bands.author(2).filters(64, 96, CPU, F64)
    assert filters.right is not None
    middle = filters.right[:, 40:56].sum(-1)
    torch.testing.assert_close(middle, torch.ones_like(middle))
    assert not filters.spectral
    for j, reach in enumerate(filters.reach):
        offsets = torch.arange(96)[None] - torch.arange(96)[:, None]
        assert not filters.right[j][offsets.abs() > reach].any()


def test_filters_are_cached() -> None:
    a, b = (Bands.dog(3).filters(8, 8, CPU, torch.float32) for _ in range(2))
    assert a is b

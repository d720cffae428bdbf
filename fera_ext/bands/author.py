"""The published code's bands: zero-padded spatial Gaussian blurs, the highest band dropped.

Kept for its checkpoints. K blurs of standard deviation sigma_j = kappa 2^j, j < K, kappa = min(H, W)/128,
each from the latent itself, with a kernel of int(8 sigma + 1) taps made odd. Of low, differences and high
(K+1 bands) the first K are kept.
"""

from __future__ import annotations

from typing import Any

import torch

from fera_ext.bands.filters import Filters


def _taps(sigma: float) -> torch.Tensor:
    """Normalised Gaussian taps, float64, odd length int(8 sigma + 1) | 1."""
    half = (int(8 * sigma + 1) | 1) // 2
    offsets = torch.arange(-half, half + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def _banded(taps: torch.Tensor, size: int) -> torch.Tensor:
    """The (size, size) matrix of a zero-padded correlation with ``taps``."""
    half = taps.numel() // 2
    offset = torch.arange(size)[None, :] - torch.arange(size)[:, None]
    inside = offset.abs() <= half
    return torch.where(inside, taps[(offset + half).clamp(0, 2 * half)], torch.zeros((), dtype=taps.dtype))


def filters(params: dict[str, Any], height: int, width: int) -> Filters:
    """K blurs as matrices; the bands are the widest blur, then the differences, low to high."""
    bands = int(params["K"])
    kappa = min(height, width) / 128.0
    taps = [_taps(kappa * 2.0**j) for j in range(bands)]
    left = torch.stack([_banded(t, height) for t in taps])
    right = torch.stack([_banded(t, width) for t in taps])
    mix = torch.zeros(bands, bands, dtype=torch.float64)
    mix[0, bands - 1] = 1.0
    for k in range(1, bands):
        mix[k, bands - 1 - k] = 1.0
        mix[k, bands - k] = -1.0
    reach = tuple(min(t.numel() // 2, max(height, width) - 1) for t in taps)
    return Filters(left, right, mix, reach)

"""Differences of Gaussians, by FFT: periodic, nothing dropped (the default definition).

Paper, section 3 (frequency-energy indicator); transfers sum to one, so the bands sum to the latent.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fera_ext.bands.filters import Filters


def filters(params: dict[str, Any], height: int, width: int) -> Filters:
    """Squared transfers of K bands, low to high: sigma_j = kappa 2^j, j < K-1, kappa = min(H, W)/128."""
    bands = int(params["K"])
    kappa = min(height, width) / 128.0
    omega_y = 2.0 * math.pi * torch.fft.fftfreq(height, dtype=torch.float64)
    omega_x = 2.0 * math.pi * torch.fft.rfftfreq(width, dtype=torch.float64)
    squared = omega_y[:, None] ** 2 + omega_x[None, :] ** 2
    exponents = [-0.5 * (kappa * 2.0**j) ** 2 * squared for j in range(bands - 1)]
    gauss = [torch.exp(e) for e in exponents]
    transfers = [gauss[bands - 2]]
    transfers += [gauss[j - 1] - gauss[j] for j in range(bands - 2, 0, -1)]
    # expm1 keeps the top band's relative accuracy near zero frequency, where 1 - G cancels.
    transfers.append(-torch.expm1(exponents[0]))
    return Filters(torch.stack(transfers) ** 2)

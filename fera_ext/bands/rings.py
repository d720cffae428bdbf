"""Hard radial rings, by FFT: Parseval-tight, the energies sum to the latent's squared norm."""

from __future__ import annotations

from typing import Any

import torch

from fera_ext.bands.filters import Filters


def filters(params: dict[str, Any], height: int, width: int) -> Filters:
    """Ring masks, low to high: lower edges 0, then 0.5 * 2^-(K-1-j) cycles per pixel, j = 0 ... K-2.

    A ring holds its lower edge and not its upper; the last holds everything above. Squared radii are
    compared in float64, as the definition asks.
    """
    bands = int(params["K"])
    fy = torch.fft.fftfreq(height, dtype=torch.float64)
    fx = torch.fft.rfftfreq(width, dtype=torch.float64)
    radius = fy[:, None] ** 2 + fx[None, :] ** 2
    edges = [0.0] + [0.5 * 2.0 ** -(bands - 1 - j) for j in range(bands - 1)]
    masks = []
    for k, edge in enumerate(edges):
        inside = radius >= edge**2
        if k + 1 < bands:
            inside &= radius < edges[k + 1] ** 2
        masks.append(inside.to(torch.float64))
    return Filters(torch.stack(masks))

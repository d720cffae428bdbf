"""band_energy and frequency_energy: the latent's energy in each frequency band (paper, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fera_ext.bands import Bands
from fera_ext.ops._common import compute_dtype, filter_args

_ops = torch.ops.fera_ext


def band_energy(z: Tensor, bands: Bands) -> Tensor:
    """The energy of every sample in every band, ``E_k = ||H_k z||^2`` over all axes but the first.

    Args:
        z: (N, ..., H, W) float32, float16, bfloat16 or float64; H and W from 1 to 512, any strides.
        bands: the band definition.

    Returns:
        (N, K) float32 (float64 for float64 ``z``), low to high frequency; infinite where an energy exceeds
        the dtype's range (see :func:`frequency_energy`, which does not overflow).

    Raises:
        ValueError: a wrong shape, size or dtype.
    """
    return _ops.band_energy(z, *filter_args("band_energy", bands, z))


def frequency_energy(z: Tensor, bands: Bands, eps: float = 1e-8) -> Tensor:
    """The frequency-energy indicator ``e = E / (sum_k E_k + eps)``: a point on the simplex (paper, section 3).

    Args:
        z: (N, ..., H, W) float32, float16, bfloat16 or float64; H and W from 1 to 512, any strides.
        bands: the band definition.
        eps: added to the sum of energies, in the latent's units squared.

    Returns:
        (N, K) float32 (float64 for float64 ``z``), low to high frequency; right also for latents whose
        energies overflow or vanish in float32.

    Raises:
        ValueError: a wrong shape, size, dtype or eps.
    """
    return _ops.frequency_energy(z, *filter_args("frequency_energy", bands, z), eps)[0]


def _bands_of(table: Tensor, mix: Tensor | None) -> int:
    return table.shape[0] if mix is None else mix.shape[0]


@torch.library.register_fake("fera_ext::band_energy")
def _(z: Tensor, table: Tensor, right: Tensor | None, mix: Tensor | None, reach: list[int]) -> Tensor:
    return z.new_empty((z.shape[0], _bands_of(table, mix)), dtype=compute_dtype(z.dtype))


@torch.library.register_fake("fera_ext::band_energy_backward")
def _(grad: Tensor, z: Tensor, *filters: Any) -> Tensor:
    return z.new_empty(z.shape)


@torch.library.register_fake("fera_ext::frequency_energy")
def _(
    z: Tensor, table: Tensor, right: Tensor | None, mix: Tensor | None, reach: list[int], eps: float
) -> tuple[Tensor, Tensor]:
    energy = z.new_empty((z.shape[0], _bands_of(table, mix)), dtype=compute_dtype(z.dtype))
    return energy, z.new_empty((z.shape[0],), dtype=torch.float64)


@torch.library.register_fake("fera_ext::frequency_energy_backward")
def _(grad: Tensor, indicator: Tensor, total: Tensor, z: Tensor, *filters: Any) -> Tensor:
    return z.new_empty(z.shape)

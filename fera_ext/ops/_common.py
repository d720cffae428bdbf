"""What the operators' Python halves share."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from fera_ext.bands import SEPARABLE, Bands

# The band definition's filters as the operators take them: table, right, mix, reach.
FilterArgs = tuple[Tensor, Tensor | None, Tensor | None, list[int]]

FILTER_COUNT = 4


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of energies, gates and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _filter_part(bands: Bands, height: int, width: int, device: str, dtype: torch.dtype, part: str) -> Any:
    """One field of the filters, for a graph under compilation."""
    value = getattr(bands.filters(height, width, torch.device(device), dtype), part)
    return list(value) if part == "reach" else value


# A compiled graph holds the filters as constants instead of rebuilding them at each call. The mark is what
# torch._dynamo.assume_constant_result sets; importing torch._dynamo for it would double the import time.
_filter_part._dynamo_marked_constant = True  # type: ignore[attr-defined]


def filter_args(op: str, bands: Bands, z: Tensor) -> FilterArgs:
    """The filters of ``bands`` for latents like ``z``.

    Raises:
        ValueError: ``z`` has fewer than three axes or a side outside 1 to 512, or ``bands`` is no Bands.
    """
    if not isinstance(bands, Bands):
        raise ValueError(f"{op}: bands must be a fera_ext.Bands, got {type(bands).__name__}")
    if z.dim() < 3:
        raise ValueError(f"{op}: z must be (N, ..., H, W), got {tuple(z.shape)}")
    dtype = compute_dtype(z.dtype)
    if torch.compiler.is_compiling():
        # index() makes a symbolic size a constant: the filters belong to one size, so graphs do too.
        height, width, device = index(z.shape[-2]), index(z.shape[-1]), str(z.device)
        table = _filter_part(bands, height, width, device, dtype, "table")
        if bands.name not in SEPARABLE:
            return table, None, None, []
        right, mix, reach = (
            _filter_part(bands, height, width, device, dtype, part) for part in ("right", "mix", "reach")
        )
        return table, right, mix, reach
    filters = bands.filters(z.shape[-2], z.shape[-1], z.device, dtype)
    return filters.table, filters.right, filters.mix, list(filters.reach)


def no_grads(count: int) -> list[Any]:
    """``count`` absent gradients."""
    return [None] * count

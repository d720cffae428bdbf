"""What the operators' Python halves share."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from fera_ext.bands import Bands
from fera_ext.bands.definition import CUSTOM_MASKS

# The band definition's filters as the operators take them: table, right, mix, reach.
FilterArgs = tuple[Tensor, Tensor | None, Tensor | None, list[int]]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of energies, gates and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Held:
    """Filters that compiled graphs read, as attributes: dynamo lifts each into its graph's inputs."""


_held = _Held()
_names: dict[tuple[Bands, int, int, str, torch.dtype], str] = {}


def _hold(name: str, params: Any, height: int, width: int, device: str, dtype: torch.dtype) -> str:
    """Builds the filters while a graph is traced, and says under which name they are held.

    The definition comes as its name and parameters: dynamo makes constants of those, even where the traced
    function built the Bands itself, and not of the Bands.
    """
    bands = Bands(name, params, CUSTOM_MASKS.get(dict(params).get("sha256", "")))
    held = _names.setdefault((bands, height, width, device, dtype), f"filters{len(_names)}")
    filters = bands.filters(height, width, torch.device(device), dtype)
    for part in ("table", "right", "mix"):
        setattr(_held, f"{held}_{part}", getattr(filters, part))
    setattr(_held, f"{held}_reach", list(filters.reach))
    return held


# What torch._dynamo.assume_constant_result sets; importing torch._dynamo for it would double the import time.
_hold._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        name = _hold(bands.name, bands.params, height, width, device, dtype)
        return (
            getattr(_held, f"{name}_table"),
            getattr(_held, f"{name}_right"),
            getattr(_held, f"{name}_mix"),
            getattr(_held, f"{name}_reach"),
        )
    filters = bands.filters(z.shape[-2], z.shape[-1], z.device, dtype)
    if type(z).__name__ == "FakeTensor":  # traced by hand: the filters must be fake in the same mode
        fake: Any = z
        parts = (filters.table, filters.right, filters.mix)
        fakes = [None if t is None else fake.fake_mode.from_tensor(t) for t in parts]
        return (*fakes, list(filters.reach))  # type: ignore[return-value]
    return filters.table, filters.right, filters.mix, list(filters.reach)

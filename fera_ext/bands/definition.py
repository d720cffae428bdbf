"""The frozen :class:`Bands` value and the table of definitions."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fera_ext.bands import author, dog, rings
from fera_ext.bands.filters import Filters

MAX_SIDE = 512
"""The largest latent height or width the kernels take, in pixels."""

MAX_BANDS = 16
"""The most bands a definition may have."""

DEFINITIONS: dict[str, Callable[[dict[str, Any], int, int], Filters]] = {
    "dog": dog.filters,
    "rings": rings.filters,
    "author": author.filters,
}
"""Band definitions by name. ``custom`` is not here: its filters are its parameters."""
CUSTOM_MASKS: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
"""Masks of the custom definitions alive, by sha256: a compiled graph knows a definition by its parameters alone."""


@dataclass(frozen=True)
class Bands:
    """A band definition: its name and its parameters; hashable, comparable, saved with every adapter.

    Build one with :meth:`dog`, :meth:`rings`, :meth:`author` or :meth:`custom`.

    Attributes:
        name: a key of :data:`DEFINITIONS`, or ``"custom"``.
        params: sorted ``(key, value)`` pairs.
    """

    name: str
    params: tuple[tuple[str, Any], ...]
    masks: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.name != "custom" and self.name not in DEFINITIONS:
            known = ", ".join([*DEFINITIONS, "custom"])
            raise ValueError(f"bands: name must be one of {known}, got {self.name!r}")
        if self.name == "custom" and self.masks is None:
            raise ValueError("bands: masks must be a tensor when name is 'custom', got None")
        bands = dict(self.params).get("K")
        lowest = 2 if self.name == "dog" else 1
        if not isinstance(bands, int) or isinstance(bands, bool) or not lowest <= bands <= MAX_BANDS:
            raise ValueError(f"bands: K must be an integer from {lowest} to {MAX_BANDS}, got {bands!r}")

    @staticmethod
    def dog(K: int = 3) -> Bands:
        """Differences of Gaussians by FFT, periodic; K from 2 to 16. The default."""
        return Bands("dog", (("K", K),))

    @staticmethod
    def rings(K: int = 3) -> Bands:
        """Hard radial rings by FFT, Parseval-tight; K from 1 to 16."""
        return Bands("rings", (("K", K),))

    @staticmethod
    def author(K: int = 3) -> Bands:
        """What the published code does (the highest band is dropped); K from 1 to 16."""
        return Bands("author", (("K", K),))

    @staticmethod
    def custom(masks: torch.Tensor) -> Bands:
        """Bands from squared transfers of your own.

        Args:
            masks: (K, H, W//2+1) real, finite, non-negative, symmetric under ω → −ω; the latents must be
                H × W, and W is read from the first use (W//2+1 fits an even and an odd W).

        Raises:
            ValueError: wrong rank, size, value or symmetry.
        """
        if masks.ndim != 3 or not 1 <= masks.shape[0] <= MAX_BANDS or 0 in masks.shape:
            raise ValueError(
                f"bands: masks must be (K, H, W//2+1) with K from 1 to {MAX_BANDS}, got {tuple(masks.shape)}"
            )
        table = masks.detach().to("cpu", torch.float64).contiguous().clone()
        if not bool(torch.isfinite(table).all()) or bool((table < 0).any()):
            raise ValueError("bands: masks must be finite and non-negative, got other values")
        # Column 0 holds w and -w for every v; the Nyquist column does so only for even widths, which is
        # checked where the width is known (filters).
        if not torch.allclose(table[:, :, 0], _mirror(table[:, :, 0]), rtol=1e-6, atol=0):
            raise ValueError("bands: masks must be symmetric under w -> -w, got an asymmetric first column")
        digest = hashlib.sha256(table.numpy().tobytes()).hexdigest()
        params = (("K", int(table.shape[0])), ("shape", tuple(table.shape)), ("sha256", digest))
        table = CUSTOM_MASKS.setdefault(digest, table)
        return Bands("custom", params, table)

    @property
    def count(self) -> int:
        """The number of bands, K."""
        return int(dict(self.params)["K"])

    def filters(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Filters:
        """The filters for latents of ``height`` × ``width`` pixels, cached per size, device and dtype.

        Raises:
            ValueError: a size outside 1 to 512, or one that custom masks do not fit.
        """
        return _filters(self, height, width, device, dtype)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; custom masks travel separately, as a tensor."""
        return {"name": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in self.params}}

    @staticmethod
    def from_dict(data: dict[str, Any], masks: torch.Tensor | None = None) -> Bands:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown name or parameter, or masks that are missing or not the saved ones.
        """
        name = data.get("name")
        if name == "custom":
            if masks is None:
                raise ValueError("bands: masks must be given for custom bands, got None")
            bands = Bands.custom(masks)
            if bands.to_dict()["sha256"] != data.get("sha256"):
                raise ValueError("bands: masks must be the saved ones, got another sha256")
            return bands
        unknown = sorted(set(data) - {"name", "K"})
        if unknown:
            raise ValueError(f"bands: parameters must be K, got {', '.join(unknown)}")
        return Bands(str(name), (("K", data.get("K")),))


def _mirror(column: torch.Tensor) -> torch.Tensor:
    """(K, H) with row v replaced by row -v mod H."""
    return torch.roll(column.flip(1), 1, dims=1)


_built: dict[tuple[Bands, int, int, torch.device, torch.dtype], Filters] = {}
"""Filters by definition, size, device and dtype. Never dropped: a captured CUDA graph keeps no reference to them."""


def _filters(bands: Bands, height: int, width: int, device: torch.device, dtype: torch.dtype) -> Filters:
    key = (bands, height, width, device, dtype)
    found = _built.get(key)
    if found is None:
        # Plain tensors, whatever mode the first caller is in: inference, fake tensors under tracing, a default device.
        with torch.inference_mode(False), _disable_current_modes(), torch.device("cpu"):
            found = _built.setdefault(key, _build(bands, height, width).to(device, dtype))
    return found


def _build(bands: Bands, height: int, width: int) -> Filters:
    for name, size in (("height", height), ("width", width)):
        if not 1 <= size <= MAX_SIDE:
            raise ValueError(f"bands: {name} must be from 1 to {MAX_SIDE}, got {size}")
    if bands.name == "custom":
        table = bands.masks
        assert table is not None
        if tuple(table.shape[1:]) != (height, width // 2 + 1):
            raise ValueError(
                f"bands: latents must be of the masks' size (H, W//2+1) = {tuple(table.shape[1:])}, "
                f"got height {height} and width {width}"
            )
        if width % 2 == 0 and not torch.allclose(table[:, :, -1], _mirror(table[:, :, -1]), rtol=1e-6, atol=0):
            raise ValueError("bands: masks must be symmetric under w -> -w, got an asymmetric last column")
        return Filters(table)
    return DEFINITIONS[bands.name](dict(bands.params), height, width)

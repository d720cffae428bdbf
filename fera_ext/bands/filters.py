"""The two forms a band definition takes for a given latent size."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Filters:
    """The filters of a :class:`~fera_ext.bands.Bands` at one latent size, ready for the kernels.

    Attributes:
        table: spectral form: squared transfers ``(K, H, W//2+1)``; separable form: left matrices
            ``(J, H, H)``.
        right: separable form only: right matrices ``(J, W, W)``, else None.
        mix: separable form only: ``(K, J)``, band k is ``sum_j mix[k, j] * (L_j z R_j^T)``, else None.
        reach: separable form only: per blur j, the largest ``|i - i'|`` with a non-zero entry in either
            matrix; the kernels skip everything beyond it. Empty in the spectral form.
    """

    table: torch.Tensor
    right: torch.Tensor | None = None
    mix: torch.Tensor | None = None
    reach: tuple[int, ...] = ()

    @property
    def spectral(self) -> bool:
        """Whether the filters act on the spectrum (True) or as per-axis matrices (False)."""
        return self.right is None

    def to(self, device: torch.device, dtype: torch.dtype) -> Filters:
        """The same filters on another device and in another dtype."""
        move = [None if t is None else t.to(device, dtype) for t in (self.right, self.mix)]
        return Filters(self.table.to(device, dtype), move[0], move[1], self.reach)

"""fecl_loss: the frequency-energy consistency loss (paper, section 3; DESIGN of the loss in csrc/fecl)."""

from __future__ import annotations

import torch
from torch import Tensor

from fera_ext.bands import Bands
from fera_ext.ops._common import compute_dtype, filter_args

_ops = torch.ops.fera_ext


def fecl_loss(base: Tensor, fera: Tensor, target: Tensor, bands: Bands, eps: float = 1e-8) -> Tensor:
    """Keeps the correction's band energies where the residual's are.

    With d = fera - base and r = fera - target, per sample,
    ``L = mean_n sum_k w_k (|d_k|/(|d|+eps) - |r_k|/(|r|+eps))^2``, ``w_k = |r_k|^2 / (sum_j |r_j|^2 + eps)``;
    |d| and |r| are the norms of the whole tensors. The gradient flows through w too.

    Args:
        base: (N, ..., H, W) the model's prediction with its experts off, without gradient.
        fera: the same shape and dtype, the prediction with experts on; the only one that gets a gradient.
        target: the same shape and dtype, without gradient.
        bands: the band definition.
        eps: in the predictions' units.

    Returns:
        A scalar, float32 (float64 for float64), not weighted. Where ``fera`` asks for a gradient, it is computed
        here and backward only scales it. Kept for backward is that gradient alone: one latent in float32
        (float64 for float64) and N float64 numbers, none of the inputs.

    Raises:
        ValueError: unequal shapes or dtypes, a wrong size, or a gradient asked for base or target.
    """
    for name, tensor in (("base", base), ("target", target)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"fecl_loss: {name} must be without gradient, got requires_grad=True")
        if tensor.shape != fera.shape:
            raise ValueError(
                f"fecl_loss: {name} must be of fera's shape {tuple(fera.shape)}, got {tuple(tensor.shape)}"
            )
    gradient = torch.is_grad_enabled() and fera.requires_grad
    return _ops.fecl_loss(base, fera, target, *filter_args("fecl_loss", bands, fera), eps, gradient)[0]


@torch.library.register_fake("fera_ext::fecl_loss")
def _(
    base: Tensor,
    fera: Tensor,
    target: Tensor,
    table: Tensor,
    right: Tensor | None,
    mix: Tensor | None,
    reach: list[int],
    eps: float,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(fera.dtype)
    return (
        fera.new_empty((), dtype=dtype),
        fera.new_empty(fera.shape if gradient else (0,), dtype=dtype),
        fera.new_empty((fera.shape[0] if gradient else 0,), dtype=torch.float64),
    )


@torch.library.register_fake("fera_ext::fecl_loss_backward")
def _(grad: Tensor, gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)

"""fecl_loss: the frequency-energy consistency loss (paper, section 3; DESIGN of the loss in csrc/fecl)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fera_ext.bands import Bands
from fera_ext.ops._common import FILTER_COUNT, compute_dtype, filter_args, no_grads

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
        A scalar, float32 (float64 for float64), not weighted. Kept for backward are the three inputs and
        (N, 2, K+1) float64 numbers.

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
    return _ops.fecl_loss(base, fera, target, *filter_args("fecl_loss", bands, fera), eps)[0]


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
) -> tuple[Tensor, Tensor]:
    bands = table.shape[0] if mix is None else mix.shape[0]
    return (
        fera.new_empty((), dtype=compute_dtype(fera.dtype)),
        fera.new_empty((fera.shape[0], 2, bands + 1), dtype=torch.float64),
    )


@torch.library.register_fake("fera_ext::fecl_loss_backward")
def _(grad: Tensor, coefficients: Tensor, base: Tensor, fera: Tensor, target: Tensor, *filters: Any) -> Tensor:
    return fera.new_empty(fera.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    base, fera, target, table, right, mix, reach, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], base, fera, target, table, right, mix)
    ctx.reach = reach


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    if needs[0] or needs[2]:
        raise ValueError("fecl_loss: base and target must be without gradient, got requires_grad=True")
    dfera = None
    if needs[1]:
        dfera = _ops.fecl_loss_backward(grad, *ctx.saved_tensors, ctx.reach)
    return (None, dfera, None, *no_grads(FILTER_COUNT + 1))


torch.library.register_autograd("fera_ext::fecl_loss", _backward, setup_context=_save)

"""expert_linear_group: gated multi-expert linears of one input (q, k and v of a self-attention)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fera_ext._extension import C

_ops = torch.ops.fera_ext


def expert_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gate: Tensor,
    scale: float,
) -> list[Tensor]:
    """``y_i = x W_i^T + bias_i + sum_m gate[n, m] * scale * B_im (A_im x)``: :func:`expert_linear` for up to four
    linears that are given the same input (paper, section 3; LoRA of fused q, k, v as in Hu et al. 2021).

    Args:
        x: (N, ..., in) float32, float16, bfloat16 or float64, any strides.
        weights: from one to four, each (out_i, in), x's dtype (under autocast all are cast to the autocast dtype).
        biases: one a weight, (out_i,) x's dtype or None.
        lora_as: one a weight, (E, r_i, in) any of the dtypes; equal E, E*r_i from 1 to 512.
        lora_bs: one a weight, (out_i, E, r_i), likewise.
        gate: (G, E), or (members, G, E), a gate for each; N is a multiple of G and row n uses gate row ``n * G // N``.
        scale: alpha / r.

    Returns:
        One (N, ..., out_i) a weight, as :func:`expert_linear` gives it. In backward x gets one gradient, the sum over
        the members, and so does a gate for all; a member whose output is not used costs nothing. Kept for backward are
        x, once, and every h_i = A_i x, (N, ..., E*r_i). One backward pass frees what is kept for all members.

    Raises:
        ValueError: a wrong number of members, shape, size, dtype or device; a member's argument is named with its
            index, ``lora_a[1]``.
    """
    given = (x, weights, biases, lora_as, lora_bs, gate, scale)
    # The same call without what torch.ops adds to each; None where that is wanted.
    ys = None if is_compiling() else C.expert_linear_group(*given)
    return _ops.expert_linear_group(*given)[0] if ys is None else ys


@torch.library.register_fake("fera_ext::expert_linear_group")
def _(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    gate: Tensor,
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    for i, weight in enumerate(weights):
        # The compiled kernel checks too; here the sentence comes before a graph is built on a wrong dtype.
        if weight.dtype != x.dtype:
            raise ValueError(f"expert_linear_group: weight[{i}] must be of x's dtype {x.dtype}, got {weight.dtype}")
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    hs = [x.new_empty((*x.shape[:-1], a.shape[0] * a.shape[1])) for a in lora_a]
    return ys, hs


@torch.library.register_fake("fera_ext::expert_linear_group_backward")
def _(
    dys: list[Tensor],
    x: Tensor,
    hs: list[Tensor],
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    gate: Tensor,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    grads = [t.new_empty(t.shape if want else (0,)) for t, want in zip((x, gate, *lora_a, *lora_b), wanted)]
    members = len(weights)
    return grads[0], grads[1], grads[2 : 2 + members], grads[2 + members :]

"""expert_linear and expert_update: the gated multi-expert low-rank linear (paper, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fera_ext.ops._common import no_grads, without_gradient

_ops = torch.ops.fera_ext


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    scale: float,
) -> Tensor:
    """``y = x W^T + bias + sum_m gate[n, m] * scale * B_m (A_m x)``.

    Args:
        x: (N, ..., in) float32, float16, bfloat16 or float64, any strides.
        weight: (out, in), x's dtype (under autocast both are cast to the autocast dtype).
        bias: (out,) x's dtype, or None.
        lora_a: (E, r, in) any of the dtypes; rounded to x's dtype in the product. R = E*r from 1 to 512.
        lora_b: (out, E, r), likewise.
        gate: (G, E); N is a multiple of G and row n uses gate row ``n * G // N`` (video: frames of a sample).
        scale: alpha / r.

    Returns:
        (N, ..., out) in x's dtype, accumulated in float32 (float64 for float64). Gradients reach every
        tensor that asks, each in its own dtype; kept for backward are x and h = A x, (N, ..., R).

    Raises:
        ValueError: a wrong shape, size, dtype or device.
    """
    return _ops.expert_linear(x, weight, bias, lora_a, lora_b, gate, scale)[0]


def expert_update(base_out: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, scale: float) -> Tensor:
    """``y = base_out + sum_m gate[n, m] * scale * B_m (A_m x)``, for any base layer: quantised, sharded, convolved.

    Args:
        base_out: (N, ..., out) the base layer's output, x's dtype.
        x: (N, ..., in) the input of the low-rank part.
        lora_a: (E, r, in)
        lora_b: (out, E, r)
        gate: (G, E); N is a multiple of G and row n uses gate row ``n * G // N``.
        scale: alpha / r.

    Returns:
        (N, ..., out) in x's dtype; see :func:`expert_linear`.

    Raises:
        ValueError: a wrong shape, size, dtype or device.
    """
    return _ops.expert_update(base_out, x, lora_a, lora_b, gate, scale)[0]


def _hidden(x: Tensor, lora_a: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], lora_a.shape[0] * lora_a.shape[1]))


def _fake_dtype(x: Tensor, weight: Tensor) -> None:
    # The compiled kernel checks too; here the sentence comes before a graph is built on a wrong dtype.
    if weight.dtype != x.dtype:
        raise ValueError(f"expert_linear: weight must be of x's dtype {x.dtype}, got {weight.dtype}")


@torch.library.register_fake("fera_ext::expert_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _fake_dtype(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _hidden(x, lora_a)


@torch.library.register_fake("fera_ext::expert_update")
def _(base_out: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return base_out.new_empty(base_out.shape), _hidden(x, lora_a)


@torch.library.register_fake("fera_ext::expert_linear_backward")
def _(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    scale: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if want else (0,)) for t, want in zip((x, lora_a, lora_b, gate), wanted))


def _backward(
    saved: tuple[Tensor, ...], dy: Tensor, weight: Tensor | None, scale: float, wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, lora_a, lora_b and gate; None where not wanted."""
    if not any(wanted):
        return [None] * 4
    x, h, lora_a, lora_b, gate = saved
    grads = _ops.expert_linear_backward(dy, x, h, weight, lora_a, lora_b, gate, scale, wanted)
    return [g if want else None for g, want in zip(grads, wanted)]


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, gate, ctx.scale = inputs
    h = output[1]
    without_gradient(ctx, h)
    ctx.save_for_backward(x, h, lora_a, lora_b, gate, weight)


def _linear_backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    if dy is None:
        return tuple(no_grads(7))
    # Read once: under checkpointing each read of saved_tensors asks for the recomputation.
    *saved, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx, da, db, dgate = _backward(tuple(saved), dy, weight, ctx.scale, [needs[0], *needs[3:6]])
    # The base is frozen in FeRA; a trainer that unfreezes it still gets its gradients.
    rows = dy.flatten(0, -2)
    dweight = rows.T @ saved[0].flatten(0, -2) if needs[1] else None
    dbias = rows.sum(0) if needs[2] else None
    return dx, dweight, dbias, da, db, dgate, None


def _save_update(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, lora_a, lora_b, gate, ctx.scale = inputs
    without_gradient(ctx, output[1])
    ctx.save_for_backward(x, output[1], lora_a, lora_b, gate)


def _update_backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
    if dy is None:
        return tuple(no_grads(6))
    needs = ctx.needs_input_grad
    grads = _backward(ctx.saved_tensors, dy, None, ctx.scale, list(needs[1:5]))
    return (dy if needs[0] else None, *grads, *no_grads(1))


torch.library.register_autograd("fera_ext::expert_linear", _linear_backward, setup_context=_save_linear)
torch.library.register_autograd("fera_ext::expert_update", _update_backward, setup_context=_save_update)

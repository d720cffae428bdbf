"""expert_linear and expert_update: the gated multi-expert low-rank linear (paper, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fera_ext._extension import C

_ops = torch.ops.fera_ext


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
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
        dropout: the share p of the experts' input that is dropped, in [0, 1): they see x keep / (1 - p), the frozen
            linear sees x. Whether an element is kept is a function of ``seed``, ``stream``, its row in the flattened
            (T, in) and its column alone (Philox4x32-10, the same numbers on every device), made where x is read:
            nothing of the mask is stored, and backward finds the forward's. p counts in steps of 2^-16.
        seed: one int64 on x's device, needed with dropout. The kernels read it, so that a CUDA graph replays with
            another mask once the tensor holds another number; it must hold the same one until backward.
        stream: from 0 to 2^32 - 1; calls of one seed drop differently where their streams differ.

    Returns:
        (N, ..., out) in x's dtype, accumulated in float32 (float64 for float64). Gradients reach every
        tensor that asks, each in its own dtype; kept for backward are x, h = A x, (N, ..., R), and the seed.

    Raises:
        ValueError: a wrong shape, size, dtype or device.
    """
    given = (x, weight, bias, lora_a, lora_b, gate, scale, dropout, seed, stream)
    # The same call without what torch.ops adds to each; None where that is wanted.
    y = None if is_compiling() else C.expert_linear(*given)
    return _ops.expert_linear(*given)[0] if y is None else y


def expert_update(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """``y = base_out + sum_m gate[n, m] * scale * B_m (A_m x)``, for any base layer: quantised, sharded, convolved.

    Args:
        base_out: (N, ..., out) the base layer's output, x's dtype.
        x: (N, ..., in) the input of the low-rank part.
        lora_a: (E, r, in)
        lora_b: (out, E, r)
        gate: (G, E); N is a multiple of G and row n uses gate row ``n * G // N``.
        scale: alpha / r.
        dropout: the share of x that is dropped, in [0, 1), with ``seed`` and ``stream`` as in :func:`expert_linear`.
        seed: one int64 on x's device, needed with dropout.
        stream: from 0 to 2^32 - 1.

    Returns:
        (N, ..., out) in x's dtype; see :func:`expert_linear`.

    Raises:
        ValueError: a wrong shape, size, dtype or device.
    """
    return _ops.expert_update(base_out, x, lora_a, lora_b, gate, scale, dropout, seed, stream)[0]


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
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    _fake_dtype(x, weight)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _hidden(x, lora_a)


@torch.library.register_fake("fera_ext::expert_update")
def _(
    base_out: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    gate: Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
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
    dropout: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if want else (0,)) for t, want in zip((x, lora_a, lora_b, gate), wanted))

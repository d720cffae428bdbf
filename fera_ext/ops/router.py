"""router_softmax and latent_gate: from band energies, or the latent itself, to expert gates (paper, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fera_ext.bands import Bands
from fera_ext.ops._common import FILTER_COUNT, compute_dtype, filter_args, no_grads, without_gradient

_ops = torch.ops.fera_ext


def router_softmax(energy: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, tau: float) -> Tensor:
    """The soft router, ``softmax((w2 relu(w1 e + b1) + b2) / tau)``, in one launch.

    Args:
        energy: (N, K) the frequency-energy indicator; K from 1 to 16.
        w1: (hidden, K); hidden from 1 to 256.
        b1: (hidden,)
        w2: (E, hidden); E from 1 to 32.
        b2: (E,)
        tau: temperature, positive.

    Returns:
        (N, E) float32 (float64 for float64 ``energy``), rows summing to one. Gradients reach all five
        tensors, each in its own dtype.

    Raises:
        ValueError: a wrong shape, size, dtype or temperature.
    """
    return _ops.router_softmax(energy, w1, b1, w2, b2, tau)


def latent_gate(
    z: Tensor,
    bands: Bands,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    tau: float,
    eps: float = 1e-8,
) -> Tensor:
    """Latent to gate: :func:`frequency_energy`, then :func:`router_softmax`, as one operator.

    Args:
        z: (N, ..., H, W) float32, float16, bfloat16 or float64; H and W from 1 to 512, any strides.
        bands: the band definition; its K must be the columns of ``w1``.
        w1: (hidden, K)
        b1: (hidden,)
        w2: (E, hidden)
        b2: (E,)
        tau: temperature, positive.
        eps: the indicator's, in the latent's units squared.

    Returns:
        (N, E) float32 (float64 for float64 ``z``). Gradients reach the router's tensors, and ``z`` if it asks.

    Raises:
        ValueError: a wrong shape, size, dtype or temperature.
    """
    return _ops.latent_gate(z, *filter_args("latent_gate", bands, z), w1, b1, w2, b2, tau, eps)[0]


@torch.library.register_fake("fera_ext::router_softmax")
def _(energy: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, tau: float) -> Tensor:
    return energy.new_empty((energy.shape[0], w2.shape[0]), dtype=compute_dtype(energy.dtype))


@torch.library.register_fake("fera_ext::router_softmax_backward")
def _(
    grad: Tensor,
    gate: Tensor,
    energy: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    tau: float,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    rows = energy.shape[0] if wanted[0] else 0
    denergy = energy.new_empty((rows, energy.shape[1]))
    return (denergy, *(w.new_empty(w.shape if wanted[1] else (0,)) for w in (w1, b1, w2, b2)))


@torch.library.register_fake("fera_ext::latent_gate")
def _(
    z: Tensor,
    table: Tensor,
    right: Tensor | None,
    mix: Tensor | None,
    reach: list[int],
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    tau: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(z.dtype)
    return (
        z.new_empty((z.shape[0], w2.shape[0]), dtype=dtype),
        z.new_empty((z.shape[0], w1.shape[1]), dtype=dtype),
        z.new_empty((z.shape[0],), dtype=torch.float64),
    )


def _route_backward(
    ctx: Any,
    grad: Tensor,
    gate: Tensor,
    energy: Tensor,
    weights: tuple[Tensor, ...],
    energy_wanted: bool,
    weights_wanted: tuple[bool, ...],
) -> tuple[Tensor | None, list[Tensor | None]]:
    wanted = [energy_wanted, any(weights_wanted)]
    denergy, *dweights = _ops.router_softmax_backward(grad, gate, energy, *weights, ctx.tau, wanted)
    return (
        denergy if energy_wanted else None,
        [d if want else None for d, want in zip(dweights, weights_wanted)],
    )


def _save_router(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.tau = inputs
    ctx.save_for_backward(output, *tensors)


def _router_softmax_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, energy, *weights = ctx.saved_tensors
    needs = ctx.needs_input_grad
    denergy, dweights = _route_backward(ctx, grad, gate, energy, weights, needs[0], needs[1:5])
    return (denergy, *dweights, None)


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, table, right, mix, reach, *weights, tau, eps = inputs
    without_gradient(ctx, *output[1:])
    # The latent is kept only for a gradient of its own; the router's gradients need the indicator alone.
    latent = (z, table, right, mix) if ctx.needs_input_grad[0] else no_grads(FILTER_COUNT)
    ctx.save_for_backward(*output, *weights, *latent)
    ctx.tau, ctx.reach, ctx.eps = tau, reach, eps


def _latent_gate_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return tuple(no_grads(FILTER_COUNT + 7))
    gate, energy, total, *rest = ctx.saved_tensors
    weights, latent = rest[:4], rest[4:]
    needs = ctx.needs_input_grad
    first = 1 + FILTER_COUNT
    denergy, dweights = _route_backward(ctx, grad, gate, energy, weights, needs[0], needs[first : first + 4])
    dz = None
    if denergy is not None:
        dz = _ops.frequency_energy_backward(denergy, energy, total, *latent, ctx.reach, ctx.eps)
    return (dz, *no_grads(FILTER_COUNT), *dweights, None, None)


torch.library.register_autograd("fera_ext::router_softmax", _router_softmax_backward, setup_context=_save_router)
torch.library.register_autograd("fera_ext::latent_gate", _latent_gate_backward, setup_context=_save_gate)

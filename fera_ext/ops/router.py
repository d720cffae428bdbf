"""router_softmax and latent_gate: from band energies, or the latent itself, to expert gates (paper, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from fera_ext.bands import Bands
from fera_ext.ops._common import compute_dtype, filter_args

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

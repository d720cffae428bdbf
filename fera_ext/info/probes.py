"""One small run of every operator, forward and backward, against its plain PyTorch twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fera_ext.bands import Bands

LIMIT = 1e-5
"""Largest ||difference|| / ||twin|| a probe may show in float32; section 5 of the design asks 2e-6 to 1e-5."""


def probes(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[Any], Tensor], list[Tensor]]]:
    """Yields (operator, call on a module of operators, tensors whose gradients are compared).

    The numbers are float32 ones in either dtype, so that float32 operators meet a float64 twin.
    """

    def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return values.to(device, dtype)

    def leaf(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return random(*shape, seed=seed, scale=scale).requires_grad_()

    # Noise on a slope: every band holds energy, so no gradient is a difference of nearly equal numbers.
    slope = torch.linspace(-2, 2, 40).to(device, dtype)
    z = (random(2, 4, 24, 40, seed=0) + slope).float().to(dtype).requires_grad_()
    router = [leaf(64, 3, seed=1), leaf(64, seed=2), leaf(3, 64, seed=3, scale=0.125), leaf(3, seed=4)]
    energy = torch.softmax(random(2, 3, seed=5), 1).float().to(dtype).requires_grad_()
    x, a, b = leaf(2, 33, 48, seed=6), leaf(3, 4, 48, seed=7), leaf(40, 3, 4, seed=8)
    weight, bias = random(40, 48, seed=9), random(40, seed=10)
    gate = torch.softmax(random(2, 3, seed=11), 1).float().to(dtype).requires_grad_()
    base, target = (random(2, 4, 24, 40, seed=s) for s in (12, 13))
    # A smooth correction beside a rough residual: with like spectra the loss is a difference of equal numbers.
    base = (base + 3 * torch.sin(3 * slope)).float().to(dtype)
    bands = Bands.dog(3)
    yield "band_energy", lambda m: m.band_energy(z, bands), [z]
    yield "frequency_energy", lambda m: m.frequency_energy(z, bands), [z]
    yield "router_softmax", lambda m: m.router_softmax(energy, *router, 0.7), [energy, *router]
    yield "latent_gate", lambda m: m.latent_gate(z, bands, *router, 0.7), [z, *router]
    yield "expert_linear", lambda m: m.expert_linear(x, weight, bias, a, b, gate, 0.25), [x, a, b, gate]
    yield (
        "expert_linear_group",
        lambda m: torch.cat(m.expert_linear_group(x, [weight, -weight], [bias, None], [a, -a], [b, b], gate, 0.25), -1),
        [x, a, b, gate],
    )
    yield "expert_update", lambda m: m.expert_update(x[..., :40], x, a, b, gate, 0.25), [x, a, b, gate]
    yield "fecl_loss", lambda m: m.fecl_loss(base, z, target, bands), [z]


def _run(call: Callable[[Any], Tensor], module: Any, leaves: list[Tensor]) -> list[Tensor]:
    out = call(module)
    weights = torch.cos(torch.arange(out.numel(), device=out.device, dtype=out.dtype)).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def check(device: torch.device) -> list[dict[str, Any]]:
    """Runs every probe on ``device``; one row an operator: name, ok, error (relative), message."""
    from fera_ext import ops, reference

    rows = []
    twins = probes(device, torch.float64)
    for (name, call, leaves), (_, twin, twin_leaves) in zip(probes(device, torch.float32), twins):
        row: dict[str, Any] = {
            "operator": name,
            "device": str(device),
            "ok": False,
            "error": None,
            "message": "",
        }
        try:
            pairs = list(zip(_run(call, ops, leaves), _run(twin, reference, twin_leaves)))
            row["error"] = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
            row["ok"] = row["error"] <= LIMIT
            if not row["ok"]:
                row["message"] = f"differs from its twin by {row['error']:.1e}, more than {LIMIT:.0e}"
        except Exception as error:
            row["message"] = f"{type(error).__name__}: {error}"
        rows.append(row)
    return rows

"""latent_gate on the bench: latent to gates, and back to the router's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fera_ext.bench.cases import (
    EXPERTS,
    HIDDEN,
    OURS,
    TAU,
    Absent,
    Case,
    Contender,
    Options,
    differentiable,
    draw_latent,
    latent_cases,
    make_bands,
)
from fera_ext.bench.peers_cufft import cufft
from fera_ext.bench.peers_published import PublishedRouter, published
from fera_ext.bench.peers_torch import plain
from fera_ext.bench.shapes import Shape

if TYPE_CHECKING:
    from fera_ext.bench.runner import Session

EPS = 1e-8
ROUTER = [1, 2, 3, 4]


def cases(options: Options) -> Iterator[Case]:
    """The cases; the backward pass reads no latent, so it has no floor."""
    return latent_cases(options, ("forward", "backward"), {"forward": 1, "backward": None}, _build)


def router(bands: int, device: torch.device) -> list[Tensor]:
    """w1 (64, K), b1 (64,), w2 (3, 64), b2 (3,), float32."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((HIDDEN, bands), (HIDDEN,), (EXPERTS, HIDDEN), (EXPERTS,))
    return [(0.3 * torch.randn(s, generator=generator)).to(device) for s in shapes]


def route(energies: Callable[[Tensor], Tensor], z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Indicator and router in plain PyTorch; (N, E) float32."""
    energy = energies(z)
    indicator = energy / (energy.sum(1, keepdim=True) + EPS)
    return torch.softmax(F.linear(F.relu(F.linear(indicator, w1, b1)), w2, b2) / TAU, dim=-1)


def _build(session: Session, pass_name: str, shape: Shape, definition: tuple[str, int]) -> Iterator[Contender | Absent]:
    from fera_ext import ops

    bands = make_bands(definition, *shape[-2:])
    z = draw_latent(shape, session)
    arguments = [z, *router(bands.count, session.device)]

    def ours(z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return ops.latent_gate(z, bands, w1, b1, w2, b2, TAU)

    yield differentiable(OURS, ours, arguments, ROUTER, pass_name)
    yield from plain(session, "latent_gate", pass_name, bands, arguments, ROUTER, route)
    yield cufft(session, "latent_gate", pass_name, bands, arguments)
    module = PublishedRouter(bands.count, arguments[1:])
    yield published(session, pass_name, bands, module, arguments, ROUTER)

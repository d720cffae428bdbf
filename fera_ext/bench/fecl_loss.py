"""fecl_loss on the bench: the loss, and the loss with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fera_ext.bench.cases import (
    OURS,
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
from fera_ext.bench.peers_published import published, published_fecl
from fera_ext.bench.peers_torch import plain
from fera_ext.bench.shapes import Shape

if TYPE_CHECKING:
    from fera_ext.bench.runner import Session

EPS = 1e-8


def cases(options: Options) -> Iterator[Case]:
    """The cases; the forward reads three latents, the step also writes a gradient."""
    return latent_cases(options, ("step", "forward"), {"forward": 3, "step": 4}, _build)


def predictions(shape: Shape, session: Session) -> list[Tensor]:
    """base, fera, target (N, ..., H, W): a smooth correction beside a rough residual. With like spectra the
    loss would be a difference of nearly equal numbers, and no two implementations would agree."""
    base, noise, target = (draw_latent(shape, session, seed) for seed in (2, 3, 4))
    wave = torch.sin(torch.linspace(0, 6, shape[-1], device=session.device))
    return [base, (base.float() + wave + 0.1 * noise.float()).to(session.dtype), target]


def loss(energies: Callable[[Tensor], Tensor], base: Tensor, fera: Tensor, target: Tensor) -> Tensor:
    """The loss in plain PyTorch, both differences in one batch; a float32 scalar."""
    prediction = fera.float()
    both = torch.cat((prediction - base.float(), prediction - target.float()))
    energy = energies(both)
    whole = both.flatten(1).square().sum(1, keepdim=True)
    share = energy.sqrt() / (whole.sqrt() + EPS)
    share_d, share_r = share.chunk(2)
    weights = energy.chunk(2)[1]
    weights = weights / (weights.sum(1, keepdim=True) + EPS)
    return (weights * (share_d - share_r).square()).sum(1).mean()


def _build(session: Session, pass_name: str, shape: Shape, definition: tuple[str, int]) -> Iterator[Contender | Absent]:
    from fera_ext import ops

    bands = make_bands(definition, *shape[-2:])
    arguments = predictions(shape, session)

    def ours(base: Tensor, fera: Tensor, target: Tensor) -> Tensor:
        return ops.fecl_loss(base, fera, target, bands)

    yield differentiable(OURS, ours, arguments, [1], pass_name)
    yield from plain(session, "fecl_loss", pass_name, bands, arguments, [1], loss)
    yield cufft(session, "fecl_loss", pass_name, bands, arguments)

    def pattern(base: Tensor, fera: Tensor, target: Tensor) -> Tensor:
        return published_fecl(base, fera, target, bands.count)

    yield published(session, pass_name, bands, pattern, arguments, [1])

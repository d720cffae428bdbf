"""band_energy on the bench: latent to energies, and back to the latent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

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
from fera_ext.bench.peers_published import published, published_energies
from fera_ext.bench.peers_torch import plain
from fera_ext.bench.shapes import Shape

if TYPE_CHECKING:
    from fera_ext.bench.runner import Session


def cases(options: Options) -> Iterator[Case]:
    """The cases; a forward reads the latent, a backward also writes its gradient."""
    return latent_cases(options, ("forward", "backward"), {"forward": 1, "backward": 2}, _build)


def _build(session: Session, pass_name: str, shape: Shape, definition: tuple[str, int]) -> Iterator[Contender | Absent]:
    from fera_ext import ops

    bands = make_bands(definition, *shape[-2:])
    z = draw_latent(shape, session)

    def ours(z: Tensor) -> Tensor:
        return ops.band_energy(z, bands)

    yield differentiable(OURS, ours, [z], [0], pass_name)
    yield from plain(session, "band_energy", pass_name, bands, [z], [0], lambda energies, z: energies(z))
    yield cufft(session, "band_energy", pass_name, bands, [z])
    yield published(session, pass_name, bands, lambda z: published_energies(z, bands.count), [z], [0])

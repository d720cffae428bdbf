"""The published code's pattern, rewritten plainly: what a trainer that uses it pays.

Gaussian kernels are built on the CPU and moved to the device at each call, latents are blurred by depthwise
2-D convolutions with zero padding, the bands are materialised and the highest of them dropped, the router is an
nn.Sequential, and autograd does the rest. No CUDA graph can hold it. It takes 4-D latents only. 16-bit latents
are converted first: in 16 bits the pattern's energies overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fera_ext.bands import Bands
from fera_ext.bench.cases import TAU, Absent, Contender, differentiable
from fera_ext.bench.peers_torch import sigmas

if TYPE_CHECKING:
    from fera_ext.bench.runner import Session

EPS = 1e-8


def _blur(z: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of every plane; the kernel is made here, on the CPU."""
    size = int(8 * sigma + 1)
    size += 1 - size % 2
    offsets = torch.arange(size, dtype=torch.float32) - size // 2
    taps = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = taps[:, None] * taps[None, :]
    kernel = (kernel / kernel.sum()).to(z.device)
    channels = z.shape[1]
    weight = kernel[None, None].expand(channels, 1, size, size)
    return F.conv2d(z, weight, padding=size // 2, groups=channels)


def decompose(z: Tensor, count: int) -> list[Tensor]:
    """The K bands (N, C, H, W), low to high, of the K + 1 that are built."""
    blurs = [_blur(z, s) for s in sigmas(count, z.shape[-2], z.shape[-1])]
    low_to_high = [blurs[-1]]
    for j in range(count - 1, 0, -1):
        low_to_high.append(blurs[j - 1] - blurs[j])
    low_to_high.append(z - blurs[0])
    return low_to_high[:count]


def _norms(bands: list[Tensor]) -> Tensor:
    """(N, K) norms over all axes but the first."""
    return torch.stack([torch.norm(band.flatten(1), dim=1) for band in bands], dim=1)


def published_energies(z: Tensor, count: int) -> Tensor:
    """(N, C, H, W) to (N, K) float32."""
    return _norms(decompose(z.float(), count)) ** 2


class PublishedRouter:
    """Latent to gate: indicator, then a small nn.Sequential on its own parameters.

    Args:
        count: bands.
        weights: w1, b1, w2, b2, whose values the module starts from.
    """

    def __init__(self, count: int, weights: Sequence[Tensor]) -> None:
        self.count = count
        w1, _, w2, _ = weights
        self.layers = nn.Sequential(nn.Linear(count, w1.shape[0]), nn.ReLU(), nn.Linear(w1.shape[0], w2.shape[0]))
        self.layers.to(w1.device)
        self.names = [name for name, _ in self.layers.named_parameters()]

    def __call__(self, z: Tensor, *weights: Tensor) -> Tensor:
        """(N, C, H, W) and w1, b1, w2, b2 to (N, E)."""
        energy = published_energies(z, self.count)
        indicator = energy / (energy.sum(dim=1, keepdim=True) + EPS)
        logits = torch.func.functional_call(self.layers, dict(zip(self.names, weights)), (indicator,))
        return torch.softmax(logits / TAU, dim=-1)


def published_fecl(base: Tensor, fera: Tensor, target: Tensor, count: int) -> Tensor:
    """The consistency loss: both differences decomposed, one after the other; a float32 scalar."""
    prediction = fera.float()
    correction, residual = prediction - base.float(), prediction - target.float()
    norms_d, norms_r = (_norms(decompose(part, count)) for part in (correction, residual))
    share_d = norms_d / (torch.norm(correction.flatten(1), dim=1, keepdim=True) + EPS)
    share_r = norms_r / (torch.norm(residual.flatten(1), dim=1, keepdim=True) + EPS)
    energy = norms_r**2
    weights = energy / (energy.sum(dim=1, keepdim=True) + EPS)
    return (weights * (share_d - share_r) ** 2).sum(dim=1).mean()


def published(
    session: Session,
    pass_name: str,
    bands: Bands,
    function: Callable[..., Tensor],
    arguments: Sequence[Tensor],
    leaves: Sequence[int],
) -> Contender | Absent:
    """The contender, or why there is none."""
    if bands.name != "author":
        return Absent("published", f"the published code has no such bands ({bands.name})")
    if arguments[0].ndim != 4:
        return Absent("published", "the latent has not four axes")
    return differentiable("published", function, arguments, leaves, pass_name, captures=False)

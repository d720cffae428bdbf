"""Plain PyTorch twins of every operator, used only when asked for: tests, `fera-ext info`, benchmarks.

Same names and signatures as :mod:`fera_ext.ops`, written as one would write them in PyTorch, with
PyTorch's own autograd. No operator ever falls back to these. Energies and gates are computed in float32
for 16-bit latents, as the operators do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fera_ext.bands import Bands, Filters


def _accumulation(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _energies(z: Tensor, filters: Filters) -> Tensor:
    """(N, P, H, W) and filters of its size to (N, K)."""
    height, width = z.shape[-2:]
    if filters.right is None:
        # The half spectrum stands for the full one: inner columns count twice.
        twice = torch.full((width // 2 + 1,), 2.0, dtype=z.dtype, device=z.device)
        twice[0] = 1.0
        if width % 2 == 0:
            twice[-1] = 1.0
        spectrum = torch.fft.rfft2(z)
        power = (spectrum.real.square() + spectrum.imag.square()).sum(1) * twice
        return power.flatten(1) @ filters.table.flatten(1).T / (height * width)
    assert filters.mix is not None
    blurs = filters.table[:, None, None] @ z @ filters.right[:, None, None].transpose(-1, -2)
    bands = (filters.mix @ blurs.flatten(1)).view(-1, *z.shape)
    return bands.square().sum((2, 3, 4)).T


def band_energy(z: Tensor, bands: Bands) -> Tensor:
    """Twin of :func:`fera_ext.ops.band_energy`."""
    planes = _accumulation(z).reshape(z.shape[0], -1, *z.shape[-2:])
    return _energies(planes, bands.filters(z.shape[-2], z.shape[-1], planes.device, planes.dtype))


def frequency_energy(z: Tensor, bands: Bands, eps: float = 1e-8) -> Tensor:
    """Twin of :func:`fera_ext.ops.frequency_energy`."""
    energy = band_energy(z, bands)
    return energy / (energy.sum(1, keepdim=True) + eps)


def router_softmax(energy: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, tau: float) -> Tensor:
    """Twin of :func:`fera_ext.ops.router_softmax`."""
    energy = _accumulation(energy)
    w1, b1, w2, b2 = (t.to(energy.dtype) for t in (w1, b1, w2, b2))
    hidden = F.relu(F.linear(energy, w1, b1))
    return torch.softmax(F.linear(hidden, w2, b2) / tau, dim=-1)


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
    """Twin of :func:`fera_ext.ops.latent_gate`."""
    return router_softmax(frequency_energy(z, bands, eps), w1, b1, w2, b2, tau)


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 in int64 tensors of 32-bit numbers: four of the counter and two of the key to four."""
    low = 0xFFFFFFFF
    for _ in range(10):
        # Products wrap in int64; their upper halves are right once the sign is masked away.
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(b >> 32 & low) ^ counter[1] ^ key[0], b & low, (a >> 32 & low) ^ counter[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return counter


def dropout_keeps(rows: int, columns: int, dropout: float, seed: Tensor, stream: int = 0) -> Tensor:
    """(rows, columns) bool on the seed's device: which elements of the experts' input dropout keeps."""
    groups = torch.arange((columns + 7) // 8, device=seed.device).expand(rows, -1)
    row = torch.arange(rows, device=seed.device)[:, None].expand_as(groups)
    key = [seed.reshape(1, 1) & 0xFFFFFFFF, seed.reshape(1, 1) >> 32 & 0xFFFFFFFF]
    words = _philox([groups, row, torch.full_like(groups, stream), torch.zeros_like(groups)], key)
    numbers = torch.stack([part for word in words for part in (word & 0xFFFF, word >> 16)], -1)
    return numbers.flatten(1)[:, :columns] >= min(65535, round(dropout * 65536))


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
    """Twin of :func:`fera_ext.ops.expert_update`, in the stacked form: one rank E·r LoRA, its middle gated."""
    if dropout:
        assert seed is not None
        keeps = dropout_keeps(x.shape[:-1].numel(), x.shape[-1], dropout, seed, stream).view(x.shape)
        x = torch.where(keeps, x / (1 - dropout), 0)
    experts, rank, _ = lora_a.shape
    a = lora_a.to(x.dtype).flatten(0, 1)
    b = lora_b.to(x.dtype).flatten(1, 2)
    rows = gate.repeat_interleave(x.shape[0] // gate.shape[0], 0) if x.shape[0] else gate[:0]
    factor = (rows * scale).to(x.dtype).repeat_interleave(rank, 1)
    hidden = F.linear(x, a)
    hidden = hidden * factor.view(x.shape[0], *[1] * (x.ndim - 2), experts * rank)
    return base_out + F.linear(hidden, b)


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
    """Twin of :func:`fera_ext.ops.expert_linear`."""
    return expert_update(F.linear(x, weight, bias), x, lora_a, lora_b, gate, scale, dropout, seed, stream)


def expert_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    gate: Tensor,
    scale: float,
) -> list[Tensor]:
    """Twin of :func:`fera_ext.ops.expert_linear_group`: the members one by one."""
    gates = gate.unbind(0) if gate.dim() == 3 else [gate] * len(weights)
    members = zip(weights, biases, lora_as, lora_bs, gates)
    return [expert_linear(x, weight, bias, a, b, own, scale) for weight, bias, a, b, own in members]


def fecl_loss(base: Tensor, fera: Tensor, target: Tensor, bands: Bands, eps: float = 1e-8) -> Tensor:
    """Twin of :func:`fera_ext.ops.fecl_loss`."""
    correction = _accumulation(fera) - _accumulation(base).detach()
    residual = _accumulation(fera) - _accumulation(target).detach()
    norms = []
    for part in (correction, residual):
        whole = _root(part.flatten(1).square().sum(1, keepdim=True))
        norms.append((_root(band_energy(part, bands)), whole))
    (band_d, whole_d), (band_r, whole_r) = norms
    weights = band_r.square()
    weights = weights / (weights.sum(1, keepdim=True) + eps)
    gap = band_d / (whole_d + eps) - band_r / (whole_r + eps)
    return (weights * gap.square()).sum(1).mean()


def _root(energy: Tensor) -> Tensor:
    """Square root with a zero gradient at zero."""
    positive = energy > 0
    return torch.where(positive, torch.where(positive, energy, torch.ones_like(energy)).sqrt(), energy)

"""One set of sample inputs an operator: it feeds the correctness, gradient, opcheck, compile and graph tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fera_ext.bands import Bands

BANDS = [Bands.dog(3), Bands.rings(4), Bands.author(3)]


@dataclass
class Sample:
    """A call of one operator: its arguments by name, and which of them take gradients."""

    op: str
    arguments: dict[str, Any]
    leaves: tuple[str, ...]
    note: str = ""
    call: Callable[..., Tensor] = field(default=lambda module, op, arguments: getattr(module, op)(**arguments))

    def __str__(self) -> str:
        return f"{self.op}-{self.note}"

    def run(self, module: Any) -> Tensor:
        """The operator of ``module`` (fera_ext.ops or fera_ext.reference) on these arguments."""
        return self.call(module, self.op, self.arguments)

    def cast(self, dtype: torch.dtype, device: torch.device, master: torch.dtype | None = None) -> Sample:
        """Fresh leaves in ``dtype`` (adapter and router tensors in ``master``) on ``device``."""
        arguments = {}
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                kind = master if master is not None and name in MASTERS else dtype
                if name == "gate":
                    kind = torch.float64 if dtype == torch.float64 else torch.float32
                kind = kind if value.is_floating_point() else value.dtype
                value = value.to(device, kind).detach().requires_grad_(name in self.leaves)
            arguments[name] = value
        return Sample(self.op, arguments, self.leaves, self.note, self.call)

    def upstream(self, out: Tensor) -> Tensor:
        """A fixed random gradient of ``out``; scaled as a loss scaler would where a latent's is tiny."""
        scale = 2.0**12 if self.op in ("latent_gate", "fecl_loss") else 1.0
        return scale * torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)

    def gradients(self, module: Any, upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The output and the gradients of the leaves for a fixed upstream gradient."""
        out = self.run(module)
        upstream = self.upstream(out) if upstream is None else upstream
        grads = torch.autograd.grad(out, [self.arguments[n] for n in self.leaves], upstream.to(out))
        return out.detach(), list(grads)


GROUP = 3
MASTERS = ("lora_a", "lora_b", "w1", "b1", "w2", "b2", *(f"lora_{k}{i}" for k in "ab" for i in range(GROUP)))


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latent(*shape: int, seed: int = 0) -> Tensor:
    """Noise over a smooth slope, so that every band holds energy; float64."""
    slope = torch.linspace(-1, 1, shape[-1], dtype=torch.float64)
    return _randn(seed, *shape) + 2 * slope


def predictions(*shape: int) -> dict[str, Tensor]:
    """base, fera and target whose correction is smooth and whose residual is not: a well-conditioned loss."""
    base = latent(*shape, seed=20)
    wave = torch.sin(torch.linspace(0, 6, shape[-1], dtype=torch.float64)) * (1 + _randn(21, *shape[:-2], 1, 1))
    return {"base": base, "fera": base + wave + 0.1 * _randn(22, *shape), "target": latent(*shape, seed=23)}


def router_weights(bands: int, experts: int, hidden: int = 64) -> dict[str, Tensor]:
    """Random router tensors, float64."""
    return {
        "w1": _randn(1, hidden, bands),
        "b1": _randn(2, hidden) * 0.1,
        "w2": _randn(3, experts, hidden) * 0.3,
        "b2": _randn(4, experts) * 0.1,
    }


def linear_sample(
    x_shape: tuple[int, ...], out: int, experts: int, rank: int, groups: int, bias: bool = True
) -> dict[str, Any]:
    """Arguments of expert_linear, float64."""
    size = x_shape[-1]
    return {
        "x": _randn(10, *x_shape),
        "weight": _randn(11, out, size) / size**0.5,
        "bias": _randn(12, out) if bias else None,
        "lora_a": _randn(13, experts, rank, size) / size**0.5,
        "lora_b": _randn(14, out, experts, rank) / rank**0.5,
        "gate": torch.softmax(_randn(15, groups, experts), 1),
        "scale": 0.5,
    }


LINEAR_LEAVES = ("x", "lora_a", "lora_b", "gate")
GROUP_LEAVES = ("x", "gate", *(f"lora_{k}{i}" for k in "ab" for i in range(GROUP)))
ROUTER_LEAVES = ("w1", "b1", "w2", "b2")


def _update(arguments: dict[str, Any], out: int) -> dict[str, Any]:
    shape = (*arguments["x"].shape[:-1], out)
    kept = {k: v for k, v in arguments.items() if k not in ("weight", "bias")}
    return {"base_out": _randn(16, *shape), **kept}


def group_sample(
    x_shape: tuple[int, ...], outs: tuple[int, ...], experts: int, ranks: tuple[int, ...], groups: int
) -> dict[str, Any]:
    """Arguments of expert_linear_group, float64, the members' each by a name of its own; the second has no bias."""
    found: dict[str, Any] = {}
    for i, (out, rank) in enumerate(zip(outs, ranks)):
        member = linear_sample(x_shape, out, experts, rank, groups, bias=i != 1)
        for name in ("weight", "bias", "lora_a", "lora_b"):
            value = member.pop(name)
            found[f"{name}{i}"] = value if value is None else value * (-0.9) ** i
        found.update(member)
    return found


def call_group(module: Any, op: str, arguments: dict[str, Any]) -> Tensor:
    """All outputs side by side, (N, ..., sum of out)."""
    members = sum(name.startswith("weight") for name in arguments)
    lists = ([arguments[f"{name}{i}"] for i in range(members)] for name in ("weight", "bias", "lora_a", "lora_b"))
    return torch.cat(getattr(module, op)(arguments["x"], *lists, arguments["gate"], arguments["scale"]), -1)


def samples(small: bool = False) -> list[Sample]:
    """All operators in float64 on the CPU; ``small`` keeps gradcheck quick."""
    size = (2, 3, 6, 5) if small else (2, 4, 24, 40)
    odd = (3, 1, 2, 7, 4) if small else (2, 3, 2, 33, 47)
    tokens, wide, out = (3, 5, 4) if small else (17, 48, 40)
    found = []
    for bands in BANDS:
        z, five = latent(*size), latent(*odd)
        found.append(Sample("band_energy", {"z": z, "bands": bands}, ("z",), bands.name))
        found.append(Sample("frequency_energy", {"z": five, "bands": bands}, ("z",), f"{bands.name}-5d"))
        router = {**router_weights(bands.count, 3, 8 if small else 64), "tau": 0.7}
        arguments = {"z": z, "bands": bands, **router}
        found.append(Sample("latent_gate", arguments, ("z", *ROUTER_LEAVES), bands.name))
        found.append(Sample("fecl_loss", {**predictions(*size), "bands": bands}, ("fera",), bands.name))
    energy = torch.softmax(_randn(5, 5, 3), 1)
    router = {"energy": energy, **router_weights(3, 4, 8 if small else 64), "tau": 0.7}
    found.append(Sample("router_softmax", router, ("energy", *ROUTER_LEAVES), "e4"))
    for note, shape, experts, rank, groups in (
        ("r12", (2, tokens, wide), 3, 4, 2),
        ("r15-video", (6, tokens, wide), 5, 3, 2),
        ("r1", (4, wide), 1, 1, 1),
    ):
        arguments = linear_sample(shape, out, experts, rank, groups, bias=note != "r1")
        found.append(Sample("expert_linear", arguments, LINEAR_LEAVES, note))
        found.append(Sample("expert_update", _update(arguments, out), ("base_out", *LINEAR_LEAVES), note))
    # A width that eight does not divide, a seed that needs both halves of the key, and a stream of those whose gate
    # gradient does not cancel: what is left of a sum that does is the rounding of 16-bit terms.
    dropped = {"dropout": 0.3, "seed": torch.tensor([2**40 + 12345]), "stream": 2}
    arguments = {**linear_sample((4, tokens, wide - 3), out, 3, 4, 2), **dropped}
    found.append(Sample("expert_linear", arguments, LINEAR_LEAVES, "dropout"))
    found.append(Sample("expert_update", _update(arguments, out), ("base_out", *LINEAR_LEAVES), "dropout"))
    for note, shape, experts, ranks, groups in (
        ("r12", (2, tokens, wide), 3, (4, 4, 4), 2),
        ("ranks-video", (6, tokens, wide), 5, (3, 4, 3), 3),
    ):
        arguments = group_sample(shape, (out, out + 3, out), experts, ranks, groups)
        found.append(Sample("expert_linear_group", arguments, GROUP_LEAVES, note, call_group))
    return found

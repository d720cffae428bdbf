"""Every refusal reads `<op>: <argument> must be <rule>, got <value>`."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from fera_ext import ops
from fera_ext.bands import Bands

DOG = Bands.dog(3)


def _router(bands: int = 3, experts: int = 3, hidden: int = 8) -> list[torch.Tensor]:
    shapes = (hidden, bands), (hidden,), (experts, hidden), (experts,)
    return [torch.randn(*s) for s in shapes]


def _linear(**changes) -> torch.Tensor:
    arguments = {
        "x": torch.randn(2, 5, 8),
        "weight": torch.randn(6, 8),
        "bias": torch.randn(6),
        "lora_a": torch.randn(3, 4, 8),
        "lora_b": torch.randn(6, 3, 4),
        "gate": torch.rand(2, 3),
        "scale": 1.0,
    }
    return ops.expert_linear(**{**arguments, **changes})


def _group(members: int = 2, **changes) -> list[torch.Tensor]:
    arguments = {
        "x": torch.randn(2, 5, 8),
        "weights": [torch.randn(6, 8)] * members,
        "biases": [torch.randn(6), *[None] * (members - 1)],
        "lora_as": [torch.randn(3, 4, 8)] * members,
        "lora_bs": [torch.randn(6, 3, 4)] * members,
        "gate": torch.rand(2, 3),
        "scale": 1.0,
    }
    return ops.expert_linear_group(**{**arguments, **changes})


def _fecl(**changes) -> torch.Tensor:
    z = torch.randn(2, 4, 8, 8)
    return ops.fecl_loss(**{"base": z, "fera": z, "target": z, "bands": DOG, **changes})


def _fecl_operator(asks: int, gradient: bool) -> torch.Tensor:
    """The operator itself, below the documented function's checks; ``asks``: which of its latents asks too."""
    z = [torch.randn(2, 4, 8, 8) for _ in range(3)]
    f = DOG.filters(8, 8, z[0].device, z[0].dtype)
    for i in (1, asks):
        z[i].requires_grad_()
    return torch.ops.fera_ext.fecl_loss(*z, f.table, f.right, f.mix, list(f.reach), 1e-8, gradient)[0]


CASES: list[tuple[str, Callable[[], object]]] = [
    ("band_energy: z must be (N, ..., H, W), got (8, 8)", lambda: ops.band_energy(torch.randn(8, 8), DOG)),
    (
        "band_energy: bands must be a fera_ext.Bands, got str",
        lambda: ops.band_energy(torch.randn(1, 1, 8, 8), "dog"),
    ),
    (
        "band_energy: z must be float32, float16, bfloat16 or float64, got Long",
        lambda: ops.band_energy(torch.zeros(1, 1, 8, 8, dtype=torch.long), DOG),
    ),
    ("bands: width must be from 1 to 512, got 513", lambda: ops.band_energy(torch.randn(1, 1, 2, 513), DOG)),
    ("bands: height must be from 1 to 512, got 0", lambda: ops.band_energy(torch.randn(1, 1, 0, 8), DOG)),
    (
        "frequency_energy: eps must be finite and not negative, got -1",
        lambda: ops.frequency_energy(torch.randn(1, 1, 8, 8), DOG, eps=-1.0),
    ),
    (
        "router_softmax: tau must be positive and finite, got 0",
        lambda: ops.router_softmax(torch.rand(2, 3), *_router(), tau=0.0),
    ),
    (
        "router_softmax: hidden must be from 1 to 256, got 300",
        lambda: ops.router_softmax(torch.rand(2, 3), *_router(hidden=300), tau=1.0),
    ),
    (
        "router_softmax: experts must be from 1 to 32, got 33",
        lambda: ops.router_softmax(torch.rand(2, 3), *_router(experts=33), tau=1.0),
    ),
    (
        "router_softmax: energy must be (N, K) with K the columns of w1 [8, 3], got [2, 4]",
        lambda: ops.router_softmax(torch.rand(2, 4), *_router(), tau=1.0),
    ),
    (
        "router_softmax: b1 must be (8), got [7]",
        lambda: ops.router_softmax(torch.rand(2, 3), _router()[0], torch.rand(7), *_router()[2:], tau=1.0),
    ),
    (
        "latent_gate: w1 columns must be the number of bands 3, got 4",
        lambda: ops.latent_gate(torch.randn(1, 4, 8, 8), DOG, *_router(bands=4), tau=1.0),
    ),
    ("expert_linear: x must be (N, ..., in), got [8]", lambda: _linear(x=torch.randn(8))),
    (
        "expert_linear: x must be float32, float16, bfloat16 or float64, got Int",
        lambda: _linear(x=torch.zeros(2, 5, 8, dtype=torch.int)),
    ),
    (
        "expert_linear: weight must be of x's dtype Float, got Half",
        lambda: _linear(weight=torch.randn(6, 8).half()),
    ),
    ("expert_linear: weight must be (out, 8), got [6, 9]", lambda: _linear(weight=torch.randn(6, 9))),
    ("expert_linear: bias must be (6), got [5]", lambda: _linear(bias=torch.randn(5))),
    ("expert_linear: lora_a must be (E, r, 8), got [3, 4, 9]", lambda: _linear(lora_a=torch.randn(3, 4, 9))),
    ("expert_linear: lora_b must be (6, 3, 4), got [6, 4, 3]", lambda: _linear(lora_b=torch.randn(6, 4, 3))),
    ("expert_linear: gate must be (G, 3), got [2, 4]", lambda: _linear(gate=torch.rand(2, 4))),
    ("expert_linear: gate rows must be a divisor of x's 2, got 3", lambda: _linear(gate=torch.rand(3, 3))),
    (
        "expert_linear: experts * rank must be from 1 to 512, got 520",
        lambda: _linear(lora_a=torch.randn(2, 260, 8), lora_b=torch.randn(6, 2, 260), gate=torch.rand(2, 2)),
    ),
    ("expert_linear: scale must be finite, got nan", lambda: _linear(scale=float("nan"))),
    (
        "expert_update: base_out must be (N, ..., out) with the leading sizes of x [2, 5, 8], got [2, 4, 6]",
        lambda: ops.expert_update(
            torch.randn(2, 4, 6),
            torch.randn(2, 5, 8),
            torch.randn(3, 4, 8),
            torch.randn(6, 3, 4),
            torch.rand(2, 3),
            1.0,
        ),
    ),
    ("expert_linear_group: weights must be from 1 to 4, got 5", lambda: _group(5)),
    ("expert_linear_group: weights must be from 1 to 4, got 0", lambda: _group(0, biases=[])),
    ("expert_linear_group: biases must be 2, one a weight, got 1", lambda: _group(biases=[None])),
    ("expert_linear_group: lora_a must be 2, one a weight, got 1", lambda: _group(lora_as=[torch.randn(3, 4, 8)])),
    (
        "expert_linear_group: lora_b must be 2, one a weight, got 3",
        lambda: _group(lora_bs=[torch.randn(6, 3, 4, requires_grad=True)] * 3),
    ),
    ("expert_linear_group: x must be (N, ..., in), got [8]", lambda: _group(x=torch.randn(8))),
    (
        "expert_linear_group: weight[1] must be (out, 8), got [6, 9]",
        lambda: _group(weights=[torch.randn(6, 8), torch.randn(6, 9)]),
    ),
    (
        "expert_linear_group: weight[1] must be of x's dtype Float, got Half",
        lambda: _group(weights=[torch.randn(6, 8), torch.randn(6, 8).half()]),
    ),
    ("expert_linear_group: bias[1] must be (6), got [5]", lambda: _group(biases=[None, torch.randn(5)])),
    (
        "expert_linear_group: gate must be (G, 2), got [2, 3]",
        lambda: _group(
            lora_as=[torch.randn(3, 4, 8), torch.randn(2, 4, 8)], lora_bs=[torch.randn(6, 3, 4), torch.randn(6, 2, 4)]
        ),
    ),
    (
        "expert_linear_group: lora_b[1] must be (6, 3, 4), got [6, 4, 3]",
        lambda: _group(lora_bs=[torch.randn(6, 3, 4), torch.randn(6, 4, 3)]),
    ),
    ("expert_linear_group: gate rows must be a divisor of x's 2, got 3", lambda: _group(gate=torch.rand(3, 3))),
    (
        "fecl_loss: base must be of fera's shape (2, 4, 8, 8), got (2, 4, 8, 4)",
        lambda: _fecl(base=torch.randn(2, 4, 8, 4)),
    ),
    (
        "fecl_loss: target must be of fera's dtype Float, got Double",
        lambda: _fecl(target=torch.randn(2, 4, 8, 8).double()),
    ),
    (
        "fecl_loss: base must be without gradient, got requires_grad=True",
        lambda: _fecl(base=torch.randn(2, 4, 8, 8, requires_grad=True)),
    ),
    (
        "fecl_loss: target must be without gradient, got requires_grad=True",
        lambda: _fecl(target=torch.randn(2, 4, 8, 8, requires_grad=True)),
    ),
    ("bands: K must be an integer from 2 to 16, got 1", lambda: Bands.dog(1)),
    ("bands: K must be an integer from 1 to 16, got 17", lambda: Bands.rings(17)),
    (
        "bands: name must be one of dog, rings, author, custom, got 'wavelet'",
        lambda: Bands.from_dict({"name": "wavelet"}),
    ),
    (
        "bands: masks must be finite and non-negative, got other values",
        lambda: Bands.custom(-torch.ones(1, 8, 5)),
    ),
    (
        "fecl_loss: gradient must be True to differentiate, got False",
        lambda: _fecl_operator(asks=1, gradient=False).backward(),
    ),
    (
        "fecl_loss: base and target must be without gradient, got requires_grad=True",
        lambda: _fecl_operator(asks=0, gradient=True).backward(),
    ),
    (
        "fecl_loss: base and target must be without gradient, got requires_grad=True",
        lambda: _fecl_operator(asks=2, gradient=True).backward(),
    ),
    (
        "fecl_loss_backward: factor must be (2) float64, got [3]",
        lambda: torch.ops.fera_ext.fecl_loss_backward(
            torch.ones(()), torch.ones(2, 4, 8, 8), torch.ones(3).double(), torch.float32
        ),
    ),
    (
        "bands: masks must be (K, H, W//2+1) with K from 1 to 16, got (8, 5)",
        lambda: Bands.custom(torch.ones(8, 5)),
    ),
    (
        "bands: latents must be of the masks' size (H, W//2+1) = (8, 5), got height 8 and width 12",
        lambda: ops.band_energy(torch.randn(1, 1, 8, 12), Bands.custom(torch.ones(1, 8, 5))),
    ),
]


@pytest.mark.parametrize("sentence,call", CASES, ids=[c[0][:60] for c in CASES])
def test_sentence(sentence: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        call()


@pytest.mark.gpu
def test_mixed_devices() -> None:
    with pytest.raises(ValueError, match=r"^expert_linear: lora_a must be on cuda:0, got cpu"):
        ops.expert_linear(
            torch.randn(2, 8, device="cuda"),
            torch.randn(6, 8, device="cuda"),
            None,
            torch.randn(3, 4, 8),
            torch.randn(6, 3, 4, device="cuda"),
            torch.rand(2, 3, device="cuda"),
            1.0,
        )

"""Inputs that once broke an operator: strides of size-1 axes, autocast around backward, modes, dominance."""

from __future__ import annotations

import pytest
import tolerances
import torch
from samples import latent, linear_sample, router_weights
from torch._subclasses import FakeTensorMode

from fera_ext import ops, reference
from fera_ext.bands import Bands


def _on(device: torch.device, arguments: dict) -> dict:
    return {k: v.float().to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("shape", [(1, 6, 16), (6, 1, 16), (1, 1, 16), (2, 1, 5, 16)], ids=str)
def test_linear_with_odd_strides_on_single_axes(shape: tuple[int, ...], device: torch.device) -> None:
    arguments = _on(device, linear_sample(shape, 12, 3, 4, 1))
    x = arguments["x"].transpose(0, 1)
    arguments["x"], arguments["gate"] = x, arguments["gate"][:1]
    leaf = arguments["lora_b"].requires_grad_()
    upstream = torch.randn(*shape[:-1], 12, device=device).transpose(0, 1)
    out, ref = ops.expert_linear(**arguments), reference.expert_linear(**arguments)
    assert tolerances.error(out, ref) <= tolerances.LINEAR_F32
    (grad,), (expected,) = (torch.autograd.grad(y, leaf, upstream) for y in (out, ref))
    assert tolerances.error(grad, expected) <= tolerances.LINEAR_F32
    base = torch.randn(*shape[:-1], 12, device=device).transpose(0, 1)
    kept = {k: v for k, v in arguments.items() if k not in ("weight", "bias")}
    out, ref = (m.expert_update(base, **kept) for m in (ops, reference))
    assert tolerances.error(out, ref) <= tolerances.LINEAR_F32


@pytest.mark.parametrize("shape", [(2, 1, 5, 8, 8), (1, 5, 1, 8, 8), (5, 1, 1, 8, 8)], ids=str)
def test_latent_with_odd_strides_on_single_axes(shape: tuple[int, ...], device: torch.device) -> None:
    z = latent(*shape).float().to(device)
    for swapped in (z.transpose(1, 2), z.transpose(0, 1), z.transpose(0, 2)):
        exact = reference.band_energy(swapped.double(), Bands.dog(3))
        assert tolerances.error(ops.band_energy(swapped, Bands.dog(3)), exact) <= tolerances.ENERGY_F32


def test_backward_inside_autocast(device: torch.device) -> None:
    arguments = _on(device, linear_sample((2, 5, 16), 12, 3, 4, 2))
    x = arguments["x"].requires_grad_()
    y = ops.expert_linear(**arguments)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        (grad,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(reference.expert_linear(**arguments).sum(), x)
    assert grad.dtype == torch.float32
    assert tolerances.error(grad, expected) <= tolerances.LINEAR_F32


def test_no_tokens_give_a_zero_gate_gradient(device: torch.device) -> None:
    arguments = _on(device, linear_sample((2, 0, 16), 12, 3, 4, 2))
    gate = arguments["gate"].requires_grad_()
    (grad,) = torch.autograd.grad(ops.expert_linear(**arguments).sum(), gate)
    assert not grad.any()


def test_filters_built_in_inference_mode_serve_training(device: torch.device) -> None:
    bands = Bands.dog(5)
    z = torch.randn(1, 2, 9, 11, device=device)
    with torch.inference_mode():
        ops.band_energy(z, bands)
    leaf = z.clone().requires_grad_()
    ops.band_energy(leaf, bands).sum().backward()
    assert leaf.grad is not None


def test_filters_built_under_fake_tensors_serve_real_ones(device: torch.device) -> None:
    bands = Bands.author(4)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(1, 2, 9, 13, device=device))
        assert ops.band_energy(fake, bands).shape == (1, 4)
    z = torch.randn(1, 2, 9, 13, device=device)
    assert tolerances.error(ops.band_energy(z, bands), reference.band_energy(z.double(), bands)) <= 2e-6


def test_export(device: torch.device) -> None:
    class Energy(torch.nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return ops.frequency_energy(z, Bands.rings(3))

    z = torch.randn(2, 4, 10, 14, device=device)
    program = torch.export.export(Energy(), (z,))
    assert torch.equal(program.module()(z), ops.frequency_energy(z, Bands.rings(3)))


@pytest.mark.parametrize(
    "bands,size", [(Bands.author(3), (3, 5)), (Bands.author(3), (512, 3)), (Bands.dog(3), (512, 3))]
)
def test_gradient_where_one_band_dominates(bands: Bands, size: tuple[int, int], device: torch.device) -> None:
    """The indicator's gradient is a difference; it keeps its digits where one share is almost 1."""
    z = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    exact = z.detach().double().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 3.0], device=device)
    (grad,) = torch.autograd.grad((ops.frequency_energy(z, bands) * weights).sum(), z)
    (ref,) = torch.autograd.grad((reference.frequency_energy(exact, bands) * weights).sum(), exact)
    # The author's narrow bands hold 1e-10 of the energy: float32 blurs carry about 1e-5 of such a band.
    assert tolerances.error(grad, ref) <= 1e-4


def test_router_gradient_where_one_expert_dominates(device: torch.device) -> None:
    weights = {k: v.float().to(device) for k, v in router_weights(3, 4).items()}
    energy = torch.softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(2)), 1).to(device)
    leaf = weights["w2"].requires_grad_()
    exact = {k: v.detach().double() for k, v in weights.items()}
    exact["w2"].requires_grad_()
    upstream = torch.randn(5, 4, generator=torch.Generator().manual_seed(3)).to(device)
    (grad,) = torch.autograd.grad(ops.router_softmax(energy, **weights, tau=0.05), leaf, upstream)
    (ref,) = torch.autograd.grad(
        reference.router_softmax(energy.double(), **exact, tau=0.05), exact["w2"], upstream.double()
    )
    assert tolerances.error(grad, ref) <= 1e-4

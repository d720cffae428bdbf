"""Sizes, strides, dtypes and values at the edges: odd, prime, tiny, empty, huge, constant, NaN; hypothesis inside."""

from __future__ import annotations

import pytest
import tolerances
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import latent, linear_sample, predictions, router_weights

from fera_ext import ops, reference
from fera_ext.bands import Bands

QUICK = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
BANDS = [Bands.dog(3), Bands.rings(3), Bands.author(3)]
SIDES = st.one_of(st.integers(1, 40), st.sampled_from([48, 52, 64, 72, 96, 97, 104, 127, 128, 152]))


def _energies(z: torch.Tensor, bands: Bands, device: torch.device) -> tuple[float, float]:
    """Relative errors of the energies and of their gradient, against the float64 twin."""
    leaf = z.to(device).detach().requires_grad_()
    exact = z.to(device, torch.float64).detach().requires_grad_()
    out, ref = ops.band_energy(leaf, bands), reference.band_energy(exact, bands)
    weights = torch.linspace(0.5, 1.5, bands.count, device=device)
    grad = torch.autograd.grad((out * weights).sum(), leaf)[0]
    ref_grad = torch.autograd.grad((ref * weights).sum(), exact)[0]
    return tolerances.error(out, ref), tolerances.error(grad, ref_grad)


@QUICK
@given(
    n=st.integers(1, 3),
    planes=st.integers(1, 5),
    height=SIDES,
    width=SIDES,
    bands=st.sampled_from([*BANDS, Bands.dog(2), Bands.dog(6), Bands.rings(1), Bands.author(1)]),
    dtype=st.sampled_from(tolerances.DTYPES),
    layout=st.sampled_from(["contiguous", "channels_last", "transposed", "sliced", "expanded"]),
)
def test_any_latent(n, planes, height, width, bands, dtype, layout, device) -> None:
    z = latent(n, planes, height, width).to(dtype)
    if layout == "channels_last":
        z = z.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        z = z.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "sliced":
        z = torch.cat([z, z], 3)[..., ::2][..., :width] if width > 1 else torch.cat([z, z])[::2]
    elif layout == "expanded":
        z = z[:1].expand(n, -1, -1, -1)
    energy, grad = _energies(z, bands, device)
    assert energy <= tolerances.energy_limit(dtype)
    assert grad <= max(tolerances.energy_limit(dtype), tolerances.LOW.get(dtype, 0))


@pytest.mark.parametrize("bands", BANDS, ids=lambda b: b.name)
@pytest.mark.parametrize("side", [(512, 512), (509, 3), (1, 512), (511, 257), (1, 1), (2, 1), (3, 499)], ids=str)
def test_largest_prime_and_smallest(side: tuple[int, int], bands: Bands, device: torch.device) -> None:
    energy, grad = _energies(latent(1, 3, *side).float(), bands, device)
    assert energy <= tolerances.ENERGY_F32
    assert grad <= tolerances.ENERGY_F32


@pytest.mark.parametrize("bands", BANDS, ids=lambda b: b.name)
def test_five_axes_that_do_not_merge(bands: Bands, device: torch.device) -> None:
    z = latent(2, 4, 3, 16, 12).float().transpose(1, 2)
    energy, grad = _energies(z, bands, device)
    assert energy <= tolerances.ENERGY_F32
    assert grad <= tolerances.ENERGY_F32


@pytest.mark.parametrize("bands", BANDS, ids=lambda b: b.name)
@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (2, 0, 8, 8), (3, 8, 8)], ids=str)
def test_empty_and_three_axes(shape: tuple[int, ...], bands: Bands, device: torch.device) -> None:
    z = torch.randn(*shape, device=device, requires_grad=True)
    out = ops.band_energy(z, bands)
    assert out.shape == (shape[0], 3)
    (grad,) = torch.autograd.grad(out.sum(), z)
    assert grad.shape == z.shape
    if 0 in shape:
        assert not out.any()
        assert not ops.frequency_energy(z, bands).any()
    else:
        assert tolerances.error(out, reference.band_energy(z.double(), bands)) <= tolerances.ENERGY_F32


@pytest.mark.parametrize("bands", BANDS, ids=lambda b: b.name)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-12, 1e-4, 1e4, 1e12, 1e18], ids=str)
def test_indicator_at_any_magnitude(scale: float, bands: Bands, device: torch.device) -> None:
    """Finite and right from 1e-20 to 1e18 in float32, where the energies themselves leave float32."""
    z = (latent(2, 4, 24, 40) * scale).float().to(device)
    router = {k: v.float().to(device) for k, v in router_weights(3, 3).items()}
    share = ops.frequency_energy(z, bands)
    exact = reference.frequency_energy(z.double(), bands)
    assert torch.isfinite(share).all()
    assert tolerances.error(share, exact) <= tolerances.ENERGY_F32
    gate = ops.latent_gate(z, bands, **router, tau=0.7)
    assert tolerances.error(gate, reference.router_softmax(exact, **router, tau=0.7)) <= tolerances.ENERGY_F32


@pytest.mark.parametrize("bands", BANDS, ids=lambda b: b.name)
def test_indicator_gradient_of_huge_latents(bands: Bands, device: torch.device) -> None:
    z = (latent(2, 4, 24, 40) * 1e15).float().to(device).requires_grad_()
    exact = z.detach().double().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 3.0], device=device)
    (grad,) = torch.autograd.grad((ops.frequency_energy(z, bands) * weights).sum(), z)
    (ref,) = torch.autograd.grad((reference.frequency_energy(exact, bands) * weights).sum(), exact)
    assert tolerances.error(grad, ref) <= tolerances.ENERGY_F32


@pytest.mark.parametrize("bands", BANDS, ids=lambda b: b.name)
def test_constant_latent(bands: Bands, device: torch.device) -> None:
    z = torch.full((1, 4, 32, 32), 3.0, device=device)
    share = ops.frequency_energy(z, bands)
    assert tolerances.error(share, reference.frequency_energy(z.double(), bands)) <= tolerances.ENERGY_F32


@pytest.mark.parametrize("bands", BANDS, ids=lambda b: b.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_stays_in_its_sample(value: float, bands: Bands, device: torch.device) -> None:
    z = latent(3, 4, 16, 20).float().to(device)
    clean = ops.frequency_energy(z, bands)
    z[1, 2, 3, 4] = value
    share = ops.frequency_energy(z, bands)
    assert not torch.isfinite(share[1]).all()
    assert torch.equal(share[0], clean[0])
    assert torch.equal(share[2], clean[2])
    router = {k: v.float().to(device) for k, v in router_weights(3, 3).items()}
    gate = ops.latent_gate(z, bands, **router, tau=0.7)
    assert gate[1].isnan().any()
    assert torch.isfinite(gate[0]).all()


def test_router_takes_the_limits(device: torch.device) -> None:
    weights = {k: v.float().to(device) for k, v in router_weights(16, 32, 256).items()}
    energy = torch.softmax(torch.randn(3, 16, device=device), 1)
    gate = ops.router_softmax(energy, **weights, tau=0.1)
    exact = reference.router_softmax(energy.double(), **{k: v.double() for k, v in weights.items()}, tau=0.1)
    # tau = 0.1 multiplies the logits' rounding by ten.
    assert tolerances.error(gate, exact) <= 10 * tolerances.ROUTER_F32
    torch.testing.assert_close(gate.sum(1), torch.ones(3, device=device))
    big = ops.router_softmax(energy, **{k: v * 1e4 for k, v in weights.items()}, tau=0.01)
    assert torch.isfinite(big).all()


@pytest.mark.parametrize("bands", BANDS, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fecl_at_initialisation(dtype: torch.dtype, bands: Bands, device: torch.device) -> None:
    """With B = 0 the correction is zero: the loss and its gradient are finite and right in every dtype."""
    data = {k: v.to(device, dtype) for k, v in predictions(2, 4, 16, 20).items()}
    fera = data["base"].clone().requires_grad_()
    loss = ops.fecl_loss(data["base"], fera, data["target"], bands)
    (grad,) = torch.autograd.grad(loss * 4096, fera)
    exact = data["base"].double().requires_grad_()
    ref = reference.fecl_loss(data["base"].double(), exact, data["target"].double(), bands)
    (ref_grad,) = torch.autograd.grad(ref * 4096, exact)
    assert tolerances.error(loss, ref) <= tolerances.ENERGY_F32
    assert tolerances.error(grad, ref_grad) <= tolerances.LOW.get(dtype, tolerances.ENERGY_F32 * 5)


@pytest.mark.parametrize("bands", BANDS, ids=lambda b: b.name)
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e5, 1e15], ids=str)
def test_fecl_at_any_magnitude(scale: float, bands: Bands, device: torch.device) -> None:
    data = {k: (v * scale).float().to(device) for k, v in predictions(2, 4, 16, 20).items()}
    fera = data["fera"].requires_grad_()
    loss = ops.fecl_loss(data["base"], fera, data["target"], bands)
    (grad,) = torch.autograd.grad(loss, fera)
    exact = fera.detach().double().requires_grad_()
    ref = reference.fecl_loss(data["base"].double(), exact, data["target"].double(), bands)
    (ref_grad,) = torch.autograd.grad(ref, exact)
    assert tolerances.error(loss, ref) <= tolerances.ENERGY_F32 * 5
    assert tolerances.error(grad, ref_grad) <= tolerances.ENERGY_F32 * 5


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_fecl_keeps_one_latent(dtype: torch.dtype, device: torch.device) -> None:
    """Saved for backward are the gradient in the compute dtype and a float64 number a sample; without grad, nothing."""
    data = {k: v.to(device, dtype) for k, v in predictions(2, 4, 16, 20).items()}
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ops.fecl_loss(**data, bands=Bands.dog(3))
        assert kept == []
        fera = data.pop("fera").requires_grad_()
        ops.fecl_loss(fera=fera, **data, bands=Bands.dog(3))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert kept == [((2, 4, 16, 20), compute), ((2,), torch.float64)]


@pytest.mark.parametrize("bands", BANDS, ids=lambda b: b.name)
@pytest.mark.parametrize("shape", [(70000, 1, 2, 3), (1, 70000, 2, 3)], ids=str)
def test_many_samples_and_planes(shape: tuple[int, ...], bands: Bands, device: torch.device) -> None:
    """More of them than a grid axis of a GPU holds blocks."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    energy = ops.band_energy(z, bands)
    (grad,) = torch.autograd.grad(energy.sum(), z)
    exact = z.detach().double().requires_grad_()
    ref = reference.band_energy(exact, bands)
    (ref_grad,) = torch.autograd.grad(ref.sum(), exact)
    assert tolerances.error(energy, ref) <= tolerances.ENERGY_F32
    assert tolerances.error(grad, ref_grad) <= tolerances.ENERGY_F32


def test_fecl_all_zero_and_equal(device: torch.device) -> None:
    zero = torch.zeros(2, 4, 8, 8, device=device)
    fera = zero.clone().requires_grad_()
    loss = ops.fecl_loss(zero, fera, zero, Bands.dog(3))
    (grad,) = torch.autograd.grad(loss, fera)
    assert loss == 0
    assert not grad.any()


@QUICK
@given(
    groups=st.integers(1, 3),
    repeat=st.integers(1, 3),
    middle=st.lists(st.integers(1, 9), max_size=2),
    size=st.integers(1, 70),
    out=st.integers(1, 70),
    experts=st.integers(1, 5),
    rank=st.sampled_from([1, 2, 3, 4, 5, 16]),
    dtype=st.sampled_from(tolerances.DTYPES),
    layout=st.sampled_from(["contiguous", "sliced", "transposed", "expanded"]),
)
def test_any_linear(groups, repeat, middle, size, out, experts, rank, dtype, layout, device) -> None:
    shape = (groups * repeat, *middle, size)
    arguments = linear_sample(shape, out, experts, rank, groups)
    arguments = {k: v.to(device, dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    x = arguments["x"]
    if layout == "sliced":
        x = torch.cat([x, x], -1)[..., :size]
    elif layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "expanded":
        x = x[:1].expand(shape)
    arguments["x"] = x
    arguments["gate"] = arguments["gate"].float() if dtype != torch.float64 else arguments["gate"]
    leaves = ("x", "lora_a", "lora_b", "gate")
    given_leaves = [arguments[n].detach().requires_grad_() for n in leaves]
    exact_leaves = [t.detach().double().requires_grad_() for t in given_leaves]
    fixed = {"weight": arguments["weight"], "bias": arguments["bias"], "scale": 0.5}
    exact_fixed = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in fixed.items()}
    y = ops.expert_linear(**dict(zip(leaves, given_leaves)), **fixed)
    ref = reference.expert_linear(**dict(zip(leaves, exact_leaves)), **exact_fixed)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    # A handful of 16-bit numbers may all round the same way: small outputs get the format's own unit.
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0)
    limit = max(tolerances.linear_limit(dtype), unit)
    assert tolerances.error(y, ref) <= limit
    for name, a, b in zip(
        leaves,
        torch.autograd.grad(y, given_leaves, upstream),
        torch.autograd.grad(ref, exact_leaves, upstream.double()),
    ):
        # gate gradients are sums that may cancel; they are compared with the size of their terms
        scale = float(b.norm()) if name != "gate" else max(float(b.norm()), float(upstream.norm()) * 0.05)
        difference = float((a.double() - b).norm())
        assert difference <= 3 * limit * scale + 1e-30, (name, difference, scale)


@pytest.mark.parametrize("stacked", [(1, 1), (3, 1), (3, 4), (5, 3), (3, 16), (4, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_every_rank(stacked: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """R = 1, 3, 12, 15, 48, 128 and 512."""
    arguments = linear_sample((2, 70, 96), 80, *stacked, 2)
    arguments = {k: v.to(device, dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    leaves = [arguments[n].requires_grad_() for n in ("x", "lora_a", "lora_b", "gate")]
    exact = {k: v.detach().double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    exact_leaves = [exact[n].requires_grad_() for n in ("x", "lora_a", "lora_b", "gate")]
    y, ref = ops.expert_linear(**arguments), reference.expert_linear(**exact)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    limit = tolerances.linear_limit(dtype)
    plain = reference.expert_linear(**arguments)
    assert tolerances.error(y, ref) <= max(limit, tolerances.SLACK * tolerances.error(plain, ref))
    plain_grads = torch.autograd.grad(plain, leaves, upstream)
    for a, p, b in zip(
        torch.autograd.grad(y, leaves, upstream),
        plain_grads,
        torch.autograd.grad(ref, exact_leaves, upstream.double()),
    ):
        assert tolerances.error(a, b) <= max(limit, tolerances.SLACK * tolerances.error(p, b))


def test_empty_linear(device: torch.device) -> None:
    arguments = linear_sample((0, 5, 8), 6, 3, 4, 0)
    arguments = {k: v.float().to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    leaves = [arguments[n].requires_grad_() for n in ("x", "lora_a", "lora_b", "gate")]
    y = ops.expert_linear(**arguments)
    assert y.shape == (0, 5, 6)
    for grad, leaf in zip(torch.autograd.grad(y.sum(), leaves), leaves):
        assert grad.shape == leaf.shape
        assert not grad.any()


def test_video_rows_use_their_samples_gate(device: torch.device) -> None:
    arguments = linear_sample((6, 4, 8), 5, 2, 3, 2)
    arguments = {k: v.float().to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    y = ops.expert_linear(**arguments)
    for row in range(6):
        alone = {**arguments, "x": arguments["x"][row : row + 1], "gate": arguments["gate"][row // 3][None]}
        torch.testing.assert_close(ops.expert_linear(**alone)[0], y[row], rtol=1e-5, atol=1e-5)


def test_trainable_base_gets_its_gradients(device: torch.device) -> None:
    arguments = linear_sample((3, 4, 8), 5, 2, 3, 3)
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    leaves = [arguments["weight"].requires_grad_(), arguments["bias"].requires_grad_()]
    ours = torch.autograd.grad(ops.expert_linear(**arguments).square().sum(), leaves)
    twin = torch.autograd.grad(reference.expert_linear(**arguments).square().sum(), leaves)
    for a, b in zip(ours, twin):
        assert tolerances.error(a, b) <= tolerances.LINEAR_F64

"""The published code's answers (float64), and NumPy's for the other band definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tolerances
import torch
from torch import Tensor

from fera_ext import ops
from fera_ext.bands import Bands

GOLDEN = Path(__file__).parent / "data" / "golden"


def load(name: str, device: torch.device, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {k: torch.as_tensor(data[k]).to(device, dtype) for k in data.files}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["dog", "rings", "author"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_bands(name: str, count: int, dtype: torch.dtype, device: torch.device) -> None:
    data = load("bands", device)
    bands = getattr(Bands, name)(count)
    limit = tolerances.ENERGY_F32 if dtype == torch.float32 else tolerances.ENERGY_F64
    if name == "author":
        limit = max(limit, tolerances.GOLDEN_F32_TAPS)
    for i in range(7):
        z = data[f"z{i}"].to(dtype)
        reference = data[f"{name}_E{i}_{count}"]
        assert tolerances.error(ops.band_energy(z, bands), reference) <= limit
        share = reference / (reference.sum(1, keepdim=True) + 1e-8)
        assert tolerances.error(ops.frequency_energy(z, bands), share) <= limit
        if name == "author":
            assert tolerances.error(share, data[f"author_e{i}_{count}"]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [0, 1, 2])
def test_router(case: int, dtype: torch.dtype, device: torch.device) -> None:
    data = load("router", device)
    names = ["e{}", "w1_{}", "b1_{}", "w2_{}", "b2_{}"]
    leaves = [data[n.format(case)].to(dtype).requires_grad_() for n in names]
    gate = ops.router_softmax(*leaves, float(data[f"tau{case}"]))
    grads = torch.autograd.grad(gate, leaves, data[f"dgate{case}"].to(dtype))
    limit = tolerances.ROUTER_F32 if dtype == torch.float32 else 1e-13
    assert tolerances.error(gate, data[f"gate{case}"]) <= limit
    for grad, name in zip(grads, names):
        assert tolerances.error(grad, data["d" + name.format(case)]) <= limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [0, 1, 2, 3])
def test_linear(case: int, dtype: torch.dtype, device: torch.device) -> None:
    data = {k[:-1]: v.to(dtype) for k, v in load("linear", device).items() if k.endswith(str(case))}
    leaves = [data[n].requires_grad_() for n in ("x", "A", "B", "gate")]
    x, a, b, gate = leaves
    # Published B is (E, out, r); the library's is (out, E, r).
    y = ops.expert_linear(x, data["w"], data["b"], a, b.transpose(0, 1), gate, float(data["scale"]))
    grads = torch.autograd.grad(y, leaves, data["dy"])
    exact = {k[:-1]: v for k, v in load("linear", device).items() if k.endswith(str(case))}
    limit = tolerances.linear_limit(dtype)
    assert tolerances.error(y, exact["y"]) <= limit
    for grad, name in zip(grads, ("dx", "dA", "dB", "dgate")):
        assert tolerances.error(grad, exact[name]) <= limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [0, 1, 2])
def test_fecl(case: int, dtype: torch.dtype, device: torch.device) -> None:
    data = load("fecl", device)
    base, fera, target = (data[f"{n}{case}"].to(dtype) for n in ("base", "fera", "target"))
    # The stored loss has the published weight, 0.1, in it.
    loss = 0.1 * ops.fecl_loss(base, fera.requires_grad_(), target, Bands.author(3))
    loss.backward()
    assert tolerances.error(loss, data[f"loss{case}"]) <= tolerances.FECL_GOLDEN
    assert tolerances.error(fera.grad, data[f"grad{case}"]) <= tolerances.FECL_GOLDEN

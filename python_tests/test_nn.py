"""The modules: indicator, router, adapted linear."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fera_ext import ops, reference
from fera_ext.bands import Bands
from fera_ext.nn import FeraLinear, FrequencyEnergyIndicator, GateState, SoftFrequencyRouter
from fera_ext.nn.state import draw_seed


def _layer(base: nn.Module | None = None, *, groups: int = 2, **changes: Any) -> FeraLinear:
    """A layer with non-zero experts and a gate of ``groups`` rows bound."""
    torch.manual_seed(0)
    state = GateState()
    options: dict[str, Any] = {"rank": 4, "num_experts": 3, "alpha": 2.0, "dropout": 0.0}
    options |= changes
    layer = FeraLinear(base or nn.Linear(8, 5), source=state, **options)
    with torch.no_grad():
        layer.lora_B.normal_()
    state.gate = torch.rand(groups, options["num_experts"]).softmax(-1)
    return layer


def _formula(layer: FeraLinear, x: Tensor, out: Tensor) -> Tensor:
    """y = base + sum_m gate[b, m] s B_m A_m x, sample by sample and expert by expert."""
    gate = layer.source.gate
    assert gate is not None
    rows = []
    for n in range(x.shape[0]):
        row = out[n].clone()
        for m in range(layer.lora_A.shape[0]):
            down = x[n] @ layer.lora_A[m].T
            row = row + gate[n * gate.shape[0] // x.shape[0], m] * layer.scale * down @ layer.lora_B[:, m].T
        rows.append(row)
    return torch.stack(rows)


def _close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert (got - want).norm() <= tolerance * want.norm()


def test_indicator_is_the_operator() -> None:
    z = torch.randn(3, 4, 8, 6)
    indicator = FrequencyEnergyIndicator(Bands.dog(4))
    energy = indicator(z)
    _close(energy, ops.frequency_energy(z, Bands.dog(4)), 1e-7)
    _close(energy.sum(1), torch.ones(3), 1e-6)
    assert not list(indicator.parameters())
    assert "dog" in repr(indicator)


def test_router_is_the_formula() -> None:
    torch.manual_seed(0)
    router = SoftFrequencyRouter(3, 5, hidden=16, tau=0.5)
    assert {n: tuple(p.shape) for n, p in router.named_parameters()} == {
        "w1": (16, 3),
        "b1": (16,),
        "w2": (5, 16),
        "b2": (5,),
    }
    energy = torch.rand(4, 3)
    hidden = torch.relu(energy @ router.w1.T + router.b1)
    _close(router(energy), torch.softmax((hidden @ router.w2.T + router.b2) / 0.5, -1), 1e-6)
    assert "num_experts=5" in repr(router)


def test_router_from_latent_is_the_two_steps() -> None:
    router = SoftFrequencyRouter(3, 4)
    z = torch.randn(2, 4, 9, 7)
    _close(router.from_latent(z, Bands.rings(3)), router(ops.frequency_energy(z, Bands.rings(3))), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_router_of_a_half_precision_model_still_routes_in_float32(dtype: torch.dtype) -> None:
    router = SoftFrequencyRouter(3, 4).to(dtype)
    gate = router.from_latent(torch.randn(2, 4, 8, 8, dtype=dtype), Bands.dog(3))
    assert gate.dtype == torch.float32
    gate.square().sum().backward()
    assert router.w1.grad is not None
    assert router.w1.grad.dtype == dtype


def test_router_of_a_float64_latent() -> None:
    gate = SoftFrequencyRouter(3, 4).from_latent(torch.randn(2, 4, 8, 8).double(), Bands.dog(3))
    assert gate.dtype == torch.float64


def test_autocast_leaves_energy_and_gate_alone() -> None:
    router, z = SoftFrequencyRouter(3, 4), torch.randn(2, 4, 8, 8)
    indicator = FrequencyEnergyIndicator(Bands.dog(3))
    want = router.from_latent(z, Bands.dog(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.from_latent(z, Bands.dog(3)), want)
        energy = indicator(z)
        assert router(energy).dtype == torch.float32
    assert torch.equal(energy, indicator(z))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_bands": 0}, "SoftFrequencyRouter: num_bands must be from 1 to 16, got 0"),
        ({"num_experts": 33}, "SoftFrequencyRouter: num_experts must be from 1 to 32, got 33"),
        ({"hidden": 257}, "SoftFrequencyRouter: hidden must be from 1 to 256, got 257"),
        ({"tau": 0.0}, "SoftFrequencyRouter: tau must be positive, got 0.0"),
        ({"tau": math.nan}, "SoftFrequencyRouter: tau must be positive, got nan"),
    ],
)
def test_router_errors(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SoftFrequencyRouter(**{"num_bands": 3, "num_experts": 3, **changes})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 8), (4, 6, 8), (6, 2, 3, 8)])
def test_linear_is_the_formula(shape: tuple[int, ...], bias: bool) -> None:
    layer = _layer(nn.Linear(8, 5, bias=bias))
    x = torch.randn(shape)
    _close(layer(x), _formula(layer, x, layer.base(x)))


def test_linear_gradients_reach_everything_but_the_base() -> None:
    layer = _layer()
    layer.base.requires_grad_(False)
    x = torch.randn(4, 6, 8, requires_grad=True)
    assert layer.source.gate is not None
    gate = layer.source.gate.requires_grad_()
    weight = torch.randn(4, 6, 5)
    tensors = [x, gate, layer.lora_A, layer.lora_B]
    got = torch.autograd.grad((layer(x) * weight).sum(), tensors)
    want = torch.autograd.grad((_formula(layer, x, layer.base(x)) * weight).sum(), tensors)
    for g, w in zip(got, want, strict=True):
        _close(g, w)


def test_new_layer_changes_nothing_and_starts_as_published() -> None:
    torch.manual_seed(0)
    layer = FeraLinear(nn.Linear(64, 5), 4, 3, 1.0, 0.0, GateState())
    assert not layer.lora_B.any()
    assert layer.lora_B.shape == (5, 3, 4)
    # Kaiming-uniform with a = sqrt(5), each expert as a linear of its own: ±1/sqrt(in).
    assert layer.lora_A.shape == (3, 4, 64)
    assert 0.11 < float(layer.lora_A.abs().max()) <= 0.125
    layer.source.gate = torch.ones(2, 3) / 3
    x = torch.randn(2, 64)
    _close(layer(x), layer.base(x), 1e-6)


class Scaled(nn.Module):
    """A base layer of another kind: features, but no weight to read."""

    in_features, out_features = 8, 5

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * F.linear(x, self.table)


def test_other_base_layers_are_called() -> None:
    layer = _layer(Scaled())
    x = torch.randn(4, 8)
    _close(layer(x), _formula(layer, x, layer.base(x)))


class Subclass(nn.Linear):
    """A linear whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("kind", ["subclass", "forward hook", "pre hook", "replaced forward"])
def test_a_base_layer_with_its_own_behaviour_keeps_it(kind: str) -> None:
    base: Any = Subclass(8, 5) if kind == "subclass" else nn.Linear(8, 5)
    if kind == "forward hook":
        base.register_forward_hook(lambda m, a, out: out * 2)
    elif kind == "pre hook":
        base.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    elif kind == "replaced forward":
        base.forward = lambda x: F.linear(x, base.weight, base.bias) * 2
    layer = _layer(base)
    x = torch.randn(4, 8)
    _close(layer(x), _formula(layer, x, base(x)))


def test_dropout_only_while_training_and_only_on_the_experts() -> None:
    layer = _layer(dropout=0.5)
    x = torch.randn(4, 8)
    layer.train()
    torch.manual_seed(1)
    got = layer(x)
    torch.manual_seed(1)
    keeps = reference.dropout_keeps(4, 8, 0.5, draw_seed(x.device))
    assert 0 < keeps.sum() < keeps.numel()
    _close(got, _formula(layer, x * keeps * 2, layer.base(x)))
    layer.eval()
    _close(layer(x), _formula(layer, x, layer.base(x)))


@pytest.mark.parametrize("kind", ["plain", "other"])
def test_autocast(kind: str) -> None:
    layer = _layer(nn.Linear(8, 5) if kind == "plain" else Subclass(8, 5))
    x = torch.randn(4, 8)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 2e-2 * want.norm()


def test_half_precision_base_with_float32_masters() -> None:
    layer = _layer(nn.Linear(8, 5).to(torch.bfloat16))
    assert layer.lora_A.dtype == torch.float32
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.dtype == torch.float32


def test_disabled_is_the_base() -> None:
    layer = _layer()
    layer.source.enabled = False
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), layer.base(x))


def test_hooks_are_heard_while_disabled() -> None:
    layer, x, heard = _layer(), torch.randn(4, 8), []
    layer.source.enabled = False
    with layer.base.register_forward_hook(lambda *_: heard.append("own")):
        layer(x)
    layer(x)
    with nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(type(module).__name__)):
        layer(x)
    assert heard == ["own", "Linear", "FeraLinear"]


def test_looks_like_its_base() -> None:
    layer = _layer()
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias
    assert (layer.in_features, layer.out_features) == (8, 5)
    assert "rank=4" in repr(layer)
    assert "scale=0.5" in repr(layer)
    assert set(layer.state_dict()) == {"base.weight", "base.bias", "lora_A", "lora_B"}


def test_copies_share_a_state_of_their_own() -> None:
    layer = _layer()
    layer.source.gate = (layer.source.gate * torch.ones(3, requires_grad=True)).clone()
    pair = copy.deepcopy(nn.ModuleList([layer, layer]))
    assert pair[0].source is pair[1].source is not layer.source
    assert pair[0].source.gate is None


def test_errors() -> None:
    layer = _layer()
    layer.source.gate = None
    with pytest.raises(RuntimeError, match="FeraLinear: gate must be computed by a call of the denoiser"):
        layer(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"FeraLinear: base must be a linear layer .* got Conv2d"):
        _layer(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="FeraLinear: base must be a layer without experts"):
        _layer(_layer())
    with pytest.raises(ValueError, match="FeraLinear: base must be on a real device"):
        _layer(nn.Linear(8, 5, device="meta"))

"""The gate's gradient: the plain sum's, whatever runs, and back in one reduction instead of an addition a layer."""

from __future__ import annotations

import collections
import copy
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers_groups import CONFIG, denoiser, itself, twice
from helpers_models import CASES, Case, plain, randomise, sd15
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fera_ext.adapter import FeraAdapter, attach
from fera_ext.nn import FeraLinear, GateState, fan


class Reductions(TorchDispatchMode):
    """Counts what the backward pass does with tensors of the gate's shape (G, E)."""

    def __init__(self, gate: Tensor) -> None:
        super().__init__()
        self.shape = gate.shape
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape == self.shape:
            self.count[func._schema.name.partition("::")[2]] += 1
        return out

    def additions(self) -> int:
        return self.count["add"] + self.count["add_"]


def _plain_view(state: GateState, device: torch.device, members: int = 1) -> Tensor:
    assert state.gate is not None
    return state.gate.to(device)


def _attached(make: Callable[[], Case], **options: Any) -> tuple[Case, FeraAdapter]:
    """A model in float64, where nothing is left of rounding."""
    case = make()
    adapter = attach(case.model, CONFIG, **options)
    randomise(adapter)
    case.model.double()
    case.inputs = {k: _double(v) for k, v in case.inputs.items()}
    return case, adapter


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _gradients(case: Case, adapter: FeraAdapter) -> tuple[dict[str, Tensor], Reductions]:
    """Every gradient, the gate's under "gate", and what the backward pass added."""
    for parameter in adapter.parameters():
        parameter.grad = None
    loss = case.run().square().mean()
    gate = adapter.gate
    assert gate is not None
    gate.retain_grad()
    with Reductions(gate) as seen:
        loss.backward()
    grads = {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}
    assert gate.grad is not None
    return {**grads, "gate": gate.grad}, seen


def _assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    largest = max(float(value.norm()) for value in want.values())
    for name, value in want.items():
        # The same float64 terms in another order.
        assert float((got[name] - value).norm()) <= 1e-13 * float(value.norm()) + 1e-15 * largest, name


@pytest.mark.parametrize("grouped", [True, False], ids=["groups", "one by one"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "plain"])
def test_equals_the_plain_sum(name: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, adapter = _attached(CASES[name], group_projections=grouped)
    got, seen = _gradients(case, adapter)
    assert seen.additions() == 0
    assert seen.count["sum"] == 1
    assert not seen.count["zeros"] + seen.count["zeros_like"], "layers that feed nothing cost nothing"
    monkeypatch.setattr(GateState, "view", _plain_view)
    want, before = _gradients(case, adapter)
    assert before.additions() > 2
    _assert_equal(got, want)
    assert float(want["gate"].norm()) > 0


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_one_reduction_a_checkpointed_block(name: str, reentrant: bool) -> None:
    case, adapter = _attached(CASES[name])
    case.model.train()
    want, _ = _gradients(case, adapter)
    case.model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    got, seen = _gradients(case, adapter)
    _assert_equal(got, want)
    assert seen.additions() == 0
    assert 1 < seen.count["sum"] < len(adapter.layers) // 2
    assert not adapter._routing.state.fans


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoint_calls_of_one_s_own(reentrant: bool) -> None:
    case, adapter = _attached(functools.partial(denoiser, itself))
    case.inputs["z"].requires_grad_()
    want, _ = _gradients(case, adapter)
    case.model.reentrant = reentrant
    for _ in range(2):
        for parameter in adapter.parameters():
            parameter.grad = None
        case.run().square().mean().backward()
        # Reentrant: the gate's own gradient takes another way, to the router.
        _assert_equal(
            {n: p.grad for n, p in adapter.named_parameters()}, {k: v for k, v in want.items() if k != "gate"}
        )
        assert not adapter._routing.state.fans


class Looped(nn.Module):
    """The same block many times: more calls than layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"to_q": nn.Linear(4, 4)})

    def forward(self, z: Tensor) -> Tensor:
        x = z.flatten(2).transpose(1, 2)
        for _ in range(7):
            x = x + torch.tanh(self.blocks["to_q"](x))
        return x.transpose(1, 2).reshape(z.shape)


def test_layers_called_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        lambda: Case(Looped(), {"z": plain().latent}, ("z",), plain().latent),
        functools.partial(denoiser, twice),
    ]
    for make in cases:
        case, adapter = _attached(make)
        got, _ = _gradients(case, adapter)
        with monkeypatch.context() as patched:
            patched.setattr(GateState, "view", _plain_view)
            want, _ = _gradients(case, adapter)
        _assert_equal(got, want)


def test_no_gradient_no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    case, adapter = _attached(sd15)

    def fail(*args: Any) -> None:
        raise AssertionError("the gate fanned out")

    monkeypatch.setattr(fan.Fan, "_make", fail)
    with torch.no_grad():
        case.run()
    with torch.inference_mode():
        case.run()
    with adapter.disabled():
        case.run()
    adapter.router.requires_grad_(False)
    case.run().square().mean().backward()
    adapter.router.requires_grad_(True)
    with pytest.raises(AssertionError, match="fanned out"):
        case.run()


def test_nothing_is_held_after_a_forward() -> None:
    case, adapter = _attached(sd15)
    state = adapter._routing.state
    case.run()
    assert not state.fans
    handle = case.model.mid_block.register_forward_hook(lambda *_: [][0])
    with pytest.raises(IndexError):
        case.run()
    handle.remove()
    assert not state.fans
    case.run().sum().backward()
    assert not state.fans


def test_a_retained_graph_and_parts_of_it() -> None:
    case, adapter = _attached(sd15)
    want, _ = _gradients(case, adapter)
    parameters = dict(adapter.named_parameters())
    out = case.run()
    halves = [out[:, :2].square().sum() / out.numel(), out[:, 2:].square().sum() / out.numel()]
    found = [torch.autograd.grad(half, list(parameters.values()), retain_graph=True) for half in halves]
    _assert_equal(
        {n: a + b for n, a, b in zip(parameters, *found)}, {n: value for n, value in want.items() if n != "gate"}
    )


def _bound(calls: int = 3) -> GateState:
    state = GateState({1: calls})
    state.gate = (torch.rand(2, 3, dtype=torch.float64).requires_grad_() * 1).clone()
    state.gate.retain_grad()
    return state


def test_a_gate_modified_in_place() -> None:
    state = _bound()
    gate, cpu = state.gate, torch.device("cpu")
    before = state.view(cpu)
    factor = before.detach().clone()
    gate.mul_(2)
    after = state.view(cpu)
    torch.testing.assert_close(after, 2 * factor, rtol=0, atol=0)
    gate.retain_grad()
    (after * 3).sum().backward()
    torch.testing.assert_close(gate.grad, torch.full_like(gate, 3))


def test_views_of_several_gates() -> None:
    """A recomputation's gate between two layers of a forward, as a hook that differentiates would have it."""
    state, cpu = _bound(), torch.device("cpu")
    gate = state.gate
    first = state.view(cpu)
    state.gate = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    other, its = state.gate, state.view(cpu)
    state.gate = gate
    (first + 2 * state.view(cpu) + 5 * its).sum().backward()
    torch.testing.assert_close(gate.grad, torch.full_like(gate, 3))
    torch.testing.assert_close(other.grad, torch.full_like(gate, 5))


def test_under_vmap_with_a_gradient() -> None:
    state = _bound()
    layer = FeraLinear(nn.Linear(8, 5), 4, 3, 2.0, 0.0, state, dtype=torch.float64).double()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    want = torch.stack([layer(part) for part in x])
    state.fans.clear()
    torch.testing.assert_close(torch.vmap(layer)(x), want)


def test_a_traced_model_can_be_saved() -> None:
    case, _ = _attached(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(case.model, case.inputs["z"], check_trace=False)
    torch.jit.save(traced, io.BytesIO())
    torch.testing.assert_close(traced(case.inputs["z"]), case.run())


def test_copies_make_as_many_views() -> None:
    state = _bound(7)
    assert copy.deepcopy(state).calls == {1: 7}
    assert not copy.deepcopy(state).fans


@pytest.mark.gpu
def test_layers_on_another_device_than_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in parts: the gate goes to each device once, and one gradient comes back from there."""
    state = _bound()
    state.gate = state.gate.cuda()
    state.gate.retain_grad()
    layers = [FeraLinear(nn.Linear(8, 8), 4, 3, 2.0, 0.0, state, dtype=torch.float64).double() for _ in range(3)]
    layers[1].cuda()
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 8, dtype=torch.float64)

    def run() -> Tensor:
        state.fans.clear()
        state.gate.grad = None
        layers[2](layers[1](layers[0](x).cuda()).cpu()).square().sum().backward(retain_graph=True)  # the gate's
        return state.gate.grad

    got = run()
    monkeypatch.setattr(GateState, "view", _plain_view)
    torch.testing.assert_close(got, run(), rtol=1e-12, atol=0)

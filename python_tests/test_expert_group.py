"""expert_linear_group beyond the table of samples: members that are not used, unfrozen weights, what it saves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tolerances
import torch
from helpers_ops import Captured, assert_matches_float64
from samples import GROUP_LEAVES, Sample, call_group, group_sample
from torch import Tensor

from fera_ext import ops, reference

OUTS, RANKS = (7, 5, 9, 6), (2, 3, 2, 1)


def _arguments(members: int = 3, shape: tuple[int, ...] = (4, 6, 8)) -> dict[str, Any]:
    return group_sample(shape, OUTS[:members], 3, RANKS[:members], 2)


def _lists(arguments: dict[str, Any]) -> tuple[Any, ...]:
    members = sum(n.startswith("weight") for n in arguments)
    named = ([arguments[f"{n}{i}"] for i in range(members)] for n in ("weight", "bias", "lora_a", "lora_b"))
    return arguments["x"], *named, arguments["gate"], arguments["scale"]


def _leaves(arguments: dict[str, Any], names: tuple[str, ...]) -> list[Tensor]:
    return [arguments[n].requires_grad_() for n in names]


@pytest.mark.parametrize("variant", ["tiles", "library"])
@pytest.mark.parametrize("members", [1, 2, 3, 4])
@torch.no_grad()
def test_each_output_is_the_single_operators(members: int, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERA_EXPERT_VARIANT", variant)
    x, weights, biases, lora_as, lora_bs, gate, scale = _lists(_arguments(members))
    together = ops.expert_linear_group(x, weights, biases, lora_as, lora_bs, gate, scale)
    assert len(together) == members
    for i, y in enumerate(together):
        assert torch.equal(y, ops.expert_linear(x, weights[i], biases[i], lora_as[i], lora_bs[i], gate, scale))


@pytest.mark.parametrize("variant", ["tiles", "library"])
@pytest.mark.parametrize("used", [u for n in (1, 2) for u in itertools.combinations(range(3), n)], ids=str)
def test_outputs_that_are_not_used(
    used: tuple[int, ...], variant: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their adapters get no gradient, as from a separate call, and the backward operator does not see them."""
    monkeypatch.setenv("FERA_EXPERT_VARIANT", variant)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _arguments().items()}
    leaves = _leaves(given, GROUP_LEAVES)
    results = []
    for module in (ops, reference):
        ys = module.expert_linear_group(*_lists(given))
        results.append(torch.autograd.grad(sum(ys[i].square().sum() for i in used), leaves, allow_unused=True))
    for name, got, want in zip(GROUP_LEAVES, *results):
        assert (got is None) == (want is None) == (name[-1].isdigit() and int(name[-1]) not in used), name
        assert got is None or tolerances.error(got, want) <= 1e-12


@pytest.mark.parametrize("variant", ["tiles", "library"])
@pytest.mark.parametrize("name", GROUP_LEAVES)
def test_each_gradient_alone(name: str, variant: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERA_EXPERT_VARIANT", variant)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _arguments().items()}
    (leaf,) = _leaves(given, (name,))
    got, want = (
        torch.autograd.grad(call_group(module, "expert_linear_group", given).square().sum(), leaf)[0]
        for module in (ops, reference)
    )
    assert tolerances.error(got, want) <= 1e-12


@pytest.mark.parametrize("variant", ["tiles", "library"])
@pytest.mark.parametrize("used", [(0, 1, 2), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("kind", ["expanded", "different"])
def test_a_gate_for_each_member(
    kind: str, used: tuple[int, ...], variant: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(members, G, E): the values are the single operators', every member's gradient comes back, unused ones zero."""
    monkeypatch.setenv("FERA_EXPERT_VARIANT", variant)
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _arguments().items()}
    x, weights, biases, lora_as, lora_bs, gate, scale = _lists(given)
    gates = (
        gate.expand(3, *gate.shape)
        if kind == "expanded"
        else gate * torch.tensor([1.0, 0.5, 2.0]).to(gate)[:, None, None]
    )
    gates = gates.detach().requires_grad_()
    ys = ops.expert_linear_group(x, weights, biases, lora_as, lora_bs, gates, scale)
    (grad,) = torch.autograd.grad(sum(ys[i].square().sum() for i in used), [gates])
    assert grad.shape == gates.shape
    for y, twin in zip(ys, reference.expert_linear_group(x, weights, biases, lora_as, lora_bs, gates, scale)):
        torch.testing.assert_close(y, twin)
    for i in range(3):
        own = gates[i].detach().requires_grad_()
        y = ops.expert_linear(x, weights[i], biases[i], lora_as[i], lora_bs[i], own, scale)
        assert torch.equal(ys[i], y)
        (want,) = torch.autograd.grad(y.square().sum(), [own])
        torch.testing.assert_close(grad[i], want if i in used else torch.zeros_like(want))


def test_a_wrong_number_of_gates() -> None:
    x, weights, biases, lora_as, lora_bs, gate, scale = _lists(_arguments())
    with pytest.raises(ValueError, match=r"gate must be \(G, E\) or \(3, G, E\), one a weight, got \[2, "):
        ops.expert_linear_group(x, weights, biases, lora_as, lora_bs, torch.stack([gate, gate]), scale)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, device: torch.device) -> None:
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _arguments(shape=(4, tokens, 8)).items()}
    leaves = _leaves(given, GROUP_LEAVES)
    results = []
    for module in (ops, reference):
        out = call_group(module, "expert_linear_group", given)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for got, want in zip(*results):
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-13)


def test_strided_input(device: torch.device) -> None:
    given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _arguments().items()}
    base = given["x"]
    for x in (base.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([base, base], -1)[..., :8]):
        assert not x.is_contiguous()
        got = call_group(ops, "expert_linear_group", {**given, "x": x})
        want = call_group(ops, "expert_linear_group", given)
        if device.type == "cpu":
            assert torch.equal(got, want)
        else:  # the vendor's products may choose another kernel for other strides
            assert tolerances.error(got, want) <= tolerances.linear_limit(got.dtype)


def test_unfrozen_weights_and_biases() -> None:
    given = _arguments()
    names = ("weight0", "weight2", "bias2", "lora_b1")
    leaves = _leaves(given, names)
    got, want = (
        torch.autograd.grad(call_group(module, "expert_linear_group", given).square().sum(), leaves)
        for module in (ops, reference)
    )
    for a, b in zip(got, want):
        assert tolerances.error(a, b) <= 1e-12


def test_what_is_kept_for_backward() -> None:
    """x once, h of every member and tensors that live anyway; nothing of the size of an output."""
    given = _arguments()
    _leaves(given, GROUP_LEAVES)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.expert_linear_group(*_lists(given))
    owned = {v.data_ptr() for v in given.values() if isinstance(v, Tensor)}
    assert sum(t.data_ptr() == given["x"].data_ptr() for t in kept) == 1
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in owned] == [(4, 6, 3 * r) for r in RANKS[:3]]


def test_autocast_casts_the_base_alone() -> None:
    given = {k: v.float() if isinstance(v, Tensor) else v for k, v in _arguments().items()}
    leaves = _leaves(given, GROUP_LEAVES)
    with torch.autocast("cpu", torch.bfloat16):
        outs = ops.expert_linear_group(*_lists(given))
        single = ops.expert_linear(*(v[2] if isinstance(v, list) else v for v in _lists(given)))
    assert all(y.dtype == torch.bfloat16 for y in outs)
    assert torch.equal(outs[2], single)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(sum(y.float().sum() for y in outs), leaves))


@torch.no_grad()
def test_under_inference_mode_and_without_gradients() -> None:
    given = _arguments()
    want = call_group(ops, "expert_linear_group", given)
    with torch.inference_mode():
        assert torch.equal(call_group(ops, "expert_linear_group", given), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("outs", [(320, 320, 320), (640, 640), (320, 64, 320, 128)], ids=str)
@pytest.mark.parametrize("rank", [4, 32])
def test_members_that_one_kernel_takes(outs: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    """Sizes of a model, where the core may have one kernel for all members: values, gradients, bits, capture."""
    arguments = group_sample((2, 512, 320), outs, 3, (rank,) * len(outs), 2)
    leaves = ("x", "gate", *(f"lora_{k}{i}" for k in "ab" for i in range(len(outs))))
    sample = Sample("expert_linear_group", arguments, leaves, "wide", call_group)
    device = torch.device("cuda")
    assert_matches_float64(sample, dtype, device)
    given = sample.cast(dtype, device, master=torch.float32)
    (out, grads), (again, grads_again) = given.gradients(ops), given.gradients(ops)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again))
    captured = Captured(given)
    with torch.no_grad():
        captured.leaves[0].mul_(0.75)
    for got, want in zip(captured.replay(), captured.eager()):
        assert torch.equal(got, want)

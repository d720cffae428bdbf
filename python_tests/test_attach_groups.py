"""Projections that share their input run as one operator: the same results as one by one, whatever happens between."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from helpers_groups import (
    CONFIG,
    Attention,
    Calls,
    assert_same,
    cross,
    denoiser,
    equal_but_another,
    gradients,
    groups,
    itself,
    key_elsewhere,
    no_key,
    nothing_kept,
    pair,
    twice,
)
from helpers_models import CASES, Case, randomise
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fera_ext.adapter import FeraAdapter, attach

# Equal to the separate form, in fewer calls.

# Model: calls of the group, calls of the single operator; one by one the single operator alone.
COUNTS = {
    "sd15": ((8, 12), 32),
    "sdxl": ((16, 24), 64),
    "sd3": ((4, 2), 14),
    "flux": ((3, 1), 10),
    "dit": ((2, 2), 8),
    "pixart": ((4, 6), 16),
}


@pytest.mark.parametrize("name", COUNTS)
def test_models(name: str) -> None:
    results = []
    for (case, adapter), counts in zip(pair(CASES[name]), (COUNTS[name][0], (0, COUNTS[name][1]))):
        with Calls() as calls:
            results.append(gradients(case, adapter))
        assert calls.count["expert_linear_group_backward"] == counts[0]
        assert calls.count["expert_linear_backward"] == counts[1]
        assert calls.linears() == counts
        with torch.no_grad(), calls:
            assert torch.equal(case.run(), results[-1][0])
        assert calls.linears() == counts
        assert nothing_kept(adapter)
    (out, got), (out_separate, want) = results
    assert torch.equal(out, out_separate)
    assert_same(got, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "pixart"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    (case, adapter), (_, _) = pair(CASES[name])
    want = gradients(case, adapter)[1]
    case.model.train()
    case.model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    with Calls() as calls:
        assert_same(gradients(case, adapter)[1], want)
    assert calls.count["expert_linear_group"] > calls.count["expert_linear_group_backward"]
    assert nothing_kept(adapter)


def test_disabled() -> None:
    case = CASES["sd15"]()
    want = case.run()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    with adapter.disabled(), Calls() as calls:
        assert torch.equal(case.run(), want)
    assert calls.linears() == (0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    outs = []
    for case, adapter in pair(CASES["sd15"]):
        with torch.autocast("cpu", dtype), Calls() as calls:
            outs.append(case.run())
        assert (calls.linears()[0] > 0) == bool(groups(adapter))
    assert torch.equal(*outs)


def test_dropout_and_other_base_layers_take_the_separate_form() -> None:
    case = CASES["sd15"]()
    adapter = attach(case.model, CONFIG.override(lora_dropout=0.5))
    case.model.train()
    with Calls() as calls:
        case.run()
    assert calls.linears()[0] == 0
    case.model.eval()
    heard = []
    adapter.layers["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"].base.register_forward_hook(
        lambda *_: heard.append(1)
    )
    with Calls() as calls:
        case.run()
    assert calls.linears() == (7, 14)
    assert heard == [1]


# What may happen between the calls.


def backwards(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    v, k, q = a.to_v(x), a.to_k(x), a.to_q(x)
    return q, k, v


def value_first(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    q, v, k = a.to_q(x), a.to_v(x), a.to_k(x)
    return q, k, v


def without_gradient(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    q = a.to_q(x)
    with torch.no_grad():
        k = a.to_k(x)
    return q, k, a.to_v(x)


def gradient_for_one(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        q = a.to_q(x)
    return q, a.to_k(x), a.to_v(x)


ORDERS = [
    itself,
    cross,
    backwards,
    value_first,
    twice,
    key_elsewhere,
    equal_but_another,
    no_key,
    without_gradient,
    gradient_for_one,
]


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("inner", ORDERS, ids=lambda f: f.__name__)
def test_any_order(inner: Callable[..., tuple[Tensor, ...]], reentrant: bool | None) -> None:
    """Three steps: the first finds out which projections share, the others know."""
    results = []
    for case, adapter in pair(functools.partial(denoiser, inner)):
        case.model.reentrant = reentrant
        case.latent.requires_grad_()  # what reentrant checkpointing needs
        results.append([_step(case, adapter) for _ in range(3)])
        assert nothing_kept(adapter)
    for (out, got), (out_separate, want) in zip(*results):
        assert torch.equal(out, out_separate)
        assert got.keys() == want.keys()
        assert_same(got, want)


@torch.no_grad()
def test_a_tensor_modified_in_place() -> None:
    def in_place(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        x = x.clone()
        return a.to_q(x), a.to_k(x.mul_(0.5)), a.to_v(x)

    got, want = ([case.run() for _ in range(3)] for case, _ in pair(functools.partial(denoiser, in_place)))
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def test_inference_mode_and_autocast_between() -> None:
    def changing(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        q = a.to_q(x)
        with torch.autocast("cpu", torch.bfloat16):
            k = a.to_k(x)
        with torch.inference_mode():
            v = a.to_v(x)
        assert (k.dtype, v.dtype, v.is_inference()) == (torch.bfloat16, torch.float32, True)
        return q, k.float(), v.clone()

    got, want = ([case.run().detach() for _ in range(2)] for case, _ in pair(functools.partial(denoiser, changing)))
    with torch.inference_mode():
        got += [case.run() for case, _ in pair(functools.partial(denoiser, itself))]
    assert torch.equal(got.pop(), got.pop())
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def _step(case: Case, adapter: FeraAdapter) -> tuple[Tensor, dict[str, Tensor]]:
    for parameter in adapter.parameters():
        parameter.grad = None
    out = case.run()
    out.square().mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_forwards_of_two_plans_pending(reentrant: bool) -> None:
    """The first forward finds a guess wrong; its recomputation, after the second's, still does what it did."""
    results = []
    for case, adapter in pair(functools.partial(denoiser, cross)):
        case.model.reentrant = reentrant
        other = (case.latent.flip(0) * 0.7).requires_grad_()
        case.latent.requires_grad_()
        a, b = case.run(), case.run(z=other)
        (a.square().mean() + b.abs().mean()).backward()
        results.append({n: p.grad for n, p in adapter.named_parameters()})
        assert nothing_kept(adapter)
    assert_same(*results)


def test_whole_denoiser_recomputed() -> None:
    results = []
    for case, adapter in pair(functools.partial(denoiser, cross)):
        outs = [checkpoint(case.model, case.latent * k, use_reentrant=False) for k in (1.0, 0.5)]
        sum(out.square().mean() for out in outs).backward()
        results.append({n: p.grad for n, p in adapter.named_parameters()})
        assert nothing_kept(adapter)
    assert_same(*results)


def test_after_an_exception() -> None:
    def fails(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        q = a.to_q(x)
        if case.inputs.get("fail"):
            raise KeyError
        return q, a.to_k(x), a.to_v(x)

    case = denoiser(fails)
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want = case.run()
    case.model.register_forward_pre_hook(lambda m, args, kwargs: (args, {"z": kwargs["z"]}), with_kwargs=True)
    case.inputs["fail"] = True
    with pytest.raises(KeyError):
        case.run()
    assert nothing_kept(adapter)
    case.inputs["fail"] = False
    with Calls() as calls:
        assert torch.equal(case.run(), want)
    assert calls.linears() == (2, 0), "an exception says nothing about who shares"


def test_hooks_on_a_projection_are_called() -> None:
    results = []
    for case, adapter in pair(functools.partial(denoiser, itself)):
        key = adapter.layers["blocks.0.to_k"]
        key.register_forward_hook(lambda m, a, out: out * 2)
        outs = [case.run()]
        key.register_forward_pre_hook(lambda m, a: (a[0] * 3,))
        results.append([*outs, case.run()])
    for got, want in zip(*results):
        assert torch.equal(got, want)

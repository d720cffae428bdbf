"""Calls between which something changes, and checkpoints around parts of an attention or around more than the denoiser:
all as with the projections one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers_groups import (
    CONFIG,
    Attention,
    assert_same,
    cross,
    denoiser,
    gradients,
    itself,
    key_elsewhere,
    no_key,
    nothing_kept,
    pair,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fera_ext.adapter import attach

attention = nn.functional.scaled_dot_product_attention


def keys_in_a_checkpoint(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    def inside(q: Tensor, x: Tensor) -> Tensor:
        return attention(q, a.to_k(x), a.to_v(x))

    out = checkpoint(inside, a.to_q(x), x, use_reentrant=False)
    return out, x, x


def query_in_a_checkpoint(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    return checkpoint(a.to_q, x, use_reentrant=False), a.to_k(x), a.to_v(x)


def gate_changed_between(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    q = a.to_q(x)
    a.to_q.source.gate.mul_(1.5)
    k = a.to_k(x)
    a.to_q.source.gate.div_(1.5)
    return q, k, a.to_v(x)


def weights_changed_between(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
    q = a.to_q(x)
    a.to_k.lora_B.mul_(2.0)
    k = a.to_k(x)
    a.to_k.lora_B.div_(2.0)
    return q, k, a.to_v(x)


@pytest.mark.parametrize("inner", [keys_in_a_checkpoint, query_in_a_checkpoint], ids=lambda f: f.__name__)
def test_a_checkpoint_around_some_projections(inner: Callable[..., tuple[Tensor, ...]]) -> None:
    (case, adapter), (plain, separate) = pair(lambda: denoiser(inner))
    for _ in range(2):
        got, grads = gradients(case, adapter)
        want, want_grads = gradients(plain, separate)
        torch.testing.assert_close(got, want)
        assert_same(grads, want_grads)
    assert nothing_kept(adapter)


@torch.no_grad()
@pytest.mark.parametrize("inner", [gate_changed_between, weights_changed_between], ids=lambda f: f.__name__)
def test_what_changes_between_the_calls(inner: Callable[..., tuple[Tensor, ...]]) -> None:
    (case, adapter), (plain, _) = pair(lambda: denoiser(inner))
    for _ in range(2):
        torch.testing.assert_close(case.run(), plain.run(), rtol=1e-6, atol=1e-6)
    assert nothing_kept(adapter)


def test_a_gradient_asked_for_between_the_calls() -> None:
    found = []

    def asks(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        x = x.detach()
        q = a.to_q(x)
        x.requires_grad_()
        found.append(x)
        return q, a.to_k(x), a.to_v(x)

    grads = []
    for case, adapter in pair(lambda: denoiser(asks)):
        found.clear()
        gradients(case, adapter)
        grads.append([x.grad for x in found])
    # The last block's input alone reaches the loss through k and v.
    torch.testing.assert_close(grads[0][-1], grads[1][-1])
    assert grads[0][-1] is not None


def _loss(model: nn.Module, z: Tensor) -> Tensor:
    return model(z).square().mean()


@pytest.mark.parametrize("inner", [cross, no_key, key_elsewhere, itself], ids=lambda f: f.__name__)
def test_a_checkpoint_around_the_denoiser_and_the_loss(inner: Callable[..., tuple[Tensor, ...]]) -> None:
    results = []
    for case, adapter in pair(lambda: denoiser(inner)):
        steps = []
        for _ in range(3):
            for parameter in adapter.parameters():
                parameter.grad = None
            first, second = (checkpoint(_loss, case.model, case.latent * by, use_reentrant=False) for by in (1.0, 0.5))
            with adapter.disabled(), torch.no_grad():
                case.run()
            (first + second).backward()
            steps.append({n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None})
        results.append(steps)
    for got, want in zip(*results):
        assert_same(got, want)


def test_members_of_another_dtype() -> None:
    case = denoiser(cross)
    attach(case.model, CONFIG)
    for block in case.model.blocks:
        block.to_k.double()
        block.to_v.double()
        block.inner = lambda a, x, c: (a.to_q(x), a.to_k(c.double()).float(), a.to_v(c.double()).float())
    assert case.run().isfinite().all()
    assert case.run().isfinite().all()


def test_under_vmap() -> None:
    outs = []
    for case, adapter in pair(lambda: denoiser(itself)):
        adapter.model.eval()
        stacked = torch.stack([case.latent, 0.5 * case.latent])
        with torch.no_grad():
            gate = torch.full((2, 3), 1 / 3)
            layer = case.model.blocks[0].to_q
            layer.source.gate = gate
            tokens = stacked.flatten(3).transpose(2, 3)
            outs.append(torch.vmap(layer)(tokens))
            layer.source.gate = None
    assert torch.equal(*outs)


def test_the_switch_is_a_bool() -> None:
    with pytest.raises(ValueError, match="attach: group_projections must be a bool, got 'no'"):
        attach(denoiser(itself).model, CONFIG, group_projections="no")  # type: ignore[arg-type]

"""Gradient checkpointing: every gradient equals the one without it, in every mode and order."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from helpers_models import CASES, Case, Plain, latents, plain, randomise, sd15
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fera_ext.adapter import FeraAdapter, attach
from fera_ext.bands import Bands
from fera_ext.config import FeraConfig

# Rings tell small latents apart; the default bands see them all as low frequencies.
CONFIG = FeraConfig(target_modules=["to_q", "to_out.0"], fecl_weight=0.5, bands=Bands.rings(3))
MODES = {"non-reentrant": False, "reentrant": True}


def _enable(model: torch.nn.Module, reentrant: bool | None) -> None:
    if isinstance(model, Plain):
        model.reentrant = reentrant
    elif reentrant is None:
        model.disable_gradient_checkpointing()
    elif reentrant:
        model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=True))
    else:
        model.enable_gradient_checkpointing()


def _gradients(adapter: FeraAdapter, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    for parameter in adapter.parameters():
        parameter.grad = None
    loss().backward()
    grads = {n: p.grad for n, p in adapter.named_parameters()}
    assert all(g is not None and bool(g.abs().max() > 0) for g in grads.values()), grads.keys()
    return grads  # type: ignore[return-value]


def _close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    largest = max(float(value.norm()) for value in want.values())
    for name, value in want.items():
        # The same sums in another order: a few float32 roundings. Where the exact gradient is zero (the
        # query of an attention to a single token), only the roundings of larger terms are left.
        error = float((got[name] - value).norm())
        assert error <= 2e-5 * float(value.norm()) + 1e-7 * largest, (name, error)


def _losses(case: Case, adapter: FeraAdapter) -> dict[str, Callable[[], Tensor]]:
    first = next(iter(case.inputs))
    other = case.inputs[first].flip(0) * 0.7
    target = torch.randn(case.run().shape, generator=torch.Generator().manual_seed(3))

    def base() -> Tensor:
        with torch.no_grad(), adapter.disabled():
            return case.run()

    def simple() -> Tensor:
        return (case.run() - target).square().mean()

    def base_before() -> Tensor:
        off = base()
        on = case.run()
        return (on - target).square().mean() + adapter.fecl_loss(off, on, target)

    def base_after() -> Tensor:
        on = case.run()
        off = base()
        return (on - target).square().mean() + adapter.fecl_loss(off, on, target)

    def two_pending() -> Tensor:
        a = case.run()
        b = case.run(**{first: other})
        return (a - target).square().mean() + 2 * (b - target).abs().mean()

    def base_with_grad_between() -> Tensor:
        a = case.run()
        with adapter.disabled():
            off = case.run()
        b = case.run(**{first: other})
        return (a - target).square().mean() + (b - off).square().mean()

    return {f.__name__: f for f in (simple, base_before, base_after, two_pending, base_with_grad_between)}


LOSSES = ["simple", "base_before", "base_after", "two_pending", "base_with_grad_between"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", LOSSES)
def test_diffusers_unet_gradients(order: str, mode: str) -> None:
    case = sd15()
    case.model.train()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    loss = _losses(case, adapter)[order]
    want = _gradients(adapter, loss)
    _enable(case.model, MODES[mode])
    _close(_gradients(adapter, loss), want)
    _enable(case.model, None)
    _close(_gradients(adapter, loss), want)


@pytest.mark.parametrize("mode", MODES)
def test_enabled_before_attach(mode: str) -> None:
    case = sd15()
    case.model.train()
    _enable(case.model, MODES[mode])
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    loss = _losses(case, adapter)["base_after"]
    got = _gradients(adapter, loss)
    _enable(case.model, None)
    _close(got, _gradients(adapter, loss))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sdxl", "svd", "sd3", "flux", "dit", "pixart"])
def test_other_diffusers_models(name: str, mode: str) -> None:
    case = CASES[name]()
    case.model.train()
    if name == "dit":
        # Label dropout is random; checkpointing preserves the generator, two runs of a test do not.
        for block in case.model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    # The last block of SD3 has no text output, and adapted layers that feed nothing have no gradient.
    loss = _losses(case, adapter)["two_pending"]
    want = _gradients(adapter, loss)
    _enable(case.model, MODES[mode])
    _close(_gradients(adapter, loss), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", LOSSES)
def test_direct_checkpoint_calls(order: str, mode: str) -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    # Reentrant checkpointing needs an input that asks for a gradient; the adapter's own does not reach it.
    case.model.inp.weight.requires_grad_(True)
    loss = _losses(case, adapter)[order]
    want = _gradients(adapter, loss)
    _enable(case.model, MODES[mode])
    _close(_gradients(adapter, loss), want)
    # A second round: nothing of the first is left behind.
    _close(_gradients(adapter, loss), want)


@pytest.mark.parametrize("mode", MODES)
def test_latent_that_asks_for_a_gradient(mode: str) -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    z = case.latent.clone().requires_grad_()
    want = torch.autograd.grad(case.run(z=z).square().sum(), z)[0]
    _enable(case.model, MODES[mode])
    case.run(z=z).square().sum().backward()
    assert (z.grad - want).norm() / want.norm() < 2e-5


def test_latent_with_a_graph_of_its_own() -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    z = case.latent.clone().requires_grad_()
    want = torch.autograd.grad(case.run(z=z * 2).square().sum(), z)[0]
    _enable(case.model, False)
    case.run(z=z * 2).square().sum().backward()
    assert (z.grad - want).norm() / want.norm() < 2e-5
    _enable(case.model, True)
    with pytest.raises(RuntimeError, match="FeraAdapter: the latent must be a leaf"):
        case.run(z=z * 2).square().sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_latent_changed_in_place(mode: str) -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    # Blocks that ask for gradients of their own, and a first layer that keeps no latent for backward.
    case.model.inp.register_forward_hook(lambda m, a, out: out.detach().requires_grad_())
    want = _gradients(adapter, lambda: case.run().square().sum())
    _enable(case.model, MODES[mode])

    def loss() -> Tensor:
        z = case.latent.clone()
        value = case.run(z=z).square().sum()
        z.zero_()
        return value

    if MODES[mode]:
        for parameter in adapter.parameters():
            parameter.grad = None
        with pytest.raises(RuntimeError, match="FeraAdapter: the latent must be unchanged"):
            loss().backward()
        # The failed backward pass must not poison the next step.
        _close(_gradients(adapter, lambda: case.run().square().sum()), want)
    else:
        _close(_gradients(adapter, loss), want)


@pytest.mark.parametrize("mode", MODES)
def test_whole_denoiser_checkpointed(mode: str) -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    z = case.latent.clone().requires_grad_()
    half = (case.latent / 2).requires_grad_()

    def whole(latent: Tensor) -> Tensor:
        return checkpoint(case.model, latent, use_reentrant=MODES[mode])

    def loss(run: Callable[[Tensor], Tensor]) -> Tensor:
        return run(z).square().mean() + run(half).abs().mean()

    want = _gradients(adapter, lambda: loss(case.model))
    _close(_gradients(adapter, lambda: loss(whole)), want)
    for nested in (False, True):
        _enable(case.model, nested)
        _close(_gradients(adapter, lambda: loss(whole)), want)


def test_intermediate_loss_that_skips_the_output_raises() -> None:
    case = plain()
    attach(case.model, CONFIG)
    _enable(case.model, False)
    features = []
    case.model.blocks[-1].register_forward_hook(lambda m, a, out: features.append(out))
    case.run()
    with pytest.raises(RuntimeError, match="gate must be computed by a call of the denoiser"):
        features[0].square().sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_intermediate_loss_of_a_diffusers_model(mode: str) -> None:
    case = sd15()
    case.model.train()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    features: list[Tensor] = []
    case.model.mid_block.register_forward_hook(lambda m, a, out: features.append(out))

    def gradients() -> dict[str, Tensor]:
        features.clear()
        for parameter in adapter.parameters():
            parameter.grad = None
        for factor in (1.0, 0.5):
            case.run(sample=case.latent * factor)
        (features[0].square().mean() + features[1].abs().mean()).backward()
        return {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}

    want = gradients()
    assert any("mid_block" in n for n in want)
    assert "router.w1" in want
    _enable(case.model, MODES[mode])
    got = gradients()
    assert set(got) == set(want)
    _close(got, want)


def test_backward_inside_disabled() -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want = _gradients(adapter, lambda: case.run().square().mean())
    _enable(case.model, False)
    for parameter in adapter.parameters():
        parameter.grad = None
    loss = case.run().square().mean()
    with adapter.disabled():
        loss.backward()
        off = case.run()
    _close({n: p.grad for n, p in adapter.named_parameters()}, want)  # type: ignore[misc]
    with adapter.disabled():
        assert torch.equal(off, case.run())


def test_retained_graph_twice() -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want = _gradients(adapter, lambda: case.run().square().mean())
    _enable(case.model, False)
    for parameter in adapter.parameters():
        parameter.grad = None
    loss = case.run().square().mean()
    case.run(z=latents(2, 4, 8, 12, seed=9))
    loss.backward(retain_graph=True)
    loss.backward()
    _close({n: p.grad / 2 for n, p in adapter.named_parameters()}, want)  # type: ignore[operator]


def test_frozen_router_under_reentrant() -> None:
    case = sd15()
    case.model.train()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    adapter.router.requires_grad_(False)

    def gradients() -> dict[str, Tensor]:
        for parameter in adapter.parameters():
            parameter.grad = None
        case.run().square().mean().backward()
        assert all(p.grad is None for p in adapter.router.parameters())
        return {n: p.grad for n, p in adapter.named_parameters() if n.startswith("layers")}  # type: ignore[misc]

    want = gradients()
    _enable(case.model, True)
    _close(gradients(), want)


def test_detach_restores_the_checkpointing_function() -> None:
    case = sd15()
    case.model.train()
    _enable(case.model, True)
    before = [getattr(m, "_gradient_checkpointing_func", None) for m in case.model.modules()]
    adapter = attach(case.model, CONFIG)
    case.run()
    adapter.detach()
    after = [getattr(m, "_gradient_checkpointing_func", None) for m in case.model.modules()]
    assert all(a is b for a, b in zip(after, before, strict=True))

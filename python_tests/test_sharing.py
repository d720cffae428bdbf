"""Which projections run as one operator, what they leave behind, copies of them, and the compiler."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_groups import (
    CONFIG,
    PROJECTIONS,
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
from helpers_models import CASES, randomise
from safetensors import safe_open
from torch import Tensor, nn

from fera_ext import load_adapter
from fera_ext.adapter import attach
from fera_ext.config import FeraConfig

# Who shares.


def test_a_wrong_guess_is_made_once() -> None:
    case = denoiser(cross)
    adapter = attach(case.model, CONFIG)
    assert [len(g.members) for g in groups(adapter)] == [3, 3]
    with Calls() as calls:
        case.run()
        assert calls.linears() == (2, 4), "q, k, v for the query alone, then key and value"
        assert [len(g.members) for g in groups(adapter)] == [2, 2]
        case.run()
        assert calls.linears() == (2, 2)
        case.run()
        assert calls.linears() == (2, 2)


@pytest.mark.parametrize(("inner", "members"), [(no_key, "qv"), (key_elsewhere, ""), (equal_but_another, "")])
def test_what_is_left_of_a_guess(inner: Callable[..., tuple[Tensor, ...]], members: str) -> None:
    case = denoiser(inner)
    adapter = attach(case.model, CONFIG)
    for _ in range(4):
        case.run()
    for block, group in zip(case.model.blocks, groups(adapter)):
        left = tuple(getattr(block, f"to_{name}") for name in members)
        assert group.members == left
    with Calls() as calls:
        case.run()
        first = calls.linears()
        case.run()
    assert calls.linears() == first


def test_layers_of_two_attentions_and_unlike_layers_do_not_share() -> None:
    case = denoiser(itself)
    first, second = case.model.blocks
    second.to_k = first.to_k
    second.to_v = nn.Linear(16, 8)
    adapter = attach(case.model, FeraConfig(target_modules=PROJECTIONS[:3]))
    assert [g.members for g in groups(adapter)] == [(first.to_q, first.to_v)]


def test_a_wrapped_projection_is_on_its_own() -> None:
    """What stands in a layer's place may be what makes its parameters usable, as FSDP is."""
    case = denoiser(itself)
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want = case.run()
    case.model.blocks[0].to_v = nn.Sequential(case.model.blocks[0].to_v)
    with Calls() as calls:
        assert torch.equal(case.run(), want)
    assert calls.linears() == (1, 3)


def test_switched_off() -> None:
    adapter = attach(CASES["sd15"]().model, CONFIG, group_projections=False)
    assert groups(adapter) == []


# Nothing stays behind.


@pytest.mark.parametrize("inner", [itself, cross, no_key, twice], ids=lambda f: f.__name__)
def test_nothing_is_held_after_a_forward(inner: Callable[..., tuple[Tensor, ...]]) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def watched(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        outputs = inner(a, x, context)
        seen.extend(weakref.ref(t) for t in (x, *outputs))
        return outputs

    case = denoiser(watched)
    adapter = attach(case.model, CONFIG)
    gc.disable()
    try:
        for _ in range(2):
            case.run()
            assert nothing_kept(adapter)
            assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


def test_detach_and_attach_again() -> None:
    case = CASES["sd15"]()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.modules()]
    want = case.run()
    for _ in range(2):
        adapter = attach(case.model, CONFIG)
        randomise(adapter)
        assert not torch.equal(case.run(), want)
        adapter.detach()
        assert groups(adapter) == []
        assert torch.equal(case.run(), want)
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.modules()] == hooks


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_shares_among_its_own(clone: Callable[[nn.Module], nn.Module]) -> None:
    case = denoiser(cross)
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want = case.run()
    case.run()
    twin = clone(case.model)
    for block, original in zip(twin.blocks, case.model.blocks):
        assert block.to_k.shared.members == (block.to_k, block.to_v)
        assert block.to_k.shared is not original.to_k.shared
        assert block.to_k.shared.state is block.to_k.source
    with Calls() as calls:
        assert torch.equal(twin(case.latent), want)
    assert calls.linears() == (2, 2)


def test_the_saved_adapter_does_not_know(tmp_path: Path) -> None:
    contents = []
    for _, adapter in pair(CASES["sd15"]):
        with safe_open(adapter.save(tmp_path / f"{len(contents)}.safetensors"), "pt") as file:
            contents.append((file.metadata(), sorted(file.keys())))
        adapter.detach()
    assert contents[0] == contents[1]
    model, path = adapter.model, tmp_path / "0.safetensors"
    adapter = load_adapter(model, path, group_projections=False)
    assert groups(adapter) == []
    adapter.detach()
    assert len(groups(load_adapter(model, path))) == 8


# The compiler.


def test_compiled_as_one_graph_in_the_separate_form() -> None:
    case = denoiser(itself)
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want, want_grads = gradients(case, adapter)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    for stance in ("default", "fail_on_recompile", "fail_on_recompile"):
        for parameter in adapter.parameters():
            parameter.grad = None
        with torch.compiler.set_stance(stance):
            got = compiled(case.latent)
            got.square().mean().backward()
        torch.testing.assert_close(got, want)
        assert_same({n: p.grad for n, p in adapter.named_parameters()}, want_grads)
        case.run()  # eager calls between, in groups


def test_compiled_attention_in_an_eager_model() -> None:
    case = denoiser(cross)
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want = [case.run(), case.run()]
    torch._dynamo.reset()
    case.model.blocks[0].compile(fullgraph=True, backend="eager")
    torch.testing.assert_close([case.run(), case.run()], want)
    assert nothing_kept(adapter)

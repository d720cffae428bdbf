"""Dropout of an attached adapter: one seed a forward, the same one wherever the forward is computed again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers_models import CASES, Case, Plain, latents, plain, randomise, sd15
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fera_ext import reference
from fera_ext.adapter import FeraAdapter, attach
from fera_ext.config import FeraConfig
from fera_ext.nn import FeraLinear, GateState
from fera_ext.nn.state import draw_seed

CONFIG = FeraConfig(target_modules=["to_q", "to_out.0"], lora_dropout=0.4)
MODES = {"non-reentrant": False, "reentrant": True}


def _enable(model: nn.Module, reentrant: bool | None) -> None:
    if isinstance(model, Plain):
        model.reentrant = reentrant
    elif reentrant is None:
        model.disable_gradient_checkpointing()
    else:
        model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))


def _attached(name: str, **changes: Any) -> tuple[Case, FeraAdapter]:
    case = CASES[name]()
    case.model.double().train()
    for key, value in case.inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            case.inputs[key] = value.double()
    adapter = attach(case.model, CONFIG.override(**changes), dtype=torch.float64)
    randomise(adapter)
    if isinstance(case.model, Plain):  # reentrant checkpointing needs an input that asks
        case.model.inp.weight.requires_grad_(True)
    return case, adapter


def _gradients(adapter: FeraAdapter, loss: Callable[[], Tensor], seed: int = 5) -> dict[str, Tensor]:
    for parameter in adapter.parameters():
        parameter.grad = None
    torch.manual_seed(seed)
    loss().backward()
    return {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}


def _close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    largest = max(float(w.norm()) for w in want.values())
    for name, value in want.items():
        assert float((got[name] - value).norm()) <= 1e-12 * (float(value.norm()) + largest), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["sd15", "plain"])
def test_checkpointing_drops_the_same(name: str, mode: str) -> None:
    """Blocks that get their gate as an argument, and a model that calls torch's checkpoint itself; also with another
    forward between a forward and its backward pass."""
    case, adapter = _attached(name)
    first = next(iter(case.inputs))
    other = case.inputs[first].flip(0) * 0.7

    def two_pending() -> Tensor:
        a, b = case.run(), case.run(**{first: other})
        with torch.no_grad():
            case.run()
        return a.square().mean() + 2 * (b - 1).square().mean()

    for loss in (lambda: case.run().square().mean(), two_pending):
        _enable(case.model, None)
        want = _gradients(adapter, loss)
        _enable(case.model, MODES[mode])
        _close(_gradients(adapter, loss), want)
        different = _gradients(adapter, loss, seed=6)
        assert any(not torch.allclose(different[n], want[n]) for n in want)


@pytest.mark.parametrize("mode", MODES)
def test_whole_denoiser_checkpointed(mode: str) -> None:
    case, adapter = _attached("plain")
    z = case.inputs["z"].requires_grad_()
    want = _gradients(adapter, lambda: case.model(z).square().mean())
    for nested in (None, False, True):
        _enable(case.model, nested)
        _close(_gradients(adapter, lambda: checkpoint(case.model, z, use_reentrant=MODES[mode]).square().mean()), want)


def test_the_models_own_dropout_is_left_alone_by_a_recomputation() -> None:
    """The generator inside a checkpointed block is where it was: ours draws before the first of them."""
    case, adapter = _attached("plain")
    for block in case.model.blocks:
        block.register_forward_hook(lambda m, a, out: nn.functional.dropout(out, 0.5))
    want = _gradients(adapter, lambda: case.run().square().mean())
    _enable(case.model, False)
    _close(_gradients(adapter, lambda: case.run().square().mean()), want)


def test_masks_are_the_twins_and_differ_between_layers() -> None:
    case, adapter = _attached("plain")
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in adapter.layers.items():
        layer.register_forward_hook(lambda m, a, out, path=path: seen.update({path: (a[0].detach(), out.detach())}))
    torch.manual_seed(11)
    case.run()
    torch.manual_seed(11)
    seed, masks = draw_seed(case.latent.device), []
    for number, (path, layer) in enumerate(adapter.layers.items()):
        x, out = seen[path]
        assert layer.stream == number
        base = layer.base
        want = reference.expert_linear(
            x, base.weight, base.bias, layer.lora_A, layer.lora_B, adapter.gate, layer.scale, 0.4, seed, number
        )
        assert (out - want).norm() <= 1e-12 * want.norm()
        masks.append(reference.dropout_keeps(192, 16, 0.4, seed, number))
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_the_generator_decides_and_only_where_something_drops() -> None:
    case, adapter = _attached("plain")
    state = next(iter(adapter.layers.values())).source
    torch.manual_seed(1)
    first, second = case.run(), case.run()
    torch.manual_seed(1)
    assert torch.equal(case.run(), first)
    assert not torch.equal(first, second)
    assert state.seed is None
    before = torch.get_rng_state()
    case.model.eval()
    case.run()
    case.model.train()
    with adapter.disabled():
        case.run()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_that_is_set_later() -> None:
    case, adapter = _attached("plain")
    for layer in adapter.layers.values():
        layer.dropout = 0.0
    want = case.run()
    assert torch.equal(case.run(), want)
    model = copy.deepcopy(case.model)
    for layer in [*adapter.layers.values(), *(m for m in model.modules() if isinstance(m, FeraLinear))]:
        layer.dropout = 0.5
    torch.manual_seed(1)
    first = case.run()
    torch.manual_seed(1)
    assert torch.equal(case.run(), first)
    assert not torch.equal(first, want)
    case.model = model
    torch.manual_seed(1)
    assert torch.equal(case.run(), first)


def test_a_source_without_a_seed() -> None:
    """Each call draws one."""
    gate = torch.rand(2, 3).softmax(-1)
    source = SimpleNamespace(gate=gate, enabled=True, view=lambda device: gate)
    layer = FeraLinear(nn.Linear(32, 5), 4, 3, 2.0, 0.5, source)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 32)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    source.seed = torch.tensor([3])
    assert torch.equal(layer(x), layer(x))


class Subclass(nn.Linear):
    """A base layer whose output is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("base", [nn.Linear, Subclass])
def test_nothing_of_the_size_of_x_is_saved(base: type[nn.Linear]) -> None:
    state = GateState()
    layer = FeraLinear(base(64, 8), 2, 3, 2.0, 0.5, state)
    layer.base.requires_grad_(False)
    state.gate, x = torch.rand(2, 3).softmax(-1), torch.randn(2, 50, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in kept if t.numel() >= x.numel()} == {x.data_ptr()}


def test_copies_keep_their_numbers() -> None:
    layer = FeraLinear(nn.Linear(8, 8), 2, 3, 2.0, 0.5, GateState(), stream=5)
    for other in (copy.deepcopy(layer), layer.to(torch.bfloat16), layer.to("meta").to_empty(device="cpu")):
        assert other.stream == 5
        assert other._number.tolist() == [5]
    assert "number" not in " ".join([*layer.state_dict(), *(n for n, _ in layer.named_buffers())])


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    """Forward and backward drop the same: the loss falls along its gradient, as it does in a finite difference."""
    case = sd15()
    case.model.train()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    weight = next(iter(adapter.layers.values())).lora_B

    def loss() -> Tensor:
        torch.manual_seed(2)
        return compiled(**case.inputs).sample.double().square().mean()

    assert torch.equal(loss(), loss())
    (grad,) = torch.autograd.grad(loss(), weight)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(grad / grad.norm(), alpha=sign * 1e-2)
            values.append(loss())
            weight.sub_(grad / grad.norm(), alpha=sign * 1e-2)
    assert abs((values[0] - values[1]) / 2e-2 / grad.norm() - 1) < 2e-2


def test_compiled_blocks_share_their_graph() -> None:
    torch.manual_seed(0)
    case = Case(Plain(blocks=12), {"z": latents(2, 4, 8, 12)}, ("z",), latents(2, 4, 8, 12))
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    case.model.train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in case.model.blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.manual_seed(2)
    first = case.run()
    torch.manual_seed(2)
    assert torch.equal(case.run(), first)
    assert not torch.equal(case.run(), first)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    want = _gradients(adapter, lambda: case.run().square().mean())
    _enable(case.model, False)
    got = _gradients(adapter, lambda: case.run().square().mean())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.gpu
def test_captured_forward_draws_anew() -> None:
    case = plain()
    case.model.cuda().train()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    z = case.latent.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.model(z)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.model(z)
    outs = []
    for _ in range(2):
        graph.replay()
        outs.append(out.clone())
    assert not torch.equal(*outs)

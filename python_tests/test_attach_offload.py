"""Weights that are moved, swapped or replaced behind the adapter's back: nothing of it holds a stale tensor."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers_groups import Attention, Calls, denoiser, gradients, itself, pair
from helpers_models import CASES, Case, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fera_ext.adapter import FeraAdapter, attach
from fera_ext.bands import Bands
from fera_ext.config import FeraConfig

CONFIG = FeraConfig(bands=Bands.rings(3))


def _attached(name: str, device: torch.device | str = "cpu") -> tuple[Case, FeraAdapter]:
    case = CASES[name]()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    case.model.to(device)
    case.inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.inputs.items()}
    return case, adapter


def _close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    largest = max(float(value.norm()) for value in want.values())
    for name, value in want.items():
        error = float((got[name].to(value.device) - value).norm())
        assert error <= 1e-4 * float(value.norm()) + 1e-6 * largest, name


# Block swap, as trainers do it.


def _blocks(model: nn.Module) -> list[nn.Module]:
    kinds = ("BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")
    return [m for m in model.modules() if type(m).__name__ in kinds]


class Swap:
    """Keeps the frozen weights of each block away but while the block runs; its backward pass brings them back.

    NaN stand in their place, on ``away``. Without autograd, whose saved tensors may share it (linear's own formula
    keeps a transposed view of the weight), the old memory is filled with NaN too, so that a pointer to it shows.
    """

    def __init__(self, model: nn.Module, home: torch.device | str = "cpu", away: torch.device | str = "cpu") -> None:
        self.home, self.away = torch.device(home), torch.device(away)
        self.values: dict[nn.Parameter, Tensor] = {}
        for block in _blocks(model):
            frozen = [p for p in block.parameters() if not p.requires_grad]
            self.values.update((p, p.detach().to(self.away, copy=True)) for p in frozen)
            block.register_forward_pre_hook(functools.partial(self.bring, frozen))
            block.register_forward_hook(functools.partial(self.take, frozen))
            block.register_full_backward_pre_hook(functools.partial(self.bring, frozen))
        self.take(list(self.values))

    def bring(self, parameters: list[nn.Parameter], *_: Any) -> None:
        for parameter in parameters:
            parameter.data = self.values[parameter].to(self.home, copy=True)

    def take(self, parameters: list[nn.Parameter], *_: Any) -> None:
        for parameter in parameters:
            if not torch.is_grad_enabled():
                parameter.data.fill_(float("nan"))
            parameter.data = torch.full_like(self.values[parameter], float("nan"))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_block_swap(name: str, checkpointed: bool | None) -> None:
    case, adapter = _attached(name)
    want = gradients(case, adapter)
    if checkpointed is not None:
        case.model.train()
        case.model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=checkpointed))
    swap = Swap(case.model)
    for _ in range(2):
        got = gradients(case, adapter)
        swap.take(list(swap.values))
        assert torch.equal(got[0], want[0])
        _close(got[1], want[1])
    with torch.no_grad():
        assert torch.equal(case.run(), want[0])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("checkpointed", [None, False], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_block_swap_between_host_and_device(name: str, checkpointed: bool | None) -> None:
    case, adapter = _attached(name, "cuda")
    want = gradients(case, adapter)
    if checkpointed is not None:
        case.model.train()
        case.model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=checkpointed))
    swap = Swap(case.model, "cuda", "cpu")
    for _ in range(2):
        got = gradients(case, adapter)
        swap.take(list(swap.values))
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
        _close(got[1], want[1])


# Weights replaced between two steps, and between two calls.


def _new_data(layer: Any) -> None:
    for parameter in (layer.base.weight, layer.lora_A, layer.lora_B):
        parameter.data = parameter.data * 1.5


def _new_parameters(layer: Any) -> None:
    layer.base.weight = nn.Parameter(layer.base.weight.detach() * 1.5, requires_grad=False)
    layer.lora_A = nn.Parameter(layer.lora_A.detach() * 1.5)


def _new_base(layer: Any) -> None:
    old, layer.base = layer.base, nn.Linear(layer.in_features, layer.out_features)
    layer.base.requires_grad_(False).load_state_dict({k: v * 1.5 for k, v in old.state_dict().items()})


class Doubled(nn.Linear):
    """A linear with a forward of its own, as a quantised one is."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _other_kind(layer: Any) -> None:
    old, layer.base = layer.base, Doubled(layer.in_features, layer.out_features)
    layer.base.requires_grad_(False).load_state_dict(old.state_dict())


def _hooked(layer: Any) -> None:
    layer.base.register_forward_hook(lambda m, a, out: out * 0.5)


def _parametrised(layer: Any) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(layer.base, "weight", Twice())
    torch.nn.utils.parametrize.register_parametrization(layer, "lora_A", Twice())


CHANGES = [_new_data, _new_parameters, _new_base, _other_kind, _hooked, _parametrised]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_replaced_between_steps(change: Callable[[Any], None]) -> None:
    """In groups and one by one: what the separate form gives is what the layers' formula says (test_nn)."""
    results = []
    for case, _ in pair(lambda: denoiser(itself)):
        before = case.run()
        for block in case.model.blocks:
            change(block.to_k)
            change(block.to_q)
        after = case.run()
        assert not torch.equal(before, after)
        after.square().mean().backward()
        results.append((after, block.to_v.lora_A.grad))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [c for c in CHANGES if c is not _new_data], ids=lambda f: f.__name__)
def test_replaced_between_the_calls_of_a_group(change: Callable[[Any], None]) -> None:
    def changing(a: Attention, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        q = a.to_q(x)
        change(a.to_k)
        return q, a.to_k(x), a.to_v(x)

    outs = [case.run() for case, _ in pair(lambda: denoiser(changing))]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)


def test_cast_between_steps() -> None:
    outs = []
    for case, _ in pair(lambda: denoiser(itself)):
        found = [case.run()]
        case.model.double()
        found.append(case.run(z=case.latent.double()))
        case.model.to(torch.bfloat16)
        found.append(case.run(z=case.latent.to(torch.bfloat16)))
        outs.append(found)
    for got, want in zip(*outs):
        assert torch.equal(got, want)


# Offloading by accelerate and by diffusers.


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode, _nothing], ids=["no_grad", "infer", "grad"])
def test_accelerate_offloads_every_leaf(inference: Callable[[], Any]) -> None:
    """What ``enable_sequential_cpu_offload`` does to each of a pipeline's models."""
    accelerate = pytest.importorskip("accelerate")
    case, adapter = _attached("sd15")
    case.model.eval()
    with torch.no_grad():
        want = case.run()
    accelerate.cpu_offload(case.model, execution_device=torch.device("cpu"))
    assert next(iter(adapter.layers.values())).base.weight.is_meta
    for _ in range(2):
        with inference(), Calls() as calls:
            torch.testing.assert_close(case.run(), want, rtol=1e-5, atol=1e-6)
    assert calls.linears() == (0, 0), "hooks on the base layers are called"
    with adapter.disabled(), torch.no_grad():
        case.run()
    assert next(iter(adapter.layers.values())).base.weight.is_meta


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_diffusers_group_offloading(kind: str) -> None:
    pytest.importorskip("diffusers.hooks")
    case, _ = _attached("sd3")
    case.model.eval()
    with torch.no_grad():
        want = case.run()
    case.model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), kind, 1)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(case.run(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("use_stream", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_diffusers_group_offloading_to_the_host(name: str, kind: str, use_stream: bool) -> None:
    case, adapter = _attached(name)
    case.model.eval()
    case.inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in case.inputs.items()}
    case.model.cuda()
    with torch.no_grad():
        want = case.run()
    case.model.cpu()
    # A stream prefetches one block after the other.
    case.model.enable_group_offload(
        torch.device("cuda"), torch.device("cpu"), kind, None if kind == "leaf_level" else 1, use_stream=use_stream
    )
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(case.run(), want, rtol=1e-4, atol=1e-5)
    assert any(layer.base.weight.device.type == "cpu" for layer in adapter.layers.values())


@pytest.mark.gpu
@pytest.mark.parametrize("sequential", [False, True], ids=["model", "leaf"])
def test_accelerate_offloads_to_the_host(sequential: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    case, adapter = _attached("sd15", "cuda")
    case.model.eval()
    with torch.no_grad():
        want = case.run()
        case.model.cpu()
        if sequential:
            accelerate.cpu_offload(case.model, execution_device=torch.device("cuda"))
        else:
            _, hook = accelerate.cpu_offload_with_hook(case.model, torch.device("cuda"))
        for _ in range(2):
            torch.testing.assert_close(case.run(), want, rtol=1e-4, atol=1e-5)
            if not sequential:
                hook.offload()
    assert next(iter(adapter.layers.values())).base.weight.device.type != "cuda"


@pytest.mark.gpu
def test_moved_to_the_host_and_back_between_steps() -> None:
    case, adapter = _attached("sd15", "cuda")
    want = gradients(case, adapter)
    for _ in range(2):
        case.model.cpu()
        torch.cuda.empty_cache()
        case.model.cuda()
        got = gradients(case, adapter)
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
        _close(got[1], want[1])

"""Many parameters as one: the same values, gradients, updates and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_models import plain, randomise
from helpers_train import train
from safetensors.torch import load_file
from torch import Tensor, nn

from fera_ext.adapter import attach
from fera_ext.config import FeraConfig
from fera_ext.training.errors import UsageError
from fera_ext.training.flat import ALIGNMENT, FlatParameters


def parameters(*dtypes: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 4, 8), (5,), (8, 3, 4), (1,), (7, 2)]
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in shapes
        for dtype in dtypes or (torch.float32,)
    ]


def give_gradients(own: list[nn.Parameter], seed: int, skip: int = -1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in own]
    for i, (parameter, grad) in enumerate(zip(own, grads)):
        parameter.grad = None if i == skip else grad.clone()
    return grads


def test_parameters_become_views() -> None:
    own = parameters(torch.float32, torch.float64)
    before = [p.detach().clone() for p in own]
    flat = FlatParameters(own)
    assert [p.dtype for p in flat.parameters()] == [torch.float32, torch.float64]
    for parameter, value in zip(own, before):
        assert torch.equal(parameter, value)
        assert parameter.is_leaf
        assert parameter.is_contiguous()
        assert parameter.data_ptr() % 16 == 0
    assert all(p.numel() * p.element_size() % ALIGNMENT == 0 for p in flat.parameters())
    with torch.no_grad():
        for whole in flat.parameters():
            whole.add_(1.0)
    for parameter, value in zip(own, before):
        assert torch.equal(parameter, value + 1.0)
    with torch.no_grad():
        own[0].zero_()
    assert not flat.parameters()[0][: own[0].numel()].any()


def test_gradients_are_gathered_and_added() -> None:
    own = parameters()
    flat = FlatParameters(own)
    (whole,) = flat.parameters()
    first = give_gradients(own, 2)
    flat.collect()
    assert all(p.grad is None for p in own)
    views = [whole.grad[p.storage_offset() : p.storage_offset() + p.numel()].view(p.shape) for p in own]
    assert all(torch.equal(view, grad) for view, grad in zip(views, first))
    assert whole.grad.norm() == pytest.approx(float(torch.cat([g.flatten() for g in first]).norm()))
    second = give_gradients(own, 3, skip=2)
    flat.collect(accumulate=True)
    for i, (view, a, b) in enumerate(zip(views, first, second)):
        assert torch.equal(view, a if i == 2 else a + b)
    third = give_gradients(own, 4, skip=2)
    flat.collect()
    assert not views[2].any()
    assert torch.equal(views[0], third[0])


@pytest.mark.parametrize("whose", ["flat", "optimizer"])
def test_accumulation_starts_anew_after_zero_grad(whose: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    flat = FlatParameters([weight])
    optimizer = torch.optim.SGD(flat.parameters(), lr=0.1)
    for _ in range(3):
        for _ in range(2):
            weight.sum().backward()
            flat.collect(accumulate=True)
        assert flat.parameters()[0].grad.tolist()[:3] == [2, 2, 2]
        (flat if whose == "flat" else optimizer).zero_grad()


def test_a_graph_that_wants_the_old_values_raises() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    flat = FlatParameters([weight])
    optimizer = torch.optim.SGD(flat.parameters(), lr=0.1)
    first, second = weight * weight.exp(), weight * weight.exp()
    first.sum().backward()
    flat.collect()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


def test_gradients_that_lie_there_stay() -> None:
    own = parameters()
    flat = FlatParameters(own)
    (whole,) = flat.parameters()
    flat.collect()
    views = [whole.grad[p.storage_offset() : p.storage_offset() + p.numel()].view(p.shape) for p in own]
    for parameter, view in zip(own, views):
        parameter.grad = view
    sum(p.sum() for p in own).backward()
    for accumulate in (False, True):
        flat.collect(accumulate)
        assert all(p.grad is view and bool((view == 1).all()) for p, view in zip(own, views))
    flat.zero_grad(set_to_none=False)
    assert not whole.grad.any()
    flat.zero_grad()
    assert whole.grad is None
    assert all(p.grad is None for p in own)


def test_parameters_that_left_are_an_error() -> None:
    own = parameters()
    flat = FlatParameters(own)
    own[1].data = own[1].data.clone()
    give_gradients(own, 2)
    with pytest.raises(RuntimeError, match=r"must stay views .*got one of shape \(5,\)"):
        flat.collect()
    linear = nn.Linear(2, 2)
    flat = FlatParameters(linear.parameters())
    linear.double()
    with pytest.raises(RuntimeError, match="must stay views"):
        flat.collect()


def test_what_cannot_be_flat() -> None:
    with pytest.raises(ValueError, match="at least one, got none"):
        FlatParameters([])
    own = parameters()
    with pytest.raises(ValueError, match="got one twice"):
        FlatParameters([own[0], own[0]])
    with pytest.raises(ValueError, match=r"floating point on a real device, got .*int64"):
        FlatParameters([nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)])
    with pytest.raises(ValueError, match="must ask for gradients, got one of shape"):
        FlatParameters([*own, nn.Parameter(torch.ones(2), requires_grad=False)])


def test_flat_steps_are_the_parameters_own() -> None:
    """AdamW and the clipping give what they give one by one; states go over and back."""
    own, twins = parameters(), parameters()
    flat = FlatParameters(own)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    flat_optimizer = torch.optim.AdamW(flat.parameters(), fused=True, **options)
    optimizer = torch.optim.AdamW(twins, foreach=False, **options)
    for seed in range(3):
        give_gradients(own, seed)
        give_gradients(twins, seed)
        flat.collect()
        torch.nn.utils.clip_grad_norm_(flat.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        flat_optimizer.step()
        optimizer.step()
        for a, b in zip(own, twins):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    (whole,) = flat.parameters()
    gaps = torch.ones_like(whole, dtype=torch.bool)
    for parameter in own:
        gaps[parameter.storage_offset() : parameter.storage_offset() + parameter.numel()] = False
    assert gaps.any()
    assert not whole[gaps].any()
    split = flat.split_state(flat_optimizer.state_dict())
    theirs = optimizer.state_dict()
    assert split["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]
    for index, state in theirs["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(split["state"][index][name], value, rtol=1e-5, atol=1e-8)
    joined = flat.join_state(split)
    for name, value in flat_optimizer.state_dict()["state"][0].items():
        assert torch.equal(joined["state"][0][name], value), name
    del split["state"][2]
    assert flat.join_state(split)["state"][0]["exp_avg"].norm() > 0
    split["state"][0]["exp_avg"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"exp_avg must be of shape \(3, 4, 8\), got \(9,\)"):
        flat.join_state(split)
    split["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="must be of 5 parameters, got 4"):
        flat.join_state(split)


def test_adapters_are_saved_and_loaded_in_place(tmp_path: Path) -> None:
    case = plain()
    adapter = attach(case.model, FeraConfig(target_modules=["to_q", "to_out.0"]))
    randomise(adapter)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    flat = FlatParameters(adapter.parameters())
    assert adapter.state_dict().keys() == before.keys()
    saved = load_file(adapter.save(tmp_path))
    assert sum(torch.equal(saved[name], value) for name, value in before.items()) == len(before)
    adapter.load_state_dict({name: 2 * value for name, value in before.items()})
    case.run().square().mean().backward()
    flat.collect()
    total = sum(float(value.square().sum()) for value in before.values())
    assert float(flat.parameters()[0].detach().square().sum()) == pytest.approx(4 * total, rel=1e-5)
    assert flat.parameters()[0].grad.norm() > 0


def test_older_checkpoints_are_continued(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before flat parameters, AdamW ran one by one, and there was no fecl_every."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = {"max_train_steps": 5, "lora_dropout": 0.2}
    _, whole = train(model, images, tmp_path / "whole", checkpointing_steps=2, **options)
    start = tmp_path / "whole" / "checkpoint-2"
    state = json.loads((start / "state.json").read_text())
    del state["pinned"]["fecl_every"], state["pinned"]["fecl_share"]
    (start / "state.json").write_text(json.dumps(state))
    tensors = torch.load(start / "training_state.pt", weights_only=True)
    held = tensors["optimizer"]
    assert len(held["state"]) == len(held["param_groups"][0]["params"]) > 4
    held["param_groups"][0].update(fused=None, foreach=None, capturable=False)
    torch.save(tensors, start / "training_state.pt")
    _, rest = train(model, images, tmp_path / "rest", resume_from_checkpoint=str(start), **options)
    assert rest == whole[2:]
    with pytest.raises(UsageError, match=r"fecl_every=2 \(there 1\)"):
        train(model, images, tmp_path / "rest", resume_from_checkpoint=str(start), fecl_every=2, **options)

"""Dropout of expert_linear and expert_update: the numbers behind the mask, the mask itself, what is saved, errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tolerances
import torch
from helpers_ops import Captured
from samples import LINEAR_LEAVES, Sample, linear_sample
from torch import Tensor

from fera_ext import ops, reference

VARIABLE = "FERA_EXPERT_VARIANT"


def _seed(value: int = 2**40 + 12345, device: str | torch.device = "cpu") -> Tensor:
    return torch.tensor([value], device=device)


def _mask(rows: int, columns: int, p: float, seed: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns): what the operator makes of ones, read column by column through a one-hot A."""
    x = torch.ones(rows, columns, dtype=dtype, device=seed.device)
    found = []
    for first in range(0, columns, 32):
        count = min(32, columns - first)
        a = torch.zeros(1, count, columns, dtype=dtype, device=seed.device)
        a[0, torch.arange(count), first + torch.arange(count)] = 1
        base, b = x.new_zeros(rows, 8), x.new_zeros(8, 1, count)
        gate = torch.ones(1, 1, device=seed.device)
        found.append(torch.ops.fera_ext.expert_update(base, x, a, b, gate, 1.0, p, seed, stream)[1])
    return torch.cat(found, 1)


def test_philox_is_philox() -> None:
    """Known answers of Random123."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    for (counter, key), want in (
        (([0] * 4, [0] * 2), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        got = reference._philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        assert " ".join(f"{int(word):08x}" for word in got) == want


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    """The share that is kept, of everything, of every column of a group and of every row, within its deviations."""
    rows, columns = 2000, 320
    keeps = reference.dropout_keeps(rows, columns, p, _seed(), 3).double()

    def within(share: Tensor, count: int, sigmas: float) -> bool:
        return bool(((share - (1 - p)).abs() <= sigmas * (p * (1 - p) / count) ** 0.5 + 2**-17).all())

    assert within(keeps.mean(), rows * columns, 4)
    assert within(keeps.view(rows, -1, 8).mean((0, 1)), rows * columns // 8, 4)
    assert within(keeps.mean(1), columns, 5.5)  # of 2000 rows
    assert within(keeps.mean(0), rows, 5)


def test_independent() -> None:
    """Masks of other seeds, streams, rows and columns agree as often as chance has it."""
    p, rows, columns = 0.5, 512, 512
    masks = [
        reference.dropout_keeps(rows, columns, p, _seed(seed), stream)
        for seed, stream in ((1, 0), (2, 0), (1 + 2**32, 0), (-1, 0), (1, 1), (1, 2**31))
    ]
    masks += [masks[0].roll(shift, axis) for shift in (1, 2, 8) for axis in (0, 1)]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            same = (a == b).double().mean() - 0.5
            assert same.abs() <= 4.5 * 0.5 / (rows * columns) ** 0.5


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 5, 8, 13, 64, 300])
def test_mask_is_the_twins(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    seed = _seed(-(2**62) - 77)
    got = _mask(37, columns, 0.25, seed.to(device), 2**32 - 1, dtype).cpu()
    want = reference.dropout_keeps(37, columns, 0.25, seed, 2**32 - 1)
    assert torch.equal(got, want * torch.tensor(1 / 0.75, dtype=torch.float64).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["auto", "tiles", "mma", "library"])
def test_mask_of_every_variant(variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, dx and dA drop the same elements, on the GPU as on the CPU."""
    if variant == "mma" and dtype not in tolerances.LOW:
        pytest.skip("mma takes 16-bit x")
    monkeypatch.setenv(VARIABLE, variant)
    rows, columns, p = 200, 648, 0.25
    seed = _seed(device="cuda")
    scale = torch.tensor(1 / (1 - p), dtype=torch.float64).to(dtype)
    want = reference.dropout_keeps(rows, columns, p, _seed(), 9) * scale
    assert torch.equal(_mask(rows, columns, p, seed, 9, dtype).cpu(), want)
    # One rank of ones: dx is the mask times a constant of the row; with dy of one row, dA is the mask of that row.
    x = torch.ones(rows, columns, dtype=dtype, device="cuda", requires_grad=True)
    a = torch.ones(1, 1, columns, device="cuda", requires_grad=True)
    base, b = torch.zeros(rows, 8, dtype=dtype, device="cuda"), torch.ones(8, 1, 1, device="cuda")
    out = ops.expert_update(base, x, a, b, torch.ones(1, 1, device="cuda"), 1.0, p, seed, 9)
    dy = torch.zeros_like(out)
    dy[33, 0] = 1
    dx, da = torch.autograd.grad(out, [x, a], dy, retain_graph=True)
    assert torch.equal(da[0, 0].cpu() != 0, want[33] != 0)
    assert not dx[:33].any()
    assert torch.equal(dx[33].cpu(), want[33])
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(dx.cpu() != 0, want != 0)


@pytest.mark.gpu
def test_graph_follows_the_seed() -> None:
    seed = _seed(5, "cuda")
    arguments = {**linear_sample((2, 64, 128), 96, 3, 4, 2), "dropout": 0.3, "seed": seed, "stream": 1}
    for dtype in (torch.float32, torch.bfloat16):

        def same(a: Tensor, b: Tensor) -> bool:  # the vendor's library may take another product in a graph
            return tolerances.error(a, b) <= 2e-3

        given = Sample("expert_linear", arguments, LINEAR_LEAVES).cast(dtype, torch.device("cuda"))
        captured = Captured(given)
        first = captured.replay()
        assert all(map(same, first, captured.eager()))
        with torch.no_grad():
            given.arguments["seed"].fill_(6)
        other = captured.replay()
        assert not any(map(torch.equal, first, other))
        assert all(map(same, other, captured.eager()))
        with torch.no_grad():
            given.arguments["seed"].fill_(5)
        assert all(map(torch.equal, first, captured.replay()))


@pytest.mark.parametrize("op", ["expert_linear", "expert_update"])
@pytest.mark.parametrize("variant", ["auto", "library"])
def test_nothing_more_is_saved(op: str, variant: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """x, h and what the operator is given; no mask, no x that was dropped from."""
    monkeypatch.setenv(VARIABLE, variant)
    arguments: dict[str, Any] = {**linear_sample((2, 64, 48), 40, 3, 4, 2), "dropout": 0.5, "seed": _seed()}
    if op == "expert_update":
        del arguments["weight"], arguments["bias"]
        arguments["base_out"] = torch.zeros(2, 64, 40)
    given = Sample(op, arguments, LINEAR_LEAVES).cast(torch.float32, device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        given.run(ops)
    x = given.arguments["x"]
    assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()]
    # Beside the arguments, h alone.
    owned = {t.data_ptr() for t in given.arguments.values() if isinstance(t, Tensor)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in owned] == [(2, 64, 12)]


def test_a_changed_seed_is_noticed(device: torch.device) -> None:
    arguments = {**linear_sample((2, 8, 16), 8, 3, 4, 2), "dropout": 0.5, "seed": _seed()}
    given = Sample("expert_linear", arguments, LINEAR_LEAVES).cast(torch.float32, device)
    out = given.run(ops)
    given.arguments["seed"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_without_dropout_the_seed_is_not_looked_at(device: torch.device) -> None:
    given = Sample("expert_linear", linear_sample((2, 8, 16), 8, 3, 4, 2), LINEAR_LEAVES).cast(torch.float32, device)
    want = given.run(ops)
    given.arguments["seed"] = _seed(device=device)
    assert torch.equal(given.run(ops), want)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dropout": 1.0}, "expert_linear: dropout must be in [0, 1), got 1"),
        ({"dropout": -0.1}, "expert_linear: dropout must be in [0, 1), got -0.1"),
        ({"dropout": float("nan")}, "expert_linear: dropout must be in [0, 1), got nan"),
        ({"seed": None}, "expert_linear: seed must be a tensor with dropout, got None"),
        ({"seed": torch.ones(1)}, "expert_linear: seed must be one number of int64, got Float [1]"),
        ({"seed": torch.ones(2).long()}, "expert_linear: seed must be one number of int64, got Long [2]"),
        ({"stream": -1}, "expert_linear: stream must be from 0 to 2^32 - 1, got -1"),
        ({"stream": 2**32}, "expert_linear: stream must be from 0 to 2^32 - 1, got 4294967296"),
    ],
)
def test_errors(changes: dict[str, Any], sentence: str) -> None:
    arguments = {**linear_sample((2, 8, 16), 8, 3, 4, 2), "dropout": 0.5, "seed": _seed(), **changes}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ops.expert_linear(**arguments)


@pytest.mark.gpu
def test_wgmma_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced; where it would be chosen, another variant serves."""
    arguments = {**linear_sample((2, 4096, 320), 320, 3, 4, 2), "dropout": 0.5, "seed": _seed(device="cuda")}
    given = Sample("expert_linear", arguments, LINEAR_LEAVES).cast(torch.bfloat16, torch.device("cuda"))
    out, _ = given.gradients(ops)
    want, _ = given.gradients(reference, given.upstream(out))
    assert tolerances.error(out, want) <= 2 * tolerances.LOW[torch.bfloat16]
    monkeypatch.setenv(VARIABLE, "wgmma")
    with pytest.raises(ValueError, match="NULL where dropout is asked for"):
        given.run(ops)

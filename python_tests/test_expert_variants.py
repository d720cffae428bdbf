"""The variants of the gated multi-expert linear, each forced: values, wanted gradients, bits, capture, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tolerances
import torch
from helpers_ops import LINEARS, Captured, assert_matches_float64
from samples import Sample, samples

from fera_ext import ops, reference

VARIABLE = "FERA_EXPERT_VARIANT"
LINEAR_SAMPLES = [s for s in samples() if s.op in LINEARS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=["tiles", "library"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces one for the test."""
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sample", LINEAR_SAMPLES, ids=str)
def test_matches_float64(variant: str, sample: Sample, dtype: torch.dtype, device: torch.device) -> None:
    assert_matches_float64(sample, dtype, device)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_gradients_for_what_asks(variant: str, wanted: int, device: torch.device) -> None:
    given = next(s for s in LINEAR_SAMPLES if s.op == "expert_linear").cast(torch.float64, device)
    names = [n for i, n in enumerate(given.leaves) if n in ("x", "lora_a", "lora_b", "gate") and wanted >> i & 1]
    if not names:
        pytest.skip("asks for nothing of the experts'")
    results: list[Any] = []
    for module in (ops, reference):
        arguments = {
            k: v.detach().requires_grad_(k in names) if isinstance(v, torch.Tensor) else v
            for k, v in given.arguments.items()
        }
        out = getattr(module, given.op)(**arguments)
        results.append(torch.autograd.grad(out.square().sum(), [arguments[n] for n in names]))
    for got, want in zip(*results):
        assert tolerances.error(got, want) <= 1e-12


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(variant: str, tokens: int, device: torch.device) -> None:
    given = next(s for s in LINEAR_SAMPLES if s.op == "expert_linear").cast(torch.float64, device)
    x = given.arguments["x"].detach()
    gate = given.arguments["gate"].detach()
    arguments = {**given.arguments, "x": x[: gate.shape[0], :tokens].requires_grad_(), "gate": gate.requires_grad_()}
    leaves = [arguments[n] for n in given.leaves]
    got = ops.expert_linear(**arguments)
    want = reference.expert_linear(**arguments)
    assert got.shape == want.shape
    for a, b in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves)):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_same_bits_twice(variant: str, dtype: torch.dtype, device: torch.device) -> None:
    given = LINEAR_SAMPLES[0].cast(dtype, device)
    out, grads = given.gradients(ops)
    again, grads_again = given.gradients(ops, given.upstream(out))
    assert torch.equal(out, again)
    for a, b in zip(grads, grads_again):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("sample", LINEAR_SAMPLES[:4], ids=str)
def test_graph_capture(variant: str, sample: Sample) -> None:
    captured = Captured(sample.cast(torch.float32, torch.device("cuda")))
    for _ in range(3):
        with torch.no_grad():
            for leaf in captured.leaves:
                leaf.mul_(0.9)
        for got, want in zip(captured.replay(), captured.eager()):
            assert tolerances.error(got, want) <= tolerances.linear_limit(torch.float32)


def test_an_unknown_variant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nonsense")
    given = LINEAR_SAMPLES[0].cast(torch.float32, torch.device("cpu"))
    sentence = f"expert_linear: {VARIABLE} must be auto, tiles, mma, wgmma or library, got nonsense"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        given.run(ops)
